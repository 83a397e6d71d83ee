"""The wgmma SKU of weights' gradients (sm_90a): a product over pixels for every tap, in parts where taps are few."""

from __future__ import annotations

import functools
import itertools
from dataclasses import replace

import numpy as np

from kernels.convolution.wgmma_weight import weight_gradient_wgmma
from kernels.matmul.wgmma_store import STAGING_BYTES, WARP_ROWS, chunk_columns
from kernels.matmul.wgmma_tile import PART_WORDS, ROWS, SEGMENT_WORDS, WgmmaTile
from kernels.wgmma import DEPTH, STEPS
from plans.convolution.descriptor import Conv2dArgs
from plans.convolution.geometry import Convolution
from plans.convolution.program import ConvolutionProgram, Descriptor
from plans.convolution.weight_sums import WeightSums, plane_of, sums_bytes
from plans.convolution.wgmma import WGMMA, Images, axes_of, box_width_of
from plans.core.device import Device
from plans.core.plan import Launches
from plans.core.precision import ElementKind, PrecisionGuarantee
from plans.core.tensor_map import Box, constants, map_address
from plans.core.workspace import Workspace
from plans.matmul.wgmma import PANEL_ROWS, TILE_CYCLES, stage_cycles, stages_of, tile_widths
from plans.matmul.wgmma_split import MULTIPROCESSORS, second_cycles

MOST_PARTS, LEAST_STAGES = 16, 8


def boxes_of(geometry: Convolution) -> tuple[int, int, int]:
    """Width of the box of pixels that is a stage's depth, and how many boxes lie across and down the output."""
    height, width = axes_of(geometry.out_extents, 1)
    box = box_width_of(height, width, DEPTH)
    return box, -(-width // box), -(-height // (DEPTH // box))


@functools.lru_cache(maxsize=1024)
def split_of(descriptor: Descriptor) -> tuple[int, WgmmaTile]:
    """Into how many parts the sum over pixels is best split, and the tile for it."""
    g = descriptor.geometry
    _, across, down = boxes_of(g)
    stages = g.batch * across * down

    def cycles(way: tuple[int, WgmmaTile]) -> float:
        parts, tile = way
        tiles = -(-g.group_out // (ROWS * tile.cluster)) * -(-g.group_in // tile.columns) * g.groups * g.taps * parts
        waves = -(-tiles // (MULTIPROCESSORS // tile.cluster))
        second = second_cycles(sums_bytes(g, parts)) if _needs_sums(descriptor, parts) else 0.0
        return waves * (-(-stages // parts) * stage_cycles(tile) + TILE_CYCLES) + second

    counts = range(1, max(1, min(MOST_PARTS, stages // LEAST_STAGES)) + 1)
    parts, tile = min(itertools.product(counts, tile_widths(False, False, False)), key=cycles)
    return parts, replace(tile, stages=stages_of(tile, STAGING_BYTES))


def _needs_sums(descriptor: Descriptor, parts: int) -> bool:
    """Whether results go to workspace first: where the sum is split, or the weight's gradient is added to something."""
    return parts > 1 or bool(descriptor.epilogue)


def _workspace(descriptor: Descriptor) -> int:
    parts, _ = split_of(descriptor)
    return sums_bytes(descriptor.geometry, parts) if _needs_sums(descriptor, parts) else 0


def _guarantee(descriptor: Descriptor) -> PrecisionGuarantee:
    own = WGMMA.guarantee(descriptor)
    return replace(
        own,
        rounding_units=own.rounding_units + MOST_PARTS,
        derivation=f"{own.derivation}; the parts' sums a unit each",
    )


class WeightGradientProgram(ConvolutionProgram):
    """One launch of a persistent grid over parts of the sum, groups and taps; where need be one that adds them up."""

    reads_addresses = True

    def __init__(
        self, descriptor: Descriptor, device: Device, parts: int | None = None, tile: WgmmaTile | None = None
    ) -> None:
        super().__init__(descriptor, device)
        if self.empty:
            return
        g, (best, best_tile) = self.geometry, split_of(descriptor)
        self.parts, self.tile = parts or best, tile or best_tile
        self.box_width, across, down = boxes_of(g)
        self.boxes, self.stride = g.batch * across * down, axes_of(g.stride, 1)
        (pad_y, pad_x), (step_y, step_x) = axes_of(g.padding, 0), axes_of(g.dilation, 1)
        self.shape = (across, down, axes_of(g.kernel, 1)[1], -pad_x, -pad_y, step_x, step_y)
        self.sums = WeightSums(descriptor, self.parts) if _needs_sums(descriptor, self.parts) else None
        self.out = ElementKind.F32 if self.sums else descriptor.out
        kernel = weight_gradient_wgmma(descriptor.x.value, self.out.value, self.tile, self.box_width, self.stride)
        results, cluster = self.parts * g.groups * g.taps, self.tile.cluster
        self.numbers = (results, g.group_out, g.group_in, max(1, PANEL_ROWS // (ROWS * cluster)))
        tiles = -(-g.group_out // (ROWS * cluster)) * -(-g.group_in // self.tile.columns) * results
        self.launch = kernel.launcher((max(1, min(device.multiprocessors // cluster, tiles)) * cluster, 1, 1))

    def bind(self, args: Conv2dArgs, workspace: Workspace) -> Launches:
        """One launch or two; none where the result is empty."""
        if self.empty:
            return []
        g, parts, segments = self.geometry, [], []
        start = PART_WORDS * self.numbers[0]
        address = workspace.buffer.address if self.sums else args.out.address
        for part, group in itertools.product(range(self.parts), range(g.groups)):
            maps = self._operands(args, group)
            first, past = (self.boxes * at // self.parts for at in (part, part + 1))
            for tap in range(g.taps):
                place = self._result(address, part, group, tap)
                parts.append((start + SEGMENT_WORDS * len(segments), 1, place, 0))
                segments.append((*maps, past - first, STEPS, first | tap << 32, int(np.float32(1).view(np.uint32))))
        table = constants(self.device).pointer(np.array([*itertools.chain(*parts, *segments)], np.int64))
        data = workspace.buffer.pointer(np.float32) if self.sums else args.out.data
        multiply = (self.launch, (table, *self.numbers, data, g.group_in, np.float32(1), *self.shape))
        return [multiply, self.sums.bind(args, workspace)] if self.sums else [multiply]

    def _operands(self, args: Conv2dArgs, group: int) -> tuple[int, int]:
        """The maps of a group's channels of the gradient and of x."""
        g, (step_y, step_x), wide = self.geometry, self.stride, self.box_width
        tall = DEPTH // wide
        gradient = Images(args.first.address, self.descriptor.weight, g, axes_of(g.out_extents, 1), g.group_out)
        source = Images(args.second.address, self.descriptor.x, g, axes_of(g.extents, 1), g.group_in)
        return (
            gradient.map_address(self.device, group, (64, wide, tall)),
            source.map_address(self.device, group, (64, wide * step_x, tall * step_y), (step_x, step_y)),
        )

    def _result(self, address: int, part: int, group: int, tap: int) -> int:
        """The map of what a part makes: a tap's [out, in] of a group, in workspace or in the weight's gradient."""
        g = self.geometry
        row, tap_stride = (g.group_in, plane_of(g)) if self.sums else g.weight_strides[:2]
        place = (part * g.taps + tap) * tap_stride + group * g.group_out * row
        box = (WARP_ROWS, chunk_columns(self.out.value))
        start = address + place * self.out.itemsize
        return map_address(self.device, Box.of_matrix(start, self.out, (g.group_out, g.group_in), row, box, 64))


WEIGHT_GRADIENT_WGMMA = replace(WGMMA, guarantee=_guarantee, build=WeightGradientProgram, workspace=_workspace)
