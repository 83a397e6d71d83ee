"""Narrow products on Hopper, A [m, k] times B of at most 64 columns, bound by reading A once: TMA, mbarriers, wgmma.

Loads of 16 bytes a lane keep the load unit's tags busy long before memory is (a warp touches eight lines of A an
instruction), so TMA brings A: one thread asks for boxes of 64 columns as far ahead as shared memory holds, 100 to 200
KB, and a warpgroup multiplies 64 rows of a stage by B's, of which every stage has its own. A block fills a
multiprocessor. The ``parts`` blocks of a cluster share the depth of a tile, which halves what they read of B, and add
up in order.

How many rows a tile has is the host's choice, the box that a map moves: whatever gives all blocks the same. Rows of
a stage beyond it hold anything; a product does not mix rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from kernels import barrier, bits, wgmma
from kernels.hardware import WARP, WARPGROUP
from kernels.matmul.streamed_tile import GROUP_ROWS, StreamTile
from kernels.stages import begin_loading, empty_of, next_stage, pair_maker, pair_of
from kernels.target import cuda, device, i64, types
from kernels.warp import block_barrier, block_x, grid_x, sync_warp, thread_index
from kernels.wgmma import DEPTH

HEIGHT, TILES, ALL_TILES, STAGES = range(4)
"""Positions of what a launch is told: rows of a tile, tiles of a result and of all, stages of the depth."""

MAP, BATCH_STEP = range(2)
"""Positions of an operand's parameters: the address of its map (columns, lines, batch), 0 where the batch shares it."""

OPERAND = types.Tuple((i64, i64))

_u32 = np.uint32


@dataclass(frozen=True)
class Hooks:
    """What a kernel adds: device functions.

    ``acquire(a, b)`` makes maps visible; ``load(target, full, a, b, row, k, batch)`` asks for a stage from a row and a
    value of K on. ``put(result, b, more, batch, row, column, first, second)`` stores two neighbours of a row, which may
    lie beyond the result. ``aside(result, b, more, number, count)`` is work of the loading warpgroup's other threads.
    ``batch_of(number, tiles)`` is the result that a tile belongs to.
    """

    acquire: Callable
    load: Callable
    put: Callable
    aside: Callable
    batch_of: Callable


@device
def nothing_aside(result, b, more, number, count):
    """No work for the other threads."""


@device
def batch_of_equals(number, tiles):
    """The result of a tile where all have as many."""
    return _u32(number // tiles)


_load_rows = barrier.tma_load(3)


@device
def load_rows(target, full, a, row, k, batch):
    """A stage of A, whose lines are rows."""
    _load_rows(target, np.uint64(a[MAP]), full, k, row, _u32(batch * _u32(a[BATCH_STEP])))


def _share(tile: StreamTile) -> Callable:
    """A device function: the block's stages of the depth, from the first to before the last."""
    parts = tile.parts

    @device
    def share(stages):
        if parts == 1:
            return _u32(0), stages
        rank = barrier.cluster_rank()
        return _u32(_u32(stages * rank) // _u32(parts)), _u32(_u32(stages * (rank + _u32(1))) // _u32(parts))

    return share


def _producer(tile: StreamTile, hooks: Hooks) -> Callable:
    """The loading thread: all stages of all tiles of the block."""
    stage_bytes, b_bytes = _u32(tile.a_bytes + tile.b_bytes), _u32(tile.b_bytes)
    following, share, parts = next_stage(tile.stages), _share(tile), _u32(tile.parts)
    load, batch_of = hooks.load, hooks.batch_of

    @device
    def produce(base, barriers, a, b, work):
        stage, phase = _u32(0), _u32(1)
        height, tiles = _u32(work[HEIGHT]), _u32(work[TILES])
        begin, end = share(_u32(work[STAGES]))
        nbytes = _u32(height * _u32(DEPTH * 2) + b_bytes)
        number = _u32(_u32(block_x()) // parts)
        while number < _u32(work[ALL_TILES]):
            batch = batch_of(number, tiles)
            row, k = _u32(_u32(number - batch * tiles) * height), _u32(begin * _u32(DEPTH))
            for _ in range(_u32(end - begin)):
                full, target = pair_of(barriers, stage), _u32(base + stage * stage_bytes)
                begin_loading(full, phase, nbytes)
                load(target, full, a, b, row, k, batch)
                k = _u32(k + _u32(DEPTH))
                stage, phase = following(stage, phase)
            number = _u32(number + _u32(_u32(grid_x()) // parts))

    return produce


def _accumulator(tile: StreamTile, kind: str) -> Callable:
    """A device function: sums of a warpgroup's 64 rows over the block's stages of a tile; the next stage and phase."""
    columns, stages, stage_bytes = tile.columns, _u32(tile.stages), _u32(tile.a_bytes + tile.b_bytes)
    zero, a_k_major, k_major = wgmma.zero_sums(columns), not tile.a_by_lines, not tile.by_lines
    multiply = wgmma.multiply_add(columns, wgmma.STEPS, a_k_major, k_major, kind, tile.span)
    settle_all, settle_older = wgmma.wait_products(columns, 0), wgmma.wait_products(columns, 1)
    describe_a, describe_b = wgmma.operand_descriptor(a_k_major), wgmma.operand_descriptor(k_major, tile.span)
    following, a_bytes, group_bytes = next_stage(tile.stages), _u32(tile.a_bytes), _u32(GROUP_ROWS * DEPTH * 2)

    @device
    def release_before(barriers, stage):
        if thread_index() & _u32(WARPGROUP - 1) == _u32(0):
            before = _u32((stage if stage != _u32(0) else stages) - _u32(1))
            barrier.barrier_arrive(empty_of(pair_of(barriers, before)))

    @device
    def accumulate(base, barriers, count, group, stage, phase):
        sums = zero()
        for k in range(count):
            place = _u32(base + stage * stage_bytes)
            barrier.barrier_wait(pair_of(barriers, stage), phase)
            sums = multiply(sums, describe_a(_u32(place + group * group_bytes)), describe_b(_u32(place + a_bytes)))
            sums = settle_older(sums)
            if _u32(k) > _u32(0):
                release_before(barriers, stage)
            stage, phase = following(stage, phase)
        sums = settle_all(sums)
        if count > _u32(0):
            release_before(barriers, stage)
        return sums, stage, phase

    return accumulate


@device
def _line_of(pair):
    """The row within its warpgroup's 64 that a pair of a thread's sums belongs to."""
    thread = _u32(thread_index() & _u32(WARPGROUP - 1))
    return _u32(((thread >> _u32(5)) << _u32(4)) + ((thread & _u32(31)) >> _u32(2)) + ((pair & _u32(1)) << _u32(3)))


@device
def _column_of(pair):
    return _u32(((pair >> _u32(1)) << _u32(3)) + ((thread_index() & _u32(3)) << _u32(1)))


def _stored(hooks: Hooks) -> Callable:
    """A device function: a pair of finished sums to the result, unless it lies beyond the tile."""
    put, batch_of = hooks.put, hooks.batch_of

    @device
    def store(result, b, work, more, group, number, pair, first, second):
        height, tiles = _u32(work[HEIGHT]), _u32(work[TILES])
        line, batch = _u32(group * _u32(GROUP_ROWS) + _line_of(pair)), batch_of(number, tiles)
        row = np.int64(_u32(_u32(_u32(number - batch * tiles) * height) + line))
        if line < height:
            put(result, b, more, np.int64(batch), row, np.int64(_column_of(pair)), first, second)

    return store


@device
def _nothing(sums, base, result, b, work, more, group, number):
    pass


def _each_tile(tile: StreamTile, one: Callable) -> Callable:
    """A device function that does ``one(eight columns)`` of the sums after the other."""
    chain = _nothing
    for number in reversed(range(tile.columns // 8)):
        chain = one(number, wgmma.part_of_sums(tile.columns, 4 * number, 4), chain)
    return chain


def _storer(hooks: Hooks) -> Callable:
    store = _stored(hooks)

    def make(number: int, values: Callable, rest: Callable) -> Callable:
        pair = _u32(2 * number)

        @device
        def store_eight(sums, base, result, b, work, more, group, tile_number):
            v = values(sums)
            store(result, b, work, more, group, tile_number, pair, v[0], v[1])
            store(result, b, work, more, group, tile_number, _u32(pair + _u32(1)), v[2], v[3])
            rest(sums, base, result, b, work, more, group, tile_number)

        return store_eight

    return make


def _parker(tile: StreamTile) -> Callable:
    place = _place(tile)

    def make(number: int, values: Callable, rest: Callable) -> Callable:
        pair = _u32(2 * number)

        @device
        def park_eight(sums, base, result, b, work, more, group, tile_number):
            v, word = values(sums), bits.f32_bits
            barrier.shared_store64(place(base, group, pair), word(v[0]), word(v[1]))
            barrier.shared_store64(place(base, group, _u32(pair + _u32(1))), word(v[2]), word(v[3]))
            rest(sums, base, result, b, work, more, group, tile_number)

        return park_eight

    return make


def _place(tile: StreamTile) -> Callable:
    """A device function: where a thread leaves a pair of its sums for the other blocks."""
    first, pairs = _u32(tile.stages * (tile.a_bytes + tile.b_bytes)), _u32(tile.columns // 4)

    @device
    def place(base, group, pair):
        thread = _u32(thread_index() & _u32(WARPGROUP - 1))
        return _u32(base + first + ((group * pairs + pair) * _u32(WARPGROUP) + thread) * _u32(8))

    return place


def _finisher(tile: StreamTile, hooks: Hooks) -> Callable:
    """A device function: the block's share of the pairs, added up over the cluster."""
    store, place, parts, own = _stored(hooks), _place(tile), tile.parts, tile.columns // 4 // tile.parts
    load = barrier.shared_load_remote

    @device
    def finish(base, result, b, work, more, group):
        number = _u32(_u32(block_x()) // _u32(parts))
        for i in range(own):
            pair = _u32(barrier.cluster_rank() * _u32(own) + _u32(i))
            at = place(base, group, pair)
            first, second = np.float32(0), np.float32(0)
            for other in range(parts):
                first += bits.bits_f32(load(at, _u32(other)))
                second += bits.bits_f32(load(_u32(at + _u32(4)), _u32(other)))
            store(result, b, work, more, group, number, pair, first, second)

    return finish


def streamed(
    tile: StreamTile, kind: str, hooks: Hooks, result: types.Type, a: types.Type, b: types.Type, more: types.Type
) -> tuple:
    """A kernel, as a factory returns it.

    Parameters: the result's, A's, B's, :data:`HEIGHT` to :data:`STAGES`, and
    ``more``. A cluster whose blocks share the depth takes one tile; other blocks walk over tiles. The grid waits for
    the one before, and then lets the next begin, unless it runs beside.
    """
    assert tile.parts == 1 or tile.parts == tile.cluster, tile
    produce, accumulate, share = _producer(tile, hooks), _accumulator(tile, kind), _share(tile)
    together, parts, groups = tile.parts > 1, _u32(tile.parts), _u32(tile.groups)
    leave = _each_tile(tile, _parker(tile) if together else _storer(hooks))
    finish, acquire, aside = _finisher(tile, hooks), hooks.acquire, hooks.aside
    beside, make_pairs = tile.beside, pair_maker(tile.stages, tile.groups)
    barriers_at = _u32(tile.stages * (tile.a_bytes + tile.b_bytes) + tile.sums_bytes)

    @device
    def consume(base, result, b, work, more, group):
        stage, phase = _u32(0), _u32(0)
        begin, end = share(_u32(work[STAGES]))
        number = _u32(_u32(block_x()) // parts)
        while number < _u32(work[ALL_TILES]):
            sums, stage, phase = accumulate(base, _u32(base + barriers_at), _u32(end - begin), group, stage, phase)
            leave(sums, base, result, b, work, more, group, number)
            number = _u32(number + _u32(_u32(grid_x()) // parts))

    def kernel(result, a, b, work, more):
        shared = cuda.shared.array(0, np.uint8, alignment=1024)
        base, thread = barrier.shared_address(shared, np.int64(0)), thread_index()
        group, own = _u32(thread // _u32(WARPGROUP)), _u32(thread & _u32(WARPGROUP - 1))
        if thread == _u32(0):
            make_pairs(_u32(base + barriers_at))
            barrier.barrier_init_visible()
        if group == groups and own == _u32(0):
            acquire(a, b)
        block_barrier()
        if not beside:
            barrier.wait_for_previous_grid()
            barrier.next_grid_may_begin()
        if group < groups:
            consume(base, result, b, work, more, group)
        else:
            if own == _u32(0):
                produce(base, _u32(base + barriers_at), a, b, work)
            elif own >= _u32(WARP):
                spare = np.int64(WARPGROUP - WARP)
                aside(result, b, more, block_x() * spare + np.int64(own - _u32(WARP)), grid_x() * spare)
            sync_warp()
        if together:
            barrier.cluster_barrier()
            if group < groups:
                finish(base, result, b, work, more, group)
            barrier.cluster_barrier()
        if beside and block_x() == grid_x() - 1:
            barrier.wait_for_previous_grid()

    parameters = (result, a, b, types.Tuple((i64, i64, i64, i64)), more)
    options = {"threads": tile.threads, "shared_bytes": tile.shared_bytes, "cluster": tile.cluster}
    return kernel, parameters, options | barrier.HOPPER
