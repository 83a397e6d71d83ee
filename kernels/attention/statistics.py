"""What the gradients of attention need of each query: its log-sum-exp to base 2, and delta = rowsum(d_out * out)."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from kernels.barrier import early_options, entrance
from kernels.elements import ELEMENTS
from kernels.target import SIMULATOR, cuda, device, f32p, i64, kernel_factory, types
from kernels.warp import block_x, shuffle_xor, thread_index

STATISTICS = 2
"""Numbers of a query: its log-sum-exp to base 2, plus infinity where it sees no key, and delta."""
WARPS = 1 if SIMULATOR else 8
POINTER, BATCH, HEAD, TOKEN = range(4)

_u32 = np.uint32
_LOG2_E = np.float32(math.log2(math.e))
_INFINITY = np.float32(math.inf)


def matrix(kind: str) -> types.Type:
    """Type of a tensor [batch, head, token, width]: it, and elements from a batch, a head, a token to the next."""
    return types.Tuple((ELEMENTS[kind].pointer, i64, i64, i64))


LANES = (4, 8, 16, 32)
"""Lanes that may share a query."""


def _dot_by_one(kind: str, lanes: int) -> Callable:
    """A device function: a lane's part of the product of two lines."""
    load = ELEMENTS[kind].load

    @device
    def dot(x, x_at, y, y_at, width, lane):
        value = np.float32(0)
        column = np.int64(lane)
        while column < width:
            value += load(x, x_at + column) * load(y, y_at + column)
            column += np.int64(lanes)
        return value

    return dot


def _dot_by_eight(kind: str, lanes: int) -> Callable:
    """The same of eight elements at a time; the width is a multiple of eight, and lines are aligned."""
    fetch8, unpack8, words = ELEMENTS[kind].fetch8, ELEMENTS[kind].unpack8, ELEMENTS[kind].words

    @device
    def dot(x, x_at, y, y_at, width, lane):
        x_words = cuda.local.array(words, np.uint32)
        y_words = cuda.local.array(words, np.uint32)
        left = cuda.local.array(8, np.float32)
        right = cuda.local.array(8, np.float32)
        value = np.float32(0)
        column = np.int64(lane) << np.int64(3)
        while column < width:
            fetch8(x, x_at + column, x_words, 0)
            fetch8(y, y_at + column, y_words, 0)
            unpack8(x_words, 0, left, 0)
            unpack8(y_words, 0, right, 0)
            for i in range(8):
                value += left[i] * right[i]
            column += np.int64(8 * lanes)
        return value

    return dot


@kernel_factory(("bf16", 8, 8, True), ("f32", 32, 1))
def attention_statistics(kind: str, lanes: int, together: int, early: bool = False):
    """Parameters: statistics, out, d_out, log-sum-exps, queries, how many there is room for, width, heads, all queries.

    Statistics are [batch, head, 2, query]; those of queries that are not there are plus infinity and zero, so that
    nothing comes of them. ``all queries`` counts them with those, over batches and heads. ``lanes`` of a warp share a
    query and load ``together`` neighbours at once: eight where all are aligned to 16 bytes. ``early``: see
    `kernels.barrier.entrance`.
    """
    enter = entrance(early)
    dot = _dot_by_eight(kind, lanes) if together == 8 else _dot_by_one(kind, lanes)
    shift, rounds = int(math.log2(lanes)), int(math.log2(lanes))
    shared_by, in_block = _u32(shift), _u32(32 * WARPS // lanes)

    def kernel(statistics, out, d_out, lse, queries, padded, width, heads, count):
        enter()
        thread = thread_index()
        lane = _u32(thread & _u32(lanes - 1))
        index = _u32(_u32(_u32(block_x()) * in_block) + _u32(thread >> shared_by))
        slot = _u32(index // _u32(padded))
        query = np.int64(_u32(index - _u32(slot * _u32(padded))))
        there = np.int64(index) < count and query < queries
        delta = np.float32(0)
        if there:
            batch = np.int64(_u32(slot // _u32(heads)))
            head = np.int64(slot) - batch * heads
            out_at = batch * out[BATCH] + head * out[HEAD] + query * out[TOKEN]
            d_out_at = batch * d_out[BATCH] + head * d_out[HEAD] + query * d_out[TOKEN]
            delta = dot(out[POINTER], out_at, d_out[POINTER], d_out_at, width, lane)
        for i in range(rounds):
            delta = delta + shuffle_xor(delta, _u32(_u32(lanes // 2) >> _u32(i)))
        if lane == _u32(0) and np.int64(index) < count:
            power = _INFINITY
            if there:
                known = lse[np.int64(slot) * queries + query]
                power = _INFINITY if known == -_INFINITY else known * _LOG2_E
            at = np.int64(slot) * np.int64(STATISTICS) * padded + query
            statistics[at] = power
            statistics[at + padded] = delta

    return kernel, (f32p, matrix(kind), matrix(kind), f32p, *(i64,) * 5), {"threads": 32 * WARPS} | early_options(early)
