"""Sums over the blocks of the streaming kernels, in one order, and what follows from them for a static H."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np

from kernels import warp
from kernels.hardware import WARP
from kernels.hyper_connection.lanes import MOST_STREAMS, along_lanes, gradient_by_lanes
from kernels.hyper_connection.static import THREADS, sigmoid
from kernels.target import cuda, device, f32, f32p, i64, kernel_factory

GROUPS = THREADS // WARP
_AHEAD = 8


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


@device
def strided_sum(values, column, first, rows, step, width):
    """The sum of values[r, column] over r = first, first + step, ..., in this order; several are read at once."""
    total = np.float32(0)
    ahead = cuda.local.array(_AHEAD, np.float32)
    for row in range(first, rows, _AHEAD * step):
        for k in range(_AHEAD):
            r = row + np.int64(k * step)
            ahead[k] = values[r * width + column] if r < rows else np.float32(0)
        for k in range(_AHEAD):
            total += ahead[k]
    return total


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
            total = strided_sum(values, column, thread // np.int64(WARP), rows, groups, width)
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


@kernel_factory(())
def sum_gradients():
    """The sums over parts for the gradients of a dynamic H: of its projection, of bias and alpha, and of gamma.

    Parameters: parts, of_weights, gamma_sums, d_projection, d_bias, d_alpha, d_gamma, width, m, C, splits, blocks:
    ``parts`` [splits, width], ``of_weights`` [blocks, m + 3], m of them bias's, ``gamma_sums`` [splits, C], C 0 where
    there is no gamma. The first block takes bias and alpha, then 32 channels a block gamma's, the others the rest.
    """
    total_of = _column_sum(GROUPS)

    def kernel(
        parts, of_weights, gamma_sums, d_projection, d_bias, d_alpha, d_gamma, width, m, channels, splits, blocks
    ):
        partial = cuda.shared.array(THREADS, np.float32)
        thread, block = np.int64(warp.thread_index()), warp.block_x()
        lane, of_gamma = thread % np.int64(WARP), (channels + np.int64(WARP - 1)) // np.int64(WARP)
        if block == np.int64(0):
            total = total_of(of_weights, lane, m + np.int64(3), blocks, partial)
            if thread < m:
                d_bias[thread] = total
            elif thread < m + np.int64(3):
                d_alpha[thread - m] = total
        elif block <= of_gamma:
            c = (block - np.int64(1)) * np.int64(WARP) + lane
            total = total_of(gamma_sums, c, channels, splits, partial)
            if thread < np.int64(WARP) and c < channels:
                d_gamma[c] = total
        else:
            column = (block - np.int64(1) - of_gamma) * np.int64(THREADS) + thread
            if column < width:
                d_projection[column] = strided_sum(parts, column, np.int64(0), splits, 1, width)

    return kernel, (f32p,) * 7 + (i64,) * 5, {"threads": THREADS}


@kernel_factory(("exp", 2, False), ("exp", 4, False), ("softmax", 4, True))
def finish_static(mode, n, added):
    """The sums of the blocks' sums, and back through the mixing weights.

    Where they are ``added`` to the gradient of the weights by another way, ``more`` [n (n + 2)], it is read.
    Parameters: sums, gamma_sums, more, h_pre, h_post, h_res, d_gamma, d_h_pre, d_h_post, d_h_res, rows, gamma_rows, C,
    iterations, eps. Blocks from the second on take 32 channels of gamma each; the first takes the mixing weights, with
    the shared memory of ``kept_bytes`` for one warp.
    """
    back, along, count, total_of = gradient_by_lanes(mode), along_lanes(n), n * (n + 2), _column_sum(GROUPS)
    place, cell = along.place, along.cell

    @device
    def of_weights(total, h_pre, h_post, h_res, d_h_pre, d_h_post, d_h_res, iterations, eps):
        """Of one warp, whose lanes have the gradient of a weight each."""
        kept = cuda.shared.array(0, np.float32)
        lane = np.int64(warp.thread_index())
        if lane < np.int64(n):
            s = sigmoid(h_pre[lane])
            d_h_pre[lane] = total * s * (np.float32(1) - s)
        elif lane < np.int64(2 * n):
            s = sigmoid(h_post[lane - np.int64(n)])
            d_h_post[lane - np.int64(n)] = total * np.float32(2) * s * (np.float32(1) - s)
        half, k = place()
        i, j, inside, e = cell(k)
        at, own = np.int64(e) - np.int64(2 * n), np.int64(half) * np.int64(2 * MOST_STREAMS) * iterations
        found = back(h_res[at], warp.shuffle_from(total, e), inside, kept, own, i, j, iterations, eps)
        if inside and half == np.uint32(0):
            d_h_res[at] = found

    def kernel(
        sums, gamma_sums, more, h_pre, h_post, h_res, d_gamma, d_h_pre, d_h_post, d_h_res, rows, gamma_rows, channels,
        iterations, eps,
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
            total = total_of(sums, lane, np.int64(count), rows, partial)
            if added and lane < np.int64(count):
                total += more[lane]
            if thread < np.int64(WARP):
                of_weights(total, h_pre, h_post, h_res, d_h_pre, d_h_post, d_h_res, iterations, eps)

    return kernel, (f32p,) * 10 + (i64, i64, i64, i64, f32), {"threads": THREADS}
