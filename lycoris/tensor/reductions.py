"""Reductions over axes: sums, means, extrema, variance; deterministic, accumulated in fp32."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lycoris.errors import RefusedInput
from lycoris.tensor import autograd
from lycoris.tensor.tensor import Shape, Tensor, empty, run
from plans.core import ElementKind
from plans.expression import Expr, leaf
from plans.reduction import Reduction, ReductionArgs, ReductionDescriptor, ReductionPlan, elements, split_axes

Axes = int | Sequence[int] | None
F32 = ElementKind.F32
_ITSELF = elements(1).full[0]


def normal_axes(operation: str, ndim: int, axes: Axes) -> tuple[int, ...]:
    """Axes as sorted numbers from 0; None is all. Raises RefusedInput for an axis that is not there, or twice."""
    if axes is None:
        return tuple(range(ndim))
    given = (axes,) if isinstance(axes, int) else tuple(axes)
    if any(not -ndim <= axis < ndim for axis in given) or len({axis % max(1, ndim) for axis in given}) != len(given):
        raise RefusedInput(f"{operation}: axes {given} of {ndim}, wanted -{ndim} to {ndim - 1}, each once")
    return tuple(sorted(axis % ndim for axis in given))


def reduced_shape(shape: Shape, axes: Sequence[int], keep: bool) -> Shape:
    """The shape without ``axes``, or with 1 in their place."""
    return tuple(1 if i in axes else extent for i, extent in enumerate(shape) if keep or i not in axes)


def launch(
    reduction: Reduction, value: Expr, sources: Sequence[Tensor], axes: Sequence[int], kind: ElementKind, scale: float
) -> Tensor:
    """A reduction of an expression over contiguous tensors of one shape; the result is flat. No gradients."""
    shape, device = sources[0].shape, sources[0].device
    steps = split_axes(shape, axes) or [(math.prod(shape), 1, 1)]
    for number, (outer, n, inner) in enumerate(steps):
        last = number == len(steps) - 1
        out = empty((outer, inner), kind if last else F32, device)
        kinds = tuple(source.kind for source in sources)
        aligned = all(source.aligned for source in sources)
        descriptor = ReductionDescriptor(
            reduction, value, outer, n, inner, kinds, out.kind, scale=scale if last else 1.0, aligned=aligned
        )
        plan = ReductionPlan.select(None, descriptor, device=device)
        refs = [Tensor(s.storage, (outer, n, inner), s.kind, offset=s.offset).ref() for s in sources]
        run(plan, ReductionArgs(out.mut(), refs))
        sources, value = (out,), _ITSELF
    return sources[0]


def _shaped(flat: Tensor, shape: Shape) -> Tensor:
    return Tensor(flat.storage, shape, flat.kind)


def sum(x: Tensor, axes: Axes = None, keepdim: bool = False, kind: ElementKind | None = None) -> Tensor:
    """The sum over axes, over all of them where none are given; the result has ``kind``, or x's."""
    return _linear("sum", x, axes, keepdim, kind, lambda n: 1.0)


def mean(x: Tensor, axes: Axes = None, keepdim: bool = False, kind: ElementKind | None = None) -> Tensor:
    """The mean over axes, over all of them where none are given; the result has ``kind``, or x's."""
    return _linear("mean", x, axes, keepdim, kind, lambda n: 1 / n if n else math.nan)


def _linear(name: str, x: Tensor, axes: Axes, keepdim: bool, kind: ElementKind | None, factor: object) -> Tensor:
    chosen = normal_axes(name, x.ndim, axes)
    scale = factor(math.prod(x.shape[axis] for axis in chosen))
    flat = launch(Reduction.SUM, _ITSELF, (pointwise.contiguous(x.detach()),), chosen, kind or x.kind, scale)
    out = _shaped(flat, reduced_shape(x.shape, chosen, keepdim))
    if not autograd.wanted((x,)):
        return out
    shape, kept = x.shape, reduced_shape(x.shape, chosen, True)

    def pull(g: Tensor, edges: Sequence[autograd.Node | None]) -> list[Tensor]:
        wide = empty(shape, edges[0].kind, g.device)
        spread = g if g.shape == kept else pointwise.contiguous(g).reshape(kept)
        pointwise.launch((leaf(0) * leaf(1),), (spread,), (scale,), [wide])
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
        raise RefusedInput(f"{name}: a tensor of shape {x.shape} has no element along axes {chosen}")
    pointwise.result_kind(name, (x,))
    flat = launch(reduction, _ITSELF, (pointwise.contiguous(x.detach()),), chosen, x.kind, 1.0)
    out = _shaped(flat, reduced_shape(x.shape, chosen, keepdim))
    if not autograd.wanted((x,)):
        return out
    kept = reduced_shape(x.shape, chosen, True)
    saved, top = x.detach(), _shaped(flat, kept)

    def pull(g: Tensor, edges: Sequence[autograd.Node | None]) -> list[Tensor]:
        hits = pointwise.apply(leaf(0).eq(leaf(1)), (saved, top))
        count = sum(hits, chosen, keepdim=True, kind=F32)
        spread = pointwise.contiguous(g).reshape(kept)
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


def sum_to(g: Tensor, shape: Shape, kind: ElementKind) -> Tensor:
    """The gradient of a tensor of ``shape`` that was repeated to g's: g summed over what repeats."""
    if g.shape == shape:
        return g
    chosen = repeated_axes(g.shape, shape)
    return _shaped(launch(Reduction.SUM, _ITSELF, (pointwise.contiguous(g),), chosen, kind, 1.0), shape)


def sum_to_of(
    expr: Expr, parts: Sequence[Tensor], scalars: tuple, full: Shape, shape: Shape, kind: ElementKind
) -> Tensor:
    """`sum_to` of an expression, in one pass where every part is contiguous and not repeated itself."""
    if not scalars and all(part.shape == full and part.contiguous_ for part in parts):
        # The leaves of a reduction's expression are numbered as those of a pointwise one.
        return _shaped(launch(Reduction.SUM, expr, parts, repeated_axes(full, shape), kind, 1.0), shape)
    out = empty(full, F32, parts[0].device)
    pointwise.launch((expr,), parts, scalars, [out])
    return sum_to(out, shape, kind)


def repeated_axes(full: Shape, shape: Shape) -> tuple[int, ...]:
    """The axes of ``full`` along which a tensor of ``shape`` repeats."""
    missing = len(full) - len(shape)
    return (*range(missing), *(missing + i for i, e in enumerate(shape) if e == 1 and full[missing + i] != 1))


from lycoris.tensor import pointwise  # noqa: E402  (the two know each other)
