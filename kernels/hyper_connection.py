"""Hyper-connections with a static H, forward: the mixing weights once, then one block a sample, fp32 FMA.

What is computed is said in ``plans/hyper_connection.py``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import numpy as np

from kernels import sinkhorn, warp
from kernels.elements import ELEMENTS
from kernels.simulator import WARP
from kernels.target import SIMULATOR, cuda, device, f32, f32p, i64, kernel_factory

THREADS = 32 if SIMULATOR else 256
WARPS = THREADS // WARP


@device
def sigmoid(x):
    """1 / (1 + exp(-x)), of the side of exp that does not overflow."""
    power = sinkhorn.exponential(-abs(x))
    top = np.float32(1) if x >= np.float32(0) else power
    return top / (np.float32(1) + power)


@device
def block_sum(partial, value):
    """The sum over the block in every thread, in one order; ``partial`` holds an element a warp, not yet used."""
    thread = warp.thread_index()
    total = warp.warp_sum(value)
    if thread % np.uint32(WARP) == np.uint32(0):
        partial[thread // np.uint32(WARP)] = total
    warp.block_barrier()
    total = np.float32(0)
    for i in range(WARPS):
        total += partial[i]
    return total


@kernel_factory(("exp", 32), ("exp", 64))
def mixing_weights(mode, extent):
    """M, s_pre and s_post into ``weights`` [n * n + n + n]; one block.

    Parameters: h_pre, h_post, h_res, weights, n, iterations, eps.
    """
    step, store, cells = sinkhorn.steps(mode, extent), sinkhorn.column_store(extent), sinkhorn.cells_of(extent)
    start, iterate = step.start, step.iterate

    def kernel(h_pre, h_post, h_res, weights, n, iterations, eps):
        x = cuda.shared.array(cells, np.float32)
        k = np.int64(warp.thread_index())
        start(h_res, np.int64(0), x, k, n, eps)
        iterate(x, k, n, iterations, eps)
        store(x, k, n, weights, np.int64(0))
        if k < n:
            weights[n * n + k] = sigmoid(h_pre[k])
            weights[n * n + n + k] = np.float32(2) * sigmoid(h_post[k])

    return kernel, (f32p, f32p, f32p, f32p, i64, i64, f32), {"threads": extent}


@functools.cache
def weighted_sum(element: str) -> Callable:
    """A device function: sum_i weights[first + i] x[i, c] over n streams, ``at`` the place of x[0, c]."""
    load = ELEMENTS[element].load

    @device
    def total_of(x, at, weights, first, channels, n):
        total = np.float32(0)
        for i in range(n):
            total += weights[first + i] * load(x, at + i * channels)
        return total

    return total_of


@kernel_factory(("f32", "bf16"), ("bf16", "bf16"), ("bf16", "f32"), ("f32", "f32"))
def connect(element, gamma_element):
    """out[b] = M x[b] + s_post y[b], y the RMS-normalised s_pre x[b]; one block a sample b, which it reads twice.

    Parameters: x, gamma, weights, out, C, n, eps.
    """
    store, load_gamma = ELEMENTS[element].store, ELEMENTS[gamma_element].load

    total_of = weighted_sum(element)

    def kernel(x, gamma, weights, out, channels, n, eps):
        partial = cuda.shared.array(WARPS, np.float32)
        thread = np.int64(warp.thread_index())
        sample = warp.block_x() * n * channels

        squares = np.float32(0)
        for c in range(thread, channels, THREADS):
            a = total_of(x, sample + c, weights, n * n, channels, n)
            squares += a * a
        mean = block_sum(partial, squares) / np.float32(channels)
        root = np.float32(math.sqrt(mean + eps))

        for c in range(thread, channels, THREADS):
            at = sample + c
            y = load_gamma(gamma, c) * (total_of(x, at, weights, n * n, channels, n) / root)
            for i in range(n):
                mixed = total_of(x, at, weights, i * n, channels, n)
                store(out, at + i * channels, mixed + weights[n * n + n + i] * y)

    pointer = ELEMENTS[element].pointer
    parameters = (pointer, ELEMENTS[gamma_element].pointer, f32p, pointer, i64, i64, f32)
    return kernel, parameters, {"threads": THREADS}
