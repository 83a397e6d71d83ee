"""Dynamic hyper-connections, forward, in one pass: x is read once and written once by clusters of blocks (sm_90).

A cluster walks over stages of 16 samples (``cluster_stage.py``), whose copies are begun two stages ahead. While one
warp of a block makes the mixing weights of a stage, the others mix the one before. A block meets itself twice a stage
and the others only through the words that they send.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np

from kernels import bits, memory, warp
from kernels.barrier import cluster_rank, shared_address, shared_store_counted
from kernels.elements import ELEMENTS
from kernels.hyper_connection.cluster_stage import (
    CHANNELS,
    OF_LINES,
    OF_SQUARES,
    RUN,
    SAMPLES,
    STAGES,
    Layout,
    Team,
    counters,
    launch_options,
    maker,
    projection,
    samples_in_place,
    sender,
)
from kernels.hyper_connection.stream import gamma_runs
from kernels.simulator import WARP
from kernels.target import cuda, device, f32, f32p, i64, kernel_factory


@device
def add_scaled(values, factor, words, at):
    """Eight values += factor times eight bf16 in four words, which are unpacked anew by every call."""
    for i in range(4):
        pair = bits.again(words[at + i])
        values[2 * i] += factor * bits.low_bf16(pair)
        values[2 * i + 1] += factor * bits.high_bf16(pair)


@functools.cache
def aggregates(n: int, team: Team) -> SimpleNamespace:
    """Device functions for a = sum_i s_pre[i] x_i of a lane's channels, and its sum of squares over the cluster."""
    width, layout, words_of = n * (n + 2) + 1, Layout(n, team), samples_in_place(n, team.threads).words
    lines_at, squares_at, cluster_at = layout.lines, layout.squares, layout.cluster_squares
    blocks, warps, words_held, address = team.blocks, team.warps, 4 * n, counters(n, team).address

    @device
    def line_of(parity, half):
        """Where the weights of the lane's half-th sample lie."""
        g = np.uint32(np.uint32(warp.thread_index() % np.uint32(WARP)) >> np.uint32(2))
        sample = np.uint32(np.uint32(parity * np.uint32(SAMPLES)) + np.uint32(g + np.uint32(8 * half)))
        return np.uint32(np.uint32(sample * np.uint32(width)) + np.uint32(lines_at))

    @device
    def aggregate(floats, line, words, a):
        for e in range(RUN):
            a[e] = np.float32(0)
        for i in range(n):
            add_scaled(a, floats[line + np.uint32(i)], words, 4 * i)

    @device
    def squares(shared, floats, slot, parity, inside):
        """The warp's sums of the squares of a."""
        words = cuda.local.array(words_held, np.uint32)
        a = cuda.local.array(RUN, np.float32)
        thread = warp.thread_index()
        for half in range(2):
            total = np.float32(0)
            if inside:
                for j in range(n):
                    words_of(shared, slot, half, j, words, 4 * j)
                aggregate(floats, line_of(parity, half), words, a)
                for e in range(RUN):
                    total += a[e] * a[e]
            total = warp.quad_sum(total)
            if thread % np.uint32(4) == np.uint32(0):
                of_lane = np.uint32(np.uint32(thread % np.uint32(WARP)) >> np.uint32(2)) + np.uint32(8 * half)
                of_warp = np.uint32(np.uint32(thread // np.uint32(WARP)) * np.uint32(SAMPLES))
                floats[np.uint32(of_warp + np.uint32(squares_at)) + np.uint32(of_lane)] = total

    @device
    def hand_out(shared, floats, stage):
        """The block's sums of squares to every block of the cluster."""
        parity = np.uint32(stage & np.uint32(1))
        counted = address(shared, OF_SQUARES, parity)
        line = np.uint32(np.uint32(parity * np.uint32(blocks)) + cluster_rank())
        for e in range(np.int64(warp.thread_index()), SAMPLES * blocks, WARP * warps):
            rank, sample = np.uint32(np.uint32(e) // np.uint32(SAMPLES)), np.uint32(np.uint32(e) % np.uint32(SAMPLES))
            total = np.float32(0)
            for i in range(warps):
                total += floats[sample + np.uint32(squares_at + i * SAMPLES)]
            place = np.uint32(np.uint32(line * np.uint32(SAMPLES)) + sample) + np.uint32(cluster_at)
            there = shared_address(shared, np.int64(np.uint32(np.uint32(2) * np.uint32(place))))
            shared_store_counted(there, counted, rank, bits.f32_bits(total))

    @device
    def scale_of(floats, parity, half, channels, eps):
        """1 / r of the lane's half-th sample."""
        g = np.uint32(np.uint32(warp.thread_index() % np.uint32(WARP)) >> np.uint32(2))
        at = np.uint32(np.uint32(parity * np.uint32(blocks * SAMPLES)) + np.uint32(g + np.uint32(8 * half)))
        total = np.float32(0)
        for rank in range(blocks):
            total += floats[at + np.uint32(cluster_at + rank * SAMPLES)]
        return np.float32(1) / np.float32(math.sqrt(total / np.float32(channels) + eps))

    return SimpleNamespace(line_of=line_of, aggregate=aggregate, squares=squares, hand_out=hand_out, scale_of=scale_of)


@functools.cache
def _finish(role: str, n: int, gamma_element: str | None, team: Team) -> Callable:
    """A device function: what a lane writes of a stage, out in role "full" and the aggregate in role "pre"."""
    of_aggregate, words_of = aggregates(n, team), samples_in_place(n, team.threads).words
    line_of, aggregate, scale_of = of_aggregate.line_of, of_aggregate.aggregate, of_aggregate.scale_of
    store8, words_held, normalised, mixes = ELEMENTS["bf16"].store8, 4 * n, gamma_element is not None, role == "full"
    fetch_gamma, unpack_gamma, _ = gamma_runs(gamma_element, 1)
    gamma_held = ELEMENTS[gamma_element or "f32"].words

    @device
    def finish(shared, floats, stage, parity, gamma, out, sample, c, channels, batch, eps):
        words = cuda.local.array(words_held, np.uint32)
        a = cuda.local.array(RUN, np.float32)
        v = cuda.local.array(RUN, np.float32)
        result = cuda.local.array(RUN, np.float32)
        gamma_words = cuda.local.array(gamma_held, np.uint32)
        for half in range(2):
            b = sample + np.int64(8 * half)
            if b < batch:
                fetch_gamma(gamma, gamma_words, 0, c)
                for j in range(n):
                    words_of(shared, stage, half, j, words, 4 * j)
                line = line_of(parity, half)
                aggregate(floats, line, words, a)
                if normalised:
                    scale = scale_of(floats, parity, half, channels, eps)
                    unpack_gamma(gamma_words, 0, v)
                    for e in range(RUN):
                        a[e] = v[e] * (a[e] * scale)
                if mixes:
                    for i in range(n):
                        for e in range(RUN):
                            result[e] = floats[line + np.uint32(n + i)] * a[e]
                        for j in range(n):
                            add_scaled(result, floats[line + np.uint32((2 + i) * n + j)], words, 4 * j)
                        store8(out, (b * np.int64(n) + np.int64(i)) * channels + c, result, 0, np.uint32(0))
                else:
                    store8(out, b * channels + c, a, 0, np.uint32(0))

    return finish


_EXAMPLES = (
    ("full", "bf16", "exp", 4, Team(8, 16)),
    ("pre", None, "softmax", 4, Team(8, 16)),
    ("full", "f32", "exp", 4, Team(8, 5)),
    ("full", "bf16", "softmax", 2, Team(8, 16)),
    ("pre", "f32", "exp", 1, Team(1, 1)),
)


@kernel_factory(*_EXAMPLES)
def connect_in_clusters(role, gamma_element, mode, n, team):
    """A walk over samples with a dynamic H: out[b] = M x[b] + s_post y[b] in role "full", out[b] = y[b] in role "pre".

    y is the RMS-normalised s_pre x[b], or s_pre x[b] itself where gamma_element is None. Parameters: x, rows, gamma,
    alpha, bias, projected, mixing, out, C, B, clusters, iterations, eps; ``projected`` [B, n (n + 2) + 1] and
    ``mixing`` [B, n (n + 2)] are written, gamma is read where there is one. ``clusters`` along x, whose c-th takes the
    samples 16 c, ..., 16 c + 15 and every ``clusters``-th stage from there on.
    """
    blocks, warps, threads, normalised = team.blocks, team.warps, team.threads, gamma_element is not None
    park, of_projection, count = samples_in_place(n, threads).park, projection(n, team), counters(n, team)
    fetch_rows, add_projection, row_words = of_projection.fetch, of_projection.add, of_projection.words
    send, make, norm, finish = (
        sender(n, team),
        maker(mode, n, team),
        aggregates(n, team),
        _finish(role, n, gamma_element, team),
    )
    squares, hand_out, arrived, wait, begin = (
        norm.squares,
        norm.hand_out,
        memory.copy_async_wait(1),
        count.wait,
        count.begin,
    )
    gamma_pointer = ELEMENTS[gamma_element or "f32"].pointer

    @device
    def write(shared, floats, slot, stage, gamma, out, sample, c, channels, batch, eps):
        """What the lane writes of a stage, which may arrive here before its norm does."""
        if normalised:
            wait(shared, OF_SQUARES, stage, warp.thread_index() == np.uint32(0))
        if c < channels:
            finish(
                shared,
                floats,
                slot,
                np.uint32(stage & np.uint32(1)),
                gamma,
                out,
                sample,
                c,
                channels,
                batch,
                eps,
            )

    def kernel(x, rows, gamma, alpha, bias, projected, mixing, out, channels, batch, clusters, iterations, eps):
        shared = cuda.shared.array(0, np.uint16, alignment=1024)
        floats = cuda.shared.array(0, np.float32, alignment=1024)
        held = cuda.local.array(row_words, np.uint32)
        thread = warp.thread_index()
        lane, own = np.uint32(thread % np.uint32(WARP)), np.uint32(thread // np.uint32(WARP))
        g, t = np.int64(np.uint32(lane >> np.uint32(2))), np.int64(np.uint32(lane & np.uint32(3)))
        of_warp = np.uint32(np.uint32(cluster_rank() * np.uint32(warps)) + own)
        c = np.int64(of_warp) * np.int64(CHANNELS) + np.int64(8) * t
        first = np.int64(np.uint32(warp.block_x()) // np.uint32(blocks)) * np.int64(SAMPLES)
        stride, stage = clusters * np.int64(SAMPLES), np.uint32(0)
        if c < channels:
            park(shared, np.uint32(0), x, first + g, c, channels, batch)
        memory.copy_async_commit()
        fetch_rows(rows, held, c, channels)
        begin(shared)
        # A stage is projected a step before it is written, while the next one is on its way.
        while first < batch + stride:
            slot, before = np.uint32(stage % np.uint32(STAGES)), np.uint32(stage - np.uint32(1))
            slot_before = np.uint32(np.uint32(stage + np.uint32(STAGES - 1)) % np.uint32(STAGES))
            if c < channels and first + stride < batch:
                next_slot = np.uint32(np.uint32(stage + np.uint32(1)) % np.uint32(STAGES))
                park(shared, next_slot, x, first + stride + g, c, channels, batch)
            memory.copy_async_commit()
            arrived()
            if first < batch:
                add_projection(shared, floats, slot, held, c, channels)
            warp.block_barrier()
            if first < batch:
                send(shared, floats, stage)
            if stage > np.uint32(0):
                wait(shared, OF_LINES, before, thread == np.uint32(0))
                if normalised:
                    squares(shared, floats, slot_before, np.uint32(before & np.uint32(1)), c < channels)
            warp.block_barrier()
            if normalised and stage > np.uint32(0):
                hand_out(shared, floats, before)
            if own == np.uint32(0) and first < batch:
                flat = np.int64(n) * channels
                make(shared, floats, stage, projected, alpha, bias, mixing, first, batch, flat, iterations, eps)
            if stage > np.uint32(0):
                write(shared, floats, slot_before, before, gamma, out, first - stride + g, c, channels, batch, eps)
            first += stride
            stage = np.uint32(stage + np.uint32(1))
        memory.copy_async_wait_all()

    pointer = ELEMENTS["bf16"].pointer
    parameters = (pointer, pointer, gamma_pointer, f32p, f32p, f32p, f32p, pointer, i64, i64, i64, i64, f32)
    return kernel, parameters, launch_options(n, team)
