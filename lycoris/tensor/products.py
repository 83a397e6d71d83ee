"""Matrix products with gradients: matmul, bmm, linear.

Transposed operands are no copies: a product takes either order of storage. Sums are fp32; results have the operands'
kind, or f32 where they differ.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

from lycoris.errors import RefusedInput
from lycoris.tensor import autograd, pointwise, views
from lycoris.tensor.launch import (
    ITSELF,
    broadcast_shape,
    compact,
    converted,
    empty,
    keep,
    kept,
    of_layout,
    reduce,
    result_of_shape,
    run_prepared,
    same_device,
    shaped,
)
from lycoris.tensor.tensor import Layout, Shape, Tensor, compact_strides, layout_of
from plans.core import ElementKind, TensorMut, TensorRef
from plans.core.prepared import Prepared
from plans.matmul import Bias, Residual, Segment, SegmentedMatmulArgs, SegmentedMatmulDescriptor, SegmentedMatmulPlan
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

    @property
    def letter(self) -> str:
        """BLAS's letter. B's is T where it is stored [n, k], which is the transpose of what is passed here."""
        return "T" if self.transposed else "N"

    def view(self, x: Tensor) -> Tensor:
        """The tensor as it is stored."""
        return x.viewed(self.shape, self.strides) if self.transposed else x


@functools.lru_cache(1 << 14)
def _fits(layout: Layout) -> bool:
    """Whether a product takes the last two axes as they lie, in either order."""
    rows, columns = layout.shape[-2:]
    down, across = layout.strides[-2:]
    return layout.contiguous or (across == 1 and down >= columns) or (down == 1 and across >= rows)


def ready(x: Tensor, transposed: bool = True) -> Tensor:
    """The tensor, copied where a product does not take it, or not in the order in which it is written."""
    if x.aligned and _fits(x.layout) and (transposed or not stored(x.layout).transposed):
        return x
    return converted(x, x.kind)


@functools.lru_cache(1 << 14)
def stored(layout: Layout) -> _Stored:
    """How a product takes a tensor's last two axes."""
    columns, axes = layout.shape[-1], len(layout.shape)
    down, across = layout.strides[-2:]
    transposed = not layout.contiguous and not (across == 1 and down >= columns)
    shape, strides = layout.shape, layout.strides
    if transposed:
        shape, strides = ((*v[:-2], v[-1], v[-2]) for v in (shape, strides))
    wanted = compact_strides(shape)
    odd = [s if s != w and e > 1 else 0 for s, w, e in zip(strides, wanted, shape, strict=True)]
    return _Stored(shape, strides, transposed, odd[-2], odd[0] if axes == 3 else 0)


def product(
    a: Tensor, b: Tensor, kind: ElementKind, scale: float = 1.0, bias: Tensor | None = None, *, early: bool = False
) -> Tensor:
    """The product scale * a @ b (+ bias) for a [m, k] or [batch, m, k], b [k, n] or [batch, k, n]; no gradients."""
    return sum_of_products(((a, b),), (scale,), kind, bias, early=early)


def sum_of_products(
    pairs: Sequence[tuple[Tensor, Tensor]],
    scales: Sequence[float],
    kind: ElementKind,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    early: bool = False,
    late: bool = False,
) -> Tensor:
    """The sum of scale * a @ b over pairs of matrices (+ bias) (+ residual), one launch, one rounding; no gradients.

    One pair may be of batches. Each a is [m, k] and each b [k, n], with a k of its own; ``residual`` is a contiguous
    tensor like the result. The result of an ``early`` sum is the last a of the ``late`` one that is launched next, of
    nothing else that is newer, and which may begin before that ends; or what is launched next takes nothing of it.
    """
    operands = [ready(x) for pair in pairs for x in pair]
    added = [compact(x) for x in (bias, residual) if x is not None]
    prepared, layout = prepared_sum(operands, scales, kind, bias, residual, early=early, late=late)
    out = of_layout(layout, operands[0].device)
    run_prepared(prepared, (out, *operands, *added))
    return out


def prepared_sum(
    operands: Sequence[Tensor],
    scales: Sequence[float],
    kind: ElementKind,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    early: bool = False,
    late: bool = False,
    beside: int = 0,
) -> tuple[Prepared, Layout]:
    """What `sum_of_products` launches and the result's layout, for pairs one after the other, each `ready`.

    The launch after an ``early`` one leaves it so many multiprocessors as ``beside`` says, if any.
    """
    kinds = (bias is None or bias.kind, residual is None or residual.kind)
    ordinal = operands[0].device.ordinal
    key = ("sum of products", kind, *kinds, *scales, early, late, beside, ordinal, *[x.layout for x in operands])
    return kept(key) or _keep_sum(key, operands, tuple(scales), kind, bias, residual, early, late, beside)


def _keep_sum(
    key: tuple, operands: Sequence[Tensor], scales: tuple[float, ...], kind: ElementKind, bias: Tensor | None,
    residual: Tensor | None, early: bool, late: bool, beside: int,
) -> tuple[Prepared, Layout]:  # fmt: skip
    """The plan, and the result's layout."""
    pairs = list(zip(operands[0::2], operands[1::2], strict=True))
    first, second = pairs[0]
    batch = next((x.shape[0] for x in (first, second) if x.ndim == 3), None)
    m, n = first.shape[-2], second.shape[-1]
    taken = [(stored(a.layout), stored(b.layout)) for a, b in pairs]
    segments = tuple(
        Segment(
            a.shape[-1], left.letter + right.letter, a.kind, b.kind, left.stride, right.stride,
            left.batch_stride, right.batch_stride, batch is not None and a.ndim == 2, batch is not None and b.ndim == 2,
            late=late and number == len(pairs) - 1,
        )
        for number, ((a, b), (left, right)) in enumerate(zip(pairs, taken, strict=True))
    )  # fmt: skip
    steps = () if bias is None else (Bias(bias.kind),)
    steps = steps if residual is None else (*steps, Residual(residual.kind))
    descriptor = SegmentedMatmulDescriptor(m, n, segments, kind, batch, steps, early=early, beside=beside)
    plan = SegmentedMatmulPlan.select(None, descriptor, device=first.device)
    out = empty((m, n) if batch is None else (batch, m, n), kind, first.device)
    sources = [how.view(x) for how, x in zip((s for pair in taken for s in pair), operands, strict=True)]
    sources += [compact(x) for x in (bias, residual) if x is not None]
    count = 2 * len(pairs)

    def make(result: TensorMut, *refs: TensorRef) -> SegmentedMatmulArgs:
        factors = list(zip(refs[0:count:2], refs[1:count:2], strict=True))
        return SegmentedMatmulArgs(result, factors, scales, refs[count:])

    return keep(key, plan, [out], sources, make, out.layout)


def flipped(x: Tensor) -> Tensor:
    """The last two axes exchanged, without gradients."""
    return Tensor(x.storage, _flipped(x.layout), x.offset)


@functools.lru_cache(1 << 14)
def _flipped(layout: Layout) -> Layout:
    shape, strides = ((*v[:-2], v[-1], v[-2]) for v in (layout.shape, layout.strides))
    return layout_of(shape, layout.kind, strides)


def matmul(a: Tensor, b: Tensor, scale: float = 1.0) -> Tensor:
    """The product over a's last and b's last but one axis, times a number that costs nothing.

    Axes before are a batch, which repeats where it is 1. One-dimensional operands are a row, or a column, as in NumPy.
    Raises RefusedInput where extents differ.
    """
    if not a.shape or not b.shape:
        raise RefusedInput(
            f"matmul: shapes {a.shape} and {b.shape}, wanted an axis or more each; use mul for single numbers"
        )
    if a.ndim == 1:
        return views.squeeze(matmul(views.unsqueeze(a, 0), b, scale), -2 if b.ndim > 1 else 0)
    if b.ndim == 1:
        return views.squeeze(matmul(a, views.unsqueeze(b, 1), scale), -1)
    if a.shape[-1] != b.shape[-2]:
        raise RefusedInput(
            f"matmul: {a.shape} @ {b.shape}, wanted the first one's last extent, {a.shape[-1]}, as the "
            "second one's last but one; transpose or reshape one"
        )
    if b.ndim == 2:
        out = _product_op("matmul", views.reshape(a, _rows(a), a.shape[-1]) if a.ndim != 2 else a, b, scale)
        return out if a.ndim == 2 else views.reshape(out, *a.shape[:-1], b.shape[1])
    batch = broadcast_shape("matmul", [a.shape[:-2], b.shape[:-2]])
    flat = []
    for x in (a, b):
        x = x if x.shape[:-2] == batch else views.expand(x, *batch, *x.shape[-2:])
        flat.append(x if x.ndim == 3 else views.reshape(x, math.prod(batch), *x.shape[-2:]))
    out = _product_op("matmul", *flat, scale)
    return out if len(batch) == 1 else views.reshape(out, *batch, *out.shape[-2:])


def _rows(x: Tensor) -> int:
    return math.prod(x.shape[:-1])


def bmm(a: Tensor, b: Tensor, scale: float = 1.0) -> Tensor:
    """Products of a batch, times a number: [batch, m, k] @ [batch, k, n]."""
    if a.ndim != 3 or b.ndim != 3 or a.shape[0] != b.shape[0] or a.shape[2] != b.shape[1]:
        raise RefusedInput(
            f"bmm: {a.shape} @ {b.shape}, wanted [batch, m, k] and [batch, k, n]; use matmul to broadcast"
        )
    return _product_op("bmm", a, b, scale)


def _product_op(name: str, a: Tensor, b: Tensor, scale: float) -> Tensor:
    same_device(name, (a, b))
    kind = pointwise.result_kind(name, (a, b))
    left, right = a.detach(), b.detach()
    out = product(left, right, kind, scale)
    if not autograd.wanted((a, b)):
        return out

    def pull(g: Tensor, edges: Sequence[autograd.Node | None]) -> list[Tensor | None]:
        d_a = product(g, flipped(right), edges[0].kind, scale) if edges[0] else None
        d_b = product(flipped(left), g, edges[1].kind, scale) if edges[1] else None
        return [d_a, d_b]

    return autograd.record(name, out, (a, b), (left, right), pull)


def matrix_of(x: Tensor, columns: int) -> Tensor:
    """A tensor as a matrix of its last axis, for what records no gradients itself."""
    return x if len(x.shape) == 2 else shaped(compact(x), (_rows(x), columns))


def like_rows(x: Tensor | None, columns: int) -> Tensor | None:
    """A term of a product's result, as a matrix that lies as products read it; None stays None."""
    if x is None:
        return None
    x = matrix_of(x, columns)
    return x if x.contiguous_ and x.aligned else converted(x, x.kind)


def check_linear(
    name: str,
    x: Tensor | Layout,
    weight: Tensor | Layout,
    bias: Tensor | Layout | None,
    residual: Tensor | Layout | None = None,
) -> Shape:
    """The result's shape. Raises RefusedInput where operands of a linear layer do not fit."""
    if len(weight.shape) != 2 or not x.shape or x.shape[-1] != weight.shape[1]:
        raise RefusedInput(
            f"{name}: x {x.shape} and weight {weight.shape}, wanted [..., in] and [out, in]; transpose or reshape one"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise RefusedInput(f"{name}: bias {bias.shape}, wanted {weight.shape[:1]}; give the layer's own")
    shape = (*x.shape[:-1], weight.shape[0])
    if residual is not None and residual.shape != shape:
        raise RefusedInput(
            f"{name}: residual {residual.shape}, wanted the result's shape, {shape}; expand or reshape it"
        )
    return shape


def bias_gradient(g: Tensor, kind: ElementKind) -> Tensor:
    """The sum over rows."""
    return reduce(Reduction.SUM, ITSELF, (compact(g),), (0,), g.shape[1:], kind)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """A linear layer, x @ weight.T + bias (+ residual): [..., in] and [out, in] -> [..., out], one launch."""
    shape = check_linear("linear", x, weight, bias, residual)
    inputs = tuple([part for part in (x, weight, bias, residual) if part is not None])
    same_device("linear", inputs)
    rows, matrix = matrix_of(x, weight.shape[1]), weight.detach()
    kind = pointwise.result_kind("linear", (x, weight))
    own, more = None if bias is None else bias.detach(), like_rows(residual, weight.shape[0])
    out = result_of_shape(sum_of_products(((rows, flipped(matrix)),), (1.0,), kind, own, more), shape)
    if not autograd.wanted(inputs):
        return out

    def pull(g: Tensor, edges: Sequence[autograd.Node | None], already: Tensor | None) -> list[Tensor | None]:
        whole, g, d_x = g, matrix_of(g, matrix.shape[0]), None
        if edges[0]:
            d_x = sum_of_products(((g, matrix),), (1.0,), edges[0].kind, None, like_rows(already, matrix.shape[1]))
            d_x = result_of_shape(d_x, x_shape)
        d_weight = product(flipped(g), rows, edges[1].kind) if edges[1] else None
        return [d_x, d_weight, *added_gradients(whole, g, edges[2:], own is not None)]

    x_shape = x.shape
    return autograd.record("linear", out, inputs, (rows, matrix), pull, adds=True)


def added_gradients(
    whole: Tensor, g: Tensor, edges: Sequence[autograd.Node | None], biased: bool
) -> list[Tensor | None]:
    """Those of a linear layer's bias, if it has one, and of what is added to its result; g is ``whole`` as a matrix."""
    found = [bias_gradient(g, edges[0].kind) if edges[0] else None] if biased else []
    return [*found, *(whole for _ in edges[biased:])]
