"""Hyper-connections, forward: a static H's mixing weights once, then one block a sample, fp32 FMA, for any shape.

What is computed is said in ``plans/hyper_connection/static.py``. Mixing weights lie as s_pre [n], s_post [n], M [n, n]:
one such line for all samples (``pitch`` 0) or one a sample (``pitch`` n (n + 2)).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import numpy as np

from kernels import sinkhorn, warp
from kernels.elements import ELEMENTS
from kernels.hardware import WARP
from kernels.target import SIMULATOR, cuda, device, f32, f32p, i64, kernel_factory

THREADS = 32 if SIMULATOR else 256
WARPS = THREADS // WARP


@device
def sigmoid(x):
    """1 / (1 + exp(-x)), of the side of exp that does not overflow."""
    power = sinkhorn.exponential(-abs(x))
    top = np.float32(1) if x >= np.float32(0) else power
    return top / (np.float32(1) + power)


@functools.cache
def pre_weight(mode: str) -> Callable:
    """A device function: s_pre of a logit, to which mode "softmax" adds eps."""
    softmax = mode == "softmax"

    @device
    def weight(logit, eps):
        return sigmoid(logit) + eps if softmax else sigmoid(logit)

    return weight


@device
def post_weight(logit):
    """s_post of a logit."""
    return np.float32(2) * sigmoid(logit)


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


@kernel_factory(("exp", 32), ("exp", 64), ("softmax", 32))
def mixing_weights(mode, extent):
    """The line of mixing weights of a static H; one block.

    Parameters: h_pre, h_post, h_res, weights, n, iterations, eps.
    """
    step, store, cells = sinkhorn.steps(mode, extent), sinkhorn.column_store(extent), sinkhorn.cells_of(extent)
    start, iterate, s_pre = step.start, step.iterate, pre_weight(mode)

    def kernel(h_pre, h_post, h_res, weights, n, iterations, eps):
        x = cuda.shared.array(cells, np.float32)
        k = np.int64(warp.thread_index())
        start(h_res, np.int64(0), x, k, n, eps)
        iterate(x, k, n, iterations, eps)
        store(x, k, n, weights, n + n)
        if k < n:
            weights[k] = s_pre(h_pre[k], eps)
            weights[n + k] = post_weight(h_post[k])

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


@functools.cache
def root_of_aggregate(element: str) -> Callable:
    """A device function: sqrt(mean(a**2) + eps) of a sample's a = sum_i s_pre[i] x[i]; a block barrier."""
    total_of = weighted_sum(element)

    @device
    def root_of(x, sample, weights, line, channels, n, eps, partial):
        squares = np.float32(0)
        for c in range(np.int64(warp.thread_index()), channels, THREADS):
            a = total_of(x, sample + c, weights, line, channels, n)
            squares += a * a
        return np.float32(math.sqrt(block_sum(partial, squares) / np.float32(channels) + eps))

    return root_of


@kernel_factory(("f32", "bf16"), ("bf16", "bf16"), ("bf16", "f32"), ("f32", "f32"))
def connect(element, gamma_element):
    """out[b] = M x[b] + s_post y[b], y the RMS-normalised s_pre x[b]; one block a sample b, which it reads twice.

    Parameters: x, gamma, weights, out, pitch, C, n, eps.
    """
    store, load_gamma = ELEMENTS[element].store, ELEMENTS[gamma_element].load
    total_of, root_of = weighted_sum(element), root_of_aggregate(element)

    def kernel(x, gamma, weights, out, pitch, channels, n, eps):
        partial = cuda.shared.array(WARPS, np.float32)
        sample, line = warp.block_x() * n * channels, warp.block_x() * pitch
        root = root_of(x, sample, weights, line, channels, n, eps, partial)
        for c in range(np.int64(warp.thread_index()), channels, THREADS):
            at = sample + c
            y = load_gamma(gamma, c) * (total_of(x, at, weights, line, channels, n) / root)
            for i in range(n):
                mixed = total_of(x, at, weights, line + (np.int64(2) + i) * n, channels, n)
                store(out, at + i * channels, mixed + weights[line + n + i] * y)

    pointer = ELEMENTS[element].pointer
    parameters = (pointer, ELEMENTS[gamma_element].pointer, f32p, pointer, i64, i64, i64, f32)
    return kernel, parameters, {"threads": THREADS}


@kernel_factory(("bf16", None), ("bf16", "bf16"), ("f32", "f32"))
def aggregate(element, gamma_element):
    """out[b] = sum_i s_pre[i] x[b, i], RMS-normalised where there is a gamma; one block a sample.

    Parameters: x, gamma (any pointer where there is none), weights, out, pitch, C, n, eps.
    """
    store, normalised = ELEMENTS[element].store, gamma_element is not None
    load_gamma = ELEMENTS[gamma_element or element].load
    total_of, root_of = weighted_sum(element), root_of_aggregate(element)

    def kernel(x, gamma, weights, out, pitch, channels, n, eps):
        partial = cuda.shared.array(WARPS, np.float32)
        sample, line = warp.block_x() * n * channels, warp.block_x() * pitch
        root = np.float32(1)
        if normalised:
            root = root_of(x, sample, weights, line, channels, n, eps, partial)
        for c in range(np.int64(warp.thread_index()), channels, THREADS):
            value = total_of(x, sample + c, weights, line, channels, n)
            if normalised:
                value = load_gamma(gamma, c) * (value / root)
            store(out, warp.block_x() * channels + c, value)

    pointer = ELEMENTS[element].pointer
    parameters = (pointer, ELEMENTS[gamma_element or element].pointer, f32p, pointer, i64, i64, i64, f32)
    return kernel, parameters, {"threads": THREADS}


@kernel_factory(("bf16",), ("f32",))
def mix(element):
    """out[b] = M x[b] + s_post y[b] for y [B, C]; one block a sample. Parameters: x, y, weights, out, pitch, C, n."""
    load, store, total_of = ELEMENTS[element].load, ELEMENTS[element].store, weighted_sum(element)

    def kernel(x, y, weights, out, pitch, channels, n):
        sample, line = warp.block_x() * n * channels, warp.block_x() * pitch
        for c in range(np.int64(warp.thread_index()), channels, THREADS):
            added = load(y, warp.block_x() * channels + c)
            for i in range(n):
                mixed = total_of(x, sample + c, weights, line + (np.int64(2) + i) * n, channels, n)
                store(out, sample + i * channels + c, mixed + weights[line + n + i] * added)

    pointer = ELEMENTS[element].pointer
    return kernel, (pointer, pointer, f32p, pointer, i64, i64, i64), {"threads": THREADS}
