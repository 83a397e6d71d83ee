"""Convolutions and their gradients, channels last, by fp32 FMA: one thread an element, any geometry, groups and kinds.

Weights are read by their strides, so that [out, axes, in] and [out, in, axes] are the same to it.
"""

from __future__ import annotations

import numpy as np

from kernels import warp
from kernels.convolution.geometry import (
    GEOMETRY,
    INPUT,
    OUTPUT,
    axis_source,
    filter_taps,
    gather,
    tap_coordinates,
)
from kernels.elements import ELEMENTS
from kernels.matmul.epilogue import epilogue
from kernels.matmul.problem import COLUMNS, OUT, OUT_BATCH, OUT_STRIDE, ROWS, result_parameters
from kernels.target import SIMULATOR, device, i64, kernel_factory, types

THREADS = 32 if SIMULATOR else 256
GROUP_STEP, COLUMN_STEP, TAP_STEP, DEPTH_STEP = range(4)
"""Positions of a weight's strides: of groups, of the result's channel, of taps, of the channel that is summed over."""
_STRIDES = types.UniTuple(i64, 4)


@kernel_factory(
    (False, "bf16", "bf16", "bf16", ()),
    (False, "f16", "f32", "f32", (("bias", "f32"), ("silu",), ("residual", "f32"))),
    (True, "bf16", "bf16", "bf16", ()),
)
def convolve(transposed, source_kind, weight_kind, out, steps):
    """Y[pixel, group, n] = sum over taps and depth of X[source(pixel, tap), group, depth] W[group, n, tap, depth].

    ``transposed`` is the gradient of the input: pixels of the input, X the result's gradient. Parameters: geometry,
    the result's (rows are pixels, columns channels of a group, the batch groups), groups, X, depth, X's channels, W,
    its strides, the epilogue's.
    """
    load_source, load_weight = ELEMENTS[source_kind].load, ELEMENTS[weight_kind].load
    place, source = gather(transposed)
    one, store = epilogue(steps).one, ELEMENTS[out].store

    @device
    def convolved(g, x, depth, channels, w, strides, place_of_pixel, group, column):
        total = np.float32(0)
        weight_at = group * strides[GROUP_STEP] + column * strides[COLUMN_STEP]
        for tap in range(filter_taps(g)):
            pixel = source(g, place_of_pixel, np.uint32(tap))
            if pixel >= np.int64(0):
                x_at = pixel * channels + group * depth
                w_at = weight_at + np.int64(tap) * strides[TAP_STEP]
                for _ in range(depth):
                    total += load_source(x, x_at) * load_weight(w, w_at)
                    x_at += np.int64(1)
                    w_at += strides[DEPTH_STEP]
        return total

    def kernel(g, result, groups, x, depth, channels, w, strides, e):
        index = warp.block_x() * np.int64(THREADS) + np.int64(warp.thread_index())
        all_columns = np.uint32(groups * result[COLUMNS])
        row = np.uint32(np.uint32(index) // all_columns)
        if np.int64(row) < result[ROWS]:
            channel = np.uint32(np.uint32(index) - np.uint32(row * all_columns))
            group = np.uint32(channel // np.uint32(result[COLUMNS]))
            column = np.int64(np.uint32(channel - np.uint32(group * np.uint32(result[COLUMNS]))))
            value = convolved(g, x, depth, channels, w, strides, place(g, row), np.int64(group), column)
            value = one(value, np.int64(group), np.int64(row), column, e)
            at = np.int64(group) * result[OUT_BATCH] + np.int64(row) * result[OUT_STRIDE] + column
            store(result[OUT], at, value)

    parameters = (
        GEOMETRY, result_parameters(out), i64, ELEMENTS[source_kind].pointer, i64, i64, ELEMENTS[weight_kind].pointer,
        _STRIDES, epilogue(steps).parameters,
    )  # fmt: skip
    return kernel, parameters, {"threads": THREADS}


@kernel_factory(("bf16", "bf16", "f32", ()), ("f32", "f16", "bf16", (("residual", "bf16"),)))
def weight_gradient(source_kind, gradient_kind, out, steps):
    """dW[n, tap, depth] = sum over output pixels of G[pixel, n] X[source(pixel, tap), depth of n's group].

    Parameters: geometry, the result's (rows are all n, columns the depth of a group, the batch taps), the stride of its
    columns, groups, images, G, X, X's channels, the epilogue's. One thread an element.
    """
    load_source, load_gradient = ELEMENTS[source_kind].load, ELEMENTS[gradient_kind].load
    one, store = epilogue(steps).one, ELEMENTS[out].store

    @device
    def summed_line(g, gradient, x, channels, rows, row, taps, channel, pixel, met):
        """Along the last axis, from an output pixel and the input line that it meets."""
        total = np.float32(0)
        for third in range(g[OUTPUT + 2]):
            at = axis_source(g, 2, np.uint32(third), taps[2])
            if at >= np.int64(0):
                x_at = (met * g[INPUT + 2] + at) * channels + channel
                total += load_gradient(gradient, (pixel + np.int64(third)) * rows + row) * load_source(x, x_at)
        return total

    @device
    def summed(g, images, gradient, x, channels, rows, row, tap, channel):
        total, pixel = np.float32(0), np.int64(0)
        taps = tap_coordinates(g, tap)
        for image in range(images):
            for first in range(g[OUTPUT]):
                plane = axis_source(g, 0, np.uint32(first), taps[0])
                for second in range(g[OUTPUT + 1]):
                    line = axis_source(g, 1, np.uint32(second), taps[1])
                    if plane >= np.int64(0) and line >= np.int64(0):
                        met = (np.int64(image) * g[INPUT] + plane) * g[INPUT + 1] + line
                        total += summed_line(g, gradient, x, channels, rows, row, taps, channel, pixel, met)
                    pixel += g[OUTPUT + 2]
        return total

    def kernel(g, result, column_stride, groups, images, gradient, x, channels, e):
        index = np.uint32(warp.block_x() * np.int64(THREADS) + np.int64(warp.thread_index()))
        line = np.uint32(index // np.uint32(result[COLUMNS]))
        column = np.int64(np.uint32(index - np.uint32(line * np.uint32(result[COLUMNS]))))
        taps = filter_taps(g)
        row = np.uint32(line // taps)
        tap = np.uint32(line - np.uint32(row * taps))
        if np.int64(row) < result[ROWS]:
            rows_of_group = np.uint32(np.uint32(result[ROWS]) // np.uint32(groups))
            channel = np.int64(np.uint32(row // rows_of_group)) * result[COLUMNS] + column
            value = summed(g, images, gradient, x, channels, result[ROWS], np.int64(row), tap, channel)
            value = one(value, np.int64(tap), np.int64(row), column, e)
            at = np.int64(tap) * result[OUT_BATCH] + np.int64(row) * result[OUT_STRIDE] + column * column_stride
            store(result[OUT], at, value)

    parameters = (
        GEOMETRY, result_parameters(out), i64, i64, i64, ELEMENTS[gradient_kind].pointer, ELEMENTS[source_kind].pointer,
        i64, epilogue(steps).parameters,
    )  # fmt: skip
    return kernel, parameters, {"threads": THREADS}
