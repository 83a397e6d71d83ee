"""What low-rank terms need before their product: t = scale A D^T, and the terms' U beside each other.

t goes to memory in two parts, what it rounds to and what rounding left, which together are as good as fp32: [rows, 2
width], where a term's columns begin at a multiple of eight in either part. U goes there once for each part, [n, 2
width], so that all terms of one A are one segment of the product.

Reading A is all the work. As in `narrow` a lane takes eight neighbouring values of its rows for those that the tensor
core wants of it; here it copies them to a place of its own in shared memory, several steps ahead, so that much is on
the way and nobody waits for anybody. The warps of a block share the depth of a tile of rows. For many rows Hopper has
`low_rank_streamed`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from kernels import barrier, memory
from kernels.elements import ELEMENTS
from kernels.matmul.narrow import A_BATCH, A_STRIDE, DEPTH, DEPTH_OF_A, A, row_multiplier
from kernels.matmul.problem import COLUMNS, OUT, OUT_BATCH, OUT_STRIDE, ROWS, result_parameters
from kernels.target import cuda, device, f32, i64, kernel_factory, types
from kernels.warp import block_barrier, block_x, grid_x, sync_warp, thread_index

UNIT = 8
D, RANK, SCALE, U, U_STRIDE = range(5)
"""Positions of a term's parameters: its D [rank, k], and U [n, rank], whose lines may be further apart."""
_STEP = 32 * UNIT
"""Elements that the lanes of a warp copy at a time, 16 bytes each."""

_u32 = np.uint32


_copy = memory.copy_async_fill(16)


@dataclass(frozen=True)
class InnerTile:
    """How a block works: ``warps`` share the depth of a tile of 16 ``row_tiles`` rows, each ``ahead`` steps ahead."""

    warps: int
    row_tiles: int
    ahead: int

    @property
    def rows(self) -> int:
        """Rows of a tile."""
        return 16 * self.row_tiles

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 32 * self.warps

    def elements(self, column_tiles: int) -> int:
        """16-bit elements of a warp's place in shared memory: what is on the way, and later its sums."""
        return self.ahead * (2 * self.row_tiles + column_tiles) * _STEP


def terms_of(tiles: tuple[int, ...]) -> tuple[Callable, Callable]:
    """Device functions over all terms: ask for their D's tiles; the scale of a column, 0 for one that none makes."""

    @device
    def nothing(ring, at, terms, g, place, depth, nbytes):
        pass

    @device
    def no_scale(terms, column):
        return np.float32(0)

    request, scale_of, position = nothing, no_scale, sum(tiles)
    for number in reversed(range(len(tiles))):
        position -= tiles[number]
        request = _request_term(number, position, tiles[number], request)
        scale_of = _scale_of_term(number, position, tiles[number], scale_of)
    return request, scale_of


def _request_term(number: int, position: int, count: int, rest: Callable) -> Callable:
    @device
    def request(ring, at, terms, g, place, depth, nbytes):
        term = terms[number]
        for tile in range(count):
            row = min(np.int64(UNIT * tile) + g, term[RANK] - np.int64(1))
            _copy(ring, at + np.int64(_STEP * (position + tile)), term[D], row * depth + place, nbytes)
        rest(ring, at, terms, g, place, depth, nbytes)

    return request


def _scale_of_term(number: int, position: int, count: int, rest: Callable) -> Callable:
    first, end = _u32(UNIT * position), _u32(UNIT * (position + count))

    @device
    def scale_of(terms, column):
        if column >= first and column < end:
            return terms[number][SCALE] if np.int64(column - first) < terms[number][RANK] else np.float32(0)
        return rest(terms, column)

    return scale_of


def _requester(tile: InnerTile, request_terms: Callable) -> Callable:
    """A device function: a lane's values of A and D for one of the warp's steps, zeros past the end of K.

    Two steps that follow each other are neighbours in memory, a line of it.
    """
    rows_of_eight, warps = 2 * tile.row_tiles, tile.warps

    @device
    def request(ring, at, left, terms, rows, row0, batch, step, lane, number):
        chunk = _u32(_u32(_u32(_u32(step >> _u32(1)) * _u32(warps) + number) << _u32(1)) + (step & _u32(1)))
        k = np.int64(chunk) * np.int64(DEPTH) + np.int64((lane & _u32(3)) << _u32(3))
        g, depth = np.int64(lane >> _u32(2)), left[DEPTH_OF_A]
        nbytes, place = _u32(16) if k < depth else _u32(0), min(k, depth - np.int64(UNIT))
        for i in range(rows_of_eight):
            row = min(row0 + np.int64(UNIT * i) + g, rows - np.int64(1))
            source = batch * left[A_BATCH] + row * left[A_STRIDE] + place
            _copy(ring, at + np.int64(_STEP * i), left[A], source, nbytes)
        request_terms(ring, at + np.int64(_STEP * rows_of_eight), terms, g, place, depth, nbytes)

    return request


def _accumulator(kind: str, column_tiles: int, tile: InnerTile, request_terms: Callable) -> Callable:
    """A device function: a warp's share of the depth of a tile of rows; ``at`` is the lane's place in the ring."""
    a_units, units = 2 * tile.row_tiles, 2 * tile.row_tiles + column_tiles
    sum_count, ahead, warps = 4 * tile.row_tiles * column_tiles, tile.ahead, tile.warps
    a_words, b_words = 4 * a_units, 4 * column_tiles
    request = _requester(tile, request_terms)
    multiply = row_multiplier(kind, tile.row_tiles, column_tiles)
    wait, pair = memory.copy_async_wait(ahead - 1), 2 * DEPTH * warps

    @device
    def accumulate(sums, ring, at, left, terms, rows, row0, batch, lane, number):
        a = cuda.local.array(a_words, np.uint32)
        b = cuda.local.array(b_words, np.uint32)
        for i in range(sum_count):
            sums[i] = np.float32(0)
        steps = _u32(_u32(_u32(left[DEPTH_OF_A] + np.int64(pair - 1)) // _u32(pair)) << _u32(1))
        for step in range(ahead):
            if _u32(step) < steps:
                place = at + np.int64(step * units * _STEP)
                request(ring, place, left, terms, rows, row0, batch, _u32(step), lane, number)
            memory.copy_async_commit()
        slot = _u32(0)
        for step in range(steps):
            wait()
            place = at + np.int64(_u32(slot * _u32(units * _STEP)))
            for i in range(units):
                w, x, y, z = memory.shared_load128(ring, place + np.int64(_STEP * i))
                if i < a_units:
                    a[4 * i], a[4 * i + 1], a[4 * i + 2], a[4 * i + 3] = w, x, y, z
                else:
                    j = 4 * (i - a_units)
                    b[j], b[j + 1], b[j + 2], b[j + 3] = w, x, y, z
            multiply(sums, a, 0, b, 0)
            later = _u32(_u32(step) + _u32(ahead))
            if later < steps:
                request(ring, place, left, terms, rows, row0, batch, later, lane, number)
            memory.copy_async_commit()
            slot = _u32(slot + _u32(1))
            if slot == _u32(ahead):
                slot = _u32(0)
        sync_warp()

    return accumulate


def _finisher(kind: str, column_tiles: int, tile: InnerTile, scale_of: Callable) -> Callable:
    """A device function: the warps' sums added up in order, scaled, in two parts to memory."""
    width, row_tiles, warps, threads = UNIT * column_tiles, tile.row_tiles, tile.warps, tile.threads
    partial, element, place_elements = tile.rows * width, ELEMENTS[kind], tile.elements(column_tiles) // 2
    store, rounded = element.store, element.rounded
    assert partial <= place_elements, tile

    @device
    def park(shared, sums, lane, number):
        """The warp's sums as [rows, columns] in its place of shared memory."""
        at = _u32(number * _u32(place_elements))
        at = _u32(at + (lane >> _u32(2)) * _u32(width) + ((lane & _u32(3)) << _u32(1)))
        for row_tile in range(row_tiles):
            for column_tile in range(column_tiles):
                for i in range(4):
                    row, column = 16 * row_tile + 8 * (i >> 1), UNIT * column_tile + (i & 1)
                    value = sums[4 * (row_tile * column_tiles + column_tile) + i]
                    shared[at + _u32(row * width + column)] = value

    @device
    def finish(shared, sums, result, terms, row0, batch, lane, number):
        park(shared, sums, lane, number)
        block_barrier()
        own = _u32(number * _u32(32) + lane)
        for turn in range(partial // threads + (partial % threads > 0)):
            place = _u32(_u32(turn) * _u32(threads) + own)
            line, column = _u32(place // _u32(width)), _u32(place % _u32(width))
            row = row0 + np.int64(line)
            if place < _u32(partial) and row < result[ROWS]:
                value = np.float32(0)
                for other in range(warps):
                    value += shared[_u32(place + _u32(other * place_elements))]
                scale = scale_of(terms, column)
                value = np.float32(0) if scale == np.float32(0) else value * scale
                at = batch * result[OUT_BATCH] + row * result[OUT_STRIDE] + np.int64(column)
                store(result[OUT], at, value)
                store(result[OUT], at + np.int64(width), value - rounded(value))
        block_barrier()

    return finish


@device
def _no_columns(beside, terms, row, width):
    pass


def columns_copier(tiles: tuple[int, ...], whole: bool) -> Callable:
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
    ("bf16", (2,), InnerTile(16, 2, 2), True),
    ("f16", (2, 1), InnerTile(16, 2, 1), True, False),
    ("bf16", (2,), InnerTile(16, 1, 6), False, True, True),
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
    request_terms, scale_of = terms_of(tiles)
    accumulate = _accumulator(kind, column_tiles, tile, request_terms)
    finish, elements = _finisher(kind, column_tiles, tile, scale_of), tile.elements(column_tiles)
    copy, height, threads = columns_copier(tiles, whole), tile.rows, tile.threads
    sum_count = 4 * tile.row_tiles * column_tiles

    def kernel(result, left, batches, terms, columns, n):
        if overlaps:
            barrier.wait_for_previous_grid()
            barrier.next_grid_may_begin()
        shared = cuda.shared.array(0, np.float32, alignment=16)
        ring = cuda.shared.array(0, np.uint16, alignment=16)
        sums = cuda.local.array(sum_count, np.float32)
        thread = thread_index()
        lane, number = _u32(thread & _u32(31)), _u32(thread >> _u32(5))
        at = np.int64(_u32(number * _u32(elements) + lane * _u32(UNIT)))
        of_one = _u32(_u32(result[ROWS] + np.int64(height - 1)) // _u32(height))
        tile_number = _u32(block_x())
        while tile_number < _u32(of_one * _u32(batches)):
            batch = _u32(tile_number // of_one)
            row0 = np.int64(_u32(tile_number - _u32(batch * of_one))) * np.int64(height)
            accumulate(sums, ring, at, left, terms, result[ROWS], row0, np.int64(batch), lane, number)
            finish(shared, sums, result, terms, row0, np.int64(batch), lane, number)
            tile_number = _u32(tile_number + _u32(grid_x()))
        if beside:
            row = block_x() * np.int64(threads) + np.int64(thread)
            while row < n:
                copy(columns, terms, row, result[COLUMNS])
                row += grid_x() * np.int64(threads)

    pointer = ELEMENTS[kind].pointer
    term = types.Tuple((pointer, i64, f32, pointer, i64))
    left = types.Tuple((pointer, i64, i64, i64))
    parameters = (result_parameters(kind), left, i64, types.Tuple((term,) * len(tiles)), pointer, i64)
    options = {"threads": threads, "shared_bytes": 2 * elements * tile.warps}
    return kernel, parameters, options | (barrier.HOPPER if overlaps else {})
