"""The gradient of hyper-connections with a static H: one block a sample, then sums over the samples in one order.

What is computed is said in ``plans/hyper_connection_backward.py``. H_res's own gradient is that of
``kernels/sinkhorn.py``; this module gives it the gradient of M.
"""

from __future__ import annotations

import math

import numpy as np

from kernels import warp
from kernels.elements import ELEMENTS
from kernels.hyper_connection import THREADS, WARPS, block_sum, weighted_sum
from kernels.simulator import WARP
from kernels.target import cuda, device, f32, f32p, i64, kernel_factory


@kernel_factory(("f32", "bf16"), ("bf16", "bf16"), ("bf16", "f32"), ("f32", "f32"))
def samples(element, gamma_element):
    """d_x[b], and what sample b adds to the gradients of the mixing weights; one block a sample b.

    Parameters: x, gamma, d_out, weights, d_x, lines, shares, C, n, eps. ``lines`` [B, 2, C] becomes a / r and the
    gradient of y, ``shares`` [B, n * n + n + n] the gradients of M, s_pre and s_post, one warp an element.
    """
    load, store, load_gamma = ELEMENTS[element].load, ELEMENTS[element].store, ELEMENTS[gamma_element].load
    total_of = weighted_sum(element)

    @device
    def d_aggregate(lines, line, channels, c, scale, pull, root):
        """(gamma dy - u mean(gamma dy u)) / r with u = a / r; ``scale`` is gamma[c], ``pull`` the mean."""
        return (scale * lines[line + channels + c] - lines[line + c] * pull) / root

    def kernel(x, gamma, d_out, weights, d_x, lines, shares, channels, n, eps):
        squares_of_warps = cuda.shared.array(WARPS, np.float32)
        pulls_of_warps = cuda.shared.array(WARPS, np.float32)
        thread = np.int64(warp.thread_index())
        b = warp.block_x()
        sample, line, cells = b * n * channels, b * np.int64(2) * channels, n * n

        squares, pull = np.float32(0), np.float32(0)
        for c in range(thread, channels, THREADS):
            a = total_of(x, sample + c, weights, cells, channels, n)
            dy = total_of(d_out, sample + c, weights, cells + n, channels, n)
            lines[line + c] = a
            lines[line + channels + c] = dy
            squares += a * a
            pull += load_gamma(gamma, c) * dy * a
        root = np.float32(math.sqrt(block_sum(squares_of_warps, squares) / np.float32(channels) + eps))
        pull = block_sum(pulls_of_warps, pull) / np.float32(channels) / root

        for c in range(thread, channels, THREADS):
            lines[line + c] = lines[line + c] / root
            da = d_aggregate(lines, line, channels, c, load_gamma(gamma, c), pull, root)
            for j in range(n):
                mixed = np.float32(0)
                for i in range(n):
                    mixed += weights[i * n + j] * load(d_out, sample + i * channels + c)
                store(d_x, sample + j * channels + c, mixed + weights[cells + j] * da)
        warp.block_barrier()

        lane = thread % np.int64(WARP)
        for e in range(thread // np.int64(WARP), cells + n + n, WARPS):
            row = np.int64(np.uint32(e) // np.uint32(n))
            column = e - row * n
            total = np.float32(0)
            for c in range(lane, channels, WARP):
                if e < cells:
                    total += load(d_out, sample + row * channels + c) * load(x, sample + column * channels + c)
                elif e < cells + n:
                    da = d_aggregate(lines, line, channels, c, load_gamma(gamma, c), pull, root)
                    total += da * load(x, sample + column * channels + c)
                else:
                    total += load(d_out, sample + column * channels + c) * (load_gamma(gamma, c) * lines[line + c])
            total = warp.warp_sum(total)
            if lane == np.int64(0):
                shares[b * (cells + n + n) + e] = total

    pointer = ELEMENTS[element].pointer
    parameters = (pointer, ELEMENTS[gamma_element].pointer, pointer, f32p, pointer, f32p, f32p, i64, i64, f32)
    return kernel, parameters, {"threads": THREADS}


@kernel_factory(())
def sum_shares():
    """The samples' shares added up, one block an element: the gradients of M, of h_pre and of h_post.

    Parameters: shares, weights, d_mixing, d_h_pre, d_h_post, n, B.
    """

    def kernel(shares, weights, d_mixing, d_h_pre, d_h_post, n, batch):
        partial = cuda.shared.array(WARPS, np.float32)
        thread = np.int64(warp.thread_index())
        e = warp.block_x()
        cells = n * n
        total = np.float32(0)
        for b in range(thread, batch, THREADS):
            total += shares[b * (cells + n + n) + e]
        total = block_sum(partial, total)
        if thread == np.int64(0):
            s = weights[e]
            if e < cells:
                d_mixing[e] = total
            elif e < cells + n:
                d_h_pre[e - cells] = total * s * (np.float32(1) - s)
            else:
                d_h_post[e - cells - n] = total * s * (np.float32(1) - np.float32(0.5) * s)

    return kernel, (f32p, f32p, f32p, f32p, f32p, i64, i64), {"threads": THREADS}


@kernel_factory(())
def gamma_gradient():
    """d_gamma[c] = sum_b dy[b, c] a[b, c] / r[b], one thread a channel. Parameters: lines, d_gamma, C, B."""

    def kernel(lines, d_gamma, channels, batch):
        c = warp.block_x() * np.int64(THREADS) + np.int64(warp.thread_index())
        if c < channels:
            total = np.float32(0)
            for b in range(batch):
                line = np.int64(b) * np.int64(2) * channels
                total += lines[line + channels + c] * lines[line + c]
            d_gamma[c] = total

    return kernel, (f32p, f32p, i64, i64), {"threads": THREADS}
