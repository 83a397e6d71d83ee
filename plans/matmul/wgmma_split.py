"""Products by wgmma whose tiles do not fill the chip: the sum in parts of its depth, and the parts added up."""

from __future__ import annotations

import functools
from dataclasses import replace

from kernels.matmul.wgmma_store import STAGING_BYTES
from kernels.matmul.wgmma_tile import WgmmaTile
from kernels.wgmma import DEPTH
from plans.core.device import Device
from plans.core.plan import Launches
from plans.core.precision import ElementKind, PrecisionGuarantee
from plans.core.tensor import TensorMut
from plans.core.workspace import Workspace
from plans.matmul.descriptor import SegmentedMatmulArgs, SegmentedMatmulDescriptor
from plans.matmul.program import MatmulProgram
from plans.matmul.second_stage import SecondStage, parts_bytes, product_elements, refuses_elements
from plans.matmul.wgmma import WGMMA, WgmmaProgram, candidate_tiles, product_cycles, stages_of

MOST_PARTS, LEAST_STAGES = 8, 8
MULTIPROCESSORS = 132
"""The workspace must not depend on the device, so one chip stands for all."""

# What splitting costs besides: the second launch, and the parts' bytes, written and read through L2 by all together.
_SECOND_LAUNCH_CYCLES, _BYTES_A_CYCLE = 3500.0, 2600.0


@functools.lru_cache(maxsize=4096)
def split_of(descriptor: SegmentedMatmulDescriptor) -> tuple[int, WgmmaTile]:
    """Into how many parts the sum is best split, and the tile for it; 1 where the tiles fill the chip as they are."""
    first = first_stage(descriptor)
    stages = sum(-(-segment.k // DEPTH) for segment in descriptor.segments)
    counts = range(2, min(MOST_PARTS, stages // LEAST_STAGES) + 1)
    whole = min(product_cycles(descriptor, tile, MULTIPROCESSORS) for tile in candidate_tiles(descriptor))
    ways = [(_cycles(first, tile, parts), parts, tile) for tile in candidate_tiles(first) for parts in counts]
    cycles, parts, tile = min(ways, key=lambda way: way[0], default=(whole, 1, candidate_tiles(first)[0]))
    return (parts if cycles < whole else 1), replace(tile, stages=stages_of(tile, STAGING_BYTES))


def second_cycles(nbytes: int) -> float:
    """Cycles that parts of so many bytes cost: to write them, and the launch that reads them."""
    return _SECOND_LAUNCH_CYCLES + 2 * nbytes / _BYTES_A_CYCLE


def _cycles(first: SegmentedMatmulDescriptor, tile: WgmmaTile, parts: int) -> float:
    return product_cycles(first, tile, MULTIPROCESSORS, parts) + second_cycles(parts_bytes(first, parts))


@functools.lru_cache(maxsize=4096)
def first_stage(descriptor: SegmentedMatmulDescriptor) -> SegmentedMatmulDescriptor:
    """The first launch's problem: plain sums in fp32."""
    segments = tuple(replace(segment, diagonal=1) for segment in descriptor.segments)
    return SegmentedMatmulDescriptor(descriptor.m, descriptor.n, segments, ElementKind.F32, descriptor.batch)


def _refuses(descriptor: SegmentedMatmulDescriptor) -> str:
    if reason := WGMMA.refuses(descriptor) or refuses_elements(descriptor):
        return reason
    return "" if split_of(descriptor)[0] > 1 else "its tiles fill the chip without splitting the sum"


def _guarantee(descriptor: SegmentedMatmulDescriptor) -> PrecisionGuarantee:
    own = WGMMA.guarantee(descriptor)
    units = own.rounding_units + 2.0 * MOST_PARTS
    return replace(
        own, rounding_units=units, derivation=f"{own.derivation}; its parts' sums a rescaling and a unit each"
    )


class SplitProgram(MatmulProgram):
    """Two launches: the parts to workspace, and their sum through the epilogue."""

    reads_addresses = True

    def __init__(
        self,
        descriptor: SegmentedMatmulDescriptor,
        device: Device,
        parts: int | None = None,
        tile: WgmmaTile | None = None,
    ) -> None:
        super().__init__(descriptor, device)
        best, best_tile = split_of(descriptor)
        self.parts, self.first = parts or best, first_stage(descriptor)
        self.multiply = WgmmaProgram(self.first, device, tile or best_tile, self.parts)
        self.second = SecondStage(descriptor, self.parts)

    def bind(self, args: SegmentedMatmulArgs, workspace: Workspace) -> Launches:
        """Both launches."""
        out = self.first.operands()[0]
        data, count = workspace.buffer.pointer(out.element.storage), self.parts * product_elements(self.first)
        parts = TensorMut(data, out.shape, out.strides, out.element, count, self.device.ordinal, workspace.buffer)
        first = SegmentedMatmulArgs(parts, args.segments, args.scales)
        return [*self.multiply.bind(first, workspace), self.second.bind(self, args, workspace)]


WGMMA_SPLIT = replace(
    WGMMA,
    name="wgmma, split sum",
    refuses=_refuses,
    guarantee=_guarantee,
    build=SplitProgram,
    workspace=lambda descriptor: parts_bytes(descriptor, split_of(descriptor)[0]),
)
