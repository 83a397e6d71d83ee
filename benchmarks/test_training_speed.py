"""Pointwise, row and column kernels of training against a copy of the bytes that each must move: device time."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from cases import Limit
from measure import Result, record, side_by_side
from operand_buffers import Rotated
from right import assert_written
from timing import Replay

from plans.catalogue_training import EXAMPLES
from plans.core import Device, ElementKind
from plans.movement import WindowArgs, WindowPlan
from plans.norm_backward import NormBackwardArgs, NormBackwardPlan
from plans.optimizer import Member, Numbers, Rule, UpdateArgs, UpdateDescriptor, UpdatePlan, block_table
from plans.pointwise import PointwiseArgs, PointwisePlan
from plans.random import DropoutArgs, DropoutPlan, RandomArgs, RandomPlan
from plans.reduction import ReductionArgs, ReductionPlan
from plans.rows import RowsArgs, RowsPlan
from plans.take import TakeArgs, TakeBackwardDescriptor, TakeBackwardPlan, TakePlan

# Rows of the table have its gate; what it does not name is shown and held to nothing.
GATED = ("softmax", "layer norm", "RMS norm")
GATE = 1.1
COUNTS = (100_000,) * 1000


def pointwise_arguments(descriptor: Any) -> Callable:
    count = len(descriptor.targets)
    return lambda t: PointwiseArgs(t[:count], t[count:])


def row_arguments(descriptor: Any) -> Callable:
    count = len(descriptor.targets)
    return lambda t: RowsArgs(t[:count], t[count:], (1e-5,) * len(descriptor.recipe.scalars))


MAKE: dict[type, Callable[[Any], Callable]] = {
    PointwisePlan: pointwise_arguments,
    RowsPlan: row_arguments,
    NormBackwardPlan: lambda d: lambda t: NormBackwardArgs(t[: 2 + d.bias], t[2 + d.bias :]),
    ReductionPlan: lambda d: lambda t: ReductionArgs(t[0], t[1:]),
    TakePlan: lambda d: lambda t: TakeArgs(*t),
    TakeBackwardPlan: lambda d: lambda t: TakeArgs(*t),
    WindowPlan: lambda d: lambda t: WindowArgs(*t),
    RandomPlan: lambda d: lambda t: RandomArgs(t[0], 0.0, 1.0, 1, 0),
    DropoutPlan: lambda d: lambda t: DropoutArgs(*t[:2], 0.1, 1 / 0.9, 1, 0, *t[2:]),
}
ROWS = [row for row in EXAMPLES if row[0] in MAKE]
MOVED: dict[type, Callable[[Any], int]] = {
    TakePlan: lambda d: 2 * d.operands()[0].nbytes + d.index_operand.nbytes,
    # Rows of the gradient are read and written, those that several places name once.
    TakeBackwardPlan: lambda d: d.operands()[1].nbytes + d.index_operand.nbytes + 2 * 4 * named_rows(d) * d.inner,
    WindowPlan: lambda d: d.operands()[0].nbytes + d.operands()[1].nbytes // (1 + (d.diagonal is not None)),
}
"""Bytes that a plan has to move, where these are not all that its operands have."""
VALUES: dict[str, Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]] = {
    "index": lambda rng, shape: rng.integers(0, 32000, shape),
    "target": lambda rng, shape: rng.integers(0, 4096, shape),
    "rstd": lambda rng, shape: rng.uniform(0.5, 2, shape),
    "origin": lambda rng, shape: np.zeros(shape),
    "d_source": lambda rng, shape: np.zeros(shape),
}


def named_rows(descriptor: TakeBackwardDescriptor) -> int:
    """Rows that a random index names, on average."""
    return round(descriptor.n * (1 - (1 - 1 / descriptor.n) ** descriptor.chosen))


@pytest.mark.benchmark(group="training kernels")
@pytest.mark.parametrize(("plan", "text", "descriptor"), ROWS, ids=[row[1] for row in ROWS])
def test_training_kernel_speed(plan, text, descriptor, device: Device, rng: np.random.Generator, benchmark: Any):
    moved = MOVED[plan](descriptor) if plan in MOVED else None
    with Rotated(device, plan, descriptor, MAKE[plan](descriptor), rng, VALUES, moved=moved) as runs:
        ours, limit = Replay(device, runs.calls), Replay(device, runs.copy_calls)
        seconds, limit_seconds = side_by_side(benchmark, ours, limit)
        assert_written(runs)
        chosen = runs.plan.chosen.name
    gate = GATE if any(name in text for name in GATED) else None
    record(benchmark, Result(text, "", plan.name, chosen, seconds, Limit.COPY, limit_seconds, gate))


ADAMW = {"fp32": (ElementKind.F32, False), "bf16 and fp32 copies": (ElementKind.BF16, True)}


@pytest.mark.benchmark(group="training kernels")
@pytest.mark.parametrize(("kind", "master"), ADAMW.values(), ids=ADAMW)
def test_adamw_speed(kind: ElementKind, master: bool, device: Device, rng: np.random.Generator, benchmark: Any):
    """100 M parameters in 1000 tensors with fp32 moments: 28 bytes a parameter, 30 where bf16 has fp32 copies.

    What the tensors hold does not change the time.
    """
    descriptor = UpdateDescriptor(Rule.ADAMW, kind, master, False, COUNTS, (0,) * len(COUNTS))
    numbers = np.array([Numbers(1e-3, 0.9, 0.999, 1e-8, 0.01, 10.0, 31.6)], np.float32)
    own = 4 + master

    def make(tensors: list) -> UpdateArgs:
        members = [Member(*parts) for parts in zip(*(tensors[k:-5:own] for k in range(own)), strict=True)]
        table, *rest = tensors[-5:]
        device.copy_in(table.owner, 0, descriptor.table(members).view(np.uint8).reshape(-1), stream)
        device.synchronize(stream)
        return UpdateArgs(members, table, *rest)

    stream = device.stream()
    values = {
        "blocks": lambda rng, shape: block_table(COUNTS),
        "groups": lambda rng, shape: numbers,
        "scale": lambda rng, shape: np.ones(shape),
        "origin": VALUES["origin"],
    }
    moved = sum(operand.nbytes * (1 + operand.writes) for operand in descriptor.operands())
    if master:
        moved -= sum(COUNTS) * kind.itemsize  # a parameter that has a copy is not read
    with Rotated(device, UpdatePlan, descriptor, make, rng, values, moved=moved) as runs:
        ours, limit = Replay(device, runs.calls), Replay(device, runs.copy_calls)
        seconds, limit_seconds = side_by_side(benchmark, ours, limit)
    text = f"AdamW, 1000 tensors, {next(name for name, row in ADAMW.items() if row == (kind, master))}"
    copy = Result(text, "100 M", "update", "", seconds, Limit.COPY, limit_seconds, None)
    torch = Result(text, "100 M", "update", "", seconds, Limit.TORCH, torch_adamw_seconds(), 1.0)
    record(benchmark, copy, torch)


def torch_adamw_seconds() -> float:
    """Median device seconds of torch's fused AdamW over as many fp32 parameters, which are its own master copies.

    A graph of the step is replayed, so that torch's Python, slower than the device, is no part of it.
    """
    torch = pytest.importorskip("torch", reason="the limit is measured through torch")
    parameters = [torch.randn(count, device="cuda") for count in COUNTS]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    optimizer = torch.optim.AdamW(parameters, 1e-3, fused=True, capturable=True)
    graph, side, times = torch.cuda.CUDAGraph(), torch.cuda.Stream(), []
    with torch.cuda.stream(side):
        optimizer.step()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        optimizer.step()
    for _ in range(2 + 15):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) * 1e-3)
    return statistics.median(times[2:])
