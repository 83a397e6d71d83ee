"""Gradients of LoHa's factors from g and x.

For a delta (a1 b1) * (a2 b2) of a weight [out, in], with D = g^T x [out, in], the gradient of the weight:

    d_a1 = s (D * (a2 b2)) b1^T    [out, rank]        d_b1 = s a1^T (D * (a2 b2))    [rank, in]

and the same with 1 and 2 exchanged, s the delta's scale. FedPara arXiv:2108.06098. Either D's tiles are made and
contracted in one launch, and D goes nowhere, or D is made by the fastest product there is, and then contracted.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from kernels.adapter_gradient import dense, hadamard
from kernels.adapter_gradient.hadamard import TILE, HadamardTile
from kernels.target import SIMULATOR
from plans.core.device import ALIGNMENT, Device
from plans.core.errors import InvalidProblem
from plans.core.operand import Operand
from plans.core.plan import Arguments, Launches, Plan, Sku
from plans.core.precision import ElementKind, MathPrecision, PrecisionGuarantee
from plans.core.sku import ArchSku, BackendKind, OpCategory
from plans.core.tensor import TensorMut, TensorRef
from plans.core.workspace import NO_WORKSPACE, Workspace
from plans.matmul.descriptor import Segment, SegmentedMatmulArgs, SegmentedMatmulDescriptor
from plans.matmul.portable import PORTABLE as PORTABLE_MATMUL
from plans.matmul.wgmma import WGMMA
from plans.partial_sums import SLOTS, Partial, Sums, partial_bytes

_FLOATS = (ElementKind.BF16, ElementKind.F16, ElementKind.F32)
_UNIT = 8
_LARGEST = 1 << 31
MOST_RANK = 64
"""The largest rank whose factors' tiles fit into shared memory beside the product's."""


@dataclass(frozen=True)
class HadamardGradientDescriptor:
    """The gradients of a1, b1, a2 and b2; see the module.

    Attributes:
        rows: Rows of g and x.
        out_features: Columns of g, rows of the a.
        in_features: Columns of x, columns of the b.
        rank: Columns of the a, rows of the b.
        element: The kind of g, x and the factors.
        out: The kind of the gradients.
        g_stride: Elements from a row of g to the next; 0 where it is contiguous.
        x_stride: The same of x.
    """

    rows: int
    out_features: int
    in_features: int
    rank: int
    element: ElementKind = ElementKind.BF16
    out: ElementKind = ElementKind.F32
    g_stride: int = 0
    x_stride: int = 0

    category = OpCategory.MATMUL

    def __post_init__(self) -> None:
        extents = (self.rows, self.out_features, self.in_features, self.rank)
        if min(extents) < 0:
            raise InvalidProblem(
                f"Hadamard gradient: rows, out, in, rank {extents}: wanted none negative; give the tensors' own"
            )
        for name, kind in (("g, x and factors", self.element), ("gradients", self.out)):
            if kind not in _FLOATS:
                raise InvalidProblem(f"Hadamard gradient: {name} of {kind.value}, wanted bf16, f16 or f32; cast first")
        for name, stride, least in (
            ("g", self.g_stride, self.out_features),
            ("x", self.x_stride, self.in_features),
        ):
            if stride and stride < least:
                raise InvalidProblem(
                    f"Hadamard gradient: {name} has stride {stride}, wanted at least {least}; "
                    "give 0 where it is contiguous"
                )

    @property
    def empty(self) -> bool:
        """Whether no gradient has an element, or every one is zero."""
        return not self.rank * (self.out_features + self.in_features)

    def operands(self) -> tuple[Operand, ...]:
        """``d_a1``, ``d_b1``, ``d_a2``, ``d_b2``, then ``g``, ``x``, ``a1``, ``b1``, ``a2``, ``b2``."""
        a, b = (self.out_features, self.rank), (self.rank, self.in_features)
        names = (("a1", a), ("b1", b), ("a2", a), ("b2", b))
        return (
            *(Operand(f"d_{name}", self.out, shape, writes=True) for name, shape in names),
            *(
                Operand(name, self.element, (self.rows, columns), layout=(stride or columns, 1))
                for name, columns, stride in (
                    ("g", self.out_features, self.g_stride),
                    ("x", self.in_features, self.x_stride),
                )
            ),
            *(Operand(name, self.element, shape) for name, shape in names),
        )

    @functools.cached_property
    def weight_gradient(self) -> SegmentedMatmulDescriptor:
        """The product D = g^T x in fp32; what reads it begins early, and waits."""
        kind = self.element
        segment = Segment(self.rows, "TN", kind, kind, a_stride=self.g_stride, b_stride=self.x_stride)
        return SegmentedMatmulDescriptor(self.out_features, self.in_features, (segment,), ElementKind.F32, early=True)

    def reference(self, arrays: Sequence[np.ndarray], scale: float = 1.0) -> list[tuple[np.ndarray, np.ndarray]]:
        """Each gradient in float64 with the magnitude that its guarantee is relative to; ``arrays`` as operands."""
        arrays = [np.asarray(array, np.float64) for array in arrays]
        exact, sizes = (_gradients(*values) for values in (arrays, [np.abs(array) for array in arrays]))
        return [(scale * value, abs(scale) * size) for value, size in zip(exact, sizes, strict=True)]


def _gradients(g: np.ndarray, x: np.ndarray, *factors: np.ndarray) -> list[np.ndarray]:
    a1, b1, a2, b2 = factors
    d = g.T @ x
    first, second = d * (a2 @ b2), d * (a1 @ b1)
    return [first @ b1.T, a1.T @ first, second @ b2.T, a2.T @ second]


class HadamardGradientArgs(Arguments):
    """The tensors of one run in the order of the operands, the delta's scale."""

    def __init__(
        self,
        gradients: Sequence[TensorMut],
        g: TensorRef,
        x: TensorRef,
        factors: Sequence[TensorRef],
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.gradients, self.g, self.x, self.factors = tuple(gradients), g, x, tuple(factors)
        self.scale = float(scale)

    def tensors(self) -> list[TensorRef]:
        """``d_a1``, ``d_b1``, ``d_a2``, ``d_b2``, ``g``, ``x``, ``a1``, ``b1``, ``a2``, ``b2``."""
        return [*self.gradients, self.g, self.x, *self.factors]


def _tiles(descriptor: HadamardGradientDescriptor) -> tuple[int, int]:
    return -(-descriptor.out_features // TILE.rows), -(-descriptor.in_features // TILE.columns)


def _rank_steps(descriptor: HadamardGradientDescriptor) -> int:
    """Groups of 16 ranks: 1, 2 or 4, so that few kernels serve all ranks."""
    return 1 << (-(-descriptor.rank // 16) - 1).bit_length()


def _tile(descriptor: HadamardGradientDescriptor) -> HadamardTile:
    """The kernel's compile-time shape."""
    d = descriptor
    g, x = (operand.strides[0] for operand in d.operands()[4:6])
    g_vector, x_vector = math.gcd(_UNIT, g, d.out_features), math.gcd(_UNIT, x, d.in_features)
    whole = not (d.out_features % TILE.rows or d.in_features % TILE.columns or d.rows % TILE.depth)
    return HadamardTile(
        _rank_steps(d),
        g_vector,
        x_vector,
        math.gcd(_UNIT, d.rank),
        math.gcd(_UNIT, d.in_features),
        not (whole and g_vector == x_vector == _UNIT),
    )


def _partials(descriptor: HadamardGradientDescriptor) -> tuple[Partial, ...]:
    down, across = _tiles(descriptor)
    a = Partial(across, descriptor.out_features, descriptor.rank)
    b = Partial(down, descriptor.in_features, descriptor.rank, transposed=True)
    return (a, b, a, b)


def _row_blocks(descriptor: HadamardGradientDescriptor) -> tuple[int, int]:
    """Blocks that share D's rows where it lies in memory, and the rows of one: as many blocks as run at once."""
    steps, across = -(-descriptor.out_features // dense.STEP), -(-descriptor.in_features // dense.SPAN)
    wanted = 2 if SIMULATOR else max(1, SLOTS // max(1, across * -(-descriptor.rank // dense.STEP)))
    of_block = max(1, -(-steps // wanted))
    return -(-steps // of_block), of_block * dense.STEP


def _dense_partials(descriptor: HadamardGradientDescriptor) -> tuple[Partial, ...]:
    across, down = -(-descriptor.in_features // dense.SPAN), _row_blocks(descriptor)[0]
    a = Partial(across, descriptor.out_features, descriptor.rank)
    b = Partial(down, descriptor.rank, descriptor.in_features)
    return (a, b, a, b)


def _contract_refuses(partials: Callable, descriptor: HadamardGradientDescriptor) -> str:
    if descriptor.element is not ElementKind.BF16:
        return f"wants g, x and factors of bf16, found {descriptor.element.value}"
    if descriptor.rank > MOST_RANK:
        return f"wants a rank of at most {MOST_RANK}, found {descriptor.rank}"
    elements = max(partial.number * partial.count for partial in partials(descriptor))
    if max(descriptor.rows, elements) >= _LARGEST or math.prod(_tiles(descriptor)) >= _LARGEST:
        return "wants fewer than 2**31 rows, tiles and elements of a gradient's parts"
    return ""


def _guarantee(
    precision: MathPrecision, units: float, derivation: str, descriptor: HadamardGradientDescriptor
) -> PrecisionGuarantee:
    return PrecisionGuarantee(
        math_precision=precision,
        accumulator=ElementKind.F32,
        deterministic=True,
        bit_stable_on_same_hardware=True,
        rounding_units=2.0 * descriptor.rows + 2.0 * descriptor.rank + units,
        derivation=f"2 units a term of D and of the other product; {derivation}",
    )


def _tile_guarantee(descriptor: HadamardGradientDescriptor) -> PrecisionGuarantee:
    units = 4.0 * max(TILE.rows, TILE.columns) + max(_tiles(descriptor)) + 80.0
    text = (
        "their product 1, what two bf16 parts leave of it 64, a tile's contraction 4 a term, a unit a tile, the scale 2"
    )
    return _guarantee(MathPrecision.BF16_TENSOR_CORE, units, text, descriptor)


def _contracted(sums: Sums, launch: object, first: tuple, args: HadamardGradientArgs, workspace: Workspace) -> Launches:
    """The contraction by ``launch``, if there is anything, whose parameters begin with ``first``, and the sums."""
    parts = sums.pointers(workspace)
    products = [
        value for i in (0, 2) for value in (args.factors[i].data, args.factors[i + 1].data, parts[i], parts[i + 1])
    ]
    added = (sums.launch, sums.arguments(list(args.gradients), workspace, args.scale))
    return [(launch, (*first, *products, args.factors[0].shape[1])), added] if launch is not None else [added]


class _FusedProgram:
    """Two launches, D's tiles made and contracted, and the sums; none where every gradient is empty."""

    def __init__(self, descriptor: HadamardGradientDescriptor, device: Device) -> None:
        self.empty = descriptor.empty
        if self.empty:
            return
        d, (g, x), blocks = descriptor, descriptor.operands()[4:6], math.prod(_tiles(descriptor))
        self.g, self.x, self.rows = (g.strides[0], d.out_features), (x.strides[0], d.in_features), d.rows
        self.sums, made = Sums(_partials(d), d.out), hadamard.hadamard_gradient(_tile(d))
        self.launch = made.launcher((blocks, 1, 1)) if blocks else None

    def bind(self, args: HadamardGradientArgs, workspace: Workspace) -> Launches:
        """The launches."""
        if self.empty:
            return []
        first = (args.g.data, *self.g, args.x.data, *self.x, self.rows)
        return _contracted(self.sums, self.launch, first, args, workspace)


def _dense_bytes(descriptor: HadamardGradientDescriptor) -> int:
    return max(1, -(-4 * descriptor.out_features * descriptor.in_features // ALIGNMENT)) * ALIGNMENT


class _DenseProgram:
    """D by another SKU of products to workspace, before its contraction (sm_90)."""

    def __init__(self, second: Sku, descriptor: HadamardGradientDescriptor, device: Device) -> None:
        self.descriptor, self.device, self.empty = descriptor, device, descriptor.empty
        self.reads_addresses = False
        if not self.empty:
            self.product = second.build(descriptor.weight_gradient, device)
            self.reads_addresses = getattr(self.product, "reads_addresses", False)
            self.at = _dense_bytes(descriptor)
            self.product_bytes = second.workspace(descriptor.weight_gradient)
            self._build()

    def _build(self) -> None:
        d, (number, of_block) = self.descriptor, _row_blocks(self.descriptor)
        across, ranks = -(-d.in_features // dense.SPAN), -(-d.rank // dense.STEP)
        self.sums, self.numbers = Sums(_dense_partials(d), d.out, early=True), (d.out_features, d.in_features, of_block)
        made = dense.contract_hadamard(_rank_steps(d), d.rank % 2 == 0)
        self.launch = made.launcher((across, number, ranks)) if across * number else None

    def bind(self, args: HadamardGradientArgs, workspace: Workspace) -> Launches:
        """All launches; none where every gradient is empty."""
        if self.empty:
            return []
        d = workspace.buffer.tensor(ElementKind.F32, (self.descriptor.out_features, self.descriptor.in_features))
        rest = (
            Workspace(workspace.buffer.part(self.at, workspace.nbytes - self.at))
            if workspace.nbytes > self.at
            else NO_WORKSPACE
        )
        product = self.product.bind(SegmentedMatmulArgs(d, [(args.g, args.x)]), rest)
        return [*product, *self._contract(d, args, rest)]

    def _contract(self, d: TensorMut, args: HadamardGradientArgs, workspace: Workspace) -> Launches:
        return _contracted(self.sums, self.launch, (d.data, *self.numbers), args, workspace)


class _PortableProgram(_DenseProgram):
    """The contraction by a launch for each gradient."""

    def _build(self) -> None:
        d, self.portable = self.descriptor, []
        for result in d.operands()[:4]:
            of_rows = result.name.startswith("d_a")
            made = dense.hadamard_portable(d.out.value, d.element.value, of_rows)
            blocks = -(-result.count // dense.THREADS)
            self.portable.append(made.launcher((blocks, 1, 1)) if blocks else None)

    def _contract(self, d: TensorMut, args: HadamardGradientArgs, workspace: Workspace) -> Launches:
        a1, b1, a2, b2 = (factor.data for factor in args.factors)
        extents = (self.descriptor.out_features, self.descriptor.in_features, self.descriptor.rank)
        found = []
        for i, launch in enumerate(self.portable):
            factors = (a1, b1, a2, b2) if i < 2 else (a2, b2, a1, b1)
            flat = (args.gradients[i].data, d.data, *factors, *extents, np.float32(args.scale))
            found += [(launch, flat)] if launch is not None else []
        return found


def _dense_guarantee(descriptor: HadamardGradientDescriptor) -> PrecisionGuarantee:
    number, of_block = _row_blocks(descriptor)
    across = -(-descriptor.in_features // dense.SPAN)
    units = 4.0 * max(of_block, dense.CELL) + dense.WARPS + max(number, across) + 80.0
    text = (
        "their product 1, what two bf16 parts leave of it 64, a contraction 4 for each of a block's rows or a warp's "
        "columns, a unit a warp and a block, the scale 2"
    )
    return _guarantee(MathPrecision.BF16_TENSOR_CORE, units, text, descriptor)


def _dense_refuses(descriptor: HadamardGradientDescriptor) -> str:
    if reason := _contract_refuses(_dense_partials, descriptor) or WGMMA.refuses(descriptor.weight_gradient):
        return reason
    return f"wants columns of a multiple of 4, found {descriptor.in_features}" if descriptor.in_features % 4 else ""


def _portable_refuses(descriptor: HadamardGradientDescriptor) -> str:
    most = max(operand.count for operand in descriptor.operands()[:4])
    if most >= _LARGEST:
        return f"wants fewer than 2**31 elements of a gradient, found {most}"
    return PORTABLE_MATMUL.refuses(descriptor.weight_gradient)


def _portable_guarantee(descriptor: HadamardGradientDescriptor) -> PrecisionGuarantee:
    units = 4.0 * max(descriptor.out_features, descriptor.in_features) + 16.0
    return _guarantee(MathPrecision.F32, units, "a contraction's term 4; scales", descriptor)


class HadamardGradientPlan(Plan):
    """The gradients of LoHa's factors; see :class:`HadamardGradientDescriptor`."""

    name = "Hadamard gradient"
    skus = (
        Sku(
            name="wgmma, then contracted",
            backend=BackendKind.WGMMA,
            arch=ArchSku.SM90A,
            refuses=_dense_refuses,
            guarantee=_dense_guarantee,
            build=functools.partial(_DenseProgram, WGMMA),
            workspace=lambda d: 0 if d.empty else _dense_bytes(d) + partial_bytes(_dense_partials(d)),
            alignment=16,
            suits=lambda d: WGMMA.suits(d.weight_gradient),
        ),
        Sku(
            name="mma",
            backend=BackendKind.MMA,
            arch=ArchSku.SM80,
            refuses=functools.partial(_contract_refuses, _partials),
            guarantee=_tile_guarantee,
            build=_FusedProgram,
            workspace=lambda d: 0 if d.empty else partial_bytes(_partials(d)),
            alignment=16,
        ),
        Sku(
            name="portable",
            backend=BackendKind.PORTABLE,
            arch=ArchSku.ANY,
            refuses=_portable_refuses,
            guarantee=_portable_guarantee,
            build=functools.partial(_PortableProgram, PORTABLE_MATMUL),
            workspace=lambda d: 0 if d.empty else _dense_bytes(d) + PORTABLE_MATMUL.workspace(d.weight_gradient),
        ),
    )
