"""Gradients of a low-rank adapter's factors on Hopper: products of few columns over all rows, `streamed`.

As of `low_rank`, a side is a wide matrix, g or x, whose columns are the rows of a product with t or t_g: both lie by
lines of the sum, so that TMA brings 64 rows of both a stage.
"""

from __future__ import annotations

import numpy as np

from kernels import barrier
from kernels.elements import ELEMENTS
from kernels.matmul.streamed import Hooks, nothing_aside, streamed
from kernels.matmul.streamed_tile import GROUP_ROWS, StreamTile
from kernels.target import device, f32, i64, kernel_factory, types
from kernels.wgmma import DEPTH

SUMS, COLUMNS = range(2)
"""Positions of a side's result: its pointer, and columns of the wide matrix."""
RANK, SCALE = range(2)

_GROUP_BYTES = GROUP_ROWS * DEPTH * 2
_u32 = np.uint32
_load = barrier.tma_load(2)


@device
def _of_side(sides, second):
    if second:
        return sides[1]
    return sides[0]


@device
def _acquire(wide, narrow):
    for side in range(2):
        barrier.tensor_map_acquire(np.uint64(_of_side(wide, side == 1)))
        barrier.tensor_map_acquire(np.uint64(_of_side(narrow, side == 1)))


@device
def _side_of_tile(number, tiles):
    return _u32(1) if number >= tiles else _u32(0)


@kernel_factory(
    ("bf16", "f32", StreamTile(2, 16, 4, 4, True, True, 1, True), (True, False)),
    ("bf16", "bf16", StreamTile(3, 64, 1, 1, True, True, 2), (True, False)),
    ("f16", "f32", StreamTile(1, 8, 2, 2, True, True, 2), (False, False)),
)
def low_rank_gradient_streamed(kind: str, out: str, tile: StreamTile, turned: tuple[bool, bool]):
    """Parameters: both sides' results, the maps of both wide matrices, of both narrow ones, `streamed`'s (tiles of the
    first side and of both), the rank, the scale.

    Results are [rank, column], or stored the other way round where the side is ``turned``.
    """
    store, (first_turned, second_turned) = ELEMENTS[out].store, turned
    groups, a_bytes = tile.groups, _u32(tile.a_bytes)

    @device
    def load(target, full, wide, narrow, column, row, side):
        second = side == _u32(1)
        for group in range(groups):
            shift = _u32(group)
            place = _u32(target + shift * _u32(_GROUP_BYTES))
            _load(place, np.uint64(_of_side(wide, second)), full, _u32(column + shift * _u32(GROUP_ROWS)), row)
        _load(_u32(target + a_bytes), np.uint64(_of_side(narrow, second)), full, _u32(0), row)

    @device
    def put_one(result, is_turned, more, column, rank, value):
        if rank < more[RANK]:
            at = column * more[RANK] + rank if is_turned else rank * result[COLUMNS] + column
            store(result[SUMS], at, value * more[SCALE])

    @device
    def put(results, narrow, more, side, column, rank, first, second):
        result, is_turned = _of_side(results, side == 1), second_turned if side == 1 else first_turned
        if column < result[COLUMNS]:
            put_one(result, is_turned, more, column, rank, first)
            put_one(result, is_turned, more, column, rank + np.int64(1), second)

    result = types.Tuple((ELEMENTS[out].pointer, i64))
    maps, hooks = types.Tuple((i64, i64)), Hooks(_acquire, load, put, nothing_aside, _side_of_tile)
    return streamed(tile, kind, hooks, types.Tuple((result, result)), maps, maps, types.Tuple((i64, f32)))
