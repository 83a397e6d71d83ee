"""The SKU of products with at most 64 columns, such as a low-rank factor's: bound by reading A once."""

from __future__ import annotations

import numpy as np

from kernels.matmul.narrow import DEPTH, ROW_TILES, WARPS, matmul_narrow
from plans.core.device import Device
from plans.core.plan import Launches, Sku
from plans.core.precision import ElementKind, MathPrecision, PrecisionGuarantee
from plans.core.sku import ArchSku, BackendKind, begins_early
from plans.core.workspace import Workspace
from plans.matmul.descriptor import SegmentedMatmulArgs, SegmentedMatmulDescriptor
from plans.matmul.program import MatmulProgram, kernel_steps, matmul_guarantee, refuses_low_rank

MOST_COLUMNS = 64
_KINDS = (ElementKind.BF16, ElementKind.F16)
ROWS = 16 * ROW_TILES
"""Rows of a block."""
_UNIT = 8
_MOST_BATCHES = 65535


def narrow_refuses(descriptor: SegmentedMatmulDescriptor) -> str:
    """Why a product is none of few columns, of operands that vectors can read, or ""."""
    if reason := refuses_low_rank(descriptor):
        return reason
    first, *others = descriptor.segments
    if others or descriptor.gated or first.a_transposed:
        return "wants one segment of layout NT or NN and no gate"
    if not first.b_transposed and descriptor.n % _UNIT:
        return f"wants a multiple of {_UNIT} columns of a B that is stored [k, n], found {descriptor.n}"
    if first.a is not first.b or first.a not in _KINDS:
        return f"wants A and B both bf16 or both fp16, found {first.a.value} and {first.b.value}"
    if descriptor.n > MOST_COLUMNS:
        return f"wants at most {MOST_COLUMNS} columns, found {descriptor.n}"
    if (descriptor.batch or 1) > _MOST_BATCHES or descriptor.m >= 1 << 31:
        return f"wants at most {_MOST_BATCHES} batches of fewer than 2**31 rows"
    strides = [stride for operand in descriptor.segment_operands[0] for stride in operand.strides[:-1]]
    if first.k % _UNIT or any(stride % _UNIT for stride in strides):
        return f"wants K and the strides of A and B to be multiples of {_UNIT}, found K {first.k}, strides {strides}"
    return ""


def _suits(descriptor: SegmentedMatmulDescriptor) -> bool:
    """Whether there are rows enough for tensor cores, and a depth that all warps of a block share."""
    return descriptor.m > 16 and descriptor.segments[0].k >= DEPTH * WARPS


def narrow_guarantee(descriptor: SegmentedMatmulDescriptor) -> PrecisionGuarantee:
    """What a sum in several parts promises."""
    derivation = (
        "the tensor core truncates each aligned term at fp32's last place (2 units a term); the warps' sums are added "
        "up (8 units) and scaled (2); then the epilogue's steps"
    )
    units = 2.0 * descriptor.depth + 10.0
    return matmul_guarantee(descriptor, MathPrecision.BF16_TENSOR_CORE, units, derivation)


class NarrowProgram(MatmulProgram):
    """One launch, a block for every 32 rows."""

    def __init__(self, descriptor: SegmentedMatmulDescriptor, device: Device) -> None:
        super().__init__(descriptor, device)
        if self.empty:
            return
        kind, tiles = descriptor.segments[0].a.value, -(-descriptor.n // 8)
        tiles = 1 << (tiles - 1).bit_length()  # few kernels serve all widths
        early = descriptor.early and begins_early(device)
        by_lines = not descriptor.segments[0].b_transposed
        steps = kernel_steps(descriptor)
        kernel = matmul_narrow(kind, descriptor.out.value, tiles, steps, early, by_lines)
        batches = 1 if descriptor.batch is None else descriptor.batch
        self.launch = kernel.launcher((-(-descriptor.m // ROWS), batches, 1))

    def bind(self, args: SegmentedMatmulArgs, workspace: Workspace) -> Launches:
        """The launch; none where Y is empty."""
        if self.empty:
            return []
        (a, b), scale, depth = args.segments[0], args.scales[0], self.descriptor.segments[0].k
        a_stride, b_stride, a_batch, b_batch = self.strides[0]
        left = (a.data, a_stride, a_batch, depth if scale else 0)
        right = (b.data, b_stride, b_batch, np.float32(scale))
        return [(self.launch, (*self.result_arguments(args), *left, *right, *self.epilogue_arguments(args)))]


NARROW = Sku(
    name="narrow",
    backend=BackendKind.VECTOR,
    arch=ArchSku.SM80,
    refuses=narrow_refuses,
    guarantee=narrow_guarantee,
    build=NarrowProgram,
    alignment=16,
    suits=_suits,
)
