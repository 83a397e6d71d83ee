"""What every matmul kernel is given: the result, the segments, the epilogue; and how blocks share out its tiles.

A segment is named by (layout, kind of A, kind of B). Its parameters are A, B, k, row strides of A and B as they are
stored, their batch strides, and two fp32 numbers: ``scale``, and ``ratio``, the previous segment's scale over its own.
Kernels with one accumulator multiply it by the ratio before a segment and by the last one's scale in the end, so that
sum_s scale_s A_s B_s^T takes no second accumulator; the host puts small scales first, so that ratios are at most 1. A
segment of scale 0 comes with k = 0.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from kernels.elements import ELEMENTS
from kernels.target import device, f32, i64, types

A, B, K, A_STRIDE, B_STRIDE, A_BATCH, B_BATCH, RATIO, SCALE = range(9)
"""Positions of a segment's parameters."""
OUT, ROWS, COLUMNS, OUT_STRIDE, OUT_BATCH = range(5)
"""Positions of the result's: its pointer, its rows and columns (after a gate), row stride and batch stride."""


def segment_parameters(segment: tuple[str, str, str]) -> types.BaseTuple:
    """Types of one segment's parameters."""
    _, a, b = segment
    return types.Tuple((ELEMENTS[a].pointer, ELEMENTS[b].pointer, i64, i64, i64, i64, i64, f32, f32))


def result_parameters(out: str) -> types.BaseTuple:
    """Types of the result's parameters."""
    return types.Tuple((ELEMENTS[out].pointer, i64, i64, i64, i64))


@device
def divide_up(extent, step):
    """Extent / step rounded up, uint32."""
    return np.uint32(np.uint32(np.uint32(extent) + np.uint32(step - np.uint32(1))) // np.uint32(step))


def tile_of_block(tile_rows: int, tile_columns: int, panel: int) -> Callable:
    """``locate(block, rows, columns)``: a block's (tile row, tile column, what is left of the number), all uint32.

    Tiles are numbered down panels of ``panel`` tile rows, so that blocks that run together share rows and columns in
    L2; the number's rest counts whole results: batches, or parts of a sum.
    """

    @device
    def locate(block, rows, columns):
        row_tiles = divide_up(rows, np.uint32(tile_rows))
        column_tiles = divide_up(columns, np.uint32(tile_columns))
        tiles = np.uint32(row_tiles * column_tiles)
        rest = np.uint32(np.uint32(block) // tiles)
        tile = np.uint32(np.uint32(block) - np.uint32(rest * tiles))
        in_panel = np.uint32(np.uint32(panel) * column_tiles)
        number = np.uint32(tile // in_panel)
        first = np.uint32(number * np.uint32(panel))
        height = np.uint32(min(np.uint32(panel), np.uint32(row_tiles - first)))
        inside = np.uint32(tile - np.uint32(number * in_panel))
        column = np.uint32(inside // height)
        row = np.uint32(first + np.uint32(inside - np.uint32(column * height)))
        return row, column, rest

    return locate
