"""Blocks of a row mixed by a small matrix: out[t, l, e] = scale * sum_m w[l, m] x[t, m, e], that is (w kron I) x.

What LoKr needs before its second half: reading x and writing out is all the work. On tensor cores a warp takes 64 of a
row's e: lane (g, t) loads eight neighbours of blocks 2 t and 2 t + 1, whose pairs are the instruction's operand for
eight groups of columns, and holds in the end eight neighbours, twice, of each of its blocks l. Which eight a lane loads
is chosen so that the four lanes of a block hold 64 bytes side by side, twice, of which neighbouring blocks exchange
half before they store. Nothing passes through shared memory but w, which arrives while the first x is on its way.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from kernels import barrier, bits, memory, tensor_core
from kernels.division import divide
from kernels.elements import ELEMENTS
from kernels.target import SIMULATOR, cuda, device, f32, i64, kernel_factory
from kernels.warp import block_barrier, block_x, grid_x, shuffle_xor_word, thread_index

PORTABLE_THREADS = 64 if SIMULATOR else 256
SPAN = 64
"""Values of e that a warp takes at once: an item, with its row."""

MOST_GROUPS = 16
"""Groups of 8 blocks m that fit into registers."""

_OTHER_REGISTERS = 64
"""Registers of a thread besides its words of x."""

_u32 = np.uint32


def items_at_once(groups: int) -> int:
    """Items whose x a warp has on the way at once, where few blocks leave registers for several."""
    return max(1, 4 // groups)


def warps_of(groups: int) -> int:
    """Warps of a block, which has a multiprocessor to itself: as many as registers allow."""
    registers = 8 * groups * items_at_once(groups) + _OTHER_REGISTERS
    return 2 if SIMULATOR else min(16, (1 << 11) // registers // 4 * 4)


def weight_vector(columns: int) -> int:
    """Elements of w, whose rows as they are stored have so many, that are copied at once."""
    return next(vector for vector in (8, 2, 1) if columns % vector == 0)


def weight_places(rows: int, columns: int) -> tuple[int, int]:
    """Rows of w in shared memory, and elements from one to the next: whole tiles, and 16 bytes for other banks."""
    return -(-rows // 16) * 16, -(-columns // 16) * 16 + 8


def _weight_stager(vector: int, threads: int) -> Callable:
    """A device function that asks for w, as it is stored, in shared memory, with zeros up to whole tiles."""
    copy = memory.copy_async_fill(2 * vector) if vector > 1 else None

    @device
    def stage(shared, w, rows, columns, pitch, thread):
        units = _u32(_u32(pitch - _u32(8)) // _u32(vector))
        total = _u32(_u32(_u32(_u32(rows + _u32(15)) >> _u32(4)) << _u32(4)) * units)
        for turn in range(_u32((total + _u32(threads - 1)) // _u32(threads))):
            place = _u32(_u32(turn) * _u32(threads) + thread)
            row = _u32(place // units)
            column = _u32(_u32(place - _u32(row * units)) * _u32(vector))
            inside = row < rows and column < columns
            source = np.int64(_u32(row * columns + column)) if inside else np.int64(0)
            if place < total:
                target = np.int64(_u32(row * pitch + column))
                if vector > 1:
                    copy(shared, target, w, source, _u32(2 * vector) if inside else _u32(0))
                else:
                    shared[target] = w[source] if inside else np.uint16(0)

    return stage


def _movers(groups: int, ragged: bool) -> tuple[Callable, Callable]:
    """Device functions over all groups of blocks.

    Fetch: the lane's eight values of its two blocks in every group, as words 8 group + 4 half + i, of the row at
    ``start``; zeros past the last block, where there are fewer than the groups have (``ragged``).
    Pair: turns them to the pairs of blocks for column group j, as word 8 group + j.
    """

    @device
    def fetch(words, at, x, start, in_blocks, width, place, t):
        first = _u32(_u32(t << _u32(1)) * width + place)
        for group in range(groups):
            for half in range(2):
                number = 8 * group + half
                there = not ragged or _u32(_u32(number) + (t << _u32(1))) < in_blocks
                offset = _u32(first + _u32(number) * width) if there else place
                found = memory.load128_stream(x, start + np.int64(offset))
                for i in range(4):
                    words[at + 8 * group + 4 * half + i] = found[i] if there else _u32(0)

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


def _multiplier(kind: str, groups: int, transposed: bool) -> Callable:
    """A device function: the lane's sums of 16 blocks l, of paired words."""
    mma, load = tensor_core.MMA[kind], tensor_core.ldmatrix_transposed if transposed else tensor_core.ldmatrix

    @device
    def multiply(sums, shared, words, at, block0, pitch, lane):
        for i in range(32):
            sums[i] = np.float32(0)
        if transposed:
            row = _u32((lane & _u32(7)) + _u32((lane >> _u32(4)) << _u32(3)))
            place, further = _u32(row * pitch + block0 + (lane & _u32(8))), _u32(pitch << _u32(4))
        else:
            row = _u32(block0 + (lane & _u32(15)))
            place, further = _u32(row * pitch + ((lane >> _u32(4)) << _u32(3))), _u32(16)
        for step in range(-(-groups // 2)):
            a0, a1, a2, a3 = load(shared, np.int64(_u32(place + _u32(step) * further)))
            for j in range(8):
                second = words[at + 16 * step + 8 + j] if 2 * step + 1 < groups else _u32(0)
                sums[4 * j], sums[4 * j + 1], sums[4 * j + 2], sums[4 * j + 3] = mma(
                    a0, a1, a2, a3, words[at + 16 * step + j], second,
                    sums[4 * j], sums[4 * j + 1], sums[4 * j + 2], sums[4 * j + 3],
                )  # fmt: skip

    return multiply


def _storer(kind: str, early: bool) -> Callable:
    """A device function: 16 blocks of out from ``block0`` on, of an item in the row at ``start``.

    A lane's sums are 4 j + 2 half + side of block g + 8 half and e + 32 side + j, e being the lane's. Lanes of two
    neighbouring blocks exchange a side, so that a store writes whole lines of 128 bytes: half lines take as long.
    """
    pack, store128 = bits.PACK[kind], memory.store128 if early else memory.store128_stream

    @device
    def pack_side(words, at, sums, first):
        for i in range(4):
            words[at + i] = pack(sums[first + 8 * i], sums[first + 8 * i + 4])

    @device
    def store(out, start, sums, block0, out_blocks, width, e, g):
        odd, words = g & _u32(1) != _u32(0), cuda.local.array(8, np.uint32)
        column = _u32(e + _u32(32)) if odd else e
        for half in range(2):
            first = _u32(block0 + _u32(8 * half))
            if first < out_blocks:
                pack_side(words, 0, sums, 2 * half)
                pack_side(words, 4, sums, 2 * half + 1)
                for i in range(4):
                    other = shuffle_xor_word(words[i] if odd else words[4 + i], _u32(4))
                    words[i], words[4 + i] = other if odd else words[i], words[4 + i] if odd else other
                block = _u32(first + (g & _u32(6)))
                offset, inside = _u32(block * width + column), column < width
                if inside and block < out_blocks:
                    store128(out, start + np.int64(offset), words[0], words[1], words[2], words[3])
                if inside and _u32(block + _u32(1)) < out_blocks:
                    store128(out, start + np.int64(_u32(offset + width)), words[4], words[5], words[6], words[7])

    return store


@kernel_factory(
    ("bf16", 1, False, False, 8),
    ("bf16", 6, False, True, 8),
    ("f16", 16, True, False, 2),
    ("bf16", 5, True, False, 1, True),
)
def mix_blocks(kind: str, groups: int, ragged: bool, transposed: bool, vector: int, early: bool = False):
    """Parameters: out, x, w, scale, rows, blocks of out, blocks of x, width e, row strides of out and x; what divides
    by a row's items; how many items the first blocks of threads take, and how many these are: the others take the rest.

    ``groups`` are groups of 8 blocks of x, the last with fewer if ``ragged``. w is [blocks of out, blocks of x], or
    stored the other way round if ``transposed``, and copied by ``vector`` elements. Widths and strides are multiples
    of eight elements. With ``early`` the kernel may begin before the grid before has ended, and the next one, which
    reads out, before this has (sm_90), and out stays in L2 for it.
    """
    element, several, warps = ELEMENTS[kind], items_at_once(groups), warps_of(groups)
    words_of_item = 8 * groups if several > 1 else 0  # a place that is known keeps words in registers
    stage_weight, (fetch_item, pair) = _weight_stager(vector, 32 * warps), _movers(groups, ragged)
    multiply, store, all_words = _multiplier(kind, groups, transposed), _storer(kind, early), several * 8 * groups
    enter = barrier.entrance(early)

    @device
    def fetch(words, i, x, item, items, spans, by_spans, x_stride, in_blocks, width, own, t):
        if item < items:
            row = divide(item, by_spans)
            e = _u32(_u32(_u32(item - row * spans) * _u32(SPAN)) + own)
            place = min(e, _u32(width - _u32(8)))
            fetch_item(words, i * words_of_item, x, np.int64(row) * x_stride, in_blocks, width, place, t)

    def kernel(
        out, x, w, scale, rows, out_blocks, in_blocks, width, out_stride, x_stride, by_spans, quick_items, quick
    ):
        enter()
        shared = cuda.shared.array(0, np.uint16, alignment=16)
        words, sums = cuda.local.array(all_words, np.uint32), cuda.local.array(32, np.float32)
        thread = thread_index()
        lane, number = _u32(thread & _u32(31)), _u32(thread >> _u32(5))
        g, t = _u32(lane >> _u32(2)), _u32(lane & _u32(3))
        own = _u32(_u32(_u32(_u32(g & _u32(1)) << _u32(2)) + _u32(g >> _u32(1))) << _u32(3))
        out_blocks, in_blocks, width = _u32(out_blocks), _u32(in_blocks), _u32(width)
        lines, line = (in_blocks, out_blocks) if transposed else (out_blocks, in_blocks)
        pitch = _u32(_u32(_u32(_u32(line + _u32(15)) >> _u32(4)) << _u32(4)) + _u32(8))
        spans = _u32(_u32(width + _u32(SPAN - 1)) // _u32(SPAN))
        block, blocks, begin, items = _u32(block_x()), _u32(quick), _u32(0), _u32(quick_items)
        if block >= blocks:
            begin, items = items, _u32(_u32(rows) * spans)
            block, blocks = _u32(block - blocks), _u32(grid_x() - blocks)
        if items <= begin:
            return
        stride = _u32(blocks * _u32(warps * several))
        first = _u32(begin + _u32(_u32(block * _u32(warps) + number) * _u32(several)))
        for i in range(several):
            fetch(words, i, x, _u32(first + _u32(i)), items, spans, by_spans, x_stride, in_blocks, width, own, t)
        stage_weight(shared, w, lines, line, pitch, thread)
        memory.copy_async_wait_all()
        block_barrier()
        while first < items:
            for i in range(several):
                item = _u32(first + _u32(i))
                row = divide(item, by_spans)
                e = _u32(_u32(_u32(item - row * spans) * _u32(SPAN)) + _u32(t << _u32(3)))
                start, count = np.int64(row) * out_stride, out_blocks if item < items else _u32(0)
                pair(words, i * words_of_item)
                for tile in range(_u32(_u32(count + _u32(15)) >> _u32(4))):
                    block0 = _u32(_u32(tile) << _u32(4))
                    multiply(sums, shared, words, i * words_of_item, block0, pitch, lane)
                    if scale != np.float32(1):
                        for j in range(32):
                            sums[j] *= scale
                    store(out, start, sums, block0, count, width, e, g)
                fetch(words, i, x, _u32(item + stride), items, spans, by_spans, x_stride, in_blocks, width, own, t)
            first = _u32(first + stride)

    pointer = element.pointer
    parameters = (pointer, pointer, pointer, f32, *(i64,) * 9)
    options = {"threads": 32 * warps, "min_blocks": 1}
    return kernel, parameters, options | (barrier.HOPPER if early else {})


@kernel_factory(("bf16", "bf16", "bf16", False), ("f32", "bf16", "f16", True))
def mix_blocks_portable(out_kind: str, kind: str, weight_kind: str, transposed: bool):
    """The same for any kinds and extents: an element of out a thread. Parameters as there."""
    store_one, load_one, load_weight = ELEMENTS[out_kind].store, ELEMENTS[kind].load, ELEMENTS[weight_kind].load

    def kernel(out, x, w, scale, rows, out_blocks, in_blocks, width, out_stride, x_stride):
        index = _u32(_u32(block_x()) * _u32(PORTABLE_THREADS) + thread_index())
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
    return kernel, (*pointers, f32, i64, i64, i64, i64, i64, i64), {"threads": PORTABLE_THREADS}
