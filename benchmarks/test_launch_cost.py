"""CPU time of ``plan.run``: checks, binding and launches, while the GPU keeps up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from cases import ALGORITHMS, BF16, RUN_BUDGET_SECONDS, Limit, WeightRow
from measure import Result, record
from operand_buffers import Rotated
from problem import Problem
from test_matmul_speed import Row, arguments_of

from plans.core import Device
from plans.matmul import MatmulPlan, SegmentedMatmulPlan
from plans.weight import WeightArgs

RUNS = 200  # well below what a stream queues before a launch waits for the GPU
ALGORITHMS_RUN = ("locon-r16", "lokr8", "lokr8-r16", "dora-r16")
PRODUCT_BUDGET_SECONDS = 6e-6


def again(args: WeightArgs) -> WeightArgs:
    """The same object: the plan has checked it before."""
    return args


def anew(args: WeightArgs) -> WeightArgs:
    """A new object over the same tensors: the plan checks and binds it."""
    return WeightArgs(args.out, args.factors, args.scales, args.base, args.magnitude, args.strength, args.not_finite)


@pytest.mark.benchmark(group="launch cost")
@pytest.mark.parametrize("arguments", [again, anew], ids=["same-args", "new-args"])
@pytest.mark.parametrize("algorithm", ALGORITHMS_RUN)
def test_launch_cost(
    algorithm: str,
    arguments: Callable[[WeightArgs], WeightArgs],
    device: Device,
    rng: np.random.Generator,
    benchmark: Any,
):
    row = WeightRow("merge", 1280, 1280, algorithm, BF16, Limit.BUDGET, 1.0)
    stream = device.stream()
    with Problem(device, row.descriptor(), rng) as problem:
        plan, workspace, args = problem.plan, problem.workspace, problem.arguments[0]

        def run() -> None:
            for _ in range(RUNS):
                plan.run(stream, workspace, arguments(args))

        benchmark.pedantic(run, setup=lambda: device.synchronize(stream), rounds=30, warmup_rounds=3)
        device.synchronize(stream)
    result = Result(
        f"run, {'the same' if arguments is again else 'new'} args",
        row.shape,
        ALGORITHMS[algorithm].title,
        plan.chosen.name,
        benchmark.stats.stats.median / RUNS,
        Limit.BUDGET,
        RUN_BUDGET_SECONDS,
        row.gate if arguments is again else None,
    )
    record(benchmark, result)


@pytest.mark.benchmark(group="launch cost")
@pytest.mark.parametrize("adapters", [0, 1])
def test_product_launch_cost(adapters: int, device: Device, rng: np.random.Generator, benchmark: Any):
    row = Row(16, 128, 128, None, adapters)
    descriptor, stream = row.descriptor(), device.stream()
    with Rotated(
        device, SegmentedMatmulPlan if adapters else MatmulPlan, descriptor, arguments_of(descriptor), rng
    ) as runs:
        plan, workspace, args = runs.plan, runs.workspace, runs.arguments[0]
        launches = len(plan.launches(args, workspace))

        def run() -> None:
            for _ in range(RUNS // launches):
                plan.run(stream, workspace, args)

        benchmark.pedantic(run, setup=lambda: device.synchronize(stream), rounds=30, warmup_rounds=3)
        device.synchronize(stream)
    seconds = benchmark.stats.stats.median / (RUNS // launches)
    work = f"run of a product{', LoCon r=16' if adapters else ''}: {launches} launch{'es' * (launches > 1)}"
    record(
        benchmark,
        Result(work, row.shape, "", plan.chosen.name, seconds, Limit.BUDGET, PRODUCT_BUDGET_SECONDS, 1.0),
    )
