"""One Kronecker product over a weight: out[l c + i, m e + j] = W + (scale w1[l, m]) * w2[i, j], one rounding.

A thread keeps runs of eight neighbouring elements of w2 in registers, of neighbouring rows, and walks over blocks m of
one block row l, so that w2 is read once for several blocks. Where rows of w2 are short, neighbouring threads take
neighbouring blocks: a warp still writes long pieces of the weight. A factored w2 is multiplied out by warps, into the
same registers. Base and result move in 16-byte accesses; the bases of the next blocks are on their way to shared memory
while these are merged, and those of the first to L2 while the launch before still runs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np

from kernels import memory, warp
from kernels.barrier import early_options, entrance
from kernels.elements import ELEMENTS, all_finite, parked8
from kernels.parameters import flat_length, table_reader
from kernels.target import blocks_by_shared, cuda, device, f32, i32p, i64, i64p, kernel_factory, types
from kernels.weight.kronecker_half import THREADS, clamp, second_half
from kernels.weight.low_rank_tile import Product

RUNS_IN_BATCH = 8
BLOCKS_AT_ONCE = 1320
"""As many blocks as an H200 holds: those that may wait for the launch before, and ask for bases meanwhile."""


@functools.cache
def _body(base, out, first, second, check, slots, ragged) -> tuple[tuple, Callable, Callable]:
    """Parameters, the block's device function, and ``ask_ahead(tile, block_row, chunk, base, blocks, ...)``: the first
    batch's bases on their way to L2, which may be done while an earlier launch still writes them.

    ``second``: w2's kind, or the product that it is; ``slots``: how many of its rows a thread keeps; the fewer, the
    more blocks in a batch.

    Where rows or blocks do not come out even, what lies beyond reads the last inside, and its stores are left out.
    """
    has_base, w2_half, inside = base is not None, second_half(second, slots, ragged), clamp(ragged)
    place, neighbour, row_of, load_w2 = w2_half.place, w2_half.neighbour, w2_half.row, w2_half.load
    store8 = ELEMENTS[out].store8_cached if has_base else ELEMENTS[out].store8
    load1 = ELEMENTS[first].load
    park, unpark = parked8(base or out, THREADS)
    batch, values_held = RUNS_IN_BATCH // slots, 8 * slots
    threads_of_line = 32 // ELEMENTS[base or out].words
    batch_before_arrived = memory.copy_async_wait(1)

    @device
    def park_batch(shared, thread, pointer, at, i, height, row_stride, block, last_block, stride, half):
        if has_base and block < last_block:
            for u in range(batch):
                offset = at + inside(block + np.int64(u), last_block) * stride
                for r in range(slots):
                    slot = np.uint32(half * np.uint32(RUNS_IN_BATCH) + np.uint32(u * slots + r))
                    park(shared, 0, slot, thread, pointer, offset + inside(row_of(i, r), height) * row_stride)
        memory.copy_async_commit()

    @device
    def load_weights(weights, w1, row_at, block, last_block, span, sub, scale):
        for u in range(batch):
            step = min(block + np.int64(u), last_block - np.int64(1))
            weights[u] = scale * load1(w1, row_at + step * span + sub)

    @device
    def begin(thread, tile, block_row, chunk, blocks, span, steps, chunk_steps, height, runs, by_span_runs, by_runs):
        i, run, sub, mine = place(tile, thread, span, height, runs, by_span_runs, by_runs)
        row_stride = blocks * runs * np.int64(8)
        at = block_row * height * row_stride + (sub * runs + run) * np.int64(8)
        block = chunk * chunk_steps
        last_block = min(block + chunk_steps, steps)
        return i, run, sub, mine, row_stride, span * runs * np.int64(8), at, block, last_block

    @device
    def ask_ahead(
        tile, block_row, chunk, base_pointer, blocks, span, steps, chunk_steps, height, runs, by_span_runs, by_runs
    ):
        thread = warp.thread_index()
        if has_base and neighbour(thread) % np.uint32(threads_of_line) == np.uint32(0):
            i, _, _, _, row_stride, stride, at, block, last_block = begin(
                thread, tile, block_row, chunk, blocks, span, steps, chunk_steps, height, runs, by_span_runs, by_runs
            )
            for u in range(batch):
                offset = at + min(block + np.int64(u), last_block - np.int64(1)) * stride
                for r in range(slots):
                    memory.prefetch_to_keep(base_pointer, offset + inside(row_of(i, r), height) * row_stride)

    @device
    def body(
        shared, tile, block_row, chunk, base_pointer, out_pointer, w1, w2, blocks, span, steps, chunk_steps,
        height, runs, by_span_runs, by_runs, scale, flag,
    ):  # fmt: skip
        """``blocks`` are b = ``steps`` * ``span``; ``chunk_steps`` are walked; ``height`` is c, ``runs`` e / 8."""
        values = cuda.local.array(values_held, np.float32)
        weights = cuda.local.array(batch, np.float32)
        next_weights = cuda.local.array(batch, np.float32)
        result = cuda.local.array(8, np.float32)
        w = cuda.local.array(8, np.float32)
        thread = warp.thread_index()
        i, run, sub, mine, row_stride, stride, at, block, last_block = begin(
            thread, tile, block_row, chunk, blocks, span, steps, chunk_steps, height, runs, by_span_runs, by_runs
        )
        row_at = block_row * blocks
        half = np.uint32(0)
        trace = np.uint32(0)
        ahead = block + np.int64(batch)
        park_batch(shared, thread, base_pointer, at, i, height, row_stride, block, last_block, stride, np.uint32(0))
        park_batch(shared, thread, base_pointer, at, i, height, row_stride, ahead, last_block, stride, np.uint32(1))
        load_weights(weights, w1, row_at, block, last_block, span, sub, scale)
        load_w2(values, w2, i, run, height, runs)
        while block < last_block:
            load_weights(next_weights, w1, row_at, block + np.int64(batch), last_block, span, sub, scale)
            batch_before_arrived()
            for u in range(batch):
                offset = at + (block + np.int64(u)) * stride
                for r in range(slots):
                    if has_base:
                        slot = np.uint32(half * np.uint32(RUNS_IN_BATCH) + np.uint32(u * slots + r))
                        unpark(shared, 0, slot, thread, w, 0)
                    for x in range(8):
                        product = weights[u] * values[8 * r + x]
                        result[x] = w[x] + product if has_base else product
                    row = row_of(i, r)
                    if not ragged or (mine and block + np.int64(u) < last_block and row < height):
                        trace = store8(out_pointer, offset + row * row_stride, result, 0, trace)
            ahead = block + np.int64(2 * batch)
            park_batch(shared, thread, base_pointer, at, i, height, row_stride, ahead, last_block, stride, half)
            half = np.uint32(half ^ np.uint32(1))
            block += np.int64(batch)
            for u in range(batch):
                weights[u] = next_weights[u]
        if check and not all_finite(trace):
            flag[0] = np.int32(1)

    parameters = (
        ELEMENTS[base or out].pointer, ELEMENTS[out].pointer, ELEMENTS[first].pointer, w2_half.parameters, *(i64,) * 8,
        f32, i32p,
    )  # fmt: skip
    return parameters, body, ask_ahead


def _options(base: str | None, early: bool) -> dict:
    """Two batches of the base in shared memory."""
    shared = 2 * RUNS_IN_BATCH * ELEMENTS[base].words * 4 * THREADS if base else 0
    return {
        "threads": THREADS,
        "min_blocks": min(10, blocks_by_shared(shared, hopper=early)),
        "shared_bytes": shared,
    }


_P1, _P2 = Product("bf16", "bf16", 1, 2, True), Product("f16", "f16", 2, 1, False)


@kernel_factory(
    ("bf16", "bf16", "bf16", "bf16", True, 4, False),
    ("bf16", "bf16", "bf16", "bf16", True, 2, True),
    (None, "bf16", "bf16", "bf16", False, 4, False),
    ("f32", "f32", "f16", "f32", True, 1, True),
    ("bf16", "bf16", "bf16", "bf16", True, 4, False, True),
    ("bf16", "bf16", "bf16", _P1, True, 4, False, True),
    ("f32", "f16", "f32", _P2, True, 4, True),
)
def kronecker_merge(base, out, first, second, check, slots, ragged, early=False):
    """One weight.

    Parameters: base, out, w1, w2 (or left, right, rank, strides of left's row and rank and of right's rank), b, span,
    b / span, steps of a chunk, c, e / 8, the reciprocals of span * e / 8 and e / 8, scale, flag; grid (chunks of b,
    tiles of w2, a).
    """
    parameters, body, ask_ahead = _body(base, out, first, second, check, slots, ragged)
    enter = entrance(early, any_size=True)

    def kernel(
        base_pointer, out_pointer, w1, w2, blocks, span, steps, chunk_steps, height, runs, by_span_runs, by_runs, scale,
        flag,
    ):  # fmt: skip
        place = (warp.block_z() * warp.grid_y() + warp.block_y()) * warp.grid_x() + warp.block_x()
        if early and place < np.int64(BLOCKS_AT_ONCE):
            ask_ahead(warp.block_y(), warp.block_z(), warp.block_x(), base_pointer, blocks, span, steps, chunk_steps,
                      height, runs, by_span_runs, by_runs)  # fmt: skip
        enter()
        shared = cuda.shared.array(0, np.uint16, alignment=128)
        body(shared, warp.block_y(), warp.block_z(), warp.block_x(), base_pointer, out_pointer, w1, w2, blocks, span,
             steps, chunk_steps, height, runs, by_span_runs, by_runs, scale, flag)  # fmt: skip

    return kernel, parameters, _options(base, early) | early_options(early)


@kernel_factory(("bf16", "bf16", "bf16", "bf16", True, 4, True), ("bf16", "bf16", "bf16", _P1, True, 4, True, True))
def kronecker_merge_grouped(base, out, first, second, check, slots, ragged, early=False):
    """Many weights in one launch.

    Parameters: a table with a row of the single kernel's parameters for each weight, and four words a block: the
    weight's row in the table and the block's coordinates in the single kernel's grid.
    """
    parameters, body, _ = _body(base, out, first, second, check, slots, ragged)
    enter = entrance(early, any_size=True)
    parameters = types.Tuple(parameters)
    read, width = table_reader(parameters), flat_length(parameters)

    def kernel(table, blocks):
        enter()
        shared = cuda.shared.array(0, np.uint16, alignment=128)
        at = 4 * warp.block_x()
        q = read(table, np.int64(blocks[at]) * np.int64(width))
        body(shared, np.int64(blocks[at + 2]), np.int64(blocks[at + 3]), np.int64(blocks[at + 1]),
             q[0], q[1], q[2], q[3], q[4], q[5], q[6], q[7], q[8], q[9], q[10], q[11], q[12], q[13])  # fmt: skip

    return kernel, (i64p, i32p), _options(base, early) | early_options(early)
