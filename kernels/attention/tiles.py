"""What the attention kernels on tensor cores share: tensors' tiles on their way to shared memory, and results back."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from kernels import bits, memory, warp
from kernels.matmul.mma_tile import STEP, UNIT, Operand, place_of
from kernels.target import blocks_by_shared, device, i64, types, u16p

MATRIX = types.Tuple((u16p, i64, i64, i64))
"""Type of a tensor [batch, head, token, width]: it, and elements from a batch, a head, a token to the next."""
POINTER, BATCH, HEAD, TOKEN = range(4)

_u32 = np.uint32


@dataclass(frozen=True)
class Tile:
    """Rows that a block keeps, columns that it takes at a time, warps that share the rows, and the padded width."""

    rows: int
    columns: int
    warps: int
    width: int

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 32 * self.warps

    @property
    def rows_of_warp(self) -> int:
        """Rows of a warp's part."""
        return self.rows // self.warps

    @property
    def row_blocks(self) -> int:
        """Groups of 16 rows of a warp's part."""
        return self.rows_of_warp // STEP

    @property
    def row_elements(self) -> int:
        """Elements of a tensor's tile of rows."""
        return self.rows * self.width

    @property
    def column_elements(self) -> int:
        """Elements of a tensor's tile of columns."""
        return self.columns * self.width


def padded(width: int) -> int:
    """A width as tiles have it."""
    return -(-width // STEP) * STEP


def in_turn(steps: Sequence[Callable]) -> Callable:
    """``run(state)``: device functions of one argument, one after the other.

    What a loop over register arrays would do if it were sure to be unrolled: each function has its number built in.
    """
    if len(steps) == 1:
        return steps[0]
    middle = len(steps) // 2
    return _then(in_turn(steps[:middle]), in_turn(steps[middle:]))


def _then(first: Callable, second: Callable) -> Callable:
    @device
    def both(state):
        first(state)
        second(state)

    return both


def placer(width: int) -> Callable:
    """``place(line, unit)``: where a unit of a tile begins, in elements from its start."""
    return place_of(Operand(STEP, width, True, UNIT, True, False))


@functools.cache
def loader(lines: int, width: int, threads: int) -> Callable:
    """``fetch(shared, at, pointer, base, stride, start, end, columns, thread)``: a block starts the copies of a tile.

    Its lines are rows ``start`` and following of a matrix whose rows begin at elements ``base``, ``base + stride`` and
    so on; those from row ``end`` on and columns from ``columns`` on become zeros. ``start`` and ``end`` are uint32,
    strides below 2**32, so that an address is one multiplication.
    """
    units = width // UNIT
    place, copy = placer(width), memory.copy_async_fill(2 * UNIT)
    # Units change places with a period of 8 lines: turns of such are a constant apart.
    lines_of_turn = min(threads // units // 8 * 8 or threads // units, lines)
    turns, even = -(-lines // lines_of_turn), lines % lines_of_turn == 0 and lines_of_turn * units == threads

    @device
    def fetch(shared, at, pointer, base, stride, start, end, columns, thread):
        thread = bits.again(thread)
        line0, unit = _u32(thread // _u32(units)), _u32(thread % _u32(units))
        column = np.int64(_u32(unit * _u32(UNIT)))
        to, end = at + np.int64(place(line0, unit)), end if column < columns else _u32(0)
        for turn in range(turns):
            line = _u32(line0 + _u32(turn * lines_of_turn))
            if even or (line0 < _u32(lines_of_turn) and line < _u32(lines)):
                row = _u32(start + line)
                source = base + column + np.int64(row) * np.int64(_u32(stride))
                if lines_of_turn % 8:
                    to = at + np.int64(place(line, unit))
                copy(shared, to, pointer, source, _u32(16) if row < end else _u32(0))
            to += np.int64(lines_of_turn * width)

    return fetch


def storer(kind: str, tile: Tile) -> Callable:
    """``store(shared, at, sums, factors, pointer, first, stride, left, columns, line0, lane)``: a warp's result rows.

    Each row times its factor, rounded, by way of the warp's own lines of a tile in shared memory that no copy reaches
    any more. ``first``, ``stride``, ``left`` and ``columns`` are those of the tile, as for ``loader``.
    """
    place, units, to_pair = placer(tile.width), tile.width // UNIT, bits.PACK[kind]
    turns = tile.rows_of_warp * units // 32

    def parked(number: int) -> Callable:
        block, half = divmod(number, 2)

        @device
        def park(state):
            shared, at, sums, factors, line0, lane = state
            line = _u32(_u32(line0 + _u32(STEP * block + 8 * half)) + _u32(lane >> _u32(2)))
            column = _u32(_u32(lane & _u32(3)) << _u32(1))
            for unit in range(units):
                i = 4 * (block * units + unit) + 2 * half
                word = to_pair(sums[i] * factors[number], sums[i + 1] * factors[number])
                memory.shared_store32(shared, at + np.int64(_u32(place(line, _u32(unit)) + column)), word)

        return park

    park = in_turn([parked(number) for number in range(2 * tile.row_blocks)])

    @device
    def store(shared, at, sums, factors, pointer, first, stride, left, columns, line0, lane):
        warp.sync_warp()
        park((shared, at, sums, factors, line0, lane))
        warp.sync_warp()
        for turn in range(turns):
            index = _u32(lane + _u32(32 * turn))
            line, unit = _u32(line0 + _u32(index // _u32(units))), _u32(index % _u32(units))
            column = np.int64(_u32(unit * _u32(UNIT)))
            if line < left and column < columns:
                a, b, c, d = memory.shared_load128(shared, at + np.int64(place(line, unit)))
                memory.store128_stream(pointer, first + np.int64(line) * stride + column, a, b, c, d)

    return store


def clearer(count: int, value: float = 0.0) -> Callable:
    """``clear(sums)``: all numbers of a register array."""
    start = np.float32(value)

    @device
    def clear(sums):
        for i in range(count):
            sums[i] = start

    return clear


def stage_elements(tile: Tile) -> int:
    """16-bit elements of a stage: two tiles of columns, and two numbers of each column in fp32."""
    return 2 * tile.column_elements + 4 * tile.columns


def gradient_shared_bytes(tile: Tile) -> int:
    """Shared memory of a block of gradients: two tensors' tiles of rows, two stages of the other side."""
    return 2 * (2 * tile.row_elements + 2 * stage_elements(tile))


def gradient_bounds(tile: Tile) -> dict:
    """Launch bounds of a kernel of gradients."""
    blocks = min(max(1, 256 // tile.threads), blocks_by_shared(gradient_shared_bytes(tile)))
    return {"threads": tile.threads, "shared_bytes": gradient_shared_bytes(tile), "min_blocks": blocks}


def lane_of(tile: Tile) -> Callable:
    """``where(thread)``: the thread's lane, and the first line of its warp's rows.

    Found anew from a number that the compiler takes for another one, neither they nor what follows from them take up
    registers from one use to the next.
    """
    rows_of_warp = tile.rows_of_warp

    @device
    def where(thread):
        thread = bits.again(thread)
        return _u32(thread & _u32(31)), _u32(_u32(thread >> _u32(5)) * _u32(rows_of_warp))

    return where


@device
def row_of(number, line0, lane):
    """The line of a tile that values ``2 * (number & 1)`` and the next of a lane's blocks of 16 rows belong to."""
    return _u32(_u32(line0 + _u32(8 * number)) + _u32(lane >> _u32(2)))


@device
def clamped(value, most):
    """An int64 within 0 and ``most``, as uint32."""
    return _u32(min(max(value, np.int64(0)), np.int64(most)))
