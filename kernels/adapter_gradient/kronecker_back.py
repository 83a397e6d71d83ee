"""What a LoKr of few, wide blocks adds to x's gradient, and w1's gradient, on Hopper from one pass over g and x.

    u_tl = g_tl w2        d_x_tm = scale * sum_l w1[l, m] u_tl        d_w1[l, m] = sum_t u_tl . x_tm

A block of threads has some columns of w2 in shared memory for good, and rows of its own, of which TMA brings g's blocks
and those columns of x's. A tile is 8 rows of 8 blocks, 64 lines of a product. Two warpgroups take tiles in turns, each
with a ring of stages and a loading warp of its own, so that one multiplies while the other mixes. u, rounded to the
operands' kind, stays in registers: it is the left factor of a product with x's 8 rows, of which d_w1 takes the 8 x 8
blocks on the diagonal, and, turned, the right one of w1's with it. u itself is written nowhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from kernels import barrier, bits, wgmma
from kernels.elements import ELEMENTS
from kernels.hardware import WARP, WARPGROUP
from kernels.stages import PAIR_BYTES, begin_loading, hand_back, pair_maker, pair_of
from kernels.target import HOPPER_SHARED_BYTES, cuda, device, f32, f32p, i64, kernel_factory, types
from kernels.tensor_core import MMA, transposed_matrix
from kernels.warp import block_barrier, block_x, grid_x, sync_warp, thread_index, uniform
from kernels.wgmma import DEPTH, step_words
from kernels.wgmma_registers import add_products, settle, store_lines, tile_products, zero_sums

GROUPS = 2
THREADS = GROUPS * (WARPGROUP + WARP)
"""Two warpgroups that multiply, and a warp for each that loads."""

LINES, ROWS = 8, 8
"""Blocks of a row that a tile has room for, and its rows."""

STORED_ROWS = 2
"""Rows whose mixed blocks a warp stores at once."""

COLUMNS = (192, 128, 64)
"""Of w2 that a block of threads may have: what registers have room for."""

LEAST_STAGES, _MOST_STAGES = 3, 8

G, X, W2, D_X = range(4)
"""Positions of maps: of g and x [row, block, column], w2 [column of g's, column of x's], d_x as x."""
OUT_BLOCKS, IN_BLOCKS = range(2)
"""Positions of extents."""

_LINE, _WORDS, _WARPS = 2 * DEPTH, DEPTH // 4, WARPGROUP // WARP
_BOX_BYTES, _SLOT_BYTES = DEPTH * _LINE, STORED_ROWS * LINES * _LINE
_PARKED = LINES * LINES

_u32 = np.uint32
_f32 = np.float32


@dataclass(frozen=True)
class BackTile:
    """How a block works: ``across`` times 64 columns of w2, at most 3, and ``depth`` times 64 of its rows."""

    across: int
    depth: int

    @property
    def boxes(self) -> int:
        """Stages of a tile: g's, then x's."""
        return self.depth + self.across

    @property
    def slab_bytes(self) -> int:
        """Bytes of 64 rows of w2."""
        return self.across * _BOX_BYTES

    @property
    def slots_at(self) -> int:
        """Where the slots begin in which warps leave what is stored, after w2."""
        return self.depth * self.slab_bytes

    @property
    def ring_at(self) -> int:
        """Where stages begin, after the slots."""
        return self.slots_at + GROUPS * _WARPS * _SLOT_BYTES

    @property
    def stages(self) -> int:
        """Of a warpgroup: as many as there is room for."""
        room = HOPPER_SHARED_BYTES - self.ring_at - self.depth * PAIR_BYTES
        return min(_MOST_STAGES, room // (GROUPS * (_BOX_BYTES + PAIR_BYTES)))

    @property
    def barriers_at(self) -> int:
        """Where barriers begin: pairs of all stages, then one for each slab of w2."""
        return self.ring_at + GROUPS * self.stages * _BOX_BYTES

    @property
    def slab_barriers_at(self) -> int:
        """Where those of slabs begin."""
        return self.barriers_at + GROUPS * self.stages * PAIR_BYTES

    @property
    def shared_bytes(self) -> int:
        """All of it."""
        return self.slab_barriers_at + self.depth * PAIR_BYTES


_load_rows, _load_matrix, _send = barrier.tma_load(3), barrier.tma_load(2), barrier.tma_store(3)


def _place_of(tile: BackTile) -> Callable:
    """``place(base, group, number)``: the pair of barriers, address and phase of a group's box of that number."""
    stages, ring_at, barriers_at = _u32(tile.stages), _u32(tile.ring_at), _u32(tile.barriers_at)

    @device
    def place(base, group, number):
        turn = _u32(number // stages)
        stage = _u32(group * stages + number - _u32(turn * stages))
        pair = pair_of(_u32(base + barriers_at), stage)
        return pair, _u32(_u32(base + ring_at) + stage * _u32(_BOX_BYTES)), _u32(turn & _u32(1))

    return place


def _producer(tile: BackTile) -> Callable:
    """A loading thread: the block's columns of w2, the first one's part, and the boxes of all its group's tiles."""
    place, box_bytes, slab_bytes = _place_of(tile), _u32(_BOX_BYTES), _u32(tile.slab_bytes)
    depth, across, slab_barriers_at = tile.depth, tile.across, _u32(tile.slab_barriers_at)

    @device
    def load_w2(base, maps, column):
        for k in range(depth):
            full = pair_of(_u32(base + slab_barriers_at), _u32(k))
            barrier.barrier_expect_bytes(full, slab_bytes)
            for i in range(across):
                target = _u32(base + _u32((k * across + i) * _BOX_BYTES))
                _load_matrix(target, np.uint64(maps[W2]), full, _u32(column + _u32(i * DEPTH)), _u32(k * DEPTH))

    @device
    def produce(base, maps, column, tiles, first, step, group):
        if group == _u32(0):
            load_w2(base, maps, column)
        number, current = _u32(0), _u32(first + group * step)
        while current < tiles:
            row = _u32(current * _u32(ROWS))
            for k in range(depth):
                pair, target, phase = place(base, group, number)
                begin_loading(pair, _u32(phase ^ _u32(1)), box_bytes)
                _load_rows(target, np.uint64(maps[G]), pair, _u32(k * DEPTH), _u32(0), row)
                number = _u32(number + _u32(1))
            for i in range(across):
                pair, target, phase = place(base, group, number)
                begin_loading(pair, _u32(phase ^ _u32(1)), box_bytes)
                _load_rows(target, np.uint64(maps[X]), pair, _u32(column + _u32(i * DEPTH)), _u32(0), row)
                number = _u32(number + _u32(1))
            current = _u32(current + _u32(GROUPS) * step)

    return produce


def _multiplier(tile: BackTile, kind: str) -> Callable:
    """A device function: a warpgroup's tile of g times the block's columns of w2."""
    columns, depth, place = tile.across * DEPTH, tile.depth, _place_of(tile)
    along, down = step_words(True), step_words(False)
    places = tuple((step * along, step * down) for step in range(DEPTH // 16))
    multiply = tile_products(columns, places, kind, (True, False), adds=True)
    clear, older, done = zero_sums(columns // 2), settle(1, columns // 2), settle(0, columns // 2)
    by_rows, by_lines = wgmma.operand_descriptor(True), wgmma.operand_descriptor(False)
    slab_bytes, slab_barriers_at = _u32(tile.slab_bytes), _u32(tile.slab_barriers_at)

    @device
    def multiply_tile(u, base, group, number, lane):
        clear(u)
        previous = _u32(0)
        for k in range(_u32(depth)):
            pair, at, phase = place(base, group, _u32(number + _u32(k)))
            barrier.barrier_wait(pair_of(_u32(base + slab_barriers_at), _u32(k)), _u32(0))
            barrier.barrier_wait(pair, phase)
            multiply(u, by_rows(uniform(at)), by_lines(uniform(_u32(base + _u32(k) * slab_bytes))))
            older(u)
            if _u32(k) != _u32(0):
                hand_back(previous, lane)
            previous = pair
        done(u)
        hand_back(previous, lane)

    return multiply_tile


def _mixer(kind: str) -> Callable:
    """``mix(mixed, piece, w1, scale)``: two rows' blocks, 16 lines of 64 columns of u, times w1's transpose."""
    multiply, pack = MMA[kind], bits.PACK[kind]

    @device
    def mix(mixed, piece, w1, scale):
        none, zero = _u32(0), _f32(0)
        for j in range(DEPTH // 8):
            top, below = transposed_matrix(piece[2 * j]), transposed_matrix(piece[2 * j + 1])
            found = multiply(w1, none, none, w1, top, below, zero, zero, zero, zero)
            mixed[2 * j] = pack(scale * found[0], scale * found[1])
            mixed[2 * j + 1] = pack(scale * found[2], scale * found[3])

    return mix


_sent = barrier.tma_store_wait_read(0)


@device
def _store(mixed, d_x, slot, column, row, lane):
    """A warp's mixed blocks of two rows to its slot, and from there to columns of d_x."""
    if lane == _u32(0):
        _sent()
    sync_warp()
    store_lines(slot, mixed, lane)
    if lane == _u32(0):
        _send(np.uint64(d_x), slot, column, _u32(0), row)
        barrier.tma_store_commit()


@device
def _no_pieces(u, d_w1, base, group, number, w1, scale, d_x, slot, column, row, lane):
    pass


def _pieces(tile: BackTile, kind: str) -> Callable:
    """A device function: what becomes of a warpgroup's u, 64 columns after the other."""
    pieces = _no_pieces
    for number in reversed(range(tile.across)):
        pieces = _piece(tile, kind, number, pieces)
    return pieces


def _piece(tile: BackTile, kind: str, which: int, rest: Callable) -> Callable:
    """64 columns, then ``rest``."""
    place, pack, mix = _place_of(tile), bits.PACK[kind], _mixer(kind)
    add, added = add_products(DEPTH, DEPTH // 16, kind, k_major=True), settle(0, DEPTH // 2)
    by_rows, ahead, first = wgmma.operand_descriptor(True), _u32(tile.depth + which), which * DEPTH // 2
    shift = _u32(which * DEPTH)

    @device
    def piece(u, d_w1, base, group, number, w1, scale, d_x, slot, column, row, lane):
        words, mixed = cuda.local.array(_WORDS, np.uint32), cuda.local.array(_WORDS, np.uint32)
        for i in range(_WORDS):
            words[i] = pack(u[first + 2 * i], u[first + 2 * i + 1])
        pair, at, phase = place(base, group, _u32(number + ahead))
        barrier.barrier_wait(pair, phase)
        add(d_w1, words, by_rows(uniform(at)))
        added(d_w1)
        hand_back(pair, lane)
        mix(mixed, words, w1, scale)
        _store(mixed, d_x, slot, _u32(column + shift), row, lane)
        rest(u, d_w1, base, group, number, w1, scale, d_x, slot, column, row, lane)

    return piece


def _consumer(tile: BackTile, kind: str) -> Callable:
    """A multiplying warpgroup: every other tile of the block; its sums of d_w1 over all of them."""
    multiply_tile, finish_tile, clear = _multiplier(tile, kind), _pieces(tile, kind), zero_sums(DEPTH // 2)
    count, boxes, slots_at = tile.across * DEPTH // 2, tile.boxes, _u32(tile.slots_at)

    @device
    def consume(d_w1, base, d_x, w1, scale, column, tiles, first, step, group, warp, lane):
        u = cuda.local.array(count, np.float32)
        slot = _u32(base + slots_at + _u32(group * _u32(_WARPS) + warp) * _u32(_SLOT_BYTES))
        clear(d_w1)
        number, current = _u32(0), _u32(first + group * step)
        while current < tiles:
            row = _u32(current * _u32(ROWS) + warp * _u32(STORED_ROWS))
            multiply_tile(u, base, group, number, lane)
            finish_tile(u, d_w1, base, group, number, w1, scale, d_x, slot, column, row, lane)
            number = _u32(number + _u32(boxes))
            current = _u32(current + _u32(GROUPS) * step)
        if lane == _u32(0):
            _sent()

    return consume


@device
def _park(shared, d_w1, group, warp, lane):
    """Of the warp's rows, 2 warp and the next, the blocks on the diagonal, added."""
    first, second = _f32(0), _f32(0)
    for number in range(_WARPS):
        if warp == _u32(number):
            first = d_w1[8 * number] + d_w1[8 * number + 6]
            second = d_w1[8 * number + 1] + d_w1[8 * number + 7]
    at = _u32(_u32(group * _u32(_WARPS) + warp) * _u32(_PARKED) + (lane >> _u32(2)) * _u32(LINES))
    at = _u32(at + ((lane & _u32(3)) << _u32(1)))
    shared[at] = first
    shared[_u32(at + _u32(1))] = second


@device
def _finish(shared, parts, extents, thread):
    """The parked sums of all warps, added up in order, as the block's part."""
    line, column = np.int64(thread >> _u32(3)), np.int64(thread & _u32(7))
    if thread < _u32(_PARKED) and line < extents[OUT_BLOCKS] and column < extents[IN_BLOCKS]:
        value = _f32(0)
        for warp in range(GROUPS * _WARPS):
            value += shared[_u32(thread + _u32(warp * _PARKED))]
        parts[(block_x() * extents[OUT_BLOCKS] + line) * extents[IN_BLOCKS] + column] = value


def _mixing_word(kind: str) -> Callable:
    """``word(w1, extents, lane)``: the lane's two values of w1's transpose as a left factor; 0 where there are none."""
    element, pack = ELEMENTS[kind], bits.PACK[kind]
    load = element.load

    @device
    def one(w1, extents, line, column):
        if line < extents[OUT_BLOCKS] and column < extents[IN_BLOCKS]:
            return load(w1, line * extents[IN_BLOCKS] + column)
        return _f32(0)

    @device
    def word(w1, extents, lane):
        line, column = np.int64((lane & _u32(3)) << _u32(1)), np.int64(lane >> _u32(2))
        return pack(one(w1, extents, line, column), one(w1, extents, line + np.int64(1), column))

    return word


def _barriers(tile: BackTile) -> Callable:
    """A device function: makes all of them, for one thread."""
    make_pairs, depth = pair_maker(GROUPS * tile.stages, _WARPS), tile.depth
    barriers_at, slab_barriers_at = _u32(tile.barriers_at), _u32(tile.slab_barriers_at)

    @device
    def make(base):
        make_pairs(_u32(base + barriers_at))
        for k in range(depth):
            barrier.barrier_init(pair_of(_u32(base + slab_barriers_at), _u32(k)), _u32(1))
        barrier.barrier_init_visible()

    return make


@kernel_factory(("bf16", BackTile(3, 6)), ("bf16", BackTile(2, 8)), ("f16", BackTile(1, 3)))
def kronecker_back(kind: str, tile: BackTile):
    """Parameters: d_w1's parts, w1, maps, blocks of a row of g and of x, tiles of 8 rows, tiles of columns, the scale.

    Parts are [block of threads, l, m] in fp32. Blocks of threads that share rows are neighbours.
    """
    produce, consume, word, make_barriers = _producer(tile), _consumer(tile, kind), _mixing_word(kind), _barriers(tile)
    columns, sum_count = _u32(tile.across * DEPTH), DEPTH // 2

    def kernel(parts, w1, maps, extents, tiles, across, scale):
        shared = cuda.shared.array(0, np.float32, alignment=1024)
        base, thread = barrier.shared_address(shared, np.int64(0)), thread_index()
        group, own = _u32(thread // _u32(WARPGROUP)), _u32(thread & _u32(WARPGROUP - 1))
        warp, lane = _u32(own >> _u32(5)), _u32(own & _u32(WARP - 1))
        d_w1 = cuda.local.array(sum_count, np.float32)
        first = _u32(_u32(block_x()) // _u32(across))
        column = _u32(_u32(_u32(block_x()) - _u32(first * _u32(across))) * columns)
        step, tiles = _u32(_u32(grid_x()) // _u32(across)), _u32(tiles)
        loads = group == _u32(GROUPS)
        if loads and own == _u32(0):
            make_barriers(base)
            for number in range(4):
                barrier.tensor_map_acquire(np.uint64(maps[number]))
        block_barrier()
        barrier.wait_for_previous_grid()
        barrier.next_grid_may_begin()
        if loads:
            if lane == _u32(0):
                produce(base, maps, column, tiles, first, step, warp)
            sync_warp()
        else:
            factor = word(w1, extents, lane)
            consume(d_w1, base, maps[D_X], factor, scale, column, tiles, first, step, group, warp, lane)
        block_barrier()
        if not loads:
            _park(shared, d_w1, group, warp, lane)
        block_barrier()
        _finish(shared, parts, extents, thread)

    maps, pair = types.Tuple((i64,) * 4), types.Tuple((i64, i64))
    options = {"threads": THREADS, "shared_bytes": tile.shared_bytes, "min_blocks": 1}
    return kernel, (f32p, ELEMENTS[kind].pointer, maps, pair, i64, i64, f32), options | barrier.HOPPER
