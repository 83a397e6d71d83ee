"""What a convolution computes, in one to three axes, channels last; and its gradients.

    geometry = Convolution(2, (64, 64), 640, 640, (3, 3), padding=(1, 1))
    Conv2dDescriptor(geometry, epilogue=(Bias(), Activation("silu")))

Activations are channels last; a weight's layout is the geometry's, see ``plans.convolution.geometry``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from plans.convolution.geometry import Convolution
from plans.core.errors import InvalidProblem
from plans.core.operand import Operand
from plans.core.plan import Arguments
from plans.core.precision import ElementKind
from plans.core.sku import OpCategory
from plans.core.tensor import TensorMut, TensorRef
from plans.matmul.epilogue import (
    EPILOGUE_KINDS,
    Epilogue,
    Extents,
    Residual,
    Values,
    apply_steps,
    check_epilogue,
    step_operands,
)

BF16 = ElementKind.BF16


def _by_groups(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Of a [..., groups, k] and b [groups, k, n]: [..., groups, n], by matmul; einsum's own loops take minutes."""
    *axes, groups, k = a.shape
    rows = np.moveaxis(a, -2, 0).reshape(groups, math.prod(axes), k)
    return np.moveaxis((rows @ b).reshape(groups, *axes, b.shape[2]), 0, -2)


@dataclass(frozen=True)
class _Problem:
    """What the three problems share."""

    geometry: Convolution
    x: ElementKind = BF16
    weight: ElementKind = BF16
    out: ElementKind = BF16
    epilogue: Epilogue = ()

    category = OpCategory.CONVOLUTION

    def __post_init__(self) -> None:
        check_epilogue(self.epilogue, self.geometry.out_channels)
        if any(step.gates for step in self.epilogue):
            raise InvalidProblem(
                "convolution: a gate in the epilogue, wanted none: it takes a product; "
                "gate the result by a pass of its own"
            )
        for operand in self.operands():
            if operand.element not in EPILOGUE_KINDS:
                wanted = ", ".join(kind.value for kind in EPILOGUE_KINDS)
                raise InvalidProblem(
                    f"convolution: {operand.name} of {operand.element.value}, wanted one of {wanted}; cast it first"
                )

    @property
    def epilogue_name(self) -> str:
        """The steps' names, for the SKU."""
        return "+".join("_".join(map(str, step.kernel)) for step in self.epilogue)

    @property
    def layout_name(self) -> str:
        """The weight's layout, for the SKU."""
        return self.geometry.weight_layout.lower()

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns of the result as the epilogue sees it."""
        raise TypeError("_Problem is abstract")

    @functools.cached_property
    def step_operands(self) -> tuple[Operand | None, ...]:
        """Each step's operand; a residual has the result's shape."""
        found = step_operands(self.epilogue, Extents(*self.matrix, None))
        shape = self._tensors()[0].shape
        return tuple(
            replace(operand, shape=shape, layout=None)
            if operand is not None and isinstance(step, Residual)
            else operand
            for step, operand in zip(self.epilogue, found, strict=True)
        )

    def _tensors(self) -> tuple[Operand, ...]:
        raise TypeError("_Problem is abstract")

    def operands(self) -> tuple[Operand, ...]:
        """The result, what it is computed from, and the epilogue's."""
        steps = [operand for operand in self.step_operands if operand is not None]
        out, *others = self._tensors()
        same = [o.name for o in steps if o.element is out.element and o.shape == out.shape]
        return (replace(out, may_alias=same[0] if same else ""), *others, *steps)

    def _finished(
        self, exact: np.ndarray, magnitude: np.ndarray, epilogue: Sequence[np.ndarray | None], numbers: Sequence[float]
    ) -> tuple[np.ndarray, np.ndarray]:
        shape, matrix = exact.shape, self.matrix
        arrays = [
            None if a is None else np.asarray(a).reshape(matrix if isinstance(step, Residual) else a.shape)
            for step, a in zip(self.epilogue, list(epilogue) or [None] * len(self.epilogue), strict=True)
        ]
        values = Values(exact.reshape(matrix), magnitude.reshape(matrix))
        exact, magnitude = apply_steps(self.epilogue, values, arrays, numbers or [1.0] * len(self.epilogue))
        return exact.reshape(shape), magnitude.reshape(shape)


@dataclass(frozen=True)
class Conv2dDescriptor(_Problem):
    """Y = epilogue(X * W) in one to three axes, fp32 sums, one rounding; rows are pixels, columns output channels."""

    @property
    def matrix(self) -> tuple[int, int]:
        """Output pixels and output channels."""
        return (self.geometry.out_pixels, self.geometry.out_channels)

    @property
    def depth(self) -> int:
        """Products in an element's sum."""
        return self.geometry.taps * self.geometry.group_in

    def _tensors(self) -> tuple[Operand, ...]:
        g = self.geometry
        return (
            Operand("out", self.out, g.y_shape, writes=True),
            Operand("x", self.x, g.x_shape),
            Operand("weight", self.weight, g.weight_shape),
        )

    def reference(
        self,
        x: np.ndarray,
        weight: np.ndarray,
        epilogue: Sequence[np.ndarray | None] = (),
        numbers: Sequence[float] = (),
    ) -> tuple[np.ndarray, np.ndarray]:
        """The exact Y in float64, and the magnitude that the guarantee is relative to: |X| * |W| through the steps."""
        g, found = self.geometry, []
        for source, factor in ((x, weight), (np.abs(x), np.abs(weight))):
            padded, by_tap = g.padded(source), g.weight_by_tap(factor)
            y = np.zeros((*g.y_shape[:-1], g.groups, g.group_out))
            for tap, window in g.windows():
                y += _by_groups(padded[window], by_tap[tap].swapaxes(1, 2))
            found.append(y.reshape(g.y_shape))
        return self._finished(*found, epilogue, numbers)


@dataclass(frozen=True)
class Conv2dInputGradientDescriptor(_Problem):
    """The gradient of X: that of each output pixel through the taps that it took. ``x`` is the kind of Y's gradient."""

    @property
    def matrix(self) -> tuple[int, int]:
        """Input pixels and input channels."""
        return (self.geometry.in_pixels, self.geometry.in_channels)

    @property
    def depth(self) -> int:
        """Products in an element's sum."""
        return self.geometry.taps * self.geometry.group_out

    def _tensors(self) -> tuple[Operand, ...]:
        g = self.geometry
        return (
            Operand("out", self.out, g.x_shape, writes=True),
            Operand("gradient", self.x, g.y_shape),
            Operand("weight", self.weight, g.weight_shape),
        )

    def reference(
        self,
        gradient: np.ndarray,
        weight: np.ndarray,
        epilogue: Sequence[np.ndarray | None] = (),
        numbers: Sequence[float] = (),
    ) -> tuple[np.ndarray, np.ndarray]:
        """The exact gradient in float64, and the magnitude that the guarantee is relative to."""
        g, found = self.geometry, []
        for source, factor in ((gradient, weight), (np.abs(gradient), np.abs(weight))):
            split = np.asarray(source, np.float64).reshape(*g.y_shape[:-1], g.groups, g.group_out)
            dx, by_tap = np.zeros_like(g.padded(np.zeros(g.x_shape))), g.weight_by_tap(factor)
            for tap, window in g.windows():
                dx[window] += _by_groups(split, by_tap[tap])
            inside = tuple(slice(p, p + e) for p, e in zip(g.padding, g.extents, strict=True))
            found.append(dx[(slice(None), *inside)].reshape(g.x_shape))
        return self._finished(*found, epilogue, numbers)


@dataclass(frozen=True)
class Conv2dWeightGradientDescriptor(_Problem):
    """The gradient of the weight, in its layout; a residual adds to one. ``weight`` is the kind of Y's gradient."""

    @property
    def matrix(self) -> tuple[int, int]:
        """Output channels, and the rest of the weight."""
        return (self.geometry.out_channels, self.geometry.taps * self.geometry.group_in)

    @property
    def depth(self) -> int:
        """Products in an element's sum."""
        return self.geometry.out_pixels

    def __post_init__(self) -> None:
        super().__post_init__()
        if any(not isinstance(step, Residual) for step in self.epilogue):
            found = ", ".join(type(step).__name__ for step in self.epilogue)
            raise InvalidProblem(
                f"convolution: an epilogue of {found}; a weight's gradient takes residuals only; leave the others out"
            )

    def _tensors(self) -> tuple[Operand, ...]:
        g = self.geometry
        return (
            Operand("out", self.out, g.weight_shape, writes=True),
            Operand("gradient", self.weight, g.y_shape),
            Operand("x", self.x, g.x_shape),
        )

    def reference(
        self,
        gradient: np.ndarray,
        x: np.ndarray,
        epilogue: Sequence[np.ndarray | None] = (),
        numbers: Sequence[float] = (),
    ) -> tuple[np.ndarray, np.ndarray]:
        """The exact gradient in float64, and the magnitude that the guarantee is relative to."""
        g, found = self.geometry, []
        for source, factor in ((x, gradient), (np.abs(x), np.abs(gradient))):
            split = np.asarray(factor, np.float64).reshape(g.out_pixels, g.groups, g.group_out)
            padded, by_tap = g.padded(source), np.zeros((g.taps, g.groups, g.group_out, g.group_in))
            for tap, window in g.windows():
                pixels = padded[window].reshape(g.out_pixels, g.groups, g.group_in)
                by_tap[tap] = split.transpose(1, 2, 0) @ pixels.swapaxes(0, 1)
            found.append(g.weight_as_stored(by_tap))
        return self._finished(*found, epilogue, numbers)


class Conv2dArgs(Arguments):
    """The tensors of one run: the result, then the two it is computed from in the descriptor's order.

    They are (x, weight), (gradient, weight) or (gradient, x). ``epilogue`` has the tensor of each step that takes one;
    for a residual (C, beta), or C alone where beta is 1.
    """

    def __init__(
        self,
        out: TensorMut,
        first: TensorRef,
        second: TensorRef,
        epilogue: Sequence[TensorRef | tuple[TensorRef, float]] = (),
    ) -> None:
        super().__init__()
        self.out, self.first, self.second = out, first, second
        given = [entry if isinstance(entry, tuple) else (entry, 1.0) for entry in epilogue]
        self.epilogue = tuple(tensor for tensor, _ in given)
        self.numbers = tuple(float(number) for _, number in given)

    def tensors(self) -> list[TensorRef]:
        """The result, the two, the epilogue's."""
        return [self.out, self.first, self.second, *self.epilogue]
