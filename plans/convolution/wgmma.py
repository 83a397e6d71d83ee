"""The wgmma SKU of convolutions and their input's gradients (sm_90a): implicit products by TMA boxes, channels last."""

from __future__ import annotations

import functools

import numpy as np

from kernels.convolution.wgmma import convolve_wgmma, warp_box
from kernels.matmul.wgmma_store import STAGING_BYTES, chunk_columns
from kernels.matmul.wgmma_tile import PART_WORDS, ROWS, WgmmaTile
from kernels.target import SIMULATOR
from kernels.wgmma import DEPTH, STEPS
from plans.convolution.descriptor import Conv2dArgs
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
from plans.core.tensor_map import Box, constants, map_address
from plans.core.workspace import Workspace
from plans.matmul.wgmma import PANEL_ROWS, TILE_CYCLES, stage_cycles, stages_of, tile_widths

_KINDS = (ElementKind.BF16, ElementKind.F16)
_UNIT = 8
_BOX_WIDTHS = (16, 8, 32, 64, 128)
_MOST_STRIDE = 2
_FEW_PIXELS = 2048


def _axes(values: tuple[int, ...], missing: int) -> tuple[int, int]:
    """(y, x) of one or two axes."""
    return (missing, *values) if len(values) == 1 else values


def _refuses(descriptor: Descriptor) -> str:
    g = descriptor.geometry
    if reason := refuses_extents(descriptor):
        return reason
    if descriptor.x is not descriptor.weight or descriptor.x not in _KINDS:
        return f"wants both factors bf16 or both fp16, found {descriptor.x.value} and {descriptor.weight.value}"
    if len(g.extents) > 2 or g.groups != 1 or g.weight_layout != "OHWI":
        return "wants one or two axes, one group, and the weight as OHWI"
    if g.in_channels % _UNIT or g.out_channels % _UNIT or not (g.in_channels and g.out_channels):
        return f"TMA wants channels in multiples of {_UNIT}, found {g.in_channels} and {g.out_channels}"
    if max(g.stride) > (1 if is_input_gradient(descriptor) else _MOST_STRIDE):
        return f"wants strides up to {_MOST_STRIDE}, and 1 for the gradient of the input, found {g.stride}"
    return ""


def _suits(descriptor: Descriptor) -> bool:
    return not SIMULATOR and descriptor.matrix[0] >= _FEW_PIXELS


def _guarantee(descriptor: Descriptor) -> PrecisionGuarantee:
    derivation = (
        "the tensor core truncates each aligned term at fp32's last place (2 units a term), alignment 8; then the "
        "epilogue's steps"
    )
    units = 2.0 * descriptor.depth + 8.0
    return convolution_guarantee(descriptor, MathPrecision.BF16_TENSOR_CORE, units, derivation)


def box_width_of(height: int, width: int) -> int:
    """The width of the box of 128 pixels that covers an image with the fewest boxes."""
    return min(_BOX_WIDTHS, key=lambda w: -(-width // w) * -(-height // (ROWS // w)))


@functools.lru_cache(maxsize=1024)
def choose_tile(rows: int, columns: int, depth: int, multiprocessors: int, transposed: bool) -> WgmmaTile:
    """The tile that a count of cycles finds fastest, as for products."""

    def cycles(tile: WgmmaTile) -> float:
        tiles = -(-rows // (ROWS * tile.cluster)) * -(-columns // tile.columns)
        waves = -(-tiles // max(1, multiprocessors // tile.cluster))
        return waves * (depth * stage_cycles(tile) + TILE_CYCLES)

    best = min(tile_widths(True, not transposed, False), key=cycles)
    return WgmmaTile(best.columns, stages_of(best, STAGING_BYTES), best.cluster, True, not transposed)


class WgmmaProgram(ConvolutionProgram):
    """One launch of a persistent grid."""

    reads_addresses = True

    def __init__(self, descriptor: Descriptor, device: Device, tile: WgmmaTile | None = None) -> None:
        super().__init__(descriptor, device)
        if self.empty:
            return
        g, self.transposed = self.geometry, is_input_gradient(descriptor)
        self.out_axes = _axes(g.extents if self.transposed else g.out_extents, 1)
        self.in_axes = _axes(g.out_extents if self.transposed else g.extents, 1)
        self.stride, height, width = _axes(g.stride, 1), *self.out_axes
        self.box_width = box_width_of(height, width)
        self.box = (ROWS // self.box_width, self.box_width)
        across, down = -(-width // self.box_width), -(-height // self.box[0])
        self.c_tiles, rows = -(-self.inner // DEPTH), g.batch * across * down * ROWS
        depth = g.taps * self.c_tiles
        self.tile = tile or choose_tile(rows, self.columns, depth, device.multiprocessors, self.transposed)
        self.shape = (across, down, width, height, g.batch, _axes(g.kernel, 1)[1], g.taps, self.c_tiles, *self._taps())
        panel = max(1, PANEL_ROWS // (ROWS * self.tile.cluster))
        self.numbers = (1, rows, self.columns, panel)
        kinds = (descriptor.x.value, descriptor.out.value)
        kernel = convolve_wgmma(*kinds, self.tile, self.box_width, self.stride, self.steps)
        tiles = -(-rows // (ROWS * self.tile.cluster)) * -(-self.columns // self.tile.columns)
        clusters = max(1, min(device.multiprocessors // self.tile.cluster, tiles))
        self.launch = kernel.launcher((clusters * self.tile.cluster, 1, 1))

    def _taps(self) -> tuple[int, int, int, int]:
        """The input's x and y at output pixel 0, tap 0, and a tap's steps."""
        g = self.geometry
        (pad_y, pad_x), (step_y, step_x) = _axes(g.padding, 0), _axes(g.dilation, 1)
        if self.transposed:
            return pad_x, pad_y, -step_x, -step_y
        return -pad_x, -pad_y, step_x, step_y

    def bind(self, args: Conv2dArgs, workspace: Workspace) -> Launches:
        """The launch; none where the result is empty."""
        if self.empty:
            return []
        maps = (self._pixels(args), self._weight(args))
        segment = (*maps, self.geometry.taps * self.c_tiles, STEPS, 0, int(np.float32(1).view(np.uint32)))
        table = np.array([PART_WORDS, 1, self._result(args), 0, *segment], np.int64)
        head = (constants(self.device).pointer(table), *self.numbers, args.out.data, self.columns, np.float32(1))
        return [(self.launch, (*head, *self.epilogue_arguments(args), *self.shape))]

    def _image_map(self, address: int, kind: ElementKind, axes: tuple[int, int], channels: int, **box: object) -> int:
        height, width = axes
        extents = (channels, width, height, self.geometry.batch)
        strides = (channels, channels * width, channels * width * height)
        return map_address(self.device, Box(address, kind, extents, strides, **box))

    def _pixels(self, args: Conv2dArgs) -> int:
        (box_y, box_x), (step_y, step_x) = self.box, self.stride
        box = (DEPTH, box_x * step_x, box_y * step_y, 1)
        address, kind = args.first.address, self.descriptor.x
        return self._image_map(address, kind, self.in_axes, self.inner, box=box, steps=(1, step_x, step_y, 1))

    def _result(self, args: Conv2dArgs) -> int:
        kind = self.descriptor.out
        height, width = warp_box(self.box_width)
        box = (chunk_columns(kind.value), width, height, 1)
        return self._image_map(args.out.address, kind, self.out_axes, self.columns, box=box, swizzle=64)

    def _weight(self, args: Conv2dArgs) -> int:
        """[channels, taps, columns], or [columns, taps, channels] as the gradient of the input reads it: as stored."""
        g, piece = self.geometry, self.tile.columns // self.tile.pieces
        extents = (g.in_channels, g.taps, g.out_channels)
        strides = (g.in_channels, g.in_channels * g.taps)
        box = (64, 1, DEPTH) if self.transposed else (DEPTH, 1, piece)
        return map_address(self.device, Box(args.second.address, self.descriptor.weight, extents, strides, box))


WGMMA = Sku(
    name="wgmma",
    backend=BackendKind.WGMMA,
    arch=ArchSku.SM90A,
    proof="tests/test_convolution_wgmma.py",
    refuses=_refuses,
    guarantee=_guarantee,
    build=WgmmaProgram,
    alignment=16,
    suits=_suits,
)
