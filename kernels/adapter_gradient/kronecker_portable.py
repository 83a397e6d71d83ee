"""Gradients of both of a LoKr's factors, as of `kronecker`, for any kinds and extents."""

from __future__ import annotations

import numpy as np

from kernels.adapter_gradient.kronecker import IN_BLOCKS, IN_WIDTH, OUT_BLOCKS, OUT_WIDTH, ROWS
from kernels.elements import ELEMENTS
from kernels.hardware import WARP
from kernels.target import device, f32, i64, kernel_factory, types
from kernels.warp import block_x, thread_index, warp_sum

_u32 = np.uint32


@device
def _split(place, columns):
    """The row and the column of an element."""
    row = _u32(_u32(place) // _u32(columns))
    return np.int64(row), np.int64(_u32(_u32(place) - _u32(row * _u32(columns))))


@kernel_factory(("f32", "bf16"), ("f16", "f32"))
def kronecker_gradient_portable(out: str, kind: str):
    """A warp an element of either gradient, rounded once.

    Parameters: both gradients, g, x, w1, w2, :data:`ROWS` to :data:`IN_WIDTH`, scale. Blocks: d_w1's elements, d_w2's.
    """
    load, store = ELEMENTS[kind].load, ELEMENTS[out].store

    @device
    def grown(g, w2, start, extents, e):
        value = np.float32(0)
        for i in range(_u32(extents[OUT_WIDTH])):
            value += load(g, start + np.int64(i)) * load(w2, np.int64(i) * extents[IN_WIDTH] + e)
        return value

    @device
    def first(g, x, w2, extents, place, lane):
        (line, column), value = _split(place, extents[IN_BLOCKS]), np.float32(0)
        for turn in range(_u32(extents[ROWS])):
            of_g = (np.int64(turn) * extents[OUT_BLOCKS] + line) * extents[OUT_WIDTH]
            of_x = (np.int64(turn) * extents[IN_BLOCKS] + column) * extents[IN_WIDTH]
            for step in range(_u32(_u32(extents[IN_WIDTH]) + _u32(31)) >> _u32(5)):
                e = np.int64(_u32(_u32(_u32(step) << _u32(5)) + lane))
                if e < extents[IN_WIDTH]:
                    value += grown(g, w2, of_g, extents, e) * load(x, of_x + e)
        return value

    @device
    def mixed(x, w1, start, line, extents, e):
        value = np.float32(0)
        for m in range(_u32(extents[IN_BLOCKS])):
            value += load(w1, line * extents[IN_BLOCKS] + np.int64(m)) * load(
                x, start + np.int64(m) * extents[IN_WIDTH] + e
            )
        return value

    @device
    def second(g, x, w1, extents, place, lane):
        (line, column), value, row = _split(place, extents[IN_WIDTH]), np.float32(0), np.int64(lane)
        while row < extents[ROWS]:
            start = row * extents[IN_BLOCKS] * extents[IN_WIDTH]
            for block in range(_u32(extents[OUT_BLOCKS])):
                of_g = (row * extents[OUT_BLOCKS] + np.int64(block)) * extents[OUT_WIDTH] + line
                value += load(g, of_g) * mixed(x, w1, start, np.int64(block), extents, column)
            row += np.int64(WARP)
        return value

    def kernel(d_w1, d_w2, g, x, w1, w2, extents, scale):
        place, lane = block_x(), thread_index()
        elements = extents[OUT_BLOCKS] * extents[IN_BLOCKS]
        if place < elements:
            value = warp_sum(first(g, x, w2, extents, place, lane))
            if lane == _u32(0):
                store(d_w1, place, scale * value)
        else:
            value = warp_sum(second(g, x, w1, extents, place - elements, lane))
            if lane == _u32(0):
                store(d_w2, place - elements, scale * value)

    pointers = (*(ELEMENTS[out].pointer,) * 2, *(ELEMENTS[kind].pointer,) * 4)
    return kernel, (*pointers, types.Tuple((i64,) * 5), f32), {"threads": WARP}
