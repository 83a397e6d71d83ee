"""The jobs of a batch on the device: plans selected beforehand, launched on one stream."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack

import numpy as np

from lycoris.checkpoint import Checkpoint
from lycoris.errors import RefusedInput
from lycoris.merge.batches import ALIGNMENT, Batch, Placed
from lycoris.merge.bits import became_infinite
from lycoris.merge.jobs import Job
from plans.cast import CastArgs, CastDescriptor, CastPlan
from plans.core import Device, DeviceBuffer, ElementKind, Plan, PlanError, TensorMut, Workspace
from plans.weight import WeightArgs, WeightPlan

Plans = Mapping[tuple[str, int], Plan]
"""The plan of each job, by `Job.key`."""

_FLAG_BYTES = ALIGNMENT  # from one flag to the next
_COMPARED = 1 << 22  # elements read again at a time


def select_plans(jobs: Iterable[Job], device: Device) -> Plans:
    """
    The plans of `jobs`, compiled.

    Raises:
        RefusedInput: no plan computes one of them, naming its modules.

    """
    return {job.key: _select(job, device) for job in jobs}


def _select(job: Job, device: Device) -> Plan:
    try:
        if job.descriptor is None:
            return CastPlan.select(None, CastDescriptor(job.count, job.base, job.out), device=device)
        return WeightPlan.select(None, job.descriptor, device=device)
    except PlanError as error:
        raise RefusedInput(f"{job.where}: cannot be merged on {device.name} ({error})") from error


def count_skus(plans: Plans) -> dict[str, int]:
    """Kernel -> tensors that it computes."""
    used = {(f"{plan.name} {plan.chosen.name}", tensor) for (tensor, _), plan in plans.items()}
    return dict(Counter(name for name, _ in sorted(used)))


def workspace_bytes(plans: Plans) -> int:
    """What `Computer` takes of the device's memory besides the slots."""
    return max((plan.workspace_size() for plan in plans.values()), default=0)


class Computer:
    """
    Computes batches one after the other, on a stream of its own.

    Holds the workspace, which jobs take in turns, and for each job of a batch a flag for results that are not finite.
    """

    def __init__(
        self, device: Device, base: Checkpoint, plans: Plans, batches: Sequence[Batch], held: ExitStack
    ) -> None:
        """Allocate for the largest of `batches` over `base`; closing `held` gives the memory back."""
        self._device, self._base, self._plans = device, base, plans
        self._stream = device.stream()
        self._workspace = Workspace(self.allocate(workspace_bytes(plans), held))
        self._flags = self.allocate(_FLAG_BYTES * max(len(batch.jobs) for batch in batches), held)

    def allocate(self, nbytes: int, held: ExitStack) -> DeviceBuffer:
        """Device memory that every stream may use from now on, and that closing `held` gives back."""
        buffer = self._device.allocate(nbytes, self._stream)
        held.callback(buffer.close, self._stream)
        self._device.synchronize(self._stream)
        return buffer

    def run(self, batch: Batch, slot: DeviceBuffer) -> None:
        """
        Compute a batch whose inputs are in `slot`; the results are there on return.

        Raises:
            RefusedInput: a result is not finite though the base was, naming the modules.

        """
        device, stream = self._device, self._stream
        device.fill(self._flags, 0, stream)
        self._launch(batch, slot)
        raised = np.zeros((len(batch.jobs), _FLAG_BYTES // 4), np.int32)
        device.copy_out(raised, self._flags, 0, stream)
        device.synchronize(stream)
        for number in np.flatnonzero(raised.any(axis=1)):
            self._check_finite(batch.jobs[number], slot)

    def _check_finite(self, placed: Placed, slot: DeviceBuffer) -> None:
        """Not every result is finite: compare with the base, which the results may have replaced in memory."""
        job = placed.job
        file = self._base.file_of(job.tensor.name)
        for first in range(0, job.count, _COMPARED):
            count = min(_COMPARED, job.count - first)
            before = np.empty(count * job.base.itemsize, np.uint8)
            after = np.empty(count * job.out.itemsize, np.uint8)
            file.read_into(before, job.tensor.start + (job.first + first) * job.base.itemsize)
            self._device.copy_out(after, slot, placed.out + first * job.out.itemsize, self._stream)
            self._device.synchronize(self._stream)
            if became_infinite(before, job.base, after, job.out):
                raise RefusedInput(
                    f"{job.where}: makes values in {job.tensor.name!r} that are not finite in {job.out.values.name}, "
                    "though the base's are; lower the strength or choose a wider dtype"
                )

    def _launch(self, batch: Batch, slot: DeviceBuffer) -> None:
        for number, placed in enumerate(batch.jobs):
            flag = self._flags.tensor(ElementKind.I32, (1,), _FLAG_BYTES * number)
            try:
                arguments = _arguments(placed, slot, flag)
                self._plans[placed.job.key].run(self._stream, self._workspace, arguments)
            except PlanError as error:
                raise RefusedInput(f"{placed.job.where}: cannot be merged ({error})") from error


def _arguments(placed: Placed, slot: DeviceBuffer, flag: TensorMut) -> WeightArgs | CastArgs:
    job = placed.job
    shape = (job.count,) if job.descriptor is None else job.descriptor.shape
    out, base = slot.tensor(job.out, shape, placed.out), slot.tensor(job.base, shape, placed.base)
    if job.descriptor is None:
        return CastArgs(out, base)
    places = iter(placed.operands)
    factors = [
        [slot.tensor(operand.element, operand.shape, next(places)) for operand in group]
        for group in job.descriptor.source_operands
    ]
    magnitude = None
    if job.magnitude is not None:
        magnitude = slot.tensor(job.magnitude.kind, (job.magnitude.count,), next(places))
    return WeightArgs(out, factors, job.scales, base, magnitude, job.strength, not_finite=flag)
