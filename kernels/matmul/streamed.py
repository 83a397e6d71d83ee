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
from kernels.matmul.problem import ROWS
from kernels.matmul.wgmma_load import next_stage
from kernels.target import cuda, device, i64, types
from kernels.warp import block_barrier, block_x, grid_x, sync_warp, thread_index
from kernels.wgmma import DEPTH

GROUP_ROWS = 64
_LEAST_SPAN = 32
_WARPGROUP, _WARP = 128, 32
_SHARED_BYTES = 227 * 1024
_MOST_STAGES = 32
HEIGHT, TILES, ALL_TILES, STAGES = range(4)
"""Positions of what a launch is told: rows of a tile, tiles of a result and of all, stages of the depth."""

MAP, BATCH_STEP = range(2)
"""Positions of an operand's parameters: the address of its map (columns, lines, batch), 0 where the batch shares it."""

_u32 = np.uint32


@dataclass(frozen=True)
class StreamTile:
    """How a block works.

    ``groups`` of 64 rows, ``columns`` of the product (a multiple of 8), ``parts`` blocks that share the depth, of
    ``cluster`` that are placed on neighbouring multiprocessors. ``by_lines``: B's lines are values of K, not columns.
    """

    groups: int
    columns: int
    parts: int
    cluster: int
    by_lines: bool = False

    @property
    def threads(self) -> int:
        """Warpgroups that multiply, and one that loads."""
        return _WARPGROUP * (self.groups + 1)

    @property
    def a_bytes(self) -> int:
        """Bytes of a stage of A."""
        return self.groups * GROUP_ROWS * DEPTH * 2

    @property
    def span(self) -> int:
        """Bytes of a line of B's stage."""
        return max(_LEAST_SPAN, 2 * self.columns) if self.by_lines else 2 * DEPTH

    @property
    def b_bytes(self) -> int:
        """Bytes of a stage of B."""
        return DEPTH * self.span if self.by_lines else self.columns * self.span

    @property
    def b_box(self) -> tuple[int, int]:
        """(lines, columns) of a stage of B, as it is stored."""
        return (DEPTH, self.span // 2) if self.by_lines else (self.columns, DEPTH)

    @property
    def sums_bytes(self) -> int:
        """Bytes of the sums that the blocks of a cluster exchange."""
        return 4 * self.groups * GROUP_ROWS * self.columns if self.parts > 1 else 0

    @property
    def stages(self) -> int:
        """As many as shared memory has room for."""
        return min(_MOST_STAGES, (_SHARED_BYTES - self.sums_bytes) // (self.a_bytes + self.b_bytes + 16))

    @property
    def shared_bytes(self) -> int:
        """Stages, sums, barriers."""
        return self.stages * (self.a_bytes + self.b_bytes + 16) + self.sums_bytes


@dataclass(frozen=True)
class Hooks:
    """What a kernel adds: device functions.

    ``acquire(b)`` makes B's maps visible; ``load(target, full, b, k, batch)`` asks for a stage of B from value ``k`` of
    K on. ``put(result, b, more, batch, row, column, first, second)`` stores two neighbours of a row. ``aside(result, b,
    more, number, count)`` is work of the loading warpgroup's other threads, or nothing.
    """

    acquire: Callable
    load: Callable
    put: Callable
    aside: Callable


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
    a_bytes, stage_bytes, b_bytes = _u32(tile.a_bytes), _u32(tile.a_bytes + tile.b_bytes), _u32(tile.b_bytes)
    following, share, parts = next_stage(tile.stages), _share(tile), _u32(tile.parts)
    load_a, load_b = barrier.tma_load(3), hooks.load

    @device
    def produce(base, barriers, a, b, work):
        stage, phase = _u32(0), _u32(1)
        height, tiles = _u32(work[HEIGHT]), _u32(work[TILES])
        begin, end = share(_u32(work[STAGES]))
        nbytes = _u32(height * _u32(DEPTH * 2) + b_bytes)
        number = _u32(_u32(block_x()) // parts)
        while number < _u32(work[ALL_TILES]):
            batch = _u32(number // tiles)
            row, k = _u32(_u32(number - batch * tiles) * height), _u32(begin * _u32(DEPTH))
            for _ in range(_u32(end - begin)):
                full, target = _u32(barriers + stage * _u32(16)), _u32(base + stage * stage_bytes)
                barrier.barrier_wait(_u32(full + _u32(8)), phase)
                barrier.barrier_expect_bytes(full, nbytes)
                load_a(target, np.uint64(a[MAP]), full, k, row, _u32(batch * _u32(a[BATCH_STEP])))
                load_b(_u32(target + a_bytes), full, b, k, batch)
                k = _u32(k + _u32(DEPTH))
                stage, phase = following(stage, phase)
            number = _u32(number + _u32(_u32(grid_x()) // parts))

    return produce


def _accumulator(tile: StreamTile, kind: str) -> Callable:
    """A device function: sums of a warpgroup's 64 rows over the block's stages of a tile; the next stage and phase."""
    columns, stages, stage_bytes = tile.columns, _u32(tile.stages), _u32(tile.a_bytes + tile.b_bytes)
    zero, k_major = wgmma.zero_sums(columns), not tile.by_lines
    multiply = wgmma.multiply_add(columns, wgmma.STEPS, True, k_major, kind, tile.span)
    settle_all, settle_older = wgmma.wait_products(columns, 0), wgmma.wait_products(columns, 1)
    describe_a, describe_b = wgmma.operand_descriptor(True), wgmma.operand_descriptor(k_major, tile.span)
    following, a_bytes, group_bytes = next_stage(tile.stages), _u32(tile.a_bytes), _u32(GROUP_ROWS * DEPTH * 2)

    @device
    def release_before(barriers, stage):
        if thread_index() & _u32(_WARPGROUP - 1) == _u32(0):
            before = _u32((stage if stage != _u32(0) else stages) - _u32(1))
            barrier.barrier_arrive(_u32(barriers + before * _u32(16) + _u32(8)))

    @device
    def accumulate(base, barriers, count, group, stage, phase):
        sums = zero()
        for k in range(count):
            place = _u32(base + stage * stage_bytes)
            barrier.barrier_wait(_u32(barriers + stage * _u32(16)), phase)
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
    thread = _u32(thread_index() & _u32(_WARPGROUP - 1))
    return _u32(((thread >> _u32(5)) << _u32(4)) + ((thread & _u32(31)) >> _u32(2)) + ((pair & _u32(1)) << _u32(3)))


@device
def _column_of(pair):
    return _u32(((pair >> _u32(1)) << _u32(3)) + ((thread_index() & _u32(3)) << _u32(1)))


def _stored(put: Callable) -> Callable:
    """A device function: a pair of finished sums to the result, unless it lies beyond the tile or the result."""

    @device
    def store(result, b, work, more, group, number, pair, first, second):
        height, tiles = _u32(work[HEIGHT]), _u32(work[TILES])
        line, batch = _u32(group * _u32(GROUP_ROWS) + _line_of(pair)), _u32(number // tiles)
        row = np.int64(_u32(_u32(_u32(number - batch * tiles) * height) + line))
        if line < height and row < result[ROWS]:
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


def _storer(put: Callable) -> Callable:
    store = _stored(put)

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
        thread = _u32(thread_index() & _u32(_WARPGROUP - 1))
        return _u32(base + first + ((group * pairs + pair) * _u32(_WARPGROUP) + thread) * _u32(8))

    return place


def _finisher(tile: StreamTile, put: Callable) -> Callable:
    """A device function: the block's share of the pairs, added up over the cluster."""
    store, place, parts, own = _stored(put), _place(tile), tile.parts, tile.columns // 4 // tile.parts
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


def _barriers(tile: StreamTile) -> Callable:
    """A device function by which a warp makes the barriers, a lane each stage's: full for loads, empty for products."""
    stages, users = _u32(tile.stages), _u32(tile.groups)

    @device
    def make(barriers, lane):
        if lane < stages:
            full = _u32(barriers + lane * _u32(16))
            barrier.barrier_init(full, _u32(1))
            barrier.barrier_init(_u32(full + _u32(8)), users)
            barrier.barrier_init_visible()

    return make


def streamed(tile: StreamTile, kind: str, hooks: Hooks, result: types.Type, b: types.Type, more: types.Type) -> tuple:
    """A kernel, as a factory returns it.

    Parameters: the result's, A's, B's, :data:`HEIGHT` to :data:`STAGES`, and
    ``more``. A cluster whose blocks share the depth takes one tile; other blocks walk over tiles. The grid waits for
    the one before, and then lets the next begin.
    """
    assert tile.parts == 1 or tile.parts == tile.cluster, tile
    produce, accumulate, share = _producer(tile, hooks), _accumulator(tile, kind), _share(tile)
    together, parts, groups = tile.parts > 1, _u32(tile.parts), _u32(tile.groups)
    leave = _each_tile(tile, _parker(tile) if together else _storer(hooks.put))
    finish, make_barriers, acquire, aside = _finisher(tile, hooks.put), _barriers(tile), hooks.acquire, hooks.aside
    barriers_at = _u32(tile.shared_bytes - 16 * tile.stages)

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
        group, own = _u32(thread // _u32(_WARPGROUP)), _u32(thread & _u32(_WARPGROUP - 1))
        if thread < _u32(_WARP):
            make_barriers(_u32(base + barriers_at), thread)
        if group == groups and own == _u32(0):
            barrier.tensor_map_acquire(np.uint64(a[MAP]))
            acquire(b)
        block_barrier()
        barrier.wait_for_previous_grid()
        barrier.next_grid_may_begin()
        if group < groups:
            consume(base, result, b, work, more, group)
        else:
            if own == _u32(0):
                produce(base, _u32(base + barriers_at), a, b, work)
            elif own >= _u32(_WARP):
                spare = np.int64(_WARPGROUP - _WARP)
                aside(result, b, more, block_x() * spare + np.int64(own - _u32(_WARP)), grid_x() * spare)
            sync_warp()
        if together:
            barrier.cluster_barrier()
            if group < groups:
                finish(base, result, b, work, more, group)
            barrier.cluster_barrier()

    parameters = (result, types.Tuple((i64, i64)), b, types.Tuple((i64, i64, i64, i64)), more)
    options = {"threads": tile.threads, "shared_bytes": tile.shared_bytes, "cluster": tile.cluster}
    return kernel, parameters, options | barrier.HOPPER
