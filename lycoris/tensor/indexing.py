"""Choices by an index: index_select, gather, embedding; gradients are summed in the order of the index."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lycoris.errors import RefusedInput
from lycoris.tensor import autograd, views
from lycoris.tensor.launch import F32, compact, converted, empty, run, same_device, shaped, zeros
from lycoris.tensor.reductions import normal_axes
from lycoris.tensor.tensor import FLOATS, Shape, Tensor
from plans.core import ElementKind
from plans.take import TakeArgs, TakeBackwardDescriptor, TakeBackwardPlan, TakeDescriptor, TakePlan


def index_select(x: Tensor, axis: int, index: Tensor) -> Tensor:
    """The elements ``index`` (one axis, i32 or i64) of an axis; NaN, or -1, where an index is outside."""
    if index.ndim != 1:
        raise RefusedInput(
            f"index_select: an index of shape {index.shape}, wanted one axis; use reshape(-1), or gather"
        )
    (at,) = normal_axes("index_select", x.ndim, axis)
    return _take("index_select", x, at, index, (*x.shape[:at], index.size, *x.shape[at + 1 :]), False)


def gather(x: Tensor, axis: int, index: Tensor) -> Tensor:
    """out[..., j, ...] = x[..., index[..., j, ...], ...] along an axis; other extents are x's."""
    (at,) = normal_axes("gather", x.ndim, axis)
    if index.ndim != x.ndim or index.shape[:at] + index.shape[at + 1 :] != x.shape[:at] + x.shape[at + 1 :]:
        raise RefusedInput(
            f"gather: an index of shape {index.shape} along axis {axis} of {x.shape}, wanted x's other extents; "
            "expand it first"
        )
    return _take("gather", x, at, index, index.shape, True)


def embedding(index: Tensor, table: Tensor) -> Tensor:
    """The rows of a table [n, width] at an index of any shape: [*index.shape, width]."""
    if table.ndim != 2:
        raise RefusedInput(f"embedding: a table of shape {table.shape}, wanted a matrix; reshape it first")
    flat = views.reshape(index, -1) if index.size else views.reshape(index, 0)
    return views.reshape(index_select(table, 0, flat), *index.shape, table.shape[1])


def _take(name: str, x: Tensor, at: int, index: Tensor, shape: Shape, elementwise: bool) -> Tensor:
    if index.kind not in (ElementKind.I32, ElementKind.I64):
        raise RefusedInput(f"{name}: an index of {index.kind.value}, wanted i32 or i64; make it of whole numbers")
    device = same_device(name, (x, index))
    source, place = compact(x.detach()), compact(index)
    outer, n, inner = math.prod(x.shape[:at]), x.shape[at], math.prod(x.shape[at + 1 :])
    extents = (outer, n, shape[at], inner)
    out = empty(shape, x.kind, device)
    descriptor = TakeDescriptor(*extents, x.kind, index.kind, elementwise, source.aligned and out.aligned)
    place = shaped(place, descriptor.index_operand.shape)
    run(
        TakePlan.select(None, descriptor, device=device),
        TakeArgs(shaped(out, descriptor.out_shape).mut(), shaped(source, (outer, n, inner)).ref(), place.ref()),
    )
    if not autograd.wanted((x,)) or x.kind not in FLOATS:
        return out
    before = x.shape

    def pull(g: Tensor, edges: Sequence[autograd.Node | None]) -> list[Tensor]:
        wide = zeros(before, F32, g.device)
        g = compact(g)
        back = TakeBackwardDescriptor(*extents, g.kind, place.kind, elementwise, g.aligned and wide.aligned)
        run(
            TakeBackwardPlan.select(None, back, device=g.device),
            TakeArgs(shaped(wide, (outer, n, inner)).mut(), shaped(g, back.out_shape).ref(), place.ref()),
        )
        return [wide if edges[0].kind is F32 else converted(wide, edges[0].kind)]

    return autograd.record(name, out, (x,), (place,), pull)
