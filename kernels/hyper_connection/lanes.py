"""Mixing weights of up to four streams with a dynamic H, and their gradient: half a warp a sample.

Of 16 lanes, lane 4 i + j has element (i, j) of M; and lane k, with what lies along a sample's line, the elements k,
k + 16, .... What is computed is said in ``plans/hyper_connection/dynamic.py`` and ``dynamic_backward.py``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np

from kernels import bits, warp
from kernels.hardware import WARP
from kernels.hyper_connection.project import exact_parts
from kernels.hyper_connection.spread_stage import OF_X, PARTS, of_lifts, record_words, rows_of
from kernels.hyper_connection.static import post_weight, pre_weight, sigmoid
from kernels.sinkhorn import MAX_EXPONENT, clamped, exponential
from kernels.sinkhorn_thread import inverse, line_scale
from kernels.target import cuda, device, f32, f32p, i64, kernel_factory

MOST_STREAMS = 4
LANES = 16
"""Lanes of a sample."""
WARPS = 8
FEWER_WARPS = 2
"""Warps of a block, and where so many samples' divisors do not fit in shared memory."""
_AHEAD = 8


def samples_of(warps: int) -> int:
    """Samples of a block."""
    return warps * WARP // LANES


def kept_bytes(warps: int, iterations: int) -> int:
    """Shared memory for the divisors of all steps of a block's samples."""
    return samples_of(warps) * 2 * iterations * 4 * MOST_STREAMS


@device
def line_sum(x, first):
    """Of a matrix, over a row for ``first`` 1, over a column for 4."""
    x = x + warp.shuffle_xor(x, np.uint32(first))
    return x + warp.shuffle_xor(x, np.uint32(2 * first))


@functools.cache
def _start(mode: str) -> Callable:
    """A device function: an element of the first matrix for its logit, and softmax's part of it; 0 where there is none.

    Where ``inside`` is false the logit is not looked at.
    """
    softmax = mode == "softmax"

    @device
    def start(logit, inside, eps):
        if not softmax:
            return (exponential(clamped(logit)) if inside else np.float32(0)), np.float32(0)
        top = logit if inside else np.float32(-3.0e38)
        top = max(top, warp.shuffle_xor(top, np.uint32(1)))
        top = max(top, warp.shuffle_xor(top, np.uint32(2)))
        power = exponential(logit - top) if inside else np.float32(0)
        share = power * inverse(line_sum(power, 1))
        return (share + eps if inside else np.float32(0)), share

    return start


@functools.cache
def mixing_by_lanes(mode: str) -> Callable:
    """A device function of a warp: an element of Sinkhorn's result for its logit, of two matrices at once."""
    softmax, scale_of, start = mode == "softmax", line_scale(mode), _start(mode)

    @device
    def project(logit, inside, iterations, eps):
        x, _ = start(logit, inside, eps)
        for iteration in range(iterations):
            if not softmax or iteration > 0:
                x = x * scale_of(line_sum(x, 1), eps)
            x = x * scale_of(line_sum(x, 4), eps)
        return x

    return project


@functools.cache
def gradient_by_lanes(mode: str) -> Callable:
    """A device function of a warp: the gradient of a logit for that of M's element, of two matrices at once.

    ``kept`` has from ``at`` on four places a step, for the sample's divisors, 0 of a line that the guard left as it is.
    Steps are gone back through as in ``kernels/sinkhorn_thread.py``.
    """
    softmax, scale_of, start = mode == "softmax", line_scale(mode), _start(mode)
    first = 1 if softmax else 0

    @device
    def step_forth(x, kept, at, step, by_row, i, j, eps):
        total = line_sum(x, 1) if by_row else line_sum(x, 4)
        if (j if by_row else i) == np.uint32(0):
            divisor = total + eps if softmax else (total if total > eps else np.float32(0))
            kept[at + np.int64(4 * step) + np.int64(i if by_row else j)] = divisor
        return x * scale_of(total, eps)

    @device
    def step_back(x, g, kept, at, step, by_row, i, j):
        divisor = kept[at + np.int64(4 * step) + np.int64(i if by_row else j)]
        total = line_sum(g, 1) if by_row else line_sum(g, 4)
        if divisor != np.float32(0):
            g, x = g - x * total, x * divisor
        return x, g

    @device
    def back(logit, d_mixing, inside, kept, at, i, j, iterations, eps):
        x, share = start(logit, inside, eps)
        for iteration in range(iterations):
            if not softmax or iteration > 0:
                x = step_forth(x, kept, at, 2 * iteration, True, i, j, eps)
            x = step_forth(x, kept, at, 2 * iteration + 1, False, i, j, eps)
        warp.sync_warp()
        g = d_mixing * x if inside else np.float32(0)
        for after in range(iterations):
            step = 2 * (iterations - 1 - after)
            x, g = step_back(x, g, kept, at, step + 1, False, i, j)
            if step >= first:
                x, g = step_back(x, g, kept, at, step, True, i, j)
        if softmax:
            g = g * (share * inverse(share + eps))
            return g - share * line_sum(g, 1)
        return np.float32(0) if logit > np.float32(MAX_EXPONENT) else g

    return back


@functools.cache
def along_lanes(n: int) -> SimpleNamespace:
    """Device functions for what lies along a sample's line of n (n + 2) elements, element k + 16 s in a lane's s-th."""
    outputs = n * (n + 2)

    @device
    def place():
        """The sample's place in the warp, and the lane's among its 16."""
        lane = np.uint32(warp.thread_index() % np.uint32(WARP))
        return np.uint32(lane >> np.uint32(4)), np.uint32(lane & np.uint32(LANES - 1))

    @device
    def taken(values, slots, e, half):
        """Element e of the lane's sample."""
        source, found = np.uint32(np.uint32(half * np.uint32(LANES)) + np.uint32(e % np.uint32(LANES))), np.float32(0)
        for s in range(slots):
            value = warp.shuffle_from(values[s], source)
            if np.uint32(e // np.uint32(LANES)) == np.uint32(s):
                found = value
        return found

    @device
    def factor(alpha, e):
        """Alpha of an element's group."""
        return alpha[np.uint32(0) if e < np.uint32(n) else (np.uint32(1) if e < np.uint32(2 * n) else np.uint32(2))]

    @device
    def logit(p, root, alpha, bias, e):
        return factor(alpha, e) * (p / root) + bias[e] if e < np.uint32(outputs) else np.float32(0)

    @device
    def cell(k):
        """The lane's row and column of M, and which of the line's elements it has; the first one's if it has none."""
        i, j = np.uint32(k >> np.uint32(2)), np.uint32(k & np.uint32(3))
        inside = i < np.uint32(n) and j < np.uint32(n)
        return (
            i,
            j,
            inside,
            np.uint32(np.uint32(2 * n) + np.uint32(i * np.uint32(n)) + j) if inside else np.uint32(2 * n),
        )

    @device
    def owner(half, e):
        """The lane of the warp that has the M of a line's element; some lane where that is no M's."""
        of_cell = np.uint32(max(np.int64(e) - np.int64(2 * n), np.int64(0)))
        k = np.uint32(np.uint32(np.uint32(of_cell // np.uint32(n)) * np.uint32(4)) + np.uint32(of_cell % np.uint32(n)))
        return np.uint32(np.uint32(half * np.uint32(LANES)) + np.uint32(k & np.uint32(LANES - 1)))

    return SimpleNamespace(place=place, taken=taken, owner=owner, factor=factor, logit=logit, cell=cell)


@kernel_factory(("exp", 1), ("exp", 2), ("exp", 4), ("softmax", 4))
def sample_weights_by_lanes(mode, n):
    """Lines of ``projected`` and of mixing weights from parts of P and of the sum of squares; half a warp a sample.

    Parameters: parts, alpha, bias, projected, weights, splits, B, flat, iterations, eps. ``parts`` [splits, B,
    n (n + 2) + 1] are added up in their order.
    """
    outputs, along, project, s_pre = n * (n + 2), along_lanes(n), mixing_by_lanes(mode), pre_weight(mode)
    place, taken, logit_of, cell_of = along.place, along.taken, along.logit, along.cell
    slots = -(-(outputs + 1) // LANES)

    @device
    def total_of(parts, at, splits, stride):
        """The sum over the splits, of which several are read at once."""
        total = np.float32(0)
        values = cuda.local.array(_AHEAD, np.float32)
        for first in range(np.int64(0), splits, _AHEAD):
            for k in range(_AHEAD):
                split = first + np.int64(k)
                values[k] = parts[at + split * stride] if split < splits else np.float32(0)
            for k in range(_AHEAD):
                total += values[k]
        return total

    def kernel(parts, alpha, bias, projected, weights, splits, batch, flat, iterations, eps):
        p = cuda.local.array(slots, np.float32)
        logits = cuda.local.array(slots, np.float32)
        half, k = place()
        own = np.int64(np.uint32(warp.thread_index() // np.uint32(LANES)))
        b = warp.block_x() * np.int64(2 * WARPS) + own
        there, sample = b < batch, min(b, batch - np.int64(1))
        line, to = sample * np.int64(outputs + 1), sample * np.int64(outputs)
        for s in range(slots):
            e = np.uint32(k + np.uint32(LANES * s))
            p[s] = np.float32(0)
            if e <= np.uint32(outputs):
                p[s] = total_of(parts, line + np.int64(e), splits, batch * np.int64(outputs + 1))
        root = np.float32(math.sqrt(taken(p, slots, np.uint32(outputs), half) / np.float32(flat) + eps))
        for s in range(slots):
            e = np.uint32(k + np.uint32(LANES * s))
            logits[s] = logit_of(p[s], root, alpha, bias, e)
            if there and e <= np.uint32(outputs):
                projected[line + np.int64(e)] = p[s] if e < np.uint32(outputs) else root
        if there and k < np.uint32(2 * n):
            weights[to + np.int64(k)] = s_pre(logits[0], eps) if k < np.uint32(n) else post_weight(logits[0])
        _, _, inside, e = cell_of(k)
        x = project(taken(logits, slots, e, half), inside, iterations, eps)
        if there and inside:
            weights[to + np.int64(e)] = x

    return kernel, (f32p,) * 5 + (i64, i64, i64, i64, f32), {"threads": WARP * WARPS}


@functools.cache
def _block_parts(n: int, warps: int) -> Callable:
    """A device function: the block's sums for the gradients of bias and alpha, n (n + 2) and 3 of them, in one order.

    ``d`` and ``of_alpha`` are those of a line's elements, zeros beside it; ``sums`` has 32 places a warp.
    """
    outputs = n * (n + 2)
    slots = -(-outputs // LANES)

    @device
    def group_sum(values, k, first, last):
        total = np.float32(0)
        for s in range(slots):
            e = np.uint32(k + np.uint32(LANES * s))
            if e >= np.uint32(first) and e < np.uint32(last):
                total += values[s]
        return warp.warp_sum(total)

    @device
    def write(d, of_alpha, k, sums, parts):
        thread = warp.thread_index()
        lane = np.uint32(thread % np.uint32(WARP))
        own = np.uint32(thread - lane)
        for s in range(slots):
            total = d[s] + warp.shuffle_xor(d[s], np.uint32(LANES))
            e = np.uint32(k + np.uint32(LANES * s))
            if lane < np.uint32(LANES) and e < np.uint32(outputs):
                sums[own + e] = total
        pre, post = group_sum(of_alpha, k, 0, n), group_sum(of_alpha, k, n, 2 * n)
        mixing = group_sum(of_alpha, k, 2 * n, outputs)
        mine = pre if lane == np.uint32(0) else (post if lane == np.uint32(1) else mixing)
        if lane < np.uint32(3):
            sums[own + np.uint32(outputs) + lane] = mine
        warp.block_barrier()
        if thread < np.uint32(outputs + 3):
            total = np.float32(0)
            for i in range(warps):
                total += sums[np.uint32(thread + np.uint32(i * WARP))]
            parts[warp.block_x() * np.int64(outputs + 3) + np.int64(thread)] = total

    return write


@functools.cache
def _write_lifts(n: int) -> Callable:
    """A device function: a sample's lifts to its record, in bf16 parts."""
    rows, record, lifts_at = rows_of(n), record_words(n, True), of_lifts(n)
    slots = -(-rows // LANES)

    @device
    def write(lift, k, records, b):
        for s in range(slots):
            e = np.int64(np.uint32(k + np.uint32(LANES * s)))
            words = exact_parts(lift[s], warp.shuffle_xor(lift[s], np.uint32(1)))
            if e % np.int64(2) == np.int64(0) and e < np.int64(rows):
                to = b * np.int64(record) + np.int64(lifts_at) + e // np.int64(2)
                for part in range(PARTS):
                    records[to + np.int64(part * rows // 2)] = bits.bits_f32(words[part])

    return write


@kernel_factory(("exp", 1, WARPS), ("exp", 2, WARPS), ("exp", 4, WARPS), ("softmax", 4, FEWER_WARPS))
def sample_weights_by_lanes_backward(mode, n, warps):
    """From the gradients of mixing weights to the records' lifts, and sums for the gradients of bias and alpha.

    Parameters: projected, alpha, bias, shares, records, parts, B, iterations, eps, flat. ``shares`` [B, n (n + 2)];
    what ``records`` hold is said in ``spread_stage.py``, lifts being alpha d_logits / r, and that of x
    -sum(d_logits alpha P) / (r**3 flat); where blocks go beyond the last sample lifts are zero. ``parts`` [blocks,
    n (n + 2) + 3].
    """
    outputs, along, back, record = n * (n + 2), along_lanes(n), gradient_by_lanes(mode), record_words(n, True)
    slots, place, taken, logit_of, cell_of = -(-rows_of(n) // LANES), along.place, along.taken, along.logit, along.cell
    factor, owner_of = along.factor, along.owner
    write_parts, write_lifts, sums_length = _block_parts(n, warps), _write_lifts(n), warps * WARP

    @device
    def of_weight(logit, share, k):
        """The gradient of a logit of s_pre or s_post."""
        s = sigmoid(logit)
        factor = np.float32(1) if k < np.uint32(n) else np.float32(2)
        return share * factor * s * (np.float32(1) - s)

    def kernel(projected, alpha, bias, shares, records, parts, batch, iterations, eps, flat):
        kept = cuda.shared.array(0, np.float32)
        sums = cuda.shared.array(sums_length, np.float32)
        logits = cuda.local.array(slots, np.float32)
        d = cuda.local.array(slots, np.float32)
        lift = cuda.local.array(slots, np.float32)
        ratio = cuda.local.array(slots, np.float32)
        half, k = place()
        own = np.int64(np.uint32(warp.thread_index() // np.uint32(LANES)))
        b = warp.block_x() * np.int64(2 * warps) + own
        there, sample = b < batch, min(b, batch - np.int64(1))
        line, to = sample * np.int64(outputs + 1), sample * np.int64(outputs)
        root = projected[line + np.int64(outputs)]
        for s in range(slots):
            e = np.uint32(k + np.uint32(LANES * s))
            p = projected[line + np.int64(e)] if e < np.uint32(outputs) else np.float32(0)
            logits[s], ratio[s] = logit_of(p, root, alpha, bias, e), p / root
        i, j, inside, e = cell_of(k)
        of_mixing = back(
            taken(logits, slots, e, half), shares[to + np.int64(e)], inside, kept,
            own * np.int64(2 * MOST_STREAMS) * iterations, i, j, iterations, eps,
        )  # fmt: skip
        pull = np.float32(0)
        for s in range(slots):
            e = np.uint32(k + np.uint32(LANES * s))
            d[s] = warp.shuffle_from(of_mixing, owner_of(half, e))
            lift[s] = np.float32(0)
            if e < np.uint32(2 * n):
                d[s] = of_weight(logits[s], shares[to + np.int64(e)], e)
            if e < np.uint32(outputs) and there:
                lift[s] = d[s] * factor(alpha, e) / root
            else:
                d[s] = np.float32(0)
            pull += lift[s] * ratio[s]
            ratio[s] = d[s] * ratio[s]
        for shift in range(4):
            pull += warp.shuffle_xor(pull, np.uint32(np.uint32(1) << np.uint32(shift)))
        write_lifts(lift, k, records, b)
        if k == np.uint32(0):
            records[b * np.int64(record) + np.int64(OF_X)] = -(pull / (root * np.float32(flat)))
        write_parts(d, ratio, k, sums, parts)

    return kernel, (f32p,) * 6 + (i64, i64, f32, i64), {"threads": WARP * warps}
