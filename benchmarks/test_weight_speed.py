"""Merging into one weight against a copy of the same bytes, deltas against a fill: device time, by graph replay."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from cases import ALGORITHMS, WEIGHT_ROWS, Limit, WeightRow
from measure import Result, record, side_by_side
from problem import Problem
from timing import Replay

from plans.core import Device

_COPIES = {Limit.COPY: 1.0, Limit.COPY_AND_A_HALF: 1.5}


@pytest.mark.benchmark(group="one weight")
@pytest.mark.parametrize("row", WEIGHT_ROWS, ids=str)
def test_weight_speed(row: WeightRow, device: Device, rng: np.random.Generator, benchmark: Any):
    with Problem(device, row.descriptor(), rng) as problem:
        ours = Replay(device, problem.calls)
        limit = Replay(device, problem.fill_calls if row.limit is Limit.FILL else problem.copy_calls)
        seconds, limit_seconds = side_by_side(benchmark, ours, limit)
        problem.poison()
        ours.seconds()
        problem.check(rng)
    result = Result(
        row.work,
        row.shape,
        f"{ALGORITHMS[row.algorithm].title}, {row.factors.value}",
        problem.plan.chosen.name,
        seconds,
        row.limit,
        limit_seconds * _COPIES.get(row.limit, 1.0),
        row.gate,
    )
    record(benchmark, result)
