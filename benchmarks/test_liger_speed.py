"""A dynamic hyper-connection around a sublayer that does nothing, beside Liger-Kernel's in a process of its own."""

from __future__ import annotations

import importlib.util
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases import Limit
from held_buffers import HeldBuffers
from hyper_connection_cases import BF16, EPS, ITERATIONS, LARGE, SMALL, STREAMS
from measure import ROUNDS, WARMUP_ROUNDS, Result, record
from problem import POISON, fill_random, random_values, repeats
from timing import Replay, rotations
from turns import Turns

from plans.core import Device, DeviceBuffer, Operand, Workspace
from plans.hyper_connection import (
    HyperConnectionPostBackwardDescriptor,
    HyperConnectionPostBackwardPlan,
    HyperConnectionPostDescriptor,
    HyperConnectionPostPlan,
    HyperConnectionPreBackwardDescriptor,
    HyperConnectionPreBackwardPlan,
    HyperConnectionPreDescriptor,
    HyperConnectionPrePlan,
)
from plans.hyper_connection.common import NamedArguments
from plans.sinkhorn import SinkhornMode

PEER = Path(__file__).with_name("liger_peer.py")
SECONDS_ALLOWED = 500
GATE = 1 / 1.2
PARTS = ("forward", "step")
SHAPES = (*SMALL, LARGE)
FORWARD, BACKWARD = 2, 4
"""How many of the plans are the forward, and how many there are."""
_ANOTHER_NAME = {"update": "aggregate", "d_aggregate": "d_update", "d_x": "d_streams"}
_PER_SET = ("x_expanded", "out", "d_out")
_CHECKED = 3


class Connection(HeldBuffers):
    """Four plans over buffers by name: what one writes another reads. A context manager, which frees its buffers."""

    def __init__(self, device: Device, batch: int, channels: int, rng: np.random.Generator) -> None:
        super().__init__(device)
        sizes = (batch, channels, STREAMS)
        pre = (*sizes, ITERATIONS, EPS, BF16, None, BF16, SinkhornMode.SOFTMAX)
        post = (*sizes, BF16, True)
        self.descriptors = (
            HyperConnectionPreDescriptor(*pre),
            HyperConnectionPostDescriptor(*post),
            HyperConnectionPostBackwardDescriptor(*post),
            HyperConnectionPreBackwardDescriptor(*pre),
        )
        classes = (
            HyperConnectionPrePlan,
            HyperConnectionPostPlan,
            HyperConnectionPostBackwardPlan,
            HyperConnectionPreBackwardPlan,
        )
        self.plans = [p.select(None, d, device=device) for p, d in zip(classes, self.descriptors, strict=True)]
        with self._freed_on_failure():
            self._allocate(rng)

    def _buffer(self, operand: Operand, rng: np.random.Generator) -> DeviceBuffer:
        if operand.name in ("projection", "alpha", "bias"):
            return self._upload(random_values(rng, operand.shape, operand.element))
        buffer = self._take(operand.nbytes)
        if operand.name in ("x_expanded", "d_out"):
            fill_random(self.device, rng, buffer, operand.nbytes, operand.element, self._stream)
        return buffer

    def _allocate(self, rng: np.random.Generator) -> None:
        operands = {o.name: o for d in self.descriptors for o in d.operands() if o.name not in _ANOTHER_NAME}
        shared = {name: self._buffer(o, rng) for name, o in operands.items() if name not in _PER_SET}
        count = rotations(2 * operands["out"].nbytes)
        self.sets = [shared | {name: self._buffer(operands[name], rng) for name in _PER_SET} for _ in range(count)]
        nbytes = max(1, *(plan.workspace_size() for plan in self.plans))
        space = self._take(nbytes)
        self.workspace = Workspace(space)
        self.arguments = [[self._arguments(d, buffers) for d in self.descriptors] for buffers in self.sets]

    def _arguments(self, descriptor: Any, buffers: dict[str, DeviceBuffer]) -> NamedArguments:
        place = {o.name: buffers[_ANOTHER_NAME.get(o.name, o.name)] for o in descriptor.operands()}
        tensors = {o.name: place[o.name].tensor(o.element, o.shape) for o in descriptor.operands()}
        return NamedArguments(descriptor, **tensors)

    def run(self, stream: Any, number: int, plans: int) -> None:
        """The first so many plans over a set of buffers."""
        for plan, arguments in zip(self.plans[:plans], self.arguments[number % len(self.sets)][:plans], strict=True):
            plan.run(stream, self.workspace, arguments)

    @property
    def forward_calls(self) -> list[Callable[[Any], None]]:
        """A forward over every set."""
        count = len(self.sets)
        return [lambda stream, number=number: self.run(stream, number, FORWARD) for number in range(count)] * repeats(
            count
        )

    def step_seconds(self) -> float:
        """Median wall seconds of a forward and a backward and their synchronisation."""
        times = []
        for number in range(ROUNDS + WARMUP_ROUNDS):
            start = time.perf_counter()
            self.run(self._stream, number, BACKWARD)
            self.device.synchronize(self._stream)
            times.append(time.perf_counter() - start)
        return statistics.median(times[WARMUP_ROUNDS:])

    def check(self) -> None:
        """A run writes everything, and samples of its forward keep the plans' guarantees."""
        buffers, written = self.sets[0], ("out", "mixing", "projected", "aggregate", "d_streams", "d_projection")
        for name in written:
            self.device.fill(buffers[name], POISON, self._stream)
        self.run(self._stream, 0, BACKWARD)
        self.device.synchronize(self._stream)
        batch, found = self.descriptors[0].batch, {}
        for operand in {o.name: o for d in self.descriptors for o in d.operands() if o.name in buffers}.values():
            raw = self.device.download(buffers[operand.name], operand.element.storage, operand.shape, self._stream)
            values = raw.view(operand.element.values)
            assert np.isfinite(values.reshape(-1)[:: max(1, values.size // 10**6)].astype(np.float32)).all(), (
                operand.name
            )
            found[operand.name] = values[:: max(1, batch // _CHECKED)] if operand.shape[0] == batch else values
        for plan, descriptor, name in zip(self.plans, self.descriptors[:FORWARD], ("aggregate", "out"), strict=False):
            read = {o.name for o in descriptor.operands() if not o.writes} | {"projected", "mixing"}
            arrays = {name: found[_ANOTHER_NAME.get(name, name)] for name in read}
            if name == "out":
                del arrays["projected"]
            exact, magnitude = descriptor.reference(**arrays)[name]
            assert plan.precision_guarantee.accepts(found[name], exact, magnitude, BF16).all(), name


@pytest.fixture(scope="module")
def liger(device: Device, request: pytest.FixtureRequest) -> Iterator[Turns]:
    """A process of Liger-Kernel for either part of every shape that was selected."""
    if "LYCORIS_PEER_SITE" not in os.environ:
        pytest.skip("LYCORIS_PEER_SITE is not set; wanted the folder that holds liger-kernel (docs/benchmarks.md)")
    if importlib.util.find_spec("torch") is None:
        pytest.skip("liger-kernel needs torch, which this Python does not have")
    shapes = [item.callspec.params["shape"] for item in request.session.items if item.path == request.path]
    problems = {
        f"{batch}x{channels} {part}": {
            "part": part, "batch": batch, "channels": channels, "streams": STREAMS, "iterations": ITERATIONS,
            "eps": EPS, "sets": min(24, rotations(4 * batch * channels * STREAMS)),
        }
        for batch, channels in shapes
        for part in PARTS
    }  # fmt: skip
    with Turns(PEER, problems, SECONDS_ALLOWED) as turns:
        yield turns


@pytest.mark.benchmark(group="hyper-connections beside Liger-Kernel")
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape[0]}x{shape[1]}")
def test_beside_liger(shape: tuple[int, int], device: Device, liger: Turns, rng: np.random.Generator, benchmark: Any):
    found, name = [], f"{shape[0]}x{shape[1]}"
    answers = {part: liger.take(f"{name} {part}") for part in PARTS}
    with Connection(device, *shape, rng) as connection:
        connection.check()
        ours = Replay(device, connection.forward_calls)
        benchmark.pedantic(lambda: found.append(ours.seconds()), rounds=ROUNDS, warmup_rounds=WARMUP_ROUNDS)
        step, skus = connection.step_seconds(), [plan.chosen.name for plan in connection.plans]
    forward = statistics.median(found[WARMUP_ROUNDS:])
    names = {"forward": ", ".join(skus[:FORWARD]), "step": ", ".join(skus)}
    results = [
        Result(f"dynamic split {what}", name, f"n={STREAMS}, bf16", names[what], own, Limit.LIGER,
               answers[what]["seconds"], GATE)
        for what, own in zip(PARTS, (forward, step), strict=True)
    ]  # fmt: skip
    record(benchmark, *results, peer=answers["step"]["versions"])
