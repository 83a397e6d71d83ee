"""Sinkhorn-Knopp of small matrices and its gradient, one thread a matrix, all of it in registers.

The modes are said in ``plans/sinkhorn.py``, the gradient's form in ``kernels/sinkhorn.py``. Sums are added up in the
order of their indices; a line is multiplied by the reciprocal of its sum. The way back multiplies the divisors of the
way forward on again, so that only they are kept, 2 n T numbers a matrix.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np

from kernels import warp
from kernels.ptx import instruction
from kernels.sinkhorn import MAX_EXPONENT, clamped, exponential
from kernels.target import cuda, device, f32, f32p, i64, kernel_factory

THREADS = 32
MAX_N = 8
"""The largest matrix that a thread holds, with its gradient, in registers."""

_EXAMPLES = (("exp", 2), ("exp", 4), ("softmax", 4), ("exp", 8), ("softmax", 8))


def _inverse(x):
    return np.float32(1) / np.float32(x)


# 1 / x of a normal number to one unit in the last place: an approximation and a step of Newton's. Unlike a division it
# has no branch, so that those of several lines are under way together.
inverse = instruction(
    "{ .reg .f32 near, minus, rest; rcp.approx.ftz.f32 near, $1; neg.f32 minus, $1; "
    "fma.rn.f32 rest, near, minus, 0f3F800000; fma.rn.f32 $0, near, rest, near; }",
    "f",
    "f",
    twin=_inverse,
    pure=True,
)


@functools.cache
def line_scale(mode: str) -> Callable:
    """A device function ``(total, eps)``: what a line with that sum is multiplied by; 1 where the guard leaves it."""
    softmax = mode == "softmax"

    @device
    def scale_of(total, eps):
        if softmax:
            return inverse(total + eps)
        near = inverse(total)
        return near if total > eps else np.float32(1)

    return scale_of


@functools.cache
def _softmax_rows(n: int) -> Callable:
    """A device function: x = softmax of each row of the logits, its maximum subtracted."""

    @device
    def fill(logits, at, x):
        for i in range(n):
            top = logits[at + i * n]
            for j in range(1, n):
                top = max(top, logits[at + i * n + j])
            total = np.float32(0)
            for j in range(n):
                power = exponential(logits[at + i * n + j] - top)
                x[i * n + j] = power
                total += power
            scale = inverse(total)
            for j in range(n):
                x[i * n + j] = x[i * n + j] * scale

    return fill


@functools.cache
def matrix_steps(mode: str, n: int) -> SimpleNamespace:
    """Device functions on a matrix x in a local array of n * n numbers.

    ``start`` fills x from logits and ``iterate`` runs all iterations. ``iterate_kept`` also leaves the divisors at
    ``kept[at + line * pitch]``, 0 for a line that the guard left as it is; ``gradient`` takes g, the gradient with
    respect to the logarithm of M, to that of the first matrix, and x to the first matrix.
    """
    softmax, fill, scale_of = mode == "softmax", _softmax_rows(n), line_scale(mode)

    @device
    def start(logits, at, x, eps):
        if softmax:
            fill(logits, at, x)
        for i in range(n * n):
            x[i] = x[i] + eps if softmax else exponential(clamped(logits[at + i]))

    @device
    def divisor_of(total, eps):
        if softmax:
            return total + eps
        return total if total > eps else np.float32(0)

    @device
    def rows(x, eps, by):
        for i in range(n):
            total = x[i * n]
            for j in range(1, n):
                total += x[i * n + j]
            scale, by[i] = scale_of(total, eps), divisor_of(total, eps)
            for j in range(n):
                x[i * n + j] = x[i * n + j] * scale

    @device
    def columns(x, eps, by):
        for j in range(n):
            total = x[j]
            for i in range(1, n):
                total += x[i * n + j]
            scale, by[j] = scale_of(total, eps), divisor_of(total, eps)
            for i in range(n):
                x[i * n + j] = x[i * n + j] * scale

    @device
    def iterate(x, iterations, eps):
        by = cuda.local.array(n, np.float32)
        for iteration in range(iterations):
            if not softmax or iteration > 0:
                rows(x, eps, by)
            columns(x, eps, by)

    @device
    def keep(by, kept, at, pitch):
        for k in range(n):
            kept[at + np.int64(k) * pitch] = by[k]

    @device
    def iterate_kept(x, iterations, eps, kept, at, pitch):
        by = cuda.local.array(n, np.float32)
        for iteration in range(iterations):
            if not softmax or iteration > 0:
                rows(x, eps, by)
                keep(by, kept, at + np.int64(2 * iteration * n) * pitch, pitch)
            columns(x, eps, by)
            keep(by, kept, at + np.int64((2 * iteration + 1) * n) * pitch, pitch)

    @device
    def fetch(kept, step, at, pitch, by):
        """A step's divisors; those before the first are never used, and read as the first's."""
        for k in range(n):
            by[k] = kept[at + np.int64(max(step, 0) * n + k) * pitch]

    @device
    def line_back(x, g, first, stride, by):
        if by != np.float32(0):
            total = g[first]
            for k in range(1, n):
                total += g[first + k * stride]
            for k in range(n):
                g[first + k * stride] = g[first + k * stride] - x[first + k * stride] * total
                x[first + k * stride] = x[first + k * stride] * by

    @device
    def gradient(x, g, iterations, kept, at, pitch):
        by = cuda.local.array(n, np.float32)
        ahead = cuda.local.array(n, np.float32)
        first = 1 if softmax else 0
        fetch(kept, 2 * iterations - 1, at, pitch, ahead)
        for back in range(2 * iterations - first):
            step = 2 * iterations - 1 - back
            for k in range(n):
                by[k] = ahead[k]
            if step > first:
                fetch(kept, step - 1, at, pitch, ahead)
            if step % 2 == 1:
                for j in range(n):
                    line_back(x, g, j, n, by[j])
            else:
                for i in range(n):
                    line_back(x, g, i * n, 1, by[i])

    @device
    def finish(logits, at, x, g, eps, d_logits, to):
        """The gradient of the logits at ``to``, of g of the first matrix; x is free to use."""
        if not softmax:
            for i in range(n * n):
                d_logits[to + i] = np.float32(0) if logits[at + i] > np.float32(MAX_EXPONENT) else g[i]
        else:
            fill(logits, at, x)
            for i in range(n):
                total = np.float32(0)
                for j in range(n):
                    p = x[i * n + j]
                    g[i * n + j] = g[i * n + j] * (p / (p + eps))
                    total += g[i * n + j]
                for j in range(n):
                    d_logits[to + i * n + j] = g[i * n + j] - x[i * n + j] * total

    return SimpleNamespace(start=start, iterate=iterate, iterate_kept=iterate_kept, gradient=gradient, finish=finish)


@functools.cache
def logit_gradient(mode: str, n: int) -> Callable:
    """A device function: a matrix's gradient of its logits, at ``to``, for the gradient of M at ``d_at``.

    ``kept`` at ``kept_at`` is scratch for 2 n T numbers ``pitch`` apart.
    """
    step, cells = matrix_steps(mode, n), n * n
    start, iterate_kept, gradient, finish = step.start, step.iterate_kept, step.gradient, step.finish

    @device
    def back(logits, at, d_out, d_at, d_logits, to, kept, kept_at, pitch, iterations, eps):
        x = cuda.local.array(cells, np.float32)
        g = cuda.local.array(cells, np.float32)
        start(logits, at, x, eps)
        iterate_kept(x, iterations, eps, kept, kept_at, pitch)
        for i in range(cells):
            g[i] = d_out[d_at + i] * x[i]
        gradient(x, g, iterations, kept, kept_at, pitch)
        finish(logits, at, x, g, eps, d_logits, to)

    return back


@kernel_factory(*_EXAMPLES)
def sinkhorn_by_thread(mode, n):
    """Out = Sinkhorn(logits), both [batch, n, n]; one thread a matrix.

    Parameters: logits, out, batch, iterations, eps.
    """
    step, cells = matrix_steps(mode, n), n * n
    start, iterate = step.start, step.iterate

    def kernel(logits, out, batch, iterations, eps):
        x = cuda.local.array(cells, np.float32)
        b = warp.block_x() * np.int64(THREADS) + np.int64(warp.thread_index())
        if b < batch:
            start(logits, b * cells, x, eps)
            iterate(x, iterations, eps)
            for i in range(cells):
                out[b * cells + i] = x[i]

    return kernel, (f32p, f32p, i64, i64, f32), {"threads": THREADS}


@kernel_factory(*_EXAMPLES)
def sinkhorn_by_thread_backward(mode, n):
    """The gradient of the logits through every iteration; one thread a matrix.

    Parameters: logits, d_out, d_logits, kept, batch, iterations, eps; ``kept`` [2 iterations, n, batch] is scratch.
    """
    back, cells = logit_gradient(mode, n), n * n

    def kernel(logits, d_out, d_logits, kept, batch, iterations, eps):
        b = warp.block_x() * np.int64(THREADS) + np.int64(warp.thread_index())
        if b < batch:
            at = b * cells
            back(logits, at, d_out, at, d_logits, at, kept, b, batch, iterations, eps)

    return kernel, (f32p, f32p, f32p, f32p, i64, i64, f32), {"threads": THREADS}
