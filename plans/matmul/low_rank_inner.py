"""The first launches of low-rank terms: t = scale A D^T for all terms of one A, and U's columns beside each other.

On Hopper A streams through shared memory (`kernels/matmul/streamed.py`), on the multiprocessors that the product leaves
idle in its last round of tiles, where that is in time: the product then begins beside it on all others, and ends no
later for it. Elsewhere, and for few rows, every warp reads its own part.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from kernels.matmul.low_rank import InnerTile, low_rank_inner
from kernels.matmul.low_rank_streamed import low_rank_streamed
from kernels.target import SIMULATOR
from kernels.wgmma import DEPTH
from plans.core.device import Device
from plans.core.sku import begins_early
from plans.core.tensor_map import Box, map_address
from plans.matmul.descriptor import SegmentedMatmulArgs, SegmentedMatmulDescriptor
from plans.matmul.program import MatmulProgram, element_offset
from plans.matmul.streamed import blocks_beside, rows_map, stream_of

UNIT = 8
_MOST_TILES = 8
_FEW_ROWS = 16
_AHEAD, _PORTABLE_AHEAD = 25, 12
"""How many 16-byte words a thread of 512 may have on the way, by shared memory: Hopper's, and any device's."""


class Piece(NamedTuple):
    """Ranks ``first`` to ``first + rank`` of a term."""

    term: int
    first: int
    rank: int

    @property
    def tiles(self) -> int:
        """Groups of eight columns."""
        return -(-self.rank // UNIT)


@dataclass(frozen=True)
class Inner:
    """One launch's pieces of terms, and the segment whose A they take."""

    of: int
    pieces: tuple[Piece, ...]

    @property
    def tiles(self) -> tuple[int, ...]:
        """Each piece's groups of eight columns."""
        return tuple(piece.tiles for piece in self.pieces)

    @property
    def width(self) -> int:
        """Columns of one part of t."""
        return UNIT * sum(self.tiles)


@functools.lru_cache(maxsize=4096)
def inner_products(descriptor: SegmentedMatmulDescriptor) -> tuple[Inner, ...]:
    """The first launches: terms of one A together, as many as a launch's columns take."""
    most = UNIT * _MOST_TILES
    found: list[Inner] = []
    for number, term in sorted(enumerate(descriptor.low_rank), key=lambda entry: entry[1].of):
        for first in range(0, term.rank, most):
            piece = Piece(number, first, min(most, term.rank - first))
            last = found[-1] if found else None
            if last is not None and last.of == term.of and sum(last.tiles) + piece.tiles <= _MOST_TILES:
                found[-1] = Inner(last.of, (*last.pieces, piece))
            else:
                found.append(Inner(term.of, (piece,)))
    return tuple(found)


def results_of(descriptor: SegmentedMatmulDescriptor, inner: Inner) -> int:
    """How many t there are: one for all of a batch that shares A."""
    return 1 if descriptor.segments[inner.of].a_shared else descriptor.batch or 1


class _Launch:
    """What both ways have in common; subclasses launch. ``t`` and ``columns`` are pointers to where both go."""

    def __init__(self, descriptor: SegmentedMatmulDescriptor, inner: Inner, device: Device) -> None:
        self.descriptor, self.inner, self.device = descriptor, inner, device
        self.segment, self.operand = descriptor.segments[inner.of], descriptor.segment_operands[inner.of][0]
        self.results = results_of(descriptor, inner)
        self.whole = all(descriptor.low_rank[piece.term].rank % UNIT == 0 for piece in inner.pieces)

    def _t(self, t: Any) -> tuple:
        m, width = self.descriptor.m, self.inner.width
        return t, m, width, 2 * width, m * 2 * width

    def _terms(self, args: SegmentedMatmulArgs, downs: list[Any]) -> list[Any]:
        """Every piece's parameters, of which ``downs`` are the first."""
        flat: list[Any] = []
        for piece, down in zip(self.inner.pieces, downs, strict=True):
            up, scale = args.low_rank[piece.term][1], args.low_rank_scales[piece.term]
            flat += [down, piece.rank, np.float32(scale), element_offset(up, piece.first), up.shape[1]]
        return flat


def inner_tile(rows: int, column_tiles: int, hopper: bool) -> InnerTile:
    """The blocks of a portable first launch."""
    row_tiles = 1 if rows <= _FEW_ROWS or SIMULATOR else 2
    ahead = max(1, (_AHEAD if hopper else _PORTABLE_AHEAD) // (2 * row_tiles + column_tiles))
    return InnerTile(4 if SIMULATOR else 16, row_tiles, ahead)


class PortableInner(_Launch):
    """By warps that load what they multiply; U's columns are put ``beside`` each other or not."""

    reads_addresses = False

    def __init__(self, descriptor: SegmentedMatmulDescriptor, inner: Inner, device: Device, beside: bool) -> None:
        super().__init__(descriptor, inner, device)
        hopper, m = begins_early(device), descriptor.m
        tile = inner_tile(m, sum(inner.tiles), hopper)
        blocks = min(device.multiprocessors, self.results * -(-m // tile.rows))
        kernel = low_rank_inner(self.segment.a.value, inner.tiles, tile, beside, self.whole, hopper)
        self.launch = kernel.launcher((blocks, 1, 1), overlaps=hopper)

    def arguments(self, args: SegmentedMatmulArgs, t: Any, columns: Any) -> tuple:
        """The result's parameters, A's, how many of a batch, each term's, U's copy and its rows."""
        operand, k = self.operand, self.segment.k
        batch_stride = operand.strides[0] if len(operand.shape) > 2 else 0
        left = (args.segments[self.inner.of][0].data, operand.strides[-2], batch_stride, k)
        downs = [element_offset(args.low_rank[piece.term][0], piece.first * k) for piece in self.inner.pieces]
        return (*self._t(t), *left, self.results, *self._terms(args, downs), columns, self.descriptor.n)


class StreamedInner(_Launch):
    """By TMA; beside the product, ``second``, where that follows and leaves multiprocessors idle for long enough."""

    reads_addresses = True

    def __init__(
        self, descriptor: SegmentedMatmulDescriptor, inner: Inner, device: Device, second: MatmulProgram | None
    ) -> None:
        super().__init__(descriptor, inner, device)
        shape = descriptor.m, self.results, inner.width
        beside = blocks_beside(second, device, *shape, self.segment.k) if second else 0
        self.stream = stream_of(*shape, device.multiprocessors, beside)
        kernel = low_rank_streamed(self.segment.a.value, inner.tiles, self.stream.tile, self.whole)
        self.launch = kernel.launcher((self.stream.blocks, 1, 1), overlaps=True)

    def arguments(self, args: SegmentedMatmulArgs, t: Any, columns: Any) -> tuple:
        """The result's parameters, A's, each term's, the stream's, U's copy and its rows."""
        left = rows_map(self.device, args.segments[self.inner.of][0], self.operand, (self.stream.height, DEPTH))
        terms = self._terms(args, [self._down(args, piece) for piece in self.inner.pieces])
        return (*self._t(t), *left, *terms, *self.stream.arguments(self.segment.k), columns, self.descriptor.n)

    def _down(self, args: SegmentedMatmulArgs, piece: Piece) -> int:
        down, k = args.low_rank[piece.term][0], self.segment.k
        address, box = down.address + piece.first * k * down.element.itemsize, (UNIT * piece.tiles, DEPTH)
        return map_address(self.device, Box.of_matrix(address, down.element, (piece.rank, k), k, box))
