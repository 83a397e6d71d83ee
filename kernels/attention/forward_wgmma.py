"""Attention by warpgroup products (sm_90a): what `kernels.attention.forward` says, as in arXiv:2407.08608.

The powers of scores are a left factor where they are made, in registers; while a warpgroup makes them, the other
multiplies.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from kernels import barrier, bits, functions, warp, wgmma
from kernels.attention.forward import edge_of, finisher, hider
from kernels.attention.products import packer
from kernels.attention.query_walk import query_producer, query_work
from kernels.attention.ring import HELD_BYTES, ROWS, WIDTH, Ring, hand_back, kept_room, specialised, stage_follower
from kernels.attention.tiles import BATCH, HEAD, MATRIX, POINTER, TOKEN, clamped, clearer, lane_of, storer
from kernels.barrier import early_options, entrance
from kernels.target import cuda, device, f32, f32p, i64, kernel_factory, types
from kernels.warp import block_x, grid_x, thread_index
from kernels.wgmma_registers import add_products, settle, start_products, zero_sums

RING = Ring(3, 128, 1)
TILE = RING.tile
_COLUMNS, _WALKED_BYTES = RING.columns, RING.walked_bytes
_ALONG, _ACROSS = WIDTH // 16, RING.columns // 16
_SCORES, _WORDS, _RESULTS = RING.columns // 2, RING.columns // 4, WIDTH // 2
_NOTHING = np.float32(-math.inf)
_u32 = np.uint32


@device
def _shifted(scores, most, older, factor, shifted):
    """Scores in units of powers, less their row's maximum so far; ``older``: what sums under earlier ones shrink by."""
    for half in range(2):
        high = most[half]
        for j in range(_COLUMNS // 8):
            at = 4 * j + 2 * half
            high = functions.maximum(high, functions.maximum(scores[at], scores[at + 1]))
        high = warp.quad_maximum(high)
        # A row that has seen nothing keeps a finite base, as infinity minus infinity is no number.
        base = np.float32(0) if high == _NOTHING else high
        shift = base * factor
        older[half] = functions.exp2((most[half] - base) * factor)
        most[half] = high
        for j in range(_COLUMNS // 8):
            at = 4 * j + 2 * half
            shifted[at] = scores[at] * factor - shift
            shifted[at + 1] = scores[at + 1] * factor - shift


@device
def _powers(shifted, totals, older):
    """Powers of two in place, and each row's sum of them."""
    for half in range(2):
        total = totals[half] * older[half]
        for j in range(_COLUMNS // 8):
            for i in range(2):
                power = functions.exp2(shifted[4 * j + 2 * half + i])
                total += power
                shifted[4 * j + 2 * half + i] = power
        totals[half] = total


@device
def _rescale(out, older):
    for half in range(2):
        for j in range(_RESULTS // 4):
            out[4 * j + 2 * half] = out[4 * j + 2 * half] * older[half]
            out[4 * j + 2 * half + 1] = out[4 * j + 2 * half + 1] * older[half]


def _stage_taker(kind: str, causal: bool, last: bool) -> Callable:
    """``take(...)``: what a stage, whose scores are there, adds to the result; that product is under way at the end.

    The product of the stage before, whose pair of barriers is ``before``, may be under way at the beginning. Unless it
    is the last, the next stage's scores are made meanwhile. Gives the next stage and its phase.
    """
    along, across = start_products(_COLUMNS, _ALONG, kind), add_products(WIDTH, _ACROSS, kind)
    result_there, next_there, packed = settle(0 if last else 1, _RESULTS), settle(1, _SCORES), packer(kind, TILE)
    lines, turned = wgmma.operand_descriptor(True), wgmma.operand_descriptor(False)
    following, hide, where, stage_bytes = (
        stage_follower(RING),
        hider(TILE, causal),
        lane_of(TILE),
        _u32(RING.stage_bytes),
    )

    @device
    def take(base, barriers, kept, arrays, edges, factor, before, stage, phase, thread):
        scores, shifted, words, most, totals, older, out = arrays
        at = _u32(base + stage * stage_bytes)
        hide(scores, edges[0], edges[1], edges[2], where(thread)[0])
        _shifted(scores, most, older, factor, shifted)
        stage, phase = following(stage, phase)
        if not last:
            barrier.barrier_wait(_u32(barriers + stage * _u32(16)), phase)
            along(scores, lines(kept), lines(_u32(base + stage * stage_bytes)))
        _powers(shifted, totals, older)
        result_there(out)
        if before != _u32(0):
            hand_back(before, where(thread)[0])
        packed(shifted, words)
        _rescale(out, older)
        across(out, words, turned(_u32(at + _u32(_WALKED_BYTES))))
        if not last:
            next_there(scores)
        return stage, phase

    return take


def _walker(kind: str, causal: bool) -> Callable:
    """``walk(...)``: over the keys that a tile of queries sees; gives the next stage and its phase."""
    take, take_last = _stage_taker(kind, causal, False), _stage_taker(kind, causal, True)
    along, there, settled = start_products(_COLUMNS, _ALONG, kind), settle(0, _SCORES), settle(0, _RESULTS)
    lines, stage_bytes, where = wgmma.operand_descriptor(True), _u32(RING.stage_bytes), lane_of(TILE)

    @device
    def walk(base, barriers, kept, arrays, edge, keys, seen, factor, stage, phase, thread):
        if seen == _u32(0):
            return stage, phase
        pair, before, key = _u32(barriers + stage * _u32(16)), _u32(0), _u32(0)
        barrier.barrier_wait(pair, phase)
        along(arrays[0], lines(kept), lines(_u32(base + stage * stage_bytes)))
        there(arrays[0])
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
    room, store, where, walk = kept_room(RING), storer(kind, TILE), lane_of(TILE), _walker(kind, causal)
    work, edge_at, finish = query_work(causal), edge_of(TILE), finisher(TILE)
    clear_out, clear_totals, clear_most = zero_sums(_RESULTS), clearer(2), clearer(2, -math.inf)
    results = RING.results_at // 2

    @device
    def consume(shared, base, barriers, thread, state):
        out, lse, _, queries, keys, width, heads, _, diagonal, tiles, factor = state
        scores = cuda.local.array(_SCORES, np.float32)
        shifted = cuda.local.array(_SCORES, np.float32)
        words = cuda.local.array(_WORDS, np.uint32)
        older = cuda.local.array(2, np.float32)
        sums = cuda.local.array(_RESULTS, np.float32)
        most = cuda.local.array(2, np.float32)
        totals = cuda.local.array(2, np.float32)
        arrays = (scores, shifted, words, most, totals, older, sums)
        stage, phase, turn = _u32(0), _u32(0), _u32(0)
        number = _u32(block_x())
        while number < _u32(tiles):
            _, _, row0, seen = work(number, queries, keys, heads, diagonal)
            lane, line0 = where(thread)
            edge = edge_at(row0, line0, lane, keys, diagonal)
            kept, kept_pair, kept_phase = room(base, barriers, turn)
            kept = _u32(kept + _u32(thread >> _u32(7)) * _u32(HELD_BYTES // 2))
            clear_out(sums)
            clear_totals(totals)
            clear_most(most)
            barrier.barrier_wait(kept_pair, kept_phase)
            stage, phase = walk(base, barriers, kept, arrays, edge, _u32(keys), seen, factor, stage, phase, thread)
            lane, line0 = where(thread)
            hand_back(kept_pair, lane)
            batch, head, row0, _ = work(bits.again(number), queries, keys, heads, diagonal)
            left = clamped(queries - row0, ROWS)
            finish(most, totals, lse, (batch * heads + head) * queries + row0, left, factor, line0, lane)
            at = batch * out[BATCH] + head * out[HEAD] + row0 * out[TOKEN]
            store(shared, np.int64(results), sums, totals, out[POINTER], at, out[TOKEN], left, width, line0, lane)
            turn = _u32(turn + _u32(1))
            number = _u32(number + _u32(grid_x()))

    return consume


@kernel_factory(("bf16", True, True), ("f16", False))
def attention_forward_wgmma(kind: str, causal: bool, early: bool = False):
    """Parameters: out, log-sum-exps; the maps of q (boxes of 128 lines), k and v (of 64).

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

    parameters = (MATRIX, f32p, types.UniTuple(types.uint64, 3), *(i64,) * 7, f32)
    return kernel, parameters, RING.options() | early_options(early)
