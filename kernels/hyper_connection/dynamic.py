"""Dynamic hyper-connections: a sample's own mixing weights from its streams, for any shape.

What is computed is said in ``plans/hyper_connection/dynamic.py``. A sample's logits are alpha P / r + bias with P the
projection of its flattened streams and r their root mean square; both lie in a line ``projected`` [n (n + 2) + 1].
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import numpy as np

from kernels import sinkhorn, warp
from kernels.elements import ELEMENTS
from kernels.hardware import WARP
from kernels.hyper_connection.static import THREADS, WARPS, post_weight, pre_weight
from kernels.target import cuda, device, f32, f32p, i64, kernel_factory

SAMPLES = 4
"""Samples of a block of `project`, which share what is read of the projection."""


@kernel_factory(("f32", "f32"), ("bf16", "bf16"), ("bf16", "f32"), ("f32", "bf16"))
def project(element, projection):
    """P[b, e] = sum_k rows[e, k] x[b, k], and r[b] = sqrt(mean(x[b]**2) + eps); one warp an element of SAMPLES samples.

    Parameters: x, rows, projected, flat, outputs, B, eps, with flat = n C places and outputs = n (n + 2) rows.
    """
    load, load_row = ELEMENTS[element].load, ELEMENTS[projection].load

    def kernel(x, rows, projected, flat, outputs, batch, eps):
        totals = cuda.local.array(SAMPLES, np.float32)
        thread, first = np.int64(warp.thread_index()), warp.block_x() * np.int64(SAMPLES)
        lane = thread % np.int64(WARP)
        for e in range(thread // np.int64(WARP), outputs + np.int64(1), WARPS):
            for s in range(SAMPLES):
                totals[s] = np.float32(0)
            for k in range(lane, flat, WARP):
                weight = np.float32(0)
                if e < outputs:
                    weight = load_row(rows, e * flat + k)
                for s in range(SAMPLES):
                    value = load(x, min(first + np.int64(s), batch - np.int64(1)) * flat + k)
                    totals[s] += (weight if e < outputs else value) * value
            for s in range(SAMPLES):
                total = warp.warp_sum(totals[s])
                if e == outputs:
                    total = np.float32(math.sqrt(total / np.float32(flat) + eps))
                if lane == np.int64(0) and first + np.int64(s) < batch:
                    projected[(first + np.int64(s)) * (outputs + np.int64(1)) + e] = total

    parameters = (ELEMENTS[element].pointer, ELEMENTS[projection].pointer, f32p, i64, i64, i64, f32)
    return kernel, parameters, {"threads": THREADS}


@device
def logit(projected, line, alpha, bias, group, e, outputs):
    """The logit alpha P / r + bias of row e, which lies in ``group``: 0 for s_pre, 1 for s_post, 2 for M."""
    return alpha[group] * (projected[line + e] / projected[line + outputs]) + bias[e]


@functools.cache
def mixing_logits(extent: int) -> Callable:
    """A device function: thread k writes row k of the logits of M to ``logits`` at ``at``, where it may read them."""

    @device
    def fill(projected, line, alpha, bias, logits, at, k, n):
        outputs = n * (n + np.int64(2))
        if k < n:
            for j in range(n):
                e = (np.int64(2) + k) * n + j
                logits[at + k * n + j] = logit(projected, line, alpha, bias, 2, e, outputs)

    return fill


@kernel_factory(("exp", 32), ("softmax", 32), ("exp", 64))
def sample_weights(mode, extent):
    """A sample's line of mixing weights from its line of ``projected``; one block a sample.

    Parameters: projected, alpha, bias, weights, logits, n, iterations, eps; ``logits`` [B, n, n] is scratch.
    """
    step, store, cells = sinkhorn.steps(mode, extent), sinkhorn.column_store(extent), sinkhorn.cells_of(extent)
    start, iterate, s_pre, fill = step.start, step.iterate, pre_weight(mode), mixing_logits(extent)

    def kernel(projected, alpha, bias, weights, logits, n, iterations, eps):
        x = cuda.shared.array(cells, np.float32)
        k, b = np.int64(warp.thread_index()), warp.block_x()
        outputs, at = n * (n + np.int64(2)), b * n * n
        line, to = b * (outputs + np.int64(1)), b * outputs
        fill(projected, line, alpha, bias, logits, at, k, n)
        start(logits, at, x, k, n, eps)
        iterate(x, k, n, iterations, eps)
        store(x, k, n, weights, to + n + n)
        if k < n:
            weights[to + k] = s_pre(logit(projected, line, alpha, bias, 0, k, outputs), eps)
            weights[to + n + k] = post_weight(logit(projected, line, alpha, bias, 1, n + k, outputs))

    return kernel, (f32p, f32p, f32p, f32p, f32p, i64, i64, f32), {"threads": extent}
