"""A sum of products one of whose left factors is mixed in the same launch (sm_90a): a base layer with LoKr beside it.

    Y = epilogue(sum_s A_s B_s^T), with A of the late segment z [t, l, :] = scale * sum_m w [l, m] x [t, m, :]

Warps of the product that have nothing else to do mix while the first tiles are multiplied, so that no launch before
has to end, and no multiprocessor waits.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from kernels.division import reciprocal_of
from kernels.matmul.wgmma_mix import COLUMNS, COUNTERS, MOST_BLOCKS, MixBeside, multiply_mixed_wgmma
from kernels.matmul.wgmma_store import STAGING_BYTES
from kernels.matmul.wgmma_tile import MIXED, WAITS, WgmmaTile
from kernels.target import SIMULATOR, Kernel
from kernels.wgmma import DEPTH
from plans.block_mix import BlockMixDescriptor
from plans.core.device import Device
from plans.core.errors import InvalidProblem
from plans.core.operand import Operand
from plans.core.plan import Arguments, Launches, Plan, PlanPreference, Sku
from plans.core.sku import ArchSku, BackendKind, OpCategory
from plans.core.tensor import TensorRef
from plans.core.tensor_map import Box, constants, map_address
from plans.core.workspace import Workspace
from plans.matmul.descriptor import SegmentedMatmulArgs, SegmentedMatmulDescriptor
from plans.matmul.plan import check_numbers
from plans.matmul.program import kernel_steps
from plans.matmul.wgmma import WGMMA, WgmmaProgram, likely_tiles, segment_cycles, stages_of, stores_by_tma

_UNIT = 8
_BOX_LINE = 2 * COLUMNS
_MULTIPROCESSORS = 132
_BYTES_A_CYCLE = 6.0
"""That a multiprocessor reads and writes so beside its products."""


@dataclass(frozen=True)
class MixedMatmulDescriptor:
    """Y = epilogue(sum_s A_s B_s^T) with A of the late segment, z, made of x; see the module.

    Attributes:
        product: The sum, one of whose segments is ``late``: its A is z, the groups of a batch side by side in a row.
        mix: How z is made of x.
    """

    product: SegmentedMatmulDescriptor
    mix: BlockMixDescriptor

    category = OpCategory.MATMUL

    def __post_init__(self) -> None:
        late = [i for i, segment in enumerate(self.product.segments) if segment.late]
        if len(late) != 1:
            raise InvalidProblem(f"mixed matmul: {len(late)} late segments, wanted one; say whose A is mixed")
        z, made = self.product.segment_operands[late[0]][0], self.mix.operands()[0]
        columns = z.shape[-1] * (1 if len(z.shape) == 2 else z.shape[0])
        if (z.shape[-2], columns, z.element, z.strides[-2]) != (*made.shape, made.element, columns):
            raise InvalidProblem(
                f"mixed matmul: z is {z.element.value} {z.shape} with strides {z.strides}, wanted the mix's "
                f"{made.element.value} {made.shape}, contiguous; give the late segment's A that layout"
            )

    @functools.cached_property
    def mixed(self) -> int:
        """The number of the segment whose A is mixed."""
        return next(i for i, segment in enumerate(self.product.segments) if segment.late)

    @functools.cached_property
    def _operands(self) -> tuple[Operand, ...]:
        z = self.product.segment_operands[self.mixed][0]
        own = [replace(o, name="z", writes=True) if o is z else o for o in self.product.operands()]
        return (*own, *self.mix.operands()[1:])

    def operands(self) -> tuple[Operand, ...]:
        """The product's, of which the mixed one, ``z``, is written too; then ``x`` and ``w``."""
        return self._operands


class MixedMatmulArgs(Arguments):
    """The product's arguments, z in the mixed A's place; x, w and the mix's scale."""

    def __init__(self, product: SegmentedMatmulArgs, x: TensorRef, w: TensorRef, scale: float = 1.0) -> None:
        super().__init__()
        self.product, self.x, self.w, self.scale = product, x, w, float(scale)

    def tensors(self) -> Sequence[TensorRef]:
        """The product's, ``x``, ``w``."""
        return [*self.product.tensors(), self.x, self.w]


def _spans(descriptor: MixedMatmulDescriptor) -> int:
    return -(-descriptor.mix.width // COLUMNS)


def _beside(descriptor: MixedMatmulDescriptor) -> MixBeside:
    mix = descriptor.mix
    return MixBeside.of(mix.in_blocks, mix.out_blocks, mix.transposed)


def _refuses(descriptor: MixedMatmulDescriptor) -> str:
    product, mix = descriptor.product, descriptor.mix
    if reason := WGMMA.refuses(product):
        return reason
    if not stores_by_tma(product):
        return "wants rows of the result as TMA stores them, a multiple of 16 bytes apart"
    kinds = {mix.element, mix.weight, mix.out}
    if kinds != {product.segments[0].a}:
        return f"wants x, w and z of the factors' kind, found {', '.join(sorted(kind.value for kind in kinds))}"
    blocks = mix.in_blocks, mix.out_blocks
    if min(*blocks, mix.width, mix.rows) < 1 or max(blocks) > MOST_BLOCKS:
        return f"wants 1 to {MOST_BLOCKS} blocks of x and of z, found {blocks}"
    lines = mix.operands()[2].shape[1], mix.width, mix.x_stride
    if any(extent % _UNIT for extent in lines):
        return f"TMA wants rows of w, blocks and rows of x a multiple of {_UNIT} elements apart, found {lines}"
    return "" if any(product.operands()[0].shape) and product.m < 1 << 20 else "wants a result of at most 2**20 rows"


def _suits(descriptor: MixedMatmulDescriptor) -> bool:
    """Whether all is mixed before the first tiles, which then take it, are done."""
    product = descriptor.product
    if not WGMMA.suits(product):
        return False
    tile = likely_tiles(product, _MULTIPROCESSORS, STAGING_BYTES)[0]
    cycles = sum(segment_cycles(segment, tile) for segment in product.segments)
    out, x, _ = descriptor.mix.operands()
    return (out.nbytes + x.nbytes) / _MULTIPROCESSORS <= cycles * _BYTES_A_CYCLE


class MixedProgram(WgmmaProgram):
    """One launch."""

    def __init__(self, descriptor: MixedMatmulDescriptor, device: Device, tile: WgmmaTile | None = None) -> None:
        self.mixed, self.beside = descriptor, _beside(descriptor)
        super().__init__(descriptor.product, device, tile)

    def made(self) -> Kernel:
        """The kernel, with as many stages as what is mixed leaves room for."""
        self.tile = replace(self.tile, stages=stages_of(self.tile, self.beside.shared_bytes))
        d = self.descriptor
        kinds = d.segments[0].a.value, d.out.value
        return multiply_mixed_wgmma(*kinds, self.tile, kernel_steps(d), self.beside)

    def waits(self, i: int, late: bool, first: bool) -> int:
        """The launch waits when it begins, the mixed segment for what is mixed."""
        return WAITS * first | MIXED * self.descriptor.segments[i].late

    def bind(self, args: MixedMatmulArgs, workspace: Workspace) -> Launches:
        """The launch; none where Y is empty."""
        mix, lines = self.mixed.mix, self.beside.lines
        z, (out, x, w) = args.product.segments[self.mixed.mixed][0], mix.operands()
        box = (COLUMNS, lines, self.beside.rows)
        maps = (
            self._rows(args.x, mix.in_blocks, x.strides[0], box),
            map_address(
                self.device,
                Box.of_matrix(args.w.address, w.element, w.shape, w.strides[0], (self.beside.w_lines, DEPTH)),
            ),
            self._rows(z, mix.out_blocks, out.strides[0], box),
        )
        spans = _spans(self.mixed)
        items = -(-mix.rows // self.beside.rows) * spans
        counters = constants(self.device).counters(z.address, COUNTERS)
        more = (*maps, counters, np.float32(args.scale), items, spans, reciprocal_of(spans))
        return [(launch, (*given, *more)) for launch, given in super().bind(args.product, workspace)]

    def _rows(self, tensor: TensorRef, blocks: int, stride: int, box: tuple[int, int, int]) -> int:
        """The map of rows of blocks."""
        mix = self.mixed.mix
        extents, strides = (mix.width, blocks, mix.rows), (mix.width, stride)
        return map_address(self.device, Box(tensor.address, mix.element, extents, strides, box, (), _BOX_LINE))


class MixedMatmulPlan(Plan):
    """One launch for :class:`MixedMatmulDescriptor`; what it refuses is two, `BlockMixPlan`'s and the product's."""

    name = "mixed matmul"
    skus = (
        Sku(
            name="wgmma, mixing beside",
            backend=BackendKind.WGMMA,
            arch=ArchSku.SM90A,
            refuses=_refuses,
            guarantee=lambda descriptor: WGMMA.guarantee(descriptor.product),
            build=MixedProgram,
            alignment=16,
            suits=_suits,
        ),
    )

    def check(self, where: str, args: MixedMatmulArgs) -> None:
        """Compare operands with their declaration, and scales with the segments."""
        super().check(where, args)
        check_numbers(where, self.descriptor.product, args.product)
        if not np.isfinite(np.float32(args.scale)):
            raise InvalidProblem(f"{where}: scale {args.scale:g}, wanted a finite fp32 value; give another")

    @classmethod
    def pays(cls, descriptor: MixedMatmulDescriptor, device: Device) -> bool:
        """Whether it is the faster way, and there is one."""
        sku = cls.skus[0]
        refused = cls._reason_against(sku, descriptor, PlanPreference(), device)
        return not SIMULATOR and not refused and sku.suits(descriptor)
