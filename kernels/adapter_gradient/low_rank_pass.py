"""What a low-rank adapter's gradients need of g, from one pass over it on Hopper.

    u = scale g U [rows, rank]        part b = g_b^T t_b [columns, rank]        of the rows of tile b

u goes into the product that makes x's gradient; the parts' sum is the gradient of U. TMA brings 64 columns of a tile's
rows a stage: as rows they are the left factor of u, whose sums stay in registers, and as lines that of a part, of which
a stage makes 64 columns whole. Warpgroups have 128 rows of u each, by `wgmma`, which reads left factors at half of what
shared memory gives. So the part is made by `mma.sync`, whose fragments of g four more warps load, those of t being in
their registers, as many as have room.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from kernels import barrier, tensor_core, wgmma
from kernels.elements import ELEMENTS
from kernels.hardware import WARP, WARPGROUP
from kernels.matmul.streamed import column_of, each_eight, line_of
from kernels.matmul.streamed_tile import GROUP_ROWS
from kernels.stages import PAIR_BYTES, begin_loading, empty_of, hand_back, next_stage, pair_maker, pair_of
from kernels.target import HOPPER_SHARED_BYTES, cuda, device, f32, f32p, i64, kernel_factory, types
from kernels.warp import block_barrier, block_x, grid_x, sync_warp, thread_index
from kernels.wgmma import DEPTH

BOXES = 2
"""Loads of a stage's rows."""

UNIT = 8 * BOXES
"""Rows of a tile are a multiple of it."""

GROUPS_OF_ROWS = 2
"""Groups of 64 rows of u of a warpgroup."""

MOST_ROWS = 6 * GROUP_ROWS
MOST_RANKS, SPAN = 16, 32
"""Ranks, and bytes of a line of t and U that so many take."""

G, U, T = range(3)
"""Positions of maps: of g, of U and of t."""

ROWS, COLUMNS, RANK = range(3)
"""Positions of extents."""

_MOST_STAGES = 12
_GROUP_BYTES = GROUP_ROWS * DEPTH * 2
_STEP = 16
"""Rows of an instruction of the part's."""

_WARPS = WARPGROUP // WARP
_SUMS, _HELD = 16, 14
"""A thread's sums, and steps whose fragments of t it holds."""

_u32 = np.uint32
_load = barrier.tma_load(2)


@dataclass(frozen=True)
class PassTile:
    """How a block works: ``rows`` of a tile."""

    rows: int

    @property
    def groups(self) -> int:
        """Warpgroups of u."""
        return -(-self.rows // (GROUPS_OF_ROWS * GROUP_ROWS))

    @property
    def threads(self) -> int:
        """Those, the part's warps, and one that loads."""
        return WARPGROUP * (self.groups + 1) + WARP

    @property
    def a_bytes(self) -> int:
        """Bytes of a stage of g: products of u take all rows of a warpgroup, whatever is beyond its own."""
        return self.groups * GROUPS_OF_ROWS * _GROUP_BYTES

    @property
    def b_bytes(self) -> int:
        """Bytes of a stage of U."""
        return DEPTH * SPAN

    @property
    def t_bytes(self) -> int:
        """Bytes of a tile's t."""
        return self.rows * SPAN

    @property
    def loaded_bytes(self) -> int:
        """Bytes that arrive in a stage."""
        return self.rows * DEPTH * 2 + self.b_bytes

    @property
    def stages(self) -> int:
        """As many as there is room for."""
        room = HOPPER_SHARED_BYTES - self.t_bytes - PAIR_BYTES
        return min(_MOST_STAGES, room // (self.a_bytes + self.b_bytes + PAIR_BYTES))

    @property
    def barriers_at(self) -> int:
        """Where barriers begin, after the stages and t: those of the stages, and t's."""
        return self.stages * (self.a_bytes + self.b_bytes) + self.t_bytes

    @property
    def shared_bytes(self) -> int:
        """All of it."""
        return self.barriers_at + PAIR_BYTES * (self.stages + 1)


def _producer(tile: PassTile) -> Callable:
    """The loading thread: t and all stages of the block's tiles."""
    following, stages, stage_bytes = next_stage(tile.stages), tile.stages, _u32(tile.a_bytes + tile.b_bytes)
    t_at, t_bytes, box_rows = _u32(tile.stages * (tile.a_bytes + tile.b_bytes)), _u32(tile.t_bytes), tile.rows // BOXES
    a_bytes, loaded, rows = _u32(tile.a_bytes), _u32(tile.loaded_bytes), _u32(tile.rows)
    a_box, t_box = box_rows * DEPTH * 2, box_rows * SPAN

    @device
    def load_t(base, barriers, maps, row, phase):
        full = pair_of(barriers, stages)
        begin_loading(full, phase, t_bytes)
        for box in range(BOXES):
            place = _u32(base + t_at + _u32(box * t_box))
            _load(place, np.uint64(maps[T]), full, _u32(0), _u32(row + _u32(box * box_rows)))

    @device
    def load_stage(target, full, maps, row, column):
        for box in range(BOXES):
            place = _u32(target + _u32(box * a_box))
            _load(place, np.uint64(maps[G]), full, column, _u32(row + _u32(box * box_rows)))
        _load(_u32(target + a_bytes), np.uint64(maps[U]), full, _u32(0), column)

    @device
    def produce(base, barriers, maps, tiles, chunks):
        stage, phase, t_phase = _u32(0), _u32(1), _u32(1)
        number = _u32(block_x())
        while number < tiles:
            row = _u32(number * rows)
            load_t(base, barriers, maps, row, t_phase)
            t_phase = _u32(t_phase ^ _u32(1))
            for chunk in range(chunks):
                full, target = pair_of(barriers, stage), _u32(base + stage * stage_bytes)
                begin_loading(full, phase, loaded)
                load_stage(target, full, maps, row, _u32(_u32(chunk) * _u32(DEPTH)))
                stage, phase = following(stage, phase)
            number = _u32(number + _u32(grid_x()))

    return produce


@device
def _nothing(sums, target, rank, scale, row, rows):
    pass


def _storer(kind: str) -> Callable:
    """A device function: a warpgroup's sums, scaled, to lines from ``row`` on, of ``rows`` that there are."""
    store = ELEMENTS[kind].store

    @device
    def store_pair(target, rank, scale, row, rows, pair, first, second):
        line, column = _u32(row + line_of(pair)), column_of(pair)
        if line < rows and column < rank:
            at = np.int64(line) * np.int64(rank) + np.int64(column)
            store(target, at, first * scale)
            store(target, at + np.int64(1), second * scale)

    def make(number: int, values: Callable, rest: Callable) -> Callable:
        pair = _u32(2 * number)

        @device
        def store_eight(sums, target, rank, scale, row, rows):
            v = values(sums)
            store_pair(target, rank, scale, row, rows, pair, v[0], v[1])
            store_pair(target, rank, scale, row, rows, _u32(pair + _u32(1)), v[2], v[3])
            rest(sums, target, rank, scale, row, rows)

        return store_eight

    return each_eight(MOST_RANKS, make, _nothing)


@device
def _arrive(pair):
    """The warpgroup has done with a stage."""
    if thread_index() & _u32(WARPGROUP - 1) == _u32(0):
        barrier.barrier_arrive(empty_of(pair))


def _inner(tile: PassTile, kind: str) -> Callable:
    """A device function of a warpgroup: its rows of u of each of the block's tiles."""
    columns, stage_bytes, a_bytes = MOST_RANKS, _u32(tile.a_bytes + tile.b_bytes), _u32(tile.a_bytes)
    zero, settle = wgmma.zero_sums(columns), wgmma.wait_products(columns, 0)
    settle_older = wgmma.wait_products(columns, GROUPS_OF_ROWS)
    multiply = wgmma.multiply_add(columns, wgmma.STEPS, True, False, kind, SPAN)
    describe_g, describe_up = wgmma.operand_descriptor(True), wgmma.operand_descriptor(False, SPAN)
    following, store, rows = next_stage(tile.stages), _storer(kind), _u32(tile.rows)
    own_rows, own_bytes = _u32(GROUPS_OF_ROWS * GROUP_ROWS), _u32(GROUPS_OF_ROWS * _GROUP_BYTES)

    @device
    def accumulate(base, barriers, chunks, group, stage, phase):
        low, high, before = zero(), zero(), pair_of(barriers, stage)
        for chunk in range(chunks):
            pair, place = pair_of(barriers, stage), _u32(base + stage * stage_bytes)
            g, up = _u32(place + group * own_bytes), describe_up(_u32(place + a_bytes))
            barrier.barrier_wait(pair, phase)
            low = multiply(low, describe_g(g), up)
            high = multiply(high, describe_g(_u32(g + _u32(_GROUP_BYTES))), up)
            low, high = settle_older(low), settle_older(high)
            if _u32(chunk) > _u32(0):
                _arrive(before)
            before = pair
            stage, phase = following(stage, phase)
        low, high = settle(low), settle(high)
        _arrive(before)
        return low, high, stage, phase

    @device
    def inner(base, barriers, u, extents, scale, tiles, chunks, group):
        stage, phase, number, rank = _u32(0), _u32(0), _u32(block_x()), _u32(extents[RANK])
        while number < tiles:
            low, high, stage, phase = accumulate(base, barriers, chunks, group, stage, phase)
            end = min(_u32(extents[ROWS]), _u32(_u32(number + _u32(1)) * rows))
            row = _u32(number * rows + group * own_rows)
            store(low, u, rank, scale, row, end)
            store(high, u, rank, scale, _u32(row + _u32(GROUP_ROWS)), end)
            number = _u32(number + _u32(grid_x()))

    return inner


def _part(tile: PassTile, kind: str) -> tuple[Callable, Callable]:
    """Device functions of a warp: the fragments of a tile's t that are held, and 16 columns of a stage's part.

    Even and odd steps have sums of their own.
    """
    steps, held, load = tile.rows // _STEP, _held(tile), tensor_core.ldmatrix_transposed_ahead
    mma = tensor_core.mma_f16 if kind == "f16" else tensor_core.mma_bf16

    @device
    def load_t(shared, at, t):
        for step in range(held):
            place = _u32(step * _STEP * SPAN)
            t[4 * step], t[4 * step + 1], t[4 * step + 2], t[4 * step + 3] = load(shared, at, place)

    @device
    def multiply_step(shared, at, step, a, b, c, d, sums):
        g = load(shared, at, _u32(step * _STEP * DEPTH * 2))
        for half in range(2):
            to = 8 * (step & 1) + 4 * half
            sums[to], sums[to + 1], sums[to + 2], sums[to + 3] = mma(
                a, b, c, d, g[2 * half], g[2 * half + 1], sums[to], sums[to + 1], sums[to + 2], sums[to + 3]
            )

    @device
    def multiply(shared, at, of_t, t, sums):
        for i in range(_SUMS):
            sums[i] = np.float32(0)
        for step in range(held):
            multiply_step(shared, at, step, t[4 * step], t[4 * step + 1], t[4 * step + 2], t[4 * step + 3], sums)
        for step in range(held, steps):
            a, b, c, d = load(shared, of_t, _u32(step * _STEP * SPAN))
            multiply_step(shared, at, step, a, b, c, d, sums)

    return load_t, multiply


def _held(tile: PassTile) -> int:
    return min(_HELD, tile.rows // _STEP)


@device
def _store_part(parts, sums, first, column, count, rank, lane):
    """Sums, value i of rank g + 8 (i >> 1) and column 2 t + (i & 1) of lane 4 g + t, of 8 columns and the next 8."""
    for i in range(8):
        row = np.int64(_u32((lane >> _u32(2)) + _u32(8 * (i >> 1 & 1))))
        line = _u32(column + ((lane & _u32(3)) << _u32(1)) + _u32(8 * (i >> 2) + (i & 1)))
        if row < rank and line < count:
            parts[np.int64(_u32(first + line)) * rank + row] = sums[i] + sums[i + 8]


def _outer(tile: PassTile, kind: str) -> Callable:
    """A device function of a warp: 16 columns of every stage's part of each of the block's tiles."""
    stages, stage_bytes, fragments = tile.stages, _u32(tile.a_bytes + tile.b_bytes), 4 * _held(tile)
    following, t_at, (load_t, multiply) = next_stage(tile.stages), tile.stages * stage_bytes, _part(tile, kind)

    @device
    def outer(shared, barriers, parts, extents, tiles, chunks, warp, lane):
        t, sums = cuda.local.array(fragments, np.uint32), cuda.local.array(_SUMS, np.float32)
        stage, phase, t_phase = _u32(0), _u32(0), _u32(0)
        count, rank, number = _u32(extents[COLUMNS]), extents[RANK], _u32(block_x())
        line, half = _u32(lane & _u32(7)), _u32(lane >> _u32(3))
        # The places of a lane's line of 8 values in swizzled lines of t, and of g.
        of_t = _u32(line + ((half >> _u32(1)) << _u32(3)))
        swapped = _u32(half & _u32(1)) ^ _u32(of_t >> _u32(2) & _u32(1))
        t_place = np.int64(_u32(_u32(t_at) + of_t * _u32(SPAN) + (swapped << _u32(4))) >> _u32(1))
        of_g, unit = _u32(line + ((half & _u32(1)) << _u32(3))), _u32(_u32(2) * warp + (half >> _u32(1)))
        g_place = _u32(of_g * _u32(2 * DEPTH) + ((unit ^ line) << _u32(4)))
        while number < tiles:
            barrier.barrier_wait(pair_of(barriers, stages), t_phase)
            load_t(shared, t_place, t)
            t_phase, first = _u32(t_phase ^ _u32(1)), _u32(number * count)
            for chunk in range(chunks):
                pair = pair_of(barriers, stage)
                barrier.barrier_wait(pair, phase)
                multiply(shared, np.int64(_u32(stage * stage_bytes + g_place) >> _u32(1)), t_place, t, sums)
                hand_back(pair, lane)
                column = _u32(_u32(chunk) * _u32(DEPTH) + warp * _u32(_STEP))
                _store_part(parts, sums, first, column, count, rank, lane)
                stage, phase = following(stage, phase)
            hand_back(pair_of(barriers, stages), lane)
            number = _u32(number + _u32(grid_x()))

    return outer


@kernel_factory(("bf16", PassTile(352)), ("f16", PassTile(256)), ("bf16", PassTile(48)))
def low_rank_pass(kind: str, tile: PassTile):
    """Parameters: u, the parts, the maps :data:`G` to :data:`T`, :data:`ROWS` to :data:`RANK`, the scale of u.

    The parts are [tile, column, rank] in fp32. The grid waits for the one before, and then lets the next begin.
    """
    produce, inner, outer = _producer(tile), _inner(tile, kind), _outer(tile, kind)
    make, rows = pair_maker(tile.stages, tile.groups + _WARPS), _u32(tile.rows)
    groups, loader, arrivals = _u32(tile.groups), _u32(WARPGROUP * (tile.groups + 1)), _u32(_WARPS)
    barriers_at, stages = _u32(tile.barriers_at), tile.stages

    def kernel(u, parts, maps, extents, scale):
        shared = cuda.shared.array(0, np.uint8, alignment=1024)
        values = cuda.shared.array(0, np.uint16, alignment=1024)
        base, thread = barrier.shared_address(shared, np.int64(0)), thread_index()
        barriers, group = _u32(base + barriers_at), _u32(thread // _u32(WARPGROUP))
        tiles = _u32(_u32(_u32(extents[ROWS]) + _u32(rows - _u32(1))) // rows)
        chunks = _u32(_u32(_u32(extents[COLUMNS]) + _u32(DEPTH - 1)) // _u32(DEPTH))
        if thread == _u32(0):
            make(barriers)
            barrier.barrier_init(pair_of(barriers, stages), _u32(1))
            barrier.barrier_init(empty_of(pair_of(barriers, stages)), arrivals)
            barrier.barrier_init_visible()
        loads = thread == loader
        if loads:
            for number in range(3):
                barrier.tensor_map_acquire(np.uint64(maps[number]))
        block_barrier()
        barrier.wait_for_previous_grid()
        barrier.next_grid_may_begin()
        if group < groups:
            inner(base, barriers, u, extents, scale, tiles, chunks, group)
        elif group == groups:
            warp = _u32(_u32(thread >> _u32(5)) & _u32(_WARPS - 1))
            outer(values, barriers, parts, extents, tiles, chunks, warp, _u32(thread & _u32(WARP - 1)))
        else:
            if loads:
                produce(base, barriers, maps, tiles, chunks)
            sync_warp()

    parameters = (ELEMENTS[kind].pointer, f32p, types.Tuple((i64,) * 3), types.Tuple((i64,) * 3), f32)
    options = {"threads": tile.threads, "shared_bytes": tile.shared_bytes, "cluster": 2, "min_blocks": 1}
    return kernel, parameters, options | barrier.HOPPER
