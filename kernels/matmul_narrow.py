"""Products with few columns: a low-rank factor's, out[m, n] = epilogue(A[m, k] B[n, k]^T) with n at most 64.

Reading A is all the work, so A goes from memory to the tensor core without shared memory: a lane loads eight
neighbouring values of its row and calls them the columns that the instruction wants of it, and does the same with B; a
sum does not ask in which order its terms come. The warps of a block share the depth and add up in the end, in order.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from kernels import memory, tensor_core
from kernels.elements import ELEMENTS
from kernels.matmul_epilogue import epilogue
from kernels.matmul_problem import (
    A_BATCH,
    A_STRIDE,
    B_BATCH,
    B_STRIDE,
    COLUMNS,
    OUT,
    OUT_BATCH,
    OUT_STRIDE,
    ROWS,
    SCALE,
    A,
    B,
    K,
    result_parameters,
    segment_parameters,
)
from kernels.target import SIMULATOR, cuda, device, kernel_factory, types
from kernels.warp import block_barrier, block_x, block_y, thread_index

WARPS = 2 if SIMULATOR else 8
ROW_TILES = 2
"""Groups of 16 rows that a block takes."""

DEPTH = 32
"""Values of K that a warp takes at once: eight a lane, four lanes a row."""

UNROLL = 2
_MMA = {"bf16": tensor_core.mma_bf16, "f16": tensor_core.mma_f16}
_u32 = np.uint32


def _fetcher(tiles: int, rows_of_tile: int) -> Callable:
    """A device function: each lane's eight values of its row in every tile of rows; zeros past the end of K."""

    @device
    def fetch(words, at, pointer, start, stride, row0, rows, g, k, depth):
        inside = k < depth
        place = min(k, max(depth - np.int64(8), np.int64(0)))
        for tile in range(tiles):
            row = min(row0 + np.int64(tile * rows_of_tile) + g, rows - np.int64(1))
            a, b, c, d = memory.load128(pointer, start + row * stride + place)
            words[at + 4 * tile] = a if inside else _u32(0)
            words[at + 4 * tile + 1] = b if inside else _u32(0)
            words[at + 4 * tile + 2] = c if inside else _u32(0)
            words[at + 4 * tile + 3] = d if inside else _u32(0)

    return fetch


def _multiplier(kind: str, column_tiles: int) -> Callable:
    """A device function: two products of 16 for every pair of tiles."""
    mma = _MMA[kind]

    @device
    def multiply(sums, a, a_at, b, b_at):
        for row_tile in range(ROW_TILES):
            for column_tile in range(column_tiles):
                for half in range(2):
                    top, below = a_at + 8 * row_tile + 2 * half, a_at + 8 * row_tile + 4 + 2 * half
                    right = b_at + 4 * column_tile + 2 * half
                    s = 4 * (row_tile * column_tiles + column_tile)
                    sums[s], sums[s + 1], sums[s + 2], sums[s + 3] = mma(
                        a[top], a[below], a[top + 1], a[below + 1], b[right], b[right + 1],
                        sums[s], sums[s + 1], sums[s + 2], sums[s + 3],
                    )  # fmt: skip

    return multiply


@kernel_factory(
    ("bf16", "bf16", 2, ()),
    ("bf16", "bf16", 8, (("scale_column", "f32"),)),
    ("f16", "f32", 1, (("bias", "f16"), ("gelu",))),
)
def matmul_narrow(kind: str, out: str, column_tiles: int, steps: tuple):
    """Parameters: the result's, a tuple of the one segment's, the epilogue's; blocks along y are results of a batch.

    A and B begin at, and their lines are apart by, multiples of eight elements; so is K.
    """
    element, finish = ELEMENTS[out], epilogue(steps)
    store_one, one = element.store, finish.one
    a_words, b_words, sum_count = 8 * ROW_TILES, 4 * column_tiles, 4 * ROW_TILES * column_tiles
    all_a, all_b = UNROLL * a_words, UNROLL * b_words
    fetch_a, fetch_b, multiply = _fetcher(2 * ROW_TILES, 8), _fetcher(column_tiles, 8), _multiplier(kind, column_tiles)
    width, height = 8 * column_tiles, 16 * ROW_TILES
    threads, partial = 32 * WARPS, 16 * ROW_TILES * 8 * column_tiles

    @device
    def accumulate(sums, s, result, row0, batch, lane, number):
        a = cuda.local.array(all_a, np.uint32)
        b = cuda.local.array(all_b, np.uint32)
        for i in range(sum_count):
            sums[i] = np.float32(0)
        g, own = np.int64(lane >> _u32(2)), np.int64((lane & _u32(3)) << _u32(3))
        a_start, b_start = batch * s[A_BATCH], batch * s[B_BATCH]
        turns = _u32((s[K] + np.int64(DEPTH * WARPS * UNROLL - 1)) // np.int64(DEPTH * WARPS * UNROLL))
        for turn in range(turns):
            for i in range(UNROLL):
                chunk = np.int64(_u32(_u32(turn) * _u32(UNROLL) + _u32(i)) * _u32(WARPS) + number)
                k = chunk * np.int64(DEPTH) + own
                fetch_a(a, i * a_words, s[A], a_start, s[A_STRIDE], row0, result[ROWS], g, k, s[K])
                fetch_b(b, i * b_words, s[B], b_start, s[B_STRIDE], np.int64(0), result[COLUMNS], g, k, s[K])
            for i in range(UNROLL):
                multiply(sums, a, i * a_words, b, i * b_words)

    @device
    def park(shared, sums, lane, number):
        """The warp's sums as [rows, columns] in its place of shared memory."""
        at = _u32(_u32(number * _u32(partial)) + (lane >> _u32(2)) * _u32(width) + ((lane & _u32(3)) << _u32(1)))
        for row_tile in range(ROW_TILES):
            for column_tile in range(column_tiles):
                for i in range(4):
                    row, column = 16 * row_tile + 8 * (i >> 1), 8 * column_tile + (i & 1)
                    value = sums[4 * (row_tile * column_tiles + column_tile) + i]
                    shared[at + _u32(row * width + column)] = value

    def kernel(result, p, e):
        shared = cuda.shared.array(0, np.float32, alignment=16)
        sums = cuda.local.array(sum_count, np.float32)
        thread = thread_index()
        lane, number = _u32(thread & _u32(31)), _u32(thread >> _u32(5))
        row0, batch = block_x() * np.int64(height), block_y()
        s = p[0]
        accumulate(sums, s, result, row0, batch, lane, number)
        park(shared, sums, lane, number)
        block_barrier()
        for turn in range(partial // threads + (partial % threads > 0)):
            place = _u32(_u32(turn) * _u32(threads) + thread)
            row, column = row0 + np.int64(place // _u32(width)), np.int64(place % _u32(width))
            if place < _u32(partial) and row < result[ROWS] and column < result[COLUMNS]:
                value = np.float32(0)
                for other in range(WARPS):
                    value += shared[place + _u32(other * partial)]
                value = one(value * s[SCALE], batch, row, column, e)
                store_one(result[OUT], batch * result[OUT_BATCH] + row * result[OUT_STRIDE] + column, value)

    parameters = (result_parameters(out), types.Tuple((segment_parameters(("NT", kind, kind)),)), finish.parameters)
    options = {"threads": threads, "shared_bytes": 4 * WARPS * partial, "min_blocks": 2 if column_tiles <= 4 else 1}
    return kernel, parameters, options
