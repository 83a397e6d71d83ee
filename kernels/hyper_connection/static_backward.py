"""The gradient of hyper-connections: one block a sample, then sums over the samples in one order, for any shape.

What is computed is said in ``static_backward.py`` and ``split_backward.py`` of ``plans/hyper_connection/``.
Kernels come in roles: "full" for the whole connection, whose incoming gradient d is that of out [B, n, C], and "pre"
for the part before the sublayer, whose d is that of the sublayer's input [B, C]. Without a norm gamma_element is None:
then a / r is a, and da is d. Gradients with respect to the mixing weights lie as these do: s_pre, s_post, M.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import numpy as np

from kernels import warp
from kernels.elements import ELEMENTS
from kernels.hardware import WARP
from kernels.hyper_connection.static import THREADS, WARPS, block_sum, sigmoid, weighted_sum
from kernels.target import cuda, device, f32, f32p, i64, kernel_factory


@functools.cache
def _d_normalised(role: str, element: str) -> Callable:
    """A device function: the gradient of y at channel c, sum_i s_post[i] d[b, i, c] or d[b, c] itself."""
    load, total_of, full = ELEMENTS[element].load, weighted_sum(element), role == "full"

    @device
    def dy_of(d, weights, line, b, c, channels, n):
        if full:
            return total_of(d, b * n * channels + c, weights, line + n, channels, n)
        return load(d, b * channels + c)

    return dy_of


@functools.cache
def _scale(gamma_element: str | None, element: str) -> tuple[Callable, object]:
    """A device function that loads gamma[c], 1 where there is none, and its pointer type."""
    found = ELEMENTS[gamma_element or element]
    load, normalised = found.load, gamma_element is not None

    @device
    def scale_of(gamma, c):
        return load(gamma, c) if normalised else np.float32(1)

    return scale_of, found.pointer


@device
def _d_aggregate(lines, line, channels, c, scale, pull, root):
    """(gamma dy - u mean(gamma dy u)) / r with u = a / r; ``scale`` is gamma[c], ``pull`` the mean."""
    return (scale * lines[line + channels + c] - lines[line + c] * pull) / root


@functools.cache
def _prepare(role: str, element: str, gamma_element: str | None) -> Callable:
    """A device function: a sample's ``lines`` [2, C], a / r and dy, and its (r, pull); block barriers, none at the end.

    A thread writes the channels that it reads again in the same order; others may read them after a barrier.
    """
    total_of, dy_of = weighted_sum(element), _d_normalised(role, element)
    (scale_of, _), normalised = _scale(gamma_element, element), gamma_element is not None

    @device
    def prepare(x, gamma, d, weights, line, lines, at, b, channels, n, eps, squares_of_warps, pulls_of_warps):
        thread = np.int64(warp.thread_index())
        squares, pull = np.float32(0), np.float32(0)
        for c in range(thread, channels, THREADS):
            a = total_of(x, b * n * channels + c, weights, line, channels, n)
            dy = dy_of(d, weights, line, b, c, channels, n)
            lines[at + c] = a
            lines[at + channels + c] = dy
            squares += a * a
            pull += scale_of(gamma, c) * dy * a
        if not normalised:
            return np.float32(1), np.float32(0)
        root = np.float32(math.sqrt(block_sum(squares_of_warps, squares) / np.float32(channels) + eps))
        for c in range(thread, channels, THREADS):
            lines[at + c] = lines[at + c] / root
        return root, block_sum(pulls_of_warps, pull) / np.float32(channels) / root

    return prepare


@kernel_factory(("full", "f32", "bf16"), ("full", "bf16", "bf16"), ("pre", "bf16", None), ("pre", "f32", "f32"))
def shares(role, element, gamma_element):
    """What sample b adds to the gradients of its mixing weights; one block a sample, one warp an element.

    Parameters: x, gamma, d, weights, lines, roots, shares, pitch, C, n, eps. ``lines`` [B, 2, C] becomes a / r and the
    gradient of y, ``roots`` [B, 2] r and mean(gamma dy a / r). ``shares`` is [B, n (n + 2)], or [B, n] in role "pre",
    where only s_pre has a share.
    """
    load, (scale_of, gamma_pointer) = ELEMENTS[element].load, _scale(gamma_element, element)
    prepare, full = _prepare(role, element, gamma_element), role == "full"

    def kernel(x, gamma, d, weights, lines, roots, shares, pitch, channels, n, eps):
        squares_of_warps = cuda.shared.array(WARPS, np.float32)
        pulls_of_warps = cuda.shared.array(WARPS, np.float32)
        thread, b = np.int64(warp.thread_index()), warp.block_x()
        sample, at, width = b * n * channels, b * np.int64(2) * channels, n * (n + np.int64(2)) if full else n
        root, pull = prepare(
            x, gamma, d, weights, b * pitch, lines, at, b, channels, n, eps, squares_of_warps, pulls_of_warps
        )
        warp.block_barrier()
        if thread == np.int64(0):
            roots[b * np.int64(2)] = root
            roots[b * np.int64(2) + np.int64(1)] = pull

        lane = thread % np.int64(WARP)
        for e in range(thread // np.int64(WARP), width, WARPS):
            row = np.int64(np.uint32(e) // np.uint32(n))
            column = e - row * n
            total = np.float32(0)
            for c in range(lane, channels, WARP):
                if row == np.int64(0):
                    da = _d_aggregate(lines, at, channels, c, scale_of(gamma, c), pull, root)
                    total += da * load(x, sample + column * channels + c)
                elif full and row == np.int64(1):
                    total += load(d, sample + column * channels + c) * (scale_of(gamma, c) * lines[at + c])
                elif full:
                    g = load(d, sample + (row - np.int64(2)) * channels + c)
                    total += g * load(x, sample + column * channels + c)
            total = warp.warp_sum(total)
            if lane == np.int64(0):
                shares[b * width + e] = total

    pointer = ELEMENTS[element].pointer
    parameters = (pointer, gamma_pointer, pointer, f32p, f32p, f32p, f32p, i64, i64, i64, f32)
    return kernel, parameters, {"threads": THREADS}


@functools.cache
def _lift(projection: str | None, element: str) -> tuple[Callable, object]:
    """A device function: what the projection adds to the gradient of x at flat place k, and projection's pointer type.

    ``lifts`` is a line [n (n + 2) + 1]: the gradient of P, and what x itself is multiplied by.
    """
    found, load = ELEMENTS[projection or "f32"], ELEMENTS[element].load
    load_projection, projected = found.load, projection is not None

    @device
    def lift(x, at, rows, lifts, line, k, flat, outputs):
        if not projected:
            return np.float32(0)
        total = lifts[line + outputs] * load(x, at)
        for e in range(outputs):
            total += lifts[line + e] * load_projection(rows, e * flat + k)
        return total

    return lift, found.pointer


@kernel_factory(
    ("full", "f32", "bf16", None), ("full", "bf16", "bf16", "bf16"), ("pre", "bf16", None, "f32"),
    ("pre", "f32", "f32", None),
)  # fmt: skip
def spread(role, element, gamma_element, projection):
    """d_x[b, j] = carried[b, j] + s_pre[j] da[b], and where H is dynamic what comes through it; one block a sample.

    Carried is sum_i M[i, j] d[b, i] in role "full" and d[b, j] itself in role "pre", where ``d`` has x's shape.
    Parameters: x, gamma, d, weights, lines, roots, projection, lifts, d_x, pitch, C, n. ``projection`` and ``lifts``
    [B, n (n + 2) + 1] are not read where the choice is None.
    """
    load, store = ELEMENTS[element].load, ELEMENTS[element].store
    (scale_of, gamma_pointer), (lift, projection_pointer) = _scale(gamma_element, element), _lift(projection, element)
    full = role == "full"

    def kernel(x, gamma, d, weights, lines, roots, projection_rows, lifts, d_x, pitch, channels, n):
        b = warp.block_x()
        sample, line, outputs = b * n * channels, b * pitch, n * (n + np.int64(2))
        at, lifts_at = b * np.int64(2) * channels, b * (outputs + np.int64(1))
        root, pull = roots[b * np.int64(2)], roots[b * np.int64(2) + np.int64(1)]
        for c in range(np.int64(warp.thread_index()), channels, THREADS):
            da = _d_aggregate(lines, at, channels, c, scale_of(gamma, c), pull, root)
            for j in range(n):
                k = j * channels + c
                carried = np.float32(0)
                if full:
                    for i in range(n):
                        weight = weights[line + (np.int64(2) + i) * n + j]
                        carried += weight * load(d, sample + i * channels + c)
                else:
                    carried = load(d, sample + k)
                through = lift(x, sample + k, projection_rows, lifts, lifts_at, k, n * channels, outputs)
                store(d_x, sample + k, carried + weights[line + j] * da + through)

    pointer = ELEMENTS[element].pointer
    parameters = (
        pointer, gamma_pointer, pointer, f32p, f32p, f32p, projection_pointer, f32p, pointer, i64, i64, i64,
    )  # fmt: skip
    return kernel, parameters, {"threads": THREADS}


@kernel_factory((True,), (False,))
def sum_shares(partial_shares):
    """The samples' shares added up: the gradients of M, of h_pre and of h_post of a static H; one block an element.

    Parameters: shares, more, h_pre, h_post, d_mixing, d_h_pre, d_h_post, width, n, B. ``shares`` is [B, width]; where
    they are partial, ``more`` [n (n + 2)] is added to them, else it is not read.
    """

    def kernel(shares, more, h_pre, h_post, d_mixing, d_h_pre, d_h_post, width, n, batch):
        partial = cuda.shared.array(WARPS, np.float32)
        thread, e = np.int64(warp.thread_index()), warp.block_x()
        total = np.float32(0)
        if e < width:
            for b in range(thread, batch, THREADS):
                total += shares[b * width + e]
        total = block_sum(partial, total)
        if partial_shares:
            total += more[e]
        if thread == np.int64(0):
            if e < n:
                s = sigmoid(h_pre[e])
                d_h_pre[e] = total * s * (np.float32(1) - s)
            elif e < n + n:
                s = sigmoid(h_post[e - n])
                d_h_post[e - n] = total * np.float32(2) * s * (np.float32(1) - s)
            else:
                d_mixing[e - n - n] = total

    return kernel, (f32p, f32p, f32p, f32p, f32p, f32p, f32p, i64, i64, i64), {"threads": THREADS}


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


@kernel_factory(("bf16",), ("f32",))
def mix_backward(element):
    """d_x[b] = M^T d[b], d_y[b] = sum_i s_post[i] d[b, i], and sample b's shares of s_post and M; one block a sample.

    Parameters: x, y, d, weights, d_x, d_y, shares, pitch, C, n. Those of s_pre in ``shares`` [B, n (n + 2)] become 0.
    """
    load, store, total_of = ELEMENTS[element].load, ELEMENTS[element].store, weighted_sum(element)

    def kernel(x, y, d, weights, d_x, d_y, shares, pitch, channels, n):
        thread, b = np.int64(warp.thread_index()), warp.block_x()
        sample, line, width = b * n * channels, b * pitch, n * (n + np.int64(2))
        for c in range(thread, channels, THREADS):
            store(d_y, b * channels + c, total_of(d, sample + c, weights, line + n, channels, n))
            for j in range(n):
                carried = np.float32(0)
                for i in range(n):
                    carried += weights[line + (np.int64(2) + i) * n + j] * load(d, sample + i * channels + c)
                store(d_x, sample + j * channels + c, carried)

        lane = thread % np.int64(WARP)
        for e in range(thread // np.int64(WARP), width, WARPS):
            row = np.int64(np.uint32(e) // np.uint32(n))
            column = e - row * n
            total = np.float32(0)
            for c in range(lane, channels, WARP):
                if row == np.int64(1):
                    total += load(d, sample + column * channels + c) * load(y, b * channels + c)
                elif row > np.int64(1):
                    g = load(d, sample + (row - np.int64(2)) * channels + c)
                    total += g * load(x, sample + column * channels + c)
            total = warp.warp_sum(total)
            if lane == np.int64(0):
                shares[b * width + e] = total

    pointer = ELEMENTS[element].pointer
    return kernel, (pointer, pointer, pointer, f32p, pointer, pointer, f32p, i64, i64, i64), {"threads": THREADS}
