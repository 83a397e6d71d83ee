"""A stage of 16 samples of dynamic hyper-connections in a cluster of blocks: up to the mixing weights (sm_90).

A warp has 32 channels of every stream of all samples, and keeps the projection's rows of these places in registers. A
lane copies what it needs to places of its own in shared memory and reads it there as often as it likes. Sums over
channels are put together by warp, by block and by cluster, in this order. Blocks send one another single words, which
are counted at a barrier where they arrive: each block makes the weights of some of the samples, and all receive them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np

from kernels import bits, memory, tensor_core, warp
from kernels.barrier import (
    barrier_expect_bytes,
    barrier_init,
    barrier_init_visible,
    barrier_wait,
    cluster_barrier,
    cluster_rank,
    shared_address,
    shared_store_counted,
)
from kernels.hyper_connection.static import post_weight, pre_weight
from kernels.simulator import WARP
from kernels.sinkhorn_thread import matrix_steps
from kernels.target import cuda, device

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
_RESERVED_BYTES = 1 << 10


@dataclass(frozen=True)
class Team:
    """How a cluster shares the channels: ``blocks``, a power of two, of ``warps`` warps each."""

    blocks: int
    warps: int

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return WARP * self.warps


OF_SUMS, OF_LINES, OF_SQUARES, BARRIERS = 0, 2, 4, 6
"""Which barriers count words: two of each, for stages in turns."""


class Layout:
    """Where things lie in a block's shared memory, counted in fp32 numbers; the samples come first."""

    def __init__(self, n: int, team: Team) -> None:
        width = n * (n + 2) + 1
        self.barriers = STAGES * 2 * n * team.threads * 4
        self.sums = self.barriers + 2 * BARRIERS
        """What the warps add to P and the sum of squares, [warps, 16, width]."""
        self.inbox = self.sums + team.warps * SAMPLES * width
        """The blocks' sums for the samples whose weights this block makes, of two stages, [2, blocks, own, width]."""
        self.lines = self.inbox + 2 * SAMPLES * width
        """The mixing weights and r of two stages, [2, 16, width]."""
        self.squares = self.lines + 2 * SAMPLES * width
        """What the warps add to the sums of squares of a, [warps, 16]."""
        self.cluster_squares = self.squares + team.warps * SAMPLES
        """What every block adds to them, of two stages, [2, blocks, 16]."""
        self.bytes = 4 * (self.cluster_squares + 2 * team.blocks * SAMPLES)


def shared_bytes(n: int, team: Team) -> int:
    """Shared memory of a block."""
    return Layout(n, team).bytes


def launch_options(n: int, team: Team) -> dict:
    """A kernel's threads, cluster, shared memory and blocks on a multiprocessor."""
    nbytes = shared_bytes(n, team)
    resident = min(SHARED_BYTES // (nbytes + _RESERVED_BYTES), MOST_WARPS // team.warps, MOST_RESIDENT)
    options = {"threads": team.threads, "shared_bytes": nbytes, "cluster": team.blocks}
    options |= {"architectures": (9, 0, "a"), "min_blocks": max(1, resident)}
    # With more registers than 512 threads can have the compiler keeps what it had better compute again, and spills.
    return options if team.warps * resident == MOST_WARPS else options | {"max_registers": 128}


@functools.cache
def counters(n: int, team: Team) -> SimpleNamespace:
    """Device functions for the barriers: ``begin`` makes them, ``wait`` waits for all words of a stage.

    One of the threads that wait ``arms``: it lets the barrier count the words of the stage after the next, which cannot
    come before all have seen this one's. ``address`` is that of the barrier of a stage's parity.
    """
    barriers_at, words = Layout(n, team).barriers, SAMPLES * (n * (n + 2) + 1)
    squares = SAMPLES * team.blocks

    @device
    def address(shared, which, parity):
        # Places count elements of the 16-bit view of shared memory, four a barrier.
        barrier = np.uint32(np.uint32(parity) + np.uint32(which))
        return shared_address(shared, np.int64(np.uint32(np.uint32(4) * barrier) + np.uint32(2 * barriers_at)))

    @device
    def expect(shared, which, parity):
        nbytes = np.uint32(4 * squares) if which == OF_SQUARES else np.uint32(4 * words)
        barrier_expect_bytes(address(shared, which, parity), nbytes)

    @device
    def begin(shared):
        """All blocks of the cluster and their barriers are there when it returns."""
        if warp.thread_index() == np.uint32(0):
            for i in range(BARRIERS):
                barrier_init(address(shared, 0, np.uint32(i)), np.uint32(1))
            barrier_init_visible()
            for i in range(2):
                parity = np.uint32(i)
                expect(shared, OF_SUMS, parity)
                expect(shared, OF_LINES, parity)
                expect(shared, OF_SQUARES, parity)
        warp.sync_warp()
        cluster_barrier()

    @device
    def wait(shared, which, stage, arms):
        parity = np.uint32(stage & np.uint32(1))
        barrier_wait(address(shared, which, parity), np.uint32(np.uint32(stage >> np.uint32(1)) & np.uint32(1)))
        if arms:
            expect(shared, which, parity)

    return SimpleNamespace(begin=begin, wait=wait, address=address)


@functools.cache
def samples_in_place(n: int, threads: int) -> SimpleNamespace:
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
def projection(n: int, team: Team) -> SimpleNamespace:
    """Device functions for P on tensor cores: ``fetch`` the rows once, ``add`` the warp's part of a stage to shared."""
    outputs = n * (n + 2)
    tiles, width, words_of = -(-outputs // 8), outputs + 1, samples_in_place(n, team.threads).words
    layout = Layout(n, team)
    sums_at, sums = layout.sums, 4 * tiles

    @device
    def fetch(rows, held, c, channels):
        """Row 8 tile + g at the lane's channels of every stream, zeros where there is none."""
        lane = np.int64(np.uint32(warp.thread_index() % np.uint32(WARP)))
        for tile in range(tiles):
            e = np.int64(8 * tile) + (lane >> np.int64(2))
            for j in range(n):
                at = 4 * (tile * n + j)
                for i in range(4):
                    held[at + i] = np.uint32(0)
                if c < channels and e < np.int64(outputs):
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
    def add(shared, floats, stage, held, c, channels):
        acc = cuda.local.array(sums, np.float32)
        words = cuda.local.array(8, np.uint32)
        thread = warp.thread_index()
        lane, own = np.uint32(thread % np.uint32(WARP)), np.uint32(thread // np.uint32(WARP))
        sample, t = (
            np.uint32(own * np.uint32(SAMPLES)) + np.uint32(lane >> np.uint32(2)),
            np.uint32(lane & np.uint32(3)),
        )
        for i in range(sums):
            acc[i] = np.float32(0)
        upper, lower = np.float32(0), np.float32(0)
        for j in range(n):
            for i in range(8):
                words[i] = np.uint32(0)
            if c < channels:
                words_of(shared, stage, 0, j, words, 0)
                words_of(shared, stage, 1, j, words, 4)
            for tile in range(tiles):
                at = 4 * (tile * n + j)
                multiply(acc, tile, words, 0, held[at], held[at + 1])
                multiply(acc, tile, words, 1, held[at + 2], held[at + 3])
            upper, lower = squares_of(upper, words, 0), squares_of(lower, words, 4)
        upper, lower = warp.quad_sum(upper), warp.quad_sum(lower)
        for half in range(2):
            to = np.uint32(np.uint32(sample) * np.uint32(width)) + np.uint32(sums_at + 8 * half * width)
            for tile in range(tiles):
                for i in range(2):
                    e = np.uint32(np.uint32(2) * t) + np.uint32(8 * tile + i)
                    if e < np.uint32(outputs):
                        floats[np.uint32(to) + np.uint32(e)] = acc[4 * tile + 2 * half + i]
            if t == np.uint32(0):
                floats[np.uint32(to) + np.uint32(outputs)] = upper if half == 0 else lower

    return SimpleNamespace(fetch=fetch, add=add, words=4 * n * tiles)


@device
def opaque(count):
    """A number that the compiler does not know, so that it does not unroll a loop at the price of registers."""
    return np.int64(bits.again(np.uint32(count)))


@functools.cache
def sender(n: int, team: Team) -> Callable:
    """A device function: the sums of a stage over the block to the blocks that make the weights of its samples."""
    width, blocks, warps, threads, layout = n * (n + 2) + 1, team.blocks, team.warps, team.threads, Layout(n, team)
    values, own_values, address = SAMPLES * width, SAMPLES // blocks * width, counters(n, team).address
    sums_at, inbox_at = layout.sums, layout.inbox

    @device
    def send(shared, floats, stage):
        parity = np.uint32(stage & np.uint32(1))
        counted = address(shared, OF_SUMS, parity)
        for index in range(np.int64(warp.thread_index()), values, threads):
            e, total = np.uint32(index), np.float32(0)
            for i in range(warps):
                total += floats[e + np.uint32(sums_at + i * values)]
            owner = np.uint32(e // np.uint32(own_values))
            line = np.uint32(np.uint32(parity * np.uint32(blocks)) + cluster_rank())
            place = np.uint32(np.uint32(line - owner) * np.uint32(own_values)) + e + np.uint32(inbox_at)
            there = shared_address(shared, np.int64(np.uint32(np.uint32(2) * np.uint32(place))))
            shared_store_counted(there, counted, owner, bits.f32_bits(total))

    return send


@functools.cache
def maker(mode: str, n: int, team: Team) -> Callable:
    """A device function of one warp: the mixing weights of the block's samples of a stage, to every block.

    It leaves the samples' ``projected`` and ``mixing`` in memory as well.
    """
    outputs, blocks, samples, cells = n * (n + 2), team.blocks, SAMPLES // team.blocks, n * n
    width, layout, step, s_pre = outputs + 1, Layout(n, team), matrix_steps(mode, n), pre_weight(mode)
    values, count, start, iterate = samples * width, counters(n, team), step.start, step.iterate
    inbox_at, lines_at, wait, address = layout.inbox, layout.lines, count.wait, count.address

    @device
    def add_up(floats, at, projected, b, batch, flat, eps, lane):
        """P and r, in the place of the first block's sums."""
        for index in range(lane, opaque(values), WARP):
            e, total = np.uint32(index), np.float32(0)
            for rank in range(blocks):
                total += floats[np.uint32(at + e) + np.uint32(rank * values)]
            if np.uint32(e % np.uint32(width)) == np.uint32(outputs):
                total = np.float32(math.sqrt(total / np.float32(flat) + eps))
            floats[at + e] = total
            if b + np.int64(np.uint32(e // np.uint32(width))) < batch:
                projected[b * np.int64(width) + index] = total

    @device
    def from_logits(floats, at, alpha, bias, mixing, b, batch, eps, lane):
        """The logits, and of s_pre and s_post the weights."""
        for index in range(lane, opaque(samples * outputs), WARP):
            e = np.uint32(index)
            own = np.uint32(e // np.uint32(outputs))
            line, k = (
                np.uint32(at + np.uint32(own * np.uint32(width))),
                np.uint32(e - np.uint32(own * np.uint32(outputs))),
            )
            group = min(np.uint32(k // np.uint32(n)), np.uint32(2))
            value = alpha[group] * (floats[line + k] / floats[line + np.uint32(outputs)]) + bias[k]
            if group == np.uint32(0):
                value = s_pre(value, eps)
            elif group == np.uint32(1):
                value = post_weight(value)
            floats[line + k] = value
            if group < np.uint32(2) and b + np.int64(own) < batch:
                mixing[b * np.int64(outputs) + index] = value

    @device
    def project(floats, line, mixing, to, there, iterations, eps):
        """M of a lane's sample."""
        m = cuda.local.array(cells, np.float32)
        start(floats, np.int64(line), m, eps)
        iterate(m, iterations, eps)
        for i in range(cells):
            floats[line + np.uint32(i)] = m[i]
            if there:
                mixing[to + np.int64(i)] = m[i]

    @device
    def make(shared, floats, stage, projected, alpha, bias, mixing, first, batch, flat, iterations, eps):
        lane, parity = np.uint32(warp.thread_index() % np.uint32(WARP)), np.uint32(stage & np.uint32(1))
        at, index = np.uint32(parity * np.uint32(blocks * values) + np.uint32(inbox_at)), np.int64(lane)
        sample0 = np.uint32(cluster_rank() * np.uint32(samples))
        b = first + np.int64(sample0)
        wait(shared, OF_SUMS, stage, lane == np.uint32(0))
        add_up(floats, at, projected, b, batch, flat, eps, index)
        warp.sync_warp()
        from_logits(floats, at, alpha, bias, mixing, b, batch, eps, index)
        warp.sync_warp()
        if lane < np.uint32(samples):
            line, to = (
                np.uint32(at + np.uint32(lane * np.uint32(width) + np.uint32(2 * n))),
                (b + index) * np.int64(outputs),
            )
            project(floats, line, mixing, to + np.int64(2 * n), b + index < batch, iterations, eps)
        warp.sync_warp()
        own_line = np.uint32(np.uint32(parity * np.uint32(SAMPLES)) + sample0)
        counted, place = address(shared, OF_LINES, parity), np.uint32(own_line * np.uint32(width) + np.uint32(lines_at))
        for own in range(index, opaque(values), WARP):
            e = np.uint32(own)
            there = shared_address(shared, np.int64(np.uint32(np.uint32(2) * np.uint32(place + e))))
            for rank in range(blocks):
                shared_store_counted(there, counted, np.uint32(rank), bits.f32_bits(floats[at + e]))

    return make
