"""Blocks of a row mixed by a small matrix on Hopper, as of `block_mix`, by TMA.

An item is 64 columns of all blocks of a row: out [l, e] = scale * w [l, m] x [m, e] by wgmma, where w stays in shared
memory. One warp asks for items ahead; warpgroups take them in turns, and each warp sends 16 lines of out by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from kernels import barrier, bits, wgmma
from kernels.division import divide
from kernels.hardware import WARP, WARPGROUP
from kernels.stages import PAIR_BYTES, begin_loading, hand_back, pair_maker, pair_of
from kernels.target import cuda, device, f32, i64, kernel_factory, types
from kernels.warp import block_barrier, block_x, grid_x, sync_warp, thread_index, uniform
from kernels.wgmma import DEPTH, step_words
from kernels.wgmma_registers import settle, store_lines, tile_products

GROUPS = 4
THREADS = GROUPS * WARPGROUP + WARP
MOST_TILES, MOST_LINES = 2, 128
"""64 blocks of out, and blocks of x, that there is room for."""

OUT_LINES = 16
"""Blocks of out that a warp sends at once."""

_LINE, _SUMS, _WORDS = 2 * DEPTH, DEPTH // 2, DEPTH // 4
_BOX_BYTES, _WARP_BYTES = DEPTH * _LINE, OUT_LINES * _LINE
_LEAST_BYTES = 116 << 10
"""Of shared memory: one block a multiprocessor, as few blocks must not queue on some."""

X, W, OUT = range(3)
"""Positions of maps: x and out [row, block, column], w as it is stored."""

_u32 = np.uint32


@dataclass(frozen=True)
class MixTile:
    """How a block works: ``lines`` blocks of x, a multiple of 16; ``tiles`` of 64 blocks of out; w is stored
    ``transposed``, [m, l].
    """

    lines: int
    tiles: int
    transposed: bool = False

    @property
    def stage_bytes(self) -> int:
        """Bytes of an item of x."""
        return self.lines * _LINE

    @property
    def stages(self) -> int:
        """Items under way, a power of two."""
        return 16 if self.lines <= DEPTH else 8

    @property
    def w_box_bytes(self) -> int:
        """Bytes of the part of w for 64 blocks of out."""
        return self.lines * _LINE if self.transposed else _BOX_BYTES

    @property
    def results_at(self) -> int:
        """Where results lie on their way out, after stages and w: a slot of each warp, for each tile."""
        return self.stages * self.stage_bytes + self.tiles * _BOX_BYTES * (2 if self.lines > DEPTH else 1)

    @property
    def barriers_at(self) -> int:
        """Where barriers begin: two of each stage, and w's."""
        return self.results_at + GROUPS * self.tiles * _BOX_BYTES

    @property
    def shared_bytes(self) -> int:
        """All of it."""
        return max(_LEAST_BYTES, self.barriers_at + PAIR_BYTES * (self.stages + 1))


_load_rows, _load_matrix, _send = barrier.tma_load(3), barrier.tma_load(2), barrier.tma_store(3)


def _producer(tile: MixTile) -> Callable:
    """The loading thread: w, and all items of the block."""
    stages, stage_bytes = tile.stages, _u32(tile.stage_bytes)
    w_at, w_box, tiles, transposed = tile.stages * tile.stage_bytes, tile.w_box_bytes, tile.tiles, tile.transposed

    @device
    def produce(base, barriers, maps, items, stride, begin, spans, by_spans):
        own = pair_of(barriers, stages)
        barrier.barrier_expect_bytes(own, _u32(tiles * w_box))
        for number in range(tiles):
            place, first = _u32(base + _u32(w_at + number * w_box)), _u32(number * DEPTH)
            if transposed:
                _load_matrix(place, np.uint64(maps[W]), own, first, _u32(0))
            else:
                _load_matrix(place, np.uint64(maps[W]), own, _u32(0), first)
        item, turn = begin, _u32(0)
        while item < items:
            stage = _u32(turn & _u32(stages - 1))
            phase = _u32(_u32(turn // _u32(stages)) & _u32(1))
            full, row = pair_of(barriers, stage), divide(item, by_spans)
            column = _u32(_u32(item - _u32(row * spans)) * _u32(DEPTH))
            begin_loading(full, _u32(phase ^ _u32(1)), stage_bytes)
            _load_rows(_u32(base + stage * stage_bytes), np.uint64(maps[X]), full, column, _u32(0), _u32(row))
            item, turn = _u32(item + stride), _u32(turn + _u32(1))

    return produce


def _writer(tile: MixTile, kind: str) -> Callable:
    """A device function: a warp's 16 lines of a tile's results to its slot, and from there to out."""
    pack, tiles = bits.PACK[kind], tile.tiles

    @device
    def write(sums, slot, out, number, scale, warp, lane, column, row, blocks):
        words = cuda.local.array(_WORDS, np.uint32)
        for i in range(_WORDS):
            words[i] = pack(scale * sums[2 * i], scale * sums[2 * i + 1])
        store_lines(slot, words, lane)
        first = _u32(_u32(number * DEPTH) + warp * _u32(OUT_LINES))
        if lane == _u32(0) and first < blocks:
            _send(np.uint64(out), slot, column, first, row)
        if lane == _u32(0) and number == tiles - 1:
            barrier.tma_store_commit()

    return write


def _consumer(tile: MixTile, kind: str) -> Callable:
    """A multiplying warpgroup: every so-manyeth item of the block."""
    tiles, stages, stage_bytes, results_at = tile.tiles, tile.stages, _u32(tile.stage_bytes), tile.results_at
    along, across, transposed = step_words(True), step_words(False), tile.transposed
    w_step = across if transposed else along
    places = tuple((step * w_step, step * across) for step in range(tile.lines // 16))
    multiply, settled = tile_products(DEPTH, places, kind, (not transposed, False)), settle(0, _SUMS)
    describe_w, by_lines = wgmma.operand_descriptor(not transposed), wgmma.operand_descriptor(False)
    w_at, w_box, write = tile.stages * tile.stage_bytes, tile.w_box_bytes, _writer(tile, kind)
    sent = barrier.tma_store_wait_read(0)

    @device
    def consume(base, barriers, maps, scale, items, stride, first, spans, by_spans, blocks, group, own):
        sums = cuda.local.array(_SUMS, np.float32)
        warp, lane = _u32(own >> _u32(5)), _u32(own & _u32(WARP - 1))
        slot = _u32(base + _u32(results_at) + _u32(group * _u32(4) + warp) * _u32(tiles * _WARP_BYTES))
        barrier.barrier_wait(pair_of(barriers, stages), _u32(0))
        turn = group
        item = _u32(first + group * stride)
        while item < items:
            stage = _u32(turn & _u32(stages - 1))
            phase = _u32(_u32(turn // _u32(stages)) & _u32(1))
            pair, row = pair_of(barriers, stage), divide(item, by_spans)
            column = _u32(_u32(item - _u32(row * spans)) * _u32(DEPTH))
            x = by_lines(uniform(_u32(base + stage * stage_bytes)))
            barrier.barrier_wait(pair, phase)
            if lane == _u32(0):
                sent()
            sync_warp()
            for number in range(tiles):
                multiply(sums, describe_w(_u32(base + _u32(w_at + number * w_box))), x)
                settled(sums)
                if number == tiles - 1:
                    hand_back(pair, lane)
                place = _u32(slot + _u32(number * _WARP_BYTES))
                write(sums, place, maps[OUT], number, scale, warp, lane, column, _u32(row), blocks)
            item = _u32(item + _u32(GROUPS) * stride)
            turn = _u32(turn + _u32(GROUPS))
        if lane == _u32(0):
            sent()

    return consume


@kernel_factory(("bf16", MixTile(48, 1)), ("bf16", MixTile(112, 1, True)), ("f16", MixTile(64, 2)))
def mix_blocks_streamed(kind: str, tile: MixTile):
    """Parameters: maps of x, w and out, scale, items, spans of 64 columns a row, what divides by them, blocks of out;
    how many items the first blocks of threads take, and how many these are: the others take the rest.

    Blocks of threads take items in turns, two of them side by side, so that what runs beside finds pairs of
    multiprocessors free. The grid waits for the one before, and then lets the next begin.
    """
    produce, consume, stages = _producer(tile), _consumer(tile, kind), tile.stages
    make_pairs, barriers_at = pair_maker(stages, WARPGROUP // WARP), _u32(tile.barriers_at)

    def kernel(maps, scale, items, spans, by_spans, blocks, quick_items, quick):
        shared = cuda.shared.array(0, np.uint8, alignment=1024)
        base, thread = barrier.shared_address(shared, np.int64(0)), thread_index()
        barriers = _u32(base + barriers_at)
        group, own = _u32(thread // _u32(WARPGROUP)), _u32(thread & _u32(WARPGROUP - 1))
        if group == _u32(GROUPS) and own == _u32(0):
            make_pairs(barriers)
            barrier.barrier_init(pair_of(barriers, stages), _u32(1))
            barrier.barrier_init_visible()
            for number in range(3):
                barrier.tensor_map_acquire(np.uint64(maps[number]))
        first, stride, end = _u32(block_x()), _u32(quick), _u32(quick_items)
        if first >= stride:
            first, stride, end = _u32(_u32(first - stride) + end), _u32(_u32(grid_x()) - stride), _u32(items)
        block_barrier()
        barrier.wait_for_previous_grid()
        barrier.next_grid_may_begin()
        if group == _u32(GROUPS):
            if own == _u32(0):
                produce(base, barriers, maps, end, stride, first, _u32(spans), by_spans)
            sync_warp()
        else:
            consume(base, barriers, maps, scale, end, stride, first, _u32(spans), by_spans, _u32(blocks), group, own)

    options = {"threads": THREADS, "shared_bytes": tile.shared_bytes, "min_blocks": 1, "cluster": 2}
    return kernel, (types.Tuple((i64, i64, i64)), f32, *(i64,) * 6), options | barrier.HOPPER
