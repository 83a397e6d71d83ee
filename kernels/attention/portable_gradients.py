"""Attention's gradients for any kinds, widths and masks: see `kernels.attention.portable`."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from kernels import functions, warp
from kernels.attention import portable
from kernels.attention.forward import locate
from kernels.attention.portable import BLOCK_ROWS, OTHERS, ROWS, THREADS
from kernels.attention.statistics import STATISTICS, matrix
from kernels.target import cuda, device, f32, f32p, i64, kernel_factory

_u32 = np.uint32
_base_of, _dots = portable.base_of, portable.dots


def _weigher(mask: str, causal: bool, rows_are_queries: bool) -> Callable:
    """``weigh(shared, weights_at, products, grads, statistics, mask, problem, where)``: P and dS to shared memory.

    P of all rows, then dS of all rows; ``where``: batch, head, the statistics' place, first row, other, room, lane.
    """
    score_of = portable.scorer(mask, causal)
    plane = ROWS * OTHERS

    @device
    def weigh(shared, weights_at, products, grads, statistics, mask, problem, where):
        batch, head, at, row0, other, padded, lane = where
        for row in range(ROWS):
            own = row0 + np.int64(row)
            query, key = (own, other) if rows_are_queries else (other, own)
            power, slope = np.float32(0), np.float32(0)
            if query < problem[0]:
                score = score_of(products[row], mask, problem, batch, head, query, key)
                power = functions.exp2(score - statistics[at + query])
                slope = power * (grads[row] - statistics[at + padded + query])
            to = weights_at + np.int64(row * OTHERS) + np.int64(lane)
            shared[to] = power
            shared[to + np.int64(plane)] = slope

    return weigh


def _clear(count: int) -> Callable:
    @device
    def clear(values):
        for i in range(count):
            values[i] = np.float32(0)

    return clear


@kernel_factory(("f32", "", 4, True), ("bf16", "i32", 2, False))
def query_gradient_portable(kind: str, mask: str, groups: int, causal: bool):
    """Parameters: d_q, q, k, v, d_out, mask, statistics and how many queries they have room for, queries, keys, width.

    Then q's heads, those of one of k's, diagonal, scale log2(e), scale.
    """
    stage_rows, stage_others = portable.stager(kind, BLOCK_ROWS), portable.stager(kind, OTHERS)
    weigh, gather, write = _weigher(mask, causal, True), portable.gatherer(groups), portable.writer(kind, groups)
    sum_count = ROWS * groups
    clear = _clear(sum_count)

    def kernel(
        d_q, q, k, v, d_out, mask, statistics, padded, queries, keys, width, heads, group, diagonal, factor, scale
    ):
        shared = cuda.shared.array(0, np.float32, alignment=16)
        products = cuda.local.array(ROWS, np.float32)
        grads = cuda.local.array(ROWS, np.float32)
        sums = cuda.local.array(sum_count, np.float32)
        clear(sums)
        thread = warp.thread_index()
        lane, number = _u32(thread & _u32(31)), np.int64(thread >> _u32(5))
        batch, head, start = locate(warp.block_x(), queries, heads, BLOCK_ROWS, causal)
        row0, other = start + number * np.int64(ROWS), np.int64(_u32(_u32(head) // _u32(group)))
        pitch, rows_at = width + np.int64(1), np.int64(BLOCK_ROWS) * width
        own_at, k_at = number * np.int64(ROWS) * width, rows_at + rows_at
        v_at = k_at + np.int64(OTHERS) * pitch
        weights_at = v_at + np.int64(OTHERS) * pitch + number * np.int64(2 * ROWS * OTHERS)
        stage_rows(shared, np.int64(0), width, q, _base_of(q, batch, head), start, queries, width, thread)
        stage_rows(shared, rows_at, width, d_out, _base_of(d_out, batch, head), start, queries, width, thread)
        at = (batch * heads + head) * np.int64(STATISTICS) * padded
        problem = (queries, keys, diagonal, factor)
        seen = max(np.int64(0), min(keys, start + np.int64(BLOCK_ROWS) + diagonal)) if causal else keys
        key0 = np.int64(0)
        while key0 < seen:
            warp.block_barrier()
            stage_others(shared, k_at, pitch, k, _base_of(k, batch, other), key0, keys, width, thread)
            stage_others(shared, v_at, pitch, v, _base_of(v, batch, other), key0, keys, width, thread)
            warp.block_barrier()
            place = np.int64(lane) * pitch
            _dots(shared, own_at, k_at + place, width, products)
            _dots(shared, rows_at + own_at, v_at + place, width, grads)
            where = (batch, head, at, row0, key0 + np.int64(lane), padded, lane)
            weigh(shared, weights_at, products, grads, statistics, mask, problem, where)
            warp.sync_warp()
            gather(shared, weights_at + np.int64(ROWS * OTHERS), k_at, width, sums, lane)
            key0 += np.int64(OTHERS)
        for row in range(ROWS):
            products[row] = scale
        write(d_q, _base_of(d_q, batch, head), row0, queries, width, sums, products, lane)

    tensor = matrix(kind)
    parameters = ((tensor,) * 5, (portable.mask_parameters(mask), f32p), (i64,) * 7, (f32, f32))
    return kernel, sum(parameters, ()), {"threads": THREADS}


def _head_adder(kind: str, mask: str, groups: int, causal: bool) -> Callable:
    """``add_head(shared, tensors, mask, statistics, arrays, problem, place)``: sums over the queries of one head."""
    stage_others, gather = portable.stager(kind, OTHERS), portable.gatherer(groups)
    weigh = _weigher(mask, causal, False)

    @device
    def add_head(shared, tensors, mask, statistics, arrays, problem, place):
        q, d_out = tensors
        products, grads, d_k_sums, d_v_sums = arrays
        padded, width, queries = place[5], place[6], problem[0]
        batch, head, at, row0, first, _, _, thread = place
        lane, number = _u32(thread & _u32(31)), np.int64(thread >> _u32(5))
        pitch, rows_at = width + np.int64(1), np.int64(BLOCK_ROWS) * width
        own_at, q_at = number * np.int64(ROWS) * width, rows_at + rows_at
        d_out_at = q_at + np.int64(OTHERS) * pitch
        weights_at = d_out_at + np.int64(OTHERS) * pitch + number * np.int64(2 * ROWS * OTHERS)
        query0 = first
        while query0 < queries:
            warp.block_barrier()
            stage_others(shared, q_at, pitch, q, _base_of(q, batch, head), query0, queries, width, thread)
            stage_others(shared, d_out_at, pitch, d_out, _base_of(d_out, batch, head), query0, queries, width, thread)
            warp.block_barrier()
            step = np.int64(lane) * pitch
            _dots(shared, own_at, q_at + step, width, products)
            _dots(shared, rows_at + own_at, d_out_at + step, width, grads)
            where = (batch, head, at, row0, query0 + np.int64(lane), padded, lane)
            weigh(shared, weights_at, products, grads, statistics, mask, problem, where)
            warp.sync_warp()
            gather(shared, weights_at, d_out_at, width, d_v_sums, lane)
            gather(shared, weights_at + np.int64(ROWS * OTHERS), q_at, width, d_k_sums, lane)
            query0 += np.int64(OTHERS)

    return add_head


@kernel_factory(("f32", "", 4, True), ("bf16", "f16", 2, False))
def key_gradients_portable(kind: str, mask: str, groups: int, causal: bool):
    """Parameters: d_k, d_v, q, k, v, d_out, mask, statistics, their room, queries, keys, width, and as above.

    Heads are k's. A block for a few of one head's keys, over the queries of all heads that share them.
    """
    stage_rows, write, sum_count = portable.stager(kind, BLOCK_ROWS), portable.writer(kind, groups), ROWS * groups
    add_head, clear = _head_adder(kind, mask, groups, causal), _clear(sum_count)

    def kernel(
        d_k, d_v, q, k, v, d_out, mask, statistics, padded, queries, keys, width, heads, group, diagonal, factor, scale
    ):
        shared = cuda.shared.array(0, np.float32, alignment=16)
        products = cuda.local.array(ROWS, np.float32)
        grads = cuda.local.array(ROWS, np.float32)
        d_k_sums = cuda.local.array(sum_count, np.float32)
        d_v_sums = cuda.local.array(sum_count, np.float32)
        clear(d_k_sums)
        clear(d_v_sums)
        thread = warp.thread_index()
        batch, other, start = locate(warp.block_x(), keys, heads, BLOCK_ROWS, False)
        row0 = start + np.int64(thread >> _u32(5)) * np.int64(ROWS)
        stage_rows(shared, np.int64(0), width, k, _base_of(k, batch, other), start, keys, width, thread)
        to = np.int64(BLOCK_ROWS) * width
        stage_rows(shared, to, width, v, _base_of(v, batch, other), start, keys, width, thread)
        first = max(np.int64(0), start - diagonal) if causal else np.int64(0)
        for in_group in range(group):
            head = other * group + np.int64(in_group)
            at = (batch * heads * group + head) * np.int64(STATISTICS) * padded
            place = (batch, head, at, row0, first, padded, width, thread)
            arrays = (products, grads, d_k_sums, d_v_sums)
            add_head(shared, (q, d_out), mask, statistics, arrays, (queries, keys, diagonal, factor), place)
        lane = _u32(thread & _u32(31))
        for row in range(ROWS):
            products[row] = scale
            grads[row] = np.float32(1)
        write(d_k, _base_of(d_k, batch, other), row0, keys, width, d_k_sums, products, lane)
        write(d_v, _base_of(d_v, batch, other), row0, keys, width, d_v_sums, grads, lane)

    tensor = matrix(kind)
    parameters = ((tensor,) * 6, (portable.mask_parameters(mask), f32p), (i64,) * 7, (f32, f32))
    return kernel, sum(parameters, ()), {"threads": THREADS}
