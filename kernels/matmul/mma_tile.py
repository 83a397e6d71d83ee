"""Tiles of a product on their way through shared memory to tensor cores: copies with zero fill, swizzles, fragments.

An operand's tile lies in shared memory as it is stored: lines of 16-byte units, either one line a row (of A, or of B as
[n, k]) with the depth along it, or one line a depth with rows along it. Units are swapped within a line by the line's
number, so that ``ldmatrix`` meets no bank twice. A "row" is an element of m for A and of n for B.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np

from kernels import memory, tensor_core
from kernels.target import cuda, device

UNIT = 8
STEP = 16


@dataclass(frozen=True)
class MmaTile:
    """A block's rows, columns and depth, the warps that share its rows and columns, and the stages in flight."""

    rows: int
    columns: int
    depth: int
    warp_rows: int
    warp_columns: int
    stages: int

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 32 * self.warp_rows * self.warp_columns

    @property
    def rows_of_warp(self) -> int:
        """Rows of a warp's part."""
        return self.rows // self.warp_rows

    @property
    def columns_of_warp(self) -> int:
        """Columns of a warp's part."""
        return self.columns // self.warp_columns

    @property
    def stage_elements(self) -> int:
        """16-bit elements of both operands' tiles."""
        return (self.rows + self.columns) * self.depth

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory: the stages, or afterwards the results of each warp's 16 rows in fp32."""
        parked = 4 * STEP * (self.columns_of_warp + 4) * self.warp_rows * self.warp_columns
        return max(2 * self.stages * self.stage_elements, parked)


@dataclass(frozen=True)
class Operand:
    """One side as a tile: rows, depth, whether the depth is contiguous, and how copies reach it.

    ``vector``: elements that every line's start and end is a multiple of, 8, 4, 2 or 1. ``ragged``: whether tiles reach
    over the matrix' edge. ``gated``: units of rows come from the first and the second half of the matrix in turns.
    """

    rows: int
    depth: int
    depth_contiguous: bool
    vector: int
    ragged: bool
    gated: bool

    @property
    def units_of_line(self) -> int:
        """16-byte units of a line."""
        return (self.depth if self.depth_contiguous else self.rows) // UNIT

    @property
    def units(self) -> int:
        """16-byte units of the tile."""
        return self.rows * self.depth // UNIT


def swizzle(units_of_line: int) -> tuple[int, int]:
    """(shift, mask): unit u of line l lies at u ^ (l >> shift & mask), so that eight lines meet all 32 banks.

    Units change places within groups of the largest power of two that divides a line, 8 at most.
    """
    group = min(units_of_line & -units_of_line, 8)
    return (4 - group.bit_length(), group - 1)


@functools.cache
def place_of(operand: Operand) -> Callable:
    """``place(line, unit)``: where a unit begins, in elements from the tile's start."""
    shift, mask = swizzle(operand.units_of_line)
    units_of_line = operand.units_of_line

    @device
    def place(line, unit):
        swapped = np.uint32(unit ^ (np.uint32(line >> np.uint32(shift)) & np.uint32(mask)))
        return np.uint32(np.uint32(line * np.uint32(units_of_line) + swapped) * np.uint32(UNIT))

    return place


@functools.cache
def loader(operand: Operand, threads: int) -> SimpleNamespace:
    """Copies of one operand's tiles by all threads of a block.

    ``begin(at, base, stride, row0, rows, half, thread)`` finds the thread's units of a tile at depth 0;
    ``fetch(shared, shared_at, pointer, at, stride, row0, rows, depth0, depths, thread)`` starts the copies at
    ``depth0``. ``words``: how many numbers ``at`` keeps.
    """
    count = -(-operand.units // threads)
    even = operand.units % threads == 0
    units_of_line, units, vector = operand.units_of_line, operand.units, operand.vector
    contiguous, ragged, gated = operand.depth_contiguous, operand.ragged, operand.gated
    place, copy_unit = place_of(operand), unit_copier(vector, ragged)

    @device
    def line_and_unit(i, thread):
        index = np.uint32(thread + np.uint32(i * threads))
        return np.uint32(index // np.uint32(units_of_line)), np.uint32(index % np.uint32(units_of_line))

    @device
    def row_of(row):
        """The row of the half that a tile's row is made of."""
        if gated:
            return np.uint32((np.uint32(row >> np.uint32(4)) << np.uint32(3)) | (row & np.uint32(7)))
        return row

    @device
    def begin(at, base, stride, row0, rows, half, thread):
        for i in range(count):
            line, unit = line_and_unit(i, thread)
            tile_row = line if contiguous else np.uint32(unit * np.uint32(UNIT))
            row = row0 + np.int64(row_of(tile_row))
            if ragged and contiguous:
                row = min(row, rows - np.int64(1))
            if gated and (tile_row & np.uint32(8)) != np.uint32(0):
                row += half
            if contiguous:
                at[i] = base + row * stride + np.int64(np.uint32(unit * np.uint32(UNIT)))
            else:
                at[i] = base + np.int64(line) * stride + row

    @device
    def left_of(line, unit, row0, rows, depth0, depths):
        """How many elements of a unit are inside the matrix; may be negative."""
        if contiguous:
            left = depths - depth0 - np.int64(np.uint32(unit * np.uint32(UNIT)))
            inside = row0 + np.int64(row_of(line)) < rows
        else:
            left = rows - row0 - np.int64(row_of(np.uint32(unit * np.uint32(UNIT))))
            inside = depth0 + np.int64(line) < depths
        return left if inside else np.int64(0)

    @device
    def fetch(shared, shared_at, pointer, at, stride, row0, rows, depth0, depths, thread):
        offset = depth0 if contiguous else depth0 * stride
        for i in range(count):
            line, unit = line_and_unit(i, thread)
            if even or np.uint32(thread + np.uint32(i * threads)) < np.uint32(units):
                left = left_of(line, unit, row0, rows, depth0, depths) if ragged else np.int64(UNIT)
                copy_unit(shared, shared_at + np.int64(place(line, unit)), pointer, at[i] + offset, left)

    return SimpleNamespace(begin=begin, fetch=fetch, words=count)


def unit_copier(vector: int, ragged: bool) -> Callable:
    """``copy(shared, index, pointer, source, left)``: eight elements, zero beyond the first ``left``."""
    if vector == 1:

        @device
        def copy_one_by_one(shared, index, pointer, source, left):
            for j in range(UNIT):
                value = np.uint16(0)
                if np.int64(j) < left:
                    value = pointer[source + np.int64(j)]
                shared[index + np.int64(j)] = value

        return copy_one_by_one
    if not ragged:

        @device
        def copy_whole(shared, index, pointer, source, left):
            memory.copy_async16(shared, index, pointer, source)

        return copy_whole
    copy_some, pieces = memory.copy_async_fill(2 * vector), UNIT // vector

    @device
    def copy_pieces(shared, index, pointer, source, left):
        for piece in range(pieces):
            start = np.int64(piece * vector)
            inside = np.uint32(min(max(left - start, np.int64(0)), np.int64(vector)))
            copy_some(shared, index + start, pointer, source + start, np.uint32(inside * np.uint32(2)))

    return copy_pieces


def _fragment_address(operand: Operand, row_bit: int, depth_bit: int) -> Callable:
    """``address(row0, step, lane)``: what a lane gives to ``ldmatrix`` for 16 rows and 16 depths.

    Bits of the lane's number say which rows' and which depths' half its 8x8 matrix takes.
    """
    place, contiguous = place_of(operand), operand.depth_contiguous

    @device
    def address(row0, step, lane):
        inner = np.uint32(lane & np.uint32(7))
        row_half = np.uint32(np.uint32(lane >> np.uint32(row_bit)) & np.uint32(1))
        depth_half = np.uint32(np.uint32(lane >> np.uint32(depth_bit)) & np.uint32(1))
        if contiguous:
            line = np.uint32(row0 + np.uint32(np.uint32(row_half * np.uint32(8)) + inner))
            return place(line, np.uint32(np.uint32(step * 2) + depth_half))
        line = np.uint32(np.uint32(step * STEP) + np.uint32(np.uint32(depth_half * np.uint32(8)) + inner))
        return place(line, np.uint32(np.uint32(row0 >> np.uint32(3)) + row_half))

    return address


@functools.cache
def multiplier(kind: str, tile: MmaTile, a: Operand, b: Operand) -> Callable:
    """``multiply(shared, a_at, b_at, sums, warp_row, warp_column, lane)``: one stage's products into a warp's sums.

    Sums lie as [16-row block][8-column block][4], as ``mma`` wants them.
    """
    mma = tensor_core.MMA[kind]
    load_a = tensor_core.ldmatrix if a.depth_contiguous else tensor_core.ldmatrix_transposed
    load_b = tensor_core.ldmatrix if b.depth_contiguous else tensor_core.ldmatrix_transposed
    # A's registers go through its rows' halves first, B's through the depth's.
    a_address, b_address = _fragment_address(a, 3, 4), _fragment_address(b, 4, 3)
    row_blocks, column_pairs = tile.rows_of_warp // 16, tile.columns_of_warp // 16
    steps, rows_of_warp, columns_of_warp = tile.depth // STEP, tile.rows_of_warp, tile.columns_of_warp
    a_words, b_words = 4 * row_blocks, 4 * column_pairs

    @device
    def multiply(shared, a_at, b_at, sums, warp_row, warp_column, lane):
        left = cuda.local.array(a_words, np.uint32)
        right = cuda.local.array(b_words, np.uint32)
        for step in range(steps):
            for i in range(row_blocks):
                row = np.uint32(np.uint32(warp_row * np.uint32(rows_of_warp)) + np.uint32(16 * i))
                words = load_a(shared, a_at + np.int64(a_address(row, step, lane)))
                for j in range(4):
                    left[4 * i + j] = words[j]
            for i in range(column_pairs):
                column = np.uint32(np.uint32(warp_column * np.uint32(columns_of_warp)) + np.uint32(16 * i))
                words = load_b(shared, b_at + np.int64(b_address(column, step, lane)))
                for j in range(4):
                    right[4 * i + j] = words[j]
            for i in range(row_blocks):
                for j in range(2 * column_pairs):
                    at = 4 * (i * 2 * column_pairs + j)
                    c = mma(
                        left[4 * i], left[4 * i + 1], left[4 * i + 2], left[4 * i + 3], right[2 * j], right[2 * j + 1],
                        sums[at], sums[at + 1], sums[at + 2], sums[at + 3],
                    )  # fmt: skip
                    sums[at] = c[0]
                    sums[at + 1] = c[1]
                    sums[at + 2] = c[2]
                    sums[at + 3] = c[3]

    return multiply
