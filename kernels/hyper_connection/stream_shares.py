"""What every sample adds to the gradients of its mixing weights, at the speed of memory; few streams.

A warp walks over the channels of a sample, or of a part of one where there are few samples; a lane copies what it needs
ahead to places of its own in shared memory. All sums are linear in products of x and d, so that they are added up over
the lanes once a sample; the norm's part is put together from them afterwards.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from kernels import memory, warp
from kernels.elements import ELEMENTS, parked8
from kernels.hardware import WARP
from kernels.hyper_connection.spread_stage import OF_PULL, OF_ROOT, OF_WEIGHTS
from kernels.hyper_connection.stream import RUN, gamma_runs
from kernels.target import blocks_by_shared, cuda, device, f32, f32p, i64, kernel_factory

MOST_STREAMS = 4
"""The sums of a sample are 3 n + n**2 + 2, at most a warp's lanes."""
CHANNELS = RUN * WARP
"""Channels that a warp takes at once."""
STAGES = 3
MOST_WARPS = 16
"""Warps of a multiprocessor that have enough registers for all sums, and of a block."""


@dataclass(frozen=True)
class Crew:
    """The warps of a block: ``parts`` for every sample, one after the other in channels, and ``samples``."""

    parts: int
    samples: int

    @property
    def threads(self) -> int:
        """Of a block."""
        return WARP * self.parts * self.samples


@functools.cache
def _halving(width: int) -> Callable:
    """A device function: lanes exchange half of 2 * width values and add, so that each keeps one half's sums."""

    @device
    def halve(values, lane):
        upper = (lane & np.uint32(width)) != np.uint32(0)
        for k in range(width):
            sent = values[k] if upper else values[k + width]
            kept = values[k + width] if upper else values[k]
            values[k] = kept + warp.shuffle_xor(sent, np.uint32(width))

    return halve


@functools.cache
def _scatter_sums() -> Callable:
    """A device function: of 32 values in every lane, the warp's sum of the lane-th; in one order."""
    halve16, halve8, halve4, halve2, halve1 = (_halving(width) for width in (16, 8, 4, 2, 1))

    @device
    def scatter(values, lane):
        halve16(values, lane)
        halve8(values, lane)
        halve4(values, lane)
        halve2(values, lane)
        halve1(values, lane)
        return values[0]

    return scatter


@functools.cache
def _finish(role: str, n: int, normalised: bool) -> Callable:
    """A device function for one warp, whose lanes have a sum each: the gradient of a sample's mixing weights, and its
    record.
    """
    count, squares_at, pull_at, full = n * (n + 2), 3 * n + n * n, 3 * n + n * n + 1, role == "full"

    @device
    def finish(own, weights, line, more, shares, records, stride, b, channels, eps):
        lane = np.int64(np.uint32(warp.thread_index() % np.uint32(WARP)))
        root, pull, to = np.float32(1), np.float32(0), b * np.int64(count)
        of_a = warp.shuffle_from(own, np.uint32(np.uint32(np.uint32(lane) + np.uint32(n)) % np.uint32(WARP)))
        squares = warp.shuffle_from(own, np.uint32(squares_at))
        pulled = warp.shuffle_from(own, np.uint32(pull_at))
        if normalised:
            root = np.float32(math.sqrt(squares / np.float32(channels) + eps))
            pull = pulled / np.float32(channels) / root
        if lane < np.int64(n):
            if normalised:
                own = (own - pull / root * of_a) / root
            shares[to + lane] = own if full else own + more[to + lane]
        elif not full:
            if lane < np.int64(count):
                shares[to + lane] = more[to + lane]
        elif lane >= np.int64(2 * n) and lane < np.int64(3 * n):
            shares[to + lane - np.int64(n)] = own / root
        elif lane >= np.int64(3 * n) and lane < np.int64(squares_at):
            shares[to + lane - np.int64(n)] = own
        record = b * stride
        if lane == np.int64(WARP - 1):
            records[record + np.int64(OF_ROOT)] = np.float32(1) / root
            records[record + np.int64(OF_PULL)] = pull
        if lane < np.int64(count):
            records[record + np.int64(OF_WEIGHTS) + lane] = weights[line + lane]

    return finish


@functools.cache
def _add_run(role: str, element: str, gamma_element: str | None, n: int, threads: int) -> Callable:
    """A device function: the products of a run of eight channels; ``scale`` is gamma of them, ``line`` the weights."""
    full, normalised, (_, unpark) = role == "full", gamma_element is not None, parked8(element, threads)
    of_mixing, squares_at, values_of_run = 3 * n, 3 * n + n * n, RUN * n

    @device
    def add(shared, slot, line, scale, totals):
        g = cuda.local.array(values_of_run, np.float32)
        v = cuda.local.array(RUN, np.float32)
        a = cuda.local.array(RUN, np.float32)
        dy = cuda.local.array(RUN, np.float32)
        thread = warp.thread_index()
        for e in range(RUN):
            a[e] = np.float32(0)
            dy[e] = np.float32(0)
        if full:
            for i in range(n):
                unpark(shared, 0, np.uint32(slot + np.uint32(n + i)), thread, g, RUN * i)
                for e in range(RUN):
                    dy[e] += line[n + i] * g[RUN * i + e]
        else:
            unpark(shared, 0, np.uint32(slot + np.uint32(n)), thread, dy, 0)
        for e in range(RUN):
            if normalised:
                dy[e] = dy[e] * scale[e]
        for j in range(n):
            unpark(shared, 0, np.uint32(slot + np.uint32(j)), thread, v, 0)
            for e in range(RUN):
                totals[j] += dy[e] * v[e]
                if normalised:
                    a[e] += line[j] * v[e]
                if full:
                    for i in range(n):
                        totals[of_mixing + i * n + j] += g[RUN * i + e] * v[e]
        if normalised:
            for j in range(n):
                unpark(shared, 0, np.uint32(slot + np.uint32(j)), thread, v, 0)
                for e in range(RUN):
                    totals[n + j] += a[e] * v[e]
            for e in range(RUN):
                totals[squares_at] += a[e] * a[e]
                totals[squares_at + 1] += dy[e] * a[e]
                a[e] = a[e] * scale[e]
        if full:
            for i in range(n):
                for e in range(RUN):
                    totals[2 * n + i] += a[e] * g[RUN * i + e]

    return add


@kernel_factory(
    ("full", "bf16", "bf16", 4, Crew(1, 4)), ("full", "f32", "f32", 1, Crew(2, 1)),
    ("pre", "bf16", "bf16", 4, Crew(5, 1)), ("pre", "bf16", None, 4, Crew(1, 4)),
)  # fmt: skip
def stream_shares(role, element, gamma_element, n, crew):
    """Of every sample: the gradient [B, n (n + 2)] of s_pre, s_post and M, and its record but for lifts.

    Roles: "full", d [B, n, C] is the gradient of out; "pre", d [B, C] is that of the aggregate, and ``more`` [B, n (n +
    2)] is added, which is not read in role "full". A block a ``crew.samples`` samples; a part is ``steps`` times
    CHANNELS. Parameters: x, gamma, d, weights, more, shares, records, pitch, stride, C, B, steps, eps; ``pitch`` is n
    (n + 2), or 0 where all samples have the same line of weights, ``stride`` a record's (``spread_stage.py``). The sums
    are, in the order of a warp's lanes: gamma dy x_i; a x_i; gamma a d_i; d_i x_j; a**2; gamma dy a.
    """
    parts, samples, threads, full = crew.parts, crew.samples, crew.threads, role == "full"
    lines, of_d, normalised = (2 * n, n, gamma_element is not None) if full else (n + 1, 1, gamma_element is not None)
    (park_run, _), (fetch_gamma, unpack_gamma, gamma_pointer) = parked8(element, threads), gamma_runs(gamma_element, 1)
    add_run, scatter = _add_run(role, element, gamma_element, n, threads), _scatter_sums()
    finish, arrived = _finish(role, n, normalised), memory.copy_async_wait(STAGES - 1)
    gamma_words, held, sums_length = ELEMENTS[gamma_element or "f32"].words, 2 * n, parts * samples * WARP
    read = held if full else n

    @device
    def slot_of(number):
        return np.uint32(np.uint32(number % np.uint32(STAGES)) * np.uint32(lines))

    @device
    def ahead(shared, x, d, b, c, last, number, channels):
        """Start the copies of the lane's channels from c on, if it has any; always one group."""
        if c < last:
            slot, thread = slot_of(number), warp.thread_index()
            source = b * np.int64(n) * channels + c
            for i in range(n):
                park_run(shared, 0, np.uint32(slot + np.uint32(i)), thread, x, source)
                source += channels
            source = b * np.int64(of_d) * channels + c
            for i in range(of_d):
                park_run(shared, 0, np.uint32(slot + np.uint32(n + i)), thread, d, source)
                source += channels
        memory.copy_async_commit()

    @device
    def over_parts(sums, own, value):
        """The sums of a sample's parts, for its first warp; with one part its own."""
        lane = np.uint32(warp.thread_index() % np.uint32(WARP))
        if parts > 1:
            sums[np.uint32(own * np.uint32(WARP)) + lane] = value
            warp.block_barrier()
            if np.uint32(own % np.uint32(parts)) == np.uint32(0):
                for i in range(1, parts):
                    value += sums[np.uint32(np.uint32(own + np.uint32(i)) * np.uint32(WARP)) + lane]
        return value

    def kernel(x, gamma, d, weights, more, shares, records, pitch, stride, channels, batch, steps, eps):
        shared = cuda.shared.array(0, np.uint16, alignment=128)
        sums = cuda.shared.array(sums_length, np.float32)
        words = cuda.local.array(gamma_words, np.uint32)
        scale = cuda.local.array(RUN, np.float32)
        line = cuda.local.array(held, np.float32)
        totals = cuda.local.array(WARP, np.float32)
        thread = warp.thread_index()
        lane, own = np.uint32(thread % np.uint32(WARP)), np.uint32(thread // np.uint32(WARP))
        part = np.uint32(own % np.uint32(parts))
        b = warp.block_x() * np.int64(samples) + np.int64(np.uint32(own // np.uint32(parts)))
        first = np.int64(part) * steps * np.int64(CHANNELS)
        last = min(channels, first + steps * np.int64(CHANNELS)) if b < batch else first
        c, number = first + np.int64(RUN) * np.int64(lane), np.uint32(0)
        for s in range(STAGES - 1):
            ahead(shared, x, d, b, c + np.int64(s * CHANNELS), last, np.uint32(s), channels)
        for e in range(WARP):
            totals[e] = np.float32(0)
        of_sample = min(b, batch - np.int64(1)) * pitch
        for e in range(read):
            line[e] = weights[of_sample + np.int64(e)]
        while c < last:
            if normalised:
                fetch_gamma(gamma, words, 0, c)
            coming = np.uint32(number + np.uint32(STAGES - 1))
            ahead(shared, x, d, b, c + np.int64((STAGES - 1) * CHANNELS), last, coming, channels)
            arrived()
            unpack_gamma(words, 0, scale)
            add_run(shared, slot_of(number), line, scale, totals)
            c += np.int64(CHANNELS)
            number = np.uint32(number + np.uint32(1))
        warp.sync_warp()
        value = over_parts(sums, own, scatter(totals, lane))
        if part == np.uint32(0) and b < batch:
            finish(value, weights, of_sample, more, shares, records, stride, b, channels, eps)
        memory.copy_async_wait_all()

    pointer = ELEMENTS[element].pointer
    parameters = (pointer, gamma_pointer, pointer, f32p, f32p, f32p, f32p, i64, i64, i64, i64, i64, f32)
    nbytes = STAGES * lines * threads * ELEMENTS[element].words * 4
    resident = min(MOST_WARPS * WARP // threads, blocks_by_shared(nbytes + 4 * sums_length))
    return kernel, parameters, {"threads": threads, "shared_bytes": nbytes, "min_blocks": max(1, resident)}
