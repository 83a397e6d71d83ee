"""The weight kernel on tensor cores: a tile of the delta in registers, its base beside it, one rounding, one store.

A block makes one tile, or walks down a column of tiles. Base and result move in 16-byte accesses. A single tile's base
is requested before anything else and waits in registers or shared memory, so that the product hides behind it. On a
walk the right factor stays in shared memory, and the next tile's base and left factor are on their way while a tile is
made. Lane 4 g + t holds rows g and g + 8, columns 8 t to 8 t + 7 of each group of 32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np

from kernels import memory, warp
from kernels.barrier import early_options, entrance, shared_visible_to_tma
from kernels.elements import ELEMENTS, all_finite
from kernels.parameters import flat_length, table_reader
from kernels.target import blocks_by_shared, cuda, device, f32, f32p, i32p, i64, i64p, kernel_factory, types
from kernels.weight.low_rank_tile import RESULTS, ROWS_OF_LANE, Product, Tile
from kernels.weight.sources import source_parameters
from kernels.weight.tile_groups import ask_ahead, base_access, group_chain, ordered, requests, shared_bytes, sink_of
from kernels.weight.tile_sinks import STATE_WORDS
from kernels.weight.tile_sources import Source, factor_elements, held_words, point_name, product_words, summed


@functools.cache
def _tile_body(base, out, sources, sink, check, tile) -> Callable:
    """The block's device function; ``sink_p`` is (partials, magnitude, tiles in a row, strength) for DoRA."""
    make = _walk_body if tile.base == "walk" else _single_body
    finish = sink_of(sink, out, tile)
    return make(base, out, sources, sink, check and finish.stores, tile, finish)


def _shared_by_all(sources: tuple[Source, ...], tile: Tile) -> Callable:
    """``meet()``: what the block's threads have staged is there for all of them, and for warpgroups' products."""
    staged, together = factor_elements(sources, tile) > 0, tile.wgmma

    @device
    def meet():
        if together:
            shared_visible_to_tma()
        if staged:
            warp.block_barrier()

    return meet


@device
def lane_place(thread):
    """A thread's lane, and its first row and column in a tile."""
    lane = np.uint32(thread & np.uint32(31))
    row = np.uint32((thread >> np.uint32(5)) * np.uint32(16) + (lane >> np.uint32(2)))
    return lane, np.int64(row), np.int64((lane & np.uint32(3)) * np.uint32(8))


def _single_body(base, out, sources, sink, check, tile, finish) -> Callable:
    tile_rows, tile_columns = tile.rows, tile.columns
    every = summed(sources, tile)
    stage, hold, words_held = every.stage, every.hold, max(1, held_words(sources, tile))
    _, _, raw_words = base_access(base, out, sources, tile)
    request_tile = requests(base, out, sources, tile)
    begin, end = finish.begin, finish.end
    all_groups = group_chain(base, out, sources, sink, check, tile)
    parked, meet = tile.base == "shared", _shared_by_all(sources, tile)

    @device
    def body(shared, tile_row, tile_column, base_pointer, out_pointer, rows, columns, walk, flag, p, sink_p):
        thread = warp.thread_index()
        lane, row_in_tile, column_in_tile = lane_place(thread)
        row = tile_row * np.int64(tile_rows) + row_in_tile
        column0 = tile_column * np.int64(tile_columns)
        lane_column = column0 + column_in_tile
        raw = cuda.local.array(raw_words, np.uint32)
        held = cuda.local.array(words_held, np.uint32)
        state = cuda.local.array(STATE_WORDS, np.float32)
        request_tile(shared, raw, np.uint32(0), thread, base_pointer, row, rows, lane_column, columns)
        stage(p, shared, column0, columns, thread)
        hold(p, held, row, rows, lane_column, columns, lane)
        begin(state, row, rows, lane, sink_p)
        if parked:
            memory.copy_async_wait_all()
        meet()
        place = (row, rows, lane_column, columns, thread, lane)
        trace = all_groups(np.uint32(0), shared, raw, np.uint32(0), held, state, out_pointer, place, p, sink_p)
        end(state, tile_column, row, rows, lane, sink_p)
        if check and not all_finite(trace):
            flag[0] = np.int32(1)

    return body


def _walk_body(base, out, sources, sink, check, tile, finish) -> Callable:
    tile_rows, tile_columns, slots = tile.rows, tile.columns, ROWS_OF_LANE * tile.groups
    every = summed(sources, tile)
    stage, hold, words_held = every.stage, every.hold, max(1, held_words(sources, tile))
    request_tile = requests(base, out, sources, tile)
    begin, end = finish.begin, finish.end
    all_groups = group_chain(base, out, sources, sink, check, tile)
    base_arrived, meet = memory.copy_async_wait(1), _shared_by_all(sources, tile)

    @device
    def body(shared, walk_row, tile_column, base_pointer, out_pointer, rows, columns, walk, flag, p, sink_p):
        thread = warp.thread_index()
        lane, row_in_tile, column_in_tile = lane_place(thread)
        first = walk_row * walk * np.int64(tile_rows)
        row = first + row_in_tile
        last = min(first + walk * np.int64(tile_rows), rows)
        column0 = tile_column * np.int64(tile_columns)
        lane_column = column0 + column_in_tile
        raw = cuda.local.array(1, np.uint32)
        held = cuda.local.array(words_held, np.uint32)
        next_held = cuda.local.array(words_held, np.uint32)
        state = cuda.local.array(STATE_WORDS, np.float32)
        next_state = cuda.local.array(STATE_WORDS, np.float32)
        slot0 = np.uint32(0)
        trace = np.uint32(0)
        request_tile(shared, raw, slot0, thread, base_pointer, row, rows, lane_column, columns)
        memory.copy_async_commit()
        stage(p, shared, column0, columns, thread)
        hold(p, held, row, rows, lane_column, columns, lane)
        begin(state, row, rows, lane, sink_p)
        meet()
        while first < last:
            next_row = row + np.int64(tile_rows)
            next_slot0 = np.uint32(np.uint32(slots) - slot0)
            if first + np.int64(tile_rows) < last:
                request_tile(shared, raw, next_slot0, thread, base_pointer, next_row, rows, lane_column, columns)
                hold(p, next_held, next_row, rows, lane_column, columns, lane)
                begin(next_state, next_row, rows, lane, sink_p)
            memory.copy_async_commit()
            base_arrived()
            place = (row, rows, lane_column, columns, thread, lane)
            trace = all_groups(trace, shared, raw, slot0, held, state, out_pointer, place, p, sink_p)
            end(state, tile_column, row, rows, lane, sink_p)
            for i in range(words_held):
                held[i] = next_held[i]
            for i in range(STATE_WORDS):
                state[i] = next_state[i]
            first += np.int64(tile_rows)
            row = next_row
            slot0 = next_slot0
        if check and not all_finite(trace):
            flag[0] = np.int32(1)

    return body


def _parameters(base, out, sources, sink) -> tuple:
    sink_types = ()
    if sink == "norm" or sink.startswith("dora"):
        magnitude = sink.partition(" ")[2] or out
        sink_types = (f32p, ELEMENTS[magnitude].pointer, i64, f32)
    return (
        ELEMENTS[base or out].pointer, ELEMENTS[out].pointer, i64, i64, i64, i32p,
        types.Tuple([source_parameters(point_name(s)) for s in sources]), types.Tuple(sink_types),
    )  # fmt: skip


def _options(base: str | None, sources: tuple[Source, ...], sink: str, tile: Tile) -> dict:
    """Launch bounds: as many blocks on a multiprocessor as factors, base, results and gains leave registers for."""
    words = (2 if tile.base == "walk" else 1) * held_words(sources, tile) + 32
    words += RESULTS if tile.wgmma and any(source[0] == "hadamard" for source in sources) else 0
    words += RESULTS * (len(sources) - 1)  # a further source's results stand beside the sum
    words += ROWS_OF_LANE * tile.groups * ELEMENTS[base].words if base and tile.base == "registers" else 0
    gathers = len(sources) == 1 and sources[0][0] == "kronecker_product" and product_words(sources) < 12
    few = (len(sources) == 1 and words <= 70) or (gathers and tile.base == "registers")
    warps_on_multiprocessor = 24 if few else 16 if words <= 108 else 8
    if tile.settled or not ordered(sources, sink, tile):
        warps_on_multiprocessor = min(warps_on_multiprocessor, 16)
    by_registers = max(1, warps_on_multiprocessor // tile.warps)
    shared = shared_bytes(base, sources, tile)
    return {
        "threads": 32 * tile.warps,
        "min_blocks": min(by_registers, blocks_by_shared(shared, hopper=tile.wgmma)),
        "shared_bytes": shared,
    }


_P1, _P4 = Product("bf16", "bf16", 1, 2, True), Product("bf16", "bf16", 4, 8, True)
_OI = ("low_rank", "bf16", "bf16", _P1)
_WHOLE, _RAGGED = Tile(8, 4, False, "registers"), Tile(8, 4, True, "registers")
_SHARED, _WALK = Tile(8, 4, True, "shared"), Tile(8, 4, False, "walk")
_TOGETHER = Tile(8, 4, False, "walk", wgmma=True)
_SETTLED, _F1 = Tile(8, 1, True, "shared", True), Product("f16", "f16", 1, 1, False)
_EXAMPLES = (
    ("bf16", "bf16", (_OI,), "merge", True, _WHOLE),
    ("bf16", "bf16", (("low_rank", "bf16", "f16", Product("bf16", "f16", 1, 1, False)),), "merge", True, _RAGGED),
    ("bf16", "bf16", (("low_rank", "f32", "f32", Product("f32", "f32", 1, 4, True)),), "merge", True, _WHOLE),
    ("bf16", "bf16", (("low_rank", "f16", "f16", Product("f16", "f16", 4, 8, True)),), "merge", True, _SHARED),
    ("bf16", "bf16", (("hadamard", *["bf16"] * 4, _P1, _P1),), "merge", True, _WHOLE),
    ("bf16", "bf16", (("kronecker_product", *["bf16"] * 3, _P1),), "merge", True, _WHOLE),
    ("bf16", "bf16", (_OI, _OI), "merge", True, _WHOLE),
    ("bf16", "bf16", (("hadamard", *["bf16"] * 4, _P4, _P4),), "merge", True, _WALK),
    ("bf16", "bf16", (_OI,), "norm", True, _RAGGED),
    ("bf16", "bf16", (_OI,), "dora f32", True, _WHOLE),
    (None, "bf16", (_OI,), "delta", False, _WHOLE),
    ("bf16", "bf16", (("low_rank", "bf16", "bf16", _P4),), "merge", True, Tile(8, 4, False, "shared", True)),
    ("f16", "f32", (("hadamard", *["f32"] * 4, *[Product("f32", "f32", 2, 4, True)] * 2),), "dora f16", True, _SETTLED),
    ("f32", "f16", (("kronecker_product", *["f16"] * 3, _F1), ("dense", "f32")), "merge", True, _SETTLED),
    ("f32", "f16", (("kronecker", "bf16", "f32"), ("dense", "f16"), ("channel", "bf16", "in")), "merge", True, _SHARED),
    ("bf16", "bf16", (_OI,), "merge", True, _WHOLE, True),
    ("bf16", "bf16", (("hadamard", *["bf16"] * 4, _P4, _P4),), "merge", True, _TOGETHER, True),
)


@kernel_factory(*_EXAMPLES)
def weight_tile(base, out, sources, sink, check, tile, early=False):
    """One weight.

    Parameters: base, out, rows, columns, tiles of a walk, flag, sources, sink, how many blocks ask for their base while
    the launch before still runs (merges whose base waits in registers); grid (column tiles, walks).
    """
    body, enter = _tile_body(base, out, sources, sink, check, tile), entrance(early, any_size=True)

    asks = early and sink == "merge" and tile.base == "registers"
    ask = ask_ahead(base or out, tile)

    def kernel(base_pointer, out_pointer, rows, columns, walk, flag, p, sink_p, ahead):
        if asks and warp.block_y() * warp.grid_x() + warp.block_x() < ahead:
            ask(base_pointer, warp.block_y(), rows, warp.block_x(), columns)
        enter()
        shared = cuda.shared.array(0, np.uint16, alignment=1024)
        body(
            shared,
            warp.block_y(),
            warp.block_x(),
            base_pointer,
            out_pointer,
            rows,
            columns,
            walk,
            flag,
            p,
            sink_p,
        )

    parameters = (*_parameters(base, out, sources, sink), i64)
    return kernel, parameters, _options(base, sources, sink, tile) | early_options(early)


@kernel_factory(("bf16", "bf16", (_OI,), "merge", True, _WHOLE), ("bf16", "bf16", (_OI,), "merge", True, _WHOLE, True))
def weight_tile_grouped(base, out, sources, sink, check, tile, early=False):
    """Many weights in one launch.

    Parameters: a table with a row of the single kernel's parameters for each weight, and four words a block: the
    weight's row in the table and the block's coordinates in the single kernel's grid.
    """
    body, enter = _tile_body(base, out, sources, sink, check, tile), entrance(early, any_size=True)
    parameters = types.Tuple(_parameters(base, out, sources, sink))
    read, width = table_reader(parameters), flat_length(parameters)

    def kernel(table, blocks):
        enter()
        shared = cuda.shared.array(0, np.uint16, alignment=1024)
        at = 4 * warp.block_x()
        q = read(table, np.int64(blocks[at]) * np.int64(width))
        body(
            shared,
            np.int64(blocks[at + 2]),
            np.int64(blocks[at + 1]),
            q[0],
            q[1],
            q[2],
            q[3],
            q[4],
            q[5],
            q[6],
            q[7],
        )

    return kernel, (i64p, i32p), _options(base, sources, sink, tile) | early_options(early)
