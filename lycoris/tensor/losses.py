"""Losses as single numbers in fp32: of pairs of elements, of classes, and of classes without their logits in memory."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from lycoris.errors import RefusedInput
from lycoris.tensor import autograd, products, rows, views
from lycoris.tensor.launch import F32, compact, compute, empty, reduce, same_device, zeros
from lycoris.tensor.tensor import FLOATS, Tensor
from plans import expression, loss
from plans.core import ElementKind
from plans.expression import Expr, leaf
from plans.reduction import Reduction


def mse_loss(x: Tensor, target: Tensor) -> Tensor:
    """mean((x - target)^2)."""
    return _pairwise("mse", x, target)


def l1_loss(x: Tensor, target: Tensor) -> Tensor:
    """mean(|x - target|)."""
    return _pairwise("l1", x, target)


def huber_loss(x: Tensor, target: Tensor, delta: float = 1.0) -> Tensor:
    """The mean of d^2 / 2 where the distance d is at most delta, else of delta (d - delta / 2)."""
    return _pairwise("huber", x, target, (float(delta),))


def bce_with_logits_loss(x: Tensor, target: Tensor) -> Tensor:
    """Mean binary cross-entropy of logits x with targets in [0, 1]; it does not overflow."""
    return _pairwise("bce_with_logits", x, target)


@functools.cache
def _formula(name: str, options: tuple[float, ...]) -> Expr:
    return loss.PAIRWISE[name](leaf(0), leaf(1), *options)


def _pairwise(name: str, x: Tensor, target: Tensor, options: tuple[float, ...] = ()) -> Tensor:
    """The mean of a loss over all elements, in one pass; the gradients are one kernel each."""
    if x.shape != target.shape or x.kind not in FLOATS or target.kind not in FLOATS:
        raise RefusedInput(
            f"{name}: {x.kind.value} {x.shape} and {target.kind.value} {target.shape}, wanted floats of one shape; "
            "reshape or convert one of them"
        )
    if not x.size:
        raise RefusedInput(
            f"{name}: a tensor of shape {x.shape} has no element, so there is no mean; skip what is empty"
        )
    same_device(name, (x, target))
    expr, scale = _formula(name, options), 1 / x.size
    pair = (compact(x.detach()), compact(target.detach()))
    out = reduce(Reduction.SUM, expr, pair, tuple(range(x.ndim)), (), F32, scale)
    if not autograd.wanted((x, target)):
        return out

    def pull(g: Tensor, edges: Sequence[autograd.Node | None]) -> list[Tensor | None]:
        return [_slope(expr, number, pair, g, scale, edge.kind) if edge else None for number, edge in enumerate(edges)]

    return autograd.record(name, out, (x, target), pair, pull)


@functools.cache
def _derivative(expr: Expr, number: int) -> Expr:
    return expression.gradients([expr], [leaf(2) * leaf(3)], [leaf(number)])[0]


def _slope(expr: Expr, number: int, pair: tuple[Tensor, Tensor], g: Tensor, scale: float, kind: ElementKind) -> Tensor:
    out = empty(pair[0].shape, kind, g.device)
    compute((_derivative(expr, number),), (*pair, g), (scale,), out)
    return out


def cross_entropy_loss(logits: Tensor, target: Tensor) -> Tensor:
    """The mean over rows of -log softmax(logits)[target]; rows whose target is no class count with 0.

    logits [..., classes], target [...] of i32 or i64.
    """
    return rows.cross_entropy(logits, target).mean()


def linear_cross_entropy(
    x: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None, chunk: int = 1024
) -> Tensor:
    """cross_entropy_loss(linear(x, weight, bias), target) in chunks of rows, so that all logits are never in memory.

    The gradients of a chunk are computed with its loss, while its logits are there. x [..., in], weight [classes, in],
    target [...]. Raises RefusedInput where shapes do not fit.
    """
    products.check_linear("linear_cross_entropy", x, weight, bias)
    if target.shape != x.shape[:-1] or chunk < 1:
        raise RefusedInput(
            f"linear_cross_entropy: target {target.shape} and chunk {chunk}, wanted {x.shape[:-1]} and 1 up; "
            "give each row a class"
        )
    inputs = (x, weight) if bias is None else (x, weight, bias)
    same_device("linear_cross_entropy", (*inputs, target))
    matrix, classes = products.matrix_of(x.detach(), weight.shape[1]), compact(target.detach())
    classes = views.reshape(classes, matrix.shape[0])
    if not matrix.shape[0]:
        raise RefusedInput(
            f"linear_cross_entropy: x of shape {x.shape} has no row, so there is no mean; skip what is empty"
        )
    tracked = autograd.wanted(inputs)
    found = _Chunks(
        matrix, weight.detach(), None if bias is None else bias.detach(), [t.requires_grad and tracked for t in inputs]
    )
    out = found.loss(classes, chunk)
    if not tracked:
        return out
    shape = x.shape

    def pull(g: Tensor, edges: Sequence[autograd.Node | None]) -> list[Tensor | None]:
        parts = [
            None if edge is None else (part * g).to(edge.kind)
            for part, edge in zip(found.gradients, edges, strict=True)
        ]
        return [None if parts[0] is None else views.reshape(parts[0], shape), *parts[1:]]

    return autograd.record("linear_cross_entropy", out, inputs, (), pull)


class _Chunks:
    """The loss over chunks of rows, and the gradients of those of (x, weight, bias) that are wanted, for d_loss = 1."""

    def __init__(self, x: Tensor, weight: Tensor, bias: Tensor | None, wanted: Sequence[bool]) -> None:
        self.x, self.weight, self.bias, self.wanted = x, weight, bias, wanted
        made = (x.shape, x.kind), (weight.shape, F32), (weight.shape[:1], F32)
        self.gradients = [
            zeros(*shape_kind, x.device) if flag else None for shape_kind, flag in zip(made, wanted, strict=False)
        ]

    def loss(self, classes: Tensor, chunk: int) -> Tensor:
        """The mean loss."""
        count = self.x.shape[0]
        total = zeros((), F32, self.x.device)
        with autograd.no_grad():
            for start in range(0, count, chunk):
                length = min(chunk, count - start)
                part, picked = views.narrow(self.x, 0, start, length), views.narrow(classes, 0, start, length)
                logits = products.linear(part, self.weight, self.bias).requires_grad_(any(self.wanted))
                with autograd.enable_grad():
                    summed = rows.cross_entropy(logits, picked).sum() * (1 / count)
                total.add_(summed.detach())
                if any(self.wanted):
                    (g,) = autograd.grad(summed, [logits])
                    self._add(g.to(self.x.kind), part, start, length)
        return total

    def _add(self, g: Tensor, part: Tensor, start: int, length: int) -> None:
        d_x, d_weight, *d_bias = self.gradients
        if d_x is not None:
            views.narrow(d_x, 0, start, length).copy_(products.matmul(g, self.weight))
        if d_weight is not None:
            d_weight.add_(products.product(g.t(), part, F32))
        if d_bias and d_bias[0] is not None:
            d_bias[0].add_(g.sum(0, kind=F32))
