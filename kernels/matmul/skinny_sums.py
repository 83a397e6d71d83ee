"""From the sums of a skinny product's warps to results: added up over the warps, low-rank terms applied.

Shared memory holds every warp's sums as [warp][row of A][row of B, then of each D]; the sums of all end up in the
first warp's place.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np

from kernels import memory, warp
from kernels.elements import ELEMENTS
from kernels.matmul.store import UNIT
from kernels.target import device, f32, i64, types

GROUP = 16
"""Rows of B, or of D, in one fragment: the largest rank of a low-rank segment."""
_REGISTERS, _OTHER_REGISTERS = 1 << 16, 60
D, U, RANK, D_STRIDE, U_STRIDE, D_BATCH, U_BATCH, FACTOR = range(8)
"""Positions of a low-rank segment's parameters."""


def low_rank_parameters(kind: str) -> types.BaseTuple:
    """Types of a low-rank segment's parameters: D, U, rank, row strides, batch strides, scale."""
    pointer = ELEMENTS[kind].pointer
    return types.Tuple((pointer, pointer, i64, i64, i64, i64, i64, f32))


@dataclass(frozen=True)
class SkinnyTile:
    """How a block works: groups of 16 rows of B, groups of 8 rows of A, warps, and steps whose loads are under way."""

    row_groups: int
    a_groups: int
    warps: int
    unroll: int

    @property
    def rows(self) -> int:
        """Rows of B a block takes."""
        return GROUP * self.row_groups

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 32 * self.warps

    def words(self, low_ranks: int) -> int:
        """Registers of a thread for fragments, sums and addresses."""
        groups = self.row_groups + low_ranks
        fragments = self.unroll * (8 * groups + 4 * self.a_groups)
        return fragments + 4 * groups * self.a_groups + 2 * (2 * groups + self.a_groups)

    def blocks(self, low_ranks: int) -> int:
        """Blocks on a multiprocessor that leave a thread these registers and as many as the rest was found to take."""
        registers = -(-(self.words(low_ranks) + _OTHER_REGISTERS) // 8) * 8
        return max(1, _REGISTERS // (registers * self.threads))

    def shared_bytes(self, low_ranks: int) -> int:
        """Shared memory of a block with so many low-rank segments."""
        groups = self.row_groups + low_ranks
        return 4 * self.warps * 8 * self.a_groups * (GROUP * groups + 4) + 2 * self.rows * GROUP * max(1, low_ranks)


@device
def _request_nothing(up, low, row0, columns, batch, thread):
    pass


def _request_up(rest: Callable, position: int, tile: SkinnyTile, half_rows: int) -> Callable:
    """``rest``, then copies of one U's rows in 16-byte units; rows from ``half_rows`` on are of its second half."""
    units, threads, rows = GROUP // UNIT, tile.threads, tile.rows

    @device
    def request(up, low, row0, columns, batch, thread):
        rest(up, low, row0, columns, batch, thread)
        s = low[position]
        index = thread
        while index < np.uint32(rows * units):
            row, unit = np.uint32(index // np.uint32(units)), np.uint32(index % np.uint32(units))
            second = row >= np.uint32(half_rows)
            line = row0 + np.int64(np.uint32(row - np.uint32(half_rows)) if second else row)
            line = min(line, columns - np.int64(1)) + (columns if second else np.int64(0))
            rank = np.int64(np.uint32(unit * np.uint32(UNIT)))
            if rank < s[RANK]:
                at = np.int64(np.uint32(np.uint32(position * rows * GROUP) + np.uint32(index * np.uint32(UNIT))))
                memory.copy_async16(up, at, s[U], batch * s[U_BATCH] + line * s[U_STRIDE] + rank)
            index = np.uint32(index + np.uint32(threads))

    return request


@device
def _no_term(shared, up, low, row, column):
    return np.float32(0)


def _low_rank_term(rest: Callable, position: int, kind: str, tile: SkinnyTile, pitch: int) -> Callable:
    """``rest``, and one low-rank segment's term at a row of A and a row of the block."""
    load, rows, first = ELEMENTS[kind].load, tile.rows, tile.rows + GROUP * position

    @device
    def term(shared, up, low, row, column):
        s = low[position]
        total = np.float32(0)
        for r in range(np.uint32(s[RANK])):
            t = shared[np.uint32(np.uint32(row * np.uint32(pitch)) + np.uint32(np.uint32(first) + np.uint32(r)))]
            at = np.uint32(np.uint32(np.uint32(position * rows) + column) * np.uint32(GROUP))
            total += t * load(up, np.uint32(at + np.uint32(r)))
        return rest(shared, up, low, row, column) + s[FACTOR] * total

    return term


def _parker(tile: SkinnyTile, groups: int, pitch: int) -> Callable:
    """``park(shared, sums, number, lane)``: a warp's sums to its place in shared memory."""
    a_groups, plane = tile.a_groups, 8 * tile.a_groups * pitch

    @device
    def park(shared, sums, number, lane):
        base = np.uint32(number * np.uint32(plane))
        for i in range(groups):
            for j in range(a_groups):
                for value in range(4):
                    row = np.uint32(np.uint32(8 * j + (value & 1)) + np.uint32((lane & np.uint32(3)) * np.uint32(2)))
                    column = np.uint32(np.uint32(GROUP * i + 8 * (value >> 1)) + np.uint32(lane >> np.uint32(2)))
                    at = np.uint32(base + np.uint32(np.uint32(row * np.uint32(pitch)) + column))
                    shared[at] = sums[4 * (i * a_groups + j) + value]

    return park


@functools.cache
def sums_of_block(kind: str, low_ranks: int, tile: SkinnyTile, gated: bool) -> SimpleNamespace:
    """Device functions that add up a block.

    ``request(up, low, row0, columns, batch, thread)`` starts the copies of U's rows;
    ``combine(shared, up, sums, scale, low, number, lane, thread)`` leaves all sums, scaled, with their low-rank terms;
    ``take(shared, row, unit, values)`` gives eight neighbours of a row, and their partners before a gate.
    """
    a_groups, warps, rows = tile.a_groups, tile.warps, tile.rows
    groups = tile.row_groups + low_ranks
    pitch, sides = GROUP * groups + 4, 2 if gated else 1
    half_rows, threads = rows // sides, tile.threads
    plane = 8 * a_groups * pitch
    request, term, park = _request_nothing, _no_term, _parker(tile, groups, pitch)
    for position in range(low_ranks):
        request = _request_up(request, position, tile, half_rows if gated else rows)
        term = _low_rank_term(term, position, kind, tile, pitch)

    @device
    def add_warps(shared, at):
        total = np.float32(0)
        for number in range(warps):
            total += shared[np.uint32(at + np.uint32(number * plane))]
        return total

    @device
    def combine(shared, up, sums, scale, low, number, lane, thread):
        park(shared, sums, number, lane)
        if low_ranks > 0:
            memory.copy_async_wait_all()
        warp.block_barrier()
        if low_ranks > 0:
            index = thread
            while index < np.uint32(8 * a_groups * GROUP * low_ranks):
                row = np.uint32(index // np.uint32(GROUP * low_ranks))
                column = np.uint32(np.uint32(rows) + np.uint32(index % np.uint32(GROUP * low_ranks)))
                at = np.uint32(np.uint32(row * np.uint32(pitch)) + column)
                shared[at] = add_warps(shared, at)
                index = np.uint32(index + np.uint32(threads))
            warp.block_barrier()
        index = thread
        while index < np.uint32(8 * a_groups * rows):
            row, column = np.uint32(index // np.uint32(rows)), np.uint32(index % np.uint32(rows))
            at = np.uint32(np.uint32(row * np.uint32(pitch)) + column)
            shared[at] = scale * add_warps(shared, at) + term(shared, up, low, row, column)
            index = np.uint32(index + np.uint32(threads))
        warp.block_barrier()

    @device
    def take(shared, row, unit, values):
        for side in range(sides):
            at = np.uint32(np.uint32(row * np.uint32(pitch)) + np.uint32(unit * np.uint32(UNIT)))
            at = np.uint32(at + np.uint32(side * half_rows))
            for i in range(UNIT):
                values[UNIT * side + i] = shared[np.uint32(at + np.uint32(i))]

    return SimpleNamespace(
        request=request,
        combine=combine,
        take=take,
        elements=warps * plane,
        up_elements=rows * GROUP * max(1, low_ranks),
    )
