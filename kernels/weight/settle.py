"""Ties settled: results that a tensor core's sum leaves in doubt are made again in pairs of fp32.

A tile's element x is wrong by at most ``reach``, which its sources add up from the magnitudes of their terms. Where
x - reach and x + reach round to the same value, so does the exact result; elsewhere, rarely, the element is evaluated
by the formulas of :mod:`kernels.weight.sources` (Ziv, Fast evaluation of elementary mathematical functions with
correctly rounded last bit, 1991). What roundings of W, of the delta and of their sum are worth is left to the golden
rule, which allows 2**-12 ulp + 8 * 2**-24 * (|W| + |delta|); an fp32 result is in doubt where its reach is above
2**-21 of W and itself.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import numpy as np

from kernels import bits
from kernels.bits import magnitude
from kernels.target import cuda, device
from kernels.weight.low_rank_tile import RESULTS, ROWS_OF_LANE, Tile
from kernels.weight.sources import summed
from kernels.weight.tile_sources import Source, point_name

_FP32_SLACK = np.float32(2.0**-21)
_FIRST, _SECOND = np.uint32(0xFFFF), np.uint32(0xFFFF0000)
_PAIRS = RESULTS // 2


@device
def _doubts_f32(x, x_reach, w, y, y_reach, v):
    found = np.uint32(0)
    if not x_reach <= _FP32_SLACK * max(magnitude(x), magnitude(w)):
        found = _FIRST
    if not y_reach <= _FP32_SLACK * max(magnitude(y), magnitude(v)):
        found = np.uint32(found | _SECOND)
    return found


def _doubts(out: str) -> Callable:
    """``doubts(x, x_reach, w, y, y_reach, v)``: bits in the lower half where x, in the upper where y is in doubt.

    w and v are the base's elements there.
    """
    if out == "f32":
        return _doubts_f32
    pack = bits.PACK[out]

    @device
    def doubts(x, x_reach, w, y, y_reach, v):
        return np.uint32(pack(x - x_reach, y - y_reach) ^ pack(x + x_reach, y + y_reach))

    return doubts


def settler(out: str, sources: tuple[Source, ...], finish: SimpleNamespace, tile: Tile) -> Callable:
    """``settle(state, delta, reach, w, p, sink_p, row, rows, column, columns)``: a lane's delta becomes its results.

    ``finish`` is the sink. Lanes come back one by one: what a warp does together has to wait for all.
    """
    doubts, ragged = _doubts(out), tile.ragged
    combine, widen, combine_pair = finish.combine, finish.widen, finish.combine_pair
    exact_delta = summed(tuple(map(point_name, sources)), narrow=True)

    @device
    def evaluate(lowest, state, delta, w, p, sink_p, row, column):
        """The one element whose bit is set."""
        o, j, weight = row, column, w[0]
        for i in range(ROWS_OF_LANE):
            for x in range(8):
                if lowest == np.uint32(1 << 8 * i + x):
                    o, j, weight = row + np.int64(8 * i), column + np.int64(x), w[8 * i + x]
        high, low = exact_delta(p, o, j, weight)
        for i in range(ROWS_OF_LANE):
            result = combine_pair(state, i, high, low, weight, sink_p)
            for x in range(8):
                if lowest == np.uint32(1 << 8 * i + x):
                    delta[8 * i + x] = result

    @device
    def settle(state, delta, reach, w, p, sink_p, row, rows, column, columns):
        found = cuda.local.array(_PAIRS, np.uint32)
        any_found = np.uint32(0)
        for i in range(ROWS_OF_LANE):
            inside = not ragged or (row + np.int64(8 * i) < rows and column < columns)
            for x in range(0, 8, 2):
                at, after = 8 * i + x, 8 * i + x + 1
                at_reach = widen(state, i, reach[at], w[at], sink_p)
                after_reach = widen(state, i, reach[after], w[after], sink_p)
                delta[at] = combine(state, i, delta[at], w[at], sink_p)
                delta[after] = combine(state, i, delta[after], w[after], sink_p)
                differing = doubts(delta[at], at_reach, w[at], delta[after], after_reach, w[after])
                found[at // 2] = differing if inside else np.uint32(0)
                any_found = np.uint32(any_found | found[at // 2])
        if any_found != np.uint32(0):
            left = np.uint32(0)
            for pair in range(_PAIRS):
                if (found[pair] & _FIRST) != np.uint32(0):
                    left = np.uint32(left | np.uint32(1 << 2 * pair))
                if (found[pair] & _SECOND) != np.uint32(0):
                    left = np.uint32(left | np.uint32(2 << 2 * pair))
            while left != np.uint32(0):
                lowest = np.uint32(left & np.uint32(~left + np.uint32(1)))
                evaluate(lowest, state, delta, w, p, sink_p, row, column)
                left = np.uint32(left ^ lowest)

    return settle
