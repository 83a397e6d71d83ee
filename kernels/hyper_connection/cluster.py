"""Dynamic hyper-connections, forward, in one pass: x is read once and written once by clusters of blocks (sm_90).

A cluster walks over stages of 16 samples. Each of its warps has 32 channels of every stream of all samples, and keeps
the projection's rows of these places in registers for the whole walk, so that nothing but samples moves. A lane copies
what it needs of a stage to places of its own in shared memory, two stages ahead, and reads it there three times: for
the projection on tensor cores, for the norm, and to mix. The sums over channels are put together by warp, by block and
by cluster, in this order; the exchange of a stage's projection goes with that of the norm of the stage before. One warp
makes the mixing weights of a stage while the others mix the one before.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np

from kernels import bits, memory, tensor_core, warp
from kernels.barrier import cluster_barrier, cluster_rank, shared_address, shared_load_remote, shared_store_remote
from kernels.elements import ELEMENTS
from kernels.hyper_connection.static import post_weight, pre_weight
from kernels.hyper_connection.stream import gamma_runs
from kernels.simulator import WARP
from kernels.sinkhorn_thread import matrix_steps
from kernels.target import cuda, device, f32, f32p, i64, kernel_factory

SAMPLES = 16
"""Samples of a stage: the rows of a tensor-core tile."""
CHANNELS = 32
"""Channels of a warp, eight a lane."""
RUN = 8
STAGES = 3
MOST_STREAMS = 4
MOST_WARPS = 16
MOST_BLOCKS = 8
"""Blocks of a cluster that every device has room for."""
MOST_RESIDENT = 2
"""Blocks that share a multiprocessor, of few warps: more would leave a thread too few registers."""
SHARED_BYTES = 227 << 10


@dataclass(frozen=True)
class Team:
    """How a cluster shares the channels: ``blocks`` of ``warps`` warps each, at most so many as channels need."""

    blocks: int
    warps: int

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return WARP * self.warps


class _Layout:
    """Where things lie in a block's shared memory, counted in fp32 numbers; the samples come first."""

    def __init__(self, n: int, team: Team) -> None:
        width = n * (n + 2) + 1
        self.sums = STAGES * 2 * n * team.threads * 4
        """What the warps add to P and the sum of squares, [warps, 16, width]."""
        self.block_sums = self.sums + team.warps * SAMPLES * width
        """The block's sums of two stages, which the other blocks read, [2, 16, width]."""
        self.lines = self.block_sums + 2 * SAMPLES * width
        """P and r, then the mixing weights, of two stages, [2, 16, width]."""
        self.squares = self.lines + 2 * SAMPLES * width
        """What the warps add to the sums of squares of a, [warps, 16]."""
        self.cluster_squares = self.squares + team.warps * SAMPLES
        """What every block adds to them, written by that block, of two stages, [2, blocks, 16]."""
        self.bytes = 4 * (self.cluster_squares + 2 * team.blocks * SAMPLES)


def shared_bytes(n: int, team: Team) -> int:
    """Shared memory of a block."""
    return _Layout(n, team).bytes


@functools.cache
def _samples_in_place(n: int, threads: int) -> SimpleNamespace:
    """Device functions for a lane's own eight channels of all streams of its samples g and g + 8 of a stage.

    ``park`` starts their copies, ``words`` gives those of stream ``j`` of the ``half``-th sample as four words.
    """

    @device
    def place(stage, half, j):
        slot = np.uint32(np.uint32(stage * np.uint32(2 * n)) + np.uint32(half * n + j))
        return np.int64(np.uint32(np.uint32(slot * np.uint32(threads)) + warp.thread_index()) * np.uint32(RUN))

    @device
    def park(shared, stage, x, sample, c, channels, batch):
        for half in range(2):
            line = min(sample + np.int64(8 * half), batch - np.int64(1)) * np.int64(n)
            for j in range(n):
                memory.copy_async16(shared, place(stage, half, j), x, (line + np.int64(j)) * channels + c)

    @device
    def words(shared, stage, half, j, to, at):
        a, b, c, d = memory.shared_load128(shared, place(stage, half, j))
        to[at], to[at + 1], to[at + 2], to[at + 3] = a, b, c, d

    return SimpleNamespace(park=park, words=words)


@functools.cache
def _projection(n: int, team: Team) -> SimpleNamespace:
    """Device functions for P on tensor cores: ``fetch`` the rows once, ``add`` the warp's part of a stage to shared."""
    outputs = n * (n + 2)
    tiles, width, words_of = -(-outputs // 8), outputs + 1, _samples_in_place(n, team.threads).words
    layout = _Layout(n, team)
    sums_at, sums = layout.sums, 4 * tiles

    @device
    def fetch(rows, held, c, inside, channels):
        """Row 8 tile + g at the lane's channels of every stream, zeros where there is none."""
        lane = np.int64(np.uint32(warp.thread_index() % np.uint32(WARP)))
        for tile in range(tiles):
            e = np.int64(8 * tile) + (lane >> np.int64(2))
            for j in range(n):
                at = 4 * (tile * n + j)
                for i in range(4):
                    held[at + i] = np.uint32(0)
                if inside and e < np.int64(outputs):
                    v0, v1, v2, v3 = memory.load128(rows, (e * np.int64(n) + np.int64(j)) * channels + c)
                    held[at], held[at + 1], held[at + 2], held[at + 3] = v0, v1, v2, v3

    @device
    def multiply(acc, tile, words, half, b0, b1):
        i, c = 2 * half, 4 * tile
        r0, r1, r2, r3 = tensor_core.mma_bf16(
            words[i], words[i + 4], words[i + 1], words[i + 5], b0, b1, acc[c], acc[c + 1], acc[c + 2], acc[c + 3]
        )
        acc[c], acc[c + 1], acc[c + 2], acc[c + 3] = r0, r1, r2, r3

    @device
    def squares_of(total, words, at):
        for i in range(4):
            low, high = bits.low_bf16(words[at + i]), bits.high_bf16(words[at + i])
            total += low * low
            total += high * high
        return total

    @device
    def add(shared, floats, stage, held, inside):
        acc = cuda.local.array(sums, np.float32)
        words = cuda.local.array(8, np.uint32)
        thread = warp.thread_index()
        lane, own = np.uint32(thread % np.uint32(WARP)), np.int64(np.uint32(thread // np.uint32(WARP)))
        g, t = np.int64(np.uint32(lane >> np.uint32(2))), np.int64(np.uint32(lane & np.uint32(3)))
        for i in range(sums):
            acc[i] = np.float32(0)
        upper, lower = np.float32(0), np.float32(0)
        for j in range(n):
            for i in range(8):
                words[i] = np.uint32(0)
            if inside:
                words_of(shared, stage, 0, j, words, 0)
                words_of(shared, stage, 1, j, words, 4)
            for tile in range(tiles):
                at = 4 * (tile * n + j)
                multiply(acc, tile, words, 0, held[at], held[at + 1])
                multiply(acc, tile, words, 1, held[at + 2], held[at + 3])
            upper, lower = squares_of(upper, words, 0), squares_of(lower, words, 4)
        upper, lower = warp.quad_sum(upper), warp.quad_sum(lower)
        to = np.int64(sums_at) + (own * np.int64(SAMPLES) + g) * np.int64(width)
        for half in range(2):
            for tile in range(tiles):
                for i in range(2):
                    e = np.int64(8 * tile + i) + np.int64(2) * t
                    if e < np.int64(outputs):
                        floats[to + np.int64(8 * half * width) + e] = acc[4 * tile + 2 * half + i]
            if t == np.int64(0):
                floats[to + np.int64(8 * half * width + outputs)] = upper if half == 0 else lower

    return SimpleNamespace(fetch=fetch, add=add, words=4 * n * tiles)


@device
def opaque(count):
    """A number that the compiler does not know, so that it does not unroll a loop at the price of registers."""
    return np.int64(bits.again(np.uint32(count)))


@functools.cache
def _weights(mode: str, n: int, team: Team) -> SimpleNamespace:
    """Device functions from the warps' sums to a stage's lines of mixing weights; ``parity`` is the stage's.

    ``of_block`` adds up the warps' sums. ``make``, of ``makers`` warps which take some of the samples each, adds up the
    blocks', and leaves ``projected`` and ``mixing``, in memory those of each sample by one of the blocks.
    """
    outputs, blocks, warps, threads = n * (n + 2), team.blocks, team.warps, team.threads
    makers = 1 << min(2, warps.bit_length() - 1)
    samples, width, cells = SAMPLES // makers, outputs + 1, n * n
    layout, step, s_pre, values = _Layout(n, team), matrix_steps(mode, n), pre_weight(mode), SAMPLES * width
    sums_at, block_at, lines_at, start, iterate = layout.sums, layout.block_sums, layout.lines, step.start, step.iterate

    @device
    def of_block(floats, parity):
        for e in range(np.int64(warp.thread_index()), values, threads):
            total = np.float32(0)
            for i in range(warps):
                total += floats[np.int64(sums_at + i * values) + e]
            floats[np.int64(block_at) + parity * np.int64(values) + e] = total

    @device
    def is_own(sample):
        """Whether the block writes the sample's weights to memory."""
        return np.uint32(np.uint32(sample) % np.uint32(blocks)) == cluster_rank()

    @device
    def of_cluster(shared, floats, at, projected, first, sample0, batch, flat, eps):
        """P and r of the warp's samples."""
        lane = np.int64(np.uint32(warp.thread_index() % np.uint32(WARP)))
        for e in range(lane, opaque(samples * width), WARP):
            # Addresses count elements of the 16-bit view of shared memory.
            address = shared_address(shared, np.int64(2) * (np.int64(block_at) + at + e))
            total = np.float32(0)
            for rank in range(blocks):
                total += bits.bits_f32(shared_load_remote(address, np.uint32(rank)))
            sample = sample0 + np.int64(np.uint32(e) // np.uint32(width))
            if np.uint32(np.uint32(e) % np.uint32(width)) == np.uint32(outputs):
                total = np.float32(math.sqrt(total / np.float32(flat) + eps))
            floats[np.int64(lines_at) + at + e] = total
            if is_own(sample) and first + sample < batch:
                projected[(first + sample0) * np.int64(width) + e] = total

    @device
    def from_logits(floats, at, alpha, bias, mixing, first, sample0, batch, eps):
        """The logits of the warp's samples, and of s_pre and s_post the weights."""
        lane = np.int64(np.uint32(warp.thread_index() % np.uint32(WARP)))
        for e in range(lane, opaque(samples * outputs), WARP):
            own = np.int64(np.uint32(e) // np.uint32(outputs))
            k, sample = e - own * np.int64(outputs), sample0 + own
            line = np.int64(lines_at) + at + own * np.int64(width)
            group = min(np.int64(np.uint32(k) // np.uint32(n)), np.int64(2))
            value = alpha[group] * (floats[line + k] / floats[line + np.int64(outputs)]) + bias[k]
            if group == np.int64(0):
                value = s_pre(value, eps)
            elif group == np.int64(1):
                value = post_weight(value)
            floats[line + k] = value
            if group < np.int64(2) and is_own(sample) and first + sample < batch:
                mixing[(first + sample) * np.int64(outputs) + k] = value

    @device
    def make(shared, floats, parity, projected, alpha, bias, mixing, first, batch, flat, iterations, eps):
        thread = warp.thread_index()
        lane, own = np.int64(np.uint32(thread % np.uint32(WARP))), np.int64(np.uint32(thread // np.uint32(WARP)))
        if own < np.int64(makers):
            sample0 = own * np.int64(samples)
            at = parity * np.int64(values) + sample0 * np.int64(width)
            of_cluster(shared, floats, at, projected, first, sample0, batch, flat, eps)
            warp.sync_warp()
            from_logits(floats, at, alpha, bias, mixing, first, sample0, batch, eps)
            warp.sync_warp()
            if lane < np.int64(samples):
                m = cuda.local.array(cells, np.float32)
                line, sample = np.int64(lines_at) + at + lane * np.int64(width) + np.int64(2 * n), sample0 + lane
                start(floats, line, m, eps)
                iterate(m, iterations, eps)
                there = is_own(sample) and first + sample < batch
                to = (first + sample) * np.int64(outputs) + np.int64(2 * n)
                for i in range(cells):
                    floats[line + np.int64(i)] = m[i]
                    if there:
                        mixing[to + np.int64(i)] = m[i]
            warp.sync_warp()

    return SimpleNamespace(of_block=of_block, make=make)


@device
def add_scaled(values, factor, words, at):
    """Eight values += factor times eight bf16 in four words, which are unpacked anew by every call."""
    for i in range(4):
        pair = bits.again(words[at + i])
        values[2 * i] += factor * bits.low_bf16(pair)
        values[2 * i + 1] += factor * bits.high_bf16(pair)


@functools.cache
def _aggregate(n: int, team: Team) -> SimpleNamespace:
    """Device functions for a = sum_i s_pre[i] x_i of a lane's channels, and its sum of squares over the cluster."""
    width, layout, words_of = n * (n + 2) + 1, _Layout(n, team), _samples_in_place(n, team.threads).words
    lines_at, squares_at, cluster_at = layout.lines, layout.squares, layout.cluster_squares
    blocks, warps, words_held = team.blocks, team.warps, 4 * n

    @device
    def line_of(parity, half):
        """Where the weights of the lane's half-th sample lie."""
        g = np.uint32(np.uint32(warp.thread_index() % np.uint32(WARP)) >> np.uint32(2))
        sample = np.int64(np.uint32(g + np.uint32(8 * half)))
        return np.int64(lines_at) + (parity * np.int64(SAMPLES) + sample) * np.int64(width)

    @device
    def aggregate(floats, line, words, a):
        for e in range(RUN):
            a[e] = np.float32(0)
        for i in range(n):
            add_scaled(a, floats[line + np.int64(i)], words, 4 * i)

    @device
    def squares(shared, floats, stage, parity, inside):
        """The warp's sums of the squares of a."""
        words = cuda.local.array(words_held, np.uint32)
        a = cuda.local.array(RUN, np.float32)
        thread = warp.thread_index()
        for half in range(2):
            total = np.float32(0)
            if inside:
                for j in range(n):
                    words_of(shared, stage, half, j, words, 4 * j)
                aggregate(floats, line_of(parity, half), words, a)
                for e in range(RUN):
                    total += a[e] * a[e]
            total = warp.quad_sum(total)
            if thread % np.uint32(4) == np.uint32(0):
                of_lane = np.uint32(np.uint32(thread % np.uint32(WARP)) >> np.uint32(2)) + np.uint32(8 * half)
                of_warp = np.uint32(np.uint32(thread // np.uint32(WARP)) * np.uint32(SAMPLES))
                floats[np.int64(squares_at) + np.int64(np.uint32(of_warp + of_lane))] = total

    @device
    def hand_out(shared, floats, parity):
        """The block's sums of squares to every block of the cluster."""
        for e in range(np.int64(warp.thread_index()), SAMPLES * blocks, WARP * warps):
            rank, sample = np.uint32(np.uint32(e) // np.uint32(SAMPLES)), np.int64(np.uint32(e) % np.uint32(SAMPLES))
            total = np.float32(0)
            for i in range(warps):
                total += floats[np.int64(squares_at + i * SAMPLES) + sample]
            own = parity * np.int64(blocks) + np.int64(cluster_rank())
            address = shared_address(shared, np.int64(2) * (np.int64(cluster_at) + own * np.int64(SAMPLES) + sample))
            shared_store_remote(address, rank, bits.f32_bits(total))

    @device
    def scale_of(floats, parity, half, channels, eps):
        """1 / r of the lane's half-th sample."""
        g = np.uint32(np.uint32(warp.thread_index() % np.uint32(WARP)) >> np.uint32(2))
        total = np.float32(0)
        for rank in range(blocks):
            at = np.int64(cluster_at) + (parity * np.int64(blocks) + np.int64(rank)) * np.int64(SAMPLES)
            total += floats[at + np.int64(np.uint32(g + np.uint32(8 * half)))]
        return np.float32(1) / np.float32(math.sqrt(total / np.float32(channels) + eps))

    return SimpleNamespace(line_of=line_of, aggregate=aggregate, squares=squares, hand_out=hand_out, scale_of=scale_of)


@functools.cache
def _finish(role: str, n: int, gamma_element: str | None, team: Team) -> Callable:
    """A device function: what a lane writes of a stage, out in role "full" and the aggregate in role "pre"."""
    of_aggregate, words_of = _aggregate(n, team), _samples_in_place(n, team.threads).words
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
        fetch_gamma(gamma, gamma_words, 0, c)
        for half in range(2):
            b = sample + np.int64(8 * half)
            if b < batch:
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
                            result[e] = floats[line + np.int64(n + i)] * a[e]
                        for j in range(n):
                            add_scaled(result, floats[line + np.int64((2 + i) * n + j)], words, 4 * j)
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
    lanes, projection, weights = _samples_in_place(n, threads), _projection(n, team), _weights(mode, n, team)
    park, fetch_rows, add_projection, row_words = lanes.park, projection.fetch, projection.add, projection.words
    of_block, make = weights.of_block, weights.make
    norm, finish = _aggregate(n, team), _finish(role, n, gamma_element, team)
    squares, hand_out, arrived = norm.squares, norm.hand_out, memory.copy_async_wait(1)
    gamma_pointer = ELEMENTS[gamma_element or "f32"].pointer

    def kernel(x, rows, gamma, alpha, bias, projected, mixing, out, channels, batch, clusters, iterations, eps):
        shared = cuda.shared.array(0, np.uint16, alignment=1024)
        floats = cuda.shared.array(0, np.float32, alignment=1024)
        held = cuda.local.array(row_words, np.uint32)
        thread = warp.thread_index()
        lane, own = np.uint32(thread % np.uint32(WARP)), np.uint32(thread // np.uint32(WARP))
        g, t = np.int64(np.uint32(lane >> np.uint32(2))), np.int64(np.uint32(lane & np.uint32(3)))
        c = (
            np.int64(np.uint32(np.uint32(cluster_rank() * np.uint32(warps)) + own)) * np.int64(CHANNELS)
            + np.int64(8) * t
        )
        inside = c < channels
        first = np.int64(np.uint32(warp.block_x()) // np.uint32(blocks)) * np.int64(SAMPLES)
        stride, number = clusters * np.int64(SAMPLES), np.uint32(0)
        if inside:
            park(shared, np.uint32(0), x, first + g, c, channels, batch)
        memory.copy_async_commit()
        fetch_rows(rows, held, c, inside, channels)
        # All blocks of the cluster are there from here on.
        cluster_barrier()
        # The stage that is projected is a step ahead of the one that is written, and of another one that is on its way.
        ahead = first
        while ahead < batch + stride:
            coming, parity = ahead + stride, np.int64(np.uint32(number % np.uint32(2)))
            before, written = np.int64(1) - parity, ahead - stride
            stage = np.uint32(number % np.uint32(STAGES))
            written_stage = np.uint32(np.uint32(number + np.uint32(STAGES - 1)) % np.uint32(STAGES))
            if inside and coming < batch:
                next_stage = np.uint32(np.uint32(number + np.uint32(1)) % np.uint32(STAGES))
                park(shared, next_stage, x, coming + g, c, channels, batch)
            memory.copy_async_commit()
            arrived()
            if ahead < batch:
                add_projection(shared, floats, stage, held, inside)
            warp.block_barrier()
            if ahead < batch:
                of_block(floats, parity)
            if normalised and number > np.uint32(0):
                squares(shared, floats, written_stage, before, inside)
                warp.block_barrier()
                hand_out(shared, floats, before)
            warp.sync_warp()
            cluster_barrier()
            if ahead < batch:
                flat = np.int64(n) * channels
                make(shared, floats, parity, projected, alpha, bias, mixing, ahead, batch, flat, iterations, eps)
            if number > np.uint32(0) and inside:
                finish(shared, floats, written_stage, before, gamma, out, written + g, c, channels, batch, eps)
            ahead += stride
            number = np.uint32(number + np.uint32(1))
        memory.copy_async_wait_all()

    pointer = ELEMENTS["bf16"].pointer
    parameters = (pointer, pointer, gamma_pointer, f32p, f32p, f32p, f32p, pointer, i64, i64, i64, i64, f32)
    options = {"threads": threads, "shared_bytes": shared_bytes(n, team), "cluster": blocks}
    resident = min(SHARED_BYTES // (shared_bytes(n, team) + 1024), WARP * MOST_WARPS // threads, MOST_RESIDENT)
    return kernel, parameters, options | {"architectures": (9, 0, "a"), "min_blocks": max(1, resident)}
