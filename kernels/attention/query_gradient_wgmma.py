"""The gradient of queries by warpgroup products (sm_90a): what `kernels.attention.query_gradient` says.

The gradients of scores are a left factor where they are made, in registers.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from kernels import barrier, bits, functions, wgmma
from kernels.attention.forward import edge_of, hider
from kernels.attention.products import packer
from kernels.attention.query_walk import query_producer, query_work
from kernels.attention.ring import (
    HELD_BYTES,
    ROWS,
    WIDTH,
    Ring,
    hand_back,
    kept_room,
    specialised,
    stage_follower,
)
from kernels.attention.statistics import STATISTICS
from kernels.attention.tiles import BATCH, HEAD, MATRIX, POINTER, TOKEN, clamped, lane_of, row_of, storer
from kernels.barrier import early_options, entrance
from kernels.target import cuda, device, f32, f32p, i64, kernel_factory, types
from kernels.warp import block_x, grid_x, thread_index
from kernels.wgmma_registers import add_products, settle, start_products, zero_sums

RING = Ring(4, 64, 2)
TILE = RING.tile
_COLUMNS, _WALKED_BYTES = RING.columns, RING.walked_bytes
_STEPS = WIDTH // 16
_COUNT, _WORDS = TILE.columns // 2, TILE.columns // 4
_u32 = np.uint32


@device
def _powers(scores, powers, sums, factor):
    """The powers of scores, by the log-sum-exps of the thread's two rows."""
    for j in range(_COLUMNS // 8):
        for half in range(2):
            for i in range(2):
                number = 4 * j + 2 * half + i
                powers[number] = functions.exp2(scores[number] * factor - sums[half])


@device
def _differences(grads, powers, deltas):
    """DS = P (grads - delta)."""
    for j in range(_COLUMNS // 8):
        for half in range(2):
            for i in range(2):
                number = 4 * j + 2 * half + i
                grads[number] = (grads[number] - deltas[half]) * powers[number]


def _stage_taker(kind: str, causal: bool, last: bool) -> Callable:
    """``take(...)``: what a stage, whose scores are there, adds to d_q.

    Under way are at its beginning the product that makes the stage's other gradients, and maybe what the stage before
    added, whose pair of barriers is ``before``; at its end the same of the next stage and of this. ``edges``: the first
    key, `edge_of`'s number, all keys. Gives the next stage and its phase.
    """
    along, across = start_products(_COLUMNS, _STEPS, kind), add_products(WIDTH, _STEPS, kind)
    grads_there, next_there, packed = settle(0 if last else 1, _COUNT), settle(2, _COUNT), packer(kind, TILE)
    lines, turned = wgmma.operand_descriptor(True), wgmma.operand_descriptor(False)
    following, hide, where, stage_bytes = (
        stage_follower(RING),
        hider(TILE, causal),
        lane_of(TILE),
        _u32(RING.stage_bytes),
    )

    @device
    def take(base, barriers, kept, arrays, edges, factor, before, stage, phase, thread):
        scores, powers, grads, words, sums, deltas, d_q = arrays
        at, lane = _u32(base + stage * stage_bytes), where(thread)[0]
        hide(scores, edges[0], edges[1], edges[2], lane)
        _powers(scores, powers, sums, factor)
        stage, phase = following(stage, phase)
        place = _u32(base + stage * stage_bytes)
        if not last:
            barrier.barrier_wait(_u32(barriers + stage * _u32(16)), phase)
            along(scores, lines(kept), lines(place))
        grads_there(grads)
        if before != _u32(0):
            hand_back(before, lane)
        _differences(grads, powers, deltas)
        packed(grads, words)
        across(d_q, words, turned(at))
        if not last:
            along(grads, lines(_u32(kept + _u32(HELD_BYTES))), lines(_u32(place + _u32(_WALKED_BYTES))))
            next_there(scores)
        return stage, phase

    return take


def _walker(kind: str, causal: bool) -> Callable:
    """``walk(...)``: over the keys that a tile of queries sees; gives the next stage and its phase."""
    take, take_last = _stage_taker(kind, causal, False), _stage_taker(kind, causal, True)
    along, scores_there, settled = start_products(_COLUMNS, _STEPS, kind), settle(1, _COUNT), settle(0, _COUNT)
    lines, stage_bytes, where = wgmma.operand_descriptor(True), _u32(RING.stage_bytes), lane_of(TILE)

    @device
    def walk(base, barriers, kept, arrays, edge, keys, seen, factor, stage, phase, thread):
        if seen == _u32(0):
            return stage, phase
        pair, before, key = _u32(barriers + stage * _u32(16)), _u32(0), _u32(0)
        barrier.barrier_wait(pair, phase)
        place = _u32(base + stage * stage_bytes)
        along(arrays[0], lines(kept), lines(place))
        along(arrays[2], lines(_u32(kept + _u32(HELD_BYTES))), lines(_u32(place + _u32(_WALKED_BYTES))))
        scores_there(arrays[0])
        while _u32(key + _u32(_COLUMNS)) < seen:
            pair, edges = _u32(barriers + stage * _u32(16)), (key, edge, keys)
            stage, phase = take(base, barriers, kept, arrays, edges, factor, before, stage, phase, thread)
            before, key = pair, _u32(key + _u32(_COLUMNS))
        pair, edges = _u32(barriers + stage * _u32(16)), (key, edge, keys)
        stage, phase = take_last(base, barriers, kept, arrays, edges, factor, before, stage, phase, thread)
        settled(arrays[6])
        hand_back(pair, where(thread)[0])
        return stage, phase

    return walk


def _consumer(kind: str, causal: bool) -> Callable:
    """``consume(shared, base, barriers, thread, state)``: a multiplying warpgroup."""
    room, clear, store, where = kept_room(RING), zero_sums(_COUNT), storer(kind, TILE), lane_of(TILE)
    work, edge_at, walk, results = query_work(causal), edge_of(TILE), _walker(kind, causal), RING.results_at // 2

    @device
    def consume(shared, base, barriers, thread, state):
        d_q, _, statistics, padded, queries, keys, width, heads, _, diagonal, tiles, factor, scale = state
        scores = cuda.local.array(_COUNT, np.float32)
        powers = cuda.local.array(_COUNT, np.float32)
        grads = cuda.local.array(_COUNT, np.float32)
        words = cuda.local.array(_WORDS, np.uint32)
        d_q_sums = cuda.local.array(_COUNT, np.float32)
        sums = cuda.local.array(2, np.float32)
        deltas = cuda.local.array(2, np.float32)
        arrays = (scores, powers, grads, words, sums, deltas, d_q_sums)
        stage, phase, turn = _u32(0), _u32(0), _u32(0)
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
            kept, kept_pair, kept_phase = room(base, barriers, turn)
            kept = _u32(kept + _u32(thread >> _u32(7)) * _u32(HELD_BYTES // 2))
            clear(d_q_sums)
            barrier.barrier_wait(kept_pair, kept_phase)
            stage, phase = walk(base, barriers, kept, arrays, edge, _u32(keys), seen, factor, stage, phase, thread)
            lane, line0 = where(thread)
            hand_back(kept_pair, lane)
            batch, head, row0, _ = work(bits.again(number), queries, keys, heads, diagonal)
            for i in range(2):
                sums[i] = scale
            at, left = batch * d_q[BATCH] + head * d_q[HEAD] + row0 * d_q[TOKEN], clamped(queries - row0, ROWS)
            store(shared, np.int64(results), d_q_sums, sums, d_q[POINTER], at, d_q[TOKEN], left, width, line0, lane)
            turn = _u32(turn + _u32(1))
            number = _u32(number + _u32(grid_x()))

    return consume


@kernel_factory(("bf16", True, True), ("f16", False))
def attention_query_gradient_wgmma(kind: str, causal: bool, early: bool = False):
    """Parameters: d_q; the maps of q and d_out (boxes of 128 lines), k and v (of 64); statistics.

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
        state = (d_q, maps, statistics, padded, queries, keys, width, heads, group, diagonal, tiles, factor, scale)
        run(thread_index(), state)

    parameters = (MATRIX, types.UniTuple(types.uint64, 4), f32p, *(i64,) * 8, f32, f32)
    return kernel, parameters, RING.options() | early_options(early)
