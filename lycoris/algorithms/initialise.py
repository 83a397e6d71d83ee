"""Initial values of factors, drawn on the host from a seeded generator; float32, rounded to the factor's kind later."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

Shape = Sequence[int]


class Initialiser:
    """Draws one factor after the other from ``numpy.random.default_rng(seed)``; None takes fresh entropy."""

    def __init__(self, seed: int | None = None) -> None:
        self._generator = np.random.default_rng(seed)

    def zeros(self, shape: Shape) -> np.ndarray:
        """0."""
        return np.zeros(shape, np.float32)

    def normal(self, shape: Shape, std: float) -> np.ndarray:
        """N(0, std^2)."""
        return np.float32(std) * self._generator.standard_normal(shape, np.float32)

    def kaiming(self, shape: Shape) -> np.ndarray:
        """Kaiming's uniform distribution with a = sqrt(5), as torch.nn.Linear has it: U(-1/sqrt(n), 1/sqrt(n)).

        n is the fan-in, the product of all extents but the first.
        """
        bound = 1 / math.sqrt(max(1, math.prod(shape[1:])))
        return self._generator.uniform(-bound, bound, shape).astype(np.float32)
