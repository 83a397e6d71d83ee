"""Products with few columns: low-rank factors', out[m, n] = epilogue(scale A[m, k] B[n, k]^T), n at most 64.

Reading A is all the work, so A goes from memory to the tensor core without shared memory: a lane loads eight
neighbouring values of its row and calls them the columns that the instruction wants of it, and does the same with B; a
sum does not ask in which order its terms come. The warps of a block share the depth and add up in the end, in order.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from kernels import memory, tensor_core
from kernels.barrier import HOPPER, entrance
from kernels.elements import ELEMENTS
from kernels.matmul.epilogue import epilogue
from kernels.matmul.problem import COLUMNS, OUT, OUT_BATCH, OUT_STRIDE, ROWS, result_parameters
from kernels.target import SIMULATOR, cuda, device, f32, i64, kernel_factory, types
from kernels.warp import block_barrier, block_x, block_y, thread_index

WARPS = 2 if SIMULATOR else 8
ROW_TILES = 2
"""Groups of 16 rows that a block takes."""

DEPTH = 32
"""Values of K that a warp takes at once: eight a lane, four lanes a row."""

UNROLL = 2
A, A_STRIDE, A_BATCH, DEPTH_OF_A = range(4)
"""Positions of A's parameters."""
B, B_STRIDE, B_BATCH, SCALE = range(4)
"""Positions of B's."""
_u32 = np.uint32


def row_fetcher(tiles: int, rows_of_tile: int, load: Callable = memory.load128) -> Callable:
    """A device function: each lane's eight values of its row in every tile of rows; zeros past the end of K."""

    @device
    def fetch(words, at, pointer, start, stride, row0, rows, g, k, depth):
        inside = k < depth
        place = min(k, max(depth - np.int64(8), np.int64(0)))
        for tile in range(tiles):
            row = min(row0 + np.int64(tile * rows_of_tile) + g, rows - np.int64(1))
            a, b, c, d = load(pointer, start + row * stride + place)
            words[at + 4 * tile] = a if inside else _u32(0)
            words[at + 4 * tile + 1] = b if inside else _u32(0)
            words[at + 4 * tile + 2] = c if inside else _u32(0)
            words[at + 4 * tile + 3] = d if inside else _u32(0)

    return fetch


def _column_fetcher(tiles: int) -> Callable:
    """A device function: what `row_fetcher` gives of the rows of B, of a B whose lines are values of K.

    A lane loads two neighbours of a line, and the warp transposes matrices of eight lines and eight columns: those
    lines that a lane's eight values of K come from, two of each group of eight at a time.
    """

    @device
    def fetch(words, at, pointer, start, stride, columns, g, k, depth):
        first, pair = k & np.int64(-DEPTH), (k & np.int64(DEPTH - 1)) >> np.int64(2)
        for tile in range(tiles):
            column = min(np.int64(8 * tile), columns - np.int64(8)) + pair
            for part in range(4):
                line = first + ((g >> np.int64(1)) << np.int64(3)) + np.int64(2 * part) + (g & np.int64(1))
                place = start + min(line, depth - np.int64(1)) * stride + column
                word = memory.load32(pointer, place)
                words[at + 4 * tile + part] = tensor_core.transposed_matrix(word if line < depth else _u32(0))

    return fetch


def row_multiplier(kind: str, row_tiles: int, column_tiles: int) -> Callable:
    """A device function: two products of 16 for every pair of tiles, of what `row_fetcher` fetched."""
    mma = tensor_core.MMA[kind]

    @device
    def multiply(sums, a, a_at, b, b_at):
        for row_tile in range(row_tiles):
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
    ("bf16", "bf16", 2, (), True),
    ("bf16", "bf16", 2, (), True, True),
)
def matmul_narrow(kind: str, out: str, tiles: int, steps: tuple, early: bool = False, by_lines: bool = False):
    """``tiles`` are groups of eight columns.

    ``early`` the next grid may begin at once (sm_90); this one is launched when the one before has ended, as its few
    blocks would else share the multiprocessors that are free first. ``by_lines``: B's lines are values of K, not
    columns, of which there is then a multiple of eight. Parameters: the result's, A's, B's, the epilogue's; blocks
    along y are results of a batch. A and B begin at, and their lines are apart by, multiples of eight elements, and so
    is K.
    """
    fetch_columns, fetch_lines = row_fetcher(tiles, 8), _column_fetcher(tiles)
    a_words, b_words, sum_count = 8 * ROW_TILES, 4 * tiles, 4 * ROW_TILES * tiles
    all_a, all_b = UNROLL * a_words, UNROLL * b_words
    fetch_a, multiply = row_fetcher(2 * ROW_TILES, 8), row_multiplier(kind, ROW_TILES, tiles)
    width, height = 8 * tiles, 16 * ROW_TILES
    threads, partial = 32 * WARPS, 16 * ROW_TILES * 8 * tiles
    store, finish, enter = ELEMENTS[out].store, epilogue(steps).one, entrance(early)

    @device
    def fetch_b(words, at, right, start, columns, g, k, depth):
        if by_lines:
            fetch_lines(words, at, right[B], start, right[B_STRIDE], columns, g, k, depth)
        else:
            fetch_columns(words, at, right[B], start, right[B_STRIDE], np.int64(0), columns, g, k, depth)

    @device
    def accumulate(sums, left, right, result, row0, batch, lane, number):
        a = cuda.local.array(all_a, np.uint32)
        b = cuda.local.array(all_b, np.uint32)
        for i in range(sum_count):
            sums[i] = np.float32(0)
        g, own = np.int64(lane >> _u32(2)), np.int64((lane & _u32(3)) << _u32(3))
        rows, columns, depth = result[ROWS], result[COLUMNS], left[DEPTH_OF_A]
        a_start, b_start = batch * left[A_BATCH], batch * right[B_BATCH]
        turns = _u32(_u32(depth + np.int64(DEPTH * WARPS * UNROLL - 1)) // _u32(DEPTH * WARPS * UNROLL))
        for turn in range(turns):
            for i in range(UNROLL):
                chunk = np.int64(_u32(_u32(turn) * _u32(UNROLL) + _u32(i)) * _u32(WARPS) + number)
                k = chunk * np.int64(DEPTH) + own
                fetch_a(a, i * a_words, left[A], a_start, left[A_STRIDE], row0, rows, g, k, depth)
                fetch_b(b, i * b_words, right, b_start, columns, g, k, depth)
            for i in range(UNROLL):
                multiply(sums, a, i * a_words, b, i * b_words)

    @device
    def park(shared, sums, lane, number):
        """The warp's sums as [rows, columns] in its place of shared memory."""
        at = _u32(_u32(number * _u32(partial)) + (lane >> _u32(2)) * _u32(width) + ((lane & _u32(3)) << _u32(1)))
        for row_tile in range(ROW_TILES):
            for column_tile in range(tiles):
                for i in range(4):
                    row, column = 16 * row_tile + 8 * (i >> 1), 8 * column_tile + (i & 1)
                    value = sums[4 * (row_tile * tiles + column_tile) + i]
                    shared[at + _u32(row * width + column)] = value

    def kernel(result, left, right, e):
        enter()
        shared = cuda.shared.array(0, np.float32, alignment=16)
        sums = cuda.local.array(sum_count, np.float32)
        thread = thread_index()
        lane, number = _u32(thread & _u32(31)), _u32(thread >> _u32(5))
        row0, batch = block_x() * np.int64(height), block_y()
        accumulate(sums, left, right, result, row0, batch, lane, number)
        park(shared, sums, lane, number)
        block_barrier()
        for turn in range(partial // threads + (partial % threads > 0)):
            place = _u32(_u32(turn) * _u32(threads) + thread)
            row, column = row0 + np.int64(place // _u32(width)), np.int64(place % _u32(width))
            if place < _u32(partial) and row < result[ROWS] and column < result[COLUMNS]:
                value = np.float32(0)
                for other in range(WARPS):
                    value += shared[place + _u32(other * partial)]
                scale = right[SCALE]
                value = np.float32(0) if scale == np.float32(0) else value * scale
                at = batch * result[OUT_BATCH] + row * result[OUT_STRIDE] + column
                store(result[OUT], at, finish(value, batch, row, column, e))

    pointer = ELEMENTS[kind].pointer
    left, right = types.Tuple((pointer, i64, i64, i64)), types.Tuple((pointer, i64, i64, f32))
    parameters = (result_parameters(out), left, right, epilogue(steps).parameters)
    options = {"threads": threads, "shared_bytes": 4 * WARPS * partial, "min_blocks": 2 if tiles <= 4 else 1}
    return kernel, parameters, options | (HOPPER if early else {})
