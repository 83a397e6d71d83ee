"""One Kronecker product over a weight: out[l c + i, m e + j] = W + (scale w1[l, m]) * w2[i, j], one rounding.

A thread keeps runs of eight neighbouring elements of w2 in registers and walks over blocks m of one block row l: w2 is
read, or multiplied out of its factors on tensor cores, once for several blocks. Base and result move in 16-byte accesses;
the bases of the next blocks are on their way to shared memory while these are merged.

Which runs a thread keeps follows w2. Stored full: of neighbouring rows, and where rows of w2 are short, neighbouring
threads take neighbouring blocks, so that a warp still writes long pieces of the weight. Factored: those that the tensor
core leaves it, rows g and g + 8, runs t and t + 4 of a tile of 64 x 64.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np

from kernels import low_rank_tile, memory, warp
from kernels.elements import ELEMENTS, largest8, parked8
from kernels.parameters import flat_length, table_reader
from kernels.target import SIMULATOR, cuda, device, f32, i32p, i64, i64p, kernel_factory, types

WARPS = 1 if SIMULATOR else 4
THREADS = 32 * WARPS
RUNS_IN_BATCH = 8
FRAGMENT_GROUPS = 2
FRAGMENT_RUNS = 4 * FRAGMENT_GROUPS
FRAGMENT_SLOTS = 2 * FRAGMENT_GROUPS


@functools.cache
def _gather(second: tuple, slots: int, ragged: bool) -> tuple[tuple, Callable]:
    """Parameter types of w2 and ``gather(p, shared, i, run, height, runs, values, thread)``: the thread's runs in fp32,
    the first at row i and run ``run``; rows and runs beyond w2 repeat the last.

    ``("full", kind)``: w2. ``("low_rank", left, right, (steps, paired, full))``: left, right, and the integers of a
    product (see low_rank_tile).
    """
    if second[0] == "full":
        element = ELEMENTS[second[1]]
        fetch8, unpack8, words_of_8 = element.fetch8_cached, element.unpack8, element.words

        @device
        def load_runs(p, shared, i, run, height, runs, values, thread):
            words = cuda.local.array(words_of_8, np.uint32)
            for r in range(slots):
                row = i + np.int64(r)
                if ragged:
                    row = min(row, height - np.int64(1))
                inside = min(run, runs - np.int64(1)) if ragged else run
                fetch8(p[0], (row * runs + inside) * np.int64(8), words, 0)
                unpack8(words, 0, values, 8 * r)

        return (element.pointer,), load_runs

    spec = (*second[1:3], *second[3])
    tile = low_rank_tile.Tile(WARPS, FRAGMENT_GROUPS, ragged, False)
    product = low_rank_tile.product(spec, tile, 0, 0, 0)
    stage, hold, multiply = product.stage, product.hold, product.multiply
    words_held = max(1, low_rank_tile.held_words(*spec[:3]))

    @device
    def multiply_runs(p, shared, i, run, height, runs, values, thread):
        held = cuda.local.array(words_held, np.uint32)
        result = cuda.local.array(16, np.float32)
        lane = np.uint32(thread & np.uint32(31))
        first_column = (run - np.int64(lane & np.uint32(3))) * np.int64(8)
        stage(p, shared, first_column, runs * np.int64(8), thread)
        hold(p, held, i, height, lane)
        warp.block_barrier()
        for group in range(FRAGMENT_GROUPS):
            multiply(p, shared, held, result, group, i, height, lane)
            for x in range(16):
                values[16 * group + x] = result[x]

    left, right = ELEMENTS[second[1]], ELEMENTS[second[2]]
    return (left.pointer, right.pointer, i64, i64, i64, i64), multiply_runs


def shared_bytes(base: str | None, second: tuple) -> int:
    """The right factor of w2, then two batches of the base."""
    factor = 0
    if second[0] != "full":
        factor = 2 * low_rank_tile.shared_elements(second[1], second[2], second[3][0], 32 * FRAGMENT_GROUPS)
    return factor + (2 * RUNS_IN_BATCH * ELEMENTS[base].words * 4 * THREADS if base else 0)


@functools.cache
def _body(base, out, first, second, check, slots, ragged) -> tuple[tuple, Callable]:
    """``slots``: how many runs of w2 a thread keeps; the fewer, the more blocks in a batch."""
    has_base, fragment = base is not None, second[0] != "full"
    store8, overflow, load1 = ELEMENTS[out].store8, ELEMENTS[out].overflow, ELEMENTS[first].load
    second_types, gather = _gather(second, slots, ragged)
    park, unpark = parked8(base or out, THREADS)
    parked_at = shared_bytes(None, second) // 2
    batch, values_held = RUNS_IN_BATCH // slots, 8 * slots
    batch_before_arrived = memory.copy_async_wait(1)

    @device
    def offset_of(r, row_stride, rows_left, runs_left):
        """Where slot r is from the thread's first run, and whether it lies in w2."""
        row = np.int64(8 * (r & 1)) if fragment else np.int64(r)
        run = np.int64(4 * (r >> 1)) if fragment else np.int64(0)
        inside = not ragged or (row <= rows_left and run <= runs_left)
        if not inside:
            row = np.int64(0)
            run = np.int64(0)
        return row * row_stride + run * np.int64(8), inside

    @device
    def park_batch(shared, thread, pointer, at, row_stride, block, last_block, stride, half, rows_left, runs_left):
        if block < last_block:
            for u in range(batch):
                inside = block + np.int64(u)
                if ragged:
                    inside = min(inside, last_block - np.int64(1))
                for r in range(slots):
                    slot = np.uint32(half * np.uint32(RUNS_IN_BATCH) + np.uint32(u * slots + r))
                    offset, _ = offset_of(r, row_stride, rows_left, runs_left)
                    park(shared, parked_at, slot, thread, pointer, at + inside * stride + offset)
        memory.copy_async_commit()

    @device
    def place_of(tile, thread, span, height, runs):
        """The thread's first row and run of w2, and which of the ``span`` neighbouring blocks is its own."""
        if fragment:
            across = (np.uint32(runs) + np.uint32(FRAGMENT_RUNS - 1)) // np.uint32(FRAGMENT_RUNS)
            tile_row = np.uint32(np.uint32(tile) // np.uint32(across))
            tile_run = np.uint32(np.uint32(tile) - np.uint32(tile_row * np.uint32(across))) * np.uint32(FRAGMENT_RUNS)
            lane = np.uint32(thread & np.uint32(31))
            row_in_tile = np.uint32((thread >> np.uint32(5)) * np.uint32(16) + (lane >> np.uint32(2)))
            i = np.int64(np.uint32(tile_row * np.uint32(16 * WARPS) + row_in_tile))
            return i, np.int64(np.uint32(tile_run + (lane & np.uint32(3)))), np.int64(0)
        wide = np.uint32(np.uint32(runs) * np.uint32(span))
        flat = np.uint32(np.uint32(tile) * np.uint32(THREADS) + thread)
        row_group = np.uint32(flat // wide)
        position = np.uint32(flat - np.uint32(row_group * wide))
        sub = np.uint32(position // np.uint32(runs))
        return np.int64(row_group) * np.int64(slots), np.int64(position) - np.int64(sub) * runs, np.int64(sub)

    @device
    def body(
        shared,
        tile,
        block_row,
        chunk,
        base_pointer,
        out_pointer,
        w1,
        blocks,
        span,
        chunk_blocks,
        height,
        runs,
        scale,
        flag,
        p,
    ):
        """``blocks`` are b, ``height`` c, ``runs`` e / 8; blocks are walked in steps of ``span``, ``chunk_blocks`` steps here.

        Where they do not come out even, what lies beyond reads the first or last inside, and its stores are left out.
        """
        values = cuda.local.array(values_held, np.float32)
        result = cuda.local.array(8, np.float32)
        w = cuda.local.array(8, np.float32)
        thread = warp.thread_index()
        own_row, own_run, sub = place_of(tile, thread, span, height, runs)
        mine = not ragged or (own_row < height and own_run < runs)
        i = min(own_row, height - np.int64(1)) if ragged else own_row
        run = min(own_run, runs - np.int64(1)) if ragged else own_run
        rows_left = height - np.int64(1) - i
        runs_left = runs - np.int64(1) - run
        row_stride = blocks * runs * np.int64(8)
        stride = span * runs * np.int64(8)
        at = (block_row * height + i) * row_stride + (sub * runs + run) * np.int64(8)
        block = chunk * chunk_blocks
        last_block = min(block + chunk_blocks, np.int64(np.uint32(blocks) // np.uint32(span)))
        half = np.uint32(0)
        if has_base:
            park_batch(
                shared, thread, base_pointer, at, row_stride, block, last_block, stride, half, rows_left, runs_left
            )
            park_batch(shared, thread, base_pointer, at, row_stride, block + np.int64(batch), last_block, stride,
                       np.uint32(1), rows_left, runs_left)  # fmt: skip
        gather(p, shared, own_row, own_run, height, runs, values, thread)
        size = np.float32(0)
        while block < last_block:
            if has_base:
                batch_before_arrived()
            for u in range(batch):
                inside = block + np.int64(u)
                if not ragged or (mine and inside < last_block):
                    weight = scale * load1(w1, block_row * blocks + inside * span + sub)
                    for r in range(slots):
                        if has_base:
                            slot = np.uint32(half * np.uint32(RUNS_IN_BATCH) + np.uint32(u * slots + r))
                            unpark(shared, parked_at, slot, thread, w, 0)
                        for x in range(8):
                            product = weight * values[8 * r + x]
                            result[x] = w[x] + product if has_base else product
                        offset, stored = offset_of(r, row_stride, rows_left, runs_left)
                        if stored:
                            store8(out_pointer, at + inside * stride + offset, result, 0)
                            if check:
                                size = largest8(size, result, 0)
            if has_base:
                park_batch(shared, thread, base_pointer, at, row_stride, block + np.int64(2 * batch), last_block, stride,
                           half, rows_left, runs_left)  # fmt: skip
                half = np.uint32(half ^ np.uint32(1))
            block += np.int64(batch)
        if check and not (size < overflow):
            flag[0] = np.int32(1)

    parameters = (
        ELEMENTS[base or out].pointer, ELEMENTS[out].pointer, ELEMENTS[first].pointer, i64, i64, i64, i64, i64, f32,
        i32p, types.Tuple(second_types),
    )  # fmt: skip
    return parameters, body


def _options(base: str | None, second: tuple) -> dict:
    return {
        "threads": THREADS,
        "min_blocks": 4,
        "shared_bytes": shared_bytes(base, second),
        "architectures": (8, 0),
    }


_FULL, _FACTORED = ("full", "bf16"), ("low_rank", "bf16", "bf16", (1, True, True))


@kernel_factory(
    ("bf16", "bf16", "bf16", _FULL, True, 4, False),
    ("bf16", "bf16", "bf16", _FACTORED, True, FRAGMENT_SLOTS, False),
    (None, "bf16", "bf16", _FULL, False, 4, False),
    ("f32", "f32", "f32", ("low_rank", "f16", "f32", (1, False, False)), True, FRAGMENT_SLOTS, True),
)
def kronecker_merge(base, out, first, second, check, slots, ragged):
    """One weight.

    Parameters: base, out, w1, b, span, steps of a chunk, c, e / 8, scale, flag, w2; grid (tiles of w2, a, chunks of b).
    """
    parameters, body = _body(base, out, first, second, check, slots, ragged)

    def kernel(base_pointer, out_pointer, w1, blocks, span, chunk_blocks, height, runs, scale, flag, p):
        shared = cuda.shared.array(0, np.uint16, alignment=128)
        body(shared, warp.block_x(), warp.block_y(), warp.block_z(), base_pointer, out_pointer, w1, blocks, span,
             chunk_blocks, height, runs, scale, flag, p)  # fmt: skip

    return kernel, parameters, _options(base, second)


@kernel_factory(("bf16", "bf16", "bf16", _FULL, True, 4, True))
def kronecker_merge_grouped(base, out, first, second, check, slots, ragged):
    """Many weights in one launch.

    Parameters: a table with a row of the single kernel's parameters for each weight, and four words a block: the
    weight's row in the table and the block's three coordinates.
    """
    parameters, body = _body(base, out, first, second, check, slots, ragged)
    parameters = types.Tuple(parameters)
    read, width = table_reader(parameters), flat_length(parameters)

    def kernel(table, blocks):
        shared = cuda.shared.array(0, np.uint16, alignment=128)
        at = 4 * warp.block_x()
        q = read(table, np.int64(blocks[at]) * np.int64(width))
        body(shared, np.int64(blocks[at + 1]), np.int64(blocks[at + 2]), np.int64(blocks[at + 3]),
             q[0], q[1], q[2], q[3], q[4], q[5], q[6], q[7], q[8], q[9], q[10])  # fmt: skip

    return kernel, (i64p, i32p), _options(base, second)
