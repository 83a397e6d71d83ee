"""Weight tiles multiplied by warpgroups: ranks and kinds, edges of tiles, walks, groups, and what is left to others."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from weight_cases import BF16, F16, F32, Inputs, Shape, assert_promised, describe, run

from plans.core import Device, PlanPreference
from plans.weight import Dense, Hadamard, LowRank, Sink, WeightPlan
from plans.weight.tile import MMA, tile_of, walk_of
from plans.weight.wgmma import WGMMA, refuses

pytestmark = pytest.mark.skipif(Device.open().arch < (9, 0), reason="warpgroup products are sm_90's")


def linear(rows, columns, sources, settled=False, **more):
    return dataclasses.replace(describe(Shape(1, 1, rows, columns), sources, BF16, **more), settled=settled)


def loha(rank, kind):
    return (Hadamard(LowRank(rank, kind, kind), LowRank(rank, kind, kind)),)


SOURCES = {
    "locon r64": (LowRank(64, BF16, BF16),),
    "locon r40": (LowRank(40, BF16, BF16),),
    "locon r16 f32": (LowRank(16, F32, F32),),
    "locon r7 f16 f32": (LowRank(7, F16, F32),),
    "locon r32 f16": (LowRank(32, F16, F16),),
    "loha r64": loha(64, BF16),
    "loha r16 f32": loha(16, F32),
    "locon and loha": (LowRank(5, BF16, F32), *loha(18, F16)),
    "loha of unlike products": (Hadamard(LowRank(16, F16, F16), LowRank(37, BF16, F32)),),
}


@pytest.mark.parametrize("sources", SOURCES.values(), ids=SOURCES)
@pytest.mark.parametrize("edge", [0, -8, 8])
def test_one_tile_and_its_edges(device, rng, sources, edge):
    tile = tile_of(linear(1, 8, sources), wgmma=True)
    descriptor = linear(tile.rows + edge // 8, tile.columns + edge, sources, check_finite=True)
    inputs = Inputs.random(descriptor, rng)
    exact, magnitude = inputs.reference(descriptor)
    outcome = run(descriptor, WGMMA, inputs, device)
    assert_promised(outcome, exact, magnitude, BF16)
    assert outcome.not_finite == 0


@pytest.mark.parametrize("sink", [Sink.MERGE, Sink.DELTA])
def test_several_tiles(device, rng, sink):
    sources = SOURCES["loha r64"]
    tile = tile_of(linear(1, 8, sources), wgmma=True)
    descriptor = linear(3 * tile.rows, 2 * tile.columns, sources, sink=sink)
    inputs = Inputs.random(descriptor, rng)
    exact, magnitude = inputs.reference(descriptor)
    assert_promised(run(descriptor, WGMMA, inputs, device), exact, magnitude, BF16)


@pytest.mark.parametrize(
    ("column_tiles", "row_tiles", "at_once", "walk"),
    [(24, 96, 264, 9), (32, 112, 264, 14), (32, 112, 132, 28), (1, 1, 264, 1), (264, 7, 264, 7), (24, 96, 1 << 30, 1)],
)
def test_walks_leave_least_to_the_busiest(column_tiles, row_tiles, at_once, walk):
    assert walk_of(column_tiles, row_tiles, at_once) == walk


def test_what_is_not_finite_raises_the_flag(device, rng):
    descriptor = linear(20, 72, SOURCES["locon r64"], check_finite=True)
    inputs = Inputs.random(descriptor, rng)
    inputs.factors[0][1].reshape(-1)[-1] = np.inf
    assert run(descriptor, WGMMA, inputs, device).not_finite == 1


@pytest.mark.parametrize(
    ("descriptor", "reason"),
    [
        (linear(64, 63, SOURCES["loha r64"]), "wants in_features * kernel to be a multiple of 8"),
        (linear(64, 64, SOURCES["loha r64"], sink=Sink.DORA_ROW), "DoRA is computed by the cluster and mma SKUs"),
        (linear(64, 64, SOURCES["loha r64"], settled=True), "settled merges are computed by the mma SKU"),
        (linear(64, 64, (Dense(F32),)), "wants low-rank products and products of two, found dense"),
        (linear(64, 64, (LowRank(400, BF16, BF16),)), "wants left factors that registers hold"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_left_to_others(descriptor, reason):
    assert refuses(descriptor).startswith(reason)


def test_large_products_are_multiplied_so_and_small_ones_not(device):
    small = (LowRank(16, BF16, BF16),)
    for sources, taken in ((SOURCES["locon r64"], WGMMA), (SOURCES["loha r16 f32"], WGMMA), (small, MMA)):
        assert WeightPlan.choose(linear(64, 64, sources), PlanPreference(), device) is taken
