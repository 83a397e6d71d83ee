"""Any plan with its operands in buffers of its own, rotated past the L2 cache; a copy of as many bytes beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from held_buffers import HeldBuffers
from problem import POISON, Call, fill_random, repeats
from timing import copy_call, rotations

from plans.core import Device, DeviceBuffer, ElementKind, Operand, TensorMut, Workspace
from plans.core.plan import Arguments, Plan, PlanPreference

Values = Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]
_FLOATS = (ElementKind.BF16, ElementKind.F16, ElementKind.F32)
_WHOLE = 1 << 12


def _whole(nbytes: int) -> int:
    """Rounded up to what the driver copies at full speed: ragged sizes take it up to half as long again."""
    return -(-nbytes // _WHOLE) * _WHOLE


class Rotated(HeldBuffers):
    """Runs of a plan over several sets of operands; a context manager, which frees them.

    ``make`` turns tensors, in the order of the descriptor's operands, into arguments; ``values`` gives what is not to
    be small normal numbers, by operand name; ``moved`` are the bytes that have to move, if not all of the operands'.
    """

    def __init__(
        self,
        device: Device,
        kind: type[Plan],
        descriptor: Any,
        make: Callable[[list[TensorMut]], Arguments],
        rng: np.random.Generator,
        values: dict[str, Values] | None = None,
        preference: PlanPreference | None = None,
        moved: int | None = None,
    ) -> None:
        super().__init__(device)
        self.descriptor = descriptor
        self.plan = kind.select(None, descriptor, preference, device)
        self.operands: Sequence[Operand] = descriptor.operands()
        self.nbytes = sum(operand.nbytes for operand in self.operands)
        with self._freed_on_failure():
            self._sets = [self._fill(rng, values or {}) for _ in range(rotations(self.nbytes, 2))]
            size = self.plan.workspace_size()
            self.workspace = Workspace(self._take(size)) if size else None
            self._half = _whole(-(-(self.nbytes if moved is None else moved) // 2))
            self._copies = [(self._take(self._half), self._take(self._half)) for _ in self._sets]
        self.arguments = [make(self._tensors(buffers)) for buffers in self._sets]
        device.synchronize(self._stream)  # other streams take over what was filled here

    @property
    def calls(self) -> list[Call]:
        """One run for every set of operands, or more."""
        plan, workspace = self.plan, self.workspace
        calls = [lambda stream, args=args: plan.run(stream, workspace, args) for args in self.arguments]
        return calls * repeats(len(calls))

    @property
    def copy_calls(self) -> list[Call]:
        """Copies that read and write as many bytes together as have to move."""
        calls = [copy_call(target.address, source.address, self._half) for target, source in self._copies]
        return calls * repeats(len(calls))

    def _fill(self, rng: np.random.Generator, values: dict[str, Values]) -> list[DeviceBuffer]:
        buffers = []
        for operand in self.operands:
            buffer = self._take(operand.nbytes)
            if operand.name in values:
                array = values[operand.name](rng, operand.shape).astype(operand.element.values)
                self.device.copy_in(buffer, 0, np.ascontiguousarray(array).reshape(-1).view(np.uint8), self._stream)
                self.device.synchronize(self._stream)
            elif operand.writes or operand.element not in _FLOATS:
                self.device.fill(buffer, POISON if operand.element in _FLOATS else 0, self._stream)
            else:
                fill_random(self.device, rng, buffer, operand.nbytes, operand.element, self._stream)
            buffers.append(buffer)
        return buffers

    def _tensors(self, buffers: list[DeviceBuffer]) -> list[TensorMut]:
        made = []
        for operand, buffer in zip(self.operands, buffers, strict=True):
            plain = buffer.tensor(operand.element, operand.shape)
            available = buffer.nbytes // operand.element.itemsize
            made.append(
                TensorMut(plain.data, operand.shape, operand.strides, operand.element, available, plain.device, buffer)
            )
        return made
