"""The gradient of queries on tensor cores of sm_80 and later: dS = P * (d_out v^T - delta), d_q = scale dS k.

A block has a tile of one head's queries and walks over the keys that they see, copied one tile ahead; P and delta as
in `kernels.attention.key_gradients`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from kernels import bits, functions, memory, warp
from kernels.attention.forward import edge_of, hider, locate
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


def _query_powers(tile: Tile) -> Callable:
    """``raise_(scores, grads, sums, deltas, factor)``: scores [query, key] become powers, ``grads`` minus delta."""
    blocks = tile.columns // 8

    def powered(number: int) -> Callable:
        block, half = divmod(number, 2)

        @device
        def power(state):
            scores, grads, sums, deltas, factor = state
            for j in range(blocks):
                for i in range(2):
                    at = 4 * (block * blocks + j) + 2 * half + i
                    scores[at] = functions.exp2(scores[at] * factor - sums[number])
                    grads[at] = -deltas[number]

        return power

    every = in_turn([powered(number) for number in range(2 * tile.row_blocks)])

    @device
    def raise_(scores, grads, sums, deltas, factor):
        every((scores, grads, sums, deltas, factor))

    return raise_


def _query_walker(kind: str, tile: Tile, causal: bool) -> Callable:
    """``walk(shared, d_q, sums, deltas, k, v, bases, problem, edge, thread)``: sums over all keys that rows see."""
    columns, row_elements, column_elements = tile.columns, tile.row_elements, tile.column_elements
    count, stage, first_stage = tile.row_blocks * tile.columns // 2, stage_elements(tile), 2 * tile.row_elements
    word_count, clear = count // 2, clearer(count)
    fetch, hide, raise_ = loader(tile.columns, tile.width, tile.threads), hider(tile, causal), _query_powers(tile)
    scores_of, packed, multiply = score_multiplier(kind, tile), packer(kind, tile), register_multiplier(kind, tile)
    arrived, where = memory.copy_async_wait(0), lane_of(tile)

    @device
    def fetch_both(shared, at, k, v, bases, column0, keys, width, thread):
        fetch(shared, at, k[POINTER], bases[0], k[TOKEN], column0, keys, width, thread)
        fetch(shared, at + np.int64(column_elements), v[POINTER], bases[1], v[TOKEN], column0, keys, width, thread)

    @device
    def walk(shared, d_q, sums, deltas, k, v, bases, problem, edge, thread):
        keys, seen, width, factor = problem
        scores = cuda.local.array(count, np.float32)
        grads = cuda.local.array(count, np.float32)
        words = cuda.local.array(word_count, np.uint32)
        at, next_at = np.int64(first_stage), np.int64(first_stage + stage)
        fetch_both(shared, at, k, v, bases, _u32(0), keys, width, thread)
        memory.copy_async_commit()
        column0 = _u32(0)
        while column0 < seen:
            arrived()
            warp.block_barrier()
            if _u32(column0 + _u32(columns)) < seen:
                fetch_both(shared, next_at, k, v, bases, _u32(column0 + _u32(columns)), keys, width, thread)
            memory.copy_async_commit()
            lane, line0 = where(thread)
            clear(scores)
            scores_of(shared, np.int64(0), at, scores, line0, lane)
            hide(scores, column0, edge, keys, lane)
            raise_(scores, grads, sums, deltas, factor)
            lane, line0 = where(thread)
            scores_of(shared, np.int64(row_elements), at + np.int64(column_elements), grads, line0, lane)
            for i in range(count):
                grads[i] = grads[i] * scores[i]
            packed(grads, words)
            multiply(shared, at, words, d_q, where(thread)[0])
            at, next_at = next_at, at
            column0 = _u32(column0 + _u32(columns))
        memory.copy_async_wait_all()
        warp.block_barrier()

    return walk


@kernel_factory(("bf16", Tile(128, 32, 4, 64), True, True), ("f16", Tile(64, 32, 4, 128), False))
def attention_query_gradient(kind: str, tile: Tile, causal: bool, early: bool = False):
    """Parameters: d_q, q, k, v, d_out, statistics and how many queries they have room for, queries, keys, width.

    Then q's heads, those of one of k's, diagonal, scale log2(e), scale. A block for a tile of one head's queries.
    ``early``: see `kernels.barrier.entrance`.
    """
    enter = entrance(early)
    sum_count, row_count = tile.row_blocks * tile.width // 2, 2 * tile.row_blocks
    rows, row_elements = tile.rows, tile.row_elements
    fetch, walk, edge_at = loader(tile.rows, tile.width, tile.threads), _query_walker(kind, tile, causal), edge_of(tile)
    clear, store, where = clearer(sum_count), storer(kind, tile), lane_of(tile)

    def kernel(d_q, q, k, v, d_out, statistics, padded, queries, keys, width, heads, group, diagonal, factor, scale):
        enter()
        shared = cuda.shared.array(0, np.uint16, alignment=128)
        d_q_sums = cuda.local.array(sum_count, np.float32)
        sums = cuda.local.array(row_count, np.float32)
        deltas = cuda.local.array(row_count, np.float32)
        block, thread = _u32(warp.block_x()), warp.thread_index()
        lane, line0 = where(thread)
        batch, head, row0 = locate(block, queries, heads, rows, causal)
        base = batch * q[BATCH] + head * q[HEAD]
        fetch(shared, np.int64(0), q[POINTER], base, q[TOKEN], _u32(row0), _u32(queries), width, thread)
        base, to = batch * d_out[BATCH] + head * d_out[HEAD], np.int64(row_elements)
        fetch(shared, to, d_out[POINTER], base, d_out[TOKEN], _u32(row0), _u32(queries), width, thread)
        start = (batch * heads + head) * np.int64(STATISTICS) * padded + row0
        for i in range(row_count):
            at = start + np.int64(row_of(i, line0, lane))
            sums[i] = statistics[at]
            deltas[i] = statistics[at + padded]
        clear(d_q_sums)
        seen = keys
        if causal:
            seen = max(np.int64(0), min(seen, min(row0 + np.int64(rows), queries) + diagonal))
        other = np.int64(_u32(_u32(head) // _u32(group)))
        bases = (batch * k[BATCH] + other * k[HEAD], batch * v[BATCH] + other * v[HEAD])
        problem, edge = (_u32(keys), _u32(seen), width, factor), edge_at(row0, line0, lane, keys, diagonal)
        walk(shared, d_q_sums, sums, deltas, k, v, bases, problem, edge, thread)
        batch, head, row0 = locate(bits.again(block), queries, heads, rows, causal)
        lane, line0 = where(thread)
        for i in range(row_count):
            sums[i] = scale
        at, left = batch * d_q[BATCH] + head * d_q[HEAD] + row0 * d_q[TOKEN], clamped(queries - row0, rows)
        store(shared, np.int64(0), d_q_sums, sums, d_q[POINTER], at, d_q[TOKEN], left, width, line0, lane)

    parameters = ((MATRIX,) * 5, (f32p,), (i64,) * 7, (f32, f32))
    return kernel, sum(parameters, ()), gradient_bounds(tile) | early_options(early)
