"""Settled merges: results next to ties, of terms that cancel, on the least exact tensor core, keep the golden rule."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import tensor_core_model
from golden import assert_golden
from settled_trials import CORES, FAMILIES, trial
from weight_cases import BF16, F16, F32, Inputs, Placed, Shape, describe, poisoned_workspace, run, select

from kernels import tensor_core
from kernels.target import SIMULATOR
from kernels.weight.low_rank_tile import Product
from plans.core import Device
from plans.core.precision import round_to
from plans.weight import (
    Dense,
    GroupedWeightArgs,
    GroupedWeightDescriptor,
    GroupedWeightPlan,
    Hadamard,
    Kronecker,
    LowRank,
    Sink,
    WeightDescriptor,
)
from plans.weight.cluster import CLUSTER
from plans.weight.tile import MMA, settles, tile_of

SHAPE = Shape(2, 5, 12, 8)


@pytest.fixture(autouse=True)
def _least_exact_tensor_core(monkeypatch):
    monkeypatch.setattr(tensor_core, "accumulate", tensor_core_model.accumulate)


def low_rank(rank, left=BF16, right=None):
    return LowRank(rank, left, right or left)


# Every source with products, every way to multiply: one step and several, parts, both instructions, factors not held.
SOURCES = {
    "locon r4": (low_rank(4),),
    "locon r16 f32": (low_rank(16, F32),),
    "locon r17": (low_rank(17),),
    "locon r40 mixed": (low_rank(40, F32, BF16),),
    "locon r64": (low_rank(64),),
    "locon r64 f16": (low_rank(64, F16),),
    "locon r96 f32": (low_rank(96, F32),),
    "loha r20": (Hadamard(low_rank(20), low_rank(20, F16, BF16)),),
    "loha r64": (Hadamard(low_rank(64), low_rank(64)),),
    "lokr r18": (Kronecker(SHAPE.a, SHAPE.b, SHAPE.c, SHAPE.d, BF16, low_rank(18)),),
    "two locons and a lokr": (low_rank(33), low_rank(5, F16), Kronecker(2, 5, 12, 8, F16, BF16)),
    "locon and a difference": (low_rank(32), Dense(F32)),
}


def cancelling(descriptor: WeightDescriptor, rng: np.random.Generator) -> Inputs:
    """Factors whose products nearly cancel: each step has a large one, which the next takes back, and fifteen that are
    too small to be kept whole beside it.
    """
    inputs = Inputs.random(descriptor, rng)
    for operands, factors in zip(descriptor.source_operands, inputs.factors, strict=True):
        for operand, values in zip(operands, factors, strict=True):
            if operand.name.endswith("left"):
                rank, size = np.arange(values.shape[1]), rng.uniform(1, 2, values.shape)
                large, small = size * (-1.0) ** (rank // 16), size * 2.0 ** -rng.integers(8, 14, values.shape)
                values[...] = round_to(np.where(rank % 16, small, large), operand.element)
            elif operand.name.endswith("right"):
                values[...] = round_to(rng.uniform(1, 2, values.shape), operand.element)
    inputs.scales[:] = [float(scale) for scale in rng.uniform(0.25, 1.0, len(inputs.scales)).astype(np.float32)]
    return inputs


def place_on_ties(
    descriptor: WeightDescriptor, inputs: Inputs, rng: np.random.Generator, largest: float, farthest: float
) -> None:
    """A base that puts results next to ties: of sizes up to 2**largest, at distances up to 2**farthest of the terms."""
    shape = inputs.base.shape
    inputs.base[...] = 0
    delta, terms = inputs.reference(dataclasses.replace(descriptor, sink=Sink.MERGE, magnitude=None))
    result = terms * 2.0 ** rng.uniform(-14, largest, shape) * rng.choice([-1.0, 1.0], shape)
    rounded = round_to(result, descriptor.out).astype(np.float64)
    mantissa, exponent = np.frexp(np.where(rounded == 0, 1.0, rounded))
    bits = {BF16: 8, F16: 11, F32: 24}[descriptor.out]
    tie = rounded + np.ldexp(0.5, exponent - bits) * np.sign(mantissa)
    distance = terms * 2.0 ** rng.uniform(-28, farthest, shape) * rng.choice([-1.0, 1.0], shape)
    inputs.base[...] = round_to(tie + distance - delta, descriptor.base)


def placed(sources, out, rng, sink=Sink.MERGE, base=F32, largest=2, farthest=-18):
    descriptor = dataclasses.replace(describe(SHAPE, sources, out, sink, base=base), settled=True)
    inputs = cancelling(descriptor, rng)
    if descriptor.base is None:
        return descriptor, dataclasses.replace(inputs, base=None)
    place_on_ties(descriptor, inputs, rng, largest, farthest)
    return descriptor, inputs


def check(descriptor, inputs, values):
    exact, _ = inputs.reference(descriptor)
    base = np.zeros(descriptor.shape) if inputs.base is None else inputs.base
    assert_golden(values, exact, base, descriptor.out.values)


@pytest.mark.parametrize("out", [BF16, F16, F32], ids=lambda kind: kind.value)
@pytest.mark.parametrize("name", SOURCES)
def test_results_next_to_ties(device, rng, name, out):
    descriptor, inputs = placed(SOURCES[name], out, rng)
    outcome = run(descriptor, MMA, inputs, device)
    assert outcome.guarantee.settled
    check(descriptor, inputs, outcome.values)


@pytest.mark.parametrize(
    ("name", "kind"), [(name, (BF16, F16)[i % 2]) for i, name in enumerate(SOURCES)], ids=lambda value: str(value)
)
def test_bases_and_deltas_of_16_bits(device, rng, name, kind):
    for sink in (Sink.MERGE, Sink.DELTA):
        descriptor, inputs = placed(SOURCES[name], kind, rng, sink, base=kind)
        check(descriptor, inputs, run(descriptor, MMA, inputs, device).values)


@pytest.mark.skipif(not SIMULATOR, reason="the model takes the place of the simulator's tensor core")
def test_without_settling_they_break_the_rule(device, rng):
    with pytest.raises(AssertionError, match="values are wrong"):
        for _ in range(3):
            descriptor, inputs = placed(SOURCES["locon r64"], BF16, rng, largest=-8, farthest=-24)
            unsettled = dataclasses.replace(descriptor, settled=False)
            check(descriptor, inputs, run(unsettled, MMA, inputs, device).values)


@pytest.mark.skipif(Device.open().arch < (9, 0), reason="clusters are sm_90's")
@pytest.mark.parametrize("sku", [MMA, CLUSTER], ids=lambda sku: sku.name)
@pytest.mark.parametrize("name", ["locon r64", "loha r20"])
def test_dora(device, rng, name, sku):
    descriptor, inputs = placed(SOURCES[name], BF16, rng, Sink.DORA_ROW, base=BF16)
    check(descriptor, inputs, run(descriptor, sku, inputs, device).values)


def test_in_place_and_in_a_group(device, rng):
    descriptor, inputs = placed(SOURCES["locon r64"], BF16, rng, base=BF16)
    alone, among = (Placed.of(descriptor, inputs, device, in_place=True) for _ in range(2))
    plan, stream = select(descriptor, MMA, device), device.stream()
    plan.run(stream, poisoned_workspace(plan, device), alone.args)
    group = GroupedWeightPlan.select(None, GroupedWeightDescriptor((descriptor,)), device=device)
    args = GroupedWeightArgs([among.args], device.allocate(group.table_size(), stream))
    group.upload(stream, args)
    group.run(stream, poisoned_workspace(group, device), args)
    device.synchronize(stream)
    for result in (alone, among):
        check(descriptor, inputs, result.outcome(plan.precision_guarantee).values)


def test_what_is_not_finite_stays_where_it_is(device, rng):
    """A factor's infinity in one row leaves the others alone; the flag is raised."""
    descriptor = dataclasses.replace(describe(SHAPE, SOURCES["locon r17"], BF16, check_finite=True), settled=True)
    inputs = Inputs.random(descriptor, rng)
    inputs.factors[0][0][3, 2] = float("inf")
    outcome = run(descriptor, MMA, inputs, device)
    assert outcome.not_finite == 1
    others = np.arange(descriptor.out_features) != 3
    assert np.isfinite(outcome.values[others].astype(np.float32)).all()
    assert not np.isfinite(outcome.values[3].astype(np.float32)).any()


def test_only_sums_are_settled():
    whole = Kronecker(SHAPE.a, SHAPE.b, SHAPE.c, SHAPE.d, BF16, BF16)
    for sources, wanted in (((whole,), False), ((Dense(F32),), False), ((whole, whole), True), ((low_rank(1),), True)):
        descriptor = dataclasses.replace(describe(SHAPE, sources, BF16), settled=True)
        assert settles(descriptor) is tile_of(descriptor).settled is wanted
        assert MMA.guarantee(descriptor).settled is wanted


def test_contracted_factors_are_not_promised():
    tucker = LowRank(3, BF16, BF16, core=BF16, core_rank=2)
    descriptor = dataclasses.replace(describe(SHAPE, (tucker,), BF16), settled=True)
    assert settles(descriptor) and not MMA.guarantee(descriptor).settled


@pytest.mark.parametrize("steps", [1, 2, 4, 16])
@pytest.mark.parametrize("family", ["normal", "below what is kept", "any exponents"])
def test_the_bound_on_a_sum_holds(rng, steps, family):
    """Product.error against the model, steps from zero and added up in fp32."""
    m, n = 64, 32
    a, b = rng.standard_normal((m, 16 * steps)), rng.standard_normal((16 * steps, n))
    if family == "below what is kept":
        a = np.abs(a) * np.where(np.arange(16 * steps) % 16, 2.0 ** -rng.integers(7, 12, a.shape), 1.0)
        b = np.abs(b)
    elif family == "any exponents":
        a, b = a * 2.0 ** rng.integers(-9, 10, a.shape), b * 2.0 ** rng.integers(-9, 10, b.shape)
    a, b = (round_to(x, BF16).astype(np.float32) for x in (a, b))
    total, size = np.zeros((m, n), np.float32), np.zeros((m, n), np.float32)
    for k in range(0, 16 * steps, 16):
        total = total + tensor_core_model.accumulate(a[:, k : k + 16], b[k : k + 16], np.zeros((m, n), np.float32))
        size = tensor_core_model.accumulate(abs(a[:, k : k + 16]), abs(b[k : k + 16]), size)
    exact = a.astype(np.float64) @ b.astype(np.float64)
    bound = Product("bf16", "bf16", steps, 1, True).error * size.astype(np.float64)
    assert (np.abs(total - exact) <= bound).all()


def test_trials(rng):
    """A sample of what settled_trials.py runs by the million."""
    error = Product("bf16", "bf16", 4, 8, True).error
    for family in map(FAMILIES.index, ("halves cancel", "below what is kept")):
        doubts, broken, plainly_broken, worst = trial(rng.integers(2**31), 5000, 64, family, CORES["sm_80"], error)
        assert broken == 0 and worst <= 1
        assert 0 < doubts < 5000 and plainly_broken > 0
