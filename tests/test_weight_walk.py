"""Kronecker products whose factored w2 a warp multiplies out in registers: ranks, kinds, walks, and what is refused."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from weight_cases import BF16, F16, F32, Inputs, Shape, assert_promised, describe, run

from plans.weight import Kronecker, LowRank, Sink, WeightPlan
from plans.weight.kronecker import VECTOR
from plans.weight.tile import MMA


def source(shape, rank, kind=BF16, w1=BF16, **more):
    return (Kronecker(shape.a, shape.b, shape.c, shape.d, w1, LowRank(rank, kind, kind, **more)),)


def check(device, rng, descriptor):
    inputs = Inputs.random(descriptor, rng)
    exact, magnitude = inputs.reference(descriptor)
    outcome = run(descriptor, VECTOR, inputs, device)
    assert_promised(outcome, exact, magnitude, descriptor.out)
    return inputs, outcome


# Even walks; rows of w2 that only several blocks side by side make whole; a last step that is not one; one block.
SHAPES = (
    Shape(2, 4, 16, 64),
    Shape(1, 16, 32, 24),
    Shape(3, 5, 16, 320),
    Shape(1, 1, 48, 64),
    Shape(1, 2, 16, 32, (2,)),
)


@pytest.mark.parametrize("sink", [Sink.MERGE, Sink.DELTA])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(device, rng, shape, sink):
    check(device, rng, describe(shape, source(shape, 16), BF16, sink))


@pytest.mark.parametrize("kind", [BF16, F16], ids=lambda kind: kind.value)
@pytest.mark.parametrize("rank", [1, 2, 4, 7, 12, 16, 17, 20, 24, 31, 32])
def test_ranks(device, rng, rank, kind):
    shape = Shape(1, 3, 16, 64)
    check(device, rng, describe(shape, source(shape, rank, kind), BF16))


@pytest.mark.parametrize("more", [{"left_transposed": True}, {"w1": F32}, {"w1": LowRank(2, F16, F32)}], ids=str)
@pytest.mark.parametrize("base", [BF16, F32], ids=lambda kind: kind.value)
def test_other_factors(device, rng, more, base):
    shape = Shape(2, 4, 16, 64)
    check(device, rng, describe(shape, source(shape, 16, F16, **more), F16, base=base))


def test_a_factor_that_is_not_finite_raises_the_flag(device, rng):
    shape = Shape(1, 2, 16, 64)
    descriptor = describe(shape, source(shape, 16), BF16, check_finite=True)
    inputs, outcome = check(device, rng, descriptor)
    assert outcome.not_finite == 0
    inputs.factors[0][2][3, 5] = np.inf
    assert run(descriptor, VECTOR, inputs, device).not_finite == 1


def test_large_weights_walk_but_not_deltas_and_settled_ones(device):
    shape = Shape(8, 8, 256, 256)
    descriptor = describe(shape, source(shape, 16), BF16)
    assert WeightPlan.select(None, descriptor, device=device).chosen is VECTOR
    delta = describe(shape, source(shape, 16), BF16, Sink.DELTA)
    assert WeightPlan.select(None, delta, device=device).chosen is MMA
    settled = dataclasses.replace(descriptor, settled=True)
    assert WeightPlan.select(None, settled, device=device).chosen is MMA
    small = Shape(8, 8, 64, 64)
    assert WeightPlan.select(None, describe(small, source(small, 16), BF16), device=device).chosen is MMA


@pytest.mark.parametrize(
    ("shape", "sources", "why"),
    [
        (Shape(2, 4, 24, 64), lambda s: source(s, 16), "wants w2, side by side"),
        (Shape(2, 3, 16, 8), lambda s: source(s, 16), "wants w2, side by side"),
        (Shape(2, 4, 16, 64), lambda s: source(s, 16, F32), "in bf16 or both in fp16, found f32 and f32"),
        (Shape(2, 4, 16, 64), lambda s: source(s, 0), "rank 1 to 32, found 0"),
        (Shape(2, 4, 16, 64), lambda s: source(s, 33), "rank 1 to 32, found 33"),
    ],
    ids=["rows", "columns", "kinds", "no rank", "rank"],
)
def test_refusals(shape, sources, why):
    assert why in VECTOR.refuses(describe(shape, sources(shape), BF16))
    assert not VECTOR.refuses(describe(Shape(2, 4, 16, 64), source(Shape(2, 4, 16, 64), 16), BF16))
