"""What attention promises: two units of error, of weights and of scores, with where they come from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from plans.attention.descriptor import AttentionBackwardDescriptor, AttentionDescriptor
from plans.core.precision import ElementKind, MathPrecision, PrecisionGuarantee

ROUNDING = {ElementKind.BF16: 2.0**16, ElementKind.F16: 2.0**13, ElementKind.F32: 1.0}
"""Half of a kind's last place, as a part of the number where that is largest, in units of 2^-24."""


@dataclass(frozen=True)
class AttentionGuarantee(PrecisionGuarantee):
    """``rounding_units`` of the first magnitude and ``score_units`` of the second: see `descriptor.Exact`."""

    score_units: float = 0.0

    def bound(self, magnitude: np.ndarray) -> np.ndarray:
        """The largest error before the final rounding, for float64 magnitudes [2, ...]."""
        return 2.0**-24 * (self.rounding_units * magnitude[0] + self.score_units * magnitude[1])


def _made(precision: MathPrecision, units: float, score_units: float, derivation: str) -> AttentionGuarantee:
    return AttentionGuarantee(
        math_precision=precision,
        accumulator=ElementKind.F32,
        deterministic=True,
        bit_stable_on_same_hardware=True,
        rounding_units=units,
        derivation=derivation,
        score_units=score_units,
    )


def _score_units(descriptor: AttentionDescriptor) -> float:
    return 2.0 * descriptor.width + 12.0


def _weight_rounding(descriptor: AttentionDescriptor, precision: MathPrecision) -> float:
    return ROUNDING[descriptor.element] if precision is MathPrecision.BF16_TENSOR_CORE else 0.0


def forward_guarantee(precision: MathPrecision, columns: int, descriptor: AttentionDescriptor) -> AttentionGuarantee:
    """Of the result, for tiles of so many keys."""
    tiles = -(-descriptor.keys // columns)
    units = _weight_rounding(descriptor, precision) + 4.0 * descriptor.keys + 10.0 * tiles + 24.0
    return _made(
        precision,
        units,
        _score_units(descriptor),
        "weights rounded to the kind before their product on tensor cores; 2 units a key for the result's sum and for "
        "the weights' own; the power of two is 4 off, and every tile rescales both sums by one; scores: 2 units a term "
        "of the product, the factor and the shift some more",
    )


def backward_guarantee(
    precision: MathPrecision, columns: int, descriptor: AttentionBackwardDescriptor
) -> AttentionGuarantee:
    """Of the gradients; ``columns`` as for the result that they are of."""
    forward = descriptor.forward
    terms = max(forward.keys, forward.queries * forward.group)
    result = forward_guarantee(precision, columns, forward)
    units = ROUNDING[forward.element] + _weight_rounding(forward, precision) + result.rounding_units
    return _made(
        precision,
        units + 2.0 * terms + 4.0 * forward.width + 64.0,
        2.0 * result.score_units + 16.0,
        "delta is of the result as it was rounded, with the result's own error; P and dS are rounded before their "
        "products on tensor cores; 2 units a term of each of the three products; scores as for the result, twice, as "
        "the log-sum-exp has their errors too",
    )
