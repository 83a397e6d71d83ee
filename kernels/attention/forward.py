"""Attention on tensor cores of sm_80 and later: out = softmax(scale q k^T) v, the scores in registers only.

FlashAttention-2 (Dao, arXiv:2307.08691): a block keeps rows of q and walks over tiles of keys with a running maximum
and sum of each row; what was summed under an older maximum is rescaled. Copies of the next tiles of k and v go on
during the products of the present ones. Powers are of two: scale log2(e) is one factor.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from kernels import bits, functions, memory, warp
from kernels.attention.products import packer, register_multiplier, score_multiplier
from kernels.attention.tiles import (
    BATCH,
    HEAD,
    MATRIX,
    POINTER,
    TOKEN,
    Tile,
    clamped,
    clearer,
    in_turn,
    lane_of,
    loader,
    row_of,
    storer,
)
from kernels.barrier import early_options, entrance
from kernels.target import cuda, device, f32, f32p, i64, kernel_factory

_u32 = np.uint32
_NOTHING = np.float32(-math.inf)
_LN2 = np.float32(math.log(2))


def edge_of(tile: Tile) -> Callable:
    """``edge(row0, line0, lane, keys, diagonal)``: one more than the last key that a lane's first row sees if causal.

    ``rows_of_warp`` are added to it, and to all that it is compared with, so that it is never negative: uint32.
    """
    shift = tile.rows_of_warp

    @device
    def edge(row0, line0, lane, keys, diagonal):
        row = row0 + np.int64(row_of(0, line0, lane))
        return clamped(row + diagonal + np.int64(1 + shift), keys + np.int64(shift))

    return edge


def hider(tile: Tile, causal: bool) -> Callable:
    """``hide(sums, column0, edge, keys, lane)``: minus infinity where a row sees no key of a tile of columns.

    That is beyond the last key, and where causal beyond the row's edge (`edge_of`); all uint32.
    """
    blocks, columns, shift = tile.columns // 8, tile.columns, tile.rows_of_warp

    def hidden(number: int) -> Callable:
        block, half = divmod(number, 2)

        @device
        def hide(state):
            sums, column0, edge, keys, lane = state
            start = _u32(column0 + _u32(shift))
            end = _u32(keys + _u32(shift))
            if causal:
                end = min(end, _u32(edge + _u32(8 * number)))
            seen = _u32(max(end, start) - start)
            first = _u32(_u32(lane & _u32(3)) << _u32(1))
            for j in range(blocks):
                for i in range(2):
                    if _u32(first + _u32(8 * j + i)) >= seen:
                        sums[4 * (block * blocks + j) + 2 * half + i] = _NOTHING

        return hide

    every = in_turn([hidden(number) for number in range(2 * tile.row_blocks)])

    @device
    def hide(sums, column0, edge, keys, lane):
        # What a lane's first row sees, all its rows see; where that is the whole tile, no element needs a look.
        end = _u32(column0 + _u32(columns))
        if end > keys or (causal and _u32(end + _u32(shift)) > edge):
            every((sums, column0, edge, keys, lane))

    return hide


def online_softmax(tile: Tile) -> Callable:
    """``soften(scores, most, totals, out, factor)``: scores become powers; maxima, sums and the result follow."""
    blocks, width_blocks = tile.columns // 8, tile.width // 8

    def softened(number: int) -> Callable:
        block, half = divmod(number, 2)

        @device
        def soften(state):
            scores, most, totals, out, factor = state
            high = most[number]
            for j in range(blocks):
                at = 4 * (block * blocks + j) + 2 * half
                high = functions.maximum(high, functions.maximum(scores[at], scores[at + 1]))
            high = warp.quad_maximum(high)
            # A row that has seen nothing keeps a finite base, as infinity minus infinity is no number.
            base = np.float32(0) if high == _NOTHING else high
            shift, older = base * factor, functions.exp2((most[number] - base) * factor)
            total = totals[number] * older
            for j in range(blocks):
                at = 4 * (block * blocks + j) + 2 * half
                for i in range(2):
                    power = functions.exp2(scores[at + i] * factor - shift)
                    total += power
                    scores[at + i] = power
            most[number] = high
            totals[number] = total
            for j in range(width_blocks):
                at = 4 * (block * width_blocks + j) + 2 * half
                out[at] = out[at] * older
                out[at + 1] = out[at + 1] * older

        return soften

    every = in_turn([softened(number) for number in range(2 * tile.row_blocks)])

    @device
    def soften(scores, most, totals, out, factor):
        every((scores, most, totals, out, factor))

    return soften


def _walker(kind: str, tile: Tile, causal: bool) -> Callable:
    """``walk(shared, most, totals, out, k, v, bases, problem, edge, thread)``: over all keys that rows see."""
    columns, column_elements, stage = tile.columns, tile.column_elements, 2 * tile.column_elements
    score_count, first_stage = tile.row_blocks * tile.columns // 2, tile.row_elements
    word_count = score_count // 2
    fetch_tile = loader(tile.columns, tile.width, tile.threads)
    scores_of, packed, multiply = score_multiplier(kind, tile), packer(kind, tile), register_multiplier(kind, tile)
    clear, hide, soften = clearer(score_count), hider(tile, causal), online_softmax(tile)
    arrived, where = memory.copy_async_wait(0), lane_of(tile)

    @device
    def fetch(shared, at, k, v, bases, column0, keys, width, thread):
        k_base, v_base = bases
        fetch_tile(shared, at, k[POINTER], k_base, k[TOKEN], column0, keys, width, thread)
        v_at = at + np.int64(column_elements)
        fetch_tile(shared, v_at, v[POINTER], v_base, v[TOKEN], column0, keys, width, thread)

    @device
    def walk(shared, most, totals, out, k, v, bases, problem, edge, thread):
        keys, seen, width, factor = problem
        scores = cuda.local.array(score_count, np.float32)
        words = cuda.local.array(word_count, np.uint32)
        at, next_at = np.int64(first_stage), np.int64(first_stage + stage)
        if seen > _u32(0):
            fetch(shared, at, k, v, bases, _u32(0), keys, width, thread)
        memory.copy_async_commit()
        column0 = _u32(0)
        while column0 < seen:
            arrived()
            warp.block_barrier()
            following = _u32(column0 + _u32(columns))
            if following < seen:
                fetch(shared, next_at, k, v, bases, following, keys, width, thread)
            memory.copy_async_commit()
            lane, line0 = where(thread)
            clear(scores)
            scores_of(shared, np.int64(0), at, scores, line0, lane)
            hide(scores, column0, edge, keys, lane)
            soften(scores, most, totals, out, factor)
            packed(scores, words)
            multiply(shared, at + np.int64(column_elements), words, out, where(thread)[0])
            column0 = following
            at, next_at = next_at, at
        # Without a turn, other threads' copies of q may still be under way to where results go.
        memory.copy_async_wait_all()
        warp.block_barrier()

    return walk


def finisher(tile: Tile) -> Callable:
    """``finish(most, totals, lse, at, left, factor, line0, lane)``: sums to reciprocals, and log-sum-exps to memory."""

    def finished(number: int) -> Callable:
        @device
        def finish(state):
            most, totals, lse, at, left, factor, line0, lane = state
            total = warp.quad_sum(totals[number])
            line = row_of(number, line0, lane)
            value = _NOTHING if total == np.float32(0) else most[number] * factor * _LN2 + functions.log(total)
            if (lane & _u32(3)) == _u32(0) and line < left:
                lse[at + np.int64(line)] = value
            totals[number] = np.float32(0) if total == np.float32(0) else np.float32(1) / total

        return finish

    every = in_turn([finished(number) for number in range(2 * tile.row_blocks)])

    @device
    def finish(most, totals, lse, at, left, factor, line0, lane):
        every((most, totals, lse, at, left, factor, line0, lane))

    return finish


def shared_bytes(tile: Tile) -> int:
    """Shared memory of a block: rows of q, and tiles of k and v, those of the next turn too."""
    return 2 * (tile.row_elements + 4 * tile.column_elements)


def _launch_bounds(tile: Tile) -> dict:
    return {"threads": tile.threads, "shared_bytes": shared_bytes(tile), "min_blocks": max(1, 256 // tile.threads)}


@kernel_factory(
    ("bf16", Tile(128, 64, 4, 64), True, True),
    ("bf16", Tile(128, 32, 4, 128), False),
    ("f16", Tile(128, 48, 4, 112), True),
)
def attention_forward(kind: str, tile: Tile, causal: bool, early: bool = False):
    """Parameters: out, log-sum-exps, q, k, v, queries, keys, width, heads, q's heads of one of k's, diagonal, factor.

    A block for a tile of one head's queries, those with most keys first. ``factor`` is scale log2(e), positive. Log-
    sum-exps are [batch, head, query]; of a query that sees no key minus infinity, beside a result of zeros. ``early``:
    see `kernels.barrier.entrance`.
    """
    enter = entrance(early)
    out_count, row_count, rows = tile.row_blocks * tile.width // 2, 2 * tile.row_blocks, tile.rows
    fetch, walk, edge_at = loader(tile.rows, tile.width, tile.threads), _walker(kind, tile, causal), edge_of(tile)
    clear_out, clear_totals, clear_most = clearer(out_count), clearer(row_count), clearer(row_count, -math.inf)
    finish, store, where = finisher(tile), storer(kind, tile), lane_of(tile)

    def kernel(out, lse, q, k, v, queries, keys, width, heads, group, diagonal, factor):
        enter()
        shared = cuda.shared.array(0, np.uint16, alignment=128)
        sums = cuda.local.array(out_count, np.float32)
        most = cuda.local.array(row_count, np.float32)
        totals = cuda.local.array(row_count, np.float32)
        block, thread = _u32(warp.block_x()), warp.thread_index()
        lane, line0 = where(thread)
        batch, head, row0 = locate(block, queries, heads, rows, causal)
        seen = keys
        if causal:
            seen = max(np.int64(0), min(seen, min(row0 + np.int64(rows), queries) + diagonal))
        base = batch * q[BATCH] + head * q[HEAD]
        fetch(shared, np.int64(0), q[POINTER], base, q[TOKEN], _u32(row0), _u32(queries), width, thread)
        clear_out(sums)
        clear_totals(totals)
        clear_most(most)
        other = np.int64(_u32(_u32(head) // _u32(group)))
        bases = (batch * k[BATCH] + other * k[HEAD], batch * v[BATCH] + other * v[HEAD])
        edge = edge_at(row0, line0, lane, keys, diagonal)
        problem = (_u32(keys), _u32(seen), width, factor)
        walk(shared, most, totals, sums, k, v, bases, problem, edge, thread)
        # Found anew, so that nothing of it takes up registers on the walk.
        batch, head, row0 = locate(bits.again(block), queries, heads, rows, causal)
        lane, line0 = where(thread)
        left = clamped(queries - row0, rows)
        finish(most, totals, lse, (batch * heads + head) * queries + row0, left, factor, line0, lane)
        first = batch * out[BATCH] + head * out[HEAD] + row0 * out[TOKEN]
        store(shared, np.int64(0), sums, totals, out[POINTER], first, out[TOKEN], left, width, line0, lane)

    numbers = (i64,) * 6
    return kernel, (MATRIX, f32p, MATRIX, MATRIX, MATRIX, *numbers, f32), _launch_bounds(tile) | early_options(early)


@device
def locate(block, queries, heads, rows, last_first):
    """A block's batch, head and first row, of ``heads`` times tiles of ``rows``; tiles of a head are neighbours."""
    tiles = _u32(_u32(queries + np.int64(rows - 1)) // _u32(rows))
    slot = _u32(_u32(block) // tiles)
    tile = _u32(_u32(block) - _u32(slot * tiles))
    if last_first:
        tile = _u32(tiles - _u32(1) - tile)
    batch = _u32(slot // _u32(heads))
    head = _u32(slot - _u32(batch * _u32(heads)))
    return np.int64(batch), np.int64(head), np.int64(_u32(tile * _u32(rows)))
