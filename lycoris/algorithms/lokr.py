"""LoKr: Kronecker products of small weights, KronA, arXiv:2212.10650 and arXiv:2309.14859."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from lycoris.algorithms.initialise import Initialiser
from lycoris.algorithms.ranked import ModuleOptions, RankedModule
from lycoris.formats.shapes import Shape
from lycoris.ops.kronecker import factorization


@dataclass(frozen=True, kw_only=True)
class LoKrOptions(ModuleOptions):
    """Keyword arguments of LoKr's constructors, beside those of `ModuleOptions`.

    ``factor`` splits each channel axis, see `lycoris.ops.factorization`; -1 is the most square split.
    ``decompose_both`` factors w1 too, where the rank is less than half its larger extent. ``full_matrix`` factors
    neither, whatever the rank. ``unbalanced_factorization`` gives w1 the larger part of the output axis.
    """

    factor: int = -1
    decompose_both: bool = False
    full_matrix: bool = False
    unbalanced_factorization: bool = False


class LoKrModule(RankedModule):
    """delta = kron(w1, w2) over the channel axes: w1 [a, b], w2 [c, d, *kernel], O = a c, I = b d.

    w1 is full or lokr_w1_a [a, r] @ lokr_w1_b [r, b]; w2 is full, lokr_w2_a [c, r] @ lokr_w2_b [r, d * taps], or in
    Tucker form lokr_t2 [r, r, *kernel], lokr_w2_a [r, c], lokr_w2_b [r, d]. w2 is full where the rank is at least
    half its larger channel extent. With both halves full the scale is 1. w2, or w2_b, starts at zero; the others as
    torch.nn.Linear does.
    """

    algorithm = "lokr"
    scalar_factors = ("lokr_w1", "lokr_w1_a")
    options = LoKrOptions

    @classmethod
    def initial_factors(cls, shape: Shape, rank: int, options: LoKrOptions, fill: Initialiser) -> dict[str, np.ndarray]:
        """w1 or its factors, then w2 or its factors."""
        out, channels, *kernel = shape
        a, c = factorization(out, options.factor)
        if options.unbalanced_factorization:
            a, c = c, a
        b, d = factorization(channels, options.factor)
        last = fill.kaiming if options.use_scalar else fill.zeros
        if options.decompose_both and 2 * rank < max(a, b) and not options.full_matrix:
            w1 = {"lokr_w1_a": fill.kaiming((a, rank)), "lokr_w1_b": fill.kaiming((rank, b))}
        else:
            w1 = {"lokr_w1": fill.kaiming((a, b))}
        if options.full_matrix or 2 * rank >= max(c, d):
            return {**w1, "lokr_w2": last((c, d, *kernel))}
        if options.use_tucker and math.prod(kernel) != 1:
            factors = {"lokr_w2_a": fill.kaiming((rank, c)), "lokr_w2_b": last((rank, d))}
            return {**w1, **factors, "lokr_t2": fill.kaiming((rank, rank, *kernel))}
        return {**w1, "lokr_w2_a": fill.kaiming((c, rank)), "lokr_w2_b": last((rank, d * math.prod(kernel)))}
