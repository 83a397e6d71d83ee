"""Batches: jobs that share a slot of device memory, and the transfers that fill and empty it.

A slot holds the factors of all jobs, then the weights, then those results that do not take their weight's place;
all at multiples of 256 bytes. It is filled and emptied in windows of one host block, whatever tensors lie there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

from lycoris.checkpoint import Checkpoint, SafetensorsFile
from lycoris.merge.jobs import Extent, Job

ALIGNMENT = 256

_Content = TypeVar("_Content")


@dataclass(frozen=True, slots=True)
class Segment(Generic[_Content]):
    """`content` lies at bytes [start, start + nbytes) of something larger."""

    start: int
    nbytes: int
    content: _Content


@dataclass(frozen=True, slots=True)
class Piece(Generic[_Content]):
    """Bytes [first, first + nbytes) of `content` lie at `at` of a window."""

    at: int
    first: int
    nbytes: int
    content: _Content


@dataclass(frozen=True, slots=True)
class Window(Generic[_Content]):
    """Bytes [start, start + nbytes), and what lies there."""

    start: int
    nbytes: int
    pieces: tuple[Piece[_Content], ...]


def cut(segments: Iterable[Segment[_Content]], limit: int) -> Iterator[Window[_Content]]:
    """Windows of at most `limit` bytes (a multiple of 256) over `segments`, which are sorted and do not overlap.

    Segments are cut at multiples of 256 bytes; a window does not span a gap of 256 bytes or more.
    """
    assert limit and limit % ALIGNMENT == 0, limit
    pieces: list[Piece[_Content]] = []
    start = end = 0
    for segment in segments:
        first = 0
        while first < segment.nbytes:
            position = segment.start + first
            if pieces and (position - end >= ALIGNMENT or position - start > limit - ALIGNMENT):
                yield Window(start, end - start, tuple(pieces))
                pieces = []
            if not pieces:
                start = position
            count = min(segment.nbytes - first, limit - (position - start))
            if first + count < segment.nbytes:
                count -= count % ALIGNMENT
            pieces.append(Piece(position - start, first, count, segment.content))
            first += count
            end = position + count
    if pieces:
        yield Window(start, end - start, tuple(pieces))


@dataclass(frozen=True, slots=True)
class Source:
    """Where bytes of a slot come from: a file, from byte `start` on. `check` refuses unfit ones, given as uint8."""

    file: SafetensorsFile
    start: int
    check: Callable[[np.ndarray], None] | None = None


@dataclass(frozen=True, slots=True)
class Target:
    """Where bytes of a slot go: a tensor of the output, from byte `start` on."""

    tensor: str
    start: int


@dataclass(frozen=True, slots=True)
class Placed:
    """A job with its places in the slot; `operands` are those of `job.operands`."""

    job: Job
    base: int
    out: int
    operands: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Batch:
    """Jobs that are computed together: what fills their slot, what empties it, and its size."""

    jobs: tuple[Placed, ...]
    loads: tuple[Window[Source], ...]
    saves: tuple[Window[Target], ...]
    nbytes: int


def make_batches(jobs: Sequence[Job], base: Checkpoint, target_bytes: int, block_bytes: int) -> list[Batch]:
    """Group `jobs`, in their order: as many as fit `target_bytes` of a slot, at least one.

    Args:
        jobs: From `make_jobs`.
        base: Holds their tensors.
        target_bytes: Of a slot; a job that is larger has a batch, and a larger slot, of its own.
        block_bytes: Size of the host blocks that transfers go through, a multiple of 256.
    """
    batches, group, used = [], [], 0
    for job in jobs:
        size = slot_bytes(job)
        if group and used + size > target_bytes:
            batches.append(_place(group, base, block_bytes))
            group, used = [], 0
        group.append(job)
        used += size
    if group:
        batches.append(_place(group, base, block_bytes))
    return batches


def slot_bytes(job: Job) -> int:
    """Bytes of a slot that a job takes."""
    sizes = [factor.nbytes for factor in job.operands]
    sizes += [job.count * job.base.itemsize] + [job.count * job.out.itemsize] * (not job.in_place)
    return sum(map(_aligned, sizes))


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


class _Slot:
    """Hands out aligned places, from the slot's start on."""

    def __init__(self) -> None:
        self.used = 0

    def take(self, nbytes: int) -> int:
        at = self.used
        self.used += _aligned(nbytes)
        return at


def _place(jobs: list[Job], base: Checkpoint, block_bytes: int) -> Batch:
    slot, filled, emptied = _Slot(), [], []
    operands = []
    for job in jobs:
        places = []
        for factor in job.operands:
            places.append(slot.take(factor.nbytes))
            filled.append(Segment(places[-1], factor.nbytes, Source(factor.file, factor.start, factor.check_finite)))
        operands.append(tuple(places))
    bases = []
    for job in jobs:
        size = job.base.itemsize
        bases.append(slot.take(job.count * size))
        for at, extent in _stretched(bases[-1], job, size):
            start = extent.tensor.start + extent.first * size
            source = Source(base.file_of(extent.tensor.name), start, job.check_range)
            filled.append(Segment(at, extent.count * size, source))
    placed = []
    for job, at, places in zip(jobs, bases, operands, strict=True):
        size = job.out.itemsize
        out = at if job.in_place else slot.take(job.count * size)
        for place, extent in _stretched(out, job, size):
            target = Target(extent.tensor.name, extent.first * size)
            emptied.append(Segment(place, extent.count * size, target))
        placed.append(Placed(job, at, out, places))
    emptied.sort(key=lambda segment: segment.start)
    return Batch(tuple(placed), tuple(cut(filled, block_bytes)), tuple(cut(emptied, block_bytes)), slot.used)


def _stretched(at: int, job: Job, itemsize: int) -> Iterator[tuple[int, Extent]]:
    """The extents of `job` with their places from `at` on, one right behind the other: together they are one tensor."""
    for extent in job.extents:
        yield at, extent
        at += extent.count * itemsize
