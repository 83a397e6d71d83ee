"""Blocks of a row mixed by a small matrix: out[t, l, e] = scale * sum_m w[l, m] x[t, m, e], that is (w kron I) x.

What LoKr needs before its second half: reading x and writing out is all the work. On tensor cores a warp takes 64 of a
row's e: lane (g, t) loads eight neighbours of blocks 2 t and 2 t + 1, whose pairs are the instruction's operand for
eight groups of columns, and holds in the end eight neighbours, twice, of each of its blocks l. Which eight a lane loads
is chosen so that the four lanes of a block store 64 bytes side by side. Nothing passes through shared memory but w,
which arrives while the first x is on its way.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from kernels import barrier, bits, memory, tensor_core
from kernels.elements import ELEMENTS
from kernels.target import SIMULATOR, cuda, device, f32, i64, kernel_factory
from kernels.warp import block_barrier, block_x, grid_x, thread_index

WARPS = 2 if SIMULATOR else 8
THREADS = 32 * WARPS
SPAN = 64
"""Values of e that a warp takes at once: an item, with its row."""

MOST_GROUPS = 16
"""Groups of 8 blocks m that fit into registers."""

_STAGED = 8
"""Elements of w that a thread has on the way at once."""

_WORDS_AHEAD = 40
"""Words of x that a thread can hold while w is staged, without spills."""

_MMA = {"bf16": tensor_core.mma_bf16, "f16": tensor_core.mma_f16}
_PACK = {"bf16": bits.pack_bf16, "f16": bits.pack_f16}
_u32 = np.uint32


def weight_pitch(groups: int) -> int:
    """Elements from a row of w to the next in shared memory: 16 bytes beyond whole steps of 16, so rows differ in
    bank.
    """
    return 16 * (-(-groups // 2)) + 8


def items_at_once(groups: int) -> int:
    """Items whose x a warp has on the way at once, where few blocks leave registers for several."""
    return max(1, 4 // groups)


def blocks_at_once(groups: int) -> int:
    """Blocks of threads on a multiprocessor: what their registers allow."""
    return 2 if 8 * groups * items_at_once(groups) <= 64 else 1


def _weight_stager(groups: int, transposed: bool) -> Callable:
    """A device function that puts w into shared memory, with zeros up to whole tiles."""
    pitch = weight_pitch(groups)

    @device
    def stage(shared, w, out_blocks, in_blocks, thread):
        values = cuda.local.array(_STAGED, np.uint16)
        padded = _u32(_u32(_u32(out_blocks + np.int64(15)) >> _u32(4)) << _u32(4))
        units, zero = _u32(padded * _u32(pitch // 8)), _u32(0)
        for turn in range(_u32((units + _u32(THREADS - 1)) // _u32(THREADS))):
            place = _u32(_u32(turn) * _u32(THREADS) + thread)
            if place < units:
                memory.shared_store128(shared, np.int64(_u32(place << _u32(3))), zero, zero, zero, zero)
        block_barrier()
        inner, count = _u32(out_blocks if transposed else in_blocks), _u32(out_blocks * in_blocks)
        for turn in range(_u32((count + _u32(THREADS * _STAGED - 1)) // _u32(THREADS * _STAGED))):
            first = _u32(_u32(turn) * _u32(THREADS * _STAGED) + thread)
            for i in range(_STAGED):
                values[i] = w[np.int64(min(_u32(first + _u32(i * THREADS)), _u32(count - _u32(1))))]
            for i in range(_STAGED):
                place = _u32(first + _u32(i * THREADS))
                row = _u32(place // inner)
                column = _u32(place - _u32(row * inner))
                if place < count:
                    at = _u32(column * _u32(pitch) + row) if transposed else _u32(row * _u32(pitch) + column)
                    shared[np.int64(at)] = values[i]

    return stage


def _movers(groups: int) -> tuple[Callable, Callable]:
    """Device functions over all groups of blocks.

    Fetch: the lane's eight values of its two blocks in every group, as words 8 group + 4 half + i; zeros past the last.
    Pair: turns them to the pairs of blocks for column group j, as word 8 group + j.
    """

    @device
    def fetch(words, at, x, start, in_blocks, width, place, t):
        for group in range(groups):
            for half in range(2):
                block = np.int64(_u32(_u32(8 * group + half) + (t << _u32(1))))
                found = memory.load128_stream(x, start + min(block, in_blocks - np.int64(1)) * width + place)
                for i in range(4):
                    words[at + 8 * group + 4 * half + i] = found[i] if block < in_blocks else _u32(0)

    @device
    def pair(words, at):
        both = cuda.local.array(8, np.uint32)
        for group in range(groups):
            first = at + 8 * group
            for i in range(4):
                above, below = words[first + i], words[first + 4 + i]
                both[2 * i], both[2 * i + 1] = bits.low_halves(above, below), bits.high_halves(above, below)
            for j in range(8):
                words[first + j] = both[j]

    return fetch, pair


def _multiplier(kind: str, groups: int) -> Callable:
    """A device function: the lane's sums of 16 blocks l, of paired words."""
    mma, pitch = _MMA[kind], weight_pitch(groups)

    @device
    def multiply(sums, shared, words, at, block0, lane):
        for i in range(32):
            sums[i] = np.float32(0)
        row = _u32(block0 + (lane & _u32(15)))
        place = _u32(row * _u32(pitch) + ((lane >> _u32(4)) << _u32(3)))
        for step in range(-(-groups // 2)):
            a0, a1, a2, a3 = tensor_core.ldmatrix(shared, np.int64(_u32(place + _u32(16 * step))))
            for j in range(8):
                second = words[at + 16 * step + 8 + j] if 2 * step + 1 < groups else _u32(0)
                sums[4 * j], sums[4 * j + 1], sums[4 * j + 2], sums[4 * j + 3] = mma(
                    a0, a1, a2, a3, words[at + 16 * step + j], second,
                    sums[4 * j], sums[4 * j + 1], sums[4 * j + 2], sums[4 * j + 3],
                )  # fmt: skip

    return multiply


def _storer(kind: str, early: bool) -> Callable:
    """A device function: one block's sums, 4 j + 2 half + side, which are e + 32 side + j; e is the lane's."""
    pack, store128 = _PACK[kind], memory.store128 if early else memory.store128_stream

    @device
    def store(out, start, sums, scale, block, out_blocks, width, e, half):
        if block < out_blocks:
            for side in range(2):
                first, at = 2 * half + side, e + np.int64(32 * side)
                if at < width:
                    store128(
                        out,
                        start + block * width + at,
                        pack(scale * sums[first], scale * sums[first + 4]),
                        pack(scale * sums[first + 8], scale * sums[first + 12]),
                        pack(scale * sums[first + 16], scale * sums[first + 20]),
                        pack(scale * sums[first + 24], scale * sums[first + 28]),
                    )

    return store


@kernel_factory(("bf16", 1, False), ("bf16", 6, True), ("f16", 16, False), ("bf16", 5, False, True))
def mix_blocks(kind: str, groups: int, transposed: bool, early: bool = False):
    """Parameters: out, x, w, scale, rows, blocks of out, blocks of x, width e, row strides of out and x.

    ``groups`` are groups of 8 blocks of x. w is [blocks of out, blocks of x], or stored the other way round if
    ``transposed``. Widths and strides are multiples of eight elements. With ``early`` the next grid, which reads out,
    may begin at once (sm_90), and out stays in L2 for it.
    """
    element, several = ELEMENTS[kind], items_at_once(groups)
    words_of_item = 8 * groups if several > 1 else 0  # a place that is known keeps words in registers
    stage_weight, (fetch_item, pair) = _weight_stager(groups, transposed), _movers(groups)
    multiply, store, all_words = _multiplier(kind, groups), _storer(kind, early), several * 8 * groups
    ahead = all_words <= _WORDS_AHEAD

    @device
    def fetch(words, x, first, items, spans, x_stride, in_blocks, width, own, t):
        for i in range(several):
            item = min(_u32(first + _u32(i)), _u32(items - _u32(1)))
            row = _u32(item // spans)
            e = np.int64(_u32(_u32(_u32(item - _u32(row * spans)) * _u32(SPAN)) + own))
            place = min(e, width - np.int64(8))
            fetch_item(words, i * words_of_item, x, np.int64(row) * x_stride, in_blocks, width, place, t)

    def kernel(out, x, w, scale, rows, out_blocks, in_blocks, width, out_stride, x_stride):
        if early:
            barrier.next_grid_may_begin()
        shared = cuda.shared.array(0, np.uint16, alignment=16)
        words, sums = cuda.local.array(all_words, np.uint32), cuda.local.array(32, np.float32)
        thread = thread_index()
        lane, number = _u32(thread & _u32(31)), _u32(thread >> _u32(5))
        g, t = _u32(lane >> _u32(2)), _u32(lane & _u32(3))
        own = _u32(_u32(_u32(_u32(g & _u32(1)) << _u32(2)) + _u32(g >> _u32(1))) << _u32(3))
        spans = _u32((width + np.int64(SPAN - 1)) // np.int64(SPAN))
        items = _u32(_u32(rows) * spans)
        first = _u32(_u32(_u32(block_x()) * _u32(WARPS) + number) * _u32(several))
        if ahead:
            fetch(words, x, first, items, spans, x_stride, in_blocks, width, own, t)
        stage_weight(shared, w, out_blocks, in_blocks, thread)
        block_barrier()
        if not ahead:
            fetch(words, x, first, items, spans, x_stride, in_blocks, width, own, t)
        while first < items:
            for i in range(several):
                pair(words, i * words_of_item)
            for tile in range(_u32((out_blocks + np.int64(15)) >> np.int64(4))):
                block0 = _u32(_u32(tile) << _u32(4))
                for i in range(several):
                    item = _u32(first + _u32(i))
                    row = _u32(item // spans)
                    e = np.int64(_u32(_u32(_u32(item - _u32(row * spans)) * _u32(SPAN)) + _u32(t << _u32(3))))
                    start, count = np.int64(row) * out_stride, out_blocks if item < items else np.int64(0)
                    multiply(sums, shared, words, i * words_of_item, block0, lane)
                    store(out, start, sums, scale, np.int64(block0 + g), count, width, e, 0)
                    store(out, start, sums, scale, np.int64(block0 + g + _u32(8)), count, width, e, 1)
            first = _u32(first + _u32(grid_x()) * _u32(WARPS * several))
            if first < items:
                fetch(words, x, first, items, spans, x_stride, in_blocks, width, own, t)

    pointer = element.pointer
    parameters = (pointer, pointer, pointer, f32, i64, i64, i64, i64, i64, i64)
    options = {"threads": THREADS, "min_blocks": blocks_at_once(groups)}
    return kernel, parameters, options | (barrier.HOPPER if early else {})


@kernel_factory(("bf16", "bf16", "bf16", False), ("f32", "bf16", "f16", True))
def mix_blocks_portable(out_kind: str, kind: str, weight_kind: str, transposed: bool):
    """The same for any kinds and extents: an element of out a thread. Parameters as there."""
    store_one, load_one, load_weight = ELEMENTS[out_kind].store, ELEMENTS[kind].load, ELEMENTS[weight_kind].load

    def kernel(out, x, w, scale, rows, out_blocks, in_blocks, width, out_stride, x_stride):
        index = _u32(_u32(block_x()) * _u32(THREADS) + thread_index())
        of_row = _u32(out_blocks * width)
        if np.int64(index) < rows * np.int64(of_row):
            row = np.int64(index // of_row)
            inside = _u32(index % of_row)
            block = np.int64(inside // _u32(width))
            e = np.int64(inside) - block * width
            value = np.float32(0)
            for m in range(in_blocks):
                weight = load_weight(
                    w, np.int64(m) * out_blocks + block if transposed else block * in_blocks + np.int64(m)
                )
                value += weight * load_one(x, row * x_stride + np.int64(m) * width + e)
            store_one(out, row * out_stride + np.int64(inside), scale * value)

    pointers = (ELEMENTS[out_kind].pointer, ELEMENTS[kind].pointer, ELEMENTS[weight_kind].pointer)
    return kernel, (*pointers, f32, i64, i64, i64, i64, i64, i64), {"threads": THREADS}
