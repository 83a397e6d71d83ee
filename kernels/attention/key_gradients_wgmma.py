"""Gradients of keys and values by warpgroup products (sm_90a): what `kernels.attention.key_gradients` says.

Scores are [key, query] here too, so that powers and their gradients are left factors where they are made, in registers:
a warpgroup's four products a stage read of shared memory only q and d_out, two along their lines, two across.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from kernels import barrier, bits, functions, memory, wgmma
from kernels.attention.forward import locate
from kernels.attention.products import packer
from kernels.attention.ring import (
    HELD_BYTES,
    ROWS,
    WIDTH,
    Ring,
    kept_loader,
    kept_room,
    specialised,
)
from kernels.attention.stage import pair_starter
from kernels.attention.statistics import STATISTICS
from kernels.attention.tiles import BATCH, HEAD, MATRIX, POINTER, TOKEN, clamped, lane_of, row_of, storer
from kernels.attention.walk import stage_steps
from kernels.barrier import early_options, entrance
from kernels.stages import begin_loading, hand_back, next_stage, pair_of
from kernels.target import cuda, device, f32, f32p, i64, kernel_factory, types
from kernels.warp import block_x, grid_x, thread_index, uniform
from kernels.wgmma_registers import add_products, settle, zero_sums

RING = Ring(4, 64, 2, True)
TILE = RING.tile
_COLUMNS, _WALKED_BYTES = RING.columns, RING.walked_bytes
_COUNT, _WORDS = TILE.columns // 2, TILE.columns // 4
_NOTHING = np.float32(-math.inf)
_u32 = np.uint32


def _work_of(causal: bool) -> Callable:
    """``work(number, queries, keys, heads, diagonal)``: of a tile of keys.

    Batch, head, first key, first query, tiles of queries in each head, and from how many queries on key 0 is seen.
    """

    @device
    def work(number, queries, keys, heads, diagonal):
        batch, other, row0 = locate(number, keys, heads, ROWS, False)
        hidden0, first = row0 - diagonal, _u32(0)
        if causal:
            first = _u32(_u32(min(max(hidden0, np.int64(0)), queries)) // _u32(_COLUMNS) * _u32(_COLUMNS))
        of_head = _u32(_u32(_u32(queries) - first + _u32(_COLUMNS - 1)) // _u32(_COLUMNS))
        return batch, other, row0, first, of_head, hidden0

    return work


def _producer(work: Callable) -> Callable:
    load_kept, following, load_box = kept_loader(RING), next_stage(RING.stages), barrier.tma_load(4)
    stage_bytes, loaded_bytes, number_bytes = _u32(RING.stage_bytes), _u32(RING.loaded_bytes), _u32(4 * _COLUMNS)

    @device
    def load(to, full, maps, statistics, padded, query, head, batch, slot):
        load_box(to, maps[2], full, _u32(0), query, _u32(head), _u32(batch))
        load_box(_u32(to + _u32(_WALKED_BYTES)), maps[3], full, _u32(0), query, _u32(head), _u32(batch))
        to = _u32(to + _u32(2 * _WALKED_BYTES))
        source = slot * np.int64(STATISTICS) * padded + np.int64(query)
        barrier.bulk_load(to, statistics, source, number_bytes, full)
        barrier.bulk_load(_u32(to + number_bytes), statistics, source + padded, number_bytes, full)

    @device
    def produce(base, barriers, state):
        (_, _, maps, statistics, padded, queries, keys, _, heads, group, diagonal, tiles, _, _) = state
        for i in range(4):
            barrier.tensor_map_acquire(maps[i])
        stage, phase, turn = _u32(0), _u32(1), _u32(0)
        number = _u32(block_x())
        while number < _u32(tiles):
            batch, other, row0, first, of_head, _ = work(number, queries, keys, heads, diagonal)
            load_kept(base, barriers, turn, maps, row0, other, batch)
            for member in range(_u32(group)):
                head = other * group + np.int64(member)
                slot = batch * heads * group + head
                query = first
                for _ in range(of_head):
                    full = begin_loading(pair_of(barriers, stage), phase, loaded_bytes)
                    to = _u32(base + stage * stage_bytes)
                    load(to, full, maps, statistics, padded, query, head, batch, slot)
                    query = _u32(query + _u32(_COLUMNS))
                    stage, phase = following(stage, phase)
            turn = _u32(turn + _u32(1))
            number = _u32(number + _u32(grid_x()))

    return produce


@device
def _hide(scores, hidden0, line0, lane):
    """Row 0 of a block's is hidden from the first ``hidden0`` queries of a stage, each further row from one more."""
    first = _u32(_u32(lane & _u32(3)) << _u32(1))
    for half in range(2):
        hidden = clamped(hidden0 + np.int64(row_of(half, line0, lane)), _COLUMNS)
        for j in range(_COLUMNS // 8):
            for i in range(2):
                if _u32(first + _u32(8 * j + i)) < hidden:
                    scores[4 * j + 2 * half + i] = _NOTHING


@device
def _powers(shared, at, scores, factor, lane):
    """Scores become powers; ``at`` is where the queries' log-sum-exps are."""
    start = at + np.int64(_u32(_u32(lane & _u32(3)) << _u32(2)))
    for j in range(_COLUMNS // 8):
        low, high = memory.shared_load64(shared, start + np.int64(16 * j))
        for half in range(2):
            for i in range(2):
                number = 4 * j + 2 * half + i
                shift = bits.bits_f32(low if i == 0 else high)
                scores[number] = functions.exp2(scores[number] * factor - shift)


@device
def _differences(shared, at, grads, powers, lane):
    """The gradients of scores, P (grads - delta), with the queries' deltas ``at`` a place."""
    start = at + np.int64(_u32(_u32(lane & _u32(3)) << _u32(2)))
    for j in range(_COLUMNS // 8):
        low, high = memory.shared_load64(shared, start + np.int64(16 * j))
        for half in range(2):
            for i in range(2):
                number = 4 * j + 2 * half + i
                grads[number] = (grads[number] - bits.bits_f32(low if i == 0 else high)) * powers[number]


def _stage_adder(kind: str) -> Callable:
    """``add(base, stage, arrays)``: the products that add a stage to d_v and d_k."""
    across, turned = add_products(WIDTH, _COLUMNS // 16, kind), wgmma.operand_descriptor(False)
    stage_bytes, walked_bytes = _u32(RING.stage_bytes), _u32(RING.walked_bytes)

    @device
    def add(base, stage, arrays):
        _, _, power_words, grad_words, d_k, d_v = arrays
        place = _u32(base + stage * stage_bytes)
        across(d_v, power_words, turned(_u32(place + walked_bytes)))
        across(d_k, grad_words, turned(place))

    return add


def _differentiator(kind: str, causal: bool) -> Callable:
    """``differentiate(shared, stage, arrays, hidden0, factor, before, thread)``: words of P and dS of a stage.

    ``before`` is the pair of barriers of the stage before, 0 where there is none.
    """
    scores_there, grads_there, packed = settle(1, _COUNT), settle(0, _COUNT, _COUNT), packer(kind, TILE)
    where, elements, numbers_at = lane_of(TILE), RING.stage_bytes // 2, _WALKED_BYTES

    @device
    def differentiate(shared, stage, arrays, hidden0, factor, before, thread):
        scores, grads, power_words, grad_words, _, _ = arrays
        scores_there(scores)
        lane, line0 = where(thread)
        if before != _u32(0):
            hand_back(before, lane)
        if causal and hidden0 + np.int64(line0 + _u32(15)) > np.int64(0):
            _hide(scores, hidden0, line0, lane)
        numbers = np.int64(_u32(stage * _u32(elements))) + np.int64(numbers_at)
        _powers(shared, numbers, scores, factor, lane)
        packed(scores, power_words)
        grads_there(grads, scores)
        _differences(shared, numbers + np.int64(2 * _COLUMNS), grads, scores, lane)
        packed(grads, grad_words)

    return differentiate


def _walker(kind: str, causal: bool) -> Callable:
    """``walk(...)``: over the queries of all heads that see a tile of keys; gives the next stage, phase and turn."""
    differentiate, done = _differentiator(kind, causal), settle(0, WIDTH // 2, WIDTH // 2)

    @device
    def settled(arrays):
        done(arrays[4], arrays[5])

    begin, go_on, end = stage_steps(RING, pair_starter(RING, kind), _stage_adder(kind), settled)

    @device
    def walk(shared, base, barriers, kept, arrays, seen_by, factor, stage, phase, turn, mine, thread):
        hidden, of_head, group = seen_by
        left = _u32(of_head * group)
        if left == _u32(0):
            return stage, phase, turn
        pair, turn = begin(base, barriers, kept, arrays, stage, phase, turn, mine, thread)
        before, seen = _u32(0), _u32(0)
        while left > _u32(1):
            hidden0 = hidden - np.int64(_u32(seen * _u32(_COLUMNS)))
            differentiate(shared, stage, arrays, hidden0, factor, before, thread)
            before = pair
            left, seen = _u32(left - _u32(1)), _u32(seen + _u32(1))
            if seen == of_head:
                seen = _u32(0)
            pair, stage, phase, turn = go_on(base, barriers, kept, arrays, stage, phase, turn, mine, thread)
        hidden0 = hidden - np.int64(_u32(seen * _u32(_COLUMNS)))
        differentiate(shared, stage, arrays, hidden0, factor, before, thread)
        return end(base, barriers, arrays, pair, stage, phase, turn, mine, thread)

    return walk


def _consumer(kind: str, causal: bool, work: Callable) -> Callable:
    """``consume(shared, base, barriers, thread, state)``: a multiplying warpgroup."""
    room, clear, store, where = kept_room(RING), zero_sums(_COUNT), storer(kind, TILE), lane_of(TILE)
    walk, results = _walker(kind, causal), RING.results_at // 2

    @device
    def consume(shared, base, barriers, thread, state):
        (d_k, d_v, _, _, _, queries, keys, width, heads, group, diagonal, tiles, factor, scale) = state
        scores = cuda.local.array(_COUNT, np.float32)
        grads = cuda.local.array(_COUNT, np.float32)
        power_words = cuda.local.array(_WORDS, np.uint32)
        grad_words = cuda.local.array(_WORDS, np.uint32)
        d_k_sums = cuda.local.array(_COUNT, np.float32)
        d_v_sums = cuda.local.array(_COUNT, np.float32)
        factors = cuda.local.array(2, np.float32)
        arrays = (scores, grads, power_words, grad_words, d_k_sums, d_v_sums)
        mine = uniform(_u32(thread >> _u32(7)))
        stage, phase, turn, tile = _u32(0), _u32(0), _u32(0), _u32(0)
        number = _u32(block_x())
        while number < _u32(tiles):
            _, _, _, first, of_head, hidden0 = work(number, queries, keys, heads, diagonal)
            kept, kept_pair, kept_phase = room(base, barriers, tile)
            kept = _u32(kept + mine * _u32(HELD_BYTES // 2))
            clear(d_k_sums)
            clear(d_v_sums)
            barrier.barrier_wait(kept_pair, kept_phase)
            seen_by = (hidden0 - np.int64(first), of_head, _u32(group))
            stage, phase, turn = walk(
                shared, base, barriers, kept, arrays, seen_by, factor, stage, phase, turn, mine, thread
            )
            lane, line0 = where(thread)
            hand_back(kept_pair, lane)
            batch, other, row0, _, _, _ = work(bits.again(number), queries, keys, heads, diagonal)
            left = clamped(keys - row0, ROWS)
            for i in range(2):
                factors[i] = scale
            at = batch * d_k[BATCH] + other * d_k[HEAD] + row0 * d_k[TOKEN]
            store(shared, np.int64(results), d_k_sums, factors, d_k[POINTER], at, d_k[TOKEN], left, width, line0, lane)
            for i in range(2):
                factors[i] = np.float32(1)
            at = batch * d_v[BATCH] + other * d_v[HEAD] + row0 * d_v[TOKEN]
            store(shared, np.int64(results), d_v_sums, factors, d_v[POINTER], at, d_v[TOKEN], left, width, line0, lane)
            tile = _u32(tile + _u32(1))
            number = _u32(number + _u32(grid_x()))

    return consume


MAPS = types.UniTuple(types.uint64, 4)


@kernel_factory(("bf16", True, True), ("f16", False))
def attention_key_gradients_wgmma(kind: str, causal: bool, early: bool = False):
    """Parameters: d_k, d_v; the maps of k and v (boxes of a block's lines), q and d_out (of a stage's); statistics.

    Then how many queries those have room for, queries, keys, width, k's heads, q's heads of one of k's, diagonal, tiles
    of keys in all, scale log2(e), scale. Maps are of [batch, head, token, element].
    """
    enter, work = entrance(early), _work_of(causal)
    run = specialised(RING, _producer(work), _consumer(kind, causal, work))

    def kernel(d_k, d_v, maps, statistics, padded, queries, keys, width, heads, group, diagonal, tiles, factor, scale):
        enter()
        state = (
            d_k, d_v, maps, statistics, padded, queries, keys, width, heads, group, diagonal, tiles, factor, scale,
        )  # fmt: skip
        run(thread_index(), state)

    parameters = MATRIX, MATRIX, MAPS, f32p, *(i64,) * 8, f32, f32
    return kernel, parameters, RING.options() | early_options(early)
