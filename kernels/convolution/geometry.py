"""Which pixel a convolution takes for a pixel and a filter tap, in up to three axes; channels are the last axis.

Geometry is a tuple of integers, three for each of: input extents, output extents, stride, padding, dilation, filter
extents. Axes that a convolution does not have are of extent 1. Pixels are numbered over batch and axes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np

from kernels.target import device, i64, types

INPUT, OUTPUT, STRIDE, PADDING, DILATION, FILTER = range(0, 18, 3)
"""Where each three begin."""
GEOMETRY = types.UniTuple(i64, 18)


@device
def filter_taps(g):
    """Taps of the filter, uint32."""
    return np.uint32(g[FILTER] * g[FILTER + 1] * g[FILTER + 2])


@device
def tap_coordinates(g, tap):
    """The tap's place in the filter, uint32, one for each axis."""
    row = np.uint32(tap // np.uint32(g[FILTER + 2]))
    first = np.uint32(row // np.uint32(g[FILTER + 1]))
    third = np.uint32(tap - np.uint32(row * np.uint32(g[FILTER + 2])))
    return first, np.uint32(row - np.uint32(first * np.uint32(g[FILTER + 1]))), third


@functools.cache
def gather(transposed: bool) -> tuple[Callable, Callable]:
    """(place, source): from output to input pixels; transposed, for the input's gradient, from input to output pixels.

    ``place(g, pixel)`` splits a pixel's number into its image and coordinates, uint32;
    ``source(g, place, tap)`` is the pixel that the tap meets there, int64, or -1 where it meets none.
    """
    to, of = (INPUT, OUTPUT) if transposed else (OUTPUT, INPUT)
    along = _transposed_axis if transposed else axis_source

    @device
    def place(g, pixel):
        line = np.uint32(pixel // np.uint32(g[to + 2]))
        plane = np.uint32(line // np.uint32(g[to + 1]))
        image = np.uint32(plane // np.uint32(g[to]))
        first = np.uint32(plane - np.uint32(image * np.uint32(g[to])))
        second = np.uint32(line - np.uint32(plane * np.uint32(g[to + 1])))
        return image, first, second, np.uint32(pixel - np.uint32(line * np.uint32(g[to + 2])))

    @device
    def source(g, place, tap):
        taps = tap_coordinates(g, tap)
        first = along(g, 0, place[1], taps[0])
        second = along(g, 1, place[2], taps[1])
        third = along(g, 2, place[3], taps[2])
        if first < np.int64(0) or second < np.int64(0) or third < np.int64(0):
            return np.int64(-1)
        return ((np.int64(place[0]) * g[of] + first) * g[of + 1] + second) * g[of + 2] + third

    return place, source


@device
def axis_source(g, axis, coordinate, tap):
    """The input coordinate of an output coordinate and a tap; -1 in the padding."""
    at = np.int64(coordinate) * g[STRIDE + axis] + np.int64(tap) * g[DILATION + axis] - g[PADDING + axis]
    return at if at < g[INPUT + axis] else np.int64(-1)


@device
def _transposed_axis(g, axis, coordinate, tap):
    """The output coordinate that an input coordinate has reached through a tap; -1 if there is none."""
    reach = np.int64(coordinate) + g[PADDING + axis] - np.int64(tap) * g[DILATION + axis]
    if reach < np.int64(0):
        return np.int64(-1)
    step = np.uint32(g[STRIDE + axis])
    at = np.uint32(np.uint32(reach) // step)
    if np.uint32(at * step) != np.uint32(reach) or np.int64(at) >= g[OUTPUT + axis]:
        return np.int64(-1)
    return np.int64(at)
