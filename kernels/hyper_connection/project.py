"""The projection of dynamic hyper-connections on tensor cores: P = x rows^T and the sum of squares, x in bf16.

A warp takes 16 samples and the eight-wide tiles of all rows, and walks over the places k of its block's split. Both
factors are read along k in 16-byte pieces, straight into fragments: the places of a product may come in any order, so
lane t of a quad takes 8 t to 8 t + 7 of 32 for both. The warps of a block read the same rows at the same time. fp32
rows are split into three bf16 parts without loss.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np

from kernels import bits, memory, tensor_core, warp
from kernels.elements import ELEMENTS
from kernels.hardware import WARP
from kernels.target import SIMULATOR, cuda, device, f32p, i64, kernel_factory

WARPS = 1 if SIMULATOR else 4
SAMPLES = 16 * WARPS
"""Samples of a block."""
STEP = 32
"""Places k that a warp takes at once."""
_AHEAD = 4
_TILE = 8


@device
def exact_parts(low, high):
    """Three words of bf16 pairs whose sums are two fp32 values, but for what lies below 2**-24 of them."""
    first = bits.pack_bf16(low, high)
    low, high = low - bits.low_bf16(first), high - bits.high_bf16(first)
    second = bits.pack_bf16(low, high)
    low, high = low - bits.low_bf16(second), high - bits.high_bf16(second)
    return first, second, bits.pack_bf16(low, high)


@functools.cache
def _fragments(projection: str) -> SimpleNamespace:
    """``fetch(rows, at, words)`` gives eight places of a row as ``parts`` times four words of bf16 pairs."""
    fetch8, unpack8, exact = ELEMENTS[projection].fetch8_cached, ELEMENTS[projection].unpack8, projection == "bf16"
    raw_words = ELEMENTS[projection].words

    @device
    def fetch(rows, at, words):
        if exact:
            fetch8(rows, at, words, 0)
        else:
            raw = cuda.local.array(raw_words, np.uint32)
            values = cuda.local.array(8, np.float32)
            fetch8(rows, at, raw, 0)
            unpack8(raw, 0, values, 0)
            for pair in range(4):
                words[pair], words[4 + pair], words[8 + pair] = exact_parts(values[2 * pair], values[2 * pair + 1])

    return SimpleNamespace(fetch=fetch, parts=1 if exact else 3)


@functools.cache
def _sum_of_squares() -> Callable:
    """A device function: the sum of squares of eight bf16 in four words, added to a total."""

    @device
    def add(total, words, at):
        for i in range(4):
            low, high = bits.low_bf16(words[at + i]), bits.high_bf16(words[at + i])
            total += low * low
            total += high * high
        return total

    return add


@kernel_factory(("bf16", 4), ("f32", 4), ("bf16", 1), ("bf16", 8))
def project_tile(projection, n):
    """Parts of P and of the sum of squares, [splits, B, n (n + 2) + 1]; grid (blocks of samples, splits).

    Parameters: x, rows, parts, flat, B, steps, with ``steps`` how many STEPs of k a split takes.
    """
    outputs = n * (n + 2)
    tiles = -(-outputs // _TILE)
    fragments, add_squares = _fragments(projection), _sum_of_squares()
    fetch_rows, of_rows = fragments.fetch, fragments.parts
    row_words, sums, a_words = 4 * of_rows, 4 * tiles, 8 * _AHEAD

    @device
    def fetch_samples(x, upper, lower, k, last, words, at):
        """Eight places of both of the lane's samples; zeros from ``last`` on."""
        for i in range(8):
            words[at + i] = np.uint32(0)
        if k < last:
            a, b, c, d = memory.load128_stream(x, upper + k)
            words[at], words[at + 1], words[at + 2], words[at + 3] = a, b, c, d
            a, b, c, d = memory.load128_stream(x, lower + k)
            words[at + 4], words[at + 5], words[at + 6], words[at + 7] = a, b, c, d

    @device
    def multiply(acc, tile, a, at, b):
        """The tile's sums with both products of 16 places."""
        for half in range(2):
            for part in range(of_rows):
                i, j, c = at + 2 * half, 4 * part + 2 * half, 4 * tile
                r0, r1, r2, r3 = tensor_core.mma_bf16(
                    a[i], a[i + 4], a[i + 1], a[i + 5], b[j], b[j + 1], acc[c], acc[c + 1], acc[c + 2], acc[c + 3]
                )
                acc[c], acc[c + 1], acc[c + 2], acc[c + 3] = r0, r1, r2, r3

    def kernel(x, rows, parts, flat, batch, steps):
        acc = cuda.local.array(sums, np.float32)
        a = cuda.local.array(a_words, np.uint32)
        b = cuda.local.array(row_words, np.uint32)
        thread = warp.thread_index()
        lane, own = np.uint32(thread % np.uint32(WARP)), np.uint32(thread // np.uint32(WARP))
        g, t = np.int64(np.uint32(lane >> np.uint32(2))), np.int64(np.uint32(lane & np.uint32(3)))
        sample = warp.block_x() * np.int64(SAMPLES) + np.int64(own) * np.int64(16) + g
        upper, lower = min(sample, batch - np.int64(1)) * flat, min(sample + np.int64(8), batch - np.int64(1)) * flat
        k = warp.block_y() * steps * np.int64(STEP)
        last = min(flat, k + steps * np.int64(STEP))
        for i in range(sums):
            acc[i] = np.float32(0)
        squares, lower_squares = np.float32(0), np.float32(0)
        while k < last:
            for step in range(_AHEAD):
                fetch_samples(x, upper, lower, k + np.int64(step * STEP) + t * np.int64(8), last, a, 8 * step)
            for step in range(_AHEAD):
                place = min(k + np.int64(step * STEP) + t * np.int64(8), flat - np.int64(8))
                for tile in range(tiles):
                    row = min(np.int64(tile * _TILE) + g, np.int64(outputs - 1))
                    fetch_rows(rows, row * flat + place, b)
                    multiply(acc, tile, a, 8 * step, b)
                squares = add_squares(squares, a, 8 * step)
                lower_squares = add_squares(lower_squares, a, 8 * step + 4)
            k += np.int64(_AHEAD * STEP)
        squares, lower_squares = warp.quad_sum(squares), warp.quad_sum(lower_squares)
        for half in range(2):
            b_half = sample + np.int64(8 * half)
            if b_half < batch:
                at = (warp.block_y() * batch + b_half) * np.int64(outputs + 1)
                for tile in range(tiles):
                    for i in range(2):
                        e = np.int64(tile * _TILE + i) + np.int64(2) * t
                        if e < np.int64(outputs):
                            parts[at + e] = acc[4 * tile + 2 * half + i]
                if t == np.int64(0):
                    parts[at + np.int64(outputs)] = squares if half == 0 else lower_squares

    pointer = ELEMENTS["bf16"].pointer
    return kernel, (pointer, ELEMENTS[projection].pointer, f32p, i64, i64, i64), {"threads": WARP * WARPS}
