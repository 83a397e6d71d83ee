"""Where samples wait for ``spread_tile.py``, and the gradient of the projection's rows that is made of them there."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import numpy as np

from kernels import memory, tensor_core, warp
from kernels.hyper_connection.project import exact_parts
from kernels.simulator import WARP
from kernels.target import SIMULATOR, cuda, device

WARPS = 1 if SIMULATOR else 4
CHANNELS = 32
"""Channels of a warp."""
STEP = 16
"""Samples that a warp takes at once."""
MOST_STREAMS = 4
ROWS = 32
RUN = 8
STAGES = 2


def pitch_of(n: int) -> int:
    """Elements from row to row: eight more than there are, so that eight rows lie in different banks."""
    return WARPS * n * CHANNELS + 8


def rows_elements(projection: str | None, n: int) -> int:
    """16-bit elements of shared memory for the rows; the samples lie behind them."""
    return ROWS * pitch_of(n) * {None: 0, "bf16": 1, "f32": 3}[projection]


def shared_bytes(role: str, projection: str | None, n: int) -> int:
    """Shared memory of a block."""
    lines = 2 * n + (role == "pre")
    return 2 * rows_elements(projection, n) + 16 * STAGES * 2 * lines * WARPS * WARP


@functools.cache
def staged(role: str, projection: str | None, n: int) -> SimpleNamespace:
    """Device functions for a lane's eight channels of two samples, x [n], d [n] and in role "pre" one more line.

    ``park`` starts the copies of a stage's, ``words`` gives a line's as four words, and ``transposed`` as tensor cores
    want them: 16 channels of stream ``j``, from the ``pair``-th 16 of the warp's on, by the 16 samples.
    """
    lines, threads, base, pre = 2 * n + (role == "pre"), WARPS * WARP, rows_elements(projection, n), role == "pre"

    @device
    def place(stage, half, line, thread):
        slot = np.uint32(np.uint32(stage * np.uint32(2 * lines)) + np.uint32(np.uint32(half * np.uint32(lines)) + line))
        return np.int64(
            np.uint32(np.uint32(np.uint32(slot * np.uint32(threads)) + thread) * np.uint32(RUN)) + np.uint32(base)
        )

    @device
    def park(shared, stage, x, d, d_line, upper, lower, c, channels):
        thread = warp.thread_index()
        for half in range(2):
            sample = lower if half else upper
            for i in range(n):
                source = (sample * np.int64(n) + np.int64(i)) * channels + c
                memory.copy_async16(shared, place(stage, np.uint32(half), np.uint32(i), thread), x, source)
                memory.copy_async16(shared, place(stage, np.uint32(half), np.uint32(n + i), thread), d, source)
            if pre:
                source = sample * channels + c
                memory.copy_async16(shared, place(stage, np.uint32(half), np.uint32(2 * n), thread), d_line, source)

    @device
    def words(shared, stage, half, line, to):
        w = memory.shared_load128(shared, place(stage, np.uint32(half), np.uint32(line), warp.thread_index()))
        to[0], to[1], to[2], to[3] = w[0], w[1], w[2], w[3]

    @device
    def transposed(shared, stage, j, pair):
        thread = warp.thread_index()
        lane, first = np.uint32(thread % np.uint32(WARP)), np.uint32(thread & np.uint32(~(WARP - 1) & 0xFFFFFFFF))
        half, t = np.uint32(lane >> np.uint32(4)), np.uint32(np.uint32(lane >> np.uint32(3)) & np.uint32(1))
        owner = np.uint32(np.uint32(lane & np.uint32(7)) << np.uint32(2)) + np.uint32(np.uint32(2 * pair) + t)
        return tensor_core.ldmatrix_transposed(
            shared, place(stage, half, np.uint32(j), np.uint32(first + np.uint32(owner)))
        )

    return SimpleNamespace(park=park, words=words, transposed=transposed)


@functools.cache
def rows_gradient(role: str, projection: str | None, n: int) -> SimpleNamespace:
    """Device functions for d_rows = lifts^T x of the warp's channels: ``add`` a stage's, ``store`` the walk's sums."""
    outputs, transposed = n * (n + 2), staged(role, projection, n).transposed
    tiles = -(-outputs // 8)
    held = 6 * tiles

    @device
    def lift(lifts, b, e, batch):
        if b < batch and e < np.int64(outputs):
            return lifts[b * np.int64(outputs + 1) + e]
        return np.float32(0)

    @device
    def fetch(lifts, b, lane, batch, f):
        """The lifts' fragments in three parts: 16 samples by eight rows for every tile; zeros beside them."""
        g, t = np.int64(np.uint32(lane >> np.uint32(2))), np.int64(np.uint32(lane & np.uint32(3)))
        for tile in range(tiles):
            e = np.int64(8 * tile) + g
            for half in range(2):
                sample = b + np.int64(8 * half) + np.int64(2) * t
                low, high = lift(lifts, sample, e, batch), lift(lifts, sample + np.int64(1), e, batch)
                at = 6 * tile + half
                f[at], f[at + 2], f[at + 4] = exact_parts(low, high)

    @device
    def add(acc, shared, stage, lifts, b, lane, batch):
        f = cuda.local.array(held, np.uint32)
        fetch(lifts, b, lane, batch, f)
        for j in range(n):
            for pair in range(2):
                a0, a1, a2, a3 = transposed(shared, stage, j, pair)
                for tile in range(tiles):
                    c = 4 * ((2 * j + pair) * tiles + tile)
                    for part in range(3):
                        i = 6 * tile + 2 * part
                        r0, r1, r2, r3 = tensor_core.mma_bf16(
                            a0, a1, a2, a3, f[i], f[i + 1], acc[c], acc[c + 1], acc[c + 2], acc[c + 3]
                        )
                        acc[c], acc[c + 1], acc[c + 2], acc[c + 3] = r0, r1, r2, r3

    @device
    def store(acc, parts, first, lane, channels):
        """To the split's part [n (n + 2), n C]; ``first`` is the warp's first channel."""
        g, t = np.int64(np.uint32(lane >> np.uint32(2))), np.int64(np.uint32(lane & np.uint32(3)))
        at = warp.block_y() * np.int64(outputs)
        for j in range(n):
            for pair in range(2):
                for i in range(4):
                    c = first + np.int64(16 * pair + 8 * (i >> 1)) + g
                    for tile in range(tiles):
                        e = np.int64(8 * tile + (i & 1)) + np.int64(2) * t
                        if e < np.int64(outputs) and c < channels:
                            to = ((at + e) * np.int64(n) + np.int64(j)) * channels + c
                            parts[to] = acc[4 * ((2 * j + pair) * tiles + tile) + i]

    return SimpleNamespace(add=add, store=store, sums=16 * n * tiles // 2)
