"""Attention: tensor-core SKU of sm_80 and later, and the portable one for every kind, width and mask."""

from __future__ import annotations

import functools

from kernels.attention import forward as kernel
from kernels.attention import portable
from kernels.attention.portable_forward import attention_portable
from plans.attention import wgmma
from plans.attention.descriptor import AttentionArgs, AttentionDescriptor
from plans.attention.guarantee import forward_guarantee
from plans.attention.problem import (
    blocks_of,
    factor_of,
    matrix_arguments,
    mma_refuses,
    portable_refuses,
    sizes_of,
    tile_of,
)
from plans.core.device import Device
from plans.core.plan import Launches, Plan, Sku
from plans.core.precision import MathPrecision
from plans.core.sku import ArchSku, BackendKind, begins_early
from plans.core.workspace import Workspace


class _Program:
    """One launch."""

    def __init__(self, descriptor: AttentionDescriptor) -> None:
        d = self.descriptor = descriptor
        self.numbers = (*sizes_of(d), d.heads, d.group, d.diagonal)

    def launcher(self, made: object, rows: int, shared_bytes: int) -> object:
        """The kernel with a block for every tile of ``rows`` queries; None where there is no result."""
        d = self.descriptor
        blocks = blocks_of(d.batch * d.heads, d.queries, rows)
        return None if d.empty else made.launcher((blocks, 1, 1), shared_bytes)

    def bind(self, args: AttentionArgs, workspace: Workspace) -> Launches:
        """The launch; none where the result is empty."""
        if self.launch is None:
            return []
        tensors = [number for tensor in args.inputs for number in matrix_arguments(tensor)]
        mask = () if args.mask is None else (args.mask.data, *args.mask.stride)
        flat = (*matrix_arguments(args.out), args.lse.data, *tensors, *mask, *self.numbers, factor_of(args.scale))
        return [(self.launch, flat)]


class _MmaProgram(_Program):
    def __init__(self, descriptor: AttentionDescriptor, device: Device) -> None:
        super().__init__(descriptor)
        tile = tile_of(descriptor.width)
        made = kernel.attention_forward(descriptor.element.value, tile, descriptor.causal, begins_early(device))
        self.launch = self.launcher(made, tile.rows, kernel.shared_bytes(tile))


class _PortableProgram(_Program):
    def __init__(self, descriptor: AttentionDescriptor, device: Device) -> None:
        super().__init__(descriptor)
        mask = "" if descriptor.mask is None else descriptor.mask.element.value
        groups = portable.groups_of(descriptor.width)
        made = attention_portable(descriptor.element.value, mask, groups, descriptor.causal)
        self.launch = self.launcher(made, portable.BLOCK_ROWS, portable.shared_bytes(descriptor.width, 1))


class AttentionPlan(Plan):
    """softmax(scale q k^T + mask) v by heads; see :class:`AttentionDescriptor`."""

    name = "attention"
    skus = (
        Sku(
            name="wgmma",
            backend=BackendKind.WGMMA,
            arch=ArchSku.SM90A,
            refuses=wgmma.refuses,
            guarantee=lambda d: forward_guarantee(MathPrecision.BF16_TENSOR_CORE, wgmma.COLUMNS, d),
            build=wgmma.ForwardProgram,
            alignment=16,
            suits=wgmma.suits,
        ),
        Sku(
            name="mma",
            backend=BackendKind.MMA,
            arch=ArchSku.SM80,
            refuses=mma_refuses,
            guarantee=lambda d: forward_guarantee(MathPrecision.BF16_TENSOR_CORE, tile_of(d.width).columns, d),
            build=_MmaProgram,
            alignment=16,
        ),
        Sku(
            name="portable",
            backend=BackendKind.PORTABLE,
            arch=ArchSku.ANY,
            refuses=portable_refuses,
            guarantee=functools.partial(forward_guarantee, MathPrecision.F32, portable.OTHERS),
            build=_PortableProgram,
        ),
    )
