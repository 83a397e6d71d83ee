"""A linear layer with a low-rank adapter: base and adapter in one sum, forwards and for the gradient of x.

With t = x down^T and u = g up, which have ``rank`` columns:

    y = x W^T + s t up^T + b        d_x = g W + s u down        d_down = s u^T x        d_up = s g^T t

While factors are trained, t is kept from the way forward, so that x is read once more, and g twice, on the way back.
"""

from __future__ import annotations

from collections.abc import Sequence

from lycoris.errors import RefusedInput
from lycoris.tensor import autograd, pointwise
from lycoris.tensor.adapter_gradients import low_rank_gradients
from lycoris.tensor.launch import compact, converted, empty, keep, kept, of_layout, run_prepared, same_device, shaped
from lycoris.tensor.products import (
    bias_gradient,
    check_linear,
    flipped,
    matrix_of,
    product,
    ready,
    stored,
    sum_of_products,
)
from lycoris.tensor.tensor import Layout, Tensor
from plans.core import ElementKind, TensorMut, TensorRef
from plans.core.prepared import Prepared
from plans.matmul import Bias, LowRankTerm, Segment, SegmentedMatmulArgs, SegmentedMatmulDescriptor, SegmentedMatmulPlan

_UNIT = 8
"""Ranks whose rows of t are aligned to 16 bytes, so that t may be an operand of a product."""


def low_rank_linear(
    x: Tensor, weight: Tensor, down: Tensor, up: Tensor, scale: float = 1.0, bias: Tensor | None = None
) -> Tensor:
    """The sum x @ weight.T + scale * (x @ down.T) @ up.T + bias: a base layer with LoCon beside it.

    x [..., in], weight [out, in], down [rank, in], up [out, rank] of one kind. x @ down.T is rounded to x's kind while
    the factors are trained (as their gradients need it), and otherwise kept to fp32's precision. Raises RefusedInput
    where shapes do not fit.
    """
    shape = check_linear("low_rank_linear", x, weight, bias)
    rank = down.shape[0] if down.ndim == 2 else -1
    if down.shape != (rank, weight.shape[1]) or up.shape != (weight.shape[0], rank):
        raise RefusedInput(
            f"low_rank_linear: down {down.shape} and up {up.shape}, wanted [rank, {weight.shape[1]}] and "
            f"[{weight.shape[0]}, rank]; give the factors of this weight"
        )
    inputs = (x, weight, down, up) if bias is None else (x, weight, down, up, bias)
    same_device("low_rank_linear", inputs)
    rows, matrix, low, high = matrix_of(x, weight.shape[1]), weight.detach(), down.detach(), up.detach()
    kind = pointwise.result_kind("low_rank_linear", (x, weight))
    recorded = autograd.wanted(inputs)
    trained = recorded and (down.requires_grad or up.requires_grad)
    t = product(rows, flipped(low), rows.kind) if trained else None
    own = None if bias is None else bias.detach()
    if trained and rank % _UNIT == 0:
        pairs = ((rows, flipped(matrix)), (t, flipped(high)))
        out = sum_of_products(pairs, (1.0, scale), kind, own)
    else:
        out = with_term(rows, flipped(matrix), low, high, scale, kind, own)
    out = shaped(out, shape)
    if not recorded:
        return out
    x_shape = x.shape

    def pull(g: Tensor, edges: Sequence[autograd.Node | None]) -> list[Tensor | None]:
        g, d_x = matrix_of(g, matrix.shape[0]), None
        u = product(g, flipped(converted(flipped(high), high.kind)), g.kind) if trained else None
        if edges[0] and trained and rank % _UNIT == 0:
            d_x = sum_of_products(((g, matrix), (u, low)), (1.0, scale), edges[0].kind)
        elif edges[0]:
            d_x = with_term(g, matrix, flipped(high), flipped(low), scale, edges[0].kind, None)
        d_weight = product(flipped(g), rows, edges[1].kind) if edges[1] else None
        factors = edges[2] or edges[3]
        pairs = ((u, rows) if edges[2] else None, (g, t) if edges[3] else None)
        d_down, d_up = low_rank_gradients(*pairs, factors.kind, scale) if factors else (None, None)
        d_bias = [bias_gradient(g, edge.kind) if edge else None for edge in edges[4:]]
        return [None if d_x is None else shaped(d_x, x_shape), d_weight, d_down, d_up, *d_bias]

    return autograd.record("low_rank_linear", out, inputs, (rows, matrix, low, high), pull)


def with_term(
    a: Tensor, b: Tensor, down: Tensor, up: Tensor, scale: float, kind: ElementKind, bias: Tensor | None
) -> Tensor:
    """The sum a @ b + scale * (a @ down.T) @ up.T (+ bias), in which a @ down.T is no tensor."""
    a, b = ready(a, transposed=False), ready(b)
    down, up = (x if x.contiguous_ and x.aligned else converted(x, x.kind) for x in (down, up))
    added = () if bias is None else (compact(bias),)
    operands = (a, b, down, up, *added)
    key = ("low rank", kind, scale, a.device.ordinal, *[x.layout for x in operands])
    found = kept(key) or _keep_term(key, operands, scale, kind)
    out = of_layout(found[1], a.device)
    run_prepared(found[0], (out, *operands))
    return out


def _keep_term(key: tuple, operands: Sequence[Tensor], scale: float, kind: ElementKind) -> tuple[Prepared, Layout]:
    """The plan, and the result's layout."""
    a, b, down, up, *added = operands
    left, right = stored(a.layout), stored(b.layout)
    (m, k), n = a.shape, b.shape[1]
    segment = Segment(k, left.letter + right.letter, a.kind, b.kind, left.stride, right.stride)
    steps = tuple(Bias(x.kind) for x in added)
    term = LowRankTerm(down.shape[0], 0, down.kind)
    descriptor = SegmentedMatmulDescriptor(m, n, (segment,), kind, None, steps, low_rank=(term,))
    plan = SegmentedMatmulPlan.select(None, descriptor, device=a.device)
    out = empty((m, n), kind, a.device)

    def make(result: TensorMut, a: TensorRef, b: TensorRef, *rest: TensorRef) -> SegmentedMatmulArgs:
        return SegmentedMatmulArgs(result, ((a, b),), None, rest[2:], (rest[:2],), (scale,))

    return keep(key, plan, [out], [left.view(a), right.view(b), down, up, *added], make, out.layout)
