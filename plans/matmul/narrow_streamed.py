"""The narrow SKU of Hopper: TMA brings A."""

from __future__ import annotations

import numpy as np

from kernels.matmul.narrow_streamed import narrow_streamed
from kernels.target import SIMULATOR
from kernels.wgmma import DEPTH
from plans.core.device import Device
from plans.core.plan import Launches, Sku
from plans.core.sku import ArchSku, BackendKind
from plans.core.workspace import Workspace
from plans.matmul.descriptor import SegmentedMatmulArgs, SegmentedMatmulDescriptor
from plans.matmul.narrow import narrow_guarantee, narrow_refuses
from plans.matmul.program import MatmulProgram, kernel_steps
from plans.matmul.streamed import rows_map, stream_of

_LARGEST = 1 << 31


def _refuses(descriptor: SegmentedMatmulDescriptor) -> str:
    if reason := narrow_refuses(descriptor):
        return reason
    rows, k = descriptor.m * (descriptor.batch or 1), descriptor.segments[0].k
    if not k:
        return "wants a sum of something: TMA has no map of nothing"
    return f"wants fewer than 2**31 rows and terms, found {rows} and {k}" if max(rows, k) >= _LARGEST else ""


def _suits(descriptor: SegmentedMatmulDescriptor) -> bool:
    """Whether there are rows enough for warpgroups, and a depth that is worth a pipeline."""
    return not SIMULATOR and descriptor.m > 64 and descriptor.segments[0].k >= 4 * DEPTH


class NarrowStreamedProgram(MatmulProgram):
    """One launch."""

    reads_addresses = True

    def __init__(self, descriptor: SegmentedMatmulDescriptor, device: Device) -> None:
        super().__init__(descriptor, device)
        if self.empty:
            return
        columns = 8 << (-(-descriptor.n // 8) - 1).bit_length()  # few kernels serve all widths
        by_lines = not descriptor.segments[0].b_transposed
        shape = descriptor.m, descriptor.batch or 1, columns, device.multiprocessors
        self.stream = stream_of(*shape, descriptor.beside, by_lines)
        kind, steps = descriptor.segments[0].a.value, kernel_steps(descriptor)
        kernel = narrow_streamed(kind, descriptor.out.value, self.stream.tile, steps)
        self.launch = kernel.launcher((self.stream.blocks, 1, 1), overlaps=True)
        self.boxes = (self.stream.height, DEPTH), self.stream.tile.b_box

    def bind(self, args: SegmentedMatmulArgs, workspace: Workspace) -> Launches:
        """The launch; none where Y is empty."""
        if self.empty:
            return []
        pairs = zip(args.segments[0], self.descriptor.segment_operands[0], self.boxes, strict=True)
        maps = [number for tensor, operand, box in pairs for number in rows_map(self.device, tensor, operand, box)]
        scale, depth = args.scales[0], self.descriptor.segments[0].k
        work = self.stream.arguments(depth if scale else 0)
        given = (*self.result_arguments(args), *maps, np.float32(scale), *work, *self.epilogue_arguments(args))
        return [(self.launch, given)]


NARROW_STREAMED = Sku(
    name="narrow, streamed",
    backend=BackendKind.STREAMED,
    arch=ArchSku.SM90A,
    refuses=_refuses,
    guarantee=narrow_guarantee,
    build=NarrowStreamedProgram,
    alignment=16,
    suits=_suits,
)
