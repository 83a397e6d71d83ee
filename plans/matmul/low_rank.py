"""Low-rank terms of a sum in two launches: t = scale A D^T, small, and then t U^T as further segments of the product.

t goes to workspace in two bf16 (or fp16) parts, what it rounds to and what rounding left, so that it is as good as in
fp32; each part is a segment of the term's rank.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from kernels.matmul.narrow import matmul_narrow
from plans.core.device import ALIGNMENT, Device
from plans.core.plan import Launches, Sku
from plans.core.precision import ElementKind, PrecisionGuarantee
from plans.core.sku import BackendKind
from plans.core.tensor import TensorRef, contiguous_strides
from plans.core.workspace import NO_WORKSPACE, Workspace
from plans.matmul.descriptor import Segment, SegmentedMatmulArgs, SegmentedMatmulDescriptor
from plans.matmul.narrow import ROWS
from plans.matmul.program import MatmulProgram, element_offset

_UNIT = 8
_MOST_TILES = 8
_KINDS = (ElementKind.BF16, ElementKind.F16)
_MOST_BATCHES = 65535


class Piece(NamedTuple):
    """Ranks ``first`` to ``first + rank`` of a term."""

    term: int
    first: int
    rank: int

    @property
    def tiles(self) -> int:
        """Groups of eight columns."""
        return -(-self.rank // _UNIT)


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
        return _UNIT * sum(self.tiles)


@functools.lru_cache(maxsize=4096)
def inner_products(descriptor: SegmentedMatmulDescriptor) -> tuple[Inner, ...]:
    """The first launches: terms of one A together, as many as a launch's columns take."""
    most = _UNIT * _MOST_TILES
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


@functools.lru_cache(maxsize=4096)
def expanded(descriptor: SegmentedMatmulDescriptor) -> SegmentedMatmulDescriptor:
    """The second launch's problem: two segments for each piece of a term, after the others."""
    segments = list(descriptor.segments)
    for inner in inner_products(descriptor):
        first = descriptor.segments[inner.of]
        for piece in inner.pieces:
            part = Segment(
                piece.rank, "NT", first.a, first.a, a_stride=2 * inner.width, a_shared=first.a_shared, b_shared=True,
                b_stride=descriptor.low_rank[piece.term].rank,
                a_batch_stride=0 if first.a_shared else descriptor.m * 2 * inner.width, late=True,
            )  # fmt: skip
            segments += [part, part]
    return replace(descriptor, segments=tuple(segments), low_rank=())


def _inner_bytes(descriptor: SegmentedMatmulDescriptor, inner: Inner) -> int:
    size = 2 * 2 * inner.width * descriptor.m * _batches(descriptor, inner)
    return -(-size // ALIGNMENT) * ALIGNMENT


def _batches(descriptor: SegmentedMatmulDescriptor, inner: Inner) -> int:
    return 1 if descriptor.segments[inner.of].a_shared else descriptor.batch or 1


def _own_bytes(descriptor: SegmentedMatmulDescriptor) -> int:
    return sum(_inner_bytes(descriptor, inner) for inner in inner_products(descriptor))


def _term_refusals(descriptor: SegmentedMatmulDescriptor) -> Iterator[str]:
    for term in descriptor.low_rank:
        segment = descriptor.segments[term.of]
        a = descriptor.segment_operands[term.of][0]
        if term.element is not segment.a or term.element not in _KINDS:
            yield f"wants low-rank factors of A's kind, bf16 or fp16, found {term.element.value} and {segment.a.value}"
        if segment.k % _UNIT or any(stride % _UNIT for stride in a.strides[:-1]):
            yield f"wants K and the strides of A to be multiples of {_UNIT}, found K {segment.k}, strides {a.strides}"
    if (descriptor.batch or 1) > _MOST_BATCHES:
        yield f"wants at most {_MOST_BATCHES} results of low-rank terms"


class LowRankProgram:
    """The first launches, and another SKU's program for the sum with their results."""

    def __init__(self, descriptor: SegmentedMatmulDescriptor, device: Device, second: Sku) -> None:
        self.descriptor, self.device = descriptor, device
        self.whole = expanded(descriptor)
        self.second: MatmulProgram = second.build(self.whole, device)
        self.reads_addresses = getattr(self.second, "reads_addresses", False)
        self.empty = descriptor.operands()[0].count == 0
        kind = descriptor.segments[0].a.value
        early = second.backend is BackendKind.WGMMA
        self.launches = []
        for inner in () if self.empty else inner_products(descriptor):
            kernel = matmul_narrow(kind, kind, inner.tiles, (), 2, early)
            self.launches.append(kernel.launcher((-(-descriptor.m // ROWS), _batches(descriptor, inner), 1)))

    def bind(self, args: SegmentedMatmulArgs, workspace: Workspace) -> Launches:
        """All launches; none where Y is empty."""
        if self.empty:
            return []
        found, parts, at = [], [], 0
        for inner, launch in zip(inner_products(self.descriptor), self.launches, strict=True):
            found.append((launch, self._inner_arguments(args, inner, workspace, at)))
            parts += self._parts(args, inner, workspace, at)
            at += _inner_bytes(self.descriptor, inner)
        pieces = [piece for inner in inner_products(self.descriptor) for piece in inner.pieces]
        kept = [float(args.low_rank_scales[piece.term] != 0) for piece in pieces]
        scales = (*args.scales, *(scale for scale in kept for _ in range(2)))
        whole = SegmentedMatmulArgs(args.out, (*args.segments, *parts), scales)
        whole.epilogue, whole.numbers = args.epilogue, args.numbers
        rest = workspace.buffer.part(at, workspace.nbytes - at) if workspace.nbytes > at else None
        return [*found, *self.second.bind(whole, Workspace(rest) if rest is not None else NO_WORKSPACE)]

    def _inner_arguments(self, args: SegmentedMatmulArgs, inner: Inner, workspace: Workspace, at: int) -> tuple:
        """The result's parameters, A's, each term's D's."""
        operand = self.descriptor.segment_operands[inner.of][0]
        depth, m, width = self.descriptor.segments[inner.of].k, self.descriptor.m, inner.width
        batch_stride = operand.strides[0] if len(operand.shape) > 2 else 0
        result = (workspace.buffer.pointer(np.uint16, at), m, width, 2 * width, m * 2 * width)
        left = (args.segments[inner.of][0].data, operand.strides[-2], batch_stride, depth)
        flat = [*result, *left]
        for piece in inner.pieces:
            down, scale = args.low_rank[piece.term][0], args.low_rank_scales[piece.term]
            flat += [element_offset(down, piece.first * depth), depth, 0, piece.rank, np.float32(scale)]
        return tuple(flat)

    def _parts(self, args: SegmentedMatmulArgs, inner: Inner, workspace: Workspace, at: int) -> list[tuple]:
        """The pairs (part of t, columns of U), two for each piece."""
        element, m, width = self.descriptor.segments[inner.of].a, self.descriptor.m, inner.width
        batches = _batches(self.descriptor, inner)
        shared = self.descriptor.batch is None or self.descriptor.segments[inner.of].a_shared
        found, column = [], 0
        for piece in inner.pieces:
            up = args.low_rank[piece.term][1]
            columns = TensorRef(
                element_offset(up, piece.first), (up.shape[0], piece.rank), up.stride, up.element,
                up.available - piece.first, up.device, up.owner,
            )  # fmt: skip
            for part in range(2):
                start = column + part * width
                shape = (m, piece.rank) if shared else (batches, m, piece.rank)
                strides = contiguous_strides((batches, m, 2 * width))[3 - len(shape) :]
                data = workspace.buffer.pointer(np.uint16, at + 2 * start)
                size = batches * m * 2 * width - start
                t = TensorRef(data, shape, strides, element, size, self.device.ordinal, workspace.buffer)
                found.append((t, columns))
            column += _UNIT * piece.tiles
        return found


def _refuses(second: Sku, descriptor: SegmentedMatmulDescriptor) -> str:
    if not descriptor.low_rank:
        return "has no low-rank terms to multiply before"
    return next(_term_refusals(descriptor), "") or second.refuses(expanded(descriptor))


def _guarantee(second: Sku, descriptor: SegmentedMatmulDescriptor) -> PrecisionGuarantee:
    """The second product's own, and t's: its sum (2 units a term), scale, and 2**-17 left after two bf16 parts."""
    after = second.guarantee(expanded(descriptor))
    depth = max(descriptor.segments[term.of].k for term in descriptor.low_rank)
    own = 2.0 * depth + 10.0 + 128.0
    derivation = f"t: its sum's truncation, scale and two parts, {own:g} units of its term; then {after.derivation}"
    return replace(after, rounding_units=after.rounding_units + own, derivation=derivation)


def with_low_rank(second: Sku) -> Sku:
    """The SKU that multiplies low-rank terms' inner products first, and the sum by another SKU."""
    return replace(
        second,
        name=f"{second.name}, low rank first",
        refuses=functools.partial(_refuses, second),
        guarantee=functools.partial(_guarantee, second),
        build=functools.partial(LowRankProgram, second=second),
        workspace=lambda descriptor: _own_bytes(descriptor) + second.workspace(expanded(descriptor)),
        suits=lambda descriptor: second.suits(expanded(descriptor)),
        proof=second.proof and "tests/test_matmul_low_rank.py",
    )
