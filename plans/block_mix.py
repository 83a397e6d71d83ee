"""Blocks of a row mixed by a small matrix: out[t, l, :] = scale * sum_m w[l, m] x[t, m, :], that is (w kron I) x.

The light pass that LoKr's factor path makes over its input: kron(w1, w2) x = (I kron w2) (w1 kron I) x.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from kernels import block_mix as kernel
from kernels.division import reciprocal_of
from kernels.target import Kernel
from plans.block_mix_streamed import streamed_sku
from plans.core.device import Device
from plans.core.errors import InvalidProblem
from plans.core.operand import Operand
from plans.core.plan import Arguments, Launches, Plan, Sku
from plans.core.precision import ElementKind, MathPrecision, PrecisionGuarantee
from plans.core.sku import ArchSku, BackendKind, OpCategory, begins_early
from plans.core.tensor import TensorMut, TensorRef
from plans.core.workspace import Workspace

_FLOATS = (ElementKind.BF16, ElementKind.F16, ElementKind.F32)
_UNIT = 8
BYTES_A_CYCLE = 22.0
"""That a multiprocessor reads and writes here while others multiply."""
_SHARED_BYTES = 48 * 1024
_LARGEST = 1 << 31


@dataclass(frozen=True)
class BlockMixDescriptor:
    """out[t, l, e] = scale * sum_m w[l, m] x[t, m, e].

    Attributes:
        rows: Rows t.
        out_blocks: Blocks l of a row of the result.
        in_blocks: Blocks m of a row of x.
        width: Elements e of a block.
        element: The kind of x.
        weight: The kind of w.
        out: The kind of the result.
        transposed: w is stored [in_blocks, out_blocks]: the mixing's transpose, for gradients.
        x_stride: Elements from a row of x to the next; 0 where it is contiguous.
        early: The next launch takes the result as a ``late`` operand and needs nothing else that is newer: it may
            begin before this one ends, where the device can.
        spare: Multiprocessors that the next launch needs later than the others, and by how many cycles: they do what
            they can in that time, and the others, which it finds free early, the rest.
    """

    rows: int
    out_blocks: int
    in_blocks: int
    width: int
    element: ElementKind = ElementKind.BF16
    weight: ElementKind = ElementKind.BF16
    out: ElementKind = ElementKind.BF16
    transposed: bool = False
    x_stride: int = 0
    early: bool = False
    spare: tuple[int, float] = (0, 0.0)

    category = OpCategory.MATMUL

    def __post_init__(self) -> None:
        if min(self.rows, self.out_blocks, self.in_blocks, self.width, *self.spare) < 0:
            raise InvalidProblem(
                f"block mix: {self.rows} rows, {self.out_blocks} x {self.in_blocks} blocks of {self.width}, spare "
                f"{self.spare}: wanted none negative; give the tensors' own extents"
            )
        if self.x_stride and self.x_stride < self.in_blocks * self.width:
            wanted = self.in_blocks * self.width
            raise InvalidProblem(
                f"block mix: x has row stride {self.x_stride}, wanted at least its {wanted} elements; "
                "give 0 where it is contiguous"
            )
        for name, kind in (("x", self.element), ("w", self.weight), ("out", self.out)):
            if kind not in _FLOATS:
                raise InvalidProblem(f"block mix: {name} of {kind.value}, wanted bf16, f16 or f32; cast it first")

    def operands(self) -> tuple[Operand, ...]:
        """``out``, ``x``, ``w``."""
        columns = self.in_blocks * self.width
        mixing = (self.in_blocks, self.out_blocks) if self.transposed else (self.out_blocks, self.in_blocks)
        return (
            Operand("out", self.out, (self.rows, self.out_blocks * self.width), writes=True),
            Operand("x", self.element, (self.rows, columns), layout=(self.x_stride or columns, 1)),
            Operand("w", self.weight, mixing),
        )

    def reference(self, x: np.ndarray, w: np.ndarray, scale: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
        """The exact result in float64, and the magnitude that the guarantee is relative to."""
        x = np.asarray(x, np.float64).reshape(self.rows, self.in_blocks, self.width)
        w = np.asarray(w, np.float64)
        w = w.T if self.transposed else w
        shape = (self.rows, self.out_blocks * self.width)
        exact = np.einsum("lm,tme->tle", w, x).reshape(shape)
        magnitude = np.einsum("lm,tme->tle", np.abs(w), np.abs(x)).reshape(shape)
        return scale * exact, abs(scale) * magnitude


class BlockMixArgs(Arguments):
    """The tensors of one run, and a finite scale."""

    def __init__(self, out: TensorMut, x: TensorRef, w: TensorRef, scale: float = 1.0) -> None:
        super().__init__()
        self.out, self.x, self.w, self.scale = out, x, w, float(scale)

    def tensors(self) -> list[TensorRef]:
        """``out``, ``x``, ``w``."""
        return [self.out, self.x, self.w]


def _guarantee(precision: MathPrecision, reason: str, descriptor: BlockMixDescriptor) -> PrecisionGuarantee:
    return PrecisionGuarantee(
        math_precision=precision,
        accumulator=ElementKind.F32,
        deterministic=True,
        bit_stable_on_same_hardware=True,
        rounding_units=2.0 * descriptor.in_blocks + 3.0,
        derivation=f"{reason} (2 units a term); the scale's rounding and product",
    )


def _mma_guarantee(descriptor: BlockMixDescriptor) -> PrecisionGuarantee:
    return _guarantee(MathPrecision.BF16_TENSOR_CORE, "the tensor core truncates terms", descriptor)


def _groups(descriptor: BlockMixDescriptor) -> int:
    return -(-descriptor.in_blocks // 8)


def _shared_bytes(descriptor: BlockMixDescriptor) -> int:
    rows, pitch = kernel.weight_places(*descriptor.operands()[2].shape)
    return 2 * rows * pitch


def _mma_refuses(descriptor: BlockMixDescriptor) -> str:
    kinds = {descriptor.element, descriptor.weight, descriptor.out}
    if len(kinds) > 1 or descriptor.element is ElementKind.F32:
        return f"wants x, w and out all bf16 or all fp16, found {', '.join(sorted(kind.value for kind in kinds))}"
    if descriptor.width % _UNIT or descriptor.x_stride % _UNIT:
        return f"wants blocks and rows of multiples of {_UNIT} elements, found blocks of {descriptor.width}"
    if _groups(descriptor) > kernel.MOST_GROUPS:
        return f"wants at most {8 * kernel.MOST_GROUPS} blocks of x, found {descriptor.in_blocks}"
    if _shared_bytes(descriptor) > _SHARED_BYTES:
        return f"wants w in {_SHARED_BYTES} bytes of shared memory, it takes {_shared_bytes(descriptor)}"
    if not descriptor.in_blocks:
        return "wants at least one block of x"
    if (columns := max(descriptor.in_blocks, descriptor.out_blocks) * descriptor.width) >= _LARGEST:
        return f"wants rows of fewer than 2**31 elements, found {columns}"
    items = descriptor.rows * -(-descriptor.width // kernel.SPAN)
    return f"wants fewer than 2**31 spans of {kernel.SPAN} elements, found {items}" if items >= _LARGEST else ""


class _Program:
    """One launch of either kernel."""

    def __init__(
        self,
        descriptor: BlockMixDescriptor,
        made: Kernel,
        blocks: int,
        shared_bytes: int = 0,
        overlaps: bool = False,
        more: tuple[int, ...] = (),
    ) -> None:
        out, x, _ = descriptor.operands()
        extents = (descriptor.rows, descriptor.out_blocks, descriptor.in_blocks, descriptor.width)
        self.numbers = (*extents, out.shape[1], x.strides[0], *more)
        self.launch = made.launcher((blocks, 1, 1), shared_bytes, overlaps) if out.count else None

    def bind(self, args: BlockMixArgs, workspace: Workspace) -> Launches:
        """The launch; none where the result is empty."""
        if self.launch is None:
            return []
        pointers = (args.out.data, args.x.data, args.w.data, np.float32(args.scale))
        return [(self.launch, (*pointers, *self.numbers))]


def shares(descriptor: BlockMixDescriptor, items: int, device: Device, rate: float = BYTES_A_CYCLE) -> tuple[int, int]:
    """How many items the multiprocessors take that the next launch needs early, and how many these are; or (0, 0).

    ``rate`` are the bytes a cycle that those with time to spare are reckoned to move in it.
    """
    spare, cycles = descriptor.spare
    out, x, _ = descriptor.operands()
    share = min(1.0, spare * cycles * rate / max(1, out.nbytes + x.nbytes))
    if share <= spare / device.multiprocessors:
        return 0, 0
    return items - round(share * items), device.multiprocessors - spare


def _build_mma(descriptor: BlockMixDescriptor, device: Device) -> _Program:
    early = descriptor.early and begins_early(device)
    groups, vector = _groups(descriptor), kernel.weight_vector(descriptor.operands()[2].shape[1])
    ragged, spans = descriptor.in_blocks % 8 > 0, -(-descriptor.width // kernel.SPAN)
    made = kernel.mix_blocks(descriptor.element.value, groups, ragged, descriptor.transposed, vector, early)
    items = descriptor.rows * spans
    of_block = kernel.warps_of(groups) * kernel.items_at_once(groups)
    quick_items, quick_blocks = shares(descriptor, items, device)
    # Blocks without work are launched too: a grid of the spare ones alone kept the next launch's clusters waiting.
    blocks = device.multiprocessors if quick_blocks else min(-(-items // of_block), device.multiprocessors)
    more = (reciprocal_of(max(1, spans)), quick_items, quick_blocks)
    return _Program(descriptor, made, blocks, _shared_bytes(descriptor), early, more)


def _build_portable(descriptor: BlockMixDescriptor, device: Device) -> _Program:
    kinds = (descriptor.out.value, descriptor.element.value, descriptor.weight.value)
    made = kernel.mix_blocks_portable(*kinds, descriptor.transposed)
    return _Program(descriptor, made, -(-math.prod(descriptor.operands()[0].shape) // kernel.PORTABLE_THREADS))


def _portable_refuses(descriptor: BlockMixDescriptor) -> str:
    elements = math.prod(descriptor.operands()[0].shape)
    return f"wants fewer than 2**31 elements, found {elements}" if elements >= _LARGEST else ""


class BlockMixPlan(Plan):
    """(w kron I) x; see :class:`BlockMixDescriptor`."""

    name = "block mix"
    skus = (
        streamed_sku(_mma_refuses, _mma_guarantee, shares),
        Sku(
            name="mma",
            backend=BackendKind.MMA,
            arch=ArchSku.SM80,
            refuses=_mma_refuses,
            guarantee=_mma_guarantee,
            build=_build_mma,
            alignment=16,
        ),
        Sku(
            name="portable",
            backend=BackendKind.PORTABLE,
            arch=ArchSku.ANY,
            refuses=_portable_refuses,
            guarantee=lambda d: _guarantee(MathPrecision.F32, "a product and a sum", d),
            build=_build_portable,
        ),
    )
