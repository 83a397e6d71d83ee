"""Lines of mixing weights of few streams, a thread a line: what the streaming kernels take.

What is computed is said in ``static.py`` and ``dynamic.py`` of ``plans/hyper_connection/``; weights lie as in
``kernels/hyper_connection/static.py``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import numpy as np

from kernels import warp
from kernels.hyper_connection.static import post_weight, pre_weight
from kernels.sinkhorn_thread import THREADS, matrix_steps
from kernels.target import cuda, device, f32, f32p, i64, kernel_factory


@functools.cache
def _write_line(mode: str, n: int) -> Callable:
    """A device function: weights at ``to`` from a line of logits at ``at``."""
    step, s_pre, cells = matrix_steps(mode, n), pre_weight(mode), n * n
    start, iterate = step.start, step.iterate

    @device
    def write(logits, at, weights, to, iterations, eps):
        x = cuda.local.array(cells, np.float32)
        start(logits, at + np.int64(2 * n), x, eps)
        iterate(x, iterations, eps)
        for k in range(n):
            weights[to + k] = s_pre(logits[at + k], eps)
            weights[to + n + k] = post_weight(logits[at + n + k])
        for i in range(cells):
            weights[to + 2 * n + i] = x[i]

    return write


@functools.cache
def static_line(mode: str, n: int) -> Callable:
    """A device function for the first warp of a block: the line of a static H to ``line``, M by one of its lanes.

    The others of the block may read it after a barrier.
    """
    step, s_pre, cells = matrix_steps(mode, n), pre_weight(mode), n * n
    start, iterate = step.start, step.iterate

    @device
    def fill(h_pre, h_post, h_res, line, iterations, eps):
        thread = np.int64(warp.thread_index())
        if thread == np.int64(0):
            x = cuda.local.array(cells, np.float32)
            start(h_res, np.int64(0), x, eps)
            iterate(x, iterations, eps)
            for i in range(cells):
                line[2 * n + i] = x[i]
        elif thread <= np.int64(n):
            k = thread - np.int64(1)
            line[k] = s_pre(h_pre[k], eps)
            line[n + k] = post_weight(h_post[k])

    return fill


@kernel_factory(("exp", 2), ("exp", 4), ("softmax", 4), ("exp", 8))
def sample_weights_by_thread(mode, n):
    """Lines of ``projected`` and of mixing weights from parts of P and of the sum of squares; one thread a sample.

    Parameters: parts, alpha, bias, projected, weights, logits, splits, B, flat, iterations, eps. ``parts`` [splits, B,
    n (n + 2) + 1] are added up in their order; ``logits`` [B, n (n + 2)] is scratch.
    """
    write, outputs = _write_line(mode, n), n * (n + 2)

    @device
    def total_of(parts, at, e, splits, batch):
        total = np.float32(0)
        for split in range(splits):
            total += parts[at + split * batch * np.int64(outputs + 1) + e]
        return total

    def kernel(parts, alpha, bias, projected, weights, logits, splits, batch, flat, iterations, eps):
        b = warp.block_x() * np.int64(THREADS) + np.int64(warp.thread_index())
        if b < batch:
            line, to = b * np.int64(outputs + 1), b * np.int64(outputs)
            squares = total_of(parts, line, outputs, splits, batch)
            root = np.float32(math.sqrt(squares / np.float32(flat) + eps))
            projected[line + outputs] = root
            for e in range(outputs):
                p = total_of(parts, line, e, splits, batch)
                projected[line + e] = p
                logits[to + e] = alpha[min(e // n, 2)] * (p / root) + bias[e]
            write(logits, to, weights, to, iterations, eps)

    parameters = (f32p, f32p, f32p, f32p, f32p, f32p, i64, i64, i64, i64, f32)
    return kernel, parameters, {"threads": THREADS}
