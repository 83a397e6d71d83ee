"""The weight plan: adapters to deltas and merged weights, one rounding."""

from __future__ import annotations

from plans.core.plan import Plan
from plans.weight.kronecker import VECTOR
from plans.weight.portable import PORTABLE
from plans.weight.tile import MMA


class WeightPlan(Plan):
    """out = round(W + sum_i scale_i * source_i); see :class:`plans.weight.WeightDescriptor`."""

    name = "weight"
    skus = (VECTOR, MMA, PORTABLE)
