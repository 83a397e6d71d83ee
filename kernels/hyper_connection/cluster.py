"""Dynamic hyper-connections, forward, in one pass: x is read once and written once by clusters of blocks (sm_90).

A cluster walks over stages of 16 samples (``cluster_stage.py``), whose copies are begun two stages ahead. While one
warp of a block makes the mixing weights of a stage, the others, which have its channels, mix the one before. A block
meets itself twice a stage and the others only through the words that they send.
"""

from __future__ import annotations

import functools
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
    number_at,
    projection,
    samples_in_place,
)
from kernels.hyper_connection.cluster_weights import maker, sender
from kernels.hyper_connection.stream import gamma_runs
from kernels.ptx import instruction
from kernels.simulator import WARP
from kernels.target import cuda, device, f32, f32p, i64, kernel_factory


def _inverse_root(x):
    return np.float32(1) / np.sqrt(np.float32(x))


# 1 / sqrt(x) of a normal number to two units in the last place: an approximation and a step of Newton's.
inverse_root = instruction(
    "{ .reg .f32 near, square, rest, half; rsqrt.approx.ftz.f32 near, $1; mul.f32 square, near, near; "
    "neg.f32 rest, $1; fma.rn.f32 rest, rest, square, 0f3F800000; mul.f32 half, near, 0f3F000000; "
    "fma.rn.f32 $0, half, rest, near; }",
    "f",
    "f",
    twin=_inverse_root,
    pure=True,
)


@device
def add_scaled(values, factor, words):
    """Eight values += factor times eight bf16 in four words."""
    for i in range(4):
        values[2 * i] += factor * bits.low_bf16(words[i])
        values[2 * i + 1] += factor * bits.high_bf16(words[i])


@functools.cache
def aggregates(n: int, team: Team) -> SimpleNamespace:
    """Device functions for a = sum_i s_pre[i] x_i of a lane's channels, and its sum of squares over the cluster.

    ``lines`` is where the weights of the lane's first sample lie, those of the second ``half_line`` bytes further.
    """
    width, layout, places = n * (n + 2) + 1, Layout(n, team), samples_in_place(n, team.lanes)
    lines_at, squares_at, cluster_at = layout.lines, layout.squares, layout.cluster_squares
    blocks, lanes, warps, counted_at = team.blocks, team.lanes, team.warps, counters(n, team).address
    words_of, address, half_line = places.words, places.address, 4 * 8 * width

    @device
    def sample_of():
        return np.uint32(np.uint32(warp.thread_index() % np.uint32(WARP)) >> np.uint32(2))

    @device
    def lines(shared, parity):
        sample = np.uint32(np.uint32(parity * np.uint32(SAMPLES)) + sample_of())
        place = np.uint32(np.uint32(sample * np.uint32(width)) + np.uint32(lines_at))
        return shared_address(shared, np.int64(np.uint32(np.uint32(2) * place)))

    @device
    def aggregate(at, line, half, a):
        words = cuda.local.array(4, np.uint32)
        for e in range(RUN):
            a[e] = np.float32(0)
        for i in range(n):
            words_of(at, half, i, words, 0)
            add_scaled(a, number_at(line, np.uint32(half * half_line + 4 * i)), words)

    @device
    def squares(shared, floats, slot, parity, inside):
        """The warp's sums of the squares of a."""
        a = cuda.local.array(RUN, np.float32)
        thread, at, line = warp.thread_index(), address(shared, slot), lines(shared, parity)
        of_warp = np.uint32(np.uint32(thread // np.uint32(WARP)) * np.uint32(SAMPLES))
        to = np.uint32(np.uint32(of_warp + sample_of()) + np.uint32(squares_at))
        for half in range(2):
            total = np.float32(0)
            if inside:
                aggregate(at, line, half, a)
                for e in range(RUN):
                    total += a[e] * a[e]
            total = warp.quad_sum(total)
            if thread % np.uint32(4) == np.uint32(0):
                floats[to + np.uint32(8 * half)] = total

    @device
    def hand_out(shared, floats, stage):
        """The block's sums of squares to every block of the cluster."""
        parity = np.uint32(stage & np.uint32(1))
        counted = counted_at(shared, OF_SQUARES, parity)
        line = np.uint32(np.uint32(parity * np.uint32(blocks)) + cluster_rank())
        for e in range(np.int64(warp.thread_index()), SAMPLES * blocks, lanes):
            rank, sample = np.uint32(np.uint32(e) // np.uint32(SAMPLES)), np.uint32(np.uint32(e) % np.uint32(SAMPLES))
            total = np.float32(0)
            for i in range(warps):
                total += floats[sample + np.uint32(squares_at + i * SAMPLES)]
            place = np.uint32(np.uint32(line * np.uint32(SAMPLES)) + sample) + np.uint32(cluster_at)
            there = shared_address(shared, np.int64(np.uint32(np.uint32(2) * np.uint32(place))))
            shared_store_counted(there, counted, rank, bits.f32_bits(total))

    @device
    def norms(shared, parity):
        """Where the first block's sum of squares of the lane's first sample lies."""
        place = np.uint32(np.uint32(parity * np.uint32(blocks * SAMPLES)) + sample_of()) + np.uint32(cluster_at)
        return shared_address(shared, np.int64(np.uint32(np.uint32(2) * np.uint32(place))))

    @device
    def scale_of(norm, half, channels, eps):
        """1 / r of the lane's half-th sample."""
        total = np.float32(0)
        for rank in range(blocks):
            total += number_at(norm, np.uint32(4 * (rank * SAMPLES + 8 * half)))
        return inverse_root(total / np.float32(channels) + eps)

    return SimpleNamespace(
        lines=lines, aggregate=aggregate, squares=squares, hand_out=hand_out, norms=norms, scale_of=scale_of,
        address=address, words=words_of, half_line=half_line,
    )  # fmt: skip


@functools.cache
def _mix(n: int, i: int, team: Team) -> Callable:
    """A device function: out of the lane's channels from stream i on; each has code of its own, with its own places."""
    if i == n:
        return _nothing
    of, store8, rest = aggregates(n, team), ELEMENTS["bf16"].store8, _mix(n, i + 1, team)
    words_of, half_line = of.words, of.half_line

    @device
    def mix(at, line, half, a, out, to, channels):
        words = cuda.local.array(4, np.uint32)
        result = cuda.local.array(RUN, np.float32)
        weight = number_at(line, np.uint32(half * half_line + 4 * (n + i)))
        for e in range(RUN):
            result[e] = weight * a[e]
        for j in range(n):
            words_of(at, half, j, words, 0)
            add_scaled(result, number_at(line, np.uint32(half * half_line + 4 * ((2 + i) * n + j))), words)
        store8(out, to, result, 0, np.uint32(0))
        rest(at, line, half, a, out, to + channels, channels)

    return mix


@device
def _nothing(at, line, half, a, out, to, channels):
    """Behind the last stream."""


@functools.cache
def _finish(role: str, n: int, gamma_element: str | None, team: Team) -> Callable:
    """A device function: what a lane writes of a stage, out in role "full" and the aggregate in role "pre"."""
    of = aggregates(n, team)
    lines, aggregate, norms, scale_of, address = of.lines, of.aggregate, of.norms, of.scale_of, of.address
    store8, normalised, mixes = ELEMENTS["bf16"].store8, gamma_element is not None, role == "full"
    fetch_gamma, unpack_gamma, _ = gamma_runs(gamma_element, 1)
    gamma_held = ELEMENTS[gamma_element or "f32"].words

    @device
    def normalise(a, norm, half, gamma, c, channels, eps):
        words = cuda.local.array(gamma_held, np.uint32)
        v = cuda.local.array(RUN, np.float32)
        fetch_gamma(gamma, words, 0, c)
        unpack_gamma(words, 0, v)
        scale = scale_of(norm, half, channels, eps)
        for e in range(RUN):
            a[e] = v[e] * (a[e] * scale)

    mix = _mix(n, 0, team)

    @device
    def finish(shared, slot, parity, gamma, out, sample, c, channels, batch, eps):
        a = cuda.local.array(RUN, np.float32)
        at, line, norm = address(shared, slot), lines(shared, parity), norms(shared, parity)
        for half in range(2):
            b = sample + np.int64(8 * half)
            if b < batch:
                aggregate(at, line, half, a)
                if normalised:
                    normalise(a, norm, half, gamma, c, channels, eps)
                if mixes:
                    mix(at, line, half, a, out, b * np.int64(n) * channels + c, channels)
                else:
                    store8(out, b * channels + c, a, 0, np.uint32(0))

    return finish


_EXAMPLES = (
    ("full", "bf16", "exp", 4, Team(8, 16)),
    ("pre", None, "softmax", 4, Team(8, 16)),
    ("full", "f32", "exp", 4, Team(8, 5)),
    ("full", "bf16", "softmax", 2, Team(8, 16)),
    ("pre", "f32", "exp", 1, Team(2, 1)),
)


@kernel_factory(*_EXAMPLES)
def connect_in_clusters(role, gamma_element, mode, n, team):
    """A walk over samples with a dynamic H: out[b] = M x[b] + s_post y[b] in role "full", out[b] = y[b] in role "pre".

    y is the RMS-normalised s_pre x[b], or s_pre x[b] itself where gamma_element is None. Parameters: x, rows, gamma,
    alpha, bias, projected, mixing, out, C, B, clusters, iterations, eps; ``projected`` [B, n (n + 2) + 1] and
    ``mixing`` [B, n (n + 2)] are written, gamma is read where there is one. ``clusters`` along x, whose c-th takes the
    samples 16 c, ..., 16 c + 15 and every ``clusters``-th stage from there on.
    """
    blocks, warps, normalised = team.blocks, team.warps, gamma_element is not None
    park, of_projection, count = samples_in_place(n, team.lanes).park, projection(n, team), counters(n, team)
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
    def write(shared, slot, stage, gamma, out, sample, c, channels, batch, eps):
        """What the lane writes of a stage, which may arrive here before its norm does."""
        if normalised:
            wait(shared, OF_SQUARES, stage, warp.thread_index() == np.uint32(0))
        if c < channels:
            finish(shared, slot, np.uint32(stage & np.uint32(1)), gamma, out, sample, c, channels, batch, eps)

    def kernel(x, rows, gamma, alpha, bias, projected, mixing, out, channels, batch, clusters, iterations, eps):
        shared = cuda.shared.array(0, np.uint16, alignment=1024)
        floats = cuda.shared.array(0, np.float32, alignment=1024)
        held = cuda.local.array(row_words, np.uint32)
        thread = warp.thread_index()
        lane, own = np.uint32(thread % np.uint32(WARP)), np.uint32(thread // np.uint32(WARP))
        g, t = np.int64(np.uint32(lane >> np.uint32(2))), np.int64(np.uint32(lane & np.uint32(3)))
        of_warp, has_channels = np.uint32(np.uint32(cluster_rank() * np.uint32(warps)) + own), own < np.uint32(warps)
        c = np.int64(of_warp) * np.int64(CHANNELS) + np.int64(8) * t if has_channels else channels
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
            if has_channels and first < batch:
                add_projection(shared, floats, slot, held, c, channels)
            warp.block_barrier()
            if has_channels:
                if first < batch:
                    send(shared, floats, stage)
                if stage > np.uint32(0):
                    wait(shared, OF_LINES, before, thread == np.uint32(0))
                    if normalised:
                        squares(shared, floats, slot_before, np.uint32(before & np.uint32(1)), c < channels)
            warp.block_barrier()
            if has_channels:
                if stage > np.uint32(0):
                    if normalised:
                        hand_out(shared, floats, before)
                    write(shared, slot_before, before, gamma, out, first - stride + g, c, channels, batch, eps)
            elif first < batch:
                flat = np.int64(n) * channels
                make(shared, floats, stage, projected, alpha, bias, mixing, first, batch, flat, iterations, eps)
            first += stride
            stage = np.uint32(stage + np.uint32(1))
        memory.copy_async_wait_all()

    pointer = ELEMENTS["bf16"].pointer
    parameters = (pointer, pointer, gamma_pointer, f32p, f32p, f32p, f32p, pointer, i64, i64, i64, i64, f32)
    return kernel, parameters, launch_options(n, team)
