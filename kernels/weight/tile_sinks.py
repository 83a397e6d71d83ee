"""What becomes of a tile of the delta.

"delta" and "merge" store it, alone or added to the base. DoRA by row takes two passes: "norm" leaves each row's sum of
squares over each tile, "dora" adds those up and applies the gain g:
W + s (g (W + delta) - W) = ((1 - s) + s g) W + s g delta. Each is a launch of its own here; where a cluster of blocks
holds whole rows, `weight/tile_cluster.py` makes both passes in one.

A sink is begin, accumulate (eight elements of the lane's i-th row) and end, with a number of state a row; ``stores``
says whether it writes results. One that does is made of combine (a delta and its base's element to the result) and
store; a settled tile (`weight/settle.py`) also asks it to widen (how wrong a delta is to how wrong its result is) and
to combine_pair (a delta in a pair of fp32). Parameters are (partial sums, magnitude, tiles in a row, strength) for
DoRA.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np

from kernels import warp
from kernels.bits import magnitude
from kernels.double_float import add_pairs, multiply_pairs, rounded_pair
from kernels.elements import ELEMENTS
from kernels.target import device
from kernels.weight.low_rank_tile import ROWS_OF_LANE
from kernels.weight.portable import DORA_EPS

STATE_WORDS = 2 * ROWS_OF_LANE + 1
_TWO_ROUNDINGS = np.float32(2.0**-23)


@device
def _begin_nothing(state, row, rows, lane, p):
    pass


@device
def _end_nothing(state, tile_column, row, rows, lane, p):
    pass


@device
def _as_wide(state, i, reach, w, p):
    return reach


def _store_sink(
    out_element: SimpleNamespace,
    combine: Callable,
    combine_pair: Callable,
    begin: Callable = _begin_nothing,
    widen: Callable = _as_wide,
) -> SimpleNamespace:
    store8 = out_element.store8

    @device
    def accumulate(state, i, out_pointer, index, delta, w, trace, p):
        for x in range(8):
            delta[8 * i + x] = combine(state, i, delta[8 * i + x], w[8 * i + x], p)
        return store8(out_pointer, index, delta, 8 * i, trace)

    return SimpleNamespace(
        begin=begin, accumulate=accumulate, end=_end_nothing, stores=True, store=store8, combine=combine,
        combine_pair=combine_pair, widen=widen,
    )  # fmt: skip


def _merge_sink(has_base: bool) -> Callable:
    def make(out_element: SimpleNamespace) -> SimpleNamespace:
        @device
        def add_base(state, i, delta, w, p):
            return w + delta if has_base else delta

        @device
        def add_base_pair(state, i, high, low, w, p):
            high, low = add_pairs(w if has_base else np.float32(0), np.float32(0), high, low)
            return rounded_pair(high, low)

        return _store_sink(out_element, add_base, add_base_pair)

    return make


def _norm_sink(out_element: SimpleNamespace) -> SimpleNamespace:
    @device
    def begin(state, row, rows, lane, p):
        for i in range(ROWS_OF_LANE):
            state[i] = np.float32(0)

    @device
    def accumulate(state, i, out_pointer, index, delta, w, trace, p):
        for x in range(8):
            v = w[8 * i + x] + delta[8 * i + x]
            state[i] += v * v
        return trace

    @device
    def end(state, tile_column, row, rows, lane, p):
        for i in range(ROWS_OF_LANE):
            total = warp.quad_sum(state[i])
            o = row + np.int64(8 * i)
            if (lane & np.uint32(3)) == np.uint32(0) and o < rows:
                p[0][tile_column * rows + o] = total

    return SimpleNamespace(begin=begin, accumulate=accumulate, end=end, stores=False)


@device
def dora_gain(wanted, squares):
    """A row's gain, of its magnitude and its sum of squares."""
    return wanted / (np.float32(math.sqrt(squares)) + DORA_EPS)


def _dora_sink(kind: str) -> Callable:
    load_magnitude = ELEMENTS[kind].load

    def make(out_element: SimpleNamespace) -> SimpleNamespace:
        @device
        def begin(state, row, rows, lane, p):
            # Two lanes for each of the warp's 16 rows add up its tiles; the gain then goes to the lanes that need it.
            row_of_lane = np.uint32(lane >> np.uint32(2))
            own = min(row - np.int64(row_of_lane) + np.int64(lane >> np.uint32(1)), rows - np.int64(1))
            squares = np.float32(0)
            tiles = np.uint32(p[2])
            first = np.uint32(0)
            while first < tiles:
                for u in range(8):
                    tile = np.uint32(np.uint32(first + np.uint32(2 * u)) + (lane & np.uint32(1)))
                    part = p[0][np.int64(min(tile, np.uint32(tiles - np.uint32(1)))) * rows + own]
                    squares += part if tile < tiles else np.float32(0)
                first = np.uint32(first + np.uint32(16))
            squares = squares + warp.shuffle_xor(squares, np.uint32(1))
            gain = p[3] * dora_gain(load_magnitude(p[1], own), squares)
            state[2 * ROWS_OF_LANE] = np.float32(1) - p[3]
            for i in range(ROWS_OF_LANE):
                state[i] = warp.shuffle_from(gain, np.uint32(np.uint32(2) * row_of_lane + np.uint32(16 * i)))
                state[ROWS_OF_LANE + i] = state[2 * ROWS_OF_LANE] + state[i]

        @device
        def decompose(state, i, delta, w, p):
            return state[ROWS_OF_LANE + i] * w + state[i] * delta

        @device
        def decompose_pair(state, i, high, low, w, p):
            high, low = add_pairs(w, np.float32(0), high, low)
            high, low = multiply_pairs(high, low, state[i], np.float32(0))
            kept, kept_low = multiply_pairs(w, np.float32(0), state[2 * ROWS_OF_LANE], np.float32(0))
            high, low = add_pairs(kept, kept_low, high, low)
            return rounded_pair(high, low)

        @device
        def widen(state, i, reach, w, p):
            return magnitude(state[i]) * reach + _TWO_ROUNDINGS * magnitude(state[ROWS_OF_LANE + i] * w)

        return _store_sink(out_element, decompose, decompose_pair, begin, widen)

    return make


SINKS = {"delta": _merge_sink(False), "merge": _merge_sink(True), "norm": _norm_sink} | {
    f"dora {m}": _dora_sink(m) for m in ELEMENTS
}
