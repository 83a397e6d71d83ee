"""A linear layer with a low-rank adapter: base and adapter in one sum, forwards and for the gradient of x.

With t = s x down^T and u = s g up, which have ``rank`` columns:

    y = x W^T + t up^T + b          d_x = g W + u down          d_down = u^T x          d_up = g^T t

While factors are trained, t is kept from the way forward, so that x is read once more, and g twice, on the way back.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

from lycoris.errors import RefusedInput
from lycoris.tensor import autograd, pointwise
from lycoris.tensor.adapter_gradients import low_rank_gradients
from lycoris.tensor.launch import (
    compact,
    converted,
    empty,
    keep,
    kept,
    of_layout,
    of_layouts,
    result_of_shape,
    run_prepared,
    same_device,
)
from lycoris.tensor.products import (
    added_gradients,
    check_linear,
    flipped,
    like_rows,
    matrix_of,
    prepared_sum,
    product,
    ready,
    stored,
)
from lycoris.tensor.tensor import Layout, Shape, Tensor, layout_of
from plans.core import ElementKind, TensorMut, TensorRef
from plans.core.prepared import Prepared
from plans.matmul import (
    Bias,
    LowRankTerm,
    Residual,
    Segment,
    SegmentedMatmulArgs,
    SegmentedMatmulDescriptor,
    SegmentedMatmulPlan,
    blocks_beside,
)

_UNIT = 8
"""Ranks whose rows of t are aligned to 16 bytes, so that t may be an operand of a product."""


def low_rank_linear(
    x: Tensor,
    weight: Tensor,
    down: Tensor,
    up: Tensor,
    scale: float = 1.0,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """The sum x @ weight.T + scale * (x @ down.T) @ up.T + bias (+ residual): a base layer with LoCon beside it.

    x [..., in], weight [out, in], down [rank, in], up [out, rank] of one kind. x @ down.T is rounded to x's kind while
    the factors are trained (as their gradients need it), and otherwise kept to fp32's precision. Raises RefusedInput
    where shapes do not fit.
    """
    added = [None if part is None else part.layout for part in (bias, residual)]
    shape, kind = _checked(x.layout, weight.layout, down.layout, up.layout, *added)
    inputs = tuple([part for part in (x, weight, down, up, bias, residual) if part is not None])
    same_device("low_rank_linear", inputs)
    rows, matrix, low, high, rank = matrix_of(x, weight.shape[1]), weight, down, up, down.shape[0]
    recorded = autograd.wanted(inputs)
    trained = recorded and (down.requires_grad or up.requires_grad)
    own, beside = bias, like_rows(residual, weight.shape[0])
    if trained and rank % _UNIT == 0:
        t, out, _ = _both(True, (rows, matrix, low, high), scale, kind, own, beside)
    else:
        t = product(rows, flipped(low), rows.kind, scale) if trained else None
        out = with_term(rows, flipped(matrix), low, high, scale, kind, own, beside)
    out = result_of_shape(out, shape)
    if not recorded:
        return out
    x_shape = x.shape

    def pull(g: Tensor, edges: Sequence[autograd.Node | None], already: Tensor | None) -> list[Tensor | None]:
        whole, g, more = g, matrix_of(g, matrix.shape[0]), like_rows(already, matrix.shape[1])
        u, d_x, overlaps = None, None, False
        if edges[0] and trained and rank % _UNIT == 0:
            # Held until the factors' gradients are launched, which run beside the product that reads them.
            u, d_x, held = _both(False, (g, matrix, high, low), scale, edges[0].kind, None, more)
            g, overlaps = held[0], edges[1] is None
        elif edges[0]:
            d_x = with_term(g, matrix, flipped(high), flipped(low), scale, edges[0].kind, None, more)
        if u is None and edges[2]:
            u = product(g, high if rank % _UNIT == 0 else flipped(converted(flipped(high), high.kind)), g.kind, scale)
        d_weight = product(flipped(g), rows, edges[1].kind) if edges[1] else None
        factors = edges[2] or edges[3]
        pairs = ((u, rows) if edges[2] else None, (g, t) if edges[3] else None)
        d_down, d_up = low_rank_gradients(*pairs, factors.kind, 1.0, beside=overlaps) if factors else (None, None)
        rest = added_gradients(whole, g, edges[4:], own is not None)
        return [None if d_x is None else result_of_shape(d_x, x_shape), d_weight, d_down, d_up, *rest]

    return autograd.record("low_rank_linear", out, inputs, (rows, matrix, low, high), pull, adds=True)


@functools.lru_cache(1 << 12)
def _checked(
    x: Layout, weight: Layout, down: Layout, up: Layout, bias: Layout | None, residual: Layout | None
) -> tuple[Shape, ElementKind]:
    """The result's shape and kind. Raises RefusedInput where operands do not fit."""
    shape = check_linear("low_rank_linear", x, weight, bias, residual)
    rank = down.shape[0] if len(down.shape) == 2 else -1
    if down.shape != (rank, weight.shape[1]) or up.shape != (weight.shape[0], rank):
        raise RefusedInput(
            f"low_rank_linear: down {down.shape} and up {up.shape}, wanted [rank, {weight.shape[1]}] and "
            f"[{weight.shape[0]}, rank]; give the factors of this weight"
        )
    return shape, pointwise.result_kind("low_rank_linear", (x, weight))


class _Both(NamedTuple):
    """Two products' launches, and their results' layouts."""

    first: Prepared
    t: Layout
    second: Prepared
    out: Layout


_MOST_KEPT = 1 << 12
_both_kept: dict[tuple, _Both] = {}


def _both(
    turned: bool, operands: tuple[Tensor, ...], scale: float, kind: ElementKind, bias: Tensor | None,
    residual: Tensor | None,
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:  # fmt: skip
    """Of a, b, narrow and wide: t = scale * a @ narrow in a's kind, and a @ b + t @ wide (+ bias) (+ residual).

    ``turned``: b, narrow and wide are the transposes of what is given. The second product begins before the first ends:
    nothing is launched between them, and what they read, which is given too, stays until both are launched. Where it is
    not turned, the launch after both may run beside the second.
    """
    (a, b, narrow, wide), device = operands, operands[0].device
    added = tuple([x for x in (bias, residual) if x is not None])
    layouts = a.layout, b.layout, narrow.layout, wide.layout, *[x.layout for x in added]
    key = (turned, scale, kind, bias is None, device.ordinal, layouts)
    found = _both_kept.get(key)
    if found is None or (a.address | b.address | narrow.address | wide.address) & 15:
        found, operands, added = _prepare_both(key, turned, operands, scale, kind, bias, residual)
        a, b, narrow, wide = operands
    t, out = of_layouts((found.t, found.out), device)
    run_prepared(found.first, (t, a, narrow))
    run_prepared(found.second, (out, a, b, t, wide, *added))
    return t, out, (*operands, *added)


def _prepare_both(
    key: tuple, turned: bool, given: tuple[Tensor, ...], scale: float, kind: ElementKind, bias: Tensor | None,
    residual: Tensor | None,
) -> tuple[_Both, tuple[Tensor, ...], tuple[Tensor, ...]]:  # fmt: skip
    """The launches, the operands as they take them, and what is added; kept where nothing had to be copied."""
    wanted = tuple([flipped(x) if turned and number else x for number, x in enumerate(given)])
    a, b, narrow, wide = operands = tuple([ready(x) for x in wanted])
    terms = [None if x is None else compact(x) for x in (bias, residual)]
    t = layout_of((a.shape[0], narrow.shape[1]), a.kind)
    small = Tensor(a.storage, t)  # only its layout counts
    second, out = prepared_sum((a, b, small, wide), (1.0, 1.0), kind, *terms, early=not turned, late=True)
    beside = blocks_beside(second.plan.program, a.device, a.shape[0], 1, narrow.shape[1], a.shape[1])
    first, _ = prepared_sum((a, narrow), (scale,), a.kind, early=True, beside=beside)
    found = _Both(first, t, second, out)
    added = tuple([x for x in terms if x is not None])
    if all(x is y for x, y in zip((*operands, *terms), (*wanted, bias, residual), strict=True)):
        if len(_both_kept) >= _MOST_KEPT:
            _both_kept.clear()
        _both_kept[key] = found
    return found, operands, added


def with_term(
    a: Tensor, b: Tensor, down: Tensor, up: Tensor, scale: float, kind: ElementKind, bias: Tensor | None,
    residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The sum a @ b + scale * (a @ down.T) @ up.T (+ bias) (+ residual), in which a @ down.T is no tensor."""
    a, b = ready(a, transposed=False), ready(b)
    down, up = (x if x.contiguous_ and x.aligned else converted(x, x.kind) for x in (down, up))
    added = [compact(x) for x in (bias, residual) if x is not None]
    operands = (a, b, down, up, *added)
    key = ("low rank", kind, scale, bias is None, a.device.ordinal, *[x.layout for x in operands])
    found = kept(key) or _keep_term(key, operands, scale, kind, bias is not None)
    out = of_layout(found[1], a.device)
    run_prepared(found[0], (out, *operands))
    return out


def _keep_term(
    key: tuple, operands: Sequence[Tensor], scale: float, kind: ElementKind, biased: bool
) -> tuple[Prepared, Layout]:
    """The plan, and the result's layout."""
    a, b, down, up, *added = operands
    left, right = stored(a.layout), stored(b.layout)
    (m, k), n = a.shape, b.shape[1]
    segment = Segment(k, left.letter + right.letter, a.kind, b.kind, left.stride, right.stride)
    steps = tuple(Bias(x.kind) if biased and x is added[0] else Residual(x.kind) for x in added)
    term = LowRankTerm(down.shape[0], 0, down.kind)
    descriptor = SegmentedMatmulDescriptor(m, n, (segment,), kind, None, steps, low_rank=(term,))
    plan = SegmentedMatmulPlan.select(None, descriptor, device=a.device)
    out = empty((m, n), kind, a.device)

    def make(result: TensorMut, a: TensorRef, b: TensorRef, *rest: TensorRef) -> SegmentedMatmulArgs:
        return SegmentedMatmulArgs(result, ((a, b),), None, rest[2:], (rest[:2],), (scale,))

    return keep(key, plan, [out], [left.view(a), right.view(b), down, up, *added], make, out.layout)
