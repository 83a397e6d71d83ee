"""The jobs of a batch on the device: plans selected beforehand, launched on one stream."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np

from lycoris.checkpoint import Checkpoint
from lycoris.errors import RefusedInput
from lycoris.merge.batches import ALIGNMENT, Batch, Placed
from lycoris.merge.bits import became_infinite
from lycoris.merge.jobs import Extent, Job
from plans.cast import CastArgs, CastDescriptor, CastPlan
from plans.core import Device, DeviceBuffer, ElementKind, NoSku, PlanPreference, TensorMut, Workspace
from plans.weight import GroupedWeightArgs, GroupedWeightDescriptor, GroupedWeightPlan, WeightArgs, WeightPlan

_FLAG_BYTES = ALIGNMENT  # from one flag to the next
_COMPARED = 1 << 22  # elements read again at a time


def choose_kernels(jobs: Iterable[Job], device: Device) -> dict[str, int]:
    """Which kernels compute `jobs`: kernel -> tensors that it computes. Nothing is compiled.

    Raises:
        RefusedInput: no plan computes one of them, naming its modules.
    """
    chosen = {(name, tensor) for job in jobs for name in [_kernel_name(job, device)] for tensor in job.tensors}
    return dict(Counter(name for name, _ in sorted(chosen)))


def _kernel_name(job: Job, device: Device) -> str:
    family, descriptor = (CastPlan, _cast(job)) if job.descriptor is None else (WeightPlan, job.descriptor)
    try:
        sku = family.choose(descriptor, PlanPreference(), device)
    except NoSku as error:
        raise RefusedInput(
            f"{job.where}: cannot be merged on {device.name} ({error}); choose another device"
        ) from error
    return f"{family.name} {sku.name}"


def _cast(job: Job) -> CastDescriptor:
    return CastDescriptor(job.count, job.base, job.out)


@dataclass(frozen=True, slots=True)
class Task:
    """A batch and the plans that compute it.

    Attributes:
        batch: The batch.
        group: Computes all of its jobs that merge.
        merges: Which of its jobs those are, in the order of the group's members.
        casts: The others, with their plans.
    """

    batch: Batch
    group: GroupedWeightPlan
    merges: tuple[int, ...]
    casts: tuple[tuple[int, CastPlan], ...]

    @classmethod
    def of(cls, batch: Batch, device: Device) -> Task:
        """Select and compile."""
        jobs = [placed.job for placed in batch.jobs]
        merges = tuple(i for i, job in enumerate(jobs) if job.descriptor is not None)
        members = GroupedWeightDescriptor(tuple(jobs[i].descriptor for i in merges))
        casts = tuple(
            (i, CastPlan.select(None, _cast(job), device=device))
            for i, job in enumerate(jobs)
            if job.descriptor is None
        )
        return cls(batch, GroupedWeightPlan.select(None, members, device=device), merges, casts)


@dataclass(frozen=True, slots=True)
class Needs:
    """What `Computer` takes of the device's memory besides the slots, in bytes."""

    workspace: int
    table: int
    flags: int

    @classmethod
    def of(cls, tasks: Sequence[Task]) -> Needs:
        """Enough for each of `tasks`, one at a time."""
        return cls(
            max(task.group.workspace_size() for task in tasks),
            max(task.group.table_size() for task in tasks),
            max(len(task.batch.jobs) for task in tasks) * _FLAG_BYTES,
        )

    @property
    def total(self) -> int:
        """All together."""
        return self.workspace + self.table + self.flags


class Computer:
    """Computes batches one after the other, on a stream of its own.

    Holds the workspace, the table of the group's parameters, and for each job of a batch a flag for results that are
    not finite.
    """

    def __init__(self, device: Device, base: Checkpoint, needs: Needs, held: ExitStack) -> None:
        """Allocate `needs`; closing `held` gives the memory back."""
        self._device, self._base = device, base
        self._stream = device.stream()
        self._workspace = Workspace(self.allocate(needs.workspace, held))
        self._table, self._flags = self.allocate(needs.table, held), self.allocate(needs.flags, held)

    def allocate(self, nbytes: int, held: ExitStack) -> DeviceBuffer:
        """Device memory that every stream may use from now on, and that closing `held` gives back."""
        buffer = self._device.allocate(nbytes, self._stream)
        held.callback(buffer.close, self._stream)
        self._device.synchronize(self._stream)
        return buffer

    def prepare(self, task: Task, slot: DeviceBuffer) -> GroupedWeightArgs:
        """What `run` computes in `slot`, with its table on the way to the device; `slot` may still be being filled."""
        members = [_merge_arguments(task.batch.jobs[i], slot, self._flag(i)) for i in task.merges]
        args = GroupedWeightArgs(members, self._table)
        task.group.upload(self._stream, args)
        return args

    def run(self, task: Task, slot: DeviceBuffer, args: GroupedWeightArgs) -> None:
        """Compute a batch whose inputs are in `slot`, as `prepare` has said; the results are there on return.

        Raises:
            RefusedInput: a result is not finite though the base was, naming the modules.
        """
        device, stream, jobs = self._device, self._stream, task.batch.jobs
        device.fill(self._flags, 0, stream)
        task.group.run(stream, self._workspace, args)
        for i, plan in task.casts:
            plan.run(stream, None, _cast_arguments(jobs[i], slot))
        raised = np.zeros((len(jobs), _FLAG_BYTES // 4), np.int32)
        device.copy_out(raised, self._flags, 0, stream)
        device.synchronize(stream)
        for number in np.flatnonzero(raised.any(axis=1)):
            self._check_finite(jobs[number], slot)

    def _flag(self, number: int) -> TensorMut:
        return self._flags.tensor(ElementKind.I32, (1,), _FLAG_BYTES * number)

    def _check_finite(self, placed: Placed, slot: DeviceBuffer) -> None:
        """Not every result is finite: compare with the base, which the results may have replaced in memory."""
        job, out = placed.job, placed.out
        for extent in job.extents:
            file = self._base.file_of(extent.tensor.name)
            for first in range(0, extent.count, _COMPARED):
                count = min(_COMPARED, extent.count - first)
                before = np.empty(count * job.base.itemsize, np.uint8)
                after = np.empty(count * job.out.itemsize, np.uint8)
                file.read_into(before, extent.tensor.start + (extent.first + first) * job.base.itemsize)
                self._device.copy_out(after, slot, out + first * job.out.itemsize, self._stream)
                self._device.synchronize(self._stream)
                if became_infinite(before, job.base, after, job.out):
                    _refuse_result(job, extent)
            out += extent.count * job.out.itemsize


def _refuse_result(job: Job, extent: Extent) -> None:
    for factor in (factor for group in job.factors for factor in group):
        factor.file.check_unchanged()
    raise RefusedInput(
        f"{job.where}: makes values in {extent.tensor.name!r} that are not finite in {job.out.values.name}, "
        "though the base's are; lower the strength or choose a wider dtype"
    )


def _cast_arguments(placed: Placed, slot: DeviceBuffer) -> CastArgs:
    job = placed.job
    return CastArgs(slot.tensor(job.out, (job.count,), placed.out), slot.tensor(job.base, (job.count,), placed.base))


def _merge_arguments(placed: Placed, slot: DeviceBuffer, flag: TensorMut) -> WeightArgs:
    job, shape = placed.job, placed.job.descriptor.shape
    out, base = slot.tensor(job.out, shape, placed.out), slot.tensor(job.base, shape, placed.base)
    places = iter(placed.operands)
    factors = [
        [slot.tensor(operand.element, operand.shape, next(places)) for operand in group]
        for group in job.descriptor.source_operands
    ]
    magnitude = None
    if job.magnitude is not None:
        magnitude = slot.tensor(job.magnitude.kind, (job.magnitude.count,), next(places))
    return WeightArgs(out, factors, job.scales, base, magnitude, job.strength, not_finite=flag)
