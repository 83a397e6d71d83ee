"""The gradients of x and of the projection of dynamic hyper-connections, on tensor cores; bf16.

A warp takes 32 neighbouring channels of all streams and walks over 16 samples at a time, which are copied ahead to
places of the lanes' own in shared memory. The projection's rows wait there as well, their columns in an order that
gives a lane eight neighbouring channels of two samples as results of the tensor core, so that x, d and d_x move in
16-byte accesses. What the samples add to the rows' gradient stays in registers for the whole walk. The lifts, and rows
in fp32, are split into bf16 parts without loss; products of parts that lie below fp32 are left out.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np

from kernels import memory, tensor_core, warp
from kernels.elements import ELEMENTS
from kernels.hyper_connection.project import exact_parts
from kernels.hyper_connection.spread_stage import (
    CHANNELS,
    ROWS,
    RUN,
    STAGES,
    STEP,
    WARPS,
    pitch_of,
    rows_gradient,
    shared_bytes,
    staged,
)
from kernels.hyper_connection.stream import gamma_runs
from kernels.simulator import WARP
from kernels.target import blocks_by_shared, cuda, device, f32p, i64, kernel_factory


@functools.cache
def _fill(projection: str, n: int) -> Callable:
    """A device function: the block's columns of the projection's rows to shared memory, in parts, zeros beside them."""
    load, parts = ELEMENTS[projection].load, 1 if projection == "bf16" else 3
    pitch, columns, outputs, threads = pitch_of(n), WARPS * n * CHANNELS, n * (n + 2), WARPS * WARP

    @device
    def channel_of(place):
        """Which of a warp's channels lies at a place: tile q, column c holds channel 8 (c / 2) + 2 q + c % 2."""
        q, c = np.uint32(place >> np.uint32(3)), np.uint32(place & np.uint32(7))
        return np.uint32(np.uint32(8) * np.uint32(c >> np.uint32(1)) + np.uint32(2) * q + np.uint32(c & np.uint32(1)))

    @device
    def fill(shared, rows, first, channels):
        for i in range(np.int64(warp.thread_index()), ROWS * columns, threads):
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
                at = np.int64(np.uint32(np.uint32(part * ROWS) + e) * np.uint32(pitch) + column)
                shared[at] = np.uint16(words[part] & np.uint32(0xFFFF))

    return fill


@functools.cache
def _through(projection: str, n: int) -> Callable:
    """A device function: acc = the lifts' fragment times the projection's columns of stream j, four tiles of eight."""
    pitch, of_rows = pitch_of(n), 1 if projection == "bf16" else 3

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
                b0, b1, b2, b3 = tensor_core.ldmatrix_transposed(shared, at + np.int64(ROWS * pitch))
                product(acc, tile, a, 2, b0, b1, b2, b3)
                b0, b1, b2, b3 = tensor_core.ldmatrix_transposed(shared, at + np.int64(2 * ROWS * pitch))
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
def _aggregate_back(role: str, projection: str | None, gamma_element: str | None, n: int) -> Callable:
    """A device function: the eight channels' da of one sample, and its part of gamma's gradient if it ``counts``."""
    unpack8, full, normalised = ELEMENTS["bf16"].unpack8, role == "full", gamma_element is not None
    _, unpack_gamma, _ = gamma_runs(gamma_element, 1)
    words_of = staged(role, projection, n).words

    @device
    def back(shared, stage, half, weights, line, roots, sample, gamma, da, to, of_gamma, counts):
        words = cuda.local.array(4, np.uint32)
        v = cuda.local.array(RUN, np.float32)
        a = cuda.local.array(RUN, np.float32)
        dy = cuda.local.array(RUN, np.float32)
        root, pull = roots[sample * np.int64(2)], roots[sample * np.int64(2) + np.int64(1)]
        for e in range(RUN):
            a[e] = np.float32(0)
            dy[e] = np.float32(0)
        for i in range(n):
            if normalised:
                words_of(shared, stage, half, i, words)
                unpack8(words, 0, v, 0)
                for e in range(RUN):
                    a[e] += weights[line + i] * v[e]
            if full:
                words_of(shared, stage, half, n + i, words)
                unpack8(words, 0, v, 0)
                for e in range(RUN):
                    dy[e] += weights[line + n + i] * v[e]
        if not full:
            words_of(shared, stage, half, 2 * n, words)
            unpack8(words, 0, dy, 0)
        unpack_gamma(gamma, 0, v)
        scale = np.float32(1) / root
        for e in range(RUN):
            if normalised:
                u = a[e] * scale
                of_gamma[e] += dy[e] * u if counts else np.float32(0)
                da[to + e] = (v[e] * dy[e] - u * pull) * scale
            else:
                da[to + e] = dy[e]

    return back


@functools.cache
def _store_stream(role: str, projection: str | None, n: int) -> Callable:
    """A device function: d_x of stream j and one sample's eight channels."""
    unpack8, store8, full = ELEMENTS["bf16"].unpack8, ELEMENTS["bf16"].store8, role == "full"
    words_of = staged(role, projection, n).words

    @device
    def store(shared, stage, half, weights, line, lifted, j, acc, da, d_x, to):
        words = cuda.local.array(4, np.uint32)
        v = cuda.local.array(RUN, np.float32)
        result = cuda.local.array(RUN, np.float32)
        words_of(shared, stage, half, j, words)
        unpack8(words, 0, v, 0)
        for q in range(4):
            for i in range(2):
                e = 2 * q + i
                result[e] = acc[4 * q + 2 * half + i] + weights[line + j] * da[RUN * half + e] + lifted * v[e]
        if full:
            for i in range(n):
                words_of(shared, stage, half, n + i, words)
                unpack8(words, 0, v, 0)
                for e in range(RUN):
                    result[e] += weights[line + (2 + i) * n + j] * v[e]
        else:
            words_of(shared, stage, half, n + j, words)
            unpack8(words, 0, v, 0)
            for e in range(RUN):
                result[e] += v[e]
        store8(d_x, to, result, 0, np.uint32(0))

    return store


@kernel_factory(*_EXAMPLES)
def spread_tile(role, projection, gamma_element, n):
    """d_x[b, j] = carried[b, j] + s_pre[j] da[b] + rows_j^T lifts[b] + lift x[b, j]; and sums for gamma and the rows.

    Carried is sum_i M[i, j] d[b, i] in role "full", and d[b, j] in role "pre", where ``d_line`` [B, C] is the gradient
    of the aggregate; that is not read in role "full", nor are rows and lifts where ``projection`` is None. Parameters:
    x, gamma, d, d_line, weights, roots, rows, lifts, d_x, gamma_sums, parts, pitch, C, B, steps; ``lifts`` as
    ``spread`` takes them, ``roots`` [B, 2] r and the pull, ``gamma_sums`` [splits, C], written where there is a gamma,
    ``parts`` [splits, n (n + 2), n C] of the gradient of the rows, where there are any; ``pitch`` is n (n + 2), or 0
    where all samples have the same line of weights. The grid is (blocks of channels, splits), a split ``steps`` of STEP
    samples.
    """
    projected, rows_kind = projection is not None, projection or "bf16"
    fill, through, fetch_lifts = _fill(rows_kind, n), _through(rows_kind, n), _lift_fragment(n)
    park = staged(role, projection, n).park
    aggregate_back, store_stream = (
        _aggregate_back(role, projection, gamma_element, n),
        _store_stream(role, projection, n),
    )
    fetch_gamma, _, gamma_pointer = gamma_runs(gamma_element, 1)
    gamma_words, count, normalised = ELEMENTS[gamma_element or "f32"].words, n * (n + 2), gamma_element is not None
    of_projection, arrived = rows_gradient(role, projection, n), memory.copy_async_wait(STAGES - 1)
    add_rows, store_rows, sums = of_projection.add, of_projection.store, of_projection.sums if projected else 1

    @device
    def spread(
        shared, stage, x, weights, lifts, d_x, pitch, b, c, inside, channels, batch, upper, lower, da, own, lane
    ):
        """The gradient of x of 16 samples."""
        a = cuda.local.array(24, np.uint32)
        acc = cuda.local.array(16, np.float32)
        for i in range(16):
            acc[i] = np.float32(0)
        if projected:
            t = np.int64(np.uint32(lane & np.uint32(3)))
            fetch_lifts(lifts, upper * np.int64(count + 1), lower * np.int64(count + 1), t, a)
        for j in range(n):
            if projected:
                through(acc, a, shared, own, j, lane)
            for half in range(2):
                sample, lifted = lower if half else upper, np.float32(0)
                if projected:
                    lifted = lifts[sample * np.int64(count + 1) + np.int64(count)]
                if inside and b + np.int64(8 * half) < batch:
                    to = (sample * np.int64(n) + np.int64(j)) * channels + c
                    store_stream(shared, stage, half, weights, sample * pitch, lifted, j, acc, da, d_x, to)

    def kernel(x, gamma, d, d_line, weights, roots, rows, lifts, d_x, gamma_sums, parts, pitch, channels, batch, steps):
        shared = cuda.shared.array(0, np.uint16, alignment=128)
        of_gamma = cuda.local.array(RUN, np.float32)
        scale = cuda.local.array(gamma_words, np.uint32)
        da = cuda.local.array(16, np.float32)
        of_rows = cuda.local.array(sums, np.float32)
        thread = warp.thread_index()
        lane, own = np.uint32(thread % np.uint32(WARP)), np.uint32(thread // np.uint32(WARP))
        g, t = np.int64(np.uint32(lane >> np.uint32(2))), np.int64(np.uint32(lane & np.uint32(3)))
        first = warp.block_x() * np.int64(WARPS * CHANNELS)
        of_warp = first + np.int64(np.uint32(own * np.uint32(CHANNELS)))
        inside = of_warp + np.int64(8) * t < channels
        c = min(of_warp + np.int64(8) * t, channels - np.int64(RUN))
        end, b, stage = batch - np.int64(1), warp.block_y() * steps * np.int64(STEP) + g, np.uint32(0)
        last = min(batch, b - g + steps * np.int64(STEP))
        park(shared, stage, x, d, d_line, min(b, end), min(b + np.int64(8), end), c, channels)
        memory.copy_async_commit()
        if projected:
            fill(shared, rows, first, channels)
        fetch_gamma(gamma, scale, 0, c)
        for e in range(RUN):
            of_gamma[e] = np.float32(0)
        for i in range(sums):
            of_rows[i] = np.float32(0)
        warp.block_barrier()
        while b - g < last:
            coming, other = b + np.int64(STEP), np.uint32(stage ^ np.uint32(1))
            if coming - g < last:
                park(shared, other, x, d, d_line, min(coming, end), min(coming + np.int64(8), end), c, channels)
            memory.copy_async_commit()
            arrived()
            # The warp's lanes read one another's samples.
            warp.sync_warp()
            upper, lower = min(b, end), min(b + np.int64(8), end)
            for half in range(2):
                sample, there = lower if half else upper, b + np.int64(8 * half) < batch
                aggregate_back(
                    shared, stage, half, weights, sample * pitch, roots, sample, scale, da, RUN * half, of_gamma, there
                )
            spread(
                shared, stage, x, weights, lifts, d_x, pitch, b, c, inside, channels, batch, upper, lower, da, own, lane
            )
            if projected:
                add_rows(of_rows, shared, stage, lifts, b - g, lane, batch)
            warp.sync_warp()
            b, stage = coming, other
        memory.copy_async_wait_all()
        for e in range(RUN):
            total = of_gamma[e]
            for shift in range(3):
                total += warp.shuffle_xor(total, np.uint32(np.uint32(4) << np.uint32(shift)))
            if normalised and inside and g == np.int64(0):
                gamma_sums[warp.block_y() * channels + c + np.int64(e)] = total
        if projected:
            store_rows(of_rows, parts, of_warp, lane, channels)

    pointer = ELEMENTS["bf16"].pointer
    parameters = (
        pointer, gamma_pointer, pointer, pointer, f32p, f32p, ELEMENTS[rows_kind].pointer, f32p, pointer, f32p, f32p,
        i64, i64, i64, i64,
    )  # fmt: skip
    nbytes = shared_bytes(role, projection, n)
    options = {"threads": WARP * WARPS, "shared_bytes": nbytes}
    return kernel, parameters, options | {"min_blocks": min(2, blocks_by_shared(nbytes))}
