"""Low-rank terms of a sum in two launches: t = scale A D^T, small, and then t U^T as further segments of the product.

t goes to workspace in two bf16 (or fp16) parts, what it rounds to and what rounding left, so that it is as good as in
fp32. For many rows the first launch also puts all terms' U beside each other, once for each part, so that the terms of
one A are one segment; for few rows, where U costs more than the products, each part of a term is one of its rank.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from plans.core.device import ALIGNMENT, Device
from plans.core.plan import Launches, Sku
from plans.core.precision import ElementKind, PrecisionGuarantee
from plans.core.sku import BackendKind
from plans.core.tensor import TensorRef, contiguous_strides
from plans.core.workspace import NO_WORKSPACE, Workspace
from plans.matmul.descriptor import Segment, SegmentedMatmulArgs, SegmentedMatmulDescriptor
from plans.matmul.low_rank_inner import UNIT, Inner, PortableInner, StreamedInner, inner_products, results_of
from plans.matmul.program import MatmulProgram, element_offset

_KINDS = (ElementKind.BF16, ElementKind.F16)
_MOST_TILES_OF_ROWS = 1 << 31


@functools.lru_cache(maxsize=4096)
def expanded(descriptor: SegmentedMatmulDescriptor, beside: bool) -> SegmentedMatmulDescriptor:
    """The second launch's problem, with further segments: one for each first launch, where U's columns lie ``beside``
    each other, or two for each piece of a term.
    """
    segments = list(descriptor.segments)
    for inner in inner_products(descriptor):
        first = descriptor.segments[inner.of]
        common = Segment(
            2 * inner.width, "NT", first.a, first.a, a_shared=first.a_shared, b_shared=True, a_stride=2 * inner.width,
            a_batch_stride=0 if first.a_shared else descriptor.m * 2 * inner.width, late=True,
        )  # fmt: skip
        pieces = () if beside else inner.pieces
        parts = [replace(common, k=p.rank, b_stride=descriptor.low_rank[p.term].rank) for p in pieces for _ in range(2)]
        segments += parts or [common]
    return replace(descriptor, segments=tuple(segments), low_rank=())


def _aligned(elements: int) -> int:
    return -(-2 * elements // ALIGNMENT) * ALIGNMENT


def _inner_bytes(descriptor: SegmentedMatmulDescriptor, inner: Inner, beside: bool) -> tuple[int, int]:
    """Workspace of t, and of U's columns beside each other."""
    t = _aligned(2 * inner.width * descriptor.m * results_of(descriptor, inner))
    return t, _aligned(2 * inner.width * descriptor.n) if beside else 0


def _own_bytes(descriptor: SegmentedMatmulDescriptor, beside: bool) -> int:
    return sum(sum(_inner_bytes(descriptor, inner, beside)) for inner in inner_products(descriptor))


def _term_refusals(descriptor: SegmentedMatmulDescriptor) -> Iterator[str]:
    for term in descriptor.low_rank:
        segment = descriptor.segments[term.of]
        a = descriptor.segment_operands[term.of][0]
        if term.element is not segment.a or term.element not in _KINDS:
            yield f"wants low-rank factors of A's kind, bf16 or fp16, found {term.element.value} and {segment.a.value}"
        if segment.k % UNIT or any(stride % UNIT for stride in a.strides[:-1]):
            yield f"wants K and the strides of A to be multiples of {UNIT}, found K {segment.k}, strides {a.strides}"
    if (tiles := (descriptor.batch or 1) * -(-descriptor.m // 16)) >= _MOST_TILES_OF_ROWS:
        yield f"wants fewer than 2**31 tiles of 16 rows of low-rank terms' inner products, found {tiles}"


class LowRankProgram:
    """The first launches, and another SKU's program for the sum with their results."""

    def __init__(self, descriptor: SegmentedMatmulDescriptor, device: Device, second: Sku) -> None:
        self.descriptor, self.device, self.beside = descriptor, device, _beside(second)
        self.second: MatmulProgram = second.build(expanded(descriptor, self.beside), device)
        self.empty = descriptor.operands()[0].count == 0
        inner = () if self.empty else inner_products(descriptor)
        self.inner = [self._launch(entry, entry is inner[-1], second) for entry in inner]
        self.reads_addresses = any(getattr(program, "reads_addresses", False) for program in (self.second, *self.inner))

    def _launch(self, inner: Inner, last: bool, second: Sku) -> PortableInner | StreamedInner:
        if second.backend is BackendKind.WGMMA and self.descriptor.segments[inner.of].k:
            return StreamedInner(self.descriptor, inner, self.device, self.second if last else None)
        return PortableInner(self.descriptor, inner, self.device, self.beside)

    def bind(self, args: SegmentedMatmulArgs, workspace: Workspace) -> Launches:
        """All launches; none where Y is empty."""
        if self.empty:
            return []
        found, parts, at = [], [], 0
        for launch in self.inner:
            t_bytes, u_bytes = _inner_bytes(self.descriptor, launch.inner, self.beside)
            t, columns = (workspace.buffer.pointer(np.uint16, place) for place in (at, at + t_bytes * self.beside))
            found.append((launch.launch, launch.arguments(args, t, columns)))
            both = self._whole_parts(launch.inner, workspace, at, at + t_bytes) if self.beside else []
            parts += both or self._parts(args, launch.inner, workspace, at)
            at += t_bytes + u_bytes
        whole = SegmentedMatmulArgs(args.out, (*args.segments, *parts), (*args.scales, *self._kept(args)))
        whole.epilogue, whole.numbers = args.epilogue, args.numbers
        rest = workspace.buffer.part(at, workspace.nbytes - at) if workspace.nbytes > at else None
        return [*found, *self.second.bind(whole, Workspace(rest) if rest is not None else NO_WORKSPACE)]

    def _kept(self, args: SegmentedMatmulArgs) -> list[float]:
        """1 for the further segments whose terms have a scale, 0 for the others; t has the scales in it."""
        kept = [
            [float(args.low_rank_scales[piece.term] != 0) for piece in launch.inner.pieces] for launch in self.inner
        ]
        return [max(terms) for terms in kept] if self.beside else [k for terms in kept for k in terms for _ in range(2)]

    def _whole_parts(self, inner: Inner, workspace: Workspace, t_at: int, u_at: int) -> list[tuple]:
        """The pair (t, U's columns) of all terms of a first launch."""
        of = self.descriptor.segments[inner.of]
        shared = self.descriptor.batch is None or of.a_shared
        rows = (self.descriptor.m,) if shared else (results_of(self.descriptor, inner), self.descriptor.m)
        both = ((*rows, 2 * inner.width), t_at), ((self.descriptor.n, 2 * inner.width), u_at)
        return [tuple(self._tensor(workspace, of.a, at, shape, contiguous_strides(shape)) for shape, at in both)]

    def _tensor(
        self, workspace: Workspace, element: ElementKind, at: int, shape: tuple[int, ...], strides: tuple[int, ...]
    ) -> TensorRef:
        data = workspace.buffer.pointer(np.uint16, at)
        available = (workspace.nbytes - at) // element.itemsize
        return TensorRef(data, shape, strides, element, available, self.device.ordinal, workspace.buffer)

    def _parts(self, args: SegmentedMatmulArgs, inner: Inner, workspace: Workspace, at: int) -> list[tuple]:
        """The pairs (part of t, columns of U), two for each piece."""
        element, m, width = self.descriptor.segments[inner.of].a, self.descriptor.m, inner.width
        batches = results_of(self.descriptor, inner)
        shared = self.descriptor.batch is None or self.descriptor.segments[inner.of].a_shared
        found, column = [], 0
        for piece in inner.pieces:
            up = args.low_rank[piece.term][1]
            columns = TensorRef(
                element_offset(up, piece.first), (up.shape[0], piece.rank), up.stride, up.element,
                up.available - piece.first, up.device, up.owner,
            )  # fmt: skip
            for part in range(2):
                shape = (m, piece.rank) if shared else (batches, m, piece.rank)
                strides = contiguous_strides((batches, m, 2 * width))[3 - len(shape) :]
                t = self._tensor(workspace, element, at + 2 * (column + part * width), shape, strides)
                found.append((t, columns))
            column += UNIT * piece.tiles
        return found


def _beside(second: Sku) -> bool:
    return second.backend is not BackendKind.SKINNY


def _refuses(second: Sku, descriptor: SegmentedMatmulDescriptor) -> str:
    if not descriptor.low_rank:
        return "has no low-rank terms to multiply before"
    return next(_term_refusals(descriptor), "") or second.refuses(expanded(descriptor, _beside(second)))


def _guarantee(second: Sku, descriptor: SegmentedMatmulDescriptor) -> PrecisionGuarantee:
    """The second product's own, and t's: its sum (2 units a term), scale, and 2**-17 left after two bf16 parts."""
    after = second.guarantee(expanded(descriptor, _beside(second)))
    depth = max(descriptor.segments[term.of].k for term in descriptor.low_rank)
    own = 2.0 * depth + 10.0 + 128.0
    derivation = f"t: its sum's truncation, scale and two parts, {own:g} units of its term; then {after.derivation}"
    return replace(after, rounding_units=after.rounding_units + own, derivation=derivation)


def _workspace(second: Sku, descriptor: SegmentedMatmulDescriptor) -> int:
    beside = _beside(second)
    return _own_bytes(descriptor, beside) + second.workspace(expanded(descriptor, beside))


def with_low_rank(second: Sku) -> Sku:
    """The SKU that multiplies low-rank terms' inner products first, and the sum by another SKU."""
    return replace(
        second,
        name=f"{second.name}, low rank first",
        refuses=functools.partial(_refuses, second),
        guarantee=functools.partial(_guarantee, second),
        build=functools.partial(LowRankProgram, second=second),
        workspace=functools.partial(_workspace, second),
        suits=lambda descriptor: second.suits(expanded(descriptor, _beside(second))),
    )
