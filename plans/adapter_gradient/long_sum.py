"""A^T B over many rows on Hopper: the gradient of a weight of some hundred rows and columns, LoKr's w2 above all.

    out[c, d] = scale * sum_t a[t, c] b[t, d]

As a product it is an ordinary one (`matmul.in_parts`); this one may be made beside the launch before.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kernels.adapter_gradient.long_sum import SIDE, long_sum
from kernels.target import SIMULATOR
from kernels.wgmma import DEPTH
from plans.core.device import Device
from plans.core.errors import InvalidProblem
from plans.core.operand import Operand
from plans.core.plan import Arguments, Launches, Plan, Sku
from plans.core.precision import ElementKind, MathPrecision, PrecisionGuarantee
from plans.core.sku import ArchSku, BackendKind, OpCategory
from plans.core.tensor import TensorMut, TensorRef
from plans.core.tensor_map import Box, map_address
from plans.core.workspace import Workspace
from plans.partial_sums import SLOTS, Partial, Sums

_HALVES = (ElementKind.BF16, ElementKind.F16)
_FLOATS = (*_HALVES, ElementKind.F32)
_UNIT = 8
_MOST_ELEMENTS = 1 << 20
_MULTIPROCESSORS = 5 if SIMULATOR else SLOTS // 2
_LEAST_STAGES = 1 if SIMULATOR else 8
"""Stages of a share, at least."""

_MOST_WASTE = 1.25
"""Of tiles, that is worth it."""

_STAGE_CYCLES = 1400.0
"""That a stage takes beside a product, in cycles as a product's count has them."""


@dataclass(frozen=True)
class LongSumDescriptor:
    """out[c, d] = scale * sum_t a[t, c] b[t, d].

    Attributes:
        rows: Rows t.
        left: Columns c of a.
        right: Columns d of b.
        element: The kind of a and b.
        out: The kind of the result.
        beside: The launch before this one makes nothing that is taken here, and waits itself for what came before: this
            one may run beside it, and ends after it.
        spare: Where it does, multiprocessors that the launch before leaves so many cycles before it ends.
    """

    rows: int
    left: int
    right: int
    element: ElementKind = ElementKind.BF16
    out: ElementKind = ElementKind.F32
    beside: bool = False
    spare: tuple[int, float] = (0, 0.0)

    category = OpCategory.MATMUL

    def __post_init__(self) -> None:
        if min(self.rows, self.left, self.right) < 0:
            raise InvalidProblem(
                f"long sum: {self.rows} rows of {self.left} and {self.right} columns: wanted none negative; "
                "give the tensors' own extents"
            )
        for name, kind in (("a and b", self.element), ("the result", self.out)):
            if kind not in _FLOATS:
                raise InvalidProblem(f"long sum: {name} of {kind.value}, wanted bf16, f16 or f32; cast first")

    def operands(self) -> tuple[Operand, ...]:
        """``out``, ``a``, ``b``."""
        return (
            Operand("out", self.out, (self.left, self.right), writes=True),
            Operand("a", self.element, (self.rows, self.left)),
            Operand("b", self.element, (self.rows, self.right)),
        )

    def reference(
        self, arrays: tuple[np.ndarray, np.ndarray], scale: float = 1.0
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """The exact result of a and b in float64, and the magnitude that the guarantee is relative to."""
        a, b = (np.asarray(array, np.float64) for array in arrays)
        return [(scale * (a.T @ b), abs(scale) * (np.abs(a).T @ np.abs(b)))]


class LongSumArgs(Arguments):
    """The tensors of one run, and a finite scale."""

    def __init__(self, out: TensorMut, a: TensorRef, b: TensorRef, scale: float = 1.0) -> None:
        super().__init__()
        self.out, self.a, self.b, self.scale = out, a, b, float(scale)

    def tensors(self) -> list[TensorRef]:
        """``out``, ``a``, ``b``."""
        return [self.out, self.a, self.b]


def _across(descriptor: LongSumDescriptor) -> int:
    return -(-descriptor.right // SIDE)


def _tiles(descriptor: LongSumDescriptor) -> int:
    return -(-descriptor.left // SIDE) * _across(descriptor)


def _stages(descriptor: LongSumDescriptor) -> int:
    return -(-descriptor.rows // DEPTH)


def _shares(descriptor: LongSumDescriptor) -> int:
    """Of the rows: as many as there are multiprocessors for, of several stages each."""
    return max(1, min(_MULTIPROCESSORS // max(1, _tiles(descriptor)), _stages(descriptor) // _LEAST_STAGES))


def _head_start(descriptor: LongSumDescriptor) -> tuple[int, int]:
    """The stages of the shares that begin before the others, and how many those are."""
    (spare, cycles), shares, stages = descriptor.spare, _shares(descriptor), _stages(descriptor)
    early = spare // max(1, _tiles(descriptor)) if descriptor.beside else 0
    if not 0 < early < shares:
        return 0, 0
    before = min(stages / early, cycles / _STAGE_CYCLES)
    return int(early * (before + (stages - early * before) / shares)), early


def _partial(descriptor: LongSumDescriptor) -> Partial:
    return Partial(_shares(descriptor), descriptor.left, descriptor.right)


def _refuses(descriptor: LongSumDescriptor) -> str:
    d = descriptor
    if d.element not in _HALVES:
        return f"wants a and b of bf16 or fp16, found {d.element.value}"
    if not d.rows or not 0 < d.left * d.right <= _MOST_ELEMENTS:
        return f"wants rows, and 1 to 2**20 elements, found {d.rows} and {d.left} x {d.right}"
    if d.left % _UNIT or d.right % _UNIT:
        return f"wants columns of multiples of {_UNIT}, found {d.left} and {d.right}"
    return "" if _stages(d) * _shares(d) < 1 << 31 else f"wants fewer rows, found {d.rows}"


def _guarantee(descriptor: LongSumDescriptor) -> PrecisionGuarantee:
    shares = _shares(descriptor)
    return PrecisionGuarantee(
        math_precision=MathPrecision.BF16_TENSOR_CORE,
        accumulator=ElementKind.F32,
        deterministic=True,
        bit_stable_on_same_hardware=True,
        rounding_units=2.0 * descriptor.rows + shares + 3.0,
        derivation=(
            "2 units a term (the tensor core truncates it at fp32's last place); the sums of "
            f"{shares} shares a unit each; the scale's rounding and product"
        ),
    )


class _Program:
    """The shares' launch, and the sums of their results."""

    reads_addresses = True

    def __init__(self, descriptor: LongSumDescriptor, device: Device) -> None:
        d, tiles, shares = descriptor, _tiles(descriptor), _shares(descriptor)
        self.descriptor, self.device = descriptor, device
        made = long_sum(d.element.value, d.beside)
        self.launch = made.launcher((tiles * shares, 1, 1), overlaps=True)
        self.sums = Sums((_partial(d),), d.out, early=True)
        self.numbers = (d.left, d.right, _across(d), tiles, _stages(d), shares, *_head_start(d))

    def bind(self, args: LongSumArgs, workspace: Workspace) -> Launches:
        """Both launches."""
        (parts,), maps = self.sums.pointers(workspace), []
        for tensor in (args.a, args.b):
            box = Box.of_matrix(tensor.address, tensor.element, tensor.shape, tensor.shape[1], (DEPTH, DEPTH))
            maps.append(map_address(self.device, box))
        sums = self.sums.arguments([args.out], workspace, args.scale)
        return [(self.launch, (parts, *maps, *self.numbers)), (self.sums.launch, sums)]


class LongSumPlan(Plan):
    """A^T B over many rows; see :class:`LongSumDescriptor`."""

    name = "long sum"
    skus = (
        Sku(
            name="streamed",
            backend=BackendKind.STREAMED,
            arch=ArchSku.SM90A,
            refuses=_refuses,
            guarantee=_guarantee,
            build=_Program,
            workspace=lambda descriptor: _partial(descriptor).nbytes,
            alignment=16,
        ),
    )

    @classmethod
    def is_fast(cls, descriptor: LongSumDescriptor, device: Device) -> bool:
        """Whether it can be made there and is worth it: tiles are filled, and so is the chip."""
        d = descriptor
        if device.arch < ArchSku.SM90A.value or SIMULATOR or _refuses(d):
            return False
        tiles = _tiles(d)
        filled = _MOST_WASTE * d.left * d.right >= tiles * SIDE**2
        return filled and 2 * tiles <= _MULTIPROCESSORS and tiles * _shares(d) >= 0.9 * _MULTIPROCESSORS
