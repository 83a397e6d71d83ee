"""Gradients of LoCon's factors in one launch, or two, that read g and x once each.

For y = x W^T + s (x D^T) U^T with t = x D^T [rows, rank] and t_g = g U [rows, rank]:

    d_up = s g^T t        [out, rank]
    d_down = s t_g^T x    [rank, in]

t and t_g are given, since products that need them anyway have made them; as one tensor each, or as two that add up to
them, which is as good as fp32. LoRA arXiv:2106.09685.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kernels.adapter_gradient import low_rank as kernel
from kernels.target import SIMULATOR
from plans.adapter_gradient.low_rank_streamed import streamed_sku
from plans.core.device import Device
from plans.core.errors import InvalidProblem
from plans.core.operand import Operand
from plans.core.plan import Arguments, Launches, Plan, Sku
from plans.core.precision import ElementKind, MathPrecision, PrecisionGuarantee
from plans.core.sku import ArchSku, BackendKind, OpCategory, begins_early
from plans.core.tensor import TensorMut, TensorRef
from plans.core.workspace import Workspace
from plans.partial_sums import SLOTS, Partial, Sums, partial_bytes

_FLOATS = (ElementKind.BF16, ElementKind.F16, ElementKind.F32)
_UNIT = 8
_LARGEST = 1 << 31
_MOST_PARTS = SLOTS
# By an H200's times of several numbers of blocks, in turns of 128 rows of as many blocks as run at once: a block's
# beginning and end, a turn of a block that runs alone, a part that is written and added up, the launch that does that.
_TURNS_A_BLOCK, _TURNS_ALONE, _TURNS_A_PART, _TURNS_A_LAUNCH = 2.0, 0.5, 0.5, 2.0
_STREAMED, _STREAMED_ALONE, _STREAMED_FIXED = 0.85, 0.2, 1.5
"""The same where TMA reads: a turn of all, one of a block that runs alone, beginning and end."""

_LEAST_STREAMED = 1 << 22
"""Elements of g and x that are worth tensor maps, which name addresses and so cost the host."""


@dataclass(frozen=True)
class LowRankGradientDescriptor:
    """d_up = scale g^T t and d_down = scale t_g^T x, either or both.

    Attributes:
        rows: Rows of x and g.
        out_features: Columns of g, 0 where d_up is not wanted.
        in_features: Columns of x, 0 where d_down is not wanted.
        rank: Rows of d_down, columns of d_up.
        element: The kind of g, x, t and t_g.
        out: The kind of the gradients.
        parts: Tensors that t, and t_g, is the sum of: 1, or 2 one after the other in each row.
        inner_stride: Elements from a row of t, and of t_g, to the next; 0 where its parts lie side by side.
        part_stride: Elements from a row's one part to the other; 0 for the rank.
        g_stride: Elements from a row of g to the next; 0 where it is contiguous.
        x_stride: The same of x.
        beside: The launch before this one makes nothing that is taken here, and waits itself for what came before: this
            one may run beside it, where the device can, and ends after it.
    """

    rows: int
    out_features: int
    in_features: int
    rank: int
    element: ElementKind = ElementKind.BF16
    out: ElementKind = ElementKind.F32
    parts: int = 1
    inner_stride: int = 0
    part_stride: int = 0
    g_stride: int = 0
    x_stride: int = 0
    beside: bool = False

    category = OpCategory.MATMUL

    def __post_init__(self) -> None:
        extents = (self.rows, self.out_features, self.in_features, self.rank)
        if min(extents) < 0 or self.parts not in (1, 2):
            raise InvalidProblem(
                f"low-rank gradient: rows, out, in, rank {extents} in {self.parts} parts: wanted none negative, and "
                "1 or 2 parts; give the tensors' own"
            )
        for name, kind in (("g and x", self.element), ("gradients", self.out)):
            if kind not in _FLOATS:
                raise InvalidProblem(f"low-rank gradient: {name} of {kind.value}, wanted bf16, f16 or f32; cast first")
        for name, stride, least in (
            ("g", self.g_stride, self.out_features),
            ("x", self.x_stride, self.in_features),
            ("a part of t", self.part_stride, self.rank),
            ("t", self.inner_stride, self._part * (self.parts - 1) + self.rank),
        ):
            if stride and stride < least:
                raise InvalidProblem(
                    f"low-rank gradient: {name} has stride {stride}, wanted at least {least}; "
                    "give 0 where it is contiguous"
                )

    @property
    def _part(self) -> int:
        return self.part_stride or self.rank

    def _sides(self) -> tuple[tuple[str, str, int, int, bool], ...]:
        sides = (
            ("up", "g", self.out_features, self.g_stride, True),
            ("down", "x", self.in_features, self.x_stride, False),
        )
        return tuple(side for side in sides if side[2])

    def operands(self) -> tuple[Operand, ...]:
        """``d_up``, ``g``, ``t`` where d_up is wanted, then ``d_down``, ``x``, ``t_g`` where that is."""
        found: list[Operand] = []
        shape = (self.rows, self.parts, self.rank)
        inner = (self.inner_stride or self.parts * self._part, self._part, 1)
        for name, wide, columns, stride, transposed in self._sides():
            result = (columns, self.rank) if transposed else (self.rank, columns)
            found += [
                Operand(f"d_{name}", self.out, result, writes=True),
                Operand(wide, self.element, (self.rows, columns), layout=(stride or columns, 1)),
                Operand("t" if wide == "g" else "t_g", self.element, shape, layout=inner),
            ]
        return tuple(found)

    def reference(self, arrays: Sequence[np.ndarray], scale: float = 1.0) -> list[tuple[np.ndarray, np.ndarray]]:
        """Each gradient in float64 with the magnitude that its guarantee is relative to.

        ``arrays`` are the operands that are read, in order.
        """
        found = []
        for (_, _, _, _, transposed), wide, narrow in zip(self._sides(), arrays[0::2], arrays[1::2], strict=True):
            wide, narrow = np.asarray(wide, np.float64), np.asarray(narrow, np.float64)
            exact, size = narrow.sum(1).T @ wide, np.abs(narrow).sum(1).T @ np.abs(wide)
            exact, size = scale * exact, abs(scale) * size
            found.append((exact.T, size.T) if transposed else (exact, size))
        return found


class LowRankGradientArgs(Arguments):
    """For each gradient that is wanted it, the wide operand (g or x) and the narrow one (t or t_g); and the scale.

    The narrow ones are [rows, parts, rank].
    """

    def __init__(self, sides: Sequence[tuple[TensorMut, TensorRef, TensorRef]], scale: float = 1.0) -> None:
        super().__init__()
        self.sides, self.scale = tuple(sides), float(scale)

    def tensors(self) -> list[TensorRef]:
        """Every side's three tensors."""
        return [tensor for side in self.sides for tensor in side]


def _turns(descriptor: LowRankGradientDescriptor) -> int:
    return max(1, -(-descriptor.rows // kernel.ROWS_OF_TURN))


def _seconds(descriptor: LowRankGradientDescriptor, number: int) -> float:
    """Of so many blocks along the rows, in turns: all of them, or those of one of few, and what rounds cost."""
    slots, blocks = _slots(descriptor), _column_blocks(descriptor) * _rank_blocks(descriptor) * number
    of_block = -(-_turns(descriptor) // number)
    rounds, alone = max(1, -(-blocks // slots)), _TURNS_ALONE * of_block
    rest = alone if rounds > 1 and blocks % slots else 0.0
    return max(blocks * of_block / slots, alone) + rest + _TURNS_A_BLOCK * rounds


def _seconds_by_parts(descriptor: LowRankGradientDescriptor, number: int) -> float:
    """With the parts, and the launch that adds them up."""
    parts = _column_blocks(descriptor) * _rank_blocks(descriptor) * number
    return _seconds(descriptor, number) + _TURNS_A_PART * parts / SLOTS + _TURNS_A_LAUNCH


def _slots(descriptor: LowRankGradientDescriptor) -> int:
    """Blocks that run at once: with many ranks one fills a multiprocessor."""
    return SLOTS // 2 if _tiles(descriptor) == kernel.MOST_TILES else SLOTS


@functools.lru_cache(maxsize=4096)
def _row_blocks(descriptor: LowRankGradientDescriptor) -> tuple[int, int]:
    """Blocks along the rows, and the rows of one: those that are done first; of about the same, the most."""
    turns = _turns(descriptor)
    counts = range(min(_MOST_PARTS, turns), 0, -1)
    wanted = 2 if SIMULATOR else min(counts, key=lambda number: round(_seconds_by_parts(descriptor, number)))
    of_block = -(-turns // min(wanted, turns))
    return max(1, -(-turns // of_block)), of_block * kernel.ROWS_OF_TURN


def _column_blocks(descriptor: LowRankGradientDescriptor) -> int:
    return sum(-(-side[2] // kernel.SPAN) for side in descriptor._sides())


def _tiles(descriptor: LowRankGradientDescriptor) -> int:
    """Groups of 16 ranks of a block: 1, 2 or 4, so that few kernels serve all ranks."""
    groups = max(1, -(-descriptor.rank // kernel.STEP))
    return min(kernel.MOST_TILES, 1 << (groups - 1).bit_length())


def _rank_blocks(descriptor: LowRankGradientDescriptor) -> int:
    return -(-descriptor.rank // (kernel.STEP * _tiles(descriptor)))


def _partials(descriptor: LowRankGradientDescriptor) -> tuple[Partial, ...]:
    number = _row_blocks(descriptor)[0]
    return tuple(Partial(number, descriptor.rank, side[2], side[4]) for side in descriptor._sides())


def _empty(descriptor: LowRankGradientDescriptor) -> bool:
    return not descriptor.rank or not descriptor._sides()


def _mma_refuses(descriptor: LowRankGradientDescriptor) -> str:
    if descriptor.element is ElementKind.F32:
        return "wants g and x of bf16 or fp16, found f32"
    operands = descriptor.operands()
    axes = [axis for o in operands if not o.writes for axis in zip(o.strides[:-1], o.shape[:-1], strict=True)]
    strides = [stride for stride, extent in axes if extent > 1]
    columns = [side[2] for side in descriptor._sides()]
    if any(number % _UNIT for number in (*columns, *strides)):
        return f"wants columns and strides of multiples of {_UNIT}, found columns {columns}, strides {strides}"
    if (
        max(descriptor.rows, *columns, 1) >= _LARGEST
        or max((o.count for o in operands if o.writes), default=0) > 1 << 30
    ):
        return "wants extents below 2**31 and at most 2**30 elements of a gradient"
    return ""


def _suits_streamed(descriptor: LowRankGradientDescriptor) -> bool:
    """Whether it reads enough, in columns enough, that one launch of pairs of blocks for 64 columns is the fastest."""
    elements = descriptor.rows * (descriptor.out_features + descriptor.in_features)
    if SIMULATOR or elements < _LEAST_STREAMED:
        return False
    of_block = -(-_turns(descriptor) // 2)
    turns = max(_STREAMED * 2 * _column_blocks(descriptor) * of_block / SLOTS, _STREAMED_ALONE * of_block)
    return turns + _STREAMED_FIXED <= _seconds_by_parts(descriptor, _row_blocks(descriptor)[0])


def _guarantee(precision: MathPrecision, descriptor: LowRankGradientDescriptor) -> PrecisionGuarantee:
    blocks = max(_row_blocks(descriptor)[0], 2)
    return PrecisionGuarantee(
        math_precision=precision,
        accumulator=ElementKind.F32,
        deterministic=True,
        bit_stable_on_same_hardware=True,
        rounding_units=2.0 * descriptor.rows * descriptor.parts + kernel.WARPS + blocks + 8.0,
        derivation=(
            "2 units a term (the tensor core truncates it at fp32's last place; a product and a sum elsewhere); the "
            "sums of a block's warps and of all blocks a unit each; the scale's rounding and product"
        ),
    )


def _side_numbers(descriptor: LowRankGradientDescriptor) -> list[tuple[int, int, int, int]]:
    """Each side's columns and strides, as kernels take them."""
    operands = descriptor.operands()
    return [
        (wide.shape[1], wide.strides[0], *narrow.strides[:2])
        for wide, narrow in zip(operands[1::3], operands[2::3], strict=True)
    ]


class _MmaProgram:
    """The sums of blocks of rows, and their sum."""

    def __init__(self, descriptor: LowRankGradientDescriptor, device: Device) -> None:
        self.descriptor, self.empty = descriptor, _empty(descriptor)
        if self.empty:
            return
        number, rows_of_block = _row_blocks(descriptor)
        hopper = begins_early(device)
        beside = descriptor.beside and hopper
        made = kernel.low_rank_gradient(descriptor.element.value, _tiles(descriptor), descriptor.parts, beside)
        of_first = -(-descriptor._sides()[0][2] // kernel.SPAN)
        self.numbers = _side_numbers(descriptor)
        self.rest = (descriptor.rows, rows_of_block, descriptor.rank, of_first)
        grid = (_column_blocks(descriptor), number, _rank_blocks(descriptor))
        self.multiply = made.launcher(grid, overlaps=beside)
        self.sums = Sums(_partials(descriptor), descriptor.out, early=hopper)

    def bind(self, args: LowRankGradientArgs, workspace: Workspace) -> Launches:
        """Both launches; none where there is nothing to write."""
        if self.empty:
            return []
        sides = [
            (parts, wide.data, narrow.data, *numbers)
            for parts, (_, wide, narrow), numbers in zip(
                self.sums.pointers(workspace), args.sides, self.numbers, strict=True
            )
        ]
        flat = (*sides[0], *sides[-1], *self.rest)
        results = [side[0] for side in args.sides]
        return [(self.multiply, flat), (self.sums.launch, self.sums.arguments(results, workspace, args.scale))]


class _PortableProgram:
    """A launch for each gradient."""

    def __init__(self, descriptor: LowRankGradientDescriptor, device: Device) -> None:
        self.descriptor, self.launches, self.numbers = descriptor, [], _side_numbers(descriptor)
        kind = descriptor.element.value
        for _, _, columns, _, transposed in () if _empty(descriptor) else descriptor._sides():
            made = kernel.low_rank_gradient_portable(descriptor.out.value, kind, kind, descriptor.parts, transposed)
            self.launches.append(made.launcher((-(-descriptor.rank * columns // kernel.THREADS), 1, 1)))

    def bind(self, args: LowRankGradientArgs, workspace: Workspace) -> Launches:
        """The launches; none where there is nothing to write."""
        if not self.launches:
            return []
        rest = (self.descriptor.rows, self.descriptor.rank, np.float32(args.scale))
        return [
            (launch, (*(tensor.data for tensor in side), *numbers, *rest))
            for launch, side, numbers in zip(self.launches, args.sides, self.numbers, strict=True)
        ]


def _portable_refuses(descriptor: LowRankGradientDescriptor) -> str:
    most = max((math.prod(operand.shape) for operand in descriptor.operands() if operand.writes), default=0)
    return f"wants fewer than 2**31 elements of a gradient, found {most}" if most >= _LARGEST else ""


class LowRankGradientPlan(Plan):
    """d_up = scale g^T t and d_down = scale t_g^T x; see :class:`LowRankGradientDescriptor`."""

    name = "low-rank gradient"
    skus = (
        streamed_sku(_mma_refuses, functools.partial(_guarantee, MathPrecision.BF16_TENSOR_CORE), _suits_streamed),
        Sku(
            name="mma",
            backend=BackendKind.MMA,
            arch=ArchSku.SM80,
            refuses=_mma_refuses,
            guarantee=lambda d: _guarantee(MathPrecision.BF16_TENSOR_CORE, d),
            build=_MmaProgram,
            workspace=lambda d: 0 if _empty(d) else partial_bytes(_partials(d)),
            alignment=16,
        ),
        Sku(
            name="portable",
            backend=BackendKind.PORTABLE,
            arch=ArchSku.ANY,
            refuses=_portable_refuses,
            guarantee=lambda d: _guarantee(MathPrecision.F32, d),
            build=_PortableProgram,
        ),
    )
