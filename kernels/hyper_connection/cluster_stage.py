"""A stage of 16 samples of dynamic hyper-connections in a cluster of blocks: where it lies, and its projection (sm_90).

A warp has 32 channels of every stream of all samples, and keeps the projection's rows of these places in registers. A
lane copies what it needs to places of its own in shared memory and reads it there as often as it likes. Blocks send one
another single words, which are counted at a barrier where they arrive.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np

from kernels import memory, tensor_core, warp
from kernels.barrier import (
    barrier_expect_bytes,
    barrier_init,
    barrier_init_visible,
    barrier_wait,
    cluster_barrier,
    cluster_rank,
    shared_address,
    shared_load_remote,
)
from kernels.ptx import instruction
from kernels.simulator import WARP
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
    """How a cluster shares the channels: ``blocks``, a power of two from 2 on, of ``warps`` warps each.

    A block has one more warp, which makes the mixing weights. A single block is no team: st.async is an illegal
    instruction in a launch without clusters.
    """

    blocks: int
    warps: int

    def __post_init__(self) -> None:
        assert self.blocks in (2, 4, 8, 16), self

    @property
    def lanes(self) -> int:
        """Threads of a block that have channels."""
        return WARP * self.warps


OF_SUMS, OF_LINES, OF_SQUARES, BARRIERS = 0, 2, 4, 6
"""Which barriers count words: two of each, for stages in turns."""


class Layout:
    """Where things lie in a block's shared memory, counted in fp32 numbers; the samples come first."""

    def __init__(self, n: int, team: Team) -> None:
        width = n * (n + 2) + 1
        self.barriers = STAGES * 2 * n * team.lanes * 4
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
    options = {"threads": WARP * (team.warps + 1), "shared_bytes": nbytes, "cluster": team.blocks}
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


def _word(address, offset):
    return shared_load_remote(np.uint32(address + offset), cluster_rank())


def _words(address, offset):
    return tuple(_word(address, offset + np.uint32(4 * i)) for i in range(4))


def _number(address, offset):
    return np.uint32(_word(address, offset)).view(np.float32)


# Of the block's own shared memory, ``offset`` bytes behind an address: a constant offset becomes a part of the
# instruction, where an index would be computed anew.
words_at = instruction(
    "{ .reg .b32 at; add.u32 at, $4, $5; ld.shared.v4.u32 {$0,$1,$2,$3}, [at]; }", "rr", "rrrr", twin=_words
)
number_at = instruction("{ .reg .b32 at; add.u32 at, $1, $2; ld.shared.f32 $0, [at]; }", "rr", "f", twin=_number)


@functools.cache
def samples_in_place(n: int, lanes: int) -> SimpleNamespace:
    """Device functions for a lane's own eight channels of all streams of its samples g and g + 8 of a stage.

    ``park`` starts their copies, ``words`` gives those of stream ``j`` of the ``half``-th sample as four words;
    ``address`` is where the lane's lie in a slot.
    """

    @device
    def place(slot):
        return np.uint32(np.uint32(np.uint32(slot * np.uint32(2 * n * lanes)) + warp.thread_index()) * np.uint32(RUN))

    @device
    def address(shared, slot):
        return shared_address(shared, np.int64(place(slot)))

    @device
    def park(shared, slot, x, sample, c, channels, batch):
        first = place(slot)
        for half in range(2):
            source = min(sample + np.int64(8 * half), batch - np.int64(1)) * np.int64(n) * channels + c
            for j in range(n):
                to = np.int64(np.uint32(first + np.uint32((half * n + j) * lanes * RUN)))
                memory.copy_async16(shared, to, x, source)
                source += channels

    @device
    def words(at, half, j, to, first):
        a, b, c, d = words_at(at, np.uint32((half * n + j) * lanes * 2 * RUN))
        to[first], to[first + 1], to[first + 2], to[first + 3] = a, b, c, d

    return SimpleNamespace(park=park, words=words, address=address)


@functools.cache
def projection(n: int, team: Team) -> SimpleNamespace:
    """Device functions for P on tensor cores: ``fetch`` the rows once, ``add`` the warp's part of a stage to shared."""
    outputs, places = n * (n + 2), samples_in_place(n, team.lanes)
    tiles, width, words_of, address = -(-outputs // 8), outputs + 1, places.words, places.address
    sums_at, sums = Layout(n, team).sums, 4 * tiles

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
    def multiply(acc, at, words, half, b0, b1):
        i = 2 * half
        r0, r1, r2, r3 = tensor_core.mma_bf16(
            words[i], words[i + 4], words[i + 1], words[i + 5], b0, b1, acc[at], acc[at + 1], acc[at + 2], acc[at + 3]
        )
        acc[at], acc[at + 1], acc[at + 2], acc[at + 3] = r0, r1, r2, r3

    @device
    def store(floats, acc, upper, lower):
        """The warp's sums; a sample's with itself lie on the diagonal of its tile."""
        thread = warp.thread_index()
        lane, own = np.uint32(thread % np.uint32(WARP)), np.uint32(thread // np.uint32(WARP))
        g, t = np.uint32(lane >> np.uint32(2)), np.uint32(lane & np.uint32(3))
        line = np.uint32(np.uint32(own * np.uint32(SAMPLES)) + g)
        at = np.uint32(np.uint32(line * np.uint32(width)) + np.uint32(sums_at))
        for half in range(2):
            for tile in range(tiles):
                for i in range(2):
                    e = np.uint32(np.uint32(2) * t) + np.uint32(8 * tile + i)
                    if e < np.uint32(outputs):
                        floats[at + np.uint32(8 * half * width) + e] = acc[4 * tile + 2 * half + i]
            if np.uint32(g >> np.uint32(1)) == t:
                odd, of_half = (g & np.uint32(1)) != np.uint32(0), lower if half else upper
                floats[at + np.uint32(8 * half * width + outputs)] = of_half[2 * half + 1] if odd else of_half[2 * half]

    @device
    def add(shared, floats, slot, held, c, channels):
        acc = cuda.local.array(sums, np.float32)
        upper = cuda.local.array(4, np.float32)
        lower = cuda.local.array(4, np.float32)
        words = cuda.local.array(8, np.uint32)
        at = address(shared, slot)
        for i in range(sums):
            acc[i] = np.float32(0)
        for i in range(4):
            upper[i] = np.float32(0)
            lower[i] = np.float32(0)
        for j in range(n):
            for i in range(8):
                words[i] = np.uint32(0)
            if c < channels:
                words_of(at, 0, j, words, 0)
                words_of(at, 1, j, words, 4)
            for half in range(2):
                for tile in range(tiles):
                    row = 4 * (tile * n + j) + 2 * half
                    multiply(acc, 4 * tile, words, half, held[row], held[row + 1])
                multiply(upper, 0, words, half, words[2 * half], words[2 * half + 1])
                multiply(lower, 0, words, half, words[4 + 2 * half], words[5 + 2 * half])
        store(floats, acc, upper, lower)

    return SimpleNamespace(fetch=fetch, add=add, words=4 * n * tiles)
