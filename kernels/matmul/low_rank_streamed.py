"""What low-rank terms need before their product, on Hopper: `low_rank`'s work in `streamed`'s way."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from kernels import barrier
from kernels.elements import ELEMENTS
from kernels.matmul.low_rank import UNIT, D, columns_copier, terms_of
from kernels.matmul.problem import COLUMNS, OUT, OUT_BATCH, OUT_STRIDE, ROWS, result_parameters
from kernels.matmul.streamed import MAP, OPERAND, Hooks, batch_of_equals, load_rows, streamed
from kernels.matmul.streamed_tile import StreamTile
from kernels.target import device, f32, i64, kernel_factory, types
from kernels.wgmma import DEPTH

_u32 = np.uint32
_load = barrier.tma_load(2)


@device
def _no_map(terms):
    pass


@device
def _no_load(target, full, terms, k, batch):
    pass


def _maps_of(tiles: tuple[int, ...]) -> tuple[Callable, Callable]:
    """Device functions over all terms: make their D's maps visible; ask for a stage of them, below each other."""
    acquire, load, position = _no_map, _no_load, sum(tiles)
    for number in reversed(range(len(tiles))):
        position -= tiles[number]
        acquire, load = _map_of_term(number, position, acquire, load)
    return acquire, load


def _map_of_term(number: int, position: int, acquire_rest: Callable, load_rest: Callable) -> tuple[Callable, Callable]:
    start = _u32(UNIT * position * DEPTH * 2)

    @device
    def acquire(terms):
        barrier.tensor_map_acquire(np.uint64(terms[number][D]))
        acquire_rest(terms)

    @device
    def load(target, full, terms, k, batch):
        _load(_u32(target + start), np.uint64(terms[number][D]), full, k, _u32(0))
        load_rest(target, full, terms, k, batch)

    return acquire, load


@kernel_factory(
    ("bf16", (2,), StreamTile(1, 16, 2, 2), True),
    ("bf16", (2, 2, 2), StreamTile(2, 48, 1, 2), True),
    ("f16", (2, 1), StreamTile(1, 24, 2, 2), False),
)
def low_rank_streamed(kind: str, tiles: tuple[int, ...], tile: StreamTile, whole: bool):
    """``tiles`` are groups of eight columns of each term; U's columns are put beside each other, of which there is a
    multiple of eight in each term where ``whole``.

    Parameters: t's (rows, and the columns of one part), A's map, a tuple of each term's (its D as the address of a
    map), `streamed`'s, U's copy and its rows.
    """
    _, scale_of = terms_of(tiles)
    acquire_terms, load_terms = _maps_of(tiles)
    a_bytes = _u32(tile.a_bytes)
    copy, element = columns_copier(tiles, whole), ELEMENTS[kind]
    store, rounded = element.store, element.rounded
    assert tile.columns == UNIT * sum(tiles), (tiles, tile)

    @device
    def acquire(a, terms):
        barrier.tensor_map_acquire(np.uint64(a[MAP]))
        acquire_terms(terms)

    @device
    def load(target, full, a, terms, row, k, batch):
        load_rows(target, full, a, row, k, batch)
        load_terms(_u32(target + a_bytes), full, terms, k, batch)

    @device
    def put_one(result, terms, at, column, value):
        scale = scale_of(terms, _u32(column))
        value = np.float32(0) if scale == np.float32(0) else value * scale
        store(result[OUT], at + column, value)
        store(result[OUT], at + column + result[COLUMNS], value - rounded(value))

    @device
    def put(result, terms, more, batch, row, column, first, second):
        if row < result[ROWS]:
            at = batch * result[OUT_BATCH] + row * result[OUT_STRIDE]
            put_one(result, terms, at, column, first)
            put_one(result, terms, at, column + np.int64(1), second)

    @device
    def copy_columns(result, terms, more, number, count):
        while number < more[1]:
            copy(more[0], terms, number, result[COLUMNS])
            number += count

    pointer = ELEMENTS[kind].pointer
    terms = types.Tuple((types.Tuple((i64, i64, f32, pointer, i64)),) * len(tiles))
    hooks = Hooks(acquire, load, put, copy_columns, batch_of_equals)
    return streamed(tile, kind, hooks, result_parameters(kind), OPERAND, terms, types.Tuple((pointer, i64)))
