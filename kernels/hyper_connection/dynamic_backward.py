"""The gradient of dynamic hyper-connections: from that of a sample's mixing weights to alpha, bias and projection.

What is computed is said in ``plans/hyper_connection/dynamic_backward.py``; the gradient of x is finished by ``spread``
in ``kernels/hyper_connection/static_backward.py``.
"""

from __future__ import annotations

import numpy as np

from kernels import sinkhorn, warp
from kernels.elements import ELEMENTS
from kernels.hyper_connection.dynamic import logit, mixing_logits
from kernels.hyper_connection.static import THREADS, WARPS, block_sum, sigmoid
from kernels.target import cuda, f32, f32p, i64, kernel_factory


@kernel_factory(("exp", 32), ("softmax", 32), ("exp", 64))
def sample_weights_backward(mode, extent):
    """A sample's gradient of its logits, and its line of ``lifts``; one block a sample.

    Parameters: projected, alpha, bias, shares, more, d_logits, lifts, logits, entered, width, n, iterations, eps, flat.
    The gradient of the mixing weights is ``shares`` [B, width], of which elements from ``width`` on are 0, plus
    ``more`` [B, n (n + 2)] where width is less than that; ``d_logits`` [B, n (n + 2)]; ``lifts`` as ``spread`` takes
    them: alpha d_logits / r, and -sum(d_logits alpha P) / (r**3 flat). ``logits`` [B, n, n] and ``entered``
    [B, iterations, n, n] are scratch.
    """
    unwound, cells, fill = sinkhorn.gradient(mode, extent), sinkhorn.cells_of(extent), mixing_logits(extent)

    def kernel(
        projected, alpha, bias, shares, more, d_logits, lifts, logits, entered, width, n, iterations, eps, flat,
    ):  # fmt: skip
        x = cuda.shared.array(cells, np.float32)
        g = cuda.shared.array(cells, np.float32)
        k, b = np.int64(warp.thread_index()), warp.block_x()
        outputs, at = n * (n + np.int64(2)), b * n * n
        line, to = b * (outputs + np.int64(1)), b * outputs
        fill(projected, line, alpha, bias, logits, at, k, n)
        if k < n:
            d_pre = shares[b * width + k]
            if width < outputs:
                d_pre += more[to + k]
            d_post = more[to + n + k] if width < outputs else shares[to + n + k]
            s = sigmoid(logit(projected, line, alpha, bias, 0, k, outputs))
            d_logits[to + k] = d_pre * s * (np.float32(1) - s)
            s = sigmoid(logit(projected, line, alpha, bias, 1, n + k, outputs))
            d_logits[to + n + k] = d_post * np.float32(2) * s * (np.float32(1) - s)
        d_mixing, first = (more, to + n + n) if width < outputs else (shares, to + n + n)
        unwound(logits, at, d_mixing, first, d_logits, first, entered, at * iterations, x, g, n, iterations, eps)
        warp.block_barrier()
        root, pull = projected[line + outputs], np.float32(0)
        for e in range(k, outputs, extent):
            group = min(np.int64(np.uint32(e) // np.uint32(n)), np.int64(2))
            d = d_logits[to + e] * alpha[group] / root
            lifts[line + e] = d
            pull += d * (projected[line + e] / root)
        pull = warp.warp_sum(pull)
        if extent > 32:
            x[k] = pull
            warp.block_barrier()
            pull = x[0] + x[32]
        if k == np.int64(0):
            lifts[line + outputs] = -(pull / (root * np.float32(flat)))

    return kernel, (f32p,) * 9 + (i64, i64, i64, f32, i64), {"threads": extent}


@kernel_factory(())
def column_sums():
    """out[e] = sum_b values[b, e], one block a column. Parameters: values, out, width, B."""

    def kernel(values, out, width, batch):
        partial = cuda.shared.array(WARPS, np.float32)
        thread, e = np.int64(warp.thread_index()), warp.block_x()
        total = np.float32(0)
        for b in range(thread, batch, THREADS):
            total += values[b * width + e]
        total = block_sum(partial, total)
        if thread == np.int64(0):
            out[e] = total

    return kernel, (f32p, f32p, i64, i64), {"threads": THREADS}


@kernel_factory(())
def alpha_gradient():
    """d_alpha[group] = sum_b sum_e d_logits[b, e] P[b, e] / r[b] over the group's rows e; one block a group.

    Parameters: d_logits, projected, d_alpha, n, B.
    """

    def kernel(d_logits, projected, d_alpha, n, batch):
        partial = cuda.shared.array(WARPS, np.float32)
        thread, group = np.int64(warp.thread_index()), warp.block_x()
        outputs = n * (n + np.int64(2))
        rows = n * n if group == np.int64(2) else n
        total = np.float32(0)
        for b in range(thread, batch, THREADS):
            line = b * (outputs + np.int64(1))
            of_sample = np.float32(0)
            for e in range(group * n, group * n + rows):
                of_sample += d_logits[b * outputs + e] * projected[line + e]
            total += of_sample / projected[line + outputs]
        total = block_sum(partial, total)
        if thread == np.int64(0):
            d_alpha[group] = total

    return kernel, (f32p, f32p, f32p, i64, i64), {"threads": THREADS}


@kernel_factory(("bf16",), ("f32",))
def projection_gradient(element):
    """d_rows[e, k] = sum_b lifts[b, e] x[b, k] in fp32, one thread a place k. Parameters: x, lifts, d_rows, flat, B.

    The grid is (blocks of k, n (n + 2)).
    """
    load = ELEMENTS[element].load

    def kernel(x, lifts, d_rows, flat, outputs, batch):
        k = warp.block_x() * np.int64(THREADS) + np.int64(warp.thread_index())
        e = warp.block_y()
        if k < flat:
            total = np.float32(0)
            for b in range(batch):
                at = np.int64(b)
                total += lifts[at * (outputs + np.int64(1)) + e] * load(x, at * flat + k)
            d_rows[e * flat + k] = total

    return kernel, (ELEMENTS[element].pointer, f32p, f32p, i64, i64, i64), {"threads": THREADS}
