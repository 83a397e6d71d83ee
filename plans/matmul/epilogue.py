"""Epilogues of a product as data: what each step is called, which operands it takes, what it computes in float64.

    (Bias(BF16), Activation("gelu"), Residual(BF16))      # gelu(A B^T + bias) + beta * C
    (Gate("silu"),)                                       # SwiGLU: silu(first half) * second half of the columns

Steps run in order, in fp32, before the one rounding. A step's kernel name is what ``kernels.matmul.epilogue`` compiles.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from kernels.matmul.epilogue import ACTIVATIONS
from plans.core.errors import InvalidProblem
from plans.core.operand import Operand
from plans.core.precision import ElementKind

EPILOGUE_KINDS = (ElementKind.BF16, ElementKind.F16, ElementKind.F32)


class Extents(NamedTuple):
    """What a step sees: the result's rows, the columns at that step, and the batch (None: two axes)."""

    rows: int
    columns: int
    batch: int | None

    def shape(self, *axes: int, batched: bool = True) -> tuple[int, ...]:
        """Axes, after the batch's where there is one."""
        return axes if self.batch is None or not batched else (self.batch, *axes)


class Values(NamedTuple):
    """Float64 values on their way through the steps, and the magnitude that errors are relative to."""

    exact: np.ndarray
    magnitude: np.ndarray


@dataclass(frozen=True)
class _Function:
    """An activation in float64, a bound on its slope, and its evaluation's error in units of 2**-24 |x|."""

    exact: Callable[[np.ndarray], np.ndarray]
    slope: float
    units: float


def _gelu(x: np.ndarray) -> np.ndarray:
    return x / 2 * (1 + np.vectorize(math.erf, otypes=[np.float64])(x / math.sqrt(2)))


def _gelu_tanh(x: np.ndarray) -> np.ndarray:
    return x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _silu(x: np.ndarray) -> np.ndarray:
    e = np.exp(-np.abs(x))
    return x * np.where(x >= 0, 1, e) / (1 + e)


# Units of |x|: erf 4, sigmoid 7 (exp2 4, its argument's rounding at most 1 by the value's own size, reciprocal 2), the
# roundings of a polynomial in x times the slope of what it enters, one for each other operation.
FUNCTIONS: dict[str, _Function] = {
    "relu": _Function(lambda x: np.maximum(x, 0), 1.0, 0.0),
    "gelu": _Function(_gelu, 1.13, 12.0),
    "gelu_tanh": _Function(_gelu_tanh, 1.13, 14.0),
    "silu": _Function(_silu, 1.1, 10.0),
}
assert FUNCTIONS.keys() == ACTIVATIONS.keys()


def _known(function: str) -> None:
    if function not in FUNCTIONS:
        raise InvalidProblem(
            f"matmul: activation {function!r}, wanted one of {', '.join(FUNCTIONS)}; apply others to the result"
        )


def _floating(name: str, kind: ElementKind) -> None:
    if kind not in EPILOGUE_KINDS:
        raise InvalidProblem(
            f"matmul: {name} of {kind.value}, wanted one of {', '.join(k.value for k in EPILOGUE_KINDS)}; cast it first"
        )


class Step:
    """One step: its kernel name, its operand if it has one, and what it computes.

    ``units(before)`` is the error after the step in units of 2**-24 of the magnitude that ``apply`` gives.
    """

    takes_number = False
    gates = False

    @property
    def kernel(self) -> tuple:
        """The step as ``kernels.matmul.epilogue`` names it."""
        raise TypeError("Step is abstract")

    def operand(self, name: str, extents: Extents) -> Operand | None:
        """The tensor that the step reads, if any; ``name`` makes its name unique."""
        return None

    def apply(self, values: Values, operand: np.ndarray | None, number: float) -> Values:
        """The step in float64."""
        raise TypeError("Step is abstract")

    def units(self, before: float) -> float:
        """The error after the step, in units."""
        raise TypeError("Step is abstract")

    def parameters(self, data: Any, operand: Operand | None, number: float) -> tuple:
        """The step's kernel parameters, in the order of ``kernels.matmul.epilogue``."""
        return ()


def _batch_stride(operand: Operand, axes: int) -> int:
    return operand.strides[0] if len(operand.shape) > axes else 0


@dataclass(frozen=True)
class _Vector(Step):
    """A step with one number a row or column; ``per_batch``: each matrix of a batch has its own."""

    element: ElementKind = ElementKind.BF16
    per_batch: bool = False

    name = ""
    by_row = False

    def __post_init__(self) -> None:
        _floating(self.name, self.element)

    @property
    def kernel(self) -> tuple:
        """The step's name and its operand's kind."""
        return (self.name, self.element.value)

    def operand(self, name: str, extents: Extents) -> Operand:
        """One number a row or column."""
        count = extents.rows if self.by_row else extents.columns
        return Operand(name, self.element, extents.shape(count, batched=self.per_batch))

    def aligned(self, array: np.ndarray) -> np.ndarray:
        """The operand as a factor or term of [.., rows, columns]."""
        return (
            np.asarray(array, np.float64)[..., :, None] if self.by_row else np.asarray(array, np.float64)[..., None, :]
        )

    def parameters(self, data: Any, operand: Operand | None, number: float) -> tuple:
        """Pointer and batch stride."""
        return (data, _batch_stride(operand, 1))


@dataclass(frozen=True)
class Bias(_Vector):
    """v + bias[column]."""

    name = "bias"

    def apply(self, values: Values, operand: np.ndarray | None, number: float) -> Values:
        """Values and magnitude grow by the bias."""
        bias = self.aligned(operand)
        return Values(values.exact + bias, values.magnitude + np.abs(bias))

    def units(self, before: float) -> float:
        """One addition."""
        return before + 1


@dataclass(frozen=True)
class ColumnScale(_Vector):
    """v * scale[column]."""

    name = "scale_column"

    def apply(self, values: Values, operand: np.ndarray | None, number: float) -> Values:
        """Values and magnitude are scaled."""
        scale = self.aligned(operand)
        return Values(values.exact * scale, values.magnitude * np.abs(scale))

    def units(self, before: float) -> float:
        """One multiplication."""
        return before + 1


@dataclass(frozen=True)
class RowScale(ColumnScale):
    """v * scale[row]."""

    name = "scale_row"
    by_row = True


@dataclass(frozen=True)
class Residual(Step):
    """v + beta * C[row, column]; beta is an argument. ``stride`` is C's row stride, 0 where it is contiguous.

    C may be the result's own memory, where both have the same kind and stride.
    """

    element: ElementKind = ElementKind.BF16
    stride: int = 0

    takes_number = True

    def __post_init__(self) -> None:
        _floating("residual", self.element)

    @property
    def kernel(self) -> tuple:
        """The step's name and its operand's kind."""
        return ("residual", self.element.value)

    def operand(self, name: str, extents: Extents) -> Operand:
        """A matrix like the result."""
        shape = extents.shape(extents.rows, extents.columns)
        return Operand(name, self.element, shape, layout=matrix_strides(name, shape, self.stride, 0))

    def apply(self, values: Values, operand: np.ndarray | None, number: float) -> Values:
        """Values and magnitude grow by the scaled matrix."""
        term = number * np.asarray(operand, np.float64)
        return Values(values.exact + term, values.magnitude + np.abs(term))

    def units(self, before: float) -> float:
        """Beta's rounding, a product and an addition."""
        return before + 3

    def parameters(self, data: Any, operand: Operand | None, number: float) -> tuple:
        """Pointer, row stride, batch stride and beta."""
        return (data, operand.strides[-2], _batch_stride(operand, 2), np.float32(number))


@dataclass(frozen=True)
class Activation(Step):
    """f(v) for f of ``relu``, ``gelu`` (erf), ``gelu_tanh`` and ``silu``."""

    function: str

    def __post_init__(self) -> None:
        _known(self.function)

    @property
    def kernel(self) -> tuple:
        """The function's name."""
        return (self.function,)

    def apply(self, values: Values, operand: np.ndarray | None, number: float) -> Values:
        """The magnitude grows by the slope."""
        function = FUNCTIONS[self.function]
        return Values(function.exact(values.exact), values.magnitude * function.slope)

    def units(self, before: float) -> float:
        """The evaluation's own error; the slope is in the magnitude."""
        return before + FUNCTIONS[self.function].units


@dataclass(frozen=True)
class Gate(Step):
    """f(gate) * up: SwiGLU with ``silu``, GeGLU with ``gelu``. At most one in an epilogue; it halves the columns.

    Of n columns, the first n / 2 are the gates and the last n / 2 the values where ``gate_first``, else the other way
    round (diffusers' GEGLU): B is the two weights one below the other.
    """

    function: str
    gate_first: bool = True

    gates = True

    def __post_init__(self) -> None:
        _known(self.function)

    @property
    def kernel(self) -> tuple:
        """Name, function and order."""
        return ("gate", self.function, self.gate_first)

    def apply(self, values: Values, operand: np.ndarray | None, number: float) -> Values:
        """Half the columns."""
        half = values.exact.shape[-1] // 2
        sides = slice(0, half), slice(half, None)
        gate, up = sides if self.gate_first else sides[::-1]
        function = FUNCTIONS[self.function]
        return Values(
            function.exact(values.exact[..., gate]) * values.exact[..., up],
            function.slope * values.magnitude[..., gate] * values.magnitude[..., up],
        )

    def units(self, before: float) -> float:
        """Both factors' errors, the product of the two, and one multiplication."""
        gate = before + FUNCTIONS[self.function].units
        return gate + before + gate * before * 2.0**-24 + 1


Epilogue = tuple[Step, ...]


def matrix_strides(name: str, shape: tuple[int, ...], row_stride: int, batch_stride: int) -> tuple[int, ...]:
    """Strides of [rows, columns] or [batch, rows, columns]; 0 means contiguous. Refused where rows would overlap."""
    rows, columns = shape[-2:]
    if row_stride and row_stride < columns:
        raise InvalidProblem(
            f"matmul: {name} has row stride {row_stride}, wanted at least its {columns} columns; "
            "give 0 where it is contiguous"
        )
    row = row_stride or columns
    if len(shape) == 2:
        return (row, 1)
    return (batch_stride or rows * row, row, 1)


def check_epilogue(steps: Epilogue, columns: int) -> None:
    """Refuse what is no epilogue for a product of so many columns."""
    for step in steps:
        if not isinstance(step, Step):
            raise InvalidProblem(
                f"matmul: epilogue step {step!r}, wanted steps of plans.matmul (Bias, Activation, ...); wrap it in one"
            )
    gates = sum(step.gates for step in steps)
    if gates > 1:
        raise InvalidProblem(
            f"matmul: {gates} gates in the epilogue, wanted at most one; gate the result by a pass of its own"
        )
    if gates and columns % 2:
        raise InvalidProblem(
            f"matmul: a gate of {columns} columns, wanted an even number: gates and values in halves; give both"
        )


def step_operands(steps: Epilogue, extents: Extents) -> list[Operand | None]:
    """Each step's operand, named after the step; a number follows where a name comes again."""
    found: list[Operand | None] = []
    seen: dict[str, int] = {}
    for step in steps:
        if step.gates:
            extents = extents._replace(columns=extents.columns // 2)
        name = type(step).__name__.lower().replace("scale", "_scale")
        operand = step.operand(name if not seen.get(name) else f"{name}{seen[name]}", extents)
        seen[name] = seen.get(name, 0) + 1
        found.append(operand)
    return found


def apply_steps(
    steps: Epilogue, values: Values, operands: Sequence[np.ndarray | None], numbers: Sequence[float]
) -> Values:
    """All steps in float64."""
    for step, operand, number in zip(steps, operands, numbers, strict=True):
        values = step.apply(values, operand, number)
    return values


def units_after(steps: Epilogue, units: float) -> float:
    """The error after all steps of a product with an error of ``units``."""
    for step in steps:
        units = step.units(units)
    return units
