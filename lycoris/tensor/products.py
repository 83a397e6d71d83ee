"""Matrix products with gradients: matmul, bmm, linear, and a linear layer with a low-rank adapter in the same launch.

Transposed operands are no copies: a product takes either order of storage. Sums are fp32; results have the operands'
kind, or f32 where they differ.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from lycoris.errors import RefusedInput
from lycoris.tensor import autograd, pointwise, views
from lycoris.tensor.launch import ITSELF, broadcast_shape, compact, converted, empty, reduce, run, same_device, shaped
from lycoris.tensor.tensor import Shape, Tensor, compact_strides
from plans.core import ElementKind, TensorRef
from plans.matmul import Bias, LowRankTerm, Segment, SegmentedMatmulArgs, SegmentedMatmulDescriptor, SegmentedMatmulPlan
from plans.reduction import Reduction


class _Stored(NamedTuple):
    """How a product takes a matrix, or a batch of them: its stored shape, strides, and whether that is transposed.

    ``stride`` and ``batch_stride`` are 0 where the descriptor's own fit.
    """

    shape: Shape
    strides: Shape
    transposed: bool
    stride: int
    batch_stride: int

    def ref(self, x: Tensor) -> TensorRef:
        """The tensor as it is stored."""
        view = x if not self.transposed else Tensor(x.storage, self.shape, x.kind, self.strides, x.offset)
        return view.ref()


def _fits(x: Tensor) -> bool:
    """Whether a product takes the last two axes as they lie, in either order."""
    rows, columns = x.shape[-2:]
    down, across = x.strides[-2:]
    return x.aligned and (x.contiguous_ or (across == 1 and down >= columns) or (down == 1 and across >= rows))


def _ready(x: Tensor, transposed: bool = True) -> Tensor:
    """The tensor, copied where a product does not take it, or not in the order in which it is written."""
    if _fits(x) and (transposed or not _stored(x).transposed):
        return x
    return converted(x, x.kind)


def _stored(x: Tensor) -> _Stored:
    columns = x.shape[-1]
    down, across = x.strides[-2:]
    transposed = not x.contiguous_ and not (across == 1 and down >= columns)
    shape, strides = x.shape, x.strides
    if transposed:
        shape, strides = ((*v[:-2], v[-1], v[-2]) for v in (shape, strides))
    wanted = compact_strides(shape)
    odd = [s if s != w and e > 1 else 0 for s, w, e in zip(strides, wanted, shape, strict=True)]
    return _Stored(shape, strides, transposed, odd[-2], odd[0] if x.ndim == 3 else 0)


_plans: dict[tuple, tuple] = {}


def _layout(x: Tensor) -> tuple:
    return (x.shape, x.strides, id(x.kind))


def product(a: Tensor, b: Tensor, kind: ElementKind, scale: float = 1.0, bias: Tensor | None = None) -> Tensor:
    """The product scale * a @ b (+ bias) for a [m, k] or [batch, m, k], b [k, n] or [batch, k, n]; no gradients."""
    a, b = _ready(a), _ready(b)
    key = (_layout(a), _layout(b), id(kind), None if bias is None else id(bias.kind), a.device.ordinal)
    found = _plans.get(key)
    if found is None:
        found = _plans[key] = _product_plan(a, b, kind, bias)
    plan, left, right, shape = found
    out = empty(shape, kind, a.device)
    operands = () if bias is None else (compact(bias).ref(),)
    run(plan, SegmentedMatmulArgs(out.mut(), ((left.ref(a), right.ref(b)),), (scale,), operands))
    return out


def _product_plan(a: Tensor, b: Tensor, kind: ElementKind, bias: Tensor | None) -> tuple:
    """The plan, how it takes both operands, and the result's shape."""
    batch = next((x.shape[0] for x in (a, b) if x.ndim == 3), None)
    m, n, k = a.shape[-2], b.shape[-1], a.shape[-1]
    left, right = _stored(a), _stored(b)
    # B's letter is T where it is stored [n, k], which is the transpose of what is passed here.
    layout = ("T" if left.transposed else "N") + ("T" if right.transposed else "N")
    segment = Segment(
        k, layout, a.kind, b.kind, left.stride, right.stride, left.batch_stride, right.batch_stride,
        batch is not None and a.ndim == 2, batch is not None and b.ndim == 2,
    )  # fmt: skip
    steps = () if bias is None else (Bias(bias.kind),)
    descriptor = SegmentedMatmulDescriptor(m, n, (segment,), kind, batch, steps)
    plan = SegmentedMatmulPlan.select(None, descriptor, device=a.device)
    return plan, left, right, (m, n) if batch is None else (batch, m, n)


def _t(x: Tensor) -> Tensor:
    """The last two axes exchanged, without gradients."""
    shape, strides = ((*v[:-2], v[-1], v[-2]) for v in (x.shape, x.strides))
    return Tensor(x.storage, shape, x.kind, strides, x.offset)


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """The product over a's last and b's last but one axis; axes before are a batch, which repeats where it is 1.

    One-dimensional operands are a row, or a column, as in NumPy. Raises RefusedInput where extents differ.
    """
    if not a.shape or not b.shape:
        raise RefusedInput(f"matmul: shapes {a.shape} and {b.shape}, wanted an axis or more each")
    if a.ndim == 1:
        return views.squeeze(matmul(views.unsqueeze(a, 0), b), -2 if b.ndim > 1 else 0)
    if b.ndim == 1:
        return views.squeeze(matmul(a, views.unsqueeze(b, 1)), -1)
    if a.shape[-1] != b.shape[-2]:
        raise RefusedInput(
            f"matmul: {a.shape} @ {b.shape}, wanted the first one's last extent, {a.shape[-1]}, before last"
        )
    if b.ndim == 2:
        out = _product_op("matmul", views.reshape(a, _rows(a), a.shape[-1]) if a.ndim != 2 else a, b)
        return out if a.ndim == 2 else views.reshape(out, *a.shape[:-1], b.shape[1])
    batch = broadcast_shape("matmul", [a.shape[:-2], b.shape[:-2]])
    flat = []
    for x in (a, b):
        x = x if x.shape[:-2] == batch else views.expand(x, *batch, *x.shape[-2:])
        flat.append(x if x.ndim == 3 else views.reshape(x, math.prod(batch), *x.shape[-2:]))
    out = _product_op("matmul", *flat)
    return out if len(batch) == 1 else views.reshape(out, *batch, *out.shape[-2:])


def _rows(x: Tensor) -> int:
    return math.prod(x.shape[:-1])


def bmm(a: Tensor, b: Tensor) -> Tensor:
    """Products of a batch: [batch, m, k] @ [batch, k, n]."""
    if a.ndim != 3 or b.ndim != 3 or a.shape[0] != b.shape[0] or a.shape[2] != b.shape[1]:
        raise RefusedInput(f"bmm: {a.shape} @ {b.shape}, wanted [batch, m, k] and [batch, k, n]")
    return _product_op("bmm", a, b)


def _product_op(name: str, a: Tensor, b: Tensor) -> Tensor:
    same_device(name, (a, b))
    kind = pointwise.result_kind(name, (a, b))
    left, right = a.detach(), b.detach()
    out = product(left, right, kind)
    if not autograd.wanted((a, b)):
        return out

    def pull(g: Tensor, edges: Sequence[autograd.Node | None]) -> list[Tensor | None]:
        d_a = product(g, _t(right), edges[0].kind) if edges[0] else None
        d_b = product(_t(left), g, edges[1].kind) if edges[1] else None
        return [d_a, d_b]

    return autograd.record(name, out, (a, b), (left, right), pull)


def matrix_of(x: Tensor, columns: int) -> Tensor:
    """A tensor as a matrix of its last axis, without gradients."""
    return x.detach() if x.ndim == 2 else shaped(compact(x.detach()), (_rows(x), columns))


def check_linear(name: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Shape:
    """The result's shape. Raises RefusedInput where operands of a linear layer do not fit."""
    if weight.ndim != 2 or not x.shape or x.shape[-1] != weight.shape[1]:
        raise RefusedInput(f"{name}: x {x.shape} and weight {weight.shape}, wanted [..., in] and [out, in]")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise RefusedInput(f"{name}: bias {bias.shape}, wanted {weight.shape[:1]}")
    return (*x.shape[:-1], weight.shape[0])


def _bias_gradient(g: Tensor, kind: ElementKind) -> Tensor:
    return reduce(Reduction.SUM, ITSELF, (compact(g),), (0,), g.shape[1:], kind)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A linear layer, x @ weight.T + bias: [..., in] and [out, in] -> [..., out], one launch."""
    shape = check_linear("linear", x, weight, bias)
    inputs = (x, weight) if bias is None else (x, weight, bias)
    same_device("linear", inputs)
    rows, matrix = matrix_of(x, weight.shape[1]), weight.detach()
    kind = pointwise.result_kind("linear", (x, weight))
    out = shaped(product(rows, _t(matrix), kind, bias=None if bias is None else bias.detach()), shape)
    if not autograd.wanted(inputs):
        return out

    def pull(g: Tensor, edges: Sequence[autograd.Node | None]) -> list[Tensor | None]:
        g = matrix_of(g, matrix.shape[0])
        d_x = shaped(product(g, matrix, edges[0].kind), x_shape) if edges[0] else None
        d_weight = product(_t(g), rows, edges[1].kind) if edges[1] else None
        return [d_x, d_weight, *(_bias_gradient(g, edge.kind) if edge else None for edge in edges[2:])]

    x_shape = x.shape
    return autograd.record("linear", out, inputs, (rows, matrix), pull)


def low_rank_linear(
    x: Tensor, weight: Tensor, down: Tensor, up: Tensor, scale: float = 1.0, bias: Tensor | None = None
) -> Tensor:
    """The sum x @ weight.T + scale * (x @ down.T) @ up.T + bias, one launch: a base layer with LoCon beside it.

    x [..., in], weight [out, in], down [rank, in], up [out, rank] of one kind. The gradient of x is one launch too, and
    those of the factors are products with ``rank`` rows. Raises RefusedInput where shapes do not fit.
    """
    shape = check_linear("low_rank_linear", x, weight, bias)
    rank = down.shape[0] if down.ndim == 2 else -1
    if down.shape != (rank, weight.shape[1]) or up.shape != (weight.shape[0], rank):
        raise RefusedInput(
            f"low_rank_linear: down {down.shape} and up {up.shape}, wanted [rank, {weight.shape[1]}] and "
            f"[{weight.shape[0]}, rank]"
        )
    inputs = (x, weight, down, up) if bias is None else (x, weight, down, up, bias)
    same_device("low_rank_linear", inputs)
    rows, matrix, low, high = matrix_of(x, weight.shape[1]), weight.detach(), down.detach(), up.detach()
    kind = pointwise.result_kind("low_rank_linear", (x, weight))
    out = shaped(_with_low_rank(rows, _t(matrix), low, high, scale, kind, bias), shape)
    if not autograd.wanted(inputs):
        return out
    x_shape = x.shape

    def pull(g: Tensor, edges: Sequence[autograd.Node | None]) -> list[Tensor | None]:
        g = matrix_of(g, matrix.shape[0])
        d_x = None
        if edges[0]:
            d_x = shaped(_with_low_rank(g, matrix, _t(high), _t(low), scale, edges[0].kind, None), x_shape)
        d_weight = product(_t(g), rows, edges[1].kind) if edges[1] else None
        d_down = product(_t(product(g, high, g.kind)), rows, edges[2].kind, scale) if edges[2] else None
        d_up = product(_t(g), product(rows, _t(low), rows.kind), edges[3].kind, scale) if edges[3] else None
        return [d_x, d_weight, d_down, d_up, *(_bias_gradient(g, edge.kind) if edge else None for edge in edges[4:])]

    return autograd.record("low_rank_linear", out, inputs, (rows, matrix, low, high), pull)


def _with_low_rank(
    a: Tensor, b: Tensor, down: Tensor, up: Tensor, scale: float, kind: ElementKind, bias: Tensor | None
) -> Tensor:
    """The sum a @ b + scale * (a @ down.T) @ up.T (+ bias)."""
    a, b = _ready(a, transposed=False), _ready(b)
    factors = [x if x.contiguous_ and x.aligned else converted(x, x.kind) for x in (down, up)]
    key = (
        _layout(a),
        _layout(b),
        down.shape[0],
        id(down.kind),
        id(kind),
        bias is None or id(bias.kind),
        a.device.ordinal,
    )
    found = _plans.get(key)
    if found is None:
        found = _plans[key] = _low_rank_plan(a, b, down, kind, bias)
    plan, left, right, shape = found
    out = empty(shape, kind, a.device)
    operands = () if bias is None else (compact(bias.detach()).ref(),)
    pairs = ((factors[0].ref(), factors[1].ref()),)
    run(plan, SegmentedMatmulArgs(out.mut(), ((left.ref(a), right.ref(b)),), None, operands, pairs, (scale,)))
    return out


def _low_rank_plan(a: Tensor, b: Tensor, down: Tensor, kind: ElementKind, bias: Tensor | None) -> tuple:
    """The plan, how it takes a and b, and the result's shape."""
    left, right = _stored(a), _stored(b)
    (m, k), n = a.shape, b.shape[1]
    segment = Segment(k, "NT" if right.transposed else "NN", a.kind, b.kind, left.stride, right.stride)
    steps = () if bias is None else (Bias(bias.kind),)
    term = LowRankTerm(down.shape[0], 0, down.kind)
    descriptor = SegmentedMatmulDescriptor(m, n, (segment,), kind, None, steps, low_rank=(term,))
    return SegmentedMatmulPlan.select(None, descriptor, device=a.device), left, right, (m, n)
