"""Sinkhorn-Knopp normalisation of small square matrices and its gradient: one block a matrix, in shared memory.

A thread owns one row in a row step and one column in a column step and adds up alone, so that every sum has one order.
The modes, "exp" and "softmax", are said in ``plans/sinkhorn.py``. The gradient is carried with respect to the logarithm
of the matrix, g = d * X: a step Y = X / sum(X) takes g to g - Y * sum(g), whatever is added to the sum, which neither
divides nor overflows.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np

from kernels import warp
from kernels.target import cuda, device, f32, f32p, i64, kernel_factory

EXTENTS = (32, 64)
"""Threads of a block, and the largest matrix that it takes."""
MAX_EXPONENT = 20.0
"""Mode "exp" clamps exponents to at most this."""

_EXAMPLES = (("exp", 32), ("softmax", 32), ("exp", 64), ("softmax", 64))


def extent_for(n: int) -> int:
    """The smallest block for [n, n] matrices."""
    return next(extent for extent in EXTENTS if n <= extent)


def cells_of(extent: int) -> int:
    """Elements of a matrix in shared memory: one of padding in a row, so that a column lies in 32 different banks."""
    return extent * (extent + 1)


@device
def exponential(x):
    """exp(x) in fp32, for x that does not overflow."""
    return np.float32(math.exp(x))


@device
def _guarded(total, eps):
    """The divisor and 1, or 1 and 0 where the sum does not pass the guard and the line stays as it is."""
    if total > eps:
        return total, np.float32(1)
    return np.float32(1), np.float32(0)


@device
def _added(total, eps):
    return total + eps, np.float32(1)


@device
def clamped(logit):
    """The exponent of mode "exp"."""
    return np.float32(MAX_EXPONENT) if logit > np.float32(MAX_EXPONENT) else logit


@functools.cache
def softmax_row(extent: int) -> Callable:
    """A device function: row k of x = softmax of row k of the logits, its maximum subtracted."""
    pitch = extent + 1

    @device
    def fill(logits, at, x, k, n):
        top = logits[at + k * n]
        for j in range(1, n):
            top = max(top, logits[at + k * n + j])
        total = np.float32(0)
        for j in range(n):
            power = exponential(logits[at + k * n + j] - top)
            x[k * pitch + j] = power
            total += power
        for j in range(n):
            x[k * pitch + j] = x[k * pitch + j] / total

    return fill


@functools.cache
def _start(mode: str, extent: int) -> Callable:
    """A device function that fills row k of the first matrix."""
    pitch, fill_softmax = extent + 1, softmax_row(extent)

    @device
    def exp_row(logits, at, x, k, n, eps):
        for j in range(n):
            x[k * pitch + j] = exponential(clamped(logits[at + k * n + j]))

    @device
    def softmax_plus_eps(logits, at, x, k, n, eps):
        fill_softmax(logits, at, x, k, n)
        for j in range(n):
            x[k * pitch + j] = x[k * pitch + j] + eps

    return exp_row if mode == "exp" else softmax_plus_eps


@functools.cache
def steps(mode: str, extent: int) -> SimpleNamespace:
    """Device functions of thread k < extent on the matrix x in shared memory; those with a barrier are for all threads.

    ``start`` fills x (barrier), ``iterate`` runs all iterations (barriers), ``row_step`` and ``column_step`` are one
    thread's part of one step, and ``row_first`` tells whether an iteration begins with rows.
    """
    pitch, fill = extent + 1, _start(mode, extent)
    divisor = _guarded if mode == "exp" else _added
    softmax = mode == "softmax"

    @device
    def start(logits, at, x, k, n, eps):
        if k < n:
            fill(logits, at, x, k, n, eps)
        warp.block_barrier()

    @device
    def row_first(iteration):
        return not softmax or iteration > 0

    @device
    def row_step(x, k, n, eps):
        total = np.float32(0)
        for j in range(n):
            total += x[k * pitch + j]
        by, kept = divisor(total, eps)
        for j in range(n):
            x[k * pitch + j] = x[k * pitch + j] / by
        return kept

    @device
    def column_divisor(x, k, n, eps):
        total = np.float32(0)
        for i in range(n):
            total += x[i * pitch + k]
        return divisor(total, eps)

    @device
    def column_step(x, k, n, eps):
        by, _ = column_divisor(x, k, n, eps)
        for i in range(n):
            x[i * pitch + k] = x[i * pitch + k] / by

    @device
    def iterate_once(x, k, n, iteration, eps):
        if row_first(iteration):
            if k < n:
                row_step(x, k, n, eps)
            warp.block_barrier()
        if k < n:
            column_step(x, k, n, eps)
        warp.block_barrier()

    @device
    def iterate(x, k, n, iterations, eps):
        for iteration in range(iterations):
            iterate_once(x, k, n, iteration, eps)

    return SimpleNamespace(
        start=start, iterate=iterate, iterate_once=iterate_once, row_first=row_first, row_step=row_step,
        column_divisor=column_divisor,
    )  # fmt: skip


@functools.cache
def column_store(extent: int) -> Callable:
    """A device function: column k of x to a row-major [n, n] matrix at ``at``."""
    pitch = extent + 1

    @device
    def store(x, k, n, out, at):
        if k < n:
            for i in range(n):
                out[at + i * n + k] = x[i * pitch + k]

    return store


@kernel_factory(*_EXAMPLES)
def sinkhorn(mode, extent):
    """Out = Sinkhorn(logits), both [batch, n, n]. Parameters: logits, out, n, iterations, eps; one block a matrix."""
    step, store, cells = steps(mode, extent), column_store(extent), cells_of(extent)
    start, iterate = step.start, step.iterate

    def kernel(logits, out, n, iterations, eps):
        x = cuda.shared.array(cells, np.float32)
        k = np.int64(warp.thread_index())
        at = warp.block_x() * n * n
        start(logits, at, x, k, n, eps)
        iterate(x, k, n, iterations, eps)
        store(x, k, n, out, at)

    return kernel, (f32p, f32p, i64, i64, f32), {"threads": extent}


@functools.cache
def _finish(mode: str, extent: int) -> Callable:
    """A device function: row k of the logits' gradient, at ``to``, from g of the first matrix; x is free to use."""
    pitch, fill_softmax = extent + 1, softmax_row(extent)

    @device
    def through_exp(logits, at, x, g, k, n, eps, d_logits, to):
        for j in range(n):
            stopped = logits[at + k * n + j] > np.float32(MAX_EXPONENT)
            d_logits[to + k * n + j] = np.float32(0) if stopped else g[k * pitch + j]

    @device
    def through_softmax(logits, at, x, g, k, n, eps, d_logits, to):
        fill_softmax(logits, at, x, k, n)
        total = np.float32(0)
        for j in range(n):
            p = x[k * pitch + j]
            share = g[k * pitch + j] * (p / (p + eps))
            g[k * pitch + j] = share
            total += share
        for j in range(n):
            d_logits[to + k * n + j] = g[k * pitch + j] - x[k * pitch + j] * total

    return through_exp if mode == "exp" else through_softmax


@functools.cache
def _unwind(mode: str, extent: int) -> Callable:
    """A device function: g through one iteration backwards; x holds the matrix that entered it."""
    pitch, step = extent + 1, steps(mode, extent)
    row_first, row_step, column_divisor = step.row_first, step.row_step, step.column_divisor

    @device
    def column_back(x, g, k, n, eps):
        by, kept = column_divisor(x, k, n, eps)
        total = np.float32(0)
        for i in range(n):
            total += g[i * pitch + k]
        total *= kept
        for i in range(n):
            g[i * pitch + k] = g[i * pitch + k] - x[i * pitch + k] / by * total

    @device
    def row_back(x, g, k, n, kept):
        total = np.float32(0)
        for j in range(n):
            total += g[k * pitch + j]
        total *= kept
        for j in range(n):
            g[k * pitch + j] = g[k * pitch + j] - x[k * pitch + j] * total

    @device
    def unwind(x, g, k, n, iteration, eps):
        kept = np.float32(0)
        rows = row_first(iteration)
        if rows:
            if k < n:
                kept = row_step(x, k, n, eps)
            warp.block_barrier()
        if k < n:
            column_back(x, g, k, n, eps)
        warp.block_barrier()
        if rows:
            if k < n:
                row_back(x, g, k, n, kept)
            warp.block_barrier()

    return unwind


@functools.cache
def gradient(mode: str, extent: int) -> Callable:
    """A device function for all threads: the gradient of the logits at ``at``, written at ``to``, for that of M.

    ``d_out`` is M's gradient and lies at ``d_at``; ``entered`` at ``kept_at`` is scratch for the matrix that enters
    each iteration, kept on the way forward. The way back recomputes from it what lies within the iteration, with the
    bits of the way forward. x and g are two matrices in shared memory.
    """
    step, store, pitch = steps(mode, extent), column_store(extent), extent + 1
    start, iterate_once = step.start, step.iterate_once
    unwind, finish = _unwind(mode, extent), _finish(mode, extent)

    @device
    def unwound(logits, at, d_out, d_at, d_logits, to, entered, kept_at, x, g, n, iterations, eps):
        k = np.int64(warp.thread_index())
        start(logits, at, x, k, n, eps)
        for iteration in range(iterations):
            store(x, k, n, entered, kept_at + iteration * n * n)
            warp.block_barrier()
            iterate_once(x, k, n, iteration, eps)
        if k < n:
            for i in range(n):
                g[i * pitch + k] = d_out[d_at + i * n + k] * x[i * pitch + k]
        for back in range(iterations):
            iteration = iterations - np.int64(1) - back
            if k < n:
                for i in range(n):
                    x[i * pitch + k] = entered[kept_at + (iteration * n + i) * n + k]
            warp.block_barrier()
            unwind(x, g, k, n, iteration, eps)
        if k < n:
            finish(logits, at, x, g, k, n, eps, d_logits, to)

    return unwound


@kernel_factory(*_EXAMPLES)
def sinkhorn_backward(mode, extent):
    """The gradient of the logits through every iteration; one block a matrix.

    Parameters: logits, d_out, d_logits, entered, n, iterations, eps; ``entered`` [batch, iterations, n, n] is scratch.
    """
    unwound, cells = gradient(mode, extent), cells_of(extent)

    def kernel(logits, d_out, d_logits, entered, n, iterations, eps):
        x = cuda.shared.array(cells, np.float32)
        g = cuda.shared.array(cells, np.float32)
        at = warp.block_x() * n * n
        unwound(logits, at, d_out, at, d_logits, at, entered, at * iterations, x, g, n, iterations, eps)

    return kernel, (f32p, f32p, f32p, f32p, i64, i64, f32), {"threads": extent}
