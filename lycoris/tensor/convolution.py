"""Convolutions in one to three axes with gradients: implicit products, no patches in memory.

Activations are channels last, [N, *axes, C], as the kernels read them; ``channels_first`` converts at the boundaries.
Weights are [out, in / groups, *kernel], as checkpoints store them.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from lycoris.errors import RefusedInput
from lycoris.tensor import autograd, pointwise
from lycoris.tensor.launch import (
    ITSELF,
    compact,
    converted,
    empty,
    keep,
    kept,
    reduce,
    run_prepared,
    same_device,
    shaped,
)
from lycoris.tensor.tensor import Shape, Tensor
from lycoris.tensor.views import permute
from plans.convolution import (
    Conv2dArgs,
    Conv2dDescriptor,
    Conv2dInputGradientDescriptor,
    Conv2dInputGradientPlan,
    Conv2dPlan,
    Conv2dWeightGradientDescriptor,
    Conv2dWeightGradientPlan,
    Convolution,
)
from plans.core import ElementKind, Plan, TensorMut, TensorRef
from plans.matmul import Bias, Residual
from plans.reduction import Reduction

Extents = int | Sequence[int]


@dataclass(frozen=True)
class Window:
    """How a filter moves: one number for all axes, or one for each."""

    stride: Extents = 1
    padding: Extents = 0
    dilation: Extents = 1
    groups: int = 1

    def __post_init__(self) -> None:
        for name in ("stride", "padding", "dilation"):
            given = getattr(self, name)
            object.__setattr__(self, name, given if isinstance(given, int) else tuple(given))


def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Extents = 1,
    padding: Extents = 0,
    dilation: Extents = 1,
    groups: int = 1,
    *,
    channels_first: bool = False,
    stored: Tensor | None = None,
) -> Tensor:
    """Convolve x [N, *axes, C] with weight [out, C / groups, *kernel], plus bias [out]: [N, *output axes, out].

    With ``channels_first`` x and the result have their channels after N, as in PyTorch. ``stored`` is the weight's
    `channels_last` where it is kept; else it is made here. Output extents are (extent +
    2 padding - dilation (kernel - 1) - 1) // stride + 1. Raises RefusedInput where shapes do not fit.
    """
    if channels_first:
        axes = x.ndim - 2
        last = permute(x, 0, *range(2, x.ndim), 1)
        y = conv(last, weight, bias, stride, padding, dilation, groups, stored=stored)
        return permute(y, 0, axes + 1, *range(1, axes + 1))
    window = Window(stride, padding, dilation, groups)
    geometry = geometry_of(x.shape, weight.shape, window)
    inputs = (x, weight) if bias is None else (x, weight, bias)
    same_device("conv", inputs)
    kind = pointwise.result_kind("conv", (x, weight))
    rows, stored = ready(x), channels_last(weight) if stored is None else stored
    out = convolved(rows, stored, geometry, kind, None if bias is None else bias.detach())
    if not autograd.wanted(inputs):
        return out

    def pull(g: Tensor, edges: Sequence[autograd.Node | None]) -> list[Tensor | None]:
        g = ready(g)
        d_x = input_gradient(g, stored, geometry, edges[0].kind) if edges[0] else None
        d_weight = weight_gradient(g, rows, geometry, weight.shape, edges[1].kind) if edges[1] else None
        return [d_x, d_weight, *(_bias_gradient(g, edge.kind) if edge else None for edge in edges[2:])]

    return autograd.record("conv", out, inputs, (rows, stored), pull)


@functools.lru_cache(1 << 12)
def geometry_of(x: Shape, weight: Shape, window: Window) -> Convolution:
    """The problem that shapes make. Raises RefusedInput where they do not fit each other or the window."""
    axes = len(weight) - 2
    if not 1 <= axes <= 3 or len(x) != axes + 2:
        raise RefusedInput(
            f"conv: x {x} and weight {weight}, wanted [N, *axes, C] and [out, C / groups, *kernel] with "
            "one to three axes; give x its batch axis"
        )
    if weight[1] * window.groups != x[-1] or weight[0] % window.groups:
        raise RefusedInput(
            f"conv: x has {x[-1]} channels, weight {weight} with {window.groups} groups takes "
            f"{weight[1] * window.groups}; give channels last, or channels_first=True"
        )
    numbers = [(n,) * axes if isinstance(n, int) else n for n in (window.stride, window.padding, window.dilation)]
    if any(len(n) != axes for n in numbers):
        raise RefusedInput(
            f"conv: {window}, wanted one number or {axes} for each of stride, padding and dilation; give those"
        )
    return Convolution(x[0], x[1:-1], x[-1], weight[0], weight[2:], *numbers, window.groups)


def ready(x: Tensor) -> Tensor:
    """The tensor without gradients, contiguous and aligned."""
    x = x.detach()
    return x if x.contiguous_ and x.aligned else converted(x, x.kind)


def channels_last(weight: Tensor) -> Tensor:
    """[out, in, *kernel] as [out, *kernel, in], without gradients: how the kernels read it."""
    return ready(permute(weight.detach(), 0, *range(2, weight.ndim), 1))


def convolved(
    x: Tensor,
    weight: Tensor,
    geometry: Convolution,
    kind: ElementKind,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """The convolution of ready operands, the weight channels last, plus bias and a tensor like the result."""
    steps = () if bias is None else (Bias(bias.kind),)
    steps = steps if residual is None else (*steps, Residual(residual.kind))
    added = [] if bias is None else [compact(bias)]
    added += [] if residual is None else [residual]
    problem = (Conv2dDescriptor, geometry, x.kind, weight.kind, kind, steps)
    return _run(Conv2dPlan, problem, geometry.y_shape, kind, (x, weight, *added))


def _run(
    plan: type[Plan], problem: tuple, shape: tuple[int, ...], kind: ElementKind, operands: Sequence[Tensor]
) -> Tensor:
    """A result of a shape and kind by one of the three plans, from ready operands: two, then the epilogue's.

    ``problem`` is the plan's kind of descriptor, and its fields.
    """
    device = operands[0].device
    key = (problem, device.ordinal)
    out, found = empty(shape, kind, device), kept(key)
    if found is None:
        describe, *fields = problem

        def make(result: TensorMut, first: TensorRef, second: TensorRef, *rest: TensorRef) -> Conv2dArgs:
            return Conv2dArgs(result, first, second, rest)

        found = keep(key, plan.select(None, describe(*fields), device=device), [out], operands, make)
    run_prepared(found[0], (out, *operands))
    return out


def input_gradient(
    g: Tensor, weight: Tensor, geometry: Convolution, kind: ElementKind, residual: Tensor | None = None
) -> Tensor:
    """The gradient of a convolution's x, of ready operands, the weight channels last, plus a tensor like it."""
    steps = () if residual is None else (Residual(residual.kind),)
    problem = (Conv2dInputGradientDescriptor, geometry, g.kind, weight.kind, kind, steps)
    added = () if residual is None else (residual,)
    return _run(Conv2dInputGradientPlan, problem, geometry.x_shape, kind, (g, weight, *added))


def weight_gradient(g: Tensor, x: Tensor, geometry: Convolution, shape: tuple[int, ...], kind: ElementKind) -> Tensor:
    """The gradient of a convolution's weight of ``shape``, as checkpoints store it, of ready operands."""
    problem = (Conv2dWeightGradientDescriptor, geometry, x.kind, g.kind, kind)
    out = _run(Conv2dWeightGradientPlan, problem, geometry.weight_shape, kind, (g, x))
    return permute(out, 0, len(shape) - 1, *range(1, len(shape) - 1))


def _bias_gradient(g: Tensor, kind: ElementKind) -> Tensor:
    flat = shaped(g, (g.size // max(1, g.shape[-1]), g.shape[-1]))
    return reduce(Reduction.SUM, ITSELF, (flat,), (0,), g.shape[-1:], kind)
