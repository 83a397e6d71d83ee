"""What low-rank terms need before their product: t = scale A D^T, and the terms' U beside each other.

t goes to memory in two parts, what it rounds to and what rounding left, which together are as good as fp32: [rows, 2
width], where a term's columns begin at a multiple of eight in either part. U goes there once for each part, [n, 2
width], so that all terms of one A are one segment of the product.

Reading A is all the work; see `narrow` for how it reaches the tensor core. Groups of warps walk over tiles of rows,
each by itself, so that some load while others add up. A block fills a multiprocessor: the fewer blocks there are, the
more multiprocessors are left to the product, which begins beside them (sm_90).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from kernels import barrier, memory
from kernels.elements import ELEMENTS
from kernels.matmul.narrow import A_BATCH, A_STRIDE, DEPTH, DEPTH_OF_A, A, row_fetcher, row_multiplier
from kernels.matmul.problem import COLUMNS, OUT, OUT_BATCH, OUT_STRIDE, ROWS, result_parameters
from kernels.matmul.wgmma_tile import WARPGROUP
from kernels.target import cuda, device, f32, i64, kernel_factory, types
from kernels.warp import block_barrier, block_x, grid_x, thread_index, warpgroup_barrier

UNIT = 8
D, RANK, SCALE, U, U_STRIDE = range(5)
"""Positions of a term's parameters: its D [rank, k], and U [n, rank], whose lines may be further apart."""
_u32 = np.uint32


@dataclass(frozen=True)
class InnerTile:
    """How a block works: ``groups`` of ``warps`` that share the depth of a tile of 16 ``row_tiles`` rows, each with
    ``unroll`` chunks of depth under way; ``cluster`` blocks are placed on neighbouring multiprocessors.
    """

    warps: int
    groups: int
    row_tiles: int
    unroll: int
    cluster: int = 1

    @property
    def rows(self) -> int:
        """Rows of a tile."""
        return 16 * self.row_tiles

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 32 * self.warps * self.groups


def _terms(tiles: tuple[int, ...]) -> tuple[Callable, Callable]:
    """Device functions over all terms: fetch their D's tiles; and the scale of a column, 0 for one that none makes."""

    @device
    def nothing(words, at, terms, g, k, depth):
        pass

    @device
    def no_scale(terms, column):
        return np.float32(0)

    fetch, scale_of, position = nothing, no_scale, sum(tiles)
    for number in reversed(range(len(tiles))):
        position -= tiles[number]
        fetch = _fetch_term(number, position, tiles[number], fetch)
        scale_of = _scale_of_term(number, position, tiles[number], scale_of)
    return fetch, scale_of


def _fetch_term(number: int, position: int, count: int, rest: Callable) -> Callable:
    fetch_rows = row_fetcher(count, 8)

    @device
    def fetch(words, at, terms, g, k, depth):
        term, none = terms[number], np.int64(0)
        fetch_rows(words, at + 4 * position, term[D], none, depth, none, term[RANK], g, k, depth)
        rest(words, at, terms, g, k, depth)

    return fetch


def _scale_of_term(number: int, position: int, count: int, rest: Callable) -> Callable:
    first, end = _u32(UNIT * position), _u32(UNIT * (position + count))

    @device
    def scale_of(terms, column):
        if column >= first and column < end:
            return terms[number][SCALE] if np.int64(column - first) < terms[number][RANK] else np.float32(0)
        return rest(terms, column)

    return scale_of


def _accumulator(kind: str, column_tiles: int, tile: InnerTile, fetch_b: Callable) -> Callable:
    """A device function: a warp's share of the depth of a tile of rows."""
    a_words, b_words, sum_count = 8 * tile.row_tiles, 4 * column_tiles, 4 * tile.row_tiles * column_tiles
    all_a, all_b, unroll, warps = tile.unroll * a_words, tile.unroll * b_words, tile.unroll, tile.warps
    # Rows of A are read once, by a grid that may have begun before they were made: not by way of L1, which D stays in.
    fetch_a = row_fetcher(2 * tile.row_tiles, 8, memory.load128_stream)
    multiply = row_multiplier(kind, tile.row_tiles, column_tiles)

    @device
    def accumulate(sums, left, terms, rows, row0, batch, lane, number):
        a = cuda.local.array(all_a, np.uint32)
        b = cuda.local.array(all_b, np.uint32)
        for i in range(sum_count):
            sums[i] = np.float32(0)
        g, own = np.int64(lane >> _u32(2)), np.int64((lane & _u32(3)) << _u32(3))
        depth, start = left[DEPTH_OF_A], batch * left[A_BATCH]
        turns = _u32(_u32(depth + np.int64(DEPTH * warps * unroll - 1)) // _u32(DEPTH * warps * unroll))
        for turn in range(turns):
            for i in range(unroll):
                chunk = np.int64(_u32(_u32(turn) * _u32(unroll) + _u32(i)) * _u32(warps) + number)
                k = chunk * np.int64(DEPTH) + own
                fetch_a(a, i * a_words, left[A], start, left[A_STRIDE], row0, rows, g, k, depth)
                fetch_b(b, i * b_words, terms, g, k, depth)
            for i in range(unroll):
                multiply(sums, a, i * a_words, b, i * b_words)

    return accumulate


def _finisher(kind: str, column_tiles: int, tile: InnerTile, scale_of: Callable) -> tuple[Callable, int]:
    """A device function: a group's sums added up in order, scaled, in two parts to memory; shared elements it needs."""
    width, row_tiles, warps, threads = UNIT * column_tiles, tile.row_tiles, tile.warps, 32 * tile.warps
    partial, element = tile.rows * width, ELEMENTS[kind]
    store, rounded = element.store, element.rounded
    assert tile.groups == 1 or threads == WARPGROUP, tile
    wait = block_barrier if tile.groups == 1 else warpgroup_barrier

    @device
    def park(shared, base, sums, lane, number):
        """The warp's sums as [rows, columns] in its place of shared memory."""
        at = _u32(base + number * _u32(partial) + (lane >> _u32(2)) * _u32(width) + ((lane & _u32(3)) << _u32(1)))
        for row_tile in range(row_tiles):
            for column_tile in range(column_tiles):
                for i in range(4):
                    row, column = 16 * row_tile + 8 * (i >> 1), UNIT * column_tile + (i & 1)
                    value = sums[4 * (row_tile * column_tiles + column_tile) + i]
                    shared[at + _u32(row * width + column)] = value

    @device
    def finish(shared, base, sums, result, terms, row0, batch, lane, number):
        park(shared, base, sums, lane, number)
        wait()
        own = _u32(number * _u32(32) + lane)
        for turn in range(partial // threads + (partial % threads > 0)):
            place = _u32(_u32(turn) * _u32(threads) + own)
            line, column = _u32(place // _u32(width)), _u32(place % _u32(width))
            row = row0 + np.int64(line)
            if place < _u32(partial) and row < result[ROWS]:
                value = np.float32(0)
                for other in range(warps):
                    value += shared[_u32(base + place + _u32(other * partial))]
                scale = scale_of(terms, column)
                value = np.float32(0) if scale == np.float32(0) else value * scale
                at = batch * result[OUT_BATCH] + row * result[OUT_STRIDE] + np.int64(column)
                store(result[OUT], at, value)
                store(result[OUT], at + np.int64(width), value - rounded(value))
        wait()

    return finish, partial * tile.warps


@device
def _no_columns(beside, terms, row, width):
    pass


def _columns(tiles: tuple[int, ...], whole: bool) -> Callable:
    """A device function: a row of every term's U to both of its places, zeros where there is no rank or no scale."""
    copy, position = _no_columns, sum(tiles)
    for number in reversed(range(len(tiles))):
        position -= tiles[number]
        copy = _columns_of_term(number, position, tiles[number], whole, copy)
    return copy


def _columns_of_term(number: int, position: int, count: int, whole: bool, rest: Callable) -> Callable:
    @device
    def copy_unit(beside, at, width, term, source, ranks):
        a = b = c = d = _u32(0)
        if ranks > np.int64(0):
            a, b, c, d = memory.load128_stream(term[U], source)
        memory.store128(beside, at, a, b, c, d)
        memory.store128(beside, at + width, a, b, c, d)

    @device
    def copy_elements(beside, at, width, term, source, ranks):
        for i in range(UNIT):
            value = np.uint16(0)
            if np.int64(i) < ranks:
                value = term[U][source + np.int64(i)]
            beside[at + np.int64(i)] = value
            beside[at + width + np.int64(i)] = value

    copy_some = copy_unit if whole else copy_elements

    @device
    def copy(beside, terms, row, width):
        term = terms[number]
        ranks = np.int64(0) if term[SCALE] == np.float32(0) else term[RANK]
        for unit in range(count):
            at = row * (np.int64(2) * width) + np.int64(UNIT * (position + unit))
            source = row * term[U_STRIDE] + np.int64(UNIT * unit)
            copy_some(beside, at, width, term, source, ranks - np.int64(UNIT * unit))
        rest(beside, terms, row, width)

    return copy


@kernel_factory(
    ("bf16", (2,), InnerTile(4, 4, 2, 2, 2), True, True, True),
    ("bf16", (2, 2, 2), InnerTile(4, 4, 2, 1, 2), True, True, True),
    ("f16", (2, 1), InnerTile(8, 1, 2, 1), True, False, False),
    ("bf16", (2,), InnerTile(16, 1, 1, 4), False, True, True),
)
def low_rank_inner(
    kind: str, tiles: tuple[int, ...], tile: InnerTile, beside: bool, whole: bool = True, overlaps: bool = False
):
    """``tiles`` are groups of eight columns of each term; ``beside``: U's columns are put beside each other, of which
    there is a multiple of eight in each term where ``whole``. With ``overlaps`` the grid waits for the one before, and
    lets the next begin (sm_90).

    Parameters: t's (rows, and the columns of one part), A's, how many of a batch, a tuple of each term's, U's copy and
    its rows. A and D begin at, and their lines are apart by, multiples of eight elements; so is K.
    """
    column_tiles = sum(tiles)
    fetch_b, scale_of = _terms(tiles)
    accumulate = _accumulator(kind, column_tiles, tile, fetch_b)
    finish, elements = _finisher(kind, column_tiles, tile, scale_of)
    copy, groups, warps, height, threads = _columns(tiles, whole), tile.groups, tile.warps, tile.rows, tile.threads
    sum_count = 4 * tile.row_tiles * column_tiles

    def kernel(result, left, batches, terms, columns, n):
        if overlaps:
            barrier.wait_for_previous_grid()
            barrier.next_grid_may_begin()
        shared = cuda.shared.array(0, np.float32, alignment=16)
        sums = cuda.local.array(sum_count, np.float32)
        thread = thread_index()
        lane, warp = _u32(thread & _u32(31)), _u32(thread >> _u32(5))
        group = _u32(warp // _u32(warps))
        number, base = _u32(warp - group * _u32(warps)), _u32(group * _u32(elements))
        of_one = _u32(_u32(result[ROWS] + np.int64(height - 1)) // _u32(height))
        # Neighbouring tiles to different blocks, so that few tiles are spread over all of them.
        tile_number = _u32(_u32(block_x()) + group * _u32(grid_x()))
        while tile_number < _u32(of_one * _u32(batches)):
            batch = _u32(tile_number // of_one)
            row0 = np.int64(_u32(tile_number - _u32(batch * of_one))) * np.int64(height)
            accumulate(sums, left, terms, result[ROWS], row0, np.int64(batch), lane, number)
            finish(shared, base, sums, result, terms, row0, np.int64(batch), lane, number)
            tile_number = _u32(tile_number + _u32(_u32(grid_x()) * _u32(groups)))
        if beside:
            row = block_x() * np.int64(threads) + np.int64(thread)
            while row < n:
                copy(columns, terms, row, result[COLUMNS])
                row += grid_x() * np.int64(threads)

    pointer = ELEMENTS[kind].pointer
    term = types.Tuple((pointer, i64, f32, pointer, i64))
    left = types.Tuple((pointer, i64, i64, i64))
    parameters = (result_parameters(kind), left, i64, types.Tuple((term,) * len(tiles)), pointer, i64)
    options = {"threads": threads, "shared_bytes": 4 * elements * groups, "cluster": tile.cluster}
    return kernel, parameters, options | ({"architectures": (9, 0, "a")} if overlaps else {})
