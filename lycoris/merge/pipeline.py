"""The pipeline: read, host to device, kernel, device to host and write, of different batches at once.

    files --readers--> page-locked blocks --> slot k --main thread: kernels--> slot k --> blocks --writers--> files

A slot holds a batch from its first read to its last write. Each reader and writer has one block: while it waits for
a disk, the others' copies run. Tensors that do not change go from file to file in the writers' threads.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass

from lycoris.checkpoint import Checkpoint, CheckpointWriter, SafetensorsFile
from lycoris.merge.batches import Segment, Source, Target, Window, cut, make_batches
from lycoris.merge.compute import Computer, Needs, Task
from lycoris.merge.crew import Crew
from lycoris.merge.jobs import Job, gaps
from lycoris.merge.lanes import Lane, Lanes
from plans.core import Device, DeviceBuffer

ProgressCallback = Callable[[int, int], None]

MAX_SLOTS = 3
SPARE_BYTES = 1 << 29
"""Device memory besides four times the largest tensor: half of the 1 GiB that a merge may take, CUDA takes the rest."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much of a machine the pipeline uses.

    Attributes:
        readers, writers: Threads, each with a block.
        block_bytes: Of page-locked memory that a thread reads into or writes from; a multiple of 256.
        batch_bytes: Of a slot, which grows for a job that is larger.
    """

    readers: int
    writers: int
    block_bytes: int
    batch_bytes: int


# Eight threads read 27 GB/s out of the page cache, one 4.9. One thread writes 5.5 GB/s into it; more share the file's
# lock, and gain only what hides the copies from the device. Larger blocks leave the processor's caches between the
# two: 2.2 s for 8 GB by 8 writers with 16 MiB, 1.6 s by these. Page-locking costs 0.5 s a GiB (H200).
GPU_SIZES = Sizes(readers=8, writers=4, block_bytes=4 << 20, batch_bytes=128 << 20)
SIMULATOR_SIZES = Sizes(readers=1, writers=1, block_bytes=1 << 20, batch_bytes=4 << 20)


class Progress:
    """Counts written bytes from several threads; the callback is called under a lock, in order."""

    def __init__(self, total: int, callback: ProgressCallback | None) -> None:
        self._lock, self._done, self._total = threading.Lock(), 0, total
        self._callback = callback
        self.add(0)

    def add(self, nbytes: int) -> None:
        """`nbytes` more are written."""
        with self._lock:
            self._done += nbytes
            if self._callback is not None:
                self._callback(self._done, self._total)


@dataclass
class _Running:
    """A batch in its slot, with the tasks that fill and empty it."""

    task: Task
    slot: DeviceBuffer
    loads: list[Future[None]]
    saves: list[Future[None]] | None = None


class Pipeline:
    """One merge's data, from the base and the adapters to `writer`.

    Call `run` once, in the thread that made the object, inside the writer's block.
    """

    def __init__(
        self,
        device: Device,
        base: Checkpoint,
        writer: CheckpointWriter,
        jobs: Sequence[Job],
        progress: ProgressCallback | None,
        sizes: Sizes | None = None,
    ) -> None:
        self._device, self._base, self._writer = device, base, writer
        self._sizes = sizes or (SIMULATOR_SIZES if device.is_simulator else GPU_SIZES)
        batches = make_batches(jobs, base, self._sizes.batch_bytes, self._sizes.block_bytes)
        self._tasks = [Task.of(batch, device) for batch in batches]
        self._progress = Progress(sum(entry.nbytes for entry in writer.tensors.values()), progress)
        self._changed: dict[str, list[tuple[int, int]]] = {}
        for job in jobs:
            for extent in job.extents:
                first, last = (at * job.base.itemsize for at in (extent.first, extent.first + extent.count))
                self._changed.setdefault(extent.tensor.name, []).append((first, last))
        self._lanes = Lanes(device, self._sizes.block_bytes)

    def run(self) -> None:
        """Write every tensor of the output.

        Raises:
            RefusedInput: a factor or a result is not finite, naming the module.
            MergeFailed: a file could not be read or written.
            DeviceError: the device has too little memory, or failed.
        """
        sizes = self._sizes
        threads = {"reader": sizes.readers, "writer": sizes.writers}
        with ExitStack() as held, self._lanes, Crew(threads, self._device.make_current) as crew:
            copies = [
                crew.submit("writer", self._copy, file, window)
                for file in self._base.files
                for window in cut(self._unchanged(file), sizes.block_bytes)
            ]
            if self._tasks:
                self._run_tasks(crew, held)
            crew.finish(copies)

    def _run_tasks(self, crew: Crew, held: ExitStack) -> None:
        needs = Needs.of(self._tasks)
        computer = Computer(self._device, self._base, needs, held)
        size = max(task.batch.nbytes for task in self._tasks)
        free = [computer.allocate(size, held) for _ in range(self._slot_count(size, needs))]
        running: deque[_Running] = deque()
        for task in self._tasks:
            if not free:
                free.append(self._retire(crew, computer, running.popleft()))
            slot = free.pop()
            loads = [crew.submit("reader", self._load, slot, window) for window in task.batch.loads]
            running.append(_Running(task, slot, loads))
            if len(running) > 1:
                self._compute(crew, computer, running[-2])
        while running:
            self._retire(crew, computer, running.popleft())

    def _slot_count(self, slot_bytes: int, needs: Needs) -> int:
        """As many slots as are of use and fit."""
        largest = max(
            entry.nbytes for tensors in (self._base.tensors, self._writer.tensors) for entry in tensors.values()
        )
        room = 4 * largest + SPARE_BYTES - needs.total
        return max(1, min(MAX_SLOTS, len(self._tasks), room // slot_bytes))

    def _compute(self, crew: Crew, computer: Computer, running: _Running) -> None:
        """Launch a batch when it has come, and have its results written."""
        if running.saves is None:
            task, slot = running.task, running.slot
            args = computer.prepare(task, slot)  # while the last of its inputs are read
            crew.finish(running.loads)
            computer.run(task, slot, args)
            running.saves = [crew.submit("writer", self._save, slot, window) for window in task.batch.saves]

    def _retire(self, crew: Crew, computer: Computer, running: _Running) -> DeviceBuffer:
        """The slot of a batch, when all of its results are written."""
        self._compute(crew, computer, running)
        crew.finish(running.saves or ())
        return running.slot

    def _load(self, slot: DeviceBuffer, window: Window[Source]) -> None:
        with self._lanes.take() as lane:
            for piece in window.pieces:
                data = lane.block[piece.at : piece.at + piece.nbytes]
                piece.content.file.read_into(data, piece.content.start + piece.first)
                if piece.content.check is not None:
                    piece.content.check(data)
            lane.copy_in(slot, window.start, window.nbytes)

    def _save(self, slot: DeviceBuffer, window: Window[Target]) -> None:
        with self._lanes.take() as lane:
            lane.copy_out(slot, window.start, window.nbytes)
            self._write(lane, window)

    def _copy(self, file: SafetensorsFile, window: Window[Target]) -> None:
        with self._lanes.take() as lane:
            file.read_into(lane.block[: window.nbytes], window.start)
            self._write(lane, window)

    def _write(self, lane: Lane, window: Window[Target]) -> None:
        for piece in window.pieces:
            data = lane.block[piece.at : piece.at + piece.nbytes]
            self._writer.write(piece.content.tensor, piece.content.start + piece.first, data)
            self._progress.add(piece.nbytes)

    def _unchanged(self, file: SafetensorsFile) -> Iterator[Segment[Target]]:
        """What of `file` no job makes, where it lies in it."""
        for name, entry in file.entries.items():
            for first, last in gaps(self._changed.get(name, ()), entry.nbytes):
                yield Segment(entry.start + first, last - first, Target(name, first))
