"""Softmax and log-softmax over the last axis, with their gradients, as recipes over rows.

softmax(x)_j = exp(x_j - max x) / sum_k exp(x_k - max x); the gradients take the results, not the arguments.
"""

from __future__ import annotations

import math

from plans.core import OpCategory
from plans.rows import Recipe, symbols

_one = symbols(full=1, stages=2)
_x, (_top, _total) = _one.full[0], _one.stages
_two = symbols(full=2, stages=1)
(_y, _g), (_sum,) = _two.full, _two.stages

# exp(d) as 2^(d log2 e): the rounding of the product costs no more than that of the difference d.
_power = ((_x - _top) * math.log2(math.e)).exp2()
_STAGES = (("max", _x), ("sum", _power))

SOFTMAX = Recipe(
    "softmax", OpCategory.SOFTMAX, full=("x",), stages=_STAGES, outputs=(("y", _power * _total.reciprocal()),)
)
"""x -> y."""

SOFTMAX_BACKWARD = Recipe(
    "softmax backward", OpCategory.SOFTMAX, full=("y", "d_y"), stages=(("sum", _y * _g),),
    outputs=(("d_x", _y * (_g - _sum)),),
)  # fmt: skip
"""y, d_y -> d_x = y (d_y - sum(y d_y))."""

LOG_SOFTMAX = Recipe(
    "log softmax", OpCategory.SOFTMAX, full=("x",), stages=_STAGES, outputs=(("y", _x - _top - _total.log()),)
)
"""x -> y, the logarithm of softmax(x)."""

LOG_SOFTMAX_BACKWARD = Recipe(
    "log softmax backward", OpCategory.SOFTMAX, full=("y", "d_y"), stages=(("sum", _g),),
    outputs=(("d_x", _g - _y.exp() * _sum),),
)  # fmt: skip
"""y, d_y -> d_x = d_y - exp(y) sum(d_y)."""
