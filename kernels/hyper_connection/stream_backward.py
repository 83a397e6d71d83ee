"""The gradient of hyper-connections of few streams, static or around a sublayer, at the speed of memory.

As in ``kernels/hyper_connection/stream.py`` samples wait in shared memory, here x and the incoming gradient d of each.
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
from kernels.hardware import WARP
from kernels.hyper_connection.stream import (
    MOST_THREADS,
    RUN,
    Shape,
    block_sums,
    gamma_runs,
    launch_options,
    parking,
    weight_ring,
)
from kernels.hyper_connection.sums import line_sums
from kernels.hyper_connection.weights import static_line
from kernels.target import cuda, device, f32, f32p, i64, kernel_factory

MOST_STREAMS = 4
"""Streams whose sums a thread holds in registers; with two runs of channels half of them."""


@functools.cache
def _aggregates(role: str, element: str, gamma_element: str | None, n: int, shape: Shape) -> Callable:
    """A device function: a thread's a and dy in place, and its sums of a**2 and of gamma dy a.

    In role "pre" dy is the line after x and d; in role "post" nothing is done.
    """
    parked, runs = parking(element, 2 * n + (role != "full"), shape), shape.runs
    unpark, channel, (_, unpack_gamma, _) = parked.unpark, parked.channel, gamma_runs(gamma_element, runs)
    full, has_aggregate, normalised = role == "full", role != "post", gamma_element is not None

    @device
    def aggregates(shared, stage, line, at, words, a, dy, channels):
        v = cuda.local.array(RUN, np.float32)
        squares, pull = np.float32(0), np.float32(0)
        for run in range(runs):
            if has_aggregate and channel(run) < channels:
                for e in range(RUN):
                    a[RUN * run + e] = np.float32(0)
                    dy[RUN * run + e] = np.float32(0)
                for i in range(n):
                    if normalised:
                        unpark(shared, stage, run, i, v, 0)
                        for e in range(RUN):
                            a[RUN * run + e] += line[at + i] * v[e]
                    if full:
                        unpark(shared, stage, run, n + i, v, 0)
                        for e in range(RUN):
                            dy[RUN * run + e] += line[at + n + i] * v[e]
                if not full:
                    unpark(shared, stage, run, 2 * n, dy, RUN * run)
                unpack_gamma(words, run, v)
                for e in range(RUN):
                    if normalised:
                        squares += a[RUN * run + e] * a[RUN * run + e]
                        pull += v[e] * dy[RUN * run + e] * a[RUN * run + e]
        return squares, pull

    return aggregates


@functools.cache
def _spread(role: str, element: str, n: int, shape: Shape) -> Callable:
    """A device function: d_x of a run of eight channels, and the run's part of the mixing weights' gradients.

    ``y`` is what s_post is multiplied by in the forward, ``da`` the gradient of a.
    """
    unpark = parking(element, 2 * n + (role != "full"), shape).unpark
    mixes, has_aggregate, values_of_run, store8 = role != "pre", role != "post", RUN * n, ELEMENTS[element].store8

    @device
    def spread(shared, stage, line, at, run, y, da, totals, d_x, to, stride):
        g = cuda.local.array(values_of_run, np.float32)
        v = cuda.local.array(RUN, np.float32)
        for i in range(n):
            unpark(shared, stage, run, n + i, g, RUN * i)
            if mixes:
                for e in range(RUN):
                    totals[n + i] += g[RUN * i + e] * y[e]
        for j in range(n):
            unpark(shared, stage, run, j, v, 0)
            for e in range(RUN):
                if has_aggregate:
                    totals[j] += da[e] * v[e]
                if mixes:
                    for i in range(n):
                        totals[2 * n + i * n + j] += g[RUN * i + e] * v[e]
            for e in range(RUN):
                v[e] = line[at + j] * da[e] if has_aggregate else np.float32(0)
                if mixes:
                    for i in range(n):
                        v[e] += line[at + 2 * n + i * n + j] * g[RUN * i + e]
                else:
                    v[e] += g[RUN * j + e]
            store8(d_x, to + np.int64(j) * stride, v, 0, np.uint32(0))

    return spread


@functools.cache
def _d_update(element: str, n: int, shape: Shape) -> Callable:
    """A device function: the gradient of the update, sum_i s_post[i] d_i, of a run of eight channels."""
    unpark, store8 = parking(element, 2 * n + 1, shape).unpark, ELEMENTS[element].store8

    @device
    def write(shared, stage, line, at, run, d_y, to):
        v = cuda.local.array(RUN, np.float32)
        total = cuda.local.array(RUN, np.float32)
        for e in range(RUN):
            total[e] = np.float32(0)
        for i in range(n):
            unpark(shared, stage, run, n + i, v, 0)
            for e in range(RUN):
                total[e] += line[at + n + i] * v[e]
        store8(d_y, to, total, 0, np.uint32(0))

    return write


@functools.cache
def _ahead(element: str, n: int, shape: Shape, more: bool, slots: int) -> Callable:
    """A device function: start the copies of the block's number-th sample b, if there is one; always one group.

    ``slots`` are those of the ring of weights, 0 where they are not fetched with the samples.
    """
    park, stages, count = parking(element, 2 * n + more, shape).park, shape.stages, n * (n + 2)
    per_sample, fetch_line = slots > 0, weight_ring(count, shape.threads, max(slots, 1)).fetch

    @device
    def ahead(shared, line, x, d, extra, weights, b, number, first, channels, stride, batch):
        if b < batch:
            stage, at = np.uint32(number % np.uint32(stages)), b * np.int64(n) * stride + first
            park(shared, stage, x, at, 0, n, stride, channels)
            park(shared, stage, d, at, n, n, stride, channels)
            if more:
                park(shared, stage, extra, b * stride + first, 2 * n, 1, stride, channels)
            if per_sample:
                fetch_line(line, weights, b * np.int64(count), number)
        memory.copy_async_commit()

    return ahead


_EXAMPLES = (
    ("full", "bf16", "bf16", 4, Shape(512, 1, 2), "exp"),
    ("full", "f32", "f32", 4, Shape(320, 1, 2), "exp"),
    ("full", "bf16", "f32", 2, Shape(448, 2, 2), "exp"),
    ("pre", "bf16", "bf16", 4, Shape(512, 1, 2), "given"),
    ("post", "bf16", None, 4, Shape(512, 1, 2), None),
    ("post", "f32", None, 2, Shape(160, 1, 2), None),
)


@kernel_factory(*_EXAMPLES)
def stream_backward(role, element, gamma_element, n, shape, static):
    """A walk over samples: d_x[b], and the sums for the mixing weights and for gamma.

    Roles: "full", the whole connection, d [B, n, C] the gradient of out; "post", what comes after the sublayer, whose
    update is ``extra`` [B, C] and gets its gradient in ``d_y``; "pre", what comes before it, ``extra`` the gradient of
    the aggregate and d what is added to d_x. ``static`` is as in ``stream``: Sinkhorn's mode in role "full", where
    every block makes the weights while its first samples are on their way, else "given" or None. Parameters: x, gamma,
    d, extra, weights, h_pre, h_post, h_res, d_x, d_y, sums, gamma_sums, first, channels, C, row, B, blocks, iterations,
    eps. ``sums`` are the gradients of s_pre, s_post and M, a line [n (n + 2)] a block, or where weights have a line a
    sample one a sample, from line ``row`` on; ``gamma_sums`` [blocks, C] those of gamma, where there is one. Without a
    norm a launch may take only ``channels`` of the C, from ``first`` on.
    """
    count, runs, stages, threads = n * (n + 2), shape.runs, shape.stages, shape.threads
    per_sample, made, normalised = static is None, role == "full", gamma_element is not None
    has_aggregate, has_extra = role != "post", role != "full"
    slots = stages + 1 if per_sample else 1
    ring = weight_ring(count, threads, slots)
    channel, warps, place, fetch_line = parking(element, 2 * n, shape).channel, threads // WARP, ring.place, ring.fetch
    ahead = _ahead(element, n, shape, has_extra, slots if per_sample else 0)
    aggregates, spread = _aggregates(role, element, gamma_element, n, shape), _spread(role, element, n, shape)
    unpark = parking(element, 2 * n + has_extra, shape).unpark
    make_line, write_update = static_line(static if made else "exp", n), _d_update(element, n, shape)
    fetch_gamma, unpack_gamma, gamma_pointer = gamma_runs(gamma_element, runs)
    total_of, write_sums, arrived = block_sums(warps), line_sums(count, warps), memory.copy_async_wait(stages - 1)
    gamma_words = runs * ELEMENTS[gamma_element or "f32"].words
    line_length, partials, sums_held = slots * count, 4 * warps, warps * count
    held, gamma_held = RUN * runs, RUN * runs * threads if normalised else 1

    @device
    def own(e):
        """A thread's place for its e-th sum of gamma's gradient, which does not fit in registers."""
        return np.int64(e * threads) + np.int64(warp.thread_index())

    @device
    def run_back(words, run, a, dy, scale_of_a, pull, of_gamma, y, da):
        """Y and da of a run's eight channels, and its part of gamma's gradient."""
        unpack_gamma(words, run, y)
        for e in range(RUN):
            dy_e = dy[RUN * run + e]
            if normalised:
                u = a[RUN * run + e] * scale_of_a
                of_gamma[own(RUN * run + e)] += dy_e * u
                da[e] = (y[e] * dy_e - u * pull) * scale_of_a
                y[e] = y[e] * u
            else:
                da[e] = dy_e

    def kernel(
        x, gamma, d, extra, weights, h_pre, h_post, h_res, d_x, d_y, sums, gamma_sums, first, channels, stride, row,
        batch, blocks, iterations, eps,
    ):  # fmt: skip
        shared = cuda.shared.array(0, np.uint16, alignment=128)
        line = cuda.shared.array(line_length, np.float32)
        partial = cuda.shared.array(partials, np.float32)
        of_warps = cuda.shared.array(sums_held, np.float32)
        of_gamma = cuda.shared.array(gamma_held, np.float32)
        words = cuda.local.array(gamma_words, np.uint32)
        a = cuda.local.array(held, np.float32)
        dy = cuda.local.array(held, np.float32)
        totals = cuda.local.array(count, np.float32)
        y = cuda.local.array(RUN, np.float32)
        da = cuda.local.array(RUN, np.float32)
        b, number = warp.block_x(), np.uint32(0)
        if not per_sample and not made:
            fetch_line(line, weights, np.int64(0), number)
        for s in range(stages - 1):
            ahead(
                shared,
                line,
                x,
                d,
                extra,
                weights,
                b + np.int64(s) * blocks,
                np.uint32(s),
                first,
                channels,
                stride,
                batch,
            )
        if made:
            make_line(h_pre, h_post, h_res, line, iterations, eps)
        for e in range(count):
            totals[e] = np.float32(0)
        for e in range(held):
            if normalised:
                of_gamma[own(e)] = np.float32(0)
        for run in range(runs):
            if channel(run) < channels:
                fetch_gamma(gamma, words, run, channel(run))
        while b < batch:
            coming = np.uint32(number + np.uint32(stages - 1))
            ahead(
                shared,
                line,
                x,
                d,
                extra,
                weights,
                b + np.int64(stages - 1) * blocks,
                coming,
                first,
                channels,
                stride,
                batch,
            )
            arrived()
            if per_sample or number == np.uint32(0):
                warp.block_barrier()
            stage = np.uint32(number % np.uint32(stages))
            at = place(number) if per_sample else np.int64(0)
            scale_of_a, pull = np.float32(1), np.float32(0)
            squares, pull = aggregates(shared, stage, line, at, words, a, dy, channels)
            if normalised:
                half = np.int64(np.uint32(np.uint32(number % np.uint32(2)) * np.uint32(2 * warps)))
                squares, pull = total_of(partial, half, squares, pull)
                scale_of_a = np.float32(1) / np.float32(math.sqrt(squares / np.float32(channels) + eps))
                pull = pull / np.float32(channels) * scale_of_a
            for run in range(runs):
                c = channel(run)
                if c < channels:
                    if has_aggregate:
                        run_back(words, run, a, dy, scale_of_a, pull, of_gamma, y, da)
                    else:
                        unpark(shared, stage, run, 2 * n, y, 0)
                        write_update(shared, stage, line, at, run, d_y, b * stride + first + c)
                    to = b * np.int64(n) * stride + first + c
                    spread(shared, stage, line, at, run, y, da, totals, d_x, to, stride)
            if per_sample:
                write_sums(of_warps, totals, sums, (row + b) * np.int64(count))
                for e in range(count):
                    totals[e] = np.float32(0)
            b += blocks
            number = np.uint32(number + np.uint32(1))
        memory.copy_async_wait_all()
        if not per_sample:
            write_sums(of_warps, totals, sums, (row + warp.block_x()) * np.int64(count))
        for run in range(runs):
            if normalised and channel(run) < channels:
                for e in range(RUN):
                    gamma_sums[warp.block_x() * channels + channel(run) + np.int64(e)] = of_gamma[own(RUN * run + e)]

    pointer = ELEMENTS[element].pointer
    parameters = (
        pointer, gamma_pointer, pointer, pointer, f32p, f32p, f32p, f32p, pointer, pointer, f32p, f32p, i64, i64, i64,
        i64, i64, i64, i64, f32,
    )  # fmt: skip
    return kernel, parameters, launch_options(element, 2 * n + has_extra, shape, gamma_held * 4, MOST_THREADS)
