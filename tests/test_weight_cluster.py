"""DoRA by row in one launch: clusters of every size, ragged bands and panels, in place, and what is left to others."""

from __future__ import annotations

import pytest
from weight_cases import (
    BF16,
    F16,
    F32,
    Inputs,
    Placed,
    Shape,
    assert_promised,
    describe,
    poisoned_workspace,
    run,
    select,
)

from plans.core import Device, PlanPreference
from plans.weight import Dense, Hadamard, LowRank, Sink, WeightDescriptor, WeightPlan
from plans.weight import cluster as cluster_plan
from plans.weight.cluster import CLUSTER, cluster_of, refuses, split_of
from plans.weight.portable import PORTABLE
from plans.weight.tile import MAX_GROUPS, MMA

pytestmark = pytest.mark.skipif(Device.open().arch < (9, 0), reason="clusters are sm_90's")

PANEL = 32 * MAX_GROUPS
ONE = (LowRank(16, BF16, BF16),)
MIXED = (Hadamard(LowRank(3, BF16, F16), LowRank(4, F32, BF16)), LowRank(5, F16, F16))


def dora(rows, columns, sources=ONE, **more):
    return describe(Shape(1, 1, rows, columns), sources, BF16, Sink.DORA_ROW, **more)


@pytest.mark.parametrize("sources", [ONE, MIXED], ids=["locon", "loha and locon"])
@pytest.mark.parametrize("panels", [1, 2, 5, 7, 8, 24])
@pytest.mark.parametrize("missing", [0, 8])
def test_every_split_of_the_columns(device, rng, sources, panels, missing):
    descriptor = dora(17, panels * PANEL - missing, sources)
    inputs = Inputs.random(descriptor, rng)
    exact, magnitude = inputs.reference(descriptor)
    assert_promised(run(descriptor, CLUSTER, inputs, device), exact, magnitude, BF16)


@pytest.mark.parametrize(("panels", "cluster"), [(1, 1), (2, 2), (5, 2), (7, 8), (8, 8), (24, 8)])
def test_few_blocks_of_a_cluster_have_nothing_to_do(panels, cluster):
    assert cluster_of(panels) == cluster


def test_teams_share_a_row_s_sums(device, rng, monkeypatch):
    descriptor = dora(19, 7 * PANEL)
    monkeypatch.setattr(cluster_plan, "TEAMS", (2,))
    split_of.cache_clear()
    assert split_of(descriptor).teams == 2
    inputs = Inputs.random(descriptor, rng)
    exact, magnitude = inputs.reference(descriptor)
    assert_promised(run(descriptor, CLUSTER, inputs, device), exact, magnitude, BF16)
    split_of.cache_clear()


def test_the_two_launches_for_other_devices_agree(device, rng):
    descriptor = dora(33, 3 * PANEL + 16)
    inputs = Inputs.random(descriptor, rng)
    exact, magnitude = inputs.reference(descriptor)
    for sku in (CLUSTER, MMA):
        assert_promised(run(descriptor, sku, inputs, device), exact, magnitude, BF16)


def test_the_result_may_take_the_base_s_place(device, rng):
    descriptor = dora(20, 8 * PANEL)
    inputs = Inputs.random(descriptor, rng)
    exact, magnitude = inputs.reference(descriptor)
    plan, placed = select(descriptor, CLUSTER, device), Placed.of(descriptor, inputs, device, in_place=True)
    stream = device.stream()
    plan.run(stream, poisoned_workspace(plan, device), placed.args)
    device.synchronize(stream)
    assert_promised(placed.outcome(plan.precision_guarantee), exact, magnitude, BF16)


def test_what_is_not_finite_raises_the_flag(device, rng):
    descriptor = dora(5, 2 * PANEL, check_finite=True)
    inputs = Inputs.random(descriptor, rng)
    assert run(descriptor, CLUSTER, inputs, device).not_finite == 0
    inputs.base[3, -1] = float("inf")
    assert run(descriptor, CLUSTER, inputs, device).not_finite == 1


def test_it_is_what_a_plan_takes_and_one_launch(device, rng):
    descriptor = dora(40, 4 * PANEL)
    plan = WeightPlan.select(None, descriptor, device=device)
    assert plan.chosen is CLUSTER and plan.workspace_size() == 0
    placed = Placed.of(descriptor, Inputs.random(descriptor, rng), device)
    assert len(plan.launches(placed.args, poisoned_workspace(plan, device))) == 1


@pytest.mark.parametrize(
    ("descriptor", "reason", "taken"),
    [
        (describe(Shape(1, 1, 16, 64), ONE, BF16), "computes DoRA by output row", MMA),
        (dora(16, 63), "wants in_features * kernel to be a multiple of 8", PORTABLE),
        (dora(16, 64, (Dense(F32),)), "wants low-rank products and products of two, found dense", MMA),
        (dora(0, 64), "an empty weight is left to the portable SKU", MMA),
        (dora(16, 1 << 20), "16 rows need more than 8 x 231424 bytes of shared memory", MMA),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_left_to_others(device, descriptor: WeightDescriptor, reason, taken):
    assert refuses(descriptor).startswith(reason)
    assert WeightPlan.choose(descriptor, PlanPreference(), device) is taken
