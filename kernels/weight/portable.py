"""The portable weight kernels: any source, sink, layout and kind, one element at a time, in pairs of fp32.

``merge``: out = round(W + delta), or round(delta). ``dora``: V = W + delta, out = round(W + s (g V - W)) with a
gain g per output row or input channel, which ``dora_gain`` computes first: g = magnitude / (norm(V) + eps).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import numpy as np

from kernels import warp
from kernels.bits import not_finite
from kernels.double_float import add_pairs, rounded_pair
from kernels.elements import ELEMENTS
from kernels.target import SIMULATOR, cuda, device, f32, f32p, i32p, i64, kernel_factory, types
from kernels.weight.sources import source_parameters, summed

THREADS = 32 if SIMULATOR else 256
DORA_EPS = np.float32(2.0**-23)


@functools.cache
def native_coordinates(layout: str) -> tuple[Callable, Callable]:
    """Device functions (row, column, channels, taps) -> o, j for a stored layout.

    "oi": [O, I * taps], as in checkpoint files. "io": [taps * I, O], FLAME's [in, out] and [KH, KW, IC, OC].
    """
    if layout == "oi":

        @device
        def o_of(row, column, channels, taps):
            return row

        @device
        def j_of(row, column, channels, taps):
            return column

    else:

        @device
        def o_of(row, column, channels, taps):
            return column

        @device
        def j_of(row, column, channels, taps):
            tap = row // channels
            return (row - tap * channels) * taps + tap

    return o_of, j_of


@functools.cache
def _base_loader(base: str | None) -> Callable:
    if base is None:

        @device
        def no_base(pointer, index):
            return np.float32(0)

        return no_base
    return ELEMENTS[base].load


@functools.cache
def _finite_check(check: bool, out: str) -> Callable:
    """Raises a flag where a result is not finite once rounded."""
    rounded = ELEMENTS[out].rounded

    @device
    def raise_flag(flag, x):
        if check and not_finite(rounded(x)):
            flag[0] = np.int32(1)

    return raise_flag


_OI = ("low_rank", "bf16", "bf16")
_EXAMPLES = (
    ("bf16", "bf16", (_OI,), "oi", None, True),
    (None, "bf16", (("hadamard", "bf16", "f16", "f32", "bf16"),), "io", None, False),
    ("f16", "f16", (("kronecker", "f16", "f32"), ("channel", "f32", "in")), "oi", None, True),
    ("f32", "f32", (("dense", "f32"),), "oi", "row", True),
)


@kernel_factory(*_EXAMPLES)
def merge(base, out, sources, layout, gain_axis, check):
    """out[row, column] = round(W + delta); with ``gain_axis`` "row" or "column" DoRA's scaled sum.

    Parameters: base, out, blocks in a row, columns, channels, taps, flag, sources, (gain, strength).
    """
    load, store = _base_loader(base), ELEMENTS[out].store
    total = summed(sources)
    o_of, j_of = native_coordinates(layout)
    check_finite = _finite_check(check, out)
    combine = _combine(gain_axis)

    def kernel(base_pointer, out_pointer, row_blocks, columns, channels, taps, flag, sources_p, sink_p):
        block = warp.block_x()
        row = block // row_blocks
        column = (block - row * row_blocks) * np.int64(THREADS) + np.int64(warp.thread_index())
        if column < columns:
            index = row * columns + column
            o = o_of(row, column, channels, taps)
            j = j_of(row, column, channels, taps)
            w = load(base_pointer, index)
            delta, delta_low = total(sources_p, o, j, w)
            v, v_low = add_pairs(w, np.float32(0), delta, delta_low)
            x = combine(w, rounded_pair(v, v_low), o, j, taps, sink_p)
            check_finite(flag, x)
            store(out_pointer, index, x)

    parameters = (
        ELEMENTS[base or out].pointer, ELEMENTS[out].pointer, i64, i64, i64, i64, i32p,
        types.Tuple([source_parameters(s) for s in sources]), types.Tuple((f32p, f32)),
    )  # fmt: skip
    return kernel, parameters, {"threads": THREADS}


@functools.cache
def _combine(gain_axis: str | None) -> Callable:
    if gain_axis is None:

        @device
        def merged(w, v, o, j, taps, p):
            return v

        return merged
    per_row = gain_axis == "row"

    @device
    def decompose(w, v, o, j, taps, p):
        gain = p[0][o if per_row else j // taps]
        return w + p[1] * (gain * v - w)

    return decompose


@kernel_factory(("bf16", (_OI,), "oi", "row", "f32"), ("bf16", (_OI,), "io", "column", "bf16"))
def dora_gain(base, sources, layout, axis, magnitude):
    """gain[c] = magnitude[c] / (norm of V over c + eps), one block per output row or input channel c.

    Parameters: base, gain, magnitude, O, channels, taps, sources. The sum of squares is a fixed tree.
    """
    load, load_magnitude = ELEMENTS[base].load, ELEMENTS[magnitude].load
    total = summed(sources)
    per_row, native = axis == "row", layout == "oi"

    def kernel(base_pointer, gain, magnitude_pointer, outputs, channels, taps, sources_p):
        partial = cuda.shared.array(THREADS, np.float32)
        thread = warp.thread_index()
        c = warp.block_x()
        columns = channels * taps
        count = columns if per_row else outputs * taps
        squares = np.float32(0)
        position = np.int64(thread)
        while position < count:
            if per_row:
                o = c
                j = position
            else:
                o = position // taps
                j = c * taps + position - o * taps
            if native:
                index = o * columns + j
            else:
                channel = j // taps
                index = ((j - channel * taps) * channels + channel) * outputs + o
            w = load(base_pointer, index)
            delta, delta_low = total(sources_p, o, j, w)
            v = w + (delta + delta_low)
            squares += v * v
            position += np.int64(THREADS)
        partial[thread] = squares
        warp.block_barrier()
        width = THREADS // 2
        while width > 0:
            if np.int64(thread) < width:
                partial[thread] = partial[thread] + partial[np.int64(thread) + width]
            warp.block_barrier()
            width //= 2
        if thread == np.uint32(0):
            norm = np.float32(math.sqrt(partial[0]))
            gain[c] = load_magnitude(magnitude_pointer, c) / (norm + DORA_EPS)

    parameters = (
        ELEMENTS[base].pointer, f32p, ELEMENTS[magnitude].pointer, i64, i64, i64,
        types.Tuple([source_parameters(s) for s in sources]),
    )  # fmt: skip
    return kernel, parameters, {"threads": THREADS}
