"""LoHa: the elementwise product of two low-rank products, FedPara, arXiv:2108.06098."""

from __future__ import annotations

import math

import numpy as np

from lycoris.algorithms.initialise import Initialiser
from lycoris.algorithms.ranked import ModuleOptions, RankedModule
from lycoris.formats.shapes import Shape


class LoHaModule(RankedModule):
    """delta = (w1_a @ w1_b) * (w2_a @ w2_b), elementwise; Tucker: each side sum_ij t[i, j, ...] a[i, o] b[j, q].

    hada_w*_a [O, r], hada_w*_b [r, I * taps]; Tucker: hada_w*_a [r, O], hada_w*_b [r, I], hada_t* [r, r, *kernel].
    w2_a starts at zero, w*_b as N(0, 1), the others as N(0, 0.1^2).
    """

    algorithm = "loha"
    scalar_factors = ("hada_w1_a",)

    @classmethod
    def initial_factors(
        cls, shape: Shape, rank: int, options: ModuleOptions, fill: Initialiser
    ) -> dict[str, np.ndarray]:
        """a, b and, in the Tucker form, t, of w1 and then of w2."""
        out, channels, *kernel = shape
        tucker = options.use_tucker and math.prod(kernel) != 1
        a = (rank, out) if tucker else (out, rank)
        b = (rank, channels if tucker else channels * math.prod(kernel))
        factors: dict[str, np.ndarray] = {}
        for side in (1, 2):
            zero = side == 2 and not options.use_scalar
            factors[f"hada_w{side}_a"] = fill.zeros(a) if zero else fill.normal(a, 0.1)
            factors[f"hada_w{side}_b"] = fill.normal(b, 1.0)
            if tucker:
                factors[f"hada_t{side}"] = fill.normal((rank, rank, *kernel), 0.1)
        return factors
