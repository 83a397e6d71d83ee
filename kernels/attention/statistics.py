"""What the gradients of attention need of each query: its log-sum-exp to base 2, and delta = rowsum(d_out * out)."""

from __future__ import annotations

import math

import numpy as np

from kernels.elements import ELEMENTS
from kernels.target import SIMULATOR, device, f32p, i64, kernel_factory, types
from kernels.warp import block_x, thread_index, warp_sum

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


@kernel_factory(("bf16",), ("f32",))
def attention_statistics(kind: str):
    """Parameters: statistics, out, d_out, log-sum-exps, queries, how many there is room for, width, heads, all queries.

    Statistics are [batch, head, 2, query]; those of queries that are not there are plus infinity and zero, so that
    nothing comes of them. ``all queries`` counts them with those, over batches and heads. A warp a query.
    """
    load = ELEMENTS[kind].load

    @device
    def dot(x, x_at, y, y_at, width, lane):
        value = np.float32(0)
        column = np.int64(lane)
        while column < width:
            value += load(x, x_at + column) * load(y, y_at + column)
            column += np.int64(32)
        return warp_sum(value)

    def kernel(statistics, out, d_out, lse, queries, padded, width, heads, count):
        thread = thread_index()
        lane = _u32(thread & _u32(31))
        index = _u32(_u32(_u32(block_x()) * _u32(WARPS)) + _u32(thread >> _u32(5)))
        if np.int64(index) < count:
            slot = _u32(index // _u32(padded))
            query = np.int64(_u32(index - _u32(slot * _u32(padded))))
            power, delta = _INFINITY, np.float32(0)
            if query < queries:
                batch = np.int64(_u32(slot // _u32(heads)))
                head = np.int64(slot) - batch * heads
                out_at = batch * out[BATCH] + head * out[HEAD] + query * out[TOKEN]
                d_out_at = batch * d_out[BATCH] + head * d_out[HEAD] + query * d_out[TOKEN]
                delta = dot(out[POINTER], out_at, d_out[POINTER], d_out_at, width, lane)
                known = lse[np.int64(slot) * queries + query]
                power = _INFINITY if known == -_INFINITY else known * _LOG2_E
            if lane == _u32(0):
                at = np.int64(slot) * np.int64(STATISTICS) * padded + query
                statistics[at] = power
                statistics[at + padded] = delta

    return kernel, (f32p, matrix(kind), matrix(kind), f32p, *(i64,) * 5), {"threads": 32 * WARPS}
