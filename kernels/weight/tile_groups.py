"""The groups of 32 columns of a weight tile, one after the other: base and delta to results.

A lane has eight neighbouring columns of each group, of two rows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np

from kernels import memory, warp
from kernels.elements import ELEMENTS, parked8
from kernels.target import cuda, device
from kernels.weight.low_rank_tile import RESULTS, ROWS_OF_LANE, Tile
from kernels.weight.settle import settler
from kernels.weight.tile_sinks import SINKS
from kernels.weight.tile_sources import Source, factor_elements, held_words, summed

LINE_BYTES = 128
"""What L2 is asked for at a time."""


def shared_bytes(base: str | None, sources: tuple[Source, ...], tile: Tile) -> int:
    """Dynamic shared memory of a tile: the right factors of every product, and the base, of two tiles on a walk."""
    base_bytes = (
        tile.rows * tile.columns // 2 * ELEMENTS[base].words * (2 if tile.base == "walk" else 1)
        if base and tile.base != "registers"
        else 0
    )
    return 2 * factor_elements(sources, tile) + base_bytes


@functools.cache
def base_access(base: str | None, out: str, sources: tuple[Source, ...], tile: Tile) -> tuple[Callable, Callable, int]:
    """``request(shared, raw, slot, thread, pointer, index)`` and ``take(shared, raw, slot, thread, w, to)`` for eight
    elements of the base, and the words of ``raw`` that they need.
    """
    element = ELEMENTS[base or out]
    fetch8, unpack8, words = element.fetch8, element.unpack8, element.words
    park, unpark = parked8(base or out, 32 * tile.warps)
    at = factor_elements(sources, tile)
    has_base, parked = base is not None, tile.base != "registers"

    @device
    def request(shared, raw, slot, thread, pointer, index):
        if parked:
            park(shared, at, slot, thread, pointer, index)
        else:
            fetch8(pointer, index, raw, slot * words)

    @device
    def take(shared, raw, slot, thread, w, to):
        if not has_base:
            for i in range(8):
                w[to + i] = np.float32(0)
        elif parked:
            unpark(shared, at, slot, thread, w, to)
        else:
            unpack8(raw, slot * words, w, to)

    return request, take, ROWS_OF_LANE * tile.groups * words if has_base and tile.base == "registers" else 1


@functools.cache
def requests(base, out, sources, tile) -> Callable:
    """``request_tile(shared, raw, slot0, thread, pointer, row, rows, column, columns)``: a lane's base in a tile.

    In a ragged weight, addresses outside are moved inside, so that loads need no branches, and stores are guarded.
    """
    groups, ragged, has_base = tile.groups, tile.ragged, base is not None
    request, _, _ = base_access(base, out, sources, tile)

    @device
    def request_tile(shared, raw, slot0, thread, pointer, row, rows, lane_column, columns):
        if has_base:
            for i in range(ROWS_OF_LANE):
                o = row + np.int64(8 * i)
                if ragged:
                    o = min(o, rows - np.int64(1))
                row_at = o * columns
                for group in range(groups):
                    column = lane_column + np.int64(32 * group)
                    if ragged:
                        column = min(column, columns - np.int64(8))
                    slot = slot0 + np.uint32(ROWS_OF_LANE * group + i)
                    request(shared, raw, np.uint32(slot), thread, pointer, row_at + column)

    return request_tile


@functools.cache
def ask_ahead(base: str, tile: Tile) -> Callable:
    """``ask(pointer, tile_row, rows, tile_column, columns)``: a tile's base on its way to L2.

    That may be done while an earlier launch still writes it.
    """
    tile_rows, tile_columns, threads = tile.rows, tile.columns, 32 * tile.warps
    line = min(LINE_BYTES // (ELEMENTS[base].words // 2), tile_columns)
    lines = tile_columns // line
    turns = -(-tile_rows * lines // threads)

    @device
    def ask(pointer, tile_row, rows, tile_column, columns):
        thread = warp.thread_index()
        for turn in range(turns):
            item = np.uint32(thread + np.uint32(turn * threads))
            row = tile_row * np.int64(tile_rows) + np.int64(item // np.uint32(lines))
            in_tile = np.int64(np.uint32(item % np.uint32(lines)) * np.uint32(line))
            column = min(tile_column * np.int64(tile_columns) + in_tile, columns - np.int64(8))
            memory.prefetch_to_keep(pointer, min(row, rows - np.int64(1)) * columns + column)

    return ask


@device
def _no_group(trace, shared, raw, slot0, held, state, out_pointer, place, p, sink_p):
    return trace


def group_chain(base, out, sources, sink, check, tile) -> Callable:
    """All groups of 32 columns, one after the other; unrolled, since registers cannot be indexed by a variable.

    ``place`` is where the lane is: row, rows, its first column, columns, thread, lane.
    """
    chain = _no_group
    for group in range(tile.groups):
        chain = _then_group(chain, base, out, sources, sink, check, tile, group)
    return chain


def ordered(sources: tuple[Source, ...], sink: str, tile: Tile) -> bool:
    """Whether groups are kept apart: always, but for merging one small product over a base in registers.

    Lanes that settle, or store while others do not, come to the next group at their own time.
    """
    if tile.settled or tile.ragged:
        return True
    small = len(sources) == 1 and sources[0][0] == "low_rank" and held_words(sources, tile) <= 12
    return not (small and sink == "merge" and tile.base == "registers")


@functools.cache
def sink_of(sink: str, out: str, tile: Tile) -> SimpleNamespace:
    """The sink of a tile's results.

    They pass through L2 as streams do, but not beside factors that come out of it in such numbers that the base waits
    in shared memory: these were measured to be faster with ordinary stores.
    """
    element = ELEMENTS[out]
    if tile.base != "registers":
        element = SimpleNamespace(**vars(element) | {"store8": element.store8_cached})
    return SINKS[sink](element)


def _then_group(rest: Callable, base, out, sources, sink, check, tile, group: int) -> Callable:
    """``rest``, then one group.

    Where factors take many registers a warp barrier keeps ptxas from computing all groups at once.
    """
    add, ragged, settled = summed(sources, tile).add, tile.ragged, tile.settled
    _, take, _ = base_access(base, out, sources, tile)
    finish = sink_of(sink, out, tile)
    settle = settler(out, sources, finish, tile) if settled else _settle_nothing
    accumulate = _store_only(finish) if settled else finish.accumulate
    keep_apart, reaches = ordered(sources, sink, tile), RESULTS if tile.settled else 1

    @device
    def groups(trace, shared, raw, slot0, held, state, out_pointer, place, p, sink_p):
        row, rows, lane_column, columns, thread, lane = place
        trace = rest(trace, shared, raw, slot0, held, state, out_pointer, place, p, sink_p)
        if keep_apart:
            warp.sync_warp()
        delta = cuda.local.array(RESULTS, np.float32)
        reach = cuda.local.array(reaches, np.float32)
        w = cuda.local.array(RESULTS, np.float32)
        for i in range(reaches):
            reach[i] = np.float32(0)
        column = lane_column + np.int64(32 * group)
        for i in range(ROWS_OF_LANE):
            take(shared, raw, np.uint32(slot0 + np.uint32(ROWS_OF_LANE * group + i)), thread, w, 8 * i)
        add(p, shared, held, delta, reach, w, group, row, rows, column, columns, lane)
        settle(state, delta, reach, w, p, sink_p, row, rows, column, columns)
        for i in range(ROWS_OF_LANE):
            o = row + np.int64(8 * i)
            if not ragged or (o < rows and column < columns):
                trace = accumulate(state, i, out_pointer, o * columns + column, delta, w, trace, sink_p)
        return trace

    return groups


@device
def _settle_nothing(state, delta, reach, w, p, sink_p, row, rows, column, columns):
    pass


def _store_only(finish: SimpleNamespace) -> Callable:
    """A sink's accumulate for what is its result already."""
    store = finish.store

    @device
    def accumulate(state, i, out_pointer, index, delta, w, trace, sink_p):
        return store(out_pointer, index, delta, 8 * i, trace)

    return accumulate
