"""Sums over the blocks of the streaming kernels, in one order, and what follows from them for a static H."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np

from kernels import warp
from kernels.hyper_connection.static import THREADS, sigmoid
from kernels.simulator import WARP
from kernels.sinkhorn_thread import logit_gradient
from kernels.target import cuda, device, f32, f32p, i64, kernel_factory

GROUPS = THREADS // WARP


@functools.cache
def line_sums(count: int, warps: int) -> Callable:
    """A device function: the block's sums of ``count`` values of every thread to ``out`` at ``at``, in one order.

    ``partial`` has ``warps * count`` places; begins with a barrier, has another.
    """

    @device
    def write(partial, values, out, at):
        thread = np.int64(warp.thread_index())
        lane, own = thread % np.int64(WARP), thread // np.int64(WARP)
        warp.block_barrier()
        for e in range(count):
            total = warp.warp_sum(values[e])
            if lane == np.int64(0):
                partial[own * np.int64(count) + np.int64(e)] = total
        warp.block_barrier()
        for e in range(thread, count, warps * WARP):
            total = np.float32(0)
            for i in range(warps):
                total += partial[np.int64(i * count) + e]
            out[at + e] = total

    return write


@functools.cache
def _column_sum(groups: int) -> Callable:
    """A device function: sums over the rows of a column for each of 32 neighbouring columns, for the first warp.

    Every warp takes each groups-th row; ``partial`` has a place a thread. A block barrier.
    """

    @device
    def total_of(values, column, width, rows, partial):
        thread = np.int64(warp.thread_index())
        total = np.float32(0)
        if column < width:
            for row in range(thread // np.int64(WARP), rows, groups):
                total += values[row * width + column]
        partial[thread] = total
        warp.block_barrier()
        for i in range(1, groups):
            if thread < np.int64(WARP):
                total += partial[thread + np.int64(i * WARP)]
        return total

    return total_of


@kernel_factory(())
def sum_parts():
    """The sums over r of parts[r, k]: the first ``split`` columns to out, the others to ``more``; 32 columns a block.

    Parameters: parts, out, more, split, width, rows.
    """
    total_of = _column_sum(GROUPS)

    def kernel(parts, out, more, split, width, rows):
        partial = cuda.shared.array(THREADS, np.float32)
        thread = np.int64(warp.thread_index())
        column = warp.block_x() * np.int64(WARP) + thread % np.int64(WARP)
        total = total_of(parts, column, width, rows, partial)
        if thread < np.int64(WARP) and column < width:
            if column < split:
                out[column] = total
            else:
                more[column - split] = total

    return kernel, (f32p, f32p, f32p, i64, i64, i64), {"threads": THREADS}


@kernel_factory(("exp", 2, False), ("exp", 4, False), ("softmax", 4, True))
def finish_static(mode, n, added):
    """The sums of the blocks' sums, and back through the mixing weights.

    Where they are ``added`` to the gradient of the weights by another way, ``more`` [n (n + 2)], it is read.
    Parameters: sums, gamma_sums, more, h_pre, h_post, h_res, d_gamma, d_h_pre, d_h_post, d_h_res, d_mixing, kept, rows,
    gamma_rows, C, iterations, eps. Blocks from the second on take 32 channels of gamma each; the first takes the mixing
    weights. ``d_mixing`` [n, n] and ``kept`` [2 iterations, n] are scratch.
    """
    back, count, total_of = logit_gradient(mode, n), n * (n + 2), _column_sum(GROUPS)
    tiles = -(-count // WARP)

    def kernel(
        sums, gamma_sums, more, h_pre, h_post, h_res, d_gamma, d_h_pre, d_h_post, d_h_res, d_mixing, kept, rows,
        gamma_rows, channels, iterations, eps,
    ):  # fmt: skip
        partial = cuda.shared.array(THREADS, np.float32)
        thread = np.int64(warp.thread_index())
        lane = thread % np.int64(WARP)
        if warp.block_x() > np.int64(0):
            c = (warp.block_x() - np.int64(1)) * np.int64(WARP) + lane
            total = total_of(gamma_sums, c, channels, gamma_rows, partial)
            if thread < np.int64(WARP) and c < channels:
                d_gamma[c] = total
        else:
            for tile in range(tiles):
                e = np.int64(tile * WARP) + lane
                total = total_of(sums, e, np.int64(count), rows, partial)
                if added and e < np.int64(count):
                    total += more[e]
                if thread < np.int64(WARP):
                    if e < np.int64(n):
                        s = sigmoid(h_pre[e])
                        d_h_pre[e] = total * s * (np.float32(1) - s)
                    elif e < np.int64(2 * n):
                        s = sigmoid(h_post[e - np.int64(n)])
                        d_h_post[e - np.int64(n)] = total * np.float32(2) * s * (np.float32(1) - s)
                    elif e < np.int64(count):
                        d_mixing[e - np.int64(2 * n)] = total
                warp.block_barrier()
            if thread == np.int64(0):
                zero = np.int64(0)
                back(h_res, zero, d_mixing, zero, d_h_res, zero, kept, zero, np.int64(1), iterations, eps)

    return kernel, (f32p,) * 12 + (i64, i64, i64, i64, f32), {"threads": THREADS}
