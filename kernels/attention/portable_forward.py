"""Attention for any kinds, widths and masks: see `kernels.attention.portable`."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from kernels import functions, warp
from kernels.attention import portable
from kernels.attention.forward import locate
from kernels.attention.portable import BLOCK_ROWS, OTHERS, ROWS, THREADS
from kernels.attention.statistics import matrix
from kernels.target import cuda, device, f32, f32p, i64, kernel_factory

_u32 = np.uint32
_NOTHING = np.float32(-math.inf)
_LN2 = np.float32(math.log(2))
_base_of, _dots, _warp_maximum = portable.base_of, portable.dots, portable.warp_maximum


def _softener(mask: str, groups: int, causal: bool) -> Callable:
    """``soften(shared, weights_at, state, mask, problem, where)``: 32 keys' products become weights in shared memory.

    ``state``: products, maxima, the lane's share of the sums, results. ``where``: batch, head, first row, key, lane.
    """
    score_of = portable.scorer(mask, causal)

    @device
    def soften(shared, weights_at, state, mask, problem, where):
        products, most, totals, sums = state
        batch, head, row0, key, lane = where
        for row in range(ROWS):
            score = score_of(products[row], mask, problem, batch, head, row0 + np.int64(row), key)
            high = functions.maximum(most[row], _warp_maximum(score))
            # A row that has seen nothing keeps a finite shift, as infinity minus infinity is no number.
            shift = np.float32(0) if high == _NOTHING else high
            older, power = functions.exp2(most[row] - shift), functions.exp2(score - shift)
            most[row] = high
            totals[row] = totals[row] * older + power
            for group in range(groups):
                sums[row * groups + group] = sums[row * groups + group] * older
            shared[weights_at + np.int64(row * OTHERS) + np.int64(lane)] = power

    return soften


def _finisher() -> Callable:
    """``finish(most, totals, lse, at, row0, queries, lane)``: sums to reciprocals, and log-sum-exps to memory."""

    @device
    def finish(most, totals, lse, at, row0, queries, lane):
        for row in range(ROWS):
            total = warp.warp_sum(totals[row])
            value = _NOTHING if total == np.float32(0) else most[row] * _LN2 + functions.log(total)
            if lane == _u32(0) and row0 + np.int64(row) < queries:
                lse[at + row0 + np.int64(row)] = value
            totals[row] = np.float32(0) if total == np.float32(0) else np.float32(1) / total

    return finish


@kernel_factory(("f32", "", 4, True), ("bf16", "bf16", 2, False), ("f16", "i32", 8, True))
def attention_portable(kind: str, mask: str, groups: int, causal: bool):
    """Parameters: out, log-sum-exps, q, k, v, mask, queries, keys, width, heads, q's heads of one of k's, diagonal.

    Last scale log2(e). A block for a few of one head's queries; ``groups`` counts the columns of a lane.
    """
    stage_rows, stage_others = portable.stager(kind, BLOCK_ROWS), portable.stager(kind, OTHERS)
    soften, gather, write = _softener(mask, groups, causal), portable.gatherer(groups), portable.writer(kind, groups)
    finish, sum_count = _finisher(), ROWS * groups

    def kernel(out, lse, q, k, v, mask, queries, keys, width, heads, group, diagonal, factor):
        shared = cuda.shared.array(0, np.float32, alignment=16)
        products = cuda.local.array(ROWS, np.float32)
        most = cuda.local.array(ROWS, np.float32)
        totals = cuda.local.array(ROWS, np.float32)
        sums = cuda.local.array(sum_count, np.float32)
        for row in range(ROWS):
            most[row] = _NOTHING
            totals[row] = np.float32(0)
        for i in range(sum_count):
            sums[i] = np.float32(0)
        thread = warp.thread_index()
        lane, number = _u32(thread & _u32(31)), np.int64(thread >> _u32(5))
        batch, head, start = locate(warp.block_x(), queries, heads, BLOCK_ROWS, causal)
        row0, other = start + number * np.int64(ROWS), np.int64(_u32(_u32(head) // _u32(group)))
        pitch = width + np.int64(1)
        own_at, k_at = number * np.int64(ROWS) * width, np.int64(BLOCK_ROWS) * width
        v_at = k_at + np.int64(OTHERS) * pitch
        weights_at = v_at + np.int64(OTHERS) * pitch + number * np.int64(ROWS * OTHERS)
        stage_rows(shared, np.int64(0), width, q, _base_of(q, batch, head), start, queries, width, thread)
        seen = max(np.int64(0), min(keys, start + np.int64(BLOCK_ROWS) + diagonal)) if causal else keys
        key0 = np.int64(0)
        while key0 < seen:
            warp.block_barrier()
            stage_others(shared, k_at, pitch, k, _base_of(k, batch, other), key0, keys, width, thread)
            stage_others(shared, v_at, pitch, v, _base_of(v, batch, other), key0, keys, width, thread)
            warp.block_barrier()
            _dots(shared, own_at, k_at + np.int64(lane) * pitch, width, products)
            where = (batch, head, row0, key0 + np.int64(lane), lane)
            problem = (queries, keys, diagonal, factor)
            soften(shared, weights_at, (products, most, totals, sums), mask, problem, where)
            warp.sync_warp()
            gather(shared, weights_at, v_at, width, sums, lane)
            key0 += np.int64(OTHERS)
        finish(most, totals, lse, (batch * heads + head) * queries, row0, queries, lane)
        write(out, _base_of(out, batch, head), row0, queries, width, sums, totals, lane)

    tensor = matrix(kind)
    parameters = (tensor, f32p, tensor, tensor, tensor, portable.mask_parameters(mask), *(i64,) * 6, f32)
    return kernel, parameters, {"threads": THREADS}
