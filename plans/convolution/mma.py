"""The tensor-core SKUs of convolutions and their gradients (sm_80+): implicit products, channels last."""

from __future__ import annotations

import math

import numpy as np

from kernels.convolution.mma import ConvolutionProblem, convolve_mma, weight_gradient_mma
from kernels.matmul.mma_tile import MmaTile
from plans.convolution.descriptor import Conv2dArgs
from plans.convolution.program import (
    MOST,
    ConvolutionProgram,
    Descriptor,
    convolution_guarantee,
    is_input_gradient,
    refuses_extents,
)
from plans.convolution.weight_sums import WeightSums, plane_of, residual_arguments, sums_bytes
from plans.core.device import Device
from plans.core.plan import Launches, Sku
from plans.core.precision import ElementKind, MathPrecision, PrecisionGuarantee
from plans.core.sku import ArchSku, BackendKind
from plans.core.workspace import Workspace
from plans.matmul.mma import LEAST_DEPTH, MOST_PARTS, SLOTS, TILES, UNIT

_KINDS = (ElementKind.BF16, ElementKind.F16)
_FEW_CHANNELS = 8


def _tiles(rows: int, columns: int, tile: MmaTile) -> int:
    return -(-rows // tile.rows) * -(-columns // tile.columns)


def _columns(descriptor: Descriptor) -> int:
    """The result's channels of a group."""
    g = descriptor.geometry
    return g.group_in if is_input_gradient(descriptor) else g.group_out


def _blocks(descriptor: Descriptor, tile: MmaTile) -> int:
    return _tiles(descriptor.matrix[0], _columns(descriptor), tile) * descriptor.geometry.groups


def _tile_of(descriptor: Descriptor) -> MmaTile:
    """The largest tile that leaves no multiprocessor idle, else the smallest."""
    return next((tile for tile in TILES if _blocks(descriptor, tile) >= SLOTS // 2), TILES[-1])


def _refuses(descriptor: Descriptor) -> str:
    if reason := refuses_extents(descriptor):
        return reason
    if descriptor.x is not descriptor.weight or descriptor.x not in _KINDS:
        found = f"{descriptor.x.value} and {descriptor.weight.value}"
        return f"wants both factors bf16 or both fp16, found {found}"
    if descriptor.geometry.weight_layout != "OHWI":
        return "wants the weight as OHWI: convert it once with the layout plan"
    blocks = _blocks(descriptor, TILES[-1]) * MOST_PARTS * descriptor.geometry.taps
    return f"wants fewer than 2**31 blocks, found {blocks}" if blocks > MOST else ""


def _suits(descriptor: Descriptor) -> bool:
    """Whether groups have channels enough to fill fragments; depthwise convolutions are bound by memory anyway."""
    g = descriptor.geometry
    return g.groups == 1 or min(g.group_in, g.group_out) >= _FEW_CHANNELS


def _guarantee(descriptor: Descriptor) -> PrecisionGuarantee:
    derivation = (
        "the tensor core truncates each aligned term at fp32's last place (2 units a term), parts of a split sum 16, "
        "alignment 8; then the epilogue's steps"
    )
    units = 2.0 * descriptor.depth + MOST_PARTS + 8.0
    return convolution_guarantee(descriptor, MathPrecision.BF16_TENSOR_CORE, units, derivation)


class MmaProgram(ConvolutionProgram):
    """A convolution or its input's gradient in one launch, a block a tile and group."""

    def __init__(self, descriptor: Descriptor, device: Device) -> None:
        super().__init__(descriptor, device)
        if self.empty:
            return
        g, tile, transposed = self.geometry, _tile_of(descriptor), is_input_gradient(descriptor)
        group, column, tap, depth = self.weight_strides
        # Lines of the weight are depths where it is transposed, else columns: output channels both.
        self.weight = (depth if transposed else column, tap, group)
        wide = self.columns % UNIT == 0 and (g.groups * self.columns) % UNIT == 0
        problem = ConvolutionProblem(
            descriptor.x.value,
            descriptor.out.value,
            self.steps,
            math.gcd(UNIT, self.inner, self.inner * g.groups),
            math.gcd(UNIT, *self.weight),
            wide,
        )
        blocks = _blocks(descriptor, tile)
        self.launch = convolve_mma(transposed, problem, tile).launcher((blocks, 1, 1))

    def bind(self, args: Conv2dArgs, workspace: Workspace) -> Launches:
        """The launch; none where the result is empty."""
        if self.empty:
            return []
        g = self.geometry
        operands = (args.first.data, self.inner * g.groups, self.inner, args.second.data, *self.weight)
        head = (*g.kernel_geometry, args.out.data, *self.result)
        return [(self.launch, (*head, *operands, *self.epilogue_arguments(args)))]


def _weight_tile(descriptor: Descriptor) -> MmaTile:
    """The largest tile that a group's weight of one tap fills."""
    g = descriptor.geometry
    return next((tile for tile in TILES if g.group_out >= tile.rows and g.group_in >= tile.columns), TILES[-1])


def _weight_blocks(descriptor: Descriptor, tile: MmaTile) -> int:
    g = descriptor.geometry
    return _tiles(g.group_out, g.group_in, tile) * g.taps * g.groups


def _weight_parts(descriptor: Descriptor) -> int:
    """How many parts the sum over pixels is split into, to fill the chip."""
    tile, pixels = _weight_tile(descriptor), descriptor.geometry.out_pixels
    total = -(-pixels // tile.depth)
    wanted = min(SLOTS // max(1, _weight_blocks(descriptor, tile)), MOST_PARTS, pixels // LEAST_DEPTH)
    return 1 if wanted <= 1 else -(-total // -(-total // wanted))


class WeightGradientProgram(ConvolutionProgram):
    """A weight's gradient: one launch, or where its tiles do not fill the chip two, the sum over pixels in parts."""

    def __init__(self, descriptor: Descriptor, device: Device) -> None:
        super().__init__(descriptor, device)
        if self.empty:
            return
        g, tile, self.parts = self.geometry, _weight_tile(descriptor), _weight_parts(descriptor)
        total = -(-g.out_pixels // tile.depth)
        self.part = -(-total // self.parts)
        split = self.parts > 1
        wide = g.group_in % UNIT == 0
        problem = ConvolutionProblem(
            descriptor.x.value,
            "f32" if split else descriptor.out.value,
            () if split else self.steps,
            math.gcd(UNIT, g.group_in),
            math.gcd(UNIT, g.group_out),
            wide,
        )
        blocks = _weight_blocks(descriptor, tile) * self.parts
        self.multiply = weight_gradient_mma(problem, tile).launcher((blocks, 1, 1))
        if split:
            self.sums = WeightSums(descriptor, self.parts)

    def bind(self, args: Conv2dArgs, workspace: Workspace) -> Launches:
        """One launch or two; none where the result is empty."""
        if self.empty:
            return []
        g = self.geometry
        row, tap, _ = g.weight_strides
        work = (g.taps, self.part, g.groups, *g.kernel_geometry)
        operands = (args.first.data, g.out_channels, g.out_pixels, args.second.data, g.in_channels)
        if self.parts == 1:
            own = (args.out.data, g.group_out, g.group_in, row, tap)
            return [(self.multiply, (*work, *own, *operands, *residual_arguments(g, args)))]
        own = (workspace.buffer.pointer(np.float32), g.group_out, g.group_in, g.group_in, plane_of(g))
        return [(self.multiply, (*work, *own, *operands)), self.sums.bind(args, workspace)]


def _weight_workspace(descriptor: Descriptor) -> int:
    parts = _weight_parts(descriptor)
    return sums_bytes(descriptor.geometry, parts) if parts > 1 else 0


MMA = Sku(
    name="mma",
    backend=BackendKind.MMA,
    arch=ArchSku.SM80,
    refuses=_refuses,
    guarantee=_guarantee,
    build=MmaProgram,
    alignment=16,
    suits=_suits,
)
WEIGHT_GRADIENT_MMA = Sku(
    name="mma",
    backend=BackendKind.MMA,
    arch=ArchSku.SM80,
    refuses=_refuses,
    guarantee=_guarantee,
    build=WeightGradientProgram,
    workspace=_weight_workspace,
    alignment=16,
    suits=_suits,
)
