"""The gradient of a normalisation of rows with those of its weight and bias: matrices are read once for all of them.

Blocks stay. Each has teams of threads, and a team goes over every so-many-th row. A thread has the same eight columns
of all of them and keeps their sums in registers; the next rows are on their way to shared memory meanwhile, to places
of the thread's own, so that a row has one barrier, that of its two sums. At the end a block adds up its teams' sums.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from kernels import bits, memory, warp
from kernels.barrier import early_options, entrance
from kernels.elements import ELEMENTS, parked8
from kernels.hardware import WARP
from kernels.target import SIMULATOR, cuda, device, f32, f32p, i64, kernel_factory
from kernels.teams import reduce_team

RUN = 8
"""Columns of a thread."""
MOST_THREADS = 1024
BLOCKS = 2 if SIMULATOR else 132
"""Most blocks, as many as an H200 has multiprocessors."""
_MOST_TEAMS = 8
_STAGES = 2
_KINDS = ("bf16", "bf16", "bf16", "bf16")
_u32 = np.uint32


def teams_of(team: int) -> int:
    """Teams of a block: as many as there are threads for, so that few blocks leave few parts."""
    return min(_MOST_TEAMS, MOST_THREADS // team)


def stage_bytes(kinds: tuple[str, ...], threads: int) -> int:
    """Shared memory of the rows that are on their way, and later of a block's sums but one team's."""
    return _STAGES * threads * sum(4 * ELEMENTS[kind].words for kind in kinds[:2])


@device
def index_of(row, width, column):
    """An element's index in a matrix of fewer than 2**31 rows and columns: one multiplication of 32 bits by 32."""
    return np.int64(np.uint64(row) * np.uint64(width)) + np.int64(column)


def _emitter(biased: bool, team: int, teams: int) -> Callable:
    """``emit(shared, sums_w, sums_b, d_w, d_b, own, at, n)``: the block's sums as its row of the parts."""
    store, halves = ELEMENTS["f32"].store8_cached, 2 * (1 + biased)  # the parts are read at once

    @device
    def place(own, half, at):
        """Of four sums of a thread; neighbours' lie side by side. In elements of 16 bits."""
        return (np.int64(own - np.int64(1)) * np.int64(halves) + np.int64(half)) * np.int64(RUN * team) + at

    @device
    def leave(shared, sums, own, first, at):
        for half in range(2):
            a, b, c, d = sums[4 * half], sums[4 * half + 1], sums[4 * half + 2], sums[4 * half + 3]
            words = bits.f32_bits(a), bits.f32_bits(b), bits.f32_bits(c), bits.f32_bits(d)
            memory.shared_store128(shared, place(own, first + half, at), words[0], words[1], words[2], words[3])

    @device
    def take(shared, sums, own, first, at):
        for half in range(2):
            a, b, c, d = memory.shared_load128(shared, place(own, first + half, at))
            sums[4 * half] += bits.bits_f32(a)
            sums[4 * half + 1] += bits.bits_f32(b)
            sums[4 * half + 2] += bits.bits_f32(c)
            sums[4 * half + 3] += bits.bits_f32(d)

    @device
    def emit(shared, sums_w, sums_b, d_w, d_b, own, at, n):
        if teams > 1:
            warp.block_barrier()  # where rows were on their way there is room for sums
            if own > np.int64(0):
                leave(shared, sums_w, own, 0, at)
                if biased:
                    leave(shared, sums_b, own, 2, at)
            warp.block_barrier()
        if own == np.int64(0) and at < n:
            for other in range(1, teams):
                take(shared, sums_w, np.int64(other), 0, at)
                if biased:
                    take(shared, sums_b, np.int64(other), 2, at)
            store(d_w, warp.block_x() * n + at, sums_w, 0, _u32(0))
            if biased:
                store(d_b, warp.block_x() * n + at, sums_b, 0, _u32(0))

    return emit


@kernel_factory((True, True, "", _KINDS, 512), (False, False, "bf16", ("f16", "f32", "f32", "f32"), 128))
def norm_backward(centred, biased, added, kinds, team, early=False):
    """d_x[r] = (v - mean(v) - y mean(v y)) rstd, v = g w, y = (x - mean) rstd; and this block's sums of g y, and of g.

    Not ``centred``: y = x rstd, and mean(v) is left out. ``kinds`` are those of x, g, w and d_x, ``added`` that of a
    matrix that is added to d_x, if any. Parameters: x, g, w, d_x, added (or d_x), mean (or rstd), rstd, parts of the
    sums of g y and, where ``biased``, of g, [blocks, n] each; 1 / n, rows, n (a multiple of 8, at most 8 * team).
    Accesses are aligned to 16 bytes. Blocks of `teams_of` teams of ``team`` threads, a power of two from 32 on.
    """
    teams = teams_of(team)
    threads = team * teams
    (park_x, unpark_x), (park_g, unpark_g) = parked8(kinds[0], threads), parked8(kinds[1], threads)
    weight, target, other = ELEMENTS[kinds[2]], ELEMENTS[kinds[3]], ELEMENTS[added or kinds[3]]
    fetch_w, unpack_w, store_x, fetch_r, unpack_r = (
        weight.fetch8_cached, weight.unpack8, target.store8, other.fetch8, other.unpack8,
    )  # fmt: skip
    w_words, r_words, emit = weight.words, other.words, _emitter(biased, team, teams)
    g_first = _STAGES * threads * 2 * ELEMENTS[kinds[0]].words
    first_sums, other_sums = (reduce_team(team, ("sum", "sum"), slot, teams == 1) for slot in (0, 2))
    wait, enter, cells, adds = (
        memory.copy_async_wait(_STAGES - 1),
        entrance(early, any_size=True),
        4 * WARP,
        bool(added),
    )

    def kernel(x, g, w, d_x, rest, means, rstds, d_w, d_b, inverse, count, n):
        shared = cuda.shared.array(0, np.uint16, alignment=16)
        parts = cuda.shared.array(cells, np.float32)
        raw, ends = cuda.local.array(w_words, np.uint32), cuda.local.array(r_words, np.uint32)
        a, b, c = (cuda.local.array(RUN, np.float32), cuda.local.array(RUN, np.float32),
                   cuda.local.array(RUN, np.float32))  # fmt: skip
        sums_w, sums_b = cuda.local.array(RUN, np.float32), cuda.local.array(RUN, np.float32)
        enter()
        thread, lines, width = warp.thread_index(), _u32(count), _u32(n)
        own, at = _u32(thread // _u32(team)), _u32(_u32(thread & _u32(team - 1)) * _u32(RUN))
        first, step = _u32(_u32(warp.block_x()) * _u32(teams) + own), _u32(_u32(warp.grid_x()) * _u32(teams))
        for k in range(RUN):
            a[k], b[k], c[k] = np.float32(0), np.float32(0), np.float32(0)
            sums_w[k], sums_b[k] = np.float32(0), np.float32(0)
        for stage in range(_STAGES):
            row = _u32(first + _u32(stage) * step)
            if row < lines and at < width:
                park_x(shared, 0, stage, thread, x, index_of(row, width, at))
                park_g(shared, g_first, stage, thread, g, index_of(row, width, at))
            memory.copy_async_commit()
        if at < width:
            fetch_w(w, np.int64(at), raw, 0)
            unpack_w(raw, 0, c, 0)
        row, slot = first, _u32(0)
        nearest = min(row, _u32(lines - _u32(1)))
        mean, rstd = means[nearest] if centred else np.float32(0), rstds[nearest]
        while row < lines:  # a range would divide
            later, following = _u32(row + _u32(_STAGES) * step), min(_u32(row + step), _u32(lines - _u32(1)))
            # A row ahead: this chain of latencies is as long as a row may take.
            next_mean, next_rstd = means[following] if centred else np.float32(0), rstds[following]
            wait()
            if at < width:
                unpark_x(shared, 0, slot, thread, a, 0)
                unpark_g(shared, g_first, slot, thread, b, 0)
                if adds:
                    fetch_r(rest, index_of(row, width, at), ends, 0)
                if later < lines:
                    park_x(shared, 0, slot, thread, x, index_of(later, width, at))
                    park_g(shared, g_first, slot, thread, g, index_of(later, width, at))
            memory.copy_async_commit()
            total, dot = np.float32(0), np.float32(0)
            for k in range(RUN):
                a[k] = (a[k] - mean) * rstd if centred else a[k] * rstd
                sums_w[k] += b[k] * a[k]
                sums_b[k] += b[k]
                b[k] = b[k] * c[k]
                total += b[k]
                dot += b[k] * a[k]
            # A slot of the sums is taken again after the next barrier, when everyone has read it.
            if slot == _u32(0):
                total, dot = first_sums((total, dot), parts)
            else:
                total, dot = other_sums((total, dot), parts)
            total, dot = total * inverse if centred else np.float32(0), dot * inverse
            for k in range(RUN):
                b[k] = (b[k] - total - a[k] * dot) * rstd
            if at < width:
                if adds:
                    unpack_r(ends, 0, a, 0)
                    for k in range(RUN):
                        b[k] += a[k]
                store_x(d_x, index_of(row, width, at), b, 0, _u32(0))
            row, slot, mean, rstd = _u32(row + step), _u32(_u32(1) - slot), next_mean, next_rstd
        memory.copy_async_wait_all()
        emit(shared, sums_w, sums_b, d_w, d_b, np.int64(own), np.int64(at), n)

    pointers = [ELEMENTS[kind].pointer for kind in (*kinds, added or kinds[3])]
    parameters = (*pointers, f32p, f32p, f32p, f32p, f32, i64, i64)
    options = {"threads": threads, "min_blocks": MOST_THREADS // threads, "shared_bytes": stage_bytes(kinds, threads)}
    return kernel, parameters, options | early_options(early)
