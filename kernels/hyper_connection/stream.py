"""Hyper-connections of few streams, forward, at the speed of memory: samples wait in shared memory, read once.

A block walks over samples. A thread copies runs of eight neighbouring channels of every stream to places of its own,
some samples ahead, so that data need no barrier; a sample's norm needs one. Streams are read and written in 16-byte
accesses, arithmetic is fp32. What is computed is said in ``plans/hyper_connection/static.py``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np

from kernels import memory, warp
from kernels.elements import ELEMENTS, parked8
from kernels.hardware import WARP
from kernels.hyper_connection.weights import static_line
from kernels.target import blocks_by_shared, cuda, device, f32, f32p, i64, kernel_factory

RUN = 8
"""Neighbouring channels that a thread moves at once."""
MOST_THREADS = 512
MOST_STAGES = 4
SM80_BYTES, SM90_BYTES = 160 << 10, 224 << 10
"""Shared memory that a block may use for samples, on sm_80 and on sm_90; a few KiB are left for the rest."""


@dataclass(frozen=True)
class Shape:
    """How a block holds a sample: ``threads`` with ``runs`` of eight channels each, in ``stages`` places."""

    threads: int
    runs: int
    stages: int

    def slot_bytes(self, element: str) -> int:
        """Shared memory of one run of every thread."""
        return self.threads * ELEMENTS[element].words * 4


def shape_for(
    element: str, streams: int, channels: int, most_bytes: int, most_runs: int = 2, held_bytes: int = 0
) -> Shape | None:
    """The block for samples of so many streams, or None where even two samples do not fit in ``most_bytes``.

    A thread holds ``held_bytes`` a channel beside them.
    """
    runs = next((r for r in range(1, most_runs + 1) if channels <= r * RUN * MOST_THREADS), 0)
    if not runs:
        return None
    threads = -(-channels // (RUN * runs * WARP)) * WARP
    sample = streams * runs * threads * ELEMENTS[element].words * 4
    stages = min(MOST_STAGES, (most_bytes - held_bytes * RUN * runs * threads) // sample)
    return Shape(threads, runs, stages) if stages > 1 else None


@functools.cache
def block_sums(warps: int) -> Callable:
    """A device function: the sums over the block of two values in every thread, in one order.

    ``partial`` has two places a warp at ``at``; they may be used again after the next barrier but one.
    """

    @device
    def total_of(partial, at, first, second):
        thread = warp.thread_index()
        first, second = warp.warp_sum(first), warp.warp_sum(second)
        if thread % np.uint32(WARP) == np.uint32(0):
            own = at + np.int64(np.uint32(np.uint32(thread // np.uint32(WARP)) * np.uint32(2)))
            partial[own] = first
            partial[own + np.int64(1)] = second
        warp.block_barrier()
        first, second = np.float32(0), np.float32(0)
        for i in range(warps):
            first += partial[at + 2 * i]
            second += partial[at + 2 * i + 1]
        return first, second

    return total_of


@functools.cache
def block_sum(warps: int) -> Callable:
    """A device function: the sum over the block of a value in every thread, in one order.

    ``partial`` has a place a warp at ``at``; they may be used again after the next barrier but one.
    """

    @device
    def total_of(partial, at, value):
        thread = warp.thread_index()
        total = warp.warp_sum(value)
        if thread % np.uint32(WARP) == np.uint32(0):
            partial[at + np.int64(thread // np.uint32(WARP))] = total
        warp.block_barrier()
        total = np.float32(0)
        for i in range(warps):
            total += partial[at + i]
        return total

    return total_of


@functools.cache
def parking(element: str, lines: int, shape: Shape) -> SimpleNamespace:
    """Device functions that park a sample's ``lines`` [lines, C] in a stage, and give runs of them back as fp32.

    ``park(shared, stage, pointer, at, first, count, stride, channels)`` starts the copies of ``channels`` channels of
    ``count`` lines ``stride`` apart, the first of them at ``at`` and in the place ``first``; ``unpark(shared, stage,
    run, line, values, to)`` gives eight channels. ``channel(run)`` is the thread's first channel of a run.
    """
    threads, runs = shape.threads, shape.runs
    park_run, unpark_run = parked8(element, threads)

    @device
    def channel(run):
        return (np.int64(run * threads) + np.int64(warp.thread_index())) * np.int64(RUN)

    @device
    def slot(stage, run, line):
        return np.uint32(np.uint32(stage * np.uint32(lines * runs)) + np.uint32(run * lines + line))

    @device
    def park(shared, stage, pointer, at, first, count, stride, channels):
        for run in range(runs):
            c = channel(run)
            if c < channels:
                for line in range(count):
                    source = at + np.int64(line) * stride + c
                    park_run(shared, 0, slot(stage, run, first + line), warp.thread_index(), pointer, source)

    @device
    def unpark(shared, stage, run, line, values, to):
        unpark_run(shared, 0, slot(stage, run, line), warp.thread_index(), values, to)

    return SimpleNamespace(park=park, unpark=unpark, channel=channel)


@functools.cache
def weight_ring(count: int, threads: int, slots: int) -> SimpleNamespace:
    """Device functions for lines of ``count`` mixing weights in a ring of shared memory, or one line for all samples.

    ``fetch`` starts the copy of sample ``number``'s line, the block's number-th; ``place`` says where it lies.
    """

    @device
    def place(number):
        return np.int64(np.uint32(np.uint32(number % np.uint32(slots)) * np.uint32(count)))

    @device
    def fetch(ring, weights, line, number):
        for e in range(np.int64(warp.thread_index()), count, threads):
            memory.copy_async4(ring, place(number) + e, weights, line + e)

    return SimpleNamespace(fetch=fetch, place=place)


def launch_options(element: str, lines: int, shape: Shape, more: int = 0, most_threads: int = 1024) -> dict:
    """Threads, shared memory, and how many blocks a multiprocessor is to hold: of ``most_threads`` threads in all.

    ``more`` bytes of shared memory are used beside the samples'.
    """
    samples = lines * shape.runs * shape.stages * shape.slot_bytes(element)
    return {
        "threads": shape.threads,
        "shared_bytes": samples,
        "min_blocks": max(1, min(most_threads // shape.threads, blocks_by_shared(samples + more))),
        "architectures": (8, 0) if samples + more <= SM80_BYTES else (9, 0, "a"),
    }


@functools.cache
def gamma_runs(gamma_element: str | None, runs: int) -> tuple[Callable, Callable, object]:
    """Device functions that fetch the thread's gamma into words, and unpack a run of it; and gamma's pointer type."""
    found = ELEMENTS[gamma_element or "f32"]
    fetch8, unpack8, words_of_8, normalised = found.fetch8_cached, found.unpack8, found.words, gamma_element is not None

    @device
    def fetch(gamma, words, run, c):
        if normalised:
            fetch8(gamma, c, words, run * words_of_8)

    @device
    def unpack(words, run, values):
        if normalised:
            unpack8(words, run * words_of_8, values, 0)

    return fetch, unpack, found.pointer


_EXAMPLES = (
    ("full", "bf16", "bf16", 4, Shape(512, 1, 2), "exp"),
    ("full", "bf16", "bf16", 4, Shape(160, 1, 4), None),
    ("full", "bf16", "f32", 8, Shape(512, 1, 2), "exp"),
    ("full", "bf16", "bf16", 2, Shape(512, 2, 3), "exp"),
    ("pre", "bf16", "bf16", 4, Shape(512, 1, 2), "softmax"),
    ("post", "bf16", None, 4, Shape(512, 1, 2), None),
)


@kernel_factory(*_EXAMPLES)
def stream(role, element, gamma_element, n, shape, static):
    """A walk over samples b: roles "full", out[b] = M x[b] + s_post y[b]; "pre", out[b] = y[b]; "post", y is given.

    y is the RMS-normalised s_pre x[b], or s_pre x[b] itself where gamma_element is None. ``static`` is None where
    ``weights`` have a line a sample, "given" where they are one line for all, and else Sinkhorn's mode: then every
    block makes the line from h_pre, h_post and h_res, while its first samples are on their way, and in role "pre" the
    first block writes it to ``weights``. Parameters: x, gamma, y, weights, h_pre, h_post, h_res, out, C, B, blocks,
    iterations, eps; ``y`` [B, C] is read in role "post", gamma where there is one.
    """
    per_sample, made = static is None, static not in (None, "given")
    make_line = static_line(static if made else "exp", n)
    aggregates, mixes, given = role != "post", role != "pre", role == "post"
    normalised = gamma_element is not None
    lines, count, runs, stages, threads = n + given, n * (n + 2), shape.runs, shape.stages, shape.threads
    parked, ring_of = parking(element, lines, shape), weight_ring(count, shape.threads, stages + 1)
    park, unpark, channel, fetch_line, place = parked.park, parked.unpark, parked.channel, ring_of.fetch, ring_of.place
    fetch_gamma, unpack_gamma, gamma_pointer = gamma_runs(gamma_element, runs)
    store8, warps = ELEMENTS[element].store8, shape.threads // WARP
    total_of, arrived = block_sum(warps), memory.copy_async_wait(stages - 1)
    gamma_words, values_of_run = runs * ELEMENTS[gamma_element or "f32"].words, RUN * n
    ring_length, partials, held = (stages + 1) * count, 2 * warps, RUN * runs

    @device
    def ahead(shared, ring, x, y, weights, b, number, channels, batch):
        """Start the copies of the block's number-th sample b, if there is one; always one group."""
        if b < batch:
            stage = np.uint32(number % np.uint32(stages))
            park(shared, stage, x, b * np.int64(n) * channels, 0, n, channels, channels)
            if given:
                park(shared, stage, y, b * channels, n, 1, channels, channels)
            if per_sample:
                fetch_line(ring, weights, b * np.int64(count), number)
        memory.copy_async_commit()

    @device
    def aggregate(shared, stage, ring, line, a, channels):
        """A thread's a in place, and its sum of squares."""
        v = cuda.local.array(RUN, np.float32)
        squares = np.float32(0)
        for run in range(runs):
            for e in range(RUN):
                a[RUN * run + e] = np.float32(0)
            if channel(run) < channels:
                for i in range(n):
                    unpark(shared, stage, run, i, v, 0)
                    for e in range(RUN):
                        a[RUN * run + e] += ring[line + i] * v[e]
                for e in range(RUN):
                    squares += a[RUN * run + e] * a[RUN * run + e]
        return squares

    @device
    def mix(shared, stage, ring, line, run, y, out, at, channels):
        """Out of a run of eight channels, for y of them."""
        v = cuda.local.array(values_of_run, np.float32)
        result = cuda.local.array(RUN, np.float32)
        for j in range(n):
            unpark(shared, stage, run, j, v, RUN * j)
        for i in range(n):
            for e in range(RUN):
                mixed = ring[line + n + i] * y[e]
                for j in range(n):
                    mixed += ring[line + (2 + i) * n + j] * v[RUN * j + e]
                result[e] = mixed
            store8(out, at + np.int64(i) * channels, result, 0, np.uint32(0))

    def kernel(x, gamma, y, weights, h_pre, h_post, h_res, out, channels, batch, blocks, iterations, eps):
        shared = cuda.shared.array(0, np.uint16, alignment=128)
        ring = cuda.shared.array(ring_length, np.float32)
        partial = cuda.shared.array(partials, np.float32)
        words = cuda.local.array(gamma_words, np.uint32)
        a = cuda.local.array(held, np.float32)
        v = cuda.local.array(RUN, np.float32)
        b, number = warp.block_x(), np.uint32(0)
        if not per_sample and not made:
            fetch_line(ring, weights, np.int64(0), number)
        for s in range(stages - 1):
            ahead(shared, ring, x, y, weights, b + np.int64(s) * blocks, np.uint32(s), channels, batch)
        if made:
            make_line(h_pre, h_post, h_res, ring, iterations, eps)
        for run in range(runs):
            if channel(run) < channels:
                fetch_gamma(gamma, words, run, channel(run))
        while b < batch:
            coming = np.uint32(number + np.uint32(stages - 1))
            ahead(shared, ring, x, y, weights, b + np.int64(stages - 1) * blocks, coming, channels, batch)
            arrived()
            if per_sample or number == np.uint32(0):
                warp.block_barrier()
            stage = np.uint32(number % np.uint32(stages))
            line = place(number) if per_sample else np.int64(0)
            scale = np.float32(1)
            if aggregates:
                squares = aggregate(shared, stage, ring, line, a, channels)
                if normalised:
                    half = np.int64(np.uint32(np.uint32(number % np.uint32(2)) * np.uint32(warps)))
                    mean = total_of(partial, half, squares) / np.float32(channels)
                    scale = np.float32(1) / np.float32(math.sqrt(mean + eps))
            for run in range(runs):
                c = channel(run)
                if c < channels:
                    if given:
                        unpark(shared, stage, run, n, v, 0)
                    else:
                        unpack_gamma(words, run, v)
                        for e in range(RUN):
                            y_e = a[RUN * run + e] * scale
                            v[e] = v[e] * y_e if normalised else y_e
                    if mixes:
                        mix(shared, stage, ring, line, run, v, out, b * np.int64(n) * channels + c, channels)
                    else:
                        store8(out, b * channels + c, v, 0, np.uint32(0))
            b += blocks
            number = np.uint32(number + np.uint32(1))
        memory.copy_async_wait_all()
        if made and not mixes and warp.block_x() == np.int64(0):
            for e in range(np.int64(warp.thread_index()), count, threads):
                weights[e] = ring[e]

    pointer = ELEMENTS[element].pointer
    parameters = (pointer, gamma_pointer, pointer, f32p, f32p, f32p, f32p, pointer, i64, i64, i64, i64, f32)
    # More than four streams do not fit in the registers that two blocks of 512 threads leave a thread.
    return kernel, parameters, launch_options(element, lines, shape, most_threads=1024 if n <= 4 else 512)
