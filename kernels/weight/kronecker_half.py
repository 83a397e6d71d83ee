"""The second half of a Kronecker product in the registers of a block's threads: full, or multiplied out by warps.

A thread has the same run of eight columns in each of ``slots`` rows. Where rows are short, threads next to each other
have the same rows, once for each of ``span`` neighbouring blocks of the weight.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np

from kernels import warp
from kernels.division import divide
from kernels.elements import ELEMENTS
from kernels.target import SIMULATOR, cuda, device, i64, types
from kernels.weight.low_rank_runs import ROWS, RUNS, SLOTS, first_row, low_rank_runs, row_of_slot, run_of_lane
from kernels.weight.low_rank_tile import Product

THREADS = 32 if SIMULATOR else 64


@functools.cache
def second_half(second: str | Product, slots: int, ragged: bool) -> SimpleNamespace:
    """Device functions of w2, whose kind is ``second``, or which is that product:

    ``place(tile, thread, span, height, runs, by_span_runs, by_runs)``: the thread's first row and run, which of the
    neighbouring blocks is its own, and whether there is such a row; the last two are reciprocals.
    ``neighbour(thread)``: a number that counts up where threads' runs are neighbours in memory.
    ``row(i, slot)``: a row of the thread whose first is i.
    ``load(values, p, i, run, height, runs)``: eight values of each row, of w2's ``parameters``.
    """
    assert slots == SLOTS or not isinstance(second, Product), slots
    made = _product(second, ragged) if isinstance(second, Product) else _full(second, slots, ragged)
    return SimpleNamespace(**vars(made), place=_place(made, ragged))


@functools.cache
def clamp(ragged: bool) -> Callable:
    """``inside(n, count)``: n, or the last one below ``count`` where things do not come out even."""

    @device
    def inside(n, count):
        return min(n, count - np.int64(1)) if ragged else n

    return inside


def _place(made: SimpleNamespace, ragged: bool) -> Callable:
    unit_of, first_row_of, inside = made.unit, made.first_row, clamp(ragged)

    @device
    def place(tile, thread, span, height, runs, by_span_runs, by_runs):
        unit = unit_of(np.uint32(np.uint32(tile) * np.uint32(THREADS) + thread), thread)
        group = divide(unit, by_span_runs)
        position = np.uint32(unit - np.uint32(group * np.uint32(np.uint32(runs) * np.uint32(span))))
        sub = np.int64(divide(position, by_runs))
        i = first_row_of(group, thread)
        return inside(i, height), np.int64(position) - sub * runs, sub, not ragged or i < height

    return place


def _full(kind: str, slots: int, ragged: bool) -> SimpleNamespace:
    """Threads next to each other have runs next to each other, of neighbouring rows."""
    element, inside = ELEMENTS[kind], clamp(ragged)
    fetch8, unpack8, words_of_8, held = element.fetch8_cached, element.unpack8, element.words, slots * element.words

    @device
    def neighbour(thread):
        return thread

    @device
    def unit(flat, thread):
        return flat

    @device
    def first_row_of(group, thread):
        return np.int64(group) * np.int64(slots)

    @device
    def row(i, slot):
        return i + np.int64(slot)

    @device
    def load(values, p, i, run, height, runs):
        words = cuda.local.array(held, np.uint32)
        for r in range(slots):
            fetch8(p[0], (inside(row(i, r), height) * runs + run) * np.int64(8), words, r * words_of_8)
        for r in range(slots):
            unpack8(words, r * words_of_8, values, 8 * r)

    parameters = types.Tuple((element.pointer,))
    return SimpleNamespace(
        parameters=parameters, neighbour=neighbour, unit=unit, first_row=first_row_of, row=row, load=load
    )


def _product(spec: Product, ragged: bool) -> SimpleNamespace:
    """Rows and runs as a warp's product leaves them (`weight/low_rank_runs.py`)."""
    multiply = low_rank_runs(spec, ragged)

    @device
    def unit(flat, thread):
        return np.uint32((flat >> np.uint32(5)) * np.uint32(RUNS) + run_of_lane(thread))

    @device
    def first_row_of(group, thread):
        return np.int64(group) * np.int64(ROWS) + first_row(thread)

    @device
    def row(i, slot):
        return i + np.int64(row_of_slot(slot))

    @device
    def load(values, p, i, run, height, runs):
        thread = warp.thread_index()
        lane = np.uint32(thread & np.uint32(31))
        multiply(p, values, i - first_row(thread), height, run * np.int64(8), lane)

    parameters = types.Tuple((ELEMENTS[spec.left].pointer, ELEMENTS[spec.right].pointer, *(i64,) * 4))
    return SimpleNamespace(
        parameters=parameters, neighbour=run_of_lane, unit=unit, first_row=first_row_of, row=row, load=load
    )
