"""DoRA over a low-rank adapter, by rows of the weight, without the moved weight V = W + s U D: arXiv:2402.09353.

    y = c * (x V^T) + b,    c = m / (n + 2^-23),    n[o] = |V[o]|

The squares of V's rows are |W[o]|^2 + s (P + M) . U with P = W D^T and M = V D^T, [out, rank] both, and the gradients
of n through U and D are those of low-rank products too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from lycoris.tensor import autograd, pointwise
from lycoris.tensor.launch import ITSELF, compact, converted, reduce, same_device
from lycoris.tensor.low_rank import low_rank_linear, with_term
from lycoris.tensor.products import check_linear, flipped, product
from lycoris.tensor.tensor import Tensor
from plans.core import ElementKind
from plans.expression import leaf
from plans.reduction import Reduction

F32 = ElementKind.F32
_LEAST_NORM = 2.0**-23
"""What LyCORIS adds to norms (github.com/KohakuBlueleaf/LyCORIS, modules/base.py)."""


def decomposed_linear(
    x: Tensor,
    weight: Tensor,
    down: Tensor,
    up: Tensor,
    magnitude: Tensor,
    scale: float = 1.0,
    bias: Tensor | None = None,
) -> Tensor:
    """The layer c * (x @ V.T) + bias, V = weight + scale * up @ down, c = magnitude / (norms of V's rows + 2**-23).

    x [..., in], frozen weight [out, in], down [rank, in], up [out, rank] of one kind, magnitude [out] of any. The
    product is rounded to x's kind before c. Gradients for x, down, up and magnitude. Raises RefusedInput where shapes
    do not fit.
    """
    check_linear("decomposed_linear", x, weight, bias)
    inner = low_rank_linear(x, weight.detach(), down, up, scale)
    gain = magnitude.to(F32) / (row_norms(weight, down, up, scale) + _LEAST_NORM)
    if bias is None:
        return pointwise.apply(leaf(0) * leaf(1), (inner, gain), kind=x.kind)
    return pointwise.apply(leaf(0) * leaf(1) + leaf(2), (inner, gain, bias.detach()), kind=x.kind)


def row_norms(weight: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """The norms of the rows of weight + scale * up @ down, [out] in fp32, with gradients for down and up."""
    same_device("row_norms", (weight, down, up))
    matrix, low, high = weight.detach(), down.detach(), converted(up.detach(), up.kind)
    first = product(low, flipped(matrix), F32)
    moved = with_term(low, flipped(matrix), low, high, scale, F32, None)
    turned = compact(flipped(high))
    with autograd.no_grad():
        squares = reduce(Reduction.SUM, ITSELF * ITSELF, (compact(matrix),), (1,), (matrix.shape[0],), F32)
        cross = ((first + moved) * turned).sum(0) * scale
        norms = pointwise.apply(leaf(0) + leaf(1), (squares, cross)).clamp(0.0, math.inf).sqrt()
    if not autograd.wanted((down, up)):
        return norms

    def pull(g: Tensor, edges: Sequence[autograd.Node | None]) -> list[Tensor | None]:
        share = (g / norms.clamp(2.0**-60, math.inf)).reshape(1, -1)
        d_up = flipped(compact(moved * share * scale)) if edges[1] else None
        d_down = None
        if edges[0]:
            weighted = (turned * share * scale).to(high.kind)
            d_down = with_term(weighted, matrix, flipped(high), flipped(low), scale, edges[0].kind, None)
        return [d_down, d_up]

    return autograd.record("row_norms", norms, (down, up), (matrix, low, high), pull)
