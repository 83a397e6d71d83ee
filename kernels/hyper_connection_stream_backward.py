"""The gradient of a static hyper-connection of few streams, at the speed of memory.

As in ``kernels/hyper_connection_stream.py`` samples wait in shared memory, here x and the incoming gradient d of each.
A thread adds up the gradients of the parameters over all samples of its block in registers, so that a block writes one
line of sums; a second kernel adds the blocks' lines in their order and goes back through Sinkhorn. The number of
blocks, and with it the order of every sum, does not depend on the device.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import numpy as np

from kernels import memory, warp
from kernels.elements import ELEMENTS
from kernels.hyper_connection import THREADS, sigmoid
from kernels.hyper_connection_stream import (
    MOST_THREADS,
    RUN,
    Shape,
    block_sums,
    gamma_runs,
    launch_options,
    parking,
)
from kernels.hyper_connection_weights import static_line
from kernels.simulator import WARP
from kernels.sinkhorn_thread import logit_gradient
from kernels.target import cuda, device, f32, f32p, i64, kernel_factory

GROUPS = THREADS // WARP


@functools.cache
def line_sums(count: int, warps: int) -> Callable:
    """A device function: the block's sums of ``count`` values of every thread to ``out`` at ``at``, in one order.

    ``partial`` has ``warps * count`` places; begins with a barrier, has another.
    """

    @device
    def write(partial, values, out, at):
        thread = np.int64(warp.thread_index())
        lane, own = thread % np.int64(WARP), thread // np.int64(WARP)
        warp.block_barrier()
        for e in range(count):
            total = warp.warp_sum(values[e])
            if lane == np.int64(0):
                partial[own * np.int64(count) + np.int64(e)] = total
        warp.block_barrier()
        for e in range(thread, count, warps * WARP):
            total = np.float32(0)
            for i in range(warps):
                total += partial[np.int64(i * count) + e]
            out[at + e] = total

    return write


MOST_STREAMS = 4
"""Streams whose sums a thread holds in registers; with two runs of channels half of them."""


@kernel_factory(
    ("exp", "bf16", "bf16", 4, Shape(512, 1, 2)), ("exp", "bf16", "bf16", 4, Shape(160, 1, 3)),
    ("exp", "f32", "f32", 4, Shape(320, 1, 2)), ("exp", "bf16", "f32", 2, Shape(448, 2, 2)),
    ("exp", "bf16", "f32", 1, Shape(256, 1, 2)),
)  # fmt: skip
def stream_backward(mode, element, gamma_element, n, shape):
    """A walk over samples: d_x[b], and the block's sums for the mixing weights and for gamma.

    Parameters: x, gamma, d, h_pre, h_post, h_res, d_x, sums, gamma_sums, C, B, blocks, iterations, eps. ``sums``
    [blocks, n (n + 2)] are the gradients of s_pre, s_post and M, ``gamma_sums`` [blocks, C] those of gamma. Every block
    makes the mixing weights while its first samples are on their way.
    """
    count, runs, stages, threads = n * (n + 2), shape.runs, shape.stages, shape.threads
    parked, warps, make_line = parking(element, 2 * n, shape), shape.threads // WARP, static_line(mode, n)
    park, unpark, channel = parked.park, parked.unpark, parked.channel
    fetch_gamma, unpack_gamma, gamma_pointer = gamma_runs(gamma_element, runs)
    store8, gamma_words = ELEMENTS[element].store8, runs * ELEMENTS[gamma_element].words
    total_of, write_sums, arrived = block_sums(warps), line_sums(count, warps), memory.copy_async_wait(stages - 1)
    partials, sums_held, values_of_run = 4 * warps, warps * count, RUN * n
    held, gamma_held = RUN * runs, RUN * runs * threads

    @device
    def own(e):
        """A thread's place for its e-th sum of gamma's gradient, which does not fit in registers."""
        return np.int64(e * threads) + np.int64(warp.thread_index())

    @device
    def ahead(shared, x, d, b, number, channels, batch):
        if b < batch:
            stage, at = np.uint32(number % np.uint32(stages)), b * np.int64(n) * channels
            park(shared, stage, x, at, 0, n, channels)
            park(shared, stage, d, at, n, n, channels)
        memory.copy_async_commit()

    @device
    def aggregates(shared, stage, line, words, a, dy, channels):
        """A thread's a and dy in place, and its sums of a**2 and of gamma dy a."""
        v = cuda.local.array(RUN, np.float32)
        squares, pull = np.float32(0), np.float32(0)
        for run in range(runs):
            if channel(run) < channels:
                for e in range(RUN):
                    a[RUN * run + e] = np.float32(0)
                    dy[RUN * run + e] = np.float32(0)
                for i in range(n):
                    unpark(shared, stage, run, i, v, 0)
                    for e in range(RUN):
                        a[RUN * run + e] += line[i] * v[e]
                    unpark(shared, stage, run, n + i, v, 0)
                    for e in range(RUN):
                        dy[RUN * run + e] += line[n + i] * v[e]
                unpack_gamma(words, run, v)
                for e in range(RUN):
                    squares += a[RUN * run + e] * a[RUN * run + e]
                    pull += v[e] * dy[RUN * run + e] * a[RUN * run + e]
        return squares, pull

    @device
    def spread(shared, stage, line, run, y, da, totals, d_x, at, channels):
        """d_x of a run of eight channels, and the run's part of the mixing weights' gradients."""
        g = cuda.local.array(values_of_run, np.float32)
        v = cuda.local.array(RUN, np.float32)
        for i in range(n):
            unpark(shared, stage, run, n + i, g, RUN * i)
            for e in range(RUN):
                totals[n + i] += g[RUN * i + e] * y[e]
        for j in range(n):
            unpark(shared, stage, run, j, v, 0)
            for e in range(RUN):
                totals[j] += da[e] * v[e]
                for i in range(n):
                    totals[2 * n + i * n + j] += g[RUN * i + e] * v[e]
            for e in range(RUN):
                v[e] = line[j] * da[e]
                for i in range(n):
                    v[e] += line[2 * n + i * n + j] * g[RUN * i + e]
            store8(d_x, at + np.int64(j) * channels, v, 0, np.uint32(0))

    def kernel(x, gamma, d, h_pre, h_post, h_res, d_x, sums, gamma_sums, channels, batch, blocks, iterations, eps):
        shared = cuda.shared.array(0, np.uint16, alignment=128)
        line = cuda.shared.array(count, np.float32)
        partial = cuda.shared.array(partials, np.float32)
        of_warps = cuda.shared.array(sums_held, np.float32)
        words = cuda.local.array(gamma_words, np.uint32)
        a = cuda.local.array(held, np.float32)
        dy = cuda.local.array(held, np.float32)
        of_gamma = cuda.shared.array(gamma_held, np.float32)
        totals = cuda.local.array(count, np.float32)
        scale = cuda.local.array(RUN, np.float32)
        da = cuda.local.array(RUN, np.float32)
        b, number = warp.block_x(), np.uint32(0)
        for s in range(stages - 1):
            ahead(shared, x, d, b + np.int64(s) * blocks, np.uint32(s), channels, batch)
        make_line(h_pre, h_post, h_res, line, iterations, eps)
        for e in range(count):
            totals[e] = np.float32(0)
        for e in range(held):
            of_gamma[own(e)] = np.float32(0)
        for run in range(runs):
            if channel(run) < channels:
                fetch_gamma(gamma, words, run, channel(run))
        warp.block_barrier()
        while b < batch:
            coming = np.uint32(number + np.uint32(stages - 1))
            ahead(shared, x, d, b + np.int64(stages - 1) * blocks, coming, channels, batch)
            arrived()
            stage = np.uint32(number % np.uint32(stages))
            squares, pull = aggregates(shared, stage, line, words, a, dy, channels)
            half = np.int64(np.uint32(np.uint32(number % np.uint32(2)) * np.uint32(2 * warps)))
            squares, pull = total_of(partial, half, squares, pull)
            scale_of_a = np.float32(1) / np.float32(math.sqrt(squares / np.float32(channels) + eps))
            pull = pull / np.float32(channels) * scale_of_a
            for run in range(runs):
                c = channel(run)
                if c < channels:
                    unpack_gamma(words, run, scale)
                    for e in range(RUN):
                        u, dy_e = a[RUN * run + e] * scale_of_a, dy[RUN * run + e]
                        of_gamma[own(RUN * run + e)] += dy_e * u
                        da[e] = (scale[e] * dy_e - u * pull) * scale_of_a
                        scale[e] = scale[e] * u
                    at = b * np.int64(n) * channels + c
                    spread(shared, stage, line, run, scale, da, totals, d_x, at, channels)
            b += blocks
            number = np.uint32(number + np.uint32(1))
        memory.copy_async_wait_all()
        write_sums(of_warps, totals, sums, warp.block_x() * np.int64(count))
        for run in range(runs):
            if channel(run) < channels:
                for e in range(RUN):
                    gamma_sums[warp.block_x() * channels + channel(run) + np.int64(e)] = of_gamma[own(RUN * run + e)]

    pointer = ELEMENTS[element].pointer
    parameters = (
        pointer, gamma_pointer, pointer, f32p, f32p, f32p, pointer, f32p, f32p, i64, i64, i64, i64, f32,
    )  # fmt: skip
    return kernel, parameters, launch_options(element, 2 * n, shape, gamma_held * 4, MOST_THREADS)


@functools.cache
def _column_sum(groups: int) -> Callable:
    """A device function: sums over the rows of a column for each of 32 neighbouring columns, for the first warp.

    Every warp takes each groups-th row; ``partial`` has a place a thread. A block barrier.
    """

    @device
    def total_of(values, column, width, rows, partial):
        thread = np.int64(warp.thread_index())
        total = np.float32(0)
        if column < width:
            for row in range(thread // np.int64(WARP), rows, groups):
                total += values[row * width + column]
        partial[thread] = total
        warp.block_barrier()
        for i in range(1, groups):
            if thread < np.int64(WARP):
                total += partial[thread + np.int64(i * WARP)]
        return total

    return total_of


@kernel_factory(("exp", 2), ("exp", 4), ("exp", 8))
def finish_static(mode, n):
    """The sums of the blocks' sums, and back through the mixing weights.

    Parameters: sums, gamma_sums, h_pre, h_post, h_res, d_gamma, d_h_pre, d_h_post, d_h_res, d_mixing, kept, rows, C,
    iterations, eps. Blocks from the second on take 32 channels of gamma each; the first takes the mixing weights.
    ``d_mixing`` [n, n] and ``kept`` [2 iterations, n] are scratch.
    """
    back, count, total_of = logit_gradient(mode, n), n * (n + 2), _column_sum(GROUPS)
    tiles = -(-count // WARP)

    def kernel(
        sums, gamma_sums, h_pre, h_post, h_res, d_gamma, d_h_pre, d_h_post, d_h_res, d_mixing, kept, rows, channels,
        iterations, eps,
    ):  # fmt: skip
        partial = cuda.shared.array(THREADS, np.float32)
        thread = np.int64(warp.thread_index())
        lane = thread % np.int64(WARP)
        if warp.block_x() > np.int64(0):
            c = (warp.block_x() - np.int64(1)) * np.int64(WARP) + lane
            total = total_of(gamma_sums, c, channels, rows, partial)
            if thread < np.int64(WARP) and c < channels:
                d_gamma[c] = total
        else:
            for tile in range(tiles):
                e = np.int64(tile * WARP) + lane
                total = total_of(sums, e, np.int64(count), rows, partial)
                if thread < np.int64(WARP):
                    if e < np.int64(n):
                        s = sigmoid(h_pre[e])
                        d_h_pre[e] = total * s * (np.float32(1) - s)
                    elif e < np.int64(2 * n):
                        s = sigmoid(h_post[e - np.int64(n)])
                        d_h_post[e - np.int64(n)] = total * np.float32(2) * s * (np.float32(1) - s)
                    elif e < np.int64(count):
                        d_mixing[e - np.int64(2 * n)] = total
                warp.block_barrier()
            if thread == np.int64(0):
                zero = np.int64(0)
                back(h_res, zero, d_mixing, zero, d_h_res, zero, kept, zero, np.int64(1), iterations, eps)

    return kernel, (f32p,) * 11 + (i64, i64, i64, f32), {"threads": THREADS}
