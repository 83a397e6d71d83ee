"""How a block of Hopper's narrow products works, and its shared memory."""

from __future__ import annotations

from dataclasses import dataclass

from kernels.hardware import WARPGROUP
from kernels.stages import PAIR_BYTES
from kernels.target import HOPPER_SHARED_BYTES
from kernels.wgmma import DEPTH

GROUP_ROWS = 64
_LEAST_SPAN = 32
_PAIRED_BYTES = 116 * 1024
"""Shared memory for stages of blocks that share a depth: more than a half, as a grid of few blocks must not queue on
some multiprocessors, and little more, so that they may take places while another grid ends."""

_ALL_BYTES, _RESERVED_BYTES = 228 * 1024, 1024
"""A multiprocessor's shared memory, and what of it the system takes for a block."""

_MOST_STAGES = 32


@dataclass(frozen=True)
class StreamTile:
    """How a block works.

    ``groups`` of 64 rows, ``columns`` of the product (a multiple of 8), ``parts`` blocks that share the depth, of
    ``cluster`` that are placed on neighbouring multiprocessors. ``by_lines``: B's lines are values of K, not columns;
    ``a_by_lines``: A's too, not rows. ``sharing``: so many blocks fill a multiprocessor; 0 where few do, which start
    while another grid ends. ``beside``: nothing is read that the grid before writes, which the last block waits for in
    the end.
    """

    groups: int
    columns: int
    parts: int
    cluster: int
    by_lines: bool = False
    a_by_lines: bool = False
    sharing: int = 0
    beside: bool = False

    @property
    def threads(self) -> int:
        """Warpgroups that multiply, and one that loads."""
        return WARPGROUP * (self.groups + 1)

    @property
    def a_bytes(self) -> int:
        """Bytes of a stage of A."""
        return self.groups * GROUP_ROWS * DEPTH * 2

    @property
    def span(self) -> int:
        """Bytes of a line of B's stage."""
        return max(_LEAST_SPAN, 2 * self.columns) if self.by_lines else 2 * DEPTH

    @property
    def b_bytes(self) -> int:
        """Bytes of a stage of B."""
        return DEPTH * self.span if self.by_lines else self.columns * self.span

    @property
    def b_box(self) -> tuple[int, int]:
        """(lines, columns) of a stage of B, as it is stored."""
        return (DEPTH, self.span // 2) if self.by_lines else (self.columns, DEPTH)

    @property
    def sums_bytes(self) -> int:
        """Bytes of the sums that the blocks of a cluster exchange."""
        return 4 * self.groups * GROUP_ROWS * self.columns if self.parts > 1 else 0

    @property
    def stages(self) -> int:
        """As many as there is room for."""
        room = _PAIRED_BYTES if self.parts > 1 else HOPPER_SHARED_BYTES
        if self.sharing:
            room = _ALL_BYTES // self.sharing - _RESERVED_BYTES - self.sums_bytes
        return min(_MOST_STAGES, room // (self.a_bytes + self.b_bytes + PAIR_BYTES))

    @property
    def shared_bytes(self) -> int:
        """Stages, sums, barriers; of no more blocks a multiprocessor than share it, which is one where that is open."""
        needed = self.stages * (self.a_bytes + self.b_bytes + PAIR_BYTES) + self.sums_bytes
        return needed if self.sharing > 1 else max(_PAIRED_BYTES, needed)
