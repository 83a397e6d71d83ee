"""The gradient of a matrix that mixes blocks of rows: d_w[l, m] = scale * sum_{t, e} g[t, l, e] x[t, m, e].

LoKr's w1, for y = (w1 kron I) x (arXiv:2212.10650); the products of single rows are no tensor.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kernels.adapter_gradient import blocks as kernel
from kernels.target import SIMULATOR
from plans.core.device import Device
from plans.core.errors import InvalidProblem
from plans.core.operand import Operand
from plans.core.plan import Arguments, Launches, Plan, Sku
from plans.core.precision import ElementKind, MathPrecision, PrecisionGuarantee
from plans.core.sku import ArchSku, BackendKind, OpCategory, begins_early
from plans.core.tensor import TensorMut, TensorRef
from plans.core.workspace import Workspace
from plans.partial_sums import SLOTS, Partial, Sums

_FLOATS = (ElementKind.BF16, ElementKind.F16, ElementKind.F32)
_UNIT = 8
_LARGEST = 1 << 31
_MULTIPROCESSORS = 3 if SIMULATOR else SLOTS // 2
_ROUNDS_BESIDE = 4
"""Rounds of blocks, where some are done beside another grid, and the rest after."""

_MOST_ROW_BLOCKS = 3 if SIMULATOR else 64
_MOST_ELEMENTS = 1 << 20
"""Elements of all parts together that are worth another block: adding them up must stay small beside reading x."""


@dataclass(frozen=True)
class BlockMixGradientDescriptor:
    """d_w[l, m] = scale * sum_{t, e} g[t, l, e] x[t, m, e].

    Attributes:
        rows: Rows t.
        out_blocks: Blocks l of a row of g.
        in_blocks: Blocks m of a row of x.
        width: Elements e of a block.
        element: The kind of g and x.
        out: The kind of d_w.
        g_stride: Elements from a row of g to the next; 0 where it is contiguous.
        x_stride: The same of x.
        beside: The launch before this one makes nothing that is taken here, and waits itself for what came before: this
            one may run beside it, where the device can, and ends after it.
    """

    rows: int
    out_blocks: int
    in_blocks: int
    width: int
    element: ElementKind = ElementKind.BF16
    out: ElementKind = ElementKind.F32
    g_stride: int = 0
    x_stride: int = 0
    beside: bool = False

    category = OpCategory.MATMUL

    def __post_init__(self) -> None:
        if min(self.rows, self.out_blocks, self.in_blocks, self.width) < 0:
            raise InvalidProblem(
                f"block mix gradient: {self.rows} rows, {self.out_blocks} x {self.in_blocks} blocks of {self.width}: "
                "wanted none negative; give the tensors' own extents"
            )
        for name, stride, blocks in (("g", self.g_stride, self.out_blocks), ("x", self.x_stride, self.in_blocks)):
            if stride and stride < blocks * self.width:
                raise InvalidProblem(
                    f"block mix gradient: {name} has row stride {stride}, wanted at least its {blocks * self.width} "
                    "elements; give 0 where it is contiguous"
                )
        for name, kind in (("g and x", self.element), ("d_w", self.out)):
            if kind not in _FLOATS:
                raise InvalidProblem(
                    f"block mix gradient: {name} of {kind.value}, wanted bf16, f16 or f32; cast it first"
                )

    def operands(self) -> tuple[Operand, ...]:
        """``d_w``, ``g``, ``x``."""
        sides = (("g", self.out_blocks, self.g_stride), ("x", self.in_blocks, self.x_stride))
        return (
            Operand("d_w", self.out, (self.out_blocks, self.in_blocks), writes=True),
            *(
                Operand(name, self.element, (self.rows, blocks * self.width), layout=(stride or blocks * self.width, 1))
                for name, blocks, stride in sides
            ),
        )

    def reference(
        self, arrays: tuple[np.ndarray, np.ndarray], scale: float = 1.0
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """The exact d_w of g and x in float64, and the magnitude that the guarantee is relative to."""
        g, x = (
            np.asarray(array, np.float64).reshape(self.rows, blocks, self.width)
            for array, blocks in zip(arrays, (self.out_blocks, self.in_blocks), strict=True)
        )
        exact, magnitude = np.einsum("tle,tme->lm", g, x), np.einsum("tle,tme->lm", np.abs(g), np.abs(x))
        return [(scale * exact, abs(scale) * magnitude)]


class BlockMixGradientArgs(Arguments):
    """The tensors of one run, and a finite scale."""

    def __init__(self, d_w: TensorMut, g: TensorRef, x: TensorRef, scale: float = 1.0) -> None:
        super().__init__()
        self.d_w, self.g, self.x, self.scale = d_w, g, x, float(scale)

    def tensors(self) -> list[TensorRef]:
        """``d_w``, ``g``, ``x``."""
        return [self.d_w, self.g, self.x]


def _tiles(blocks: int, group: int, most: int) -> tuple[int, int]:
    """Groups of a tile, and tiles: as few as possible, and of about one size."""
    groups = max(1, -(-blocks // group))
    tiles = -(-groups // most)
    return -(-groups // tiles), tiles


def _items(descriptor: BlockMixGradientDescriptor) -> int:
    """Pairs of a row and ``DEPTH`` of its e."""
    return descriptor.rows * -(-descriptor.width // kernel.DEPTH)


def _partition(descriptor: BlockMixGradientDescriptor) -> tuple[int, int]:
    """Blocks that share the items, and the items of one."""
    row_tiles, down = _tiles(descriptor.out_blocks, 16, kernel.MOST_ROW_TILES)
    column_tiles, across = _tiles(descriptor.in_blocks, 8, kernel.MOST_COLUMN_TILES)
    items, slots = _items(descriptor), _MULTIPROCESSORS * kernel.blocks_at_once(row_tiles, column_tiles)
    slots *= _ROUNDS_BESIDE if descriptor.beside else 1
    elements = max(1, descriptor.out_blocks * descriptor.in_blocks)
    wanted = max(1, min(slots // (down * across), _MOST_ELEMENTS // elements, items // (2 * kernel.WARPS)))
    of_block = max(1, -(-items // wanted))
    return max(1, -(-items // of_block)), of_block


def _partial(descriptor: BlockMixGradientDescriptor, number: int) -> Partial:
    return Partial(number, descriptor.out_blocks, descriptor.in_blocks)


def _guarantee(precision: MathPrecision, sums: int, descriptor: BlockMixGradientDescriptor) -> PrecisionGuarantee:
    return PrecisionGuarantee(
        math_precision=precision,
        accumulator=ElementKind.F32,
        deterministic=True,
        bit_stable_on_same_hardware=True,
        rounding_units=2.0 * descriptor.rows * descriptor.width + sums + 3.0,
        derivation=(
            "2 units a term (the tensor core truncates it at fp32's last place; a product and a sum elsewhere); the "
            f"{sums} sums of warps and blocks a unit each; the scale's rounding and product"
        ),
    )


def _mma_refuses(descriptor: BlockMixGradientDescriptor) -> str:
    if descriptor.element is ElementKind.F32:
        return "wants g and x of bf16 or fp16, found f32"
    if any(number % _UNIT for number in (descriptor.width, descriptor.g_stride, descriptor.x_stride)):
        return f"wants blocks and rows of multiples of {_UNIT} elements, found blocks of {descriptor.width}"
    items, elements = _items(descriptor), descriptor.out_blocks * descriptor.in_blocks
    if items >= _LARGEST - (1 << 20) or elements > _MOST_ELEMENTS:
        return f"wants fewer than 2**31 spans of {kernel.DEPTH} elements, 2**20 of d_w; found {items}, {elements}"
    return ""


class _Program:
    """The sums of blocks, by a SKU's kernel, and their sum."""

    def __init__(self, descriptor: BlockMixGradientDescriptor, device: Device) -> None:
        self.empty = not descriptor.out_blocks * descriptor.in_blocks
        if not self.empty:
            _, g, x = descriptor.operands()
            self.early = begins_early(device)
            self.beside = descriptor.beside and self.early
            self.g = (g.strides[0], descriptor.out_blocks)
            self.x = (x.strides[0], descriptor.in_blocks)
            self.launch, partial, *rest = self._made(descriptor)
            self.rest = (descriptor.rows, descriptor.width, *rest)
            self.sums = Sums((partial,), descriptor.out, self.early)

    def bind(self, args: BlockMixGradientArgs, workspace: Workspace) -> Launches:
        """Both launches; none where d_w is empty."""
        if self.empty:
            return []
        (parts,) = self.sums.pointers(workspace)
        flat = (parts, args.g.data, *self.g, args.x.data, *self.x, *self.rest)
        return [(self.launch, flat), (self.sums.launch, self.sums.arguments([args.d_w], workspace, args.scale))]


class _MmaProgram(_Program):
    """Tiles of d_w by blocks of threads that share the items."""

    def _made(self, descriptor: BlockMixGradientDescriptor) -> tuple:
        row_tiles, down = _tiles(descriptor.out_blocks, 16, kernel.MOST_ROW_TILES)
        column_tiles, across = _tiles(descriptor.in_blocks, 8, kernel.MOST_COLUMN_TILES)
        number, items = _partition(descriptor)
        order = "beside" if self.beside else "early" if self.early else ""
        made = kernel.block_mix_gradient(descriptor.element.value, row_tiles, column_tiles, order)
        launch = made.launcher((down * across, number, 1), overlaps=self.beside)
        return launch, _partial(descriptor, number), items, across


def _row_blocks(descriptor: BlockMixGradientDescriptor) -> tuple[int, int]:
    """Blocks of rows of the portable kernel, and the rows of one."""
    of_block = max(1, -(-descriptor.rows // _MOST_ROW_BLOCKS))
    return max(1, -(-descriptor.rows // of_block)), of_block


class _PortableProgram(_Program):
    """A warp an element and block of rows."""

    def _made(self, descriptor: BlockMixGradientDescriptor) -> tuple:
        number, rows = _row_blocks(descriptor)
        made = kernel.block_mix_gradient_portable(descriptor.element.value, descriptor.element.value)
        elements = descriptor.out_blocks * descriptor.in_blocks
        return made.launcher((elements, number, 1)), _partial(descriptor, number), rows


def _portable_refuses(descriptor: BlockMixGradientDescriptor) -> str:
    elements = descriptor.out_blocks * descriptor.in_blocks
    return f"wants fewer than 2**31 elements of d_w, found {elements}" if elements >= _LARGEST else ""


class BlockMixGradientPlan(Plan):
    """d_w of (w kron I) x; see :class:`BlockMixGradientDescriptor`."""

    name = "block mix gradient"
    skus = (
        Sku(
            name="mma",
            backend=BackendKind.MMA,
            arch=ArchSku.SM80,
            refuses=_mma_refuses,
            guarantee=lambda d: _guarantee(MathPrecision.BF16_TENSOR_CORE, kernel.WARPS + _partition(d)[0], d),
            build=_MmaProgram,
            workspace=lambda d: _partial(d, _partition(d)[0]).nbytes,
            alignment=16,
        ),
        Sku(
            name="portable",
            backend=BackendKind.PORTABLE,
            arch=ArchSku.ANY,
            refuses=_portable_refuses,
            guarantee=lambda d: _guarantee(MathPrecision.F32, 5 + _row_blocks(d)[0], d),
            build=_PortableProgram,
            workspace=lambda d: _partial(d, _row_blocks(d)[0]).nbytes,
        ),
    )
