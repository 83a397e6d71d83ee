"""A plan of hyper-connections over buffers on the device, so many that no call finds its data in the L2 cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from held_buffers import HeldBuffers
from hyper_connection_cases import WORKS, Row, arguments
from problem import POISON, fill_random, random_values, repeats
from timing import copy_call, rotations

from plans.core import Device, DeviceBuffer, Workspace

Call = Callable[[Any], None]
_SCALES = {"h_pre": 1.0, "h_post": 1.0, "h_res": 1.0, "alpha": 1.0, "bias": 1.0}
_WEIGHTS = ("mixing", "projected")
_ROWS_CHECKED = 3


class HyperConnectionProblem(HeldBuffers):
    """A context manager, which frees its buffers. ``calls`` launch the plan over one set of operands after another.

    Small operands are the same for all sets. ``mixing`` and ``projected`` that a plan reads are positive numbers.
    """

    def __init__(self, device: Device, row: Row, rng: np.random.Generator) -> None:
        super().__init__(device)
        self.row, self.work = row, WORKS[row.work]
        self.descriptor = row.descriptor()
        self.plan = self.work.plan.select(None, self.descriptor, device=device)
        with self._freed_on_failure():
            self._allocate(rng)

    @property
    def x_bytes(self) -> int:
        """Bytes of x."""
        return self.row.batch * self.descriptor.n_streams * self.row.channels * self.row.kind.itemsize

    def _small(self, operand: Any, rng: np.random.Generator) -> DeviceBuffer:
        values = random_values(rng, operand.shape, operand.element)
        if operand.name in _SCALES:
            values = rng.standard_normal(operand.shape).astype(operand.element.values)
        if operand.name in _WEIGHTS:
            values = (np.abs(values.astype(np.float32)) + np.float32(0.25)).astype(np.float32)
        return self._upload(values)

    def _allocate(self, rng: np.random.Generator) -> None:
        operands = self.descriptor.operands()
        large = [o for o in operands if o.shape[0] == self.row.batch and (o.writes or o.name not in _WEIGHTS)]
        sets = rotations(sum(o.nbytes for o in large))
        small = {o.name: self._small(o, rng) for o in operands if o not in large}
        self.sets: list[dict[str, DeviceBuffer]] = []
        for _ in range(sets):
            made = {}
            for operand in large:
                buffer = made[operand.name] = self._take(operand.nbytes)
                if not operand.writes:
                    fill_random(self.device, rng, buffer, operand.nbytes, operand.element, self._stream)
            self.sets.append(small | made)
        self.workspace = Workspace(self._take(max(1, self.plan.workspace_size())))
        self.arguments = [
            arguments(self.work, self.descriptor, {o.name: s[o.name].tensor(o.element, o.shape) for o in operands})
            for s in self.sets
        ]
        pairs = [(self._take(self.x_bytes), self._take(self.x_bytes)) for _ in range(rotations(2 * self.x_bytes))]
        for source, _ in pairs:
            fill_random(self.device, rng, source, self.x_bytes, self.row.kind, self._stream)
        self._pairs = pairs

    @property
    def calls(self) -> list[Call]:
        """One launch or more for every set."""
        plan, workspace = self.plan, self.workspace
        calls = [lambda stream, args=args: plan.run(stream, workspace, args) for args in self.arguments]
        return calls * repeats(len(calls))

    @property
    def copy_calls(self) -> list[Call]:
        """Copies of x to memory of its size."""
        calls = [copy_call(out.address, source.address, self.x_bytes) for source, out in self._pairs]
        return calls * repeats(len(calls))

    def poison(self) -> None:
        """Fill everything that is written with NaN."""
        for buffers in self.sets:
            for operand in self.descriptor.operands():
                if operand.writes:
                    self.device.fill(buffers[operand.name], POISON, self._stream)
        self.device.synchronize(self._stream)

    def check(self) -> None:
        """Everything was written, and what belongs to some samples alone keeps the plan's guarantee."""
        buffers, batch = self.sets[-1], self.row.batch
        chosen = sorted({0, batch // 2, batch - 1})[:_ROWS_CHECKED]
        arrays, written = {}, {}
        for operand in self.descriptor.operands():
            raw = self.device.download(buffers[operand.name], operand.element.storage, operand.shape, self._stream)
            values = raw.view(operand.element.values)
            by_sample = operand.shape[0] == batch
            if operand.writes:
                assert np.isfinite(values.reshape(-1)[:: max(1, values.size // 10**6)].astype(np.float32)).all(), (
                    operand.name
                )
            if by_sample:
                values = values[chosen]
            (written if operand.writes else arrays)[operand.name] = values
            if operand.writes and not by_sample:
                del written[operand.name]
        few = WORKS[self.row.work].describe(len(chosen), self.row.channels, self.descriptor.n_streams, self.row.kind)
        kept = {name: written[name] for name in ("projected", "mixing") if name in written}
        expected = few.reference(**arrays, **kept)
        if isinstance(expected, tuple):
            expected = {"out": expected}
        kinds = {operand.name: operand.element for operand in self.descriptor.operands()}
        for name, found in written.items():
            exact, magnitude = expected[name]
            assert self.plan.precision_guarantee.accepts(found, exact, magnitude, kinds[name]).all(), name
