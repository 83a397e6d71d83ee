"""The gradient of queries by warpgroup products (sm_90a): what `kernels.attention.query_gradient` says.

The gradients of scores are a left factor where they are made, in registers.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from kernels import barrier, bits, functions, wgmma
from kernels.attention.forward import edge_of, hider
from kernels.attention.products import packer
from kernels.attention.query_walk import query_producer, query_walker, query_work
from kernels.attention.ring import (
    HELD_BYTES,
    ROWS,
    WIDTH,
    Ring,
    kept_room,
    specialised,
)
from kernels.attention.stage import pair_starter
from kernels.attention.statistics import STATISTICS
from kernels.attention.tiles import BATCH, HEAD, MATRIX, POINTER, TOKEN, clamped, lane_of, row_of, storer
from kernels.attention.walk import stage_steps
from kernels.barrier import early_options, entrance
from kernels.stages import hand_back
from kernels.target import cuda, device, f32, f32p, i64, kernel_factory, types
from kernels.warp import block_x, grid_x, thread_index, uniform
from kernels.wgmma_registers import add_products, settle, zero_sums

RING = Ring(4, 64, 2)
TILE = RING.tile
_COLUMNS = RING.columns
_COUNT, _WORDS = TILE.columns // 2, TILE.columns // 4
_u32 = np.uint32


@device
def _powers(scores, sums, factor):
    """Scores become powers, by the log-sum-exps of the thread's two rows."""
    for j in range(_COLUMNS // 8):
        for half in range(2):
            for i in range(2):
                number = 4 * j + 2 * half + i
                scores[number] = functions.exp2(scores[number] * factor - sums[half])


@device
def _differences(grads, powers, deltas):
    """The gradients of scores, P (grads - delta)."""
    for j in range(_COLUMNS // 8):
        for half in range(2):
            for i in range(2):
                number = 4 * j + 2 * half + i
                grads[number] = (grads[number] - deltas[half]) * powers[number]


def _differentiator(kind: str, causal: bool) -> Callable:
    """`query_walker`'s ``refine``: words of dS, when the products of a stage are there."""
    scores_there, grads_there, packed = settle(1, _COUNT), settle(0, _COUNT, _COUNT), packer(kind, TILE)
    hide, where = hider(TILE, causal), lane_of(TILE)

    @device
    def differentiate(arrays, edges, factor, before, thread):
        scores, grads, words, sums, deltas, _ = arrays
        scores_there(scores)
        lane = where(thread)[0]
        if before != _u32(0):
            hand_back(before, lane)
        hide(scores, edges[0], edges[1], edges[2], lane)
        _powers(scores, sums, factor)
        grads_there(grads, scores)
        _differences(grads, scores, deltas)
        packed(grads, words)

    return differentiate


def _walker(kind: str, causal: bool) -> Callable:
    """`query_walker`'s walk: scores and their gradients by keys and values, the queries' by keys."""
    across, turned = add_products(WIDTH, _COLUMNS // 16, kind), wgmma.operand_descriptor(False)
    stage_bytes, done = _u32(RING.stage_bytes), settle(0, WIDTH // 2)

    @device
    def add(base, stage, arrays):
        _, _, words, _, _, d_q = arrays
        across(d_q, words, turned(_u32(base + stage * stage_bytes)))

    @device
    def settled(arrays):
        done(arrays[5])

    steps = stage_steps(RING, pair_starter(RING, kind), add, settled)
    return query_walker(RING, steps, _differentiator(kind, causal))


def _consumer(kind: str, causal: bool) -> Callable:
    """``consume(shared, base, barriers, thread, state)``: a multiplying warpgroup."""
    room, clear, store, where = kept_room(RING), zero_sums(_COUNT), storer(kind, TILE), lane_of(TILE)
    work, edge_at, walk, results = query_work(causal), edge_of(TILE), _walker(kind, causal), RING.results_at // 2

    @device
    def consume(shared, base, barriers, thread, state):
        (d_q, _, statistics, padded, queries, keys, width, heads, _, diagonal, tiles, factor, scale) = state
        scores = cuda.local.array(_COUNT, np.float32)
        grads = cuda.local.array(_COUNT, np.float32)
        words = cuda.local.array(_WORDS, np.uint32)
        d_q_sums = cuda.local.array(_COUNT, np.float32)
        sums = cuda.local.array(2, np.float32)
        deltas = cuda.local.array(2, np.float32)
        arrays = (scores, grads, words, sums, deltas, d_q_sums)
        mine = uniform(_u32(thread >> _u32(7)))
        stage, phase, turn, tile = _u32(0), _u32(0), _u32(0), _u32(0)
        number = _u32(block_x())
        while number < _u32(tiles):
            batch, head, row0, seen = work(number, queries, keys, heads, diagonal)
            lane, line0 = where(thread)
            start = (batch * heads + head) * np.int64(STATISTICS) * padded + row0
            for i in range(2):
                at = start + np.int64(row_of(i, line0, lane))
                sums[i] = statistics[at]
                deltas[i] = statistics[at + padded]
            edge = edge_at(row0, line0, lane, keys, diagonal)
            kept, kept_pair, kept_phase = room(base, barriers, tile)
            kept = _u32(kept + mine * _u32(HELD_BYTES // 2))
            clear(d_q_sums)
            barrier.barrier_wait(kept_pair, kept_phase)
            stage, phase, turn = walk(
                base, barriers, kept, arrays, edge, _u32(keys), seen, factor, stage, phase, turn, mine, thread
            )
            lane, line0 = where(thread)
            hand_back(kept_pair, lane)
            batch, head, row0, _ = work(bits.again(number), queries, keys, heads, diagonal)
            for i in range(2):
                sums[i] = scale
            at, left = batch * d_q[BATCH] + head * d_q[HEAD] + row0 * d_q[TOKEN], clamped(queries - row0, ROWS)
            store(shared, np.int64(results), d_q_sums, sums, d_q[POINTER], at, d_q[TOKEN], left, width, line0, lane)
            tile = _u32(tile + _u32(1))
            number = _u32(number + _u32(grid_x()))

    return consume


@kernel_factory(("bf16", True, True), ("f16", False))
def attention_query_gradient_wgmma(kind: str, causal: bool, early: bool = False):
    """Parameters: d_q; the maps of q and d_out (boxes of a block's lines), k and v (of a stage's); statistics.

    Then how many queries those have room for, queries, keys, width, q's heads, those of one of k's, diagonal, tiles of
    queries in all, scale log2(e), scale. Maps are of [batch, head, token, element].
    """
    enter, load = entrance(early), query_producer(RING, causal)

    @device
    def produce(base, barriers, state):
        _, maps, _, _, queries, keys, _, heads, group, diagonal, tiles, _, _ = state
        load(base, barriers, maps, (queries, keys, heads, group, diagonal, tiles))

    run = specialised(RING, produce, _consumer(kind, causal))

    def kernel(d_q, maps, statistics, padded, queries, keys, width, heads, group, diagonal, tiles, factor, scale):
        enter()
        state = d_q, maps, statistics, padded, queries, keys, width, heads, group, diagonal, tiles, factor, scale
        run(thread_index(), state)

    parameters = MATRIX, types.UniTuple(types.uint64, 4), f32p, *(i64,) * 8, f32, f32
    return kernel, parameters, RING.options() | early_options(early)
