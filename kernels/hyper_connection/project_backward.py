"""The gradient of the projection of dynamic hyper-connections on tensor cores: d_rows = lifts^T x, x in bf16.

A warp takes 64 neighbouring places k of all rows and walks over 16 samples at a time. A lane reads eight places of four
samples in 16-byte accesses; pairs of samples, which the tensor core wants, are put together in registers. The lifts,
fp32, are split into three bf16 parts without loss.
"""

from __future__ import annotations

import numpy as np

from kernels import memory, tensor_core, warp
from kernels.elements import ELEMENTS
from kernels.hyper_connection.project import exact_parts
from kernels.simulator import WARP
from kernels.target import SIMULATOR, cuda, device, f32p, i64, kernel_factory

WARPS = 1 if SIMULATOR else 4
SPAN = 64
"""Places of a warp."""
STEP = 16
"""Samples that a warp takes at once."""
_LOW, _HIGH = np.uint32(0xFFFF), np.uint32(0xFFFF0000)


@kernel_factory((4,), (2,), (8,))
def project_back_tile(n):
    """Parts of the gradient of the projection's rows, [splits, n (n + 2), flat]; grid (places, splits).

    Parameters: x, lifts, parts, flat, B, steps; ``lifts`` [B, n (n + 2) + 1], of which the last of a line is left out;
    ``steps`` of STEP samples a split.
    """
    outputs = n * (n + 2)
    tiles = -(-outputs // 16)
    sums = tiles * 8 * 4

    @device
    def lift(lifts, b, e, batch):
        if b < batch and e < np.int64(outputs):
            return lifts[b * np.int64(outputs + 1) + e]
        return np.float32(0)

    @device
    def fetch(x, b, k, flat, batch, words, at):
        row = min(b, batch - np.int64(1)) * flat
        first, second, third, fourth = memory.load128_stream(x, row + k)
        words[at], words[at + 1], words[at + 2], words[at + 3] = first, second, third, fourth

    @device
    def fetch_lifts(lifts, tile, b, g, t, batch, a):
        """The fragment of 16 rows by 16 samples, in three parts."""
        for r in range(4):
            e = np.int64(16 * tile + 8 * (r & 1)) + g
            sample = b + np.int64(8 * (r >> 1)) + np.int64(2) * t
            low, high = lift(lifts, sample, e, batch), lift(lifts, sample + np.int64(1), e, batch)
            a[r], a[4 + r], a[8 + r] = exact_parts(low, high)

    @device
    def multiply(acc, at, a, b0, b1):
        for part in range(3):
            i = 4 * part
            r0, r1, r2, r3 = tensor_core.mma_bf16(
                a[i], a[i + 1], a[i + 2], a[i + 3], b0, b1, acc[at], acc[at + 1], acc[at + 2], acc[at + 3]
            )
            acc[at], acc[at + 1], acc[at + 2], acc[at + 3] = r0, r1, r2, r3

    def kernel(x, lifts, parts, flat, batch, steps):
        acc = cuda.local.array(sums, np.float32)
        words = cuda.local.array(16, np.uint32)
        a = cuda.local.array(12, np.uint32)
        thread = warp.thread_index()
        lane, own = np.uint32(thread % np.uint32(WARP)), np.uint32(thread // np.uint32(WARP))
        g, t = np.int64(np.uint32(lane >> np.uint32(2))), np.int64(np.uint32(lane & np.uint32(3)))
        first = (warp.block_x() * np.int64(WARPS) + np.int64(own)) * np.int64(SPAN)
        k = min(first + np.int64(8) * g, flat - np.int64(8))
        b = warp.block_y() * steps * np.int64(STEP)
        last = min(batch, b + steps * np.int64(STEP))
        for i in range(sums):
            acc[i] = np.float32(0)
        while b < last:
            sample = b + np.int64(2) * t
            fetch(x, sample, k, flat, batch, words, 0)
            fetch(x, sample + np.int64(1), k, flat, batch, words, 4)
            fetch(x, sample + np.int64(8), k, flat, batch, words, 8)
            fetch(x, sample + np.int64(9), k, flat, batch, words, 12)
            for tile in range(tiles):
                fetch_lifts(lifts, tile, b, g, t, batch, a)
                for pair in range(4):
                    w0, w1, w2, w3 = words[pair], words[4 + pair], words[8 + pair], words[12 + pair]
                    even0 = np.uint32((w0 & _LOW) | np.uint32(w1 << np.uint32(16)))
                    even1 = np.uint32((w2 & _LOW) | np.uint32(w3 << np.uint32(16)))
                    odd0 = np.uint32(np.uint32(w0 >> np.uint32(16)) | (w1 & _HIGH))
                    odd1 = np.uint32(np.uint32(w2 >> np.uint32(16)) | (w3 & _HIGH))
                    multiply(acc, (8 * tile + 2 * pair) * 4, a, even0, even1)
                    multiply(acc, (8 * tile + 2 * pair + 1) * 4, a, odd0, odd1)
            b += np.int64(STEP)
        for tile in range(tiles):
            for i in range(4):
                e = np.int64(16 * tile + 8 * (i >> 1)) + g
                to = first + np.int64(8) * (np.int64(2) * t + np.int64(i & 1))
                if e < np.int64(outputs) and to < flat:
                    at = (warp.block_y() * np.int64(outputs) + e) * flat + to
                    for q in range(8):
                        parts[at + np.int64(q)] = acc[(8 * tile + q) * 4 + i]

    return kernel, (ELEMENTS["bf16"].pointer, f32p, f32p, i64, i64, i64), {"threads": WARP * WARPS}
