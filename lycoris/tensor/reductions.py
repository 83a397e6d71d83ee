"""Reductions over axes: sums, means, extrema, variance; deterministic, accumulated in fp32."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lycoris.errors import RefusedInput
from lycoris.tensor import autograd, pointwise
from lycoris.tensor.launch import F32, ITSELF, compact, compute, empty, reduce, shaped
from lycoris.tensor.tensor import Shape, Tensor
from plans.core import ElementKind
from plans.expression import leaf
from plans.reduction import Reduction

Axes = int | Sequence[int] | None


def normal_axes(operation: str, ndim: int, axes: Axes) -> tuple[int, ...]:
    """Axes as sorted numbers from 0; None is all. Raises RefusedInput for an axis that is not there, or twice."""
    if axes is None:
        return tuple(range(ndim))
    given = (axes,) if isinstance(axes, int) else tuple(axes)
    if any(not -ndim <= axis < ndim for axis in given) or len({axis % (ndim or 1) for axis in given}) != len(given):
        raise RefusedInput(
            f"{operation}: axes {given} of {ndim}, wanted -{ndim} to {ndim - 1}, each once; leave the others out"
        )
    return tuple(sorted(axis % ndim for axis in given))


def reduced_shape(shape: Shape, axes: Sequence[int], keep: bool) -> Shape:
    """The shape without ``axes``, or with 1 in their place."""
    return tuple(1 if i in axes else extent for i, extent in enumerate(shape) if keep or i not in axes)


def sum(x: Tensor, axes: Axes = None, keepdim: bool = False, kind: ElementKind | None = None) -> Tensor:
    """The sum over axes, over all of them where none are given; the result has ``kind``, or x's."""
    return _linear("sum", x, axes, keepdim, kind, lambda n: 1.0)


def mean(x: Tensor, axes: Axes = None, keepdim: bool = False, kind: ElementKind | None = None) -> Tensor:
    """The mean over axes, over all of them where none are given; the result has ``kind``, or x's."""
    return _linear("mean", x, axes, keepdim, kind, lambda n: 1 / n if n else math.nan)


def _linear(name: str, x: Tensor, axes: Axes, keepdim: bool, kind: ElementKind | None, factor: object) -> Tensor:
    chosen = normal_axes(name, x.ndim, axes)
    scale = factor(math.prod(x.shape[axis] for axis in chosen))
    pointwise.result_kind(name, (x,))
    shape_out = reduced_shape(x.shape, chosen, keepdim)
    out = reduce(Reduction.SUM, ITSELF, (compact(x.detach()),), chosen, shape_out, kind or x.kind, scale)
    if not autograd.wanted((x,)):
        return out
    shape, kept = x.shape, reduced_shape(x.shape, chosen, True)

    def pull(g: Tensor, edges: Sequence[autograd.Node | None]) -> list[Tensor]:
        wide = empty(shape, edges[0].kind, g.device)
        compute((leaf(0) * leaf(1),), (shaped(compact(g), kept),), (scale,), wide)
        return [wide]

    return autograd.record(name, out, (x,), (), pull)


def max(x: Tensor, axes: Axes = None, keepdim: bool = False) -> Tensor:
    """The largest element over axes; equal ones share its gradient. Raises RefusedInput where there is none."""
    return _extremum("max", Reduction.MAX, x, axes, keepdim)


def min(x: Tensor, axes: Axes = None, keepdim: bool = False) -> Tensor:
    """The smallest element over axes; equal ones share its gradient. Raises RefusedInput where there is none."""
    return _extremum("min", Reduction.MIN, x, axes, keepdim)


def _extremum(name: str, reduction: Reduction, x: Tensor, axes: Axes, keepdim: bool) -> Tensor:
    chosen = normal_axes(name, x.ndim, axes)
    if any(x.shape[axis] == 0 for axis in chosen):
        raise RefusedInput(
            f"{name}: a tensor of shape {x.shape} has no element along axes {chosen}, wanted one or more; "
            "skip what is empty"
        )
    pointwise.result_kind(name, (x,))
    out = reduce(reduction, ITSELF, (compact(x.detach()),), chosen, reduced_shape(x.shape, chosen, keepdim), x.kind)
    if not autograd.wanted((x,)):
        return out
    kept = reduced_shape(x.shape, chosen, True)
    saved, top = x.detach(), shaped(out, kept)

    def pull(g: Tensor, edges: Sequence[autograd.Node | None]) -> list[Tensor]:
        hits = pointwise.apply(leaf(0).eq(leaf(1)), (saved, top))
        count = sum(hits, chosen, keepdim=True, kind=F32)
        spread = shaped(compact(g), kept)
        return [pointwise.apply(leaf(0) * leaf(1) / leaf(2), (hits, spread, count), kind=edges[0].kind)]

    return autograd.record(name, out, (x,), (saved, top), pull)


def var(x: Tensor, axes: Axes = None, keepdim: bool = False, correction: int = 1) -> Tensor:
    """The variance over axes: the mean square distance from the mean, over n - correction; fp32 on the way."""
    chosen = normal_axes("var", x.ndim, axes)
    n = math.prod(x.shape[axis] for axis in chosen)
    middle = mean(x, chosen, keepdim=True, kind=F32)
    squares = pointwise.apply((leaf(0) - leaf(1)) ** 2, (x, middle), kind=F32)
    total = _linear(
        "var", squares, chosen, keepdim, None, lambda _: 1 / (n - correction) if n > correction else math.nan
    )
    return pointwise.to(total, x.kind)
