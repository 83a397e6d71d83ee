"""The gradients of x and of the projection of dynamic hyper-connections, on tensor cores; bf16.

A warp takes 32 neighbouring channels of all streams and walks over 16 samples at a time, which are copied ahead to
places of the lanes' own in shared memory. The projection's rows wait there as well, their columns in an order that
gives a lane eight neighbouring channels of two samples as results of the tensor core, so that x, d and d_x move in
16-byte accesses. What the samples add to the rows' gradient stays in registers for the whole walk. Lifts come in bf16
parts, and rows in fp32 are split into them, without loss; products of parts that lie below fp32 are left out.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np

from kernels import memory, tensor_core, warp
from kernels.elements import ELEMENTS
from kernels.hardware import WARP
from kernels.hyper_connection.project import exact_parts
from kernels.hyper_connection.spread_stage import (
    CHANNELS,
    OF_PULL,
    OF_ROOT,
    OF_WEIGHTS,
    OF_X,
    PARTS,
    RUN,
    STEP,
    WARPS,
    Layout,
    number_at,
    pitch_of,
    rows_gradient,
    rows_of,
    staged,
    staged_lifts,
)
from kernels.hyper_connection.stream import gamma_runs
from kernels.target import blocks_by_shared, cuda, device, f32p, i64, kernel_factory


@functools.cache
def _fill(projection: str, n: int) -> Callable:
    """A device function: the block's columns of the projection's rows to shared memory, in parts, zeros beside them.

    Of a warp's channels tile q has at column c the channel 8 (c / 2) + 2 q + c % 2: of eight neighbours, two a tile.
    """
    kind = ELEMENTS[projection]
    fetch8, unpack8, raw_words = kind.fetch8_cached, kind.unpack8, kind.words
    pitch, columns, outputs, threads = pitch_of(n), WARPS * n * CHANNELS, n * (n + 2), WARPS * WARP
    exact, rows_held, held = projection == "bf16", rows_of(n), 4 * PARTS

    @device
    def fetch(rows, at, words):
        """Eight neighbours as four pairs, in parts."""
        raw = cuda.local.array(raw_words, np.uint32)
        values = cuda.local.array(RUN, np.float32)
        fetch8(rows, at, raw, 0)
        if exact:
            for pair in range(4):
                words[pair] = raw[pair]
        else:
            unpack8(raw, 0, values, 0)
            for pair in range(4):
                words[pair], words[4 + pair], words[8 + pair] = exact_parts(values[2 * pair], values[2 * pair + 1])

    @device
    def fill(shared, rows, first, channels):
        words = cuda.local.array(held, np.uint32)
        for i in range(np.int64(warp.thread_index()), rows_held * columns // RUN, threads):
            index = np.uint32(i)
            e, run = np.uint32(index // np.uint32(columns // RUN)), np.uint32(index % np.uint32(columns // RUN))
            group, u = np.uint32(run // np.uint32(CHANNELS // RUN)), np.uint32(run % np.uint32(CHANNELS // RUN))
            own, j = np.uint32(group // np.uint32(n)), np.uint32(group % np.uint32(n))
            c = first + np.int64(np.uint32(own * np.uint32(CHANNELS)) + np.uint32(np.uint32(RUN) * u))
            for part in range(held):
                words[part] = np.uint32(0)
            if e < np.uint32(outputs) and c < channels:
                fetch(rows, (np.int64(e) * np.int64(n) + np.int64(j)) * channels + c, words)
            to = np.uint32(np.uint32(e * np.uint32(pitch)) + np.uint32(group * np.uint32(CHANNELS)))
            to = np.uint32(to + np.uint32(np.uint32(2) * u))
            for part in range(1 if exact else PARTS):
                for q in range(4):
                    at = np.int64(np.uint32(to + np.uint32(part * rows_held * pitch + 8 * q)))
                    memory.shared_store32(shared, at, words[4 * part + q])

    return fill


@functools.cache
def _product(projection: str, n: int, j: int) -> Callable:
    """A device function: acc = the lifts' fragments times the projection's columns of stream j, four tiles of eight."""
    pitch, rows, of_rows = pitch_of(n), rows_of(n), 1 if projection == "bf16" else PARTS
    words, pairs, odd = rows // 4, rows // 16, rows % 16 != 0

    @device
    def multiply(acc, c, f, i, b0, b1, b2):
        """The product of one part of the lifts with eight columns."""
        if pairs > 0:
            r0, r1, r2, r3 = tensor_core.mma_bf16(
                f[i], f[i + 1], f[i + 2], f[i + 3], b0, b1, acc[c], acc[c + 1], acc[c + 2], acc[c + 3]
            )
            acc[c], acc[c + 1], acc[c + 2], acc[c + 3] = r0, r1, r2, r3
        if odd:
            of_last, i = (b2 if pairs > 0 else b0), i + 4 * pairs
            r0, r1, r2, r3 = tensor_core.mma_bf16_short(
                f[i], f[i + 1], of_last, acc[c], acc[c + 1], acc[c + 2], acc[c + 3]
            )
            acc[c], acc[c + 1], acc[c + 2], acc[c + 3] = r0, r1, r2, r3

    @device
    def product(acc, f, shared, at):
        for i in range(16):
            acc[i] = np.float32(0)
        for tile in range(4):
            for copy in range(of_rows):
                offset = np.uint32(2 * (copy * rows * pitch + j * CHANNELS + 8 * tile))
                b0, b1, b2, _ = tensor_core.ldmatrix_transposed_ahead(shared, at, offset)
                for part in range(PARTS - copy):
                    multiply(acc, 4 * tile, f, words * part, b0, b1, b2)

    return product


@functools.cache
def _lifts(role: str, projection: str, n: int) -> SimpleNamespace:
    """Device functions: ``fetch`` a stage's lifts as fragments, ``rows`` is where the lane's row of a matrix lies."""
    pitch, rows, of_lifts = pitch_of(n), rows_of(n), staged_lifts(role, projection, n)
    place, by_sample, words = of_lifts.place, of_lifts.by_sample, of_lifts.words

    @device
    def fetch(shared, stage, f):
        at, last = place(stage, False), place(stage, True)
        for part in range(PARTS):
            by_sample(shared, at, last, part, f, words * part)

    @device
    def rows_at():
        thread = warp.thread_index()
        lane, own = np.uint32(thread % np.uint32(WARP)), np.uint32(thread // np.uint32(WARP))
        row = np.uint32(np.uint32(lane % np.uint32(rows)) * np.uint32(pitch))
        return np.int64(np.uint32(row + np.uint32(own * np.uint32(n * CHANNELS))))

    return SimpleNamespace(fetch=fetch, rows_at=rows_at, held=PARTS * words)


@functools.cache
def _number(role: str, projection: str | None, n: int) -> Callable:
    """A device function: a number of the record of the lane's ``half``-th sample."""
    further = 8 * 2 * Layout(role, projection, n).record

    @device
    def number(record, half, e):
        return number_at(record, np.uint32(half * further + 4 * e))

    return number


@functools.cache
def _aggregate_back(role: str, projection: str | None, gamma_element: str | None, n: int) -> Callable:
    """A device function: the eight channels' da of the ``half``-th sample, and its part of gamma's gradient."""
    unpack8, full, normalised = ELEMENTS["bf16"].unpack8, role == "full", gamma_element is not None
    _, unpack_gamma, _ = gamma_runs(gamma_element, 1)
    words_of, number = staged(role, projection, n).words, _number(role, projection, n)

    @device
    def back(at, record, half, gamma, da, of_gamma, there):
        words = cuda.local.array(4, np.uint32)
        v = cuda.local.array(RUN, np.float32)
        u = cuda.local.array(RUN, np.float32)
        dy = cuda.local.array(RUN, np.float32)
        for e in range(RUN):
            u[e] = np.float32(0)
            dy[e] = np.float32(0)
        for i in range(n):
            if normalised:
                words_of(at, half, i, words, 0)
                unpack8(words, 0, v, 0)
                weight = number(record, half, OF_WEIGHTS + i)
                for e in range(RUN):
                    u[e] += weight * v[e]
            if full:
                words_of(at, half, n + i, words, 0)
                unpack8(words, 0, v, 0)
                weight = number(record, half, OF_WEIGHTS + n + i)
                for e in range(RUN):
                    dy[e] += weight * v[e]
        if not full:
            words_of(at, half, 2 * n, words, 0)
            unpack8(words, 0, dy, 0)
        unpack_gamma(gamma, 0, v)
        scale, pull = number(record, half, OF_ROOT), number(record, half, OF_PULL)
        for e in range(RUN):
            if normalised:
                u[e] = u[e] * scale
                if there:
                    of_gamma[e] += dy[e] * u[e]
                dy[e] = (v[e] * dy[e] - u[e] * pull) * scale
            da[RUN * half + e] = dy[e]

    return back


@device
def _no_streams(shared, at, record, f, rows_at, da, d_x, to, channels, upper, lower):
    """Behind the last stream."""


@functools.cache
def _streams(role: str, projection: str | None, n: int, j: int) -> Callable:
    """A device function: d_x of the lane's eight channels of both samples, from stream j on.

    Each stream has code of its own, so that its sums stay in registers. ``upper`` and ``lower`` say whether the samples
    are to be written.
    """
    if j == n:
        return _no_streams
    unpack8, store8 = ELEMENTS["bf16"].unpack8, ELEMENTS["bf16"].store8
    full, projected = role == "full", projection is not None
    words_of, rest = staged(role, projection, n).words, _streams(role, projection, n, j + 1)
    number, product = _number(role, projection, n), _product(projection or "bf16", n, j)

    @device
    def sample(at, record, half, acc, da, d_x, to, there):
        words = cuda.local.array(4, np.uint32)
        v = cuda.local.array(RUN, np.float32)
        result = cuda.local.array(RUN, np.float32)
        weight = number(record, half, OF_WEIGHTS + j)
        for e in range(RUN):
            result[e] = weight * da[RUN * half + e]
        if projected:
            words_of(at, half, j, words, 0)
            unpack8(words, 0, v, 0)
            weight = number(record, half, OF_X)
            for e in range(RUN):
                result[e] += acc[4 * (e // 2) + 2 * half + e % 2] + weight * v[e]
        for i in range(n if full else 1):
            words_of(at, half, n + (i if full else j), words, 0)
            unpack8(words, 0, v, 0)
            weight = number(record, half, OF_WEIGHTS + (2 + i) * n + j) if full else np.float32(1)
            for e in range(RUN):
                result[e] += weight * v[e]
        if there:
            store8(d_x, to, result, 0, np.uint32(0))

    @device
    def streams(shared, at, record, f, rows_at, da, d_x, to, channels, upper, lower):
        acc = cuda.local.array(16, np.float32)
        if projected:
            product(acc, f, shared, rows_at)
        sample(at, record, 0, acc, da, d_x, to, upper)
        sample(at, record, 1, acc, da, d_x, to + np.int64(8 * n) * channels, lower)
        rest(shared, at, record, f, rows_at, da, d_x, to + channels, channels, upper, lower)

    return streams


_EXAMPLES = (
    ("full", "bf16", "bf16", 4), ("full", "f32", "f32", 4), ("full", "bf16", "f32", 3), ("full", None, "bf16", 4),
    ("pre", "bf16", "bf16", 4), ("pre", "f32", None, 1),
)  # fmt: skip


@kernel_factory(*_EXAMPLES)
def spread_tile(role, projection, gamma_element, n):
    """d_x[b, j] = carried[b, j] + s_pre[j] da[b] + rows_j^T lifts[b] + lift x[b, j]; and sums for gamma and the rows.

    Carried is sum_i M[i, j] d[b, i] in role "full", and d[b, j] in role "pre", where ``d_line`` [B, C] is the gradient
    of the aggregate; that is not read in role "full", nor are rows and lifts where ``projection`` is None. Parameters:
    x, gamma, d, d_line, records, rows, d_x, gamma_sums, parts, C, B, steps; ``records`` are there up to a multiple of
    16 samples, with lifts of zero behind the last, ``gamma_sums`` [splits, C], written where there is a gamma,
    ``parts`` [splits, n (n + 2), n C] of the gradient of the rows, where there are any. The grid is (blocks of
    channels, splits), a split ``steps`` of STEP samples.
    """
    projected, rows_kind, layout = projection is not None, projection or "bf16", Layout(role, projection, n)
    fill, of_samples, of_lifts = _fill(rows_kind, n), staged(role, projection, n), _lifts(role, rows_kind, n)
    park, park_records, address = of_samples.park, of_samples.park_records, of_samples.address
    record, fetch_lifts, rows_at, held = of_samples.record, of_lifts.fetch, of_lifts.rows_at, of_lifts.held
    aggregate_back = _aggregate_back(role, projection, gamma_element, n)
    streams, both = _streams(role, projection, n, 0), 2 * RUN
    fetch_gamma, _, gamma_pointer = gamma_runs(gamma_element, 1)
    gamma_words, normalised = ELEMENTS[gamma_element or "f32"].words, gamma_element is not None
    of_projection, arrived = rows_gradient(role, rows_kind, n), memory.copy_async_wait_all
    add_rows, store_rows, sums = of_projection.add, of_projection.store, of_projection.sums if projected else 1

    @device
    def ahead(shared, stage, x, d, d_line, records, b, g, c, channels, batch):
        """Start the copies of 16 samples from b on, the lane's of the g-th and the one eight further."""
        end = batch - np.int64(1)
        park_records(shared, stage, records, b)
        park(shared, stage, x, d, d_line, min(b + g, end), min(b + g + np.int64(8), end), c, channels)

    @device
    def spread(shared, stage, gamma, of_gamma, d_x, b, c, inside, channels, batch):
        """The gradient of x of the lane's samples, b and the one eight further."""
        f = cuda.local.array(held, np.uint32)
        da = cuda.local.array(both, np.float32)
        at, line, to = address(shared, stage), record(shared, stage), b * np.int64(n) * channels + c
        upper, lower = inside and b < batch, inside and b + np.int64(8) < batch
        if projected:
            fetch_lifts(shared, stage, f)
        aggregate_back(at, line, 0, gamma, da, of_gamma, upper)
        aggregate_back(at, line, 1, gamma, da, of_gamma, lower)
        streams(shared, at, line, f, rows_at(), da, d_x, to, channels, upper, lower)

    def kernel(x, gamma, d, d_line, records, rows, d_x, gamma_sums, parts, channels, batch, steps):
        shared = cuda.shared.array(0, np.uint16, alignment=1024)
        of_gamma = cuda.local.array(RUN, np.float32)
        scale = cuda.local.array(gamma_words, np.uint32)
        of_rows = cuda.local.array(sums, np.float32)
        thread = warp.thread_index()
        lane, own = np.uint32(thread % np.uint32(WARP)), np.uint32(thread // np.uint32(WARP))
        g, t = np.int64(np.uint32(lane >> np.uint32(2))), np.int64(np.uint32(lane & np.uint32(3)))
        first = warp.block_x() * np.int64(WARPS * CHANNELS)
        of_warp = first + np.int64(np.uint32(own * np.uint32(CHANNELS)))
        inside = of_warp + np.int64(8) * t < channels
        c = min(of_warp + np.int64(8) * t, channels - np.int64(RUN))
        b, stage = warp.block_y() * steps * np.int64(STEP), np.uint32(0)
        last = min(batch, b + steps * np.int64(STEP))
        ahead(shared, stage, x, d, d_line, records, b, g, c, channels, batch)
        if projected:
            fill(shared, rows, first, channels)
        fetch_gamma(gamma, scale, 0, c)
        for e in range(RUN):
            of_gamma[e] = np.float32(0)
        for i in range(sums):
            of_rows[i] = np.float32(0)
        while b < last:
            coming, other = b + np.int64(STEP), np.uint32(stage ^ np.uint32(1))
            arrived()
            # Records are the whole block's; and the other stage is free.
            warp.block_barrier()
            if coming < last:
                ahead(shared, other, x, d, d_line, records, coming, g, c, channels, batch)
            spread(shared, stage, scale, of_gamma, d_x, b + g, c, inside, channels, batch)
            if projected:
                add_rows(of_rows, shared, stage)
            b, stage = coming, other
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
        pointer, gamma_pointer, pointer, pointer, f32p, ELEMENTS[rows_kind].pointer, pointer, f32p, f32p, i64, i64, i64,
    )  # fmt: skip
    options = {"threads": WARP * WARPS, "shared_bytes": layout.bytes}
    return kernel, parameters, options | {"min_blocks": min(2, blocks_by_shared(layout.bytes))}
