"""Gradients of a linear layer with a LoKr of few, wide blocks: those that one pass over g and x makes, and w2's beside.

    d_x = g W + back        back_m = s sum_l w1[l, m] (g_l w2)        d_w2 = sum_t,l g_tl^T inner_tl

g w2 is mixed, and multiplied by x for w1's gradient, where it is made. back is the residual of the base's product;
w2's gradient takes nothing of that, and is made beside it.
"""

from __future__ import annotations

from typing import NamedTuple

from lycoris.tensor.adapter_gradients import kronecker_back, kronecker_back_problem, long_sum, long_sum_problem
from lycoris.tensor.launch import shaped
from lycoris.tensor.products import prepared_sum, sum_of_products
from lycoris.tensor.tensor import Tensor
from plans.core import ElementKind


class WideGradients(NamedTuple):
    """Of x, w1 and w2; the last None where it is not made beside x's."""

    d_x: Tensor
    d_w1: Tensor
    d_w2: Tensor | None


def wide_gradients(
    g: Tensor, rows: Tensor, matrix: Tensor, factors: tuple[Tensor, Tensor], inner: Tensor, scale: float,
    kinds: tuple[ElementKind, ElementKind, ElementKind | None],
) -> WideGradients | None:  # fmt: skip
    """The gradients, of the asked-for kinds; None where there is no such pass, or it is not worth it.

    g [t, a * c], the layer's input ``rows`` [t, b * d], the base's ``matrix`` [a * c, b * d], w1 [a, b] and w2 [c, d],
    ``inner`` [t * a, d] the blocks of scale * x that w1 mixed, all contiguous. No kind for w2: no gradient.
    """
    (w1, w2), (of_x, of_w1, of_w2) = factors, kinds
    (a, _), (c, d), count = w1.shape, w2.shape, g.shape[0]
    problem = kronecker_back_problem(count, w1.shape, w2.shape, g.kind, of_w1, g.device)
    if problem is None:
        return None
    back, d_w1 = kronecker_back(problem, g, rows, w1, w2, scale)
    shape = (count * a, c, d, g.kind, of_w2, g.device)
    beside = of_w2 is not None and long_sum_problem(*shape, (0, 0.0)) is not None
    d_x = sum_of_products(((g, matrix),), (1.0,), of_x, None, back, early=beside)
    if not beside:
        return WideGradients(d_x, d_w1, None)
    spare = prepared_sum((g, matrix), (1.0,), of_x, None, back, early=True)[0].plan.program.spare()
    # What the product reads, back above all, is held here until this is launched, which may be given freed memory.
    d_w2 = long_sum(long_sum_problem(*shape, spare), shaped(g, (count * a, c)), inner)
    return WideGradients(d_x, d_w1, d_w2)
