"""Random products: shape, layout, strengths, adapters, epilogue and technique drawn together, against float64."""

from __future__ import annotations

import numpy as np
import pytest
from matmul_cases import BF16, F32, assert_kept, gaussian, make, run

from kernels.target import SIMULATOR
from plans.core import BackendKind
from plans.matmul import (
    Activation,
    Bias,
    ColumnScale,
    Gate,
    LowRankTerm,
    Residual,
    RowScale,
    Segment,
    SegmentedMatmulDescriptor,
)

# Together a thousand on a GPU; in groups, so that workers share them.
GROUPS, CASES = (2, 16) if SIMULATOR else (8, 125)
EPILOGUES = (
    (),
    (Bias(),),
    (Bias(), Activation("gelu"), Residual()),
    (Gate("silu"),),
    (RowScale(F32), ColumnScale(F32), Activation("silu")),
    (Bias(), Gate("gelu", gate_first=False), Residual(F32)),
)
TECHNIQUES = (None, BackendKind.MMA, BackendKind.PORTABLE, BackendKind.SKINNY)
LARGEST = 40 if SIMULATOR else 400


def extent(rng: np.random.Generator, aligned: bool, largest: int) -> int:
    """From 1 to the largest, small ones as likely as large ones; aligned ones are multiples of 16."""
    found = int(np.exp(rng.uniform(0, np.log(largest))))
    return -(-found // 16) * 16 if aligned else found


def draw(rng: np.random.Generator) -> tuple[SegmentedMatmulDescriptor, tuple, tuple, BackendKind | None]:
    """A problem, the scales of its segments and low-rank terms, and the technique that is asked for."""
    technique = TECHNIQUES[rng.integers(len(TECHNIQUES))]
    skinny = technique is BackendKind.SKINNY
    aligned = skinny or bool(rng.integers(2))
    steps = EPILOGUES[rng.integers(len(EPILOGUES))]
    m = int(rng.integers(1, 17)) if skinny else extent(rng, aligned, LARGEST)
    n = extent(rng, aligned, LARGEST)
    n += n % 2 if any(step.gates for step in steps) else 0
    layout = "NT" if skinny else ("NT", "NT", "NN", "TN", "TT")[rng.integers(5)]
    segments = tuple(Segment(extent(rng, aligned, LARGEST), layout) for _ in range(rng.integers(1, 4)))
    terms: tuple[LowRankTerm, ...] = ()
    if skinny:
        terms = tuple(LowRankTerm(8 * int(rng.integers(1, 3))) for _ in range(rng.integers(3)))
    out = (BF16, F32)[rng.integers(2)]
    descriptor = SegmentedMatmulDescriptor(m, n, segments, out, None, steps, low_rank=terms)
    strengths = rng.uniform(-2, 2, len(segments) + len(terms)) * (rng.random(len(segments) + len(terms)) > 0.1)
    return descriptor, tuple(strengths[: len(segments)]), tuple(strengths[len(segments) :]), technique


@pytest.mark.parametrize("group", range(GROUPS))
def test_random_products(device, poisoned, rng, group):
    for _ in range(CASES):
        descriptor, scales, low_rank_scales, technique = draw(rng)
        problem = make(device, descriptor, gaussian(rng), scales, float(rng.normal()), low_rank_scales)
        plan = run(problem, poisoned, technique)
        try:
            assert_kept(problem, plan)
        except AssertionError as error:
            raise AssertionError(f"{descriptor}, scales {scales} and {low_rank_scales}, {technique}: {error}") from None
