"""The gradient of x of dynamic hyper-connections, with what comes through the projection on tensor cores; bf16.

A warp takes 32 neighbouring channels of all streams and walks over 16 samples at a time; no sum leaves a lane. The
projection's rows wait in shared memory, their columns in an order that gives a lane eight neighbouring channels of two
samples as results of the tensor core, so that x, d and d_x move in 16-byte accesses. The lifts, and rows in fp32, are
split into bf16 parts without loss; products of parts that lie below fp32 are left out.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np

from kernels import memory, tensor_core, warp
from kernels.elements import ELEMENTS
from kernels.hyper_connection.project import exact_parts
from kernels.hyper_connection.stream import gamma_runs
from kernels.simulator import WARP
from kernels.target import SIMULATOR, blocks_by_shared, cuda, device, f32p, i64, kernel_factory

WARPS = 1 if SIMULATOR else 4
CHANNELS = 32
"""Channels of a warp."""
STEP = 16
"""Samples that a warp takes at once."""
MOST_STREAMS = 4
_ROWS = 32
_RUN = 8


def _pitch(n: int) -> int:
    """Elements from row to row: eight more than there are, so that eight rows lie in different banks."""
    return WARPS * n * CHANNELS + 8


@functools.cache
def _fill(projection: str, n: int) -> Callable:
    """A device function: the block's columns of the projection's rows to shared memory, in parts, zeros beside them."""
    load, parts = ELEMENTS[projection].load, 1 if projection == "bf16" else 3
    pitch, columns, outputs, threads = _pitch(n), WARPS * n * CHANNELS, n * (n + 2), WARPS * WARP

    @device
    def channel_of(place):
        """Which of a warp's channels lies at a place: tile q, column c holds channel 8 (c / 2) + 2 q + c % 2."""
        q, c = np.uint32(place >> np.uint32(3)), np.uint32(place & np.uint32(7))
        return np.uint32(np.uint32(8) * np.uint32(c >> np.uint32(1)) + np.uint32(2) * q + np.uint32(c & np.uint32(1)))

    @device
    def fill(shared, rows, first, channels):
        for i in range(np.int64(warp.thread_index()), _ROWS * columns, threads):
            index = np.uint32(i)
            e, column = np.uint32(index // np.uint32(columns)), np.uint32(index % np.uint32(columns))
            group, place = np.uint32(column // np.uint32(CHANNELS)), np.uint32(column % np.uint32(CHANNELS))
            own, j = np.uint32(group // np.uint32(n)), np.uint32(group % np.uint32(n))
            c = first + np.int64(np.uint32(own * np.uint32(CHANNELS) + channel_of(place)))
            value = np.float32(0)
            if e < np.uint32(outputs) and c < channels:
                value = load(rows, (np.int64(e) * np.int64(n) + np.int64(j)) * channels + c)
            words = exact_parts(value, np.float32(0))
            for part in range(parts):
                at = np.int64(np.uint32(np.uint32(part * _ROWS) + e) * np.uint32(pitch) + column)
                shared[at] = np.uint16(words[part] & np.uint32(0xFFFF))

    return fill


@functools.cache
def _through(projection: str, n: int) -> Callable:
    """A device function: acc = the lifts' fragment times the projection's columns of stream j, four tiles of eight."""
    pitch, of_rows = _pitch(n), 1 if projection == "bf16" else 3

    @device
    def multiply(acc, tile, a, part, step, b0, b1):
        i, c = 8 * part + 4 * step, 4 * tile
        r0, r1, r2, r3 = tensor_core.mma_bf16(
            a[i], a[i + 1], a[i + 2], a[i + 3], b0, b1, acc[c], acc[c + 1], acc[c + 2], acc[c + 3]
        )
        acc[c], acc[c + 1], acc[c + 2], acc[c + 3] = r0, r1, r2, r3

    @device
    def product(acc, tile, a, of_lifts, b0, b1, b2, b3):
        for part in range(of_lifts):
            multiply(acc, tile, a, part, 0, b0, b1)
            multiply(acc, tile, a, part, 1, b2, b3)

    @device
    def through(acc, a, shared, own, j, lane):
        for i in range(16):
            acc[i] = np.float32(0)
        column = np.uint32(np.uint32(own * np.uint32(n) + np.uint32(j)) * np.uint32(CHANNELS))
        for tile in range(4):
            at = np.int64(np.uint32(lane * np.uint32(pitch) + column + np.uint32(8 * tile)))
            b0, b1, b2, b3 = tensor_core.ldmatrix_transposed(shared, at)
            product(acc, tile, a, 3, b0, b1, b2, b3)
            if of_rows == 3:
                b0, b1, b2, b3 = tensor_core.ldmatrix_transposed(shared, at + np.int64(_ROWS * pitch))
                product(acc, tile, a, 2, b0, b1, b2, b3)
                b0, b1, b2, b3 = tensor_core.ldmatrix_transposed(shared, at + np.int64(2 * _ROWS * pitch))
                product(acc, tile, a, 1, b0, b1, b2, b3)

    return through


@functools.cache
def _lift_fragment(n: int) -> Callable:
    """A device function: the lifts of 16 samples by 32 rows as a fragment in three parts; zeros beside them."""
    outputs = n * (n + 2)

    @device
    def lift(lifts, line, e):
        return lifts[line + e] if e < np.int64(outputs) else np.float32(0)

    @device
    def fetch(lifts, upper, lower, t, a):
        for step in range(2):
            for r in range(4):
                line = lower if r & 1 else upper
                e = np.int64(16 * step + 8 * (r >> 1)) + np.int64(2) * t
                first, second, third = exact_parts(lift(lifts, line, e), lift(lifts, line, e + np.int64(1)))
                a[4 * step + r], a[8 + 4 * step + r], a[16 + 4 * step + r] = first, second, third

    return fetch


_EXAMPLES = (
    ("full", "bf16", "bf16", 4), ("full", "f32", "f32", 4), ("full", "bf16", "f32", 3), ("full", None, "bf16", 4),
    ("pre", "bf16", "bf16", 4), ("pre", "f32", None, 1),
)  # fmt: skip


@functools.cache
def _aggregate_back(role: str, gamma_element: str | None, n: int) -> Callable:
    """A device function: the eight channels' da of one sample, and what it adds to gamma's gradient if it ``counts``.

    ``dy`` holds the gradient of y in role "pre", and is scratch in role "full".
    """
    unpack8, full, normalised = ELEMENTS["bf16"].unpack8, role == "full", gamma_element is not None
    _, unpack_gamma, _ = gamma_runs(gamma_element, 1)

    @device
    def back(x_words, d_words, at, weights, line, roots, sample, gamma, dy, da, to, of_gamma, counts):
        v = cuda.local.array(_RUN, np.float32)
        a = cuda.local.array(_RUN, np.float32)
        root, pull = roots[sample * np.int64(2)], roots[sample * np.int64(2) + np.int64(1)]
        for e in range(_RUN):
            a[e] = np.float32(0)
            if full:
                dy[e] = np.float32(0)
        for i in range(n):
            if normalised:
                unpack8(x_words, at + 4 * i, v, 0)
                for e in range(_RUN):
                    a[e] += weights[line + i] * v[e]
            if full:
                unpack8(d_words, at + 4 * i, v, 0)
                for e in range(_RUN):
                    dy[e] += weights[line + n + i] * v[e]
        unpack_gamma(gamma, 0, v)
        scale = np.float32(1) / root
        for e in range(_RUN):
            if normalised:
                u = a[e] * scale
                of_gamma[e] += dy[e] * u if counts else np.float32(0)
                da[to + e] = (v[e] * dy[e] - u * pull) * scale
            else:
                da[to + e] = dy[e]

    return back


@functools.cache
def _store_stream(role: str, n: int) -> Callable:
    """A device function: d_x of stream j and one sample's eight channels."""
    unpack8, store8, full = ELEMENTS["bf16"].unpack8, ELEMENTS["bf16"].store8, role == "full"

    @device
    def store(x_words, d_words, at, weights, line, lifted, j, half, acc, da, d_x, to):
        v = cuda.local.array(_RUN, np.float32)
        result = cuda.local.array(_RUN, np.float32)
        unpack8(x_words, at + 4 * j, v, 0)
        for q in range(4):
            for i in range(2):
                e = 2 * q + i
                result[e] = acc[4 * q + 2 * half + i] + weights[line + j] * da[_RUN * half + e] + lifted * v[e]
        if full:
            for i in range(n):
                unpack8(d_words, at + 4 * i, v, 0)
                for e in range(_RUN):
                    result[e] += weights[line + (2 + i) * n + j] * v[e]
        else:
            unpack8(d_words, at + 4 * j, v, 0)
            for e in range(_RUN):
                result[e] += v[e]
        store8(d_x, to, result, 0, np.uint32(0))

    return store


@kernel_factory(*_EXAMPLES)
def spread_tile(role, projection, gamma_element, n):
    """d_x[b, j] = carried[b, j] + s_pre[j] da[b] + rows_j^T lifts[b] + lift x[b, j], and the sums for gamma.

    Carried is sum_i M[i, j] d[b, i] in role "full", and d[b, j] in role "pre", where ``d_line`` [B, C] is the gradient
    of the aggregate; that is not read in role "full", nor are rows and lifts where ``projection`` is None. Parameters:
    x, gamma, d, d_line, weights, roots, rows, lifts, d_x, gamma_sums, pitch, C, B, steps; ``lifts`` as ``spread`` takes
    them, ``roots`` [B, 2] r and the pull, ``gamma_sums`` [splits, C], written where there is a gamma; ``pitch`` is n (n
    + 2), or 0 where all samples have the same line of weights. The grid is (blocks of channels, splits), a split
    ``steps`` of STEP samples.
    """
    projected, rows_kind = projection is not None, projection or "bf16"
    fill, through, fetch_lifts = _fill(rows_kind, n), _through(rows_kind, n), _lift_fragment(n)
    aggregate_back, store_stream = _aggregate_back(role, gamma_element, n), _store_stream(role, n)
    fetch_gamma, _, gamma_pointer = gamma_runs(gamma_element, 1)
    gamma_words, count, words_of_half = ELEMENTS[gamma_element or "f32"].words, n * (n + 2), 4 * n
    words_held, full, normalised = 2 * words_of_half, role == "full", gamma_element is not None
    unpack8 = ELEMENTS["bf16"].unpack8

    @device
    def fetch8(source, index, words, at):
        w0, w1, w2, w3 = memory.load128_stream(source, index)
        words[at], words[at + 1], words[at + 2], words[at + 3] = w0, w1, w2, w3

    @device
    def fetch(source, sample, c, channels, words, at):
        for i in range(n):
            fetch8(source, (sample * np.int64(n) + np.int64(i)) * channels + c, words, at + 4 * i)

    def kernel(x, gamma, d, d_line, weights, roots, rows, lifts, d_x, gamma_sums, pitch, channels, batch, steps):
        shared = cuda.shared.array(0, np.uint16, alignment=128)
        x_words = cuda.local.array(words_held, np.uint32)
        d_words = cuda.local.array(words_held, np.uint32)
        of_gamma = cuda.local.array(_RUN, np.float32)
        scale = cuda.local.array(gamma_words, np.uint32)
        line_words = cuda.local.array(8, np.uint32)
        dy = cuda.local.array(_RUN, np.float32)
        da = cuda.local.array(16, np.float32)
        a = cuda.local.array(24, np.uint32)
        acc = cuda.local.array(16, np.float32)
        thread = warp.thread_index()
        lane, own = np.uint32(thread % np.uint32(WARP)), np.uint32(thread // np.uint32(WARP))
        g, t = np.int64(np.uint32(lane >> np.uint32(2))), np.int64(np.uint32(lane & np.uint32(3)))
        first = warp.block_x() * np.int64(WARPS * CHANNELS)
        if projected:
            fill(shared, rows, first, channels)
        c = first + np.int64(np.uint32(own * np.uint32(CHANNELS))) + np.int64(8) * t
        inside = c < channels
        c = min(c, channels - np.int64(_RUN))
        fetch_gamma(gamma, scale, 0, c)
        for e in range(_RUN):
            of_gamma[e] = np.float32(0)
        for i in range(16):
            acc[i] = np.float32(0)
        warp.block_barrier()
        b = warp.block_y() * steps * np.int64(STEP)
        last = min(batch, b + steps * np.int64(STEP))
        while b < last:
            upper, lower = min(b + g, batch - np.int64(1)), min(b + g + np.int64(8), batch - np.int64(1))
            fetch(x, upper, c, channels, x_words, 0)
            fetch(d, upper, c, channels, d_words, 0)
            fetch(x, lower, c, channels, x_words, words_of_half)
            fetch(d, lower, c, channels, d_words, words_of_half)
            if not full:
                fetch8(d_line, upper * channels + c, line_words, 0)
                fetch8(d_line, lower * channels + c, line_words, 4)
            upper_line, lower_line = upper * np.int64(count + 1), lower * np.int64(count + 1)
            if projected:
                fetch_lifts(lifts, upper_line, lower_line, t, a)
            for half in range(2):
                sample = lower if half else upper
                there = b + g + np.int64(8 * half) < batch
                line = sample * pitch
                if not full:
                    unpack8(line_words, 4 * half, dy, 0)
                aggregate_back(
                    x_words, d_words, half * words_of_half, weights, line, roots, sample, scale, dy, da, _RUN * half,
                    of_gamma, there,
                )  # fmt: skip
            for j in range(n):
                if projected:
                    through(acc, a, shared, own, j, lane)
                for half in range(2):
                    sample = lower if half else upper
                    lifted = np.float32(0)
                    if projected:
                        lifted = lifts[(lower_line if half else upper_line) + np.int64(count)]
                    if inside and b + g + np.int64(8 * half) < batch:
                        to = (sample * np.int64(n) + np.int64(j)) * channels + c
                        line = sample * pitch
                        at = half * words_of_half
                        store_stream(x_words, d_words, at, weights, line, lifted, j, half, acc, da, d_x, to)
            b += np.int64(STEP)
        for e in range(_RUN):
            total = of_gamma[e]
            for shift in range(3):
                total += warp.shuffle_xor(total, np.uint32(np.uint32(4) << np.uint32(shift)))
            if normalised and inside and g == np.int64(0):
                gamma_sums[warp.block_y() * channels + c + np.int64(e)] = total

    pointer = ELEMENTS["bf16"].pointer
    parameters = (
        pointer, gamma_pointer, pointer, pointer, f32p, f32p, ELEMENTS[rows_kind].pointer, f32p, pointer, f32p, i64,
        i64, i64, i64,
    )  # fmt: skip
    shared_bytes = 2 * _ROWS * _pitch(n) * {None: 0, "bf16": 1, "f32": 3}[projection]
    options = {"threads": WARP * WARPS, "shared_bytes": shared_bytes}
    return kernel, parameters, options | {"min_blocks": min(2, blocks_by_shared(shared_bytes))}
