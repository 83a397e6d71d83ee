"""Losses: cross-entropy over rows of logits as recipes, and losses of pairs of elements as expressions.

Cross-entropy of a row x with the class t: loss = log sum exp(x) - x_t; its gradient: (softmax(x) - onehot(t)) d_loss.
A class outside 0..n-1 is ignored: loss and gradient are 0. Classes are below 2**22, so that fp32 tells them apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from plans.core import OpCategory
from plans.expression import Expr, apply
from plans.rows import Recipe, symbols


def _power(x: Expr) -> Expr:
    """exp(x) as 2^(x log2 e)."""
    return (x * math.log2(math.e)).exp2()


def _known(target: Expr, inverse_n: Expr) -> Expr:
    """Whether a class is one of the n, to which the half leaves a distance that no rounding bridges."""
    return (target >= 0.0) * ((target + 0.5) * inverse_n < 1.0)


def _cross_entropy() -> Recipe:
    s = symbols(full=1, row=1, stages=2, picked=1)
    (x,), (target,), (at_target,), (top, total) = s.full, s.row, s.picked, s.stages
    loss = total.log() + (top - at_target)
    return Recipe(
        "cross entropy", OpCategory.LOSS, full=("x",), row=("target",), picked=(("x", "target"),),
        stages=(("max", x), ("sum", _power(x - top))),
        row_outputs=(
            ("loss", apply("where", _known(target, s.inverse_n), loss, 0.0)), ("lse", top + total.log()),
        ),
    )  # fmt: skip


def _cross_entropy_backward() -> Recipe:
    s = symbols(full=1, row=3)
    (x,), (target, lse, d_loss) = s.full, s.row
    d_x = (_power(x - lse) - apply("eq", s.position, target)) * d_loss
    return Recipe(
        "cross entropy backward", OpCategory.LOSS, full=("x",), row=("target", "lse", "d_loss"),
        outputs=(("d_x", apply("where", _known(target, s.inverse_n), d_x, 0.0)),),
    )  # fmt: skip


CROSS_ENTROPY, CROSS_ENTROPY_BACKWARD = _cross_entropy(), _cross_entropy_backward()
"""x, target -> loss, lse (log sum exp); x, target, lse, d_loss -> d_x."""


def _huber(x: Expr, y: Expr, delta: float = 1.0) -> Expr:
    distance = abs(x - y)
    return apply("where", distance > delta, (distance - 0.5 * delta) * delta, (x - y) ** 2 * 0.5)


PAIRWISE: dict[str, Callable[..., Expr]] = {
    "mse": lambda x, y: (x - y) ** 2,
    "l1": lambda x, y: abs(x - y),
    "huber": _huber,
    # log(1 + exp(-|x|)) does not overflow.
    "bce_with_logits": lambda x, y: x.relu() - x * y + ((-abs(x)).exp() + 1.0).log(),
}
"""Losses of a prediction x and a target y, element by element: squared, absolute, Huber's (quadratic up to delta), and
binary cross-entropy of logits x with targets y in [0, 1]."""
