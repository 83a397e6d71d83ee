"""How a block of the Hopper products works: its tile, its share of the grid, and the words that tell it what to do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from kernels import barrier
from kernels.hardware import WARPGROUP
from kernels.stages import PAIR_BYTES
from kernels.target import device
from kernels.wgmma import DEPTH

PART_WORDS = 4
"""Words of a part: its first segment (as words from the table's start), how many it has, the map of its result, and
how many elements its result lies after the first part's."""

SEGMENT_WORDS = 6
"""Words of a segment: the maps of A and B; tiles of K, and products of 16 in the last of them; the first value of K;
the fp32 bits of a factor for what the segments before have summed, and in the word's upper half its flags, as below.
A segment without tiles only scales."""

WAITS, DIAGONAL, LETS, GROUPS = 1, 2, 4, 8
"""Flags of a segment: its loads wait until the grid before this one has ended, where this one may have begun earlier; B
has the tile's diagonal blocks only (tiles are a block's); in the first segment of all, the next grid may begin once the
one before this has ended; groups of columns take columns of A one after the other, from the first on, and all the same
B: the word of K's first value has a group's columns, and above them its depth.
"""

DIAGONAL_COLUMNS = 64
"""Columns of the diagonal blocks that a tile can skip the rest of B for; ptxas makes the products of a kernel wait for
each other where a stage has two of them, and wider ones do not pay."""

ROWS = 128
THREADS = 3 * WARPGROUP
_u32 = np.uint32


@dataclass(frozen=True)
class WgmmaTile:
    """How a block works.

    ``columns`` of the product's tile, ``stages`` of loads, ``cluster`` blocks that share B, the majors of A and B, and
    whether the tile's two halves of columns are a gate and a value, from the two halves of B's rows. ``diagonal`` are
    the columns of the blocks along the diagonal that some segments' B consists of; 0 where none does.
    """

    columns: int
    stages: int
    cluster: int
    a_k_major: bool = True
    b_k_major: bool = True
    gated: bool = False
    diagonal: int = 0

    @property
    def pieces(self) -> int:
        """In how many pieces a tile of B is loaded."""
        return 2 if self.gated or self.cluster == 2 else 1

    @property
    def depth_shares(self) -> int:
        """Blocks that share a stage of B by its depth: where it lies along N and no whole boxes of its columns do."""
        return self.cluster if not self.b_k_major and not self.gated and self.columns // self.cluster % 64 else 1

    @property
    def result_columns(self) -> int:
        """Columns of the result that a tile makes."""
        return self.columns // 2 if self.gated else self.columns

    @property
    def a_bytes(self) -> int:
        """Bytes of a stage of A."""
        return ROWS * DEPTH * 2

    @property
    def stage_bytes(self) -> int:
        """Bytes of a stage."""
        return self.a_bytes + self.columns * DEPTH * 2

    def shared_bytes(self, staging: int) -> int:
        """Shared memory of a block: stages, ``staging`` bytes of what waits to be stored, and barriers."""
        return self.stages * self.stage_bytes + staging + PAIR_BYTES * self.stages

    def boxes(self, diagonal: bool = False) -> tuple[tuple[int, int], tuple[int, int]]:
        """(rows, columns) of the boxes that the maps of A and B have, in the order in which the matrices are stored."""
        piece = self.diagonal // self.cluster if diagonal else self.columns // self.pieces
        a_box = (ROWS, DEPTH) if self.a_k_major else (DEPTH, 64)
        return a_box, (piece, DEPTH) if self.b_k_major else (DEPTH // self.depth_shares, 64)


def placement(tile: WgmmaTile) -> Callable:
    """Rows and columns at which the tile of a number begins: panels of block rows, columns running slower inside."""
    cluster_rows, wide_tile, cluster = _u32(ROWS * tile.cluster), _u32(tile.result_columns), tile.cluster

    @device
    def place(number, rows, columns, panel):
        tall = _u32(_u32(rows + cluster_rows - _u32(1)) // cluster_rows)
        wide = _u32(_u32(columns + wide_tile - _u32(1)) // wide_tile)
        of_panel = _u32(number // _u32(panel * wide))
        first = _u32(of_panel * panel)
        height = min(panel, _u32(tall - first))
        inside = _u32(number - _u32(first * wide))
        across = _u32(inside // height)
        down = _u32(first + inside - _u32(across * height))
        rank = barrier.cluster_rank() if cluster > 1 else _u32(0)
        return _u32(down * cluster_rows + rank * _u32(ROWS)), _u32(across * wide_tile)

    return place


def work_of(tile: WgmmaTile) -> Callable:
    """A device function: tiles of one part, and tiles of all; a cluster takes every so-many-th."""
    cluster_rows, wide_tile = _u32(ROWS * tile.cluster), _u32(tile.result_columns)

    @device
    def work(parts, rows, columns):
        tall = _u32(_u32(rows + cluster_rows - _u32(1)) // cluster_rows)
        tiles = _u32(tall * _u32(_u32(columns + wide_tile - _u32(1)) // wide_tile))
        return tiles, _u32(tiles * parts)

    return work
