"""Reductions over the middle axis of [outer, n, inner]: sum, maximum or minimum of an expression, times a factor.

For example, the mean of (x - y)^2 over everything, and the sums of columns:

    mse = ReductionDescriptor(Reduction.SUM, (x - y) ** 2, 1, count, 1, (BF16, BF16), F32, scale=1 / count)
    columns = ReductionDescriptor(Reduction.SUM, x, 1, 4096, 3072, (BF16,), F32)
    plan = ReductionPlan.select(stream, mse)
    plan.run(stream, workspace, ReductionArgs(out, [a, b]))

Two runs give the same bits: every sum has one order, that of the descriptor.
"""

from __future__ import annotations

import enum
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from kernels import reduction as kernel
from kernels.hardware import WARP
from kernels.rows import Shape, block_of
from plans import expression
from plans.core import (
    ArchSku,
    BackendKind,
    Device,
    ElementKind,
    InvalidProblem,
    MathPrecision,
    OpCategory,
    Operand,
    Plan,
    PrecisionGuarantee,
    Sku,
    TensorMut,
    TensorRef,
    Workspace,
)
from plans.core.plan import Arguments
from plans.core.sku import begins_early
from plans.expression import Expr, leaf
from plans.rows import KINDS, Symbols, symbols

_EXTENTS = 2**31
_PARTS = 65535
_LEAST_PART = 2048
"""Elements of a row, and rows times 8, below which an axis is not split further."""
_F32 = ElementKind.F32


class Reduction(enum.Enum):
    """How values are joined; the value is the kernels' name. An empty sum is 0, an empty extremum infinite."""

    SUM = "sum"
    MAX = "max"
    MIN = "min"


def elements(count: int, lines: int = 0) -> Symbols:
    """The leaves of a reduction's expression: its operands' elements, the position, operands by line, 1 / n."""
    return symbols(full=count, row=lines)


@dataclass(frozen=True)
class ReductionDescriptor:
    """out[o, i] = scale * reduction over j of value(sources[o, j, i], j, lines[o, j], 1 / n).

    ``kinds`` are those of the sources [outer, n, inner], ``lines`` of operands [outer, n] that come after them. The
    leaves of ``value`` are those of :func:`elements`. ``aligned``: every source lies at a multiple of 16 bytes.
    """

    reduction: Reduction
    value: Expr
    outer: int
    n: int
    inner: int
    kinds: tuple[ElementKind, ...]
    out: ElementKind
    lines: tuple[ElementKind, ...] = ()
    scale: float = 1.0
    aligned: bool = True

    category = OpCategory.REDUCTION

    def __post_init__(self) -> None:
        if min(self.outer, self.n, self.inner) < 0:
            raise InvalidProblem(
                f"reduction: extents {self.shape}, wanted none of them negative; give the tensor's own"
            )
        if not self.kinds or any(k >= self._leaves for k in expression.leaves([self.value])):
            raise InvalidProblem(
                f"reduction: {self.value} over {len(self.kinds)} sources reads others, or there are none; "
                "give one for each leaf"
            )

    @property
    def shape(self) -> tuple[int, int, int]:
        """The sources' shape."""
        return (self.outer, self.n, self.inner)

    @property
    def _leaves(self) -> int:
        return len(self.kinds) + len(self.lines) + 2

    def operands(self) -> tuple[Operand, ...]:
        """``out``, ``x0``, ... and ``line0``, ..."""
        return (
            Operand("out", self.out, (self.outer, self.inner), writes=True),
            *(Operand(f"x{k}", kind, self.shape) for k, kind in enumerate(self.kinds)),
            *(Operand(f"line{k}", kind, (self.outer, self.n)) for k, kind in enumerate(self.lines)),
        )

    @functools.cached_property
    def program(self) -> tuple:
        """The value in plain data; along a row, operands by line are elements like others."""
        leaves = [leaf(i) for i in range(self._leaves)]
        if self.inner == 1 and self.lines:
            sources = len(self.kinds)
            leaves = [*leaves[:sources], *leaves[sources + 1 : -1], leaves[sources], leaves[-1]]
        return expression.lower([self.value], leaves)

    @property
    def width(self) -> int:
        """Elements of an access."""
        last = self.n if self.inner == 1 else self.inner
        kinds = (*self.kinds, *self.lines) if self.inner == 1 else self.kinds
        return 8 if self.aligned and last % 8 == 0 and all(kind in KINDS for kind in kinds) else 1

    @functools.cached_property
    def part(self) -> int:
        """Elements, or rows, of a part of the axis: so many that there are enough blocks, but not of nothing."""
        if self.inner == 1:
            blocks = -(-self.outer // block_of(self.team)[1])
            least, room = _LEAST_PART, kernel.BLOCKS_ALONG
        else:
            blocks = self.outer * -(-self.inner // (WARP * self.width))
            least = max(1, _LEAST_PART // (WARP * self.width)) * (kernel.THREADS // WARP)
            room = kernel.BLOCKS_ACROSS
        wanted = max(1, room // max(1, blocks))
        part = max(least, -(-self.n // wanted), -(-self.n // _PARTS))
        return -(-part // 8) * 8

    @property
    def parts(self) -> int:
        """How many parts the axis has."""
        return max(1, -(-self.n // self.part))

    @property
    def team(self) -> int:
        """Threads that walk along a row."""
        wanted = -(-min(self.n, 16 * _LEAST_PART) // (8 * self.width))
        return min(256, 1 << max(0, wanted - 1).bit_length())

    @property
    def second_team(self) -> int:
        """Threads that walk along the parts of a row."""
        return min(256, max(WARP, 1 << (-(-self.parts // 4) - 1).bit_length()))

    @property
    def chain(self) -> int:
        """The longest chain of additions that an element goes through."""
        if self.inner == 1:
            own = -(-self.part // (self.team * self.width)) * self.width + 10
            return own + -(-self.parts // self.second_team) + 10
        warps = kernel.THREADS // WARP
        return -(-self.part // warps) + -(-self.parts // warps) + 2 * warps

    def reference(self, *tensors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The result in float64 and its magnitude: values' errors, and the chain times the sum of |values|."""
        count = len(self.kinds)
        sources = [np.asarray(t, np.float64).reshape(self.shape) for t in tensors[:count]]
        lines = [np.asarray(t, np.float64).reshape(self.outer, self.n, 1) for t in tensors[count:]]
        inverse = 1 / self.n if self.n else 0.0
        arguments = [*sources, np.arange(self.n)[:, None], *lines, np.float64(inverse)]
        errors = [np.float64(0)] * (len(arguments) - 1) + [np.float64(expression.rounding(inverse))]
        value, error = (np.broadcast_to(p, self.shape) for p in expression.evaluate([self.value], arguments, errors)[0])
        scale = np.float64(self.scale)
        if self.reduction is Reduction.SUM:
            exact, magnitude = value.sum(1), error.sum(1) + self.chain * np.abs(value).sum(1)
        elif self.reduction is Reduction.MAX:
            exact, magnitude = value.max(1, initial=-np.inf), error.max(1, initial=0)
        else:
            exact, magnitude = value.min(1, initial=np.inf), error.max(1, initial=0)
        own = (scale != 1) + expression.rounding(self.scale) / (np.abs(scale) or 1)
        return exact * scale, np.abs(scale) * magnitude + np.abs(exact * scale) * own


class ReductionArgs(Arguments):
    """The result, the sources and the operands by line."""

    def __init__(self, out: TensorMut, sources: Sequence[TensorRef]) -> None:
        super().__init__()
        self.out, self.sources = out, list(sources)

    def tensors(self) -> list[TensorRef]:
        """The result, then sources."""
        return [self.out, *self.sources]


def _refuses(d: ReductionDescriptor) -> str:
    for kind in (*d.kinds, *d.lines, d.out):
        if kind not in KINDS:
            return f"computes on {', '.join(k.value for k in KINDS)}, not {kind.value}"
    blocks = d.outer if d.inner == 1 else d.outer * -(-d.inner // WARP)
    if max(d.n + _LEAST_PART, blocks, d.inner) >= _EXTENTS:
        return "takes fewer than 2**31 elements of an axis, and blocks"
    return ""


_ITSELF = expression.lower([leaf(0)], [leaf(0), leaf(1), leaf(2)])


class _Program:
    """One launch over the parts, and where there are several, one over them."""

    def __init__(self, d: ReductionDescriptor, device: Device) -> None:
        self.first = self.second = None
        if not d.outer * d.inner:
            return
        last = np.float32(d.scale)
        target = d.out if d.parts == 1 else _F32
        inverse = np.float32(1 / d.n if d.n else 0)
        launches, early = _along if d.inner == 1 else _across, begins_early(device)
        scale = last if d.parts == 1 else np.float32(1)
        self.first = launches(d, target, inverse, scale, early)
        self.partial = d.parts > 1
        if not self.partial:
            return
        name, out, columns = d.reduction.value, d.out.value, d.outer * d.inner
        if d.inner == 1:
            made = kernel.along(name, _ITSELF, ("f32",), out, Shape(d.second_team, 1, 0), early)
            grid = (-(-d.outer // block_of(d.second_team)[1]), 1, 1)
            self.second = made.launcher(grid), (inverse, last, d.outer, d.parts, d.parts, 1)
        else:
            width = 8 if columns % 8 == 0 else 1
            made = kernel.across(name, _ITSELF, ("f32",), (), out, width, early)
            grid = (-(-columns // (WARP * width)), 1, 1)
            self.second = made.launcher(grid), (inverse, last, 1, d.parts, columns, d.parts)

    def bind(self, args: ReductionArgs, workspace: Workspace) -> list[tuple[Callable, tuple]]:
        """The launches; none where there is no result."""
        if self.first is None:
            return []
        sources = [tensor.data for tensor in args.sources]
        launch, rest = self.first
        if not self.partial:
            return [(launch, (*sources, args.out.data, *rest))]
        between = workspace.buffer.pointer(np.float32)
        launch2, rest2 = self.second
        return [(launch, (*sources, between, *rest)), (launch2, (between, args.out.data, *rest2))]


def _along(d: ReductionDescriptor, target: ElementKind, inverse: np.float32, scale: np.float32, early: bool) -> tuple:
    kinds = tuple(kind.value for kind in (*d.kinds, *d.lines))
    made = kernel.along(d.reduction.value, d.program, kinds, target.value, Shape(d.team, d.width, 0), early)
    grid = (-(-d.outer // block_of(d.team)[1]), d.parts, 1)
    return made.launcher(grid), (inverse, scale, d.outer, d.n, d.part, d.parts)


def _across(d: ReductionDescriptor, target: ElementKind, inverse: np.float32, scale: np.float32, early: bool) -> tuple:
    kinds, lines = (tuple(kind.value for kind in group) for group in (d.kinds, d.lines))
    made = kernel.across(d.reduction.value, d.program, kinds, lines, target.value, d.width, early)
    grid = (d.outer * -(-d.inner // (WARP * d.width)), d.parts, 1)
    return made.launcher(grid), (inverse, scale, d.outer, d.n, d.inner, d.part)


_SUMMED = PrecisionGuarantee(
    math_precision=MathPrecision.F32,
    accumulator=ElementKind.F32,
    deterministic=True,
    bit_stable_on_same_hardware=True,
    rounding_units=1.25,
    derivation="one rounding an addition along the longest chain, and the values' own errors "
    "(ReductionDescriptor.reference); a quarter more for what is of second order",
)


def _workspace(d: ReductionDescriptor) -> int:
    return 4 * d.parts * d.outer * d.inner if d.parts > 1 else 0


class ReductionPlan(Plan):
    """A reduction over the middle axis; see :class:`ReductionDescriptor`."""

    name = "reduction"
    skus = (
        Sku(
            name="portable",
            backend=BackendKind.PORTABLE,
            arch=ArchSku.ANY,
            refuses=_refuses,
            guarantee=lambda descriptor: _SUMMED,
            build=_Program,
            workspace=_workspace,
        ),
    )


def split_axes(shape: Sequence[int], axes: Sequence[int]) -> list[tuple[int, int, int]]:
    """[outer, n, inner] of reductions that together reduce ``axes`` of a contiguous tensor, the innermost axes first.

    Neighbouring axes are one, and so are axes of extent 1; what is left is the kept extents in order.
    """
    groups: list[list] = []
    for axis, extent in enumerate(shape):
        reduced = axis in axes
        if groups and (groups[-1][1] == reduced or extent == 1):
            groups[-1][0] *= extent
        else:
            groups.append([extent, reduced])
    found = []
    while reduced := [k for k, group in enumerate(groups) if group[1]]:
        k = reduced[-1]
        before, after = groups[:k], groups[k + 1 :]
        found.append((math.prod(g[0] for g in before), groups[k][0], math.prod(g[0] for g in after)))
        groups = before + after
    return found
