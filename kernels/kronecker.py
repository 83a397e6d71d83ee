"""One Kronecker product over a weight: out[l c + i, m e + j] = W + (scale w1[l, m]) * w2[i, j], one rounding.

A thread keeps runs of eight neighbouring elements of w2 in registers, of neighbouring rows, loaded or multiplied out
of its factors, and walks over blocks m of one block row l: w2 is read once for several blocks. Base and result move in
16-byte accesses; the bases of the next blocks are on their way to shared memory while these are merged.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np

from kernels import memory, warp
from kernels.elements import ELEMENTS, largest8, parked8
from kernels.parameters import flat_length, table_reader
from kernels.target import SIMULATOR, cuda, device, f32, i32p, i64, i64p, kernel_factory, types

THREADS = 32 if SIMULATOR else 128
RUNS_IN_BATCH = 8
RANKS_AT_ONCE = 4


@functools.cache
def _second_half(second: tuple, rows: int) -> tuple[tuple, Callable]:
    """Parameter types of w2 and ``gather(p, i, height, run, runs, values)``: a run of eight elements of each of ``rows``
    rows of w2 from row i on, in fp32; rows beyond ``height`` repeat the last.

    ``("full", kind)``: w2. ``("low_rank", left, right)``: left [c, rank], right [rank, e], rank, left's strides.
    """
    if second[0] == "full":
        element = ELEMENTS[second[1]]
        fetch8, unpack8, words_of_8 = element.fetch8_cached, element.unpack8, element.words

        @device
        def load_runs(p, i, height, run, runs, values):
            words = cuda.local.array(words_of_8, np.uint32)
            for r in range(rows):
                row = min(i + np.int64(r), height - np.int64(1))
                fetch8(p[0], (row * runs + run) * np.int64(8), words, 0)
                unpack8(words, 0, values, 8 * r)

        return (element.pointer,), load_runs

    left, right = ELEMENTS[second[1]], ELEMENTS[second[2]]
    load_left, fetch8, unpack8, words_of_8 = left.load, right.fetch8_cached, right.unpack8, right.words
    words_at_once = RANKS_AT_ONCE * words_of_8

    @device
    def multiply_runs(p, i, height, run, runs, values):
        words = cuda.local.array(words_at_once, np.uint32)
        factors = cuda.local.array(8, np.float32)
        for x in range(8 * rows):
            values[x] = np.float32(0)
        for first in range(np.int64(0), p[2], np.int64(RANKS_AT_ONCE)):
            for u in range(RANKS_AT_ONCE):
                k = min(first + np.int64(u), p[2] - np.int64(1))
                fetch8(p[1], (k * runs + run) * np.int64(8), words, u * words_of_8)
            for u in range(RANKS_AT_ONCE):
                if first + np.int64(u) < p[2]:
                    unpack8(words, u * words_of_8, factors, 0)
                    for r in range(rows):
                        row = min(i + np.int64(r), height - np.int64(1))
                        a = load_left(p[0], row * p[3] + (first + np.int64(u)) * p[4])
                        for x in range(8):
                            values[8 * r + x] += a * factors[x]

    return (left.pointer, right.pointer, i64, i64, i64), multiply_runs


@functools.cache
def _body(base, out, first, second, check, rows, ragged) -> tuple[tuple, Callable]:
    """``rows``: how many rows of w2 a thread keeps, 1, 2, 4 or 8; the fewer, the more blocks in a batch."""
    has_base = base is not None
    base_element, out_element = ELEMENTS[base or out], ELEMENTS[out]
    store8, overflow, load1 = out_element.store8, out_element.overflow, ELEMENTS[first].load
    second_types, gather = _second_half(second, rows)
    park, unpark = parked8(base or out, THREADS)
    batch = RUNS_IN_BATCH // rows
    values_held = 8 * rows
    previous_batch_arrived = memory.copy_async_wait(1)

    @device
    def park_batch(shared, thread, base_pointer, at, row_stride, block, last_block, stride, half, rows_left):
        if block < last_block:
            for u in range(batch):
                inside = block + np.int64(u)
                if ragged:
                    inside = min(inside, last_block - np.int64(1))
                for r in range(rows):
                    row = np.int64(min(np.int64(r), rows_left)) if ragged else np.int64(r)
                    index = at + inside * stride + row * row_stride
                    park(shared, 0, np.uint32(half * np.uint32(RUNS_IN_BATCH) + np.uint32(u * rows + r)), thread,
                         base_pointer, index)  # fmt: skip
        memory.copy_async_commit()

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
        chunk_blocks,
        height,
        runs,
        scale,
        flag,
        p,
    ):
        """``blocks`` are b, ``height`` c, ``runs`` e / 8; ``chunk_blocks`` of the b blocks are this block's.

        Where they do not come out even, rows beyond w2 and blocks beyond the chunk read the last one inside, and
        their stores are left out.
        """
        values = cuda.local.array(values_held, np.float32)
        result = cuda.local.array(8, np.float32)
        w = cuda.local.array(8, np.float32)
        thread = warp.thread_index()
        flat = np.uint32(np.uint32(tile) * np.uint32(THREADS) + thread)
        row_group = np.uint32(flat // np.uint32(runs))
        run = np.int64(np.uint32(flat - row_group * np.uint32(runs)))
        i = np.int64(row_group) * np.int64(rows)
        if not ragged or i < height:
            row_stride = blocks * runs * np.int64(8)
            stride = runs * np.int64(8)
            at = (block_row * height + i) * row_stride + run * np.int64(8)
            rows_left = height - np.int64(1) - i
            block = chunk * chunk_blocks
            last_block = min(block + chunk_blocks, blocks)
            size = np.float32(0)
            half = np.uint32(0)
            if has_base:
                park_batch(shared, thread, base_pointer, at, row_stride, block, last_block, stride, half, rows_left)
                park_batch(shared, thread, base_pointer, at, row_stride, block + np.int64(batch), last_block, stride,
                           np.uint32(1), rows_left)  # fmt: skip
            gather(p, i, height, run, runs, values)
            while block < last_block:
                if has_base:
                    previous_batch_arrived()
                for u in range(batch):
                    if not ragged or block + np.int64(u) < last_block:
                        weight = scale * load1(w1, block_row * blocks + block + np.int64(u))
                        offset = at + (block + np.int64(u)) * stride
                        for r in range(rows):
                            if has_base:
                                slot = np.uint32(half * np.uint32(RUNS_IN_BATCH) + np.uint32(u * rows + r))
                                unpark(shared, 0, slot, thread, w, 0)
                            for x in range(8):
                                product = weight * values[8 * r + x]
                                result[x] = w[x] + product if has_base else product
                            if not ragged or np.int64(r) <= rows_left:
                                store8(out_pointer, offset + np.int64(r) * row_stride, result, 0)
                                if check:
                                    size = largest8(size, result, 0)
                if has_base:
                    next_block = block + np.int64(2 * batch)
                    park_batch(
                        shared, thread, base_pointer, at, row_stride, next_block, last_block, stride, half, rows_left
                    )
                    half = np.uint32(half ^ np.uint32(1))
                block += np.int64(batch)
            if check and not (size < overflow):
                flag[0] = np.int32(1)

    parameters = (
        base_element.pointer, out_element.pointer, ELEMENTS[first].pointer, i64, i64, i64, i64, f32, i32p,
        types.Tuple(second_types),
    )  # fmt: skip
    return parameters, body


def _options(base: str | None) -> dict:
    """Two batches of the base in shared memory."""
    shared = 2 * RUNS_IN_BATCH * ELEMENTS[base].words * 4 * THREADS if base else 0
    return {"threads": THREADS, "min_blocks": 4, "shared_bytes": shared, "architectures": (8, 0)}


_FULL = ("full", "bf16")


@kernel_factory(
    ("bf16", "bf16", "bf16", _FULL, True, 4, False),
    ("bf16", "bf16", "bf16", ("low_rank", "bf16", "bf16"), True, 4, True),
    (None, "bf16", "bf16", _FULL, False, 4, False),
    ("f32", "f32", "f32", ("low_rank", "f16", "f32"), True, 2, True),
)
def kronecker_merge(base, out, first, second, check, rows, ragged):
    """One weight.

    Parameters: base, out, w1, b, blocks of a chunk, c, e / 8, scale, flag, w2; grid (tiles of w2, a, chunks of b).
    """
    parameters, body = _body(base, out, first, second, check, rows, ragged)

    def kernel(base_pointer, out_pointer, w1, blocks, chunk_blocks, height, runs, scale, flag, p):
        shared = cuda.shared.array(0, np.uint16, alignment=128)
        body(shared, warp.block_x(), warp.block_y(), warp.block_z(), base_pointer, out_pointer, w1, blocks,
             chunk_blocks, height, runs, scale, flag, p)  # fmt: skip

    return kernel, parameters, _options(base)


@kernel_factory(("bf16", "bf16", "bf16", _FULL, True, 4, True))
def kronecker_merge_grouped(base, out, first, second, check, rows, ragged):
    """Many weights in one launch.

    Parameters: a table with a row of the single kernel's parameters for each weight, and four words a block: the
    weight's row in the table and the block's three coordinates.
    """
    parameters, body = _body(base, out, first, second, check, rows, ragged)
    parameters = types.Tuple(parameters)
    read, width = table_reader(parameters), flat_length(parameters)

    def kernel(table, blocks):
        shared = cuda.shared.array(0, np.uint16, alignment=128)
        at = 4 * warp.block_x()
        q = read(table, np.int64(blocks[at]) * np.int64(width))
        body(shared, np.int64(blocks[at + 1]), np.int64(blocks[at + 2]), np.int64(blocks[at + 3]),
             q[0], q[1], q[2], q[3], q[4], q[5], q[6], q[7], q[8], q[9])  # fmt: skip

    return kernel, (i64p, i32p), _options(base)
