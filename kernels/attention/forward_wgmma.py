"""Attention by warpgroup products (sm_90a): what `kernels.attention.forward` says, as in arXiv:2407.08608.

The powers of scores are a left factor where they are made, in registers; while a warpgroup makes them, the other
multiplies.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from kernels import barrier, bits, wgmma
from kernels.attention.forward import edge_of, finisher, hider, online_softmax
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
from kernels.attention.tiles import BATCH, HEAD, MATRIX, POINTER, TOKEN, clamped, clearer, lane_of, storer
from kernels.attention.walk import stage_steps
from kernels.barrier import early_options, entrance
from kernels.stages import hand_back
from kernels.target import cuda, device, f32, f32p, i64, kernel_factory, types
from kernels.warp import block_x, grid_x, thread_index, uniform
from kernels.wgmma_registers import add_products, settle, start_products, zero_sums

RING = Ring(3, 128, 1)
TILE = RING.tile
_COLUMNS = RING.columns
_SCORES, _WORDS, _RESULTS = RING.columns // 2, RING.columns // 4, WIDTH // 2
"""Numbers of a thread: its scores, words of powers, and sums of results."""
_u32 = np.uint32


def _softener(kind: str, causal: bool) -> Callable:
    """`query_walker`'s ``refine``: words of powers, when the scores of a stage are there."""
    all_there, packed, online = settle(0, _SCORES, _RESULTS), packer(kind, TILE), online_softmax(TILE)
    hide, where = hider(TILE, causal), lane_of(TILE)

    @device
    def soften(arrays, edges, factor, before, thread):
        scores, words, most, totals, out = arrays
        all_there(scores, out)
        lane = where(thread)[0]
        if before != _u32(0):
            hand_back(before, lane)
        hide(scores, edges[0], edges[1], edges[2], lane)
        online(scores, most, totals, out, factor)
        packed(scores, words)

    return soften


def _walker(kind: str, causal: bool) -> Callable:
    """`query_walker`'s walk: scores by keys, results by values."""
    along, across = start_products(_COLUMNS, WIDTH // 16, kind), add_products(WIDTH, _COLUMNS // 16, kind)
    lines, turned, done = wgmma.operand_descriptor(True), wgmma.operand_descriptor(False), settle(0, _RESULTS)
    stage_bytes, values_at = _u32(RING.stage_bytes), _u32(RING.walked_bytes)

    @device
    def start(base, kept, stage, arrays):
        along(arrays[0], lines(kept), lines(_u32(base + stage * stage_bytes)))

    @device
    def add(base, stage, arrays):
        _, words, _, _, out = arrays
        across(out, words, turned(_u32(base + stage * stage_bytes + values_at)))

    @device
    def settled(arrays):
        done(arrays[4])

    return query_walker(RING, stage_steps(RING, start, add, settled), _softener(kind, causal))


def _consumer(kind: str, causal: bool) -> Callable:
    """``consume(shared, base, barriers, thread, state)``: a multiplying warpgroup."""
    room, store, where, walk = kept_room(RING), storer(kind, TILE), lane_of(TILE), _walker(kind, causal)
    work, edge_at, finish = query_work(causal), edge_of(TILE), finisher(TILE)
    clear_out, clear_totals, clear_most = zero_sums(_RESULTS), clearer(2), clearer(2, -math.inf)
    results = RING.results_at // 2

    @device
    def consume(shared, base, barriers, thread, state):
        out, lse, _, queries, keys, width, heads, _, diagonal, tiles, factor = state
        scores = cuda.local.array(_SCORES, np.float32)
        words = cuda.local.array(_WORDS, np.uint32)
        sums = cuda.local.array(_RESULTS, np.float32)
        most = cuda.local.array(2, np.float32)
        totals = cuda.local.array(2, np.float32)
        arrays = (scores, words, most, totals, sums)
        mine = uniform(_u32(thread >> _u32(7)))
        stage, phase, turn, tile = _u32(0), _u32(0), _u32(0), _u32(0)
        number = _u32(block_x())
        while number < _u32(tiles):
            _, _, row0, seen = work(number, queries, keys, heads, diagonal)
            lane, line0 = where(thread)
            edge = edge_at(row0, line0, lane, keys, diagonal)
            kept, kept_pair, kept_phase = room(base, barriers, tile)
            kept = _u32(kept + mine * _u32(HELD_BYTES // 2))
            clear_out(sums)
            clear_totals(totals)
            clear_most(most)
            barrier.barrier_wait(kept_pair, kept_phase)
            stage, phase, turn = walk(
                base, barriers, kept, arrays, edge, _u32(keys), seen, factor, stage, phase, turn, mine, thread
            )
            lane, line0 = where(thread)
            hand_back(kept_pair, lane)
            batch, head, row0, _ = work(bits.again(number), queries, keys, heads, diagonal)
            left = clamped(queries - row0, ROWS)
            finish(most, totals, lse, (batch * heads + head) * queries + row0, left, factor, line0, lane)
            at = batch * out[BATCH] + head * out[HEAD] + row0 * out[TOKEN]
            store(shared, np.int64(results), sums, totals, out[POINTER], at, out[TOKEN], left, width, line0, lane)
            tile = _u32(tile + _u32(1))
            number = _u32(number + _u32(grid_x()))

    return consume


@kernel_factory(("bf16", True, True), ("f16", False))
def attention_forward_wgmma(kind: str, causal: bool, early: bool = False):
    """Parameters: out, log-sum-exps; the maps of q (boxes of a block's lines), k and v (of a stage's).

    Then queries, keys, width, q's heads, those of one of k's, diagonal, tiles of queries in all, scale log2(e). Maps
    are of [batch, head, token, element].
    """
    enter, load = entrance(early), query_producer(RING, causal)

    @device
    def produce(base, barriers, state):
        _, _, maps, queries, keys, _, heads, group, diagonal, tiles, _ = state
        load(base, barriers, maps, (queries, keys, heads, group, diagonal, tiles))

    run = specialised(RING, produce, _consumer(kind, causal))

    def kernel(out, lse, maps, queries, keys, width, heads, group, diagonal, tiles, factor):
        enter()
        run(thread_index(), (out, lse, maps, queries, keys, width, heads, group, diagonal, tiles, factor))

    parameters = MATRIX, f32p, types.UniTuple(types.uint64, 3), *(i64,) * 7, f32
    return kernel, parameters, RING.options() | early_options(early)
