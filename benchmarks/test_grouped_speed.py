"""All layers of an SDXL UNet in few launches, against a copy of all bytes: wall time, launches included."""

from __future__ import annotations

import math
import statistics
import time
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest
from cases import GROUPED_GATE, Limit, sdxl_lokr8
from measure import ROUNDS, WARMUP_ROUNDS, Result, record
from problem import POISON, SCALE, Factors, check_rows, fill_random
from timing import Replay, copy_call

from plans.core import Device, ElementKind, Workspace
from plans.weight import GroupedWeightArgs, GroupedWeightDescriptor, GroupedWeightPlan, WeightArgs, WeightDescriptor

ALIGNMENT = 256
COPIED_AT_ONCE = 256 << 20


class Checkpoint:
    """Weights one after the other in one buffer, their results in another, each with its factors."""

    def __init__(
        self, device: Device, descriptors: list[WeightDescriptor], rng: np.random.Generator, held: ExitStack
    ) -> None:
        self.device, self.descriptors, self.stream = device, descriptors, device.stream()
        sizes = [math.prod(d.shape) * d.out.itemsize for d in descriptors]
        *self.places, self.nbytes = np.cumsum([0, *(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes)]).tolist()
        self.base, self.out, flag = (device.allocate(size, self.stream) for size in (self.nbytes, self.nbytes, 4))
        self.buffers = (self.base, self.out, flag)
        for buffer in self.buffers:
            held.callback(buffer.close)
        device.fill(flag, 0, self.stream)
        fill_random(device, rng, self.base, self.nbytes, descriptors[0].base, self.stream)
        self.factors = [Factors(device, descriptor, rng, held) for descriptor in descriptors]
        self.flag = flag.tensor(ElementKind.I32, (1,))

    def arguments(self) -> list[WeightArgs]:
        """New arguments for every weight."""
        return [
            WeightArgs(
                self.out.tensor(descriptor.out, descriptor.shape, place),
                factors.tensors,
                [SCALE],
                self.base.tensor(descriptor.base, descriptor.shape, place),
                not_finite=self.flag,
            )
            for descriptor, factors, place in zip(self.descriptors, self.factors, self.places, strict=True)
        ]

    def copy(self, stream: Any) -> None:
        """Copy all weights to the results' place, piece by piece."""
        for start in range(0, self.nbytes, COPIED_AT_ONCE):
            count = min(COPIED_AT_ONCE, self.nbytes - start)
            copy_call(self.out.address + start, self.base.address + start, count)(stream)

    def poison(self) -> None:
        """Fill the results with NaN."""
        self.device.fill(self.out, POISON, self.stream)
        self.device.synchronize(self.stream)

    def check(self, plan: GroupedWeightPlan, rng: np.random.Generator) -> None:
        """Of every kind of layer one is right."""
        kinds = {self.descriptors[number]: number for number in rng.permutation(len(self.descriptors))}
        for descriptor, number in kinds.items():
            out, base = (np.empty(descriptor.matrix, descriptor.out.values) for _ in range(2))
            for host, buffer in ((out, self.out), (base, self.base)):
                self.device.copy_out(host, buffer, self.places[number], self.stream)
            self.device.synchronize(self.stream)
            guarantee = plan.members[number].precision_guarantee
            check_rows(guarantee, descriptor, self.factors[number].values, out, base, None, rng)


def described(descriptors: list[WeightDescriptor]) -> str:
    """How many layers, and weights in all."""
    weights = sum(math.prod(descriptor.shape) for descriptor in descriptors)
    return f"SDXL UNet: {len(descriptors)} layers, {weights / 1e9:.2f} B weights"


@pytest.mark.benchmark(group="whole checkpoint")
def test_grouped_speed(device: Device, rng: np.random.Generator, benchmark: Any):
    descriptors = sdxl_lokr8()
    with ExitStack() as held:
        weights = Checkpoint(device, descriptors, rng, held)
        stream = weights.stream
        plan = GroupedWeightPlan.select(stream, GroupedWeightDescriptor(tuple(descriptors)), device=device)
        table = device.allocate(plan.table_size(), stream)
        scratch = device.allocate(plan.workspace_size(), stream)
        held.callback(table.close)
        held.callback(scratch.close)
        workspace = Workspace(scratch)
        args = GroupedWeightArgs(weights.arguments(), table)
        plan.upload(stream, args)
        device.synchronize(stream)

        copied: list[float] = []
        alone: list[float] = []
        anew: list[float] = []
        launched: list[float] = []
        # Copies of gigabytes in one piece run at two thirds of the rate of those of a few hundred megabytes.
        copy = Replay(device, [weights.copy])
        merge = Replay(device, [lambda stream: plan.run(stream, workspace, args)])

        def others() -> None:
            copied.append(copy.seconds())
            alone.append(merge.seconds())
            start = time.perf_counter()
            fresh = GroupedWeightArgs(weights.arguments(), table)
            plan.upload(stream, fresh)
            plan.run(stream, workspace, fresh)
            device.synchronize(stream)
            anew.append(time.perf_counter() - start)

        def run() -> None:
            start = time.perf_counter()
            plan.run(stream, workspace, args)
            device.synchronize(stream)
            launched.append(time.perf_counter() - start)

        benchmark.pedantic(run, setup=others, rounds=ROUNDS, warmup_rounds=WARMUP_ROUNDS)
        weights.poison()
        run()
        weights.check(plan, rng)

    kernels = sorted({member.chosen.name for member in plan.members})
    times = (
        ("run, launches included", launched, GROUPED_GATE),
        ("run, device time alone", alone, None),
        ("new args: encode, upload, run", anew, None),
    )
    limit = statistics.median(copied[WARMUP_ROUNDS:])
    results = [
        Result(
            work,
            described(descriptors),
            "LoKr factor 8, bf16",
            ", ".join(kernels),
            statistics.median(found[WARMUP_ROUNDS : WARMUP_ROUNDS + ROUNDS]),
            Limit.COPY,
            limit,
            gate,
        )
        for work, found, gate in times
    ]
    record(benchmark, *results)
