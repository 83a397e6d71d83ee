"""A long sum with a small result, A^T B over many rows, as a batch of shorter ones, added up in order afterwards.

Gradients of small weights are such products, LoKr's above all: a few tiles, too few for all multiprocessors, whose
depth is hundreds of thousands of rows. Another SKU multiplies equal parts of the rows, each to fp32 in workspace.
"""

from __future__ import annotations

import functools
from dataclasses import replace

from kernels.target import SIMULATOR
from plans.core.device import Device
from plans.core.plan import Launches, Sku
from plans.core.precision import ElementKind, PrecisionGuarantee
from plans.core.tensor import TensorRef
from plans.core.workspace import NO_WORKSPACE, Workspace
from plans.matmul.descriptor import SegmentedMatmulArgs, SegmentedMatmulDescriptor
from plans.partial_sums import SLOTS, Partial, Sums

_TILE = 128
"""Rows and columns of a tile, about: what the number of parts reckons with."""

LEAST_DEPTH = 4 if SIMULATOR else 256
"""Rows that a part has at least."""


@functools.lru_cache(maxsize=4096)
def parts_of(descriptor: SegmentedMatmulDescriptor) -> int:
    """Into how many parts the rows are best divided; 1 where the tiles fill the chip as they are."""
    tiles = -(-descriptor.m // _TILE) * -(-descriptor.n // _TILE)
    rows = descriptor.segments[0].k
    wanted = min(SLOTS // max(1, tiles), rows // LEAST_DEPTH)
    return next((parts for parts in range(wanted, 1, -1) if rows % parts == 0), 1)


@functools.lru_cache(maxsize=4096)
def in_batches(descriptor: SegmentedMatmulDescriptor) -> SegmentedMatmulDescriptor:
    """The first launch's problem: a result in fp32 for each part of the rows."""
    parts, (segment,) = parts_of(descriptor), descriptor.segments
    a, b = descriptor.segment_operands[0]
    depth = segment.k // parts
    part = replace(
        segment,
        k=depth,
        a_stride=a.strides[0],
        b_stride=b.strides[0],
        a_batch_stride=depth * a.strides[0],
        b_batch_stride=depth * b.strides[0],
    )
    return SegmentedMatmulDescriptor(descriptor.m, descriptor.n, (part,), ElementKind.F32, parts)


def _partial(descriptor: SegmentedMatmulDescriptor) -> Partial:
    return Partial(parts_of(descriptor), descriptor.m, descriptor.n)


def _refuses(second: Sku, descriptor: SegmentedMatmulDescriptor) -> str:
    first, *others = descriptor.segments
    if others or descriptor.low_rank or descriptor.epilogue or descriptor.batch is not None or first.layout != "TN":
        return "wants one segment of layout TN, no batch and no epilogue"
    if descriptor.operands()[0].strides[0] not in (0, descriptor.n):
        return "wants a contiguous result"
    if not 0 < descriptor.m * descriptor.n < 1 << 20:
        return "wants 1 to 2**20 elements"
    if parts_of(descriptor) == 1:
        return "its tiles fill the chip without splitting the sum, or no divisor of its rows suits"
    return second.refuses(in_batches(descriptor))


def _suits(second: Sku, descriptor: SegmentedMatmulDescriptor) -> bool:
    return not SIMULATOR and parts_of(descriptor) >= SLOTS // 16 and second.suits(in_batches(descriptor))


def _guarantee(second: Sku, descriptor: SegmentedMatmulDescriptor) -> PrecisionGuarantee:
    parts = parts_of(descriptor)
    own = second.guarantee(in_batches(descriptor))
    return replace(
        own,
        rounding_units=own.rounding_units + parts + 2.0,
        derivation=f"each part: {own.derivation}; their {parts} sums a unit each",
    )


class _Program:
    """The launches of the batch, and the sum of its results."""

    def __init__(self, second: Sku, descriptor: SegmentedMatmulDescriptor, device: Device) -> None:
        self.descriptor, self.device = descriptor, device
        self.partial, self.batches = _partial(descriptor), in_batches(descriptor)
        self.program = second.build(self.batches, device)
        self.reads_addresses = getattr(self.program, "reads_addresses", False)
        self.sums = Sums((self.partial,), descriptor.out)

    def bind(self, args: SegmentedMatmulArgs, workspace: Workspace) -> Launches:
        """All launches."""
        buffer, at = workspace.buffer, self.partial.nbytes
        out, *operands = self.batches.operands()
        pair = tuple(
            TensorRef(t.data, o.shape, o.strides, t.element, t.available, t.device, t.owner)
            for t, o in zip(args.segments[0], operands, strict=True)
        )
        parts = buffer.tensor(ElementKind.F32, out.shape)
        rest = Workspace(buffer.part(at, workspace.nbytes - at)) if workspace.nbytes > at else NO_WORKSPACE
        multiply = self.program.bind(SegmentedMatmulArgs(parts, [pair], args.scales), rest)
        return [*multiply, (self.sums.launch, self.sums.arguments([args.out], workspace, 1.0))]


def in_parts(second: Sku) -> Sku:
    """A SKU of the same technique that takes equal parts of the rows as a batch."""
    return replace(
        second,
        name=f"{second.name}, rows in parts",
        refuses=functools.partial(_refuses, second),
        guarantee=functools.partial(_guarantee, second),
        build=functools.partial(_Program, second),
        workspace=lambda d: _partial(d).nbytes + second.workspace(in_batches(d)),
        suits=functools.partial(_suits, second),
    )
