"""From the sums of a skinny product's warps to results: added up over the warps.

Shared memory holds every warp's sums as [warp][row of A][row of B]; the sums of all end up in the first warp's place.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np

from kernels import warp
from kernels.matmul.store import UNIT
from kernels.target import device

GROUP = 16
"""Rows of B in one fragment."""
_REGISTERS, _OTHER_REGISTERS = 1 << 16, 40


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

    @property
    def words(self) -> int:
        """Registers of a thread for fragments, sums and addresses."""
        fragments = self.unroll * (8 * self.row_groups + 4 * self.a_groups)
        return fragments + 4 * self.row_groups * self.a_groups + 2 * (2 * self.row_groups + self.a_groups)

    @property
    def blocks(self) -> int:
        """Blocks on a multiprocessor that leave a thread these registers and as many as the rest was found to take."""
        registers = -(-(self.words + _OTHER_REGISTERS) // 8) * 8
        return max(1, _REGISTERS // (registers * self.threads))

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a block."""
        return 4 * self.warps * 8 * self.a_groups * (GROUP * self.row_groups + 4)


def _parker(tile: SkinnyTile, pitch: int) -> Callable:
    """``park(shared, sums, number, lane)``: a warp's sums to its place in shared memory."""
    groups, a_groups, plane = tile.row_groups, tile.a_groups, 8 * tile.a_groups * pitch

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
def sums_of_block(tile: SkinnyTile, gated: bool) -> SimpleNamespace:
    """Device functions that add up a block.

    ``combine(shared, sums, scale, number, lane, thread)`` leaves all sums, scaled; ``take(shared, row, unit, values)``
    gives eight neighbours of a row, and their partners before a gate.
    """
    a_groups, warps, rows, threads = tile.a_groups, tile.warps, tile.rows, tile.threads
    pitch, sides = GROUP * tile.row_groups + 4, 2 if gated else 1
    half_rows, plane, park = rows // sides, 8 * a_groups * pitch, _parker(tile, pitch)

    @device
    def add_warps(shared, at):
        total = np.float32(0)
        for number in range(warps):
            total += shared[np.uint32(at + np.uint32(number * plane))]
        return total

    @device
    def combine(shared, sums, scale, number, lane, thread):
        park(shared, sums, number, lane)
        warp.block_barrier()
        index = thread
        while index < np.uint32(8 * a_groups * rows):
            row, column = np.uint32(index // np.uint32(rows)), np.uint32(index % np.uint32(rows))
            at = np.uint32(np.uint32(row * np.uint32(pitch)) + column)
            shared[at] = scale * add_warps(shared, at)
            index = np.uint32(index + np.uint32(threads))
        warp.block_barrier()

    @device
    def take(shared, row, unit, values):
        for side in range(sides):
            at = np.uint32(np.uint32(row * np.uint32(pitch)) + np.uint32(unit * np.uint32(UNIT)))
            at = np.uint32(at + np.uint32(side * half_rows))
            for i in range(UNIT):
                values[UNIT * side + i] = shared[np.uint32(at + np.uint32(i))]

    return SimpleNamespace(combine=combine, take=take, elements=warps * plane)
