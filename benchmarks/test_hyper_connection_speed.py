"""Hyper-connections against copies of what they must read and write, and against torch, naive and compiled."""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases import Limit
from hyper_connection_cases import (
    EPS,
    FORWARD_OVER_COMPILED,
    FORWARD_OVER_NAIVE,
    ITERATIONS,
    LARGE,
    ROWS,
    SINKHORN_ROWS,
    SMALL,
    STEP_OVER_COMPILED,
    STREAMS,
    WORKS,
    Row,
)
from hyper_connection_problem import HyperConnectionProblem
from measure import ROUNDS, WARMUP_ROUNDS, Result, record, side_by_side
from problem import LEAST_CALLS
from timing import Replay, copy_call, graph_of, rotations
from turns import Turns

from plans.core import Device, Workspace
from plans.sinkhorn import SinkhornArgs, SinkhornBackwardArgs, SinkhornPlan

PEER = Path(__file__).with_name("hyper_connection_peer.py")
SECONDS_ALLOWED = 500


@pytest.mark.benchmark(group="hyper-connections")
@pytest.mark.parametrize("row", ROWS, ids=str)
def test_hyper_connection_speed(row: Row, device: Device, rng: np.random.Generator, benchmark: Any):
    work = WORKS[row.work]
    with HyperConnectionProblem(device, row, rng) as problem:
        ours, limit = Replay(device, problem.calls), Replay(device, problem.copy_calls)
        seconds, copy_seconds = side_by_side(benchmark, ours, limit)
        problem.poison()
        ours.seconds()
        problem.check()
    names = (row.work, row.shape, f"n={STREAMS}, {row.kind.value}", problem.plan.chosen.name, seconds)
    results = [Result(*names, Limit.COPY, copy_seconds * work.units / 2, row.gate)]
    if work.moved > work.units:
        label = (f"{row.work}, of bytes moved", *names[1:])
        results.append(Result(*label, Limit.COPY, copy_seconds * work.moved / 2, None))
    record(benchmark, *results)


@pytest.mark.benchmark(group="sinkhorn")
@pytest.mark.parametrize("case", SINKHORN_ROWS, ids=lambda case: case[0])
def test_sinkhorn_speed(case: Any, device: Device, rng: np.random.Generator, benchmark: Any):
    name, plan_class, descriptor = case
    plan = plan_class.select(None, descriptor, device=device)
    read = [operand for operand in descriptor.operands() if not operand.writes]
    buffers = {o.name: device.upload(rng.standard_normal(o.shape).astype(np.float32)) for o in read}
    buffers |= {o.name: device.allocate(o.nbytes) for o in descriptor.operands() if o.writes}
    tensors = {o.name: buffers[o.name].tensor(o.element, o.shape) for o in descriptor.operands()}
    args = (SinkhornArgs if plan_class is SinkhornPlan else SinkhornBackwardArgs)(**tensors)
    workspace, nbytes = Workspace(device.allocate(max(1, plan.workspace_size()))), sum(o.nbytes for o in read)
    source, target = device.allocate(nbytes), device.allocate(nbytes)
    ours = Replay(device, [lambda stream: plan.run(stream, workspace, args)] * LEAST_CALLS)
    limit = Replay(device, [copy_call(target.address, source.address, nbytes)] * LEAST_CALLS)
    seconds, copy_seconds = side_by_side(benchmark, ours, limit)
    shape = f"{descriptor.batch}x{descriptor.n}"
    record(benchmark, Result(name, shape, "T=20", plan.chosen.name, seconds, Limit.COPY, copy_seconds, None))


PEER_ROWS = tuple(Row(form, *shape) for form in ("static", "dynamic") for shape in (*SMALL, LARGE))


@pytest.fixture(scope="module")
def peer(device: Device, request: pytest.FixtureRequest) -> Iterator[Turns]:
    """A process of torch for every row that was selected."""
    if importlib.util.find_spec("torch") is None:
        pytest.skip("torch is not there to be compared with")
    chosen = [item.callspec.params.get("peer_row") for item in request.session.items if item.path == request.path]
    problems = {
        str(row): {
            "form": row.work, "batch": row.batch, "channels": row.channels, "streams": STREAMS,
            "iterations": ITERATIONS, "eps": EPS, "dtype": "bfloat16",
            "sets": min(24, rotations(4 * row.batch * row.channels * STREAMS)),
        }
        for row in chosen
        if row is not None
    }  # fmt: skip
    with Turns(PEER, problems, SECONDS_ALLOWED) as turns:
        yield turns


def step_seconds(device: Device, row: Row, rng: np.random.Generator) -> float:
    """Median wall seconds of a forward and a backward and their synchronisation, arguments bound."""
    backward = Row(f"{row.work} backward", row.batch, row.channels, row.kind)
    with HyperConnectionProblem(device, row, rng) as first, HyperConnectionProblem(device, backward, rng) as second:
        stream, times = device.stream(), []
        for number in range(ROUNDS + WARMUP_ROUNDS):
            start = time.perf_counter()
            first.plan.run(stream, first.workspace, first.arguments[number % len(first.arguments)])
            second.plan.run(stream, second.workspace, second.arguments[number % len(second.arguments)])
            device.synchronize(stream)
            times.append(time.perf_counter() - start)
    return statistics.median(times[WARMUP_ROUNDS:])


@pytest.mark.benchmark(group="hyper-connections beside torch")
@pytest.mark.parametrize("peer_row", PEER_ROWS, ids=str)
def test_beside_torch(peer_row: Row, device: Device, peer: Turns, rng: np.random.Generator, benchmark: Any):
    answer, found = peer.take(str(peer_row)), []
    with HyperConnectionProblem(device, peer_row, rng) as problem:
        ours = Replay(device, problem.calls)
        benchmark.pedantic(lambda: found.append(ours.seconds()), rounds=ROUNDS, warmup_rounds=WARMUP_ROUNDS)
    seconds, step = statistics.median(found[WARMUP_ROUNDS:]), step_seconds(device, peer_row, rng)
    theirs, name = answer["seconds"], problem.plan.chosen.name
    results = [
        Result(f"{peer_row.work} {what}", peer_row.shape, how, name, own, Limit.TORCH, theirs[f"{what} {how}"],
               1 / gate if gate else None)
        for what, how, own, gate in (
            ("forward", "naive", seconds, FORWARD_OVER_NAIVE),
            ("forward", "compiled", seconds, FORWARD_OVER_COMPILED),
            ("step", "naive", step, None),
            ("step", "compiled", step, STEP_OVER_COMPILED),
        )
    ]  # fmt: skip
    record(benchmark, *results, peer=answer["versions"])


@pytest.mark.benchmark(group="hyper-connections")
@pytest.mark.parametrize("work", ["static", "static backward", "dynamic", "dynamic backward"])
def test_a_graph_repeats_the_bits_of_a_run(work: str, device: Device, rng: np.random.Generator, benchmark: Any):
    """What is captured and replayed writes what a plain run writes, bit by bit."""
    row, taken = Row(work, 65, 256), []
    with HyperConnectionProblem(device, row, rng) as problem:
        stream = device.stream()
        written = [o for o in problem.descriptor.operands() if o.writes]

        def outputs() -> list[bytes]:
            device.synchronize(stream)
            found = (device.download(problem.sets[0][o.name], np.uint8, (o.nbytes,), stream) for o in written)
            return [array.tobytes() for array in found]

        problem.plan.run(stream, problem.workspace, problem.arguments[0])
        plain = outputs()
        graph = graph_of(device, [lambda s: problem.plan.run(s, problem.workspace, problem.arguments[0])])
        for _ in range(3):
            problem.poison()
            graph.launch(stream)
            taken.append(outputs())
        benchmark(lambda: graph.launch(stream))
        device.synchronize(stream)
    assert all(found == plain for found in taken)
