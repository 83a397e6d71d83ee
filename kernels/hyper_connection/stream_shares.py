"""What every sample adds to the gradients of its mixing weights, at the speed of memory: dynamic H, few streams.

As in ``kernels/hyper_connection/stream_backward.py`` a block walks over samples that wait in shared memory. All sums of
a sample are linear in products of x and d, so that they need nothing but one reduction over the block; the norm's part
is put together from them afterwards.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import numpy as np

from kernels import memory, warp
from kernels.elements import ELEMENTS
from kernels.hyper_connection.stream import (
    RUN,
    Shape,
    gamma_runs,
    launch_options,
    parking,
    weight_ring,
)
from kernels.simulator import WARP
from kernels.target import cuda, device, f32, f32p, i64, kernel_factory

MOST_STREAMS = 4
"""The sums of a sample are 3 n + n**2 + 2, at most a warp's lanes."""


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
def _finish(role: str, n: int, warps: int, normalised: bool) -> Callable:
    """A device function for one warp: a sample's gradient of its mixing weights and (r, pull) from the warps' sums."""
    count, squares_at, pull_at, full = n * (n + 2), 3 * n + n * n, 3 * n + n * n + 1, role == "full"

    @device
    def total_of(sums, at, e):
        total = np.float32(0)
        for i in range(warps):
            total += sums[at + np.int64(i * WARP) + e]
        return total

    @device
    def finish(sums, at, lane, more, shares, roots, b, channels, eps):
        root, pull = np.float32(1), np.float32(0)
        if normalised:
            squares, pulled = total_of(sums, at, np.int64(squares_at)), total_of(sums, at, np.int64(pull_at))
            root = np.float32(math.sqrt(squares / np.float32(channels) + eps))
            pull = pulled / np.float32(channels) / root
        own, to = total_of(sums, at, lane), b * np.int64(count)
        if lane < np.int64(n):
            if normalised:
                own = (own - pull / root * total_of(sums, at, np.int64(n) + lane)) / root
            shares[to + lane] = own if full else own + more[to + lane]
        elif not full:
            if lane < np.int64(count):
                shares[to + lane] = more[to + lane]
        elif lane >= np.int64(2 * n) and lane < np.int64(3 * n):
            shares[to + lane - np.int64(n)] = own / root
        elif lane >= np.int64(3 * n) and lane < np.int64(squares_at):
            shares[to + lane - np.int64(n)] = own
        if lane == np.int64(WARP - 1):
            roots[b * np.int64(2)] = root
            roots[b * np.int64(2) + np.int64(1)] = pull

    return finish


@functools.cache
def _add_run(role: str, element: str, gamma_element: str | None, n: int, shape: Shape) -> Callable:
    """A device function: the products of a run of eight channels; ``scale`` is gamma of them."""
    full, normalised = role == "full", gamma_element is not None
    unpark = parking(element, 2 * n if full else n + 1, shape).unpark
    of_mixing, squares_at, values_of_run = 3 * n, 3 * n + n * n, RUN * n

    @device
    def add(shared, stage, ring, line, run, scale, totals):
        g = cuda.local.array(values_of_run, np.float32)
        v = cuda.local.array(RUN, np.float32)
        a = cuda.local.array(RUN, np.float32)
        dy = cuda.local.array(RUN, np.float32)
        for e in range(RUN):
            a[e] = np.float32(0)
            dy[e] = np.float32(0)
        if full:
            for i in range(n):
                unpark(shared, stage, run, n + i, g, RUN * i)
                for e in range(RUN):
                    dy[e] += ring[line + n + i] * g[RUN * i + e]
        else:
            unpark(shared, stage, run, n, dy, 0)
        for e in range(RUN):
            if normalised:
                dy[e] = dy[e] * scale[e]
        for j in range(n):
            unpark(shared, stage, run, j, v, 0)
            for e in range(RUN):
                totals[j] += dy[e] * v[e]
                if normalised:
                    a[e] += ring[line + j] * v[e]
                if full:
                    for i in range(n):
                        totals[of_mixing + i * n + j] += g[RUN * i + e] * v[e]
        if normalised:
            for j in range(n):
                unpark(shared, stage, run, j, v, 0)
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
    ("full", "bf16", "bf16", 4, Shape(512, 1, 2)), ("full", "f32", "f32", 1, Shape(256, 1, 2)),
    ("pre", "bf16", "bf16", 4, Shape(512, 1, 2)), ("pre", "bf16", None, 4, Shape(160, 1, 4)),
)  # fmt: skip
def stream_shares(role, element, gamma_element, n, shape):
    """A walk over samples: the gradient [B, n (n + 2)] of s_pre, s_post and M, and ``roots`` [B, 2], r and the pull.

    Roles: "full", d [B, n, C] is the gradient of out; "pre", d [B, C] is that of the aggregate, and ``more`` [B, n (n +
    2)] is added, which is not read in role "full". A sample comes in ``chunks`` pieces of its channels, one run of
    every thread each. Parameters: x, gamma, d, weights, more, shares, roots, pitch, C, chunks, B, blocks, eps;
    ``pitch`` is n (n + 2), or 0 where all samples have the same line of weights. The sums are, in the order of a warp's
    lanes: gamma dy x_i; a x_i; gamma a d_i; d_i x_j; a**2; gamma dy a.
    """
    count, stages, threads, full = n * (n + 2), shape.stages, shape.threads, role == "full"
    lines, of_d, chunk_channels = (2 * n, n, RUN * threads) if full else (n + 1, 1, RUN * threads)
    parked, ring_of, warps = parking(element, lines, shape), weight_ring(count, threads, stages + 1), threads // WARP
    park, channel, fetch_line, place = parked.park, parked.channel, ring_of.fetch, ring_of.place
    fetch_gamma, unpack_gamma, gamma_pointer = gamma_runs(gamma_element, 1)
    add_run, scatter = _add_run(role, element, gamma_element, n, shape), _scatter_sums()
    finish, arrived = _finish(role, n, warps, gamma_element is not None), memory.copy_async_wait(stages - 1)
    gamma_words = ELEMENTS[gamma_element or "f32"].words
    ring_length, sums_length = (stages + 1) * count, 2 * warps * WARP

    @device
    def ahead(shared, ring, x, d, weights, pitch, b, chunk, number, sample, channels, batch):
        """Start the copies of a piece, the block's number-th, of its sample-th sample; always one group."""
        if b < batch:
            stage, first = np.uint32(number % np.uint32(stages)), chunk * np.int64(chunk_channels)
            left = channels - first
            park(shared, stage, x, b * np.int64(n) * channels + first, 0, n, channels, left)
            park(shared, stage, d, b * np.int64(of_d) * channels + first, n, of_d, channels, left)
            if chunk == np.int64(0):
                fetch_line(ring, weights, b * pitch, sample)
        memory.copy_async_commit()

    def kernel(x, gamma, d, weights, more, shares, roots, pitch, channels, chunks, batch, blocks, eps):
        shared = cuda.shared.array(0, np.uint16, alignment=128)
        ring = cuda.shared.array(ring_length, np.float32)
        sums = cuda.shared.array(sums_length, np.float32)
        words = cuda.local.array(gamma_words, np.uint32)
        scale = cuda.local.array(RUN, np.float32)
        totals = cuda.local.array(WARP, np.float32)
        lane, own = warp.thread_index() % np.uint32(WARP), np.int64(warp.thread_index() // np.uint32(WARP))
        b, chunk, number, sample = warp.block_x(), np.int64(0), np.uint32(0), np.uint32(0)
        next_b, next_chunk, next_number, next_sample = b, chunk, number, sample
        for e in range(WARP):
            totals[e] = np.float32(0)
        while b < batch:
            # The first time as many pieces are sent for as there are stages, then one for each that is used up.
            while next_number - number < np.uint32(stages):
                ahead(shared, ring, x, d, weights, pitch, next_b, next_chunk, next_number, next_sample, channels, batch)
                next_number = np.uint32(next_number + np.uint32(1))
                next_chunk += np.int64(1)
                if next_chunk == chunks:
                    next_chunk, next_b = np.int64(0), next_b + blocks
                    next_sample = np.uint32(next_sample + np.uint32(1))
            c = channel(0) + chunk * np.int64(chunk_channels)
            if c < channels:
                fetch_gamma(gamma, words, 0, c)
            arrived()
            if chunk == np.int64(0):
                warp.block_barrier()
            if c < channels:
                unpack_gamma(words, 0, scale)
                stage = np.uint32(number % np.uint32(stages))
                add_run(shared, stage, ring, place(sample), 0, scale, totals)
            number = np.uint32(number + np.uint32(1))
            chunk += np.int64(1)
            if chunk == chunks:
                half = np.int64(np.uint32(np.uint32(sample % np.uint32(2)) * np.uint32(warps * WARP)))
                sums[half + own * np.int64(WARP) + np.int64(lane)] = scatter(totals, lane)
                warp.block_barrier()
                if own == np.int64(0):
                    finish(sums, half, np.int64(lane), more, shares, roots, b, channels, eps)
                for e in range(WARP):
                    totals[e] = np.float32(0)
                chunk, b = np.int64(0), b + blocks
                sample = np.uint32(sample + np.uint32(1))
        memory.copy_async_wait_all()

    pointer = ELEMENTS[element].pointer
    parameters = (pointer, gamma_pointer, pointer, f32p, f32p, f32p, f32p, i64, i64, i64, i64, i64, f32)
    return kernel, parameters, launch_options(element, lines, shape, most_threads=512)
