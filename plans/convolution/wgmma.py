"""The wgmma SKU of convolutions and their input's gradients (sm_90a): implicit products by TMA boxes, channels last."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from kernels.convolution.wgmma import convolve_wgmma, warp_box
from kernels.matmul.wgmma_store import STAGING_BYTES, chunk_columns
from kernels.matmul.wgmma_tile import PART_WORDS, ROWS, SEGMENT_WORDS, WgmmaTile
from kernels.target import SIMULATOR
from kernels.wgmma import DEPTH, STEPS
from plans.convolution.descriptor import Conv2dArgs
from plans.convolution.geometry import Convolution
from plans.convolution.program import (
    ConvolutionProgram,
    Descriptor,
    convolution_guarantee,
    is_input_gradient,
    refuses_extents,
)
from plans.core.device import Device
from plans.core.plan import Launches, Sku
from plans.core.precision import ElementKind, MathPrecision, PrecisionGuarantee
from plans.core.sku import ArchSku, BackendKind
from plans.core.tensor import TensorMut
from plans.core.tensor_map import Box, constants, map_address
from plans.core.tuning import tuned
from plans.core.workspace import NO_WORKSPACE, Workspace
from plans.matmul.measure import launches_seconds
from plans.matmul.wgmma import MEASURED, PANEL_ROWS, TILE_CYCLES, stage_cycles, stages_of, tile_widths

_KINDS = (ElementKind.BF16, ElementKind.F16)
_UNIT = 8
_BOX_WIDTHS = (16, 8, 32, 64, 128)
_MOST_STRIDE = 2
_FEW_PIXELS = 2048
_FEW_CHANNELS = 32


def axes_of(values: tuple[int, ...], missing: int) -> tuple[int, int]:
    """(y, x) of one or two axes."""
    return (missing, *values) if len(values) == 1 else values


def refuses(descriptor: Descriptor) -> str:
    """What TMA's boxes do not take, or ""; of all three problems."""
    g = descriptor.geometry
    if reason := refuses_extents(descriptor):
        return reason
    if descriptor.x is not descriptor.weight or descriptor.x not in _KINDS:
        return f"wants both factors bf16 or both fp16, found {descriptor.x.value} and {descriptor.weight.value}"
    if len(g.extents) > 2 or g.weight_layout != "OHWI":
        return "wants one or two axes, and the weight as OHWI"
    if g.group_in % _UNIT or g.group_out % _UNIT or not (g.group_in and g.group_out):
        return f"TMA wants a group's channels in multiples of {_UNIT}, found {g.group_in} and {g.group_out}"
    if descriptor.operands()[0].count and not (g.in_pixels and g.out_pixels):
        return "TMA wants a pixel or more"
    if max(g.stride) > (1 if is_input_gradient(descriptor) else _MOST_STRIDE):
        return f"wants strides up to {_MOST_STRIDE}, and 1 for the gradient of the input, found {g.stride}"
    return ""


def suits(descriptor: Descriptor) -> bool:
    """Whether pixels and a group's channels fill tiles; the simulator's 384 threads are for tests that ask for them."""
    g = descriptor.geometry
    wide = g.groups == 1 or min(g.group_in, g.group_out) >= _FEW_CHANNELS
    return not SIMULATOR and min(g.in_pixels, g.out_pixels) >= _FEW_PIXELS and wide


def _guarantee(descriptor: Descriptor) -> PrecisionGuarantee:
    derivation = (
        "the tensor core truncates each aligned term at fp32's last place (2 units a term), alignment 8; then the "
        "epilogue's steps"
    )
    units = 2.0 * descriptor.depth + 8.0
    return convolution_guarantee(descriptor, MathPrecision.BF16_TENSOR_CORE, units, derivation)


def box_width_of(height: int, width: int, pixels: int = ROWS) -> int:
    """The width of the box of so many pixels that covers an image with the fewest boxes."""
    widths = [w for w in _BOX_WIDTHS if w <= pixels]
    return min(widths, key=lambda w: -(-width // w) * -(-height // (pixels // w)))


class Tiling(NamedTuple):
    """The product that a convolution is: boxes of pixels across and down an image; a group's rows, columns, depth."""

    box_width: int
    across: int
    down: int
    rows: int
    columns: int
    depth: int
    groups: int
    transposed: bool


def tiling_of(descriptor: Descriptor) -> Tiling:
    """Of a convolution or its input's gradient."""
    g, transposed = descriptor.geometry, is_input_gradient(descriptor)
    height, width = axes_of(g.extents if transposed else g.out_extents, 1)
    columns, inner = (g.group_in, g.group_out) if transposed else (g.group_out, g.group_in)
    box_width = box_width_of(height, width)
    across, down = -(-width // box_width), -(-height // (ROWS // box_width))
    depth = g.taps * -(-inner // DEPTH)
    return Tiling(box_width, across, down, g.batch * across * down * ROWS, columns, depth, g.groups, transposed)


def likely_tiles(tiling: Tiling, multiprocessors: int) -> list[WgmmaTile]:
    """The tiles that a count of cycles finds fastest, as for products, the best first."""

    def cycles(tile: WgmmaTile) -> float:
        tiles = -(-tiling.rows // (ROWS * tile.cluster)) * -(-tiling.columns // tile.columns) * tiling.groups
        waves = -(-tiles // max(1, multiprocessors // tile.cluster))
        return waves * (tiling.depth * stage_cycles(tile) + TILE_CYCLES)

    ranked = sorted(tile_widths(True, not tiling.transposed, False), key=cycles)
    return [replace(tile, stages=stages_of(tile, STAGING_BYTES)) for tile in ranked[:MEASURED]]


@functools.lru_cache(maxsize=1024)
def choose_tile(descriptor: Descriptor, device: Device) -> WgmmaTile:
    """The fastest of the likely tiles, measured once for a class of problems; see ``plans.core.tuning``."""
    tiling, g = tiling_of(descriptor), descriptor.geometry
    problem = (*tiling, g.stride, descriptor.x.value, descriptor.out.value, len(descriptor.epilogue))
    seconds = functools.partial(tile_seconds, descriptor, device)
    return tuned(device, "convolution wgmma", problem, likely_tiles(tiling, device.multiprocessors), seconds)


def tile_seconds(descriptor: Descriptor, device: Device, tile: WgmmaTile) -> float:
    """Seconds of one run with a tile, over operands of random bits."""
    program = WgmmaProgram(descriptor, device, tile)

    def bind(tensors: list[TensorMut]) -> Launches:
        out, first, second, *epilogue = tensors
        return program.bind(Conv2dArgs(out, first, second, epilogue), NO_WORKSPACE)

    return launches_seconds(descriptor.operands(), device, bind)


@dataclass(frozen=True)
class Images:
    """An activation [images, *axes, groups * channels] in memory, ``axes`` (y, x) and ``channels`` of a group."""

    address: int
    kind: ElementKind
    geometry: Convolution
    axes: tuple[int, int]
    channels: int

    def map_address(
        self,
        device: Device,
        group: int,
        box: tuple[int, int, int],
        steps: tuple[int, int] = (1, 1),
        swizzle: int = 128,
    ) -> int:
        """The address of the map of a group's channels, for boxes of (channels, width, height) of one image."""
        (height, width), every = self.axes, self.channels * self.geometry.groups
        extents = (self.channels, width, height, self.geometry.batch)
        strides = (every, every * width, every * width * height)
        address = self.address + group * self.channels * self.kind.itemsize
        return map_address(device, Box(address, self.kind, extents, strides, (*box, 1), (1, *steps, 1), swizzle))


class WgmmaProgram(ConvolutionProgram):
    """One launch of a persistent grid; groups are parts."""

    reads_addresses = True

    def __init__(self, descriptor: Descriptor, device: Device, tile: WgmmaTile | None = None) -> None:
        super().__init__(descriptor, device)
        if self.empty:
            return
        g, tiling = self.geometry, tiling_of(descriptor)
        self.transposed, self.stride = tiling.transposed, axes_of(g.stride, 1)
        self.out_axes = axes_of(g.extents if self.transposed else g.out_extents, 1)
        self.in_axes = axes_of(g.out_extents if self.transposed else g.extents, 1)
        self.box_width, self.box = tiling.box_width, (ROWS // tiling.box_width, tiling.box_width)
        self.tile, self.c_tiles, rows = tile or choose_tile(descriptor, device), tiling.depth // g.taps, tiling.rows
        height, width = self.out_axes
        boxes, taps = (tiling.across, tiling.down), (axes_of(g.kernel, 1)[1], g.taps)
        self.shape = (*boxes, width, height, g.batch, *taps, self.c_tiles, *self._taps())
        panel = max(1, PANEL_ROWS // (ROWS * self.tile.cluster))
        self.numbers = (g.groups, rows, self.columns, panel)
        kinds = (descriptor.x.value, descriptor.out.value)
        kernel = convolve_wgmma(*kinds, self.tile, self.box_width, self.stride, self.steps)
        tiles = -(-rows // (ROWS * self.tile.cluster)) * -(-self.columns // self.tile.columns) * g.groups
        clusters = max(1, min(device.multiprocessors // self.tile.cluster, tiles))
        self.launch = kernel.launcher((clusters * self.tile.cluster, 1, 1))

    def _taps(self) -> tuple[int, int, int, int]:
        """The input's x and y at output pixel 0, tap 0, and a tap's steps."""
        g = self.geometry
        (pad_y, pad_x), (step_y, step_x) = axes_of(g.padding, 0), axes_of(g.dilation, 1)
        if self.transposed:
            return pad_x, pad_y, -step_x, -step_y
        return -pad_x, -pad_y, step_x, step_y

    def bind(self, args: Conv2dArgs, workspace: Workspace) -> Launches:
        """The launch; none where the result is empty."""
        if self.empty:
            return []
        stages, one = self.geometry.taps * self.c_tiles, int(np.float32(1).view(np.uint32))
        groups = range(self.geometry.groups)
        parts = [(len(groups) * PART_WORDS + g * SEGMENT_WORDS, 1, self._result(args, g), 0) for g in groups]
        segments = [(self._pixels(args, g), self._weight(args, g), stages, STEPS, 0, one) for g in groups]
        table = np.array([*itertools.chain(*parts, *segments)], np.int64)
        head = (constants(self.device).pointer(table), *self.numbers, args.out.data, self.columns, np.float32(1))
        return [(self.launch, (*head, *self.epilogue_arguments(args), *self.shape))]

    def _pixels(self, args: Conv2dArgs, group: int) -> int:
        (box_y, box_x), (step_y, step_x) = self.box, self.stride
        images = Images(args.first.address, self.descriptor.x, self.geometry, self.in_axes, self.inner)
        return images.map_address(self.device, group, (DEPTH, box_x * step_x, box_y * step_y), (step_x, step_y))

    def _result(self, args: Conv2dArgs, group: int) -> int:
        height, width = warp_box(self.box_width)
        images = Images(args.out.address, self.descriptor.out, self.geometry, self.out_axes, self.columns)
        return images.map_address(self.device, group, (chunk_columns(images.kind.value), width, height), swizzle=64)

    def _weight(self, args: Conv2dArgs, group: int) -> int:
        """[channels, taps, columns], or [columns, taps, channels] as the gradient of the input reads it: as stored."""
        g, kind, piece = self.geometry, self.descriptor.weight, self.tile.columns // self.tile.pieces
        extents = (g.group_in, g.taps, g.group_out)
        strides = (g.group_in, g.group_in * g.taps)
        box = (64, 1, DEPTH) if self.transposed else (DEPTH, 1, piece)
        address = args.second.address + group * g.group_out * strides[1] * kind.itemsize
        return map_address(self.device, Box(address, kind, extents, strides, box))


WGMMA = Sku(
    name="wgmma",
    backend=BackendKind.WGMMA,
    arch=ArchSku.SM90A,
    refuses=refuses,
    guarantee=_guarantee,
    build=WgmmaProgram,
    alignment=16,
    suits=suits,
)
