"""Optimiser steps over many tensors in one launch.

For example:

    descriptor = UpdateDescriptor(Rule.ADAMW, ElementKind.BF16, True, False, counts=(4096, 77), groups=(0, 1))
    plan = UpdatePlan.select(stream, descriptor)
    table = plan.descriptor.table(members)               # uploaded by the caller, as block_table(counts) is
    plan.run(stream, None, UpdateArgs(members, table, blocks, numbers, scale, origin))
"""

from __future__ import annotations

import enum
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from kernels import optimizer as kernel
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
from plans.expression import Expr, apply, leaf

F32, I32, I64 = ElementKind.F32, ElementKind.I32, ElementKind.I64
_FLOATS = (ElementKind.BF16, ElementKind.F16, F32)
_VECTOR_BYTES = 16
_MOST_TENSORS = 1 << 20
GRADIENT_COLUMN = 1
"""Where a row of `UpdateDescriptor.table` has the gradient's address: all that changes from step to step."""


class Numbers(NamedTuple):
    """A group's numbers, in the kernel's order; corrections are 1 / (1 - beta1^t) and 1 / sqrt(1 - beta2^t)."""

    rate: float
    beta1: float
    beta2: float = 0.0
    eps: float = 0.0
    decay: float = 0.0
    correction1: float = 1.0
    correction2: float = 1.0
    nesterov: float = 0.0


_P, _G, _M, _V, *_GROUP = map(leaf, range(4 + len(Numbers._fields)))
_N = Numbers(*_GROUP)


def _sgd() -> tuple[Expr, Expr, Expr]:
    """SGD with momentum as PyTorch has it: m = mu m + g; p -= rate (m, or g + mu m), weight decay in the gradient."""
    g = _G + _N.decay * _P
    m = _N.beta1 * _M + g
    step = apply("where", _N.nesterov, g + _N.beta1 * m, m)
    return _P - _N.rate * step, m, _V


def _adam(decoupled: bool) -> tuple[Expr, Expr, Expr]:
    g = _G if decoupled else _G + _N.decay * _P
    m = _N.beta1 * _M + (1.0 - _N.beta1) * g
    v = _N.beta2 * _V + (1.0 - _N.beta2) * g**2
    # Dividing exactly takes more instructions than all else together.
    step = m * _N.correction1 * (v.root() * _N.correction2 + _N.eps).reciprocal()
    p = _P - _N.rate * _N.decay * _P if decoupled else _P
    return p - _N.rate * step, m, v


class Rule(enum.Enum):
    """How a step is made; the value is (new parameter, first moment, second moment) and how many moments are kept.

    SGD with momentum and Nesterov's; ADAM, arXiv:1412.6980, with weight decay in the gradient; ADAMW, arXiv:1711.05101,
    with weight decay in the step.
    """

    SGD = (_sgd(), 1)
    ADAM = (_adam(False), 2)
    ADAMW = (_adam(True), 2)

    @property
    def expressions(self) -> tuple[Expr, Expr, Expr]:
        """The new parameter and moments."""
        return self.value[0]

    @property
    def moments(self) -> int:
        """How many moments are kept."""
        return self.value[1]


_SCALE = leaf(4 + len(Numbers._fields))


def program(rule: Rule) -> tuple:
    """A step in plain data: of the parameter, the scaled gradient, the moments that are kept, a group's numbers."""
    given = [_P, _G, *(_M, _V)[: rule.moments], *_N, _SCALE]
    made = [expression.substitute(expr, {_G: _G * _SCALE}) for expr in rule.expressions[: 1 + rule.moments]]
    return expression.lower(made, given)


@functools.lru_cache(256)
def block_table(counts: tuple[int, ...]) -> np.ndarray:
    """[blocks, 2]: each block's tensor and which piece of it; int32."""
    pieces = [-(-count // kernel.PIECE) for count in counts]
    tensors = np.repeat(np.arange(len(counts)), pieces)
    within = np.concatenate([np.arange(n) for n in pieces]) if counts else np.zeros(0)
    return np.stack([tensors, within], 1).astype(np.int32)


def block_count(counts: Sequence[int]) -> int:
    """How many blocks `block_table` has."""
    return sum(-(-count // kernel.PIECE) for count in counts)


class Member(NamedTuple):
    """The tensors of one parameter, all flat; the fp32 copy and the second moment where there is one."""

    parameter: TensorMut
    gradient: TensorRef
    first: TensorMut
    second: TensorMut | None = None
    master: TensorMut | None = None


@dataclass(frozen=True)
class UpdateDescriptor:
    """One step of tensors with ``counts`` elements, each in one of ``groups`` of numbers.

    Parameters have ``kind``; with ``master`` an fp32 copy is stepped, and the parameter is its rounding; ``stochastic``
    rounds a bf16 parameter without a copy up or down at random, by seed, step and element. Gradients and moments are
    fp32. Raises InvalidProblem for a copy of an fp32 parameter, and for stochastic rounding of other kinds or copies.
    """

    rule: Rule
    kind: ElementKind
    master: bool
    stochastic: bool
    counts: tuple[int, ...]
    groups: tuple[int, ...]

    category = OpCategory.OPTIMIZER

    def __post_init__(self) -> None:
        if len(self.counts) != len(self.groups) or min((*self.counts, *self.groups), default=0) < 0:
            raise InvalidProblem(
                f"update: {len(self.counts)} counts, {len(self.groups)} groups, wanted equal, none < 0; "
                "give both for each parameter"
            )
        if self.master and self.kind is F32:
            raise InvalidProblem("update: an fp32 copy of fp32 parameters; leave master out")
        if self.stochastic and (self.master or self.kind is not ElementKind.BF16):
            raise InvalidProblem(
                f"update: stochastic rounding to {self.kind.value}, wanted bf16 without an fp32 copy; "
                "leave stochastic out"
            )

    def operands(self) -> tuple[Operand, ...]:
        """Each tensor's ``parameter``, ``gradient`` and so on, then the tables, ``groups``, ``scale``, ``origin``."""
        return self._operands

    @functools.cached_property
    def _operands(self) -> tuple[Operand, ...]:
        rows = []
        for i, count in enumerate(self.counts):
            rows += [
                Operand(f"parameter {i}", self.kind, (count,), writes=True, alignment=_VECTOR_BYTES),
                Operand(f"gradient {i}", F32, (count,), alignment=_VECTOR_BYTES),
                Operand(f"first moment {i}", F32, (count,), writes=True, alignment=_VECTOR_BYTES),
            ]
            extra = ("second moment",) * (self.rule.moments == 2) + ("fp32 copy",) * self.master
            rows += [Operand(f"{n} {i}", F32, (count,), writes=True, alignment=_VECTOR_BYTES) for n in extra]
        rows.append(Operand("table", I64, (len(self.counts), kernel.COLUMNS)))
        rows.append(Operand("blocks", I32, (block_count(self.counts), 2)))
        rows.append(Operand("groups", F32, (max(self.groups, default=-1) + 1, kernel.NUMBERS)))
        rows.append(Operand("scale", F32, ()))
        rows.append(Operand("origin", I64, (2,)))
        return tuple(rows)

    def table(self, members: Sequence[Member]) -> np.ndarray:
        """The members' addresses, counts and groups as the kernel reads them; int64."""
        rows = np.zeros((len(members), kernel.COLUMNS), np.int64)
        for i, (member, count, group) in enumerate(zip(members, self.counts, self.groups, strict=True)):
            order = (member.parameter, member.gradient, member.master, member.first, member.second)
            rows[i, :5] = [0 if tensor is None else tensor.address for tensor in order]
            rows[i, 5] = (count << kernel.GROUP_BITS) + group
        return rows

    def reference(
        self, p: np.ndarray, g: np.ndarray, m: np.ndarray, v: np.ndarray, numbers: Numbers, scale: float = 1.0
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """New parameter (or fp32 copy) and moments in float64 and their magnitudes, for one tensor."""
        rounded = [np.float64(np.float32(x)) for x in numbers]
        arrays = [np.asarray(x, np.float64) for x in (p, g, m, v)]
        factor = np.float64(np.float32(scale))
        errors = [np.float64(0)] * (4 + len(rounded))
        if factor != 1:
            arrays[1] = arrays[1] * factor
            errors[1] = np.abs(arrays[1])
        found = expression.evaluate(self.rule.expressions, [*arrays, *rounded], errors)
        return [tuple(np.broadcast_to(part, arrays[0].shape) for part in pair) for pair in found]


class UpdateArgs(Arguments):
    """The members, the tables, the groups' numbers [groups, 8] and the gradients' scale, all on the device.

    Nothing happens unless the scale is finite. ``origin`` [seed, step] chooses the random bits of stochastic rounding.
    """

    def __init__(
        self, members: Sequence[Member], table: TensorRef, blocks: TensorRef, groups: TensorRef, scale: TensorRef,
        origin: TensorRef,
    ) -> None:  # fmt: skip
        super().__init__()
        self.members = list(members)
        self.table, self.blocks, self.groups, self.scale, self.origin = table, blocks, groups, scale, origin

    def tensors(self) -> list[TensorRef]:
        """The members' tensors, then tables and numbers."""
        rows = [[m.parameter, m.gradient, m.first, m.second, m.master] for m in self.members]
        numbers = (self.table, self.blocks, self.groups, self.scale, self.origin)
        return [*(t for row in rows for t in row if t is not None), *numbers]


def refuses(d: Any) -> str:
    """Why tensors of a descriptor's kind and counts cannot be taken, or nothing."""
    if getattr(d, "kind", F32) not in _FLOATS:
        return f"takes {', '.join(k.value for k in _FLOATS)}, not {d.kind.value}"
    if len(d.counts) >= _MOST_TENSORS or max(getattr(d, "groups", ()), default=0) >= 1 << kernel.GROUP_BITS:
        return f"takes fewer than {_MOST_TENSORS} tensors and 2**16 groups"
    return "" if block_count(d.counts) < 2**31 else f"takes fewer than 2**31 pieces of {kernel.PIECE} elements"


class _UpdateProgram:
    """One launch, a block a piece of a tensor."""

    def __init__(self, d: UpdateDescriptor, device: Device) -> None:
        blocks, self.launch = block_count(d.counts), None
        if blocks:
            early = begins_early(device)
            made = kernel.update(program(d.rule), d.rule.moments, d.kind.value, d.master, d.stochastic, early)
            self.launch = made.launcher((blocks, 1, 1))

    def bind(self, args: UpdateArgs, workspace: Workspace) -> list[tuple[Callable, tuple]]:
        """The launch; none where there is no element."""
        data = [tensor.data for tensor in (args.table, args.blocks, args.groups, args.scale, args.origin)]
        return [] if self.launch is None else [(self.launch, tuple(data))]


def one_launch(build: type, units: float, derivation: str, workspace: Callable = lambda d: 0) -> Sku:
    """The one SKU of a plan over tables of tensors."""
    guarantee = PrecisionGuarantee(
        math_precision=MathPrecision.F32,
        accumulator=ElementKind.F32,
        deterministic=True,
        bit_stable_on_same_hardware=True,
        rounding_units=units,
        derivation=derivation,
    )
    return Sku(
        name="one launch",
        backend=BackendKind.VECTOR,
        arch=ArchSku.ANY,
        refuses=refuses,
        guarantee=lambda d: guarantee,
        build=build,
        workspace=workspace,
    )


class UpdatePlan(Plan):
    """One step of an optimiser; see :class:`UpdateDescriptor`."""

    name = "update"
    skus = (
        one_launch(_UpdateProgram, 1.25, "the rule's own errors carried through its derivatives (expression.evaluate)"),
    )
