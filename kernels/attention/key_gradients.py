"""Gradients of keys and values on tensor cores of sm_80 and later, without sums between blocks.

With the scores' powers P made anew from q, k and the log-sum-exps, and delta = rowsum(d_out * out):

    d_v = P^T d_out    dS = P * (d_out v^T - delta)    d_k = scale dS^T q

A block has a tile of one head's keys and walks over the queries of all heads that share them, copied one tile ahead.
Its scores are [key, query]. The product that makes dS starts from minus delta. Results are the same bits in every run.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from kernels import bits, functions, memory, warp
from kernels.attention.forward import locate
from kernels.attention.products import packer, register_multiplier, score_multiplier
from kernels.attention.statistics import STATISTICS
from kernels.attention.tiles import (
    BATCH,
    HEAD,
    MATRIX,
    POINTER,
    TOKEN,
    Tile,
    clamped,
    clearer,
    gradient_bounds,
    in_turn,
    lane_of,
    loader,
    row_of,
    stage_elements,
    storer,
)
from kernels.barrier import early_options, entrance
from kernels.target import cuda, device, f32, f32p, i64, kernel_factory

_u32 = np.uint32
_NOTHING = np.float32(-math.inf)


def _column_statistics(tile: Tile) -> Callable:
    """``load(shared, at, values, lane)``: a lane's columns' numbers of a tile."""
    blocks = tile.columns // 8

    @device
    def load(shared, at, values, lane):
        start = at + np.int64(_u32(_u32(lane & _u32(3)) << _u32(2)))
        for j in range(blocks):
            low, high = memory.shared_load64(shared, start + np.int64(16 * j))
            values[2 * j] = bits.bits_f32(low)
            values[2 * j + 1] = bits.bits_f32(high)

    return load


def _key_powers(tile: Tile, causal: bool) -> Callable:
    """``raise_(scores, grads, sums, deltas, factor, hidden0, line0, lane)``: scores [key, query] become powers.

    ``grads`` become what the next product starts from. Row 0 of the tile is hidden from the first ``hidden0`` queries
    of it, each further row from one more; an int64, which may be negative.
    """
    blocks, columns = tile.columns // 8, tile.columns

    def powered(number: int) -> Callable:
        block, half = divmod(number, 2)

        @device
        def power(state):
            scores, grads, sums, deltas, factor, hidden0, line0, lane = state
            hidden, first = _u32(0), _u32(_u32(lane & _u32(3)) << _u32(1))
            if causal:
                hidden = clamped(hidden0 + np.int64(row_of(number, line0, lane)), columns)
            for j in range(blocks):
                for i in range(2):
                    at = 4 * (block * blocks + j) + 2 * half + i
                    score = scores[at] * factor - sums[2 * j + i]
                    if causal and _u32(first + _u32(8 * j + i)) < hidden:
                        score = _NOTHING
                    scores[at] = functions.exp2(score)
                    grads[at] = -deltas[2 * j + i]

        return power

    every = in_turn([powered(number) for number in range(2 * tile.row_blocks)])

    @device
    def raise_(scores, grads, sums, deltas, factor, hidden0, line0, lane):
        every((scores, grads, sums, deltas, factor, hidden0, line0, lane))

    return raise_


def _query_fetcher(tile: Tile) -> Callable:
    """``fetch(shared, at, q, d_out, statistics, padded, queries, width, position, thread)``: starts a stage's copies.

    ``position``: the first query, and batch, head and their number counted as one.
    """
    fetch_tile, column_elements = loader(tile.columns, tile.width, tile.threads), tile.column_elements
    columns, pieces = tile.columns, tile.columns // 4

    @device
    def fetch(shared, at, q, d_out, statistics, padded, queries, width, position, thread):
        column0, batch, head, slot = position
        base = batch * q[BATCH] + head * q[HEAD]
        fetch_tile(shared, at, q[POINTER], base, q[TOKEN], column0, queries, width, thread)
        base = batch * d_out[BATCH] + head * d_out[HEAD]
        to = at + np.int64(column_elements)
        fetch_tile(shared, to, d_out[POINTER], base, d_out[TOKEN], column0, queries, width, thread)
        if thread < _u32(2 * pieces):
            which, piece = _u32(thread // _u32(pieces)), _u32(thread % _u32(pieces))
            source = (slot * np.int64(STATISTICS) + np.int64(which)) * padded + np.int64(column0)
            to = at + np.int64(2 * column_elements) + np.int64(_u32(which * _u32(2 * columns)))
            memory.copy_async16(
                shared, to + np.int64(_u32(piece * _u32(8))), statistics, source + np.int64(_u32(piece * _u32(4)))
            )

    return fetch


def _key_walker(kind: str, tile: Tile, causal: bool) -> Callable:
    """``walk(shared, d_k, d_v, q, d_out, statistics, problem, place, thread)``: sums over the queries of some heads."""
    columns, row_elements, column_elements = tile.columns, tile.row_elements, tile.column_elements
    count, stage = tile.row_blocks * tile.columns // 2, stage_elements(tile)
    word_count, column_count, first_stage = count // 2, tile.columns // 4, 2 * tile.row_elements
    fetch, statistics_of, clear = _query_fetcher(tile), _column_statistics(tile), clearer(count)
    scores_of, packed, multiply = score_multiplier(kind, tile), packer(kind, tile), register_multiplier(kind, tile)
    raise_, arrived, where = _key_powers(tile, causal), memory.copy_async_wait(0), lane_of(tile)

    @device
    def position(turn, place, heads, group):
        batch, other, first, of_head, _ = place
        in_group = _u32(turn // of_head)
        column0 = _u32(first + _u32(_u32(turn - _u32(in_group * of_head)) * _u32(columns)))
        head = other * group + np.int64(in_group)
        return column0, batch, head, (batch * heads + head)

    @device
    def walk(shared, d_k, d_v, q, d_out, statistics, problem, place, thread):
        padded, queries, width, heads, group, factor = problem
        of_head, hidden0 = place[3], place[4]
        scores = cuda.local.array(count, np.float32)
        grads = cuda.local.array(count, np.float32)
        words = cuda.local.array(word_count, np.uint32)
        sums = cuda.local.array(column_count, np.float32)
        deltas = cuda.local.array(column_count, np.float32)
        turns = _u32(of_head * _u32(group))
        at, next_at = np.int64(first_stage), np.int64(first_stage + stage)
        if turns > _u32(0):
            start = position(_u32(0), place, heads, group)
            fetch(shared, at, q, d_out, statistics, padded, queries, width, start, thread)
        memory.copy_async_commit()
        for turn in range(turns):
            arrived()
            warp.block_barrier()
            if _u32(_u32(turn) + _u32(1)) < turns:
                following = position(_u32(_u32(turn) + _u32(1)), place, heads, group)
                fetch(shared, next_at, q, d_out, statistics, padded, queries, width, following, thread)
            memory.copy_async_commit()
            lane, line0 = where(thread)
            column0 = position(_u32(turn), place, heads, group)[0]
            clear(scores)
            scores_of(shared, np.int64(0), at, scores, line0, lane)
            statistics_of(shared, at + np.int64(2 * column_elements), sums, lane)
            statistics_of(shared, at + np.int64(2 * column_elements + 2 * columns), deltas, lane)
            raise_(scores, grads, sums, deltas, factor, hidden0 - np.int64(column0), line0, lane)
            packed(scores, words)
            lane, line0 = where(thread)
            multiply(shared, at + np.int64(column_elements), words, d_v, lane)
            scores_of(shared, np.int64(row_elements), at + np.int64(column_elements), grads, line0, lane)
            for i in range(count):
                grads[i] = grads[i] * scores[i]
            packed(grads, words)
            multiply(shared, at, words, d_k, where(thread)[0])
            at, next_at = next_at, at
        memory.copy_async_wait_all()
        warp.block_barrier()

    return walk


@kernel_factory(("bf16", Tile(128, 32, 4, 64), True, True), ("f16", Tile(64, 32, 4, 128), True))
def attention_key_gradients(kind: str, tile: Tile, causal: bool, early: bool = False):
    """Parameters: d_k, d_v, q, k, v, d_out, statistics and how many queries they have room for, queries, keys, width.

    Then k's heads, q's heads of one of k's, diagonal, scale log2(e), scale. A block for a tile of one head's keys.
    Statistics are [batch, head, 2, query], those of queries that are not there plus infinity and zero. ``early``: see
    `kernels.barrier.entrance`.
    """
    enter = entrance(early)
    sum_count, row_count = tile.row_blocks * tile.width // 2, 2 * tile.row_blocks
    rows, columns, row_elements = tile.rows, tile.columns, tile.row_elements
    fetch = loader(tile.rows, tile.width, tile.threads)
    walk, clear, store, where = _key_walker(kind, tile, causal), clearer(sum_count), storer(kind, tile), lane_of(tile)

    def kernel(
        d_k, d_v, q, k, v, d_out, statistics, padded, queries, keys, width, heads, group, diagonal, factor, scale
    ):
        enter()
        shared = cuda.shared.array(0, np.uint16, alignment=128)
        d_k_sums = cuda.local.array(sum_count, np.float32)
        d_v_sums = cuda.local.array(sum_count, np.float32)
        factors = cuda.local.array(row_count, np.float32)
        block, thread = _u32(warp.block_x()), warp.thread_index()
        batch, other, row0 = locate(block, keys, heads, rows, False)
        base = batch * k[BATCH] + other * k[HEAD]
        fetch(shared, np.int64(0), k[POINTER], base, k[TOKEN], _u32(row0), _u32(keys), width, thread)
        base = batch * v[BATCH] + other * v[HEAD]
        fetch(shared, np.int64(row_elements), v[POINTER], base, v[TOKEN], _u32(row0), _u32(keys), width, thread)
        clear(d_k_sums)
        clear(d_v_sums)
        hidden0 = row0 - diagonal
        first = _u32(0)
        if causal:
            first = _u32(_u32(min(max(hidden0, np.int64(0)), queries)) // _u32(columns) * _u32(columns))
        of_head = _u32(_u32(_u32(queries) - first + _u32(columns - 1)) // _u32(columns))
        problem = (padded, _u32(queries), width, heads * group, group, factor)
        walk(shared, d_k_sums, d_v_sums, q, d_out, statistics, problem, (batch, other, first, of_head, hidden0), thread)
        batch, other, row0 = locate(bits.again(block), keys, heads, rows, False)
        lane, line0 = where(thread)
        left = clamped(keys - row0, rows)
        for i in range(row_count):
            factors[i] = scale
        at = batch * d_k[BATCH] + other * d_k[HEAD] + row0 * d_k[TOKEN]
        store(shared, np.int64(0), d_k_sums, factors, d_k[POINTER], at, d_k[TOKEN], left, width, line0, lane)
        for i in range(row_count):
            factors[i] = np.float32(1)
        at = batch * d_v[BATCH] + other * d_v[HEAD] + row0 * d_v[TOKEN]
        store(shared, np.int64(0), d_v_sums, factors, d_v[POINTER], at, d_v[TOKEN], left, width, line0, lane)

    parameters = ((MATRIX,) * 6, (f32p,), (i64,) * 7, (f32, f32))
    return kernel, sum(parameters, ()), gradient_bounds(tile) | early_options(early)
