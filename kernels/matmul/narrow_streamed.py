"""Products with few columns on Hopper: `narrow`'s work in `streamed`'s way."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from kernels import barrier
from kernels.elements import ELEMENTS
from kernels.matmul.epilogue import epilogue
from kernels.matmul.problem import COLUMNS, OUT, OUT_BATCH, OUT_STRIDE, ROWS, result_parameters
from kernels.matmul.streamed import (
    BATCH_STEP,
    MAP,
    OPERAND,
    Hooks,
    batch_of_equals,
    load_rows,
    nothing_aside,
    streamed,
)
from kernels.matmul.streamed_tile import StreamTile
from kernels.target import device, f32, i64, kernel_factory, types

SCALE = 2
"""Position of the product's scale among B's parameters, after those of an operand."""

_u32 = np.uint32
_load = barrier.tma_load(3)


@device
def _acquire(a, b):
    barrier.tensor_map_acquire(np.uint64(a[MAP]))
    barrier.tensor_map_acquire(np.uint64(b[MAP]))


def _loader(tile: StreamTile) -> Callable:
    a_bytes, by_lines = _u32(tile.a_bytes), tile.by_lines

    @device
    def load(target, full, a, b, row, k, batch):
        load_rows(target, full, a, row, k, batch)
        target, batch = _u32(target + a_bytes), _u32(batch * _u32(b[BATCH_STEP]))
        if by_lines:
            _load(target, np.uint64(b[MAP]), full, _u32(0), k, batch)
        else:
            _load(target, np.uint64(b[MAP]), full, k, _u32(0), batch)

    return load


@kernel_factory(
    ("bf16", "bf16", StreamTile(1, 16, 2, 2), ()),
    ("bf16", "bf16", StreamTile(2, 64, 1, 1), (("scale_column", "f32"),)),
    ("f16", "f32", StreamTile(1, 8, 2, 2), (("bias", "f16"), ("gelu",))),
    ("bf16", "bf16", StreamTile(1, 16, 2, 2, True), ()),
)
def narrow_streamed(kind: str, out: str, tile: StreamTile, steps: tuple):
    """Parameters: the result's, A's map, B's, `streamed`'s, the epilogue's."""
    store, apply = ELEMENTS[out].store, epilogue(steps).one

    @device
    def put_one(result, scale, more, batch, row, column, value):
        if column < result[COLUMNS]:
            value = np.float32(0) if scale == np.float32(0) else value * scale
            at = batch * result[OUT_BATCH] + row * result[OUT_STRIDE] + column
            store(result[OUT], at, apply(value, batch, row, column, more))

    @device
    def put(result, b, more, batch, row, column, first, second):
        if row < result[ROWS]:
            put_one(result, b[SCALE], more, batch, row, column, first)
            put_one(result, b[SCALE], more, batch, row, column + np.int64(1), second)

    hooks = Hooks(_acquire, _loader(tile), put, nothing_aside, batch_of_equals)
    b = types.Tuple((i64, i64, f32))
    return streamed(tile, kind, hooks, result_parameters(out), OPERAND, b, epilogue(steps).parameters)
