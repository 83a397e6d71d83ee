"""Blocks of a row mixed beside the product that takes them: z [t, l, e] = scale * sum_m w [l, m] x [t, m, e].

Three warps of the loading warpgroup, which would be idle, do it while the first tile is multiplied, in the memory in
which results are staged later. An item is 32 columns of all blocks of a row, or of a few rows: TMA brings it,
`mma.sync` multiplies it, its results take its place, and TMA sends them. Items are given out as warps ask for them, so
that blocks wait only for what running blocks have taken, however many of the grid run at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from kernels import barrier, bits, counters, tensor_core
from kernels.division import divide
from kernels.hardware import WARP
from kernels.matmul.wgmma import Beside, persistent
from kernels.matmul.wgmma_load import flags_of, segment_loader
from kernels.matmul.wgmma_store import ROWS_OF_A_MATRIX, tile_store
from kernels.matmul.wgmma_tile import MIXED, WgmmaTile
from kernels.stages import next_stage
from kernels.target import cuda, device, f32, i64, kernel_factory, types, u32p
from kernels.warp import grid_x, sync_warp

WARPS, COLUMNS = 3, 32
MOST_BLOCKS = 64
"""Blocks of x, and of z, that a lane has registers for."""

X, W, Z = range(3)
"""Maps in the parameters: x and z [row, block, column], w as it is stored."""

COUNTERS = 3
"""Words of a run's counters, which are zero before it and after: items taken, items done, blocks that know that."""

PARAMETERS = types.Tuple((types.Tuple((i64,) * 3), u32p, f32, i64, i64, i64))
"""Maps, counters, scale; items, spans of 32 columns a row, what divides by them."""

_LINE, _HALF = 2 * COLUMNS, 32
_W_LINE = 128
_ITEM_LINES, _MOST_SLOTS = 32, 6
_ROOM = 34 << 10
"""Bytes for w and items: what four stages of the widest tile leave."""

_TAIL = 256
_TAKEN, _DONE, _SEEN = range(COUNTERS)
_NOTHING = (1 << 32) - 1
_MMA = {"bf16": tensor_core.mma_bf16, "f16": tensor_core.mma_f16}
_PACK = {"bf16": bits.pack_bf16, "f16": bits.pack_f16}
_u32 = np.uint32


@dataclass(frozen=True)
class MixBeside:
    """How items are mixed: blocks of x and of z, each in whole groups of eight; w is stored ``transposed``, [m, l]."""

    in_blocks: int
    out_blocks: int
    transposed: bool = False

    @classmethod
    def of(cls, in_blocks: int, out_blocks: int, transposed: bool) -> MixBeside:
        """That of so many blocks."""
        return cls(-(-in_blocks // 8) * 8, -(-out_blocks // 8) * 8, transposed)

    @property
    def paired(self) -> bool:
        """Whether two rows of eight blocks are multiplied at once, by w twice along a diagonal."""
        return max(self.in_blocks, self.out_blocks) == 8

    @property
    def lines(self) -> int:
        """Lines of 32 columns that a row has room for: its blocks of x, then those of z in their place."""
        most = max(self.in_blocks, self.out_blocks)
        return 8 if self.paired else -(-most // 16) * 16

    @property
    def rows(self) -> int:
        """Rows of an item."""
        return max(1, _ITEM_LINES // self.lines)

    @property
    def steps(self) -> int:
        """Products of 16 blocks of x."""
        return -(-self.in_blocks // 16)

    @property
    def tiles(self) -> int:
        """Of 16 blocks of z."""
        return -(-self.out_blocks // 16)

    @property
    def item_bytes(self) -> int:
        """Bytes of an item."""
        return self.rows * self.lines * _LINE

    @property
    def w_lines(self) -> int:
        """Lines of w: its rows as they are stored, in whole tiles."""
        return 16 * (self.steps if self.transposed else self.tiles)

    @property
    def slots(self) -> int:
        """Items that a warp has under way."""
        return min(_MOST_SLOTS, (_ROOM - self.w_lines * _W_LINE) // (WARPS * self.item_bytes))

    @property
    def tail_at(self) -> int:
        """Where barriers begin, and items' numbers: what outlasts the mixing."""
        return _ROOM

    @property
    def shared_bytes(self) -> int:
        """Bytes in place of those that results are staged in."""
        return _ROOM + _TAIL

    @property
    def own_barriers_at(self) -> int:
        """Where those stand after the items': w has come; mixing is done in this block, and in all blocks."""
        return self.tail_at + 8 * WARPS * self.slots

    @property
    def numbers_at(self) -> int:
        """Where items' numbers stand, each's with its slot's place."""
        return self.own_barriers_at + 24


_load_rows, _load_matrix, _send = barrier.tma_load(3), barrier.tma_load(2), barrier.tma_store(3)
_sent, _written = barrier.tma_store_wait_read(0), barrier.tma_store_wait(0)


def _barriers(mix: MixBeside, at: int) -> Callable:
    """``make(base)``: the barriers, by one thread; the staging memory begins ``at``."""
    items, first, own = WARPS * mix.slots, _u32(at + mix.tail_at), _u32(at + mix.own_barriers_at)

    @device
    def make(base):
        for slot in range(items):
            barrier.barrier_init(_u32(base + first + _u32(8 * slot)), _u32(1))
        for number in range(3):
            arrivals = _u32(WARPS) if number == 1 else _u32(1)
            barrier.barrier_init(_u32(base + own + _u32(8 * number)), arrivals)

    return make


def _after_mixing(mix: MixBeside, store: Callable) -> Callable:
    """The ``store`` of a tile's results, where what is mixed has left the memory that they are staged in."""
    mixed_at = _u32(mix.own_barriers_at + 8)

    @device
    def store_then(sums, staging, row, column, rows, columns, batch, out, p, q):
        barrier.barrier_wait(_u32(staging + mixed_at), _u32(0))
        store(sums, staging, row, column, rows, columns, batch, out, p, q)

    return store_then


def _loader(mix: MixBeside, at: int, load_segment: Callable) -> Callable:
    """``load_segment`` that waits, where a segment takes what is mixed, until all of it is."""
    ready_at = _u32(at + mix.own_barriers_at + 16)

    @device
    def load(base, barriers, table, words, row, column, columns, q, stage, phase):
        if flags_of(table[words + np.int64(5)]) & _u32(MIXED) != _u32(0):
            barrier.barrier_wait(_u32(base + ready_at), _u32(0))
            barrier.visible_to_tma()
        return load_segment(base, barriers, table, words, row, column, columns, q, stage, phase)

    return load


def _starter(mix: MixBeside, at: int) -> Callable:
    """``start(base, numbers, slot, q, item)``: one lane asks for an item, or says that there is none."""
    item_bytes, rows = _u32(mix.item_bytes), _u32(mix.rows)
    items_at, tail_at = _u32(at + mix.w_lines * _W_LINE), _u32(at + mix.tail_at)

    @device
    def start(base, numbers, slot, q, item):
        maps, _, _, items, spans, by_spans = q
        full = _u32(base + tail_at + _u32(slot << _u32(3)))
        if np.int64(item) < items:
            numbers[np.int64(slot)] = item
            row = divide(item, by_spans)
            column = _u32(_u32(item - _u32(row * _u32(spans))) * _u32(COLUMNS))
            barrier.barrier_expect_bytes(full, item_bytes)
            place = _u32(base + items_at + slot * item_bytes)
            _load_rows(place, np.uint64(maps[X]), full, column, _u32(0), _u32(row * rows))
        else:
            numbers[np.int64(slot)] = _u32(_NOTHING)
            barrier.barrier_arrive(full)

    return start


def _multiplier(mix: MixBeside, kind: str) -> Callable:
    """``multiply(base, shared, place, weights, scale, lane)``: an item at an offset in shared memory, in its place."""
    steps, tiles, lines = mix.steps, mix.tiles, 16 if mix.paired else mix.lines
    parts, transposed, paired = mix.rows * mix.lines // lines, mix.transposed, mix.paired
    load_w = tensor_core.ldmatrix_transposed_ahead if transposed else tensor_core.ldmatrix_ahead
    load_x, mma, pack = tensor_core.ldmatrix_transposed_ahead, _MMA[kind], _PACK[kind]
    store_matrix, squares, all_words = barrier.store_matrix, 16 * _LINE, 8 * steps

    @device
    def weights_of(shared, weights, unit, tile, step, lane):
        across, down = (tile, step) if transposed else (step, tile)
        place = _u32(weights + (_u32(unit ^ _u32(2 * across)) << _u32(4)))
        a0, a1, a2, a3 = load_w(shared, np.int64(place), _u32(down * 16 * _W_LINE))
        if paired:
            return a0, _u32(0), _u32(0), a0
        return a0, a1, a2, a3

    @device
    def multiply(base, shared, place, weights, scale, lane):
        words, sums = cuda.local.array(all_words, np.uint32), cuda.local.array(16, np.float32)
        line, unit = _u32(lane & _u32(15)), _u32(_u32(lane >> _u32(4)) ^ (_u32(lane >> _u32(1)) & _u32(3)))
        if transposed:
            w_line = _u32((lane & _u32(7)) + _u32(_u32(lane >> _u32(4)) << _u32(3)))
            w_unit = _u32((_u32(lane >> _u32(3)) & _u32(1)) ^ (lane & _u32(7)))
        else:
            w_line, w_unit = line, _u32(_u32(lane >> _u32(4)) ^ (lane & _u32(7)))
        w_place = _u32(weights + w_line * _u32(_W_LINE))
        for part in range(parts):
            first = _u32(place + _u32(part * lines * _LINE) + line * _u32(_LINE) + (unit << _u32(4)))
            second = _u32(first ^ _u32(_HALF))
            for step in range(steps):
                i, ahead = 8 * step, _u32(step * squares)
                words[i], words[i + 1], words[i + 2], words[i + 3] = load_x(shared, np.int64(first), ahead)
                words[i + 4], words[i + 5], words[i + 6], words[i + 7] = load_x(shared, np.int64(second), ahead)
            sync_warp()
            for tile in range(tiles):
                for i in range(16):
                    sums[i] = np.float32(0)
                for step in range(steps):
                    a0, a1, a2, a3 = weights_of(shared, w_place, w_unit, tile, step, lane)
                    for j in range(4):
                        sums[4 * j], sums[4 * j + 1], sums[4 * j + 2], sums[4 * j + 3] = mma(
                            a0, a1, a2, a3, words[8 * step + 2 * j], words[8 * step + 2 * j + 1],
                            sums[4 * j], sums[4 * j + 1], sums[4 * j + 2], sums[4 * j + 3],
                        )  # fmt: skip
                for i in range(16):
                    sums[i] *= scale
                for half in range(2):
                    i, target = 8 * half, _u32(base + (second if half else first) + _u32(tile * squares))
                    store_matrix(
                        target,
                        pack(sums[i], sums[i + 1]), pack(sums[i + 2], sums[i + 3]),
                        pack(sums[i + 4], sums[i + 5]), pack(sums[i + 6], sums[i + 7]),
                    )  # fmt: skip

    return multiply


def _mixer(mix: MixBeside, kind: str, at: int) -> Callable:
    """``mix_items(base, shared, numbers, warp, lane, q)``: a warp's items until none is left; how many they were."""
    slots, rows, following = mix.slots, _u32(mix.rows), next_stage(mix.slots)
    items_at, tail_at, item_bytes = _u32(at + mix.w_lines * _W_LINE), _u32(at + mix.tail_at), _u32(mix.item_bytes)
    start, multiply, w_at = _starter(mix, at), _multiplier(mix, kind), _u32(at)

    @device
    def mix_items(base, shared, numbers, warp, lane, q):
        maps, words, scale, _, spans, by_spans = q
        first, ahead, count = _u32(warp * _u32(slots)), _u32(0), _u32(0)
        if lane == _u32(0):
            ahead = counters.take(words, np.int64(_TAKEN))
            for slot in range(slots):
                item, ahead = ahead, counters.take(words, np.int64(_TAKEN))
                start(base, numbers, _u32(first + _u32(slot)), q, item)
        slot, phase = _u32(0), _u32(0)
        while True:
            own = _u32(first + slot)
            barrier.barrier_wait(_u32(base + tail_at + _u32(own << _u32(3))), phase)
            item = _u32(numbers[np.int64(own)])
            if item == _u32(_NOTHING):
                break
            place = _u32(items_at + own * item_bytes)
            multiply(base, shared, place, w_at, scale, lane)
            barrier.shared_visible_to_tma()
            sync_warp()
            if lane == _u32(0):
                row = divide(item, by_spans)
                column = _u32(_u32(item - _u32(row * _u32(spans))) * _u32(COLUMNS))
                _send(np.uint64(maps[Z]), _u32(base + place), column, _u32(0), _u32(row * rows))
                barrier.tma_store_commit()
                taken, ahead = ahead, counters.take(words, np.int64(_TAKEN))
                _sent()
                start(base, numbers, own, q, taken)
            count = _u32(count + _u32(1))
            slot, phase = following(slot, phase)
        return count

    return mix_items


def _work(mix: MixBeside, kind: str, at: int) -> Callable:
    """``work(base, thread, q)``: what the loading warpgroup's warps but the first do, in staging memory ``at``."""
    mix_items, own_at, numbers_at = _mixer(mix, kind, at), _u32(at + mix.own_barriers_at), (at + mix.numbers_at) // 4
    w_bytes, w_at = _u32(mix.w_lines * _W_LINE), _u32(at)

    @device
    def leave(own, thread, q):
        """Tell the other blocks, and the block's loading thread when all of them are done."""
        barrier.barrier_wait(_u32(own + _u32(8)), _u32(0))
        counters.wait_for(q[1], np.int64(_DONE), _u32(q[3]))
        if _u32(counters.take(q[1], np.int64(_SEEN)) + _u32(1)) == _u32(grid_x()):
            for word in range(COUNTERS):
                q[1][word] = _u32(0)
        barrier.barrier_arrive(_u32(own + _u32(16)))

    @device
    def work(base, thread, q):
        shared = cuda.shared.array(0, np.uint8, alignment=1024)
        numbers = cuda.shared.array(0, np.uint32, alignment=1024)[numbers_at:]
        warp, lane = _u32(_u32(thread // _u32(WARP)) - _u32(1)), _u32(thread & _u32(WARP - 1))
        own = _u32(base + own_at)
        if lane == _u32(0):
            for number in range(3):
                barrier.tensor_map_acquire(np.uint64(q[0][number]))
        barrier.wait_for_previous_grid()
        if thread == _u32(WARP):
            barrier.barrier_expect_bytes(own, w_bytes)
            _load_matrix(_u32(base + w_at), np.uint64(q[0][W]), own, _u32(0), _u32(0))
        barrier.barrier_wait(own, _u32(0))
        count = mix_items(base, shared, numbers, warp, lane, q)
        if lane == _u32(0):
            _written()
            barrier.visible_to_tma()
            counters.give(q[1], np.int64(_DONE), count)
            barrier.barrier_arrive(_u32(own + _u32(8)))
        if thread == _u32(WARP):
            leave(own, thread, q)
        sync_warp()

    return work


_REGISTERS = 88, 208


@kernel_factory(
    ("bf16", "bf16", WgmmaTile(256, 4, 2, diagonal=64), (), MixBeside(48, 48)),
    ("f16", "f32", WgmmaTile(256, 4, 2, b_k_major=False), (), MixBeside(64, 64, True)),
    ("bf16", "bf16", WgmmaTile(256, 4, 2), (("bias", "bf16"),), MixBeside(8, 8)),
    ("bf16", "bf16", WgmmaTile(128, 6, 1), (), MixBeside(16, 56, True)),
)
def multiply_mixed_wgmma(kind: str, out_kind: str, tile: WgmmaTile, steps: tuple, mix: MixBeside):
    """As `multiply_wgmma` of results stored by TMA, whose segments flagged MIXED take what this launch mixes.

    Its last parameters are `PARAMETERS`.
    """
    at = tile.stages * tile.stage_bytes
    pointer, store, finish = tile_store(out_kind, tile.columns, "tma", steps, ROWS_OF_A_MATRIX)
    target, load = (pointer, _after_mixing(mix, store), finish), _loader(mix, at, segment_loader(tile))
    beside = Beside(_barriers(mix, at), _work(mix, kind, at), _REGISTERS)
    return persistent(tile, kind, target, mix.shared_bytes, load, steps, PARAMETERS, beside)
