"""DoRA by row in one launch: the blocks of a cluster share whole rows, so that the base is read once (sm_90).

A block has some of the rows' panels, each a tile of `weight/tile.py` with its factors and its base in shared memory. It
adds up the squares of W + delta over them, reads the other blocks' sums, and makes the delta once more for the merge: a
second product costs less than a second look at the base.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from kernels import bits, memory, warp
from kernels.barrier import (
    cluster_arrive,
    cluster_barrier,
    cluster_rank,
    cluster_wait,
    early_options,
    entrance,
    shared_address,
    shared_load_remote,
)
from kernels.elements import ELEMENTS, all_finite
from kernels.target import cuda, device, f32, i32p, i64, kernel_factory, types
from kernels.weight.low_rank_tile import ROWS_OF_LANE, Product, Tile
from kernels.weight.sources import source_parameters
from kernels.weight.tile import lane_place
from kernels.weight.tile_groups import group_chain, requests, shared_bytes
from kernels.weight.tile_sinks import STATE_WORDS, dora_gain
from kernels.weight.tile_sources import Source, held_words, point_name, summed

FEW_WORDS = 12
"""Registers of held factors up to which twice as many warps fit on a multiprocessor."""


def warps_on_multiprocessor(sources: tuple[Source, ...], tile: Tile) -> int:
    """For how many warps registers suffice."""
    return 24 if not tile.settled and held_words(sources, tile) <= FEW_WORDS else 12


def cluster_shared_bytes(base: str, sources: tuple[Source, ...], tile: Tile, panels: int, teams: int) -> int:
    """Dynamic shared memory of a block with so many panels: their factors and bases, and each team's sums of rows."""
    return panels * shared_bytes(base, sources, tile) + 4 * tile.rows * teams


def _cluster_sums(cluster: int, teams: int, rows: int) -> Callable:
    """``add_up(squares, shared, at, team, lane)``: sums of squares of the lane's rows, over the cluster.

    The first team's sums of these rows lie at ``at`` and 16 elements on, the next team's ``rows`` further. The blocks
    meet once; who leaves has to meet them again, since its sums are still being read. A warp comes to the
    cluster's barriers as one: they count warps.
    """
    parts = cluster * teams

    @device
    def add_up(squares, shared, at, team, lane):
        quarter = np.uint32(lane & np.uint32(3))
        for i in range(ROWS_OF_LANE):
            own = warp.quad_sum(squares[i])
            if quarter == np.uint32(0):
                memory.shared_store32(
                    shared, at + np.int64(team) * np.int64(2 * rows) + np.int64(16 * i), bits.f32_bits(own)
                )
        warp.sync_warp()
        cluster_barrier()
        for i in range(ROWS_OF_LANE):
            address = shared_address(shared, at + np.int64(16 * i))
            total = np.float32(0)
            for first in range(0, parts, 4):
                part = np.uint32(quarter + np.uint32(first))
                if part < np.uint32(parts):
                    there = np.uint32(address + np.uint32(part // np.uint32(cluster)) * np.uint32(4 * rows))
                    total += bits.bits_f32(shared_load_remote(there, np.uint32(part % np.uint32(cluster))))
            squares[i] = warp.quad_sum(total)
        warp.sync_warp()
        cluster_arrive()

    return add_up


def _body(base, out, sources, magnitude, check, tile, cluster, teams) -> Callable:
    tile_rows, tile_columns, team_threads = tile.rows, tile.columns, 32 * tile.warps
    panel_elements = shared_bytes(base, sources, tile) // 2
    every = summed(sources, tile)
    stage, hold, words_held = every.stage, every.hold, max(1, held_words(sources, tile))
    request_tile = requests(base, out, sources, tile)
    square_groups = group_chain(base, out, sources, "norm", False, dataclasses.replace(tile, settled=False))
    merge_groups = group_chain(base, out, sources, f"dora {magnitude}", check, tile)
    add_up, load_magnitude = _cluster_sums(cluster, teams, tile_rows), ELEMENTS[magnitude].load

    @device
    def body(shared, band, base_pointer, out_pointer, rows, columns, panels, flag, p, magnitude_pointer, strength):
        team = np.uint32(warp.thread_index() // np.uint32(team_threads))
        thread = np.uint32(warp.thread_index() - np.uint32(team * np.uint32(team_threads)))
        lane, row_in_tile, column_in_tile = lane_place(thread)
        row = band * np.int64(tile_rows) + row_in_tile
        column0 = np.int64(cluster_rank()) * panels * np.int64(tile_columns)
        raw = cuda.local.array(1, np.uint32)
        held = cuda.local.array(words_held, np.uint32)
        squares = cuda.local.array(ROWS_OF_LANE, np.float32)
        state = cuda.local.array(STATE_WORDS, np.float32)
        zero, trace = np.uint32(0), np.uint32(0)
        for panel in range(np.int64(team), panels, teams):
            view = shared[panel * np.int64(panel_elements) :]
            column = column0 + panel * np.int64(tile_columns) + column_in_tile
            request_tile(view, raw, zero, thread, base_pointer, row, rows, column, columns)
        for panel in range(np.int64(team), panels, teams):
            view = shared[panel * np.int64(panel_elements) :]
            stage(p, view, column0 + panel * np.int64(tile_columns), columns, thread)
        hold(p, held, row, rows, column0 + column_in_tile, columns, lane)
        memory.copy_async_wait_all()
        warp.block_barrier()
        for i in range(ROWS_OF_LANE):
            squares[i] = np.float32(0)
        for panel in range(np.int64(team), panels, teams):
            view = shared[panel * np.int64(panel_elements) :]
            place = (row, rows, column0 + panel * np.int64(tile_columns) + column_in_tile, columns, thread, lane)
            for i in range(ROWS_OF_LANE):
                state[i] = np.float32(0)
            square_groups(zero, view, raw, zero, held, state, out_pointer, place, p, ())
            for i in range(ROWS_OF_LANE):
                squares[i] += state[i]
        sums_at = panels * np.int64(panel_elements) + np.int64(2) * row_in_tile
        add_up(squares, shared, sums_at, team, lane)
        state[2 * ROWS_OF_LANE] = np.float32(1) - strength
        for i in range(ROWS_OF_LANE):
            own = min(row + np.int64(8 * i), rows - np.int64(1))
            gain = strength * dora_gain(load_magnitude(magnitude_pointer, own), squares[i])
            state[i] = gain
            state[ROWS_OF_LANE + i] = state[2 * ROWS_OF_LANE] + gain
        for panel in range(np.int64(team), panels, teams):
            view = shared[panel * np.int64(panel_elements) :]
            place = (row, rows, column0 + panel * np.int64(tile_columns) + column_in_tile, columns, thread, lane)
            trace = merge_groups(trace, view, raw, zero, held, state, out_pointer, place, p, ())
        if check and not all_finite(trace):
            flag[0] = np.int32(1)
        warp.sync_warp()
        cluster_wait()

    return body


_P1 = Product("bf16", "bf16", 1, 2, True)
_EXAMPLES = (
    ("bf16", "bf16", (("low_rank", "bf16", "bf16", _P1),), "f32", True, Tile(4, 4, False, "shared"), 8, 2),
    ("f16", "f16", (("hadamard", *["bf16"] * 4, _P1, _P1),), "bf16", True, Tile(2, 4, True, "shared"), 1, 1),
    ("bf16", "bf16", (("hadamard", *["bf16"] * 4, _P1, _P1),), "f32", True, Tile(4, 4, True, "shared", True), 8, 1),
)


@kernel_factory(*_EXAMPLES)
def dora_cluster(base, out, sources, magnitude, check, tile, cluster, teams):
    """One weight, of sources whose held factors serve every column.

    Parameters: base, out, rows, columns, panels of a block, flag, sources, magnitude, strength; a cluster for each band
    of the tile's rows, along x. Shared memory depends on the panels: `cluster_shared_bytes`.
    """
    body = _body(base, out, sources, magnitude, check, tile, cluster, teams)
    enter = entrance(True, any_size=True)

    def kernel(base_pointer, out_pointer, rows, columns, panels, flag, p, magnitude_pointer, strength):
        enter()
        shared = cuda.shared.array(0, np.uint16, alignment=1024)
        band = np.int64(np.uint32(warp.block_x()) // np.uint32(cluster))
        body(shared, band, base_pointer, out_pointer, rows, columns, panels, flag, p, magnitude_pointer, strength)

    parameters = (
        ELEMENTS[base].pointer, ELEMENTS[out].pointer, i64, i64, i64, i32p,
        types.Tuple([source_parameters(point_name(s)) for s in sources]), ELEMENTS[magnitude].pointer, f32,
    )  # fmt: skip
    warps = tile.warps * teams
    options = {"threads": 32 * warps, "min_blocks": max(1, warps_on_multiprocessor(sources, tile) // warps)}
    return kernel, parameters, options | {"cluster": cluster} | early_options(True)
