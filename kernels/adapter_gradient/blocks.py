"""The gradient of a matrix that mixes blocks of rows: d_w[l, m] = sum_{t, e} g[t, l, e] x[t, m, e].

For LoKr's w1. A small result over a long sum: reading g and x is all the work. Neither passes through shared memory, as
both lie with e contiguous and a sum does not ask in which order its terms come (see ``matmul.narrow``). Warps and
blocks share the pairs of a row and 32 of its e, and add up in order (``partial_sums``).
"""

from __future__ import annotations

import numpy as np

from kernels.elements import ELEMENTS
from kernels.matmul.narrow import row_fetcher, row_multiplier
from kernels.target import SIMULATOR, cuda, device, f32p, i64, kernel_factory, types
from kernels.warp import block_barrier, block_x, block_y, thread_index, warp_sum

WARPS = 2 if SIMULATOR else 8
THREADS = 32 * WARPS
DEPTH = 32
"""Values of e that a warp takes at once: eight a lane, four lanes a block."""

MOST_ROW_TILES, MOST_COLUMN_TILES = 4, 8
"""Groups of 16 blocks l and of 8 blocks m that registers have room for."""

POINTER, STRIDE, BLOCKS = range(3)
"""Positions of g's and x's parameters: it, elements from a row to the next, and its blocks."""
_u32 = np.uint32


def items_at_once(row_tiles: int, column_tiles: int) -> int:
    """Pairs of a row and 32 of its e that a warp loads before it multiplies: as many as registers have room for."""
    return max(1, 48 // (8 * row_tiles + 4 * column_tiles))


@kernel_factory(("bf16", 1, 1), ("bf16", 3, 6), ("bf16", 4, 8), ("f16", 2, 2))
def block_mix_gradient(kind: str, row_tiles: int, column_tiles: int):
    """Parameters: parts of the sum, g's, x's, rows, width of a block, items of a block of threads, tiles along m.

    Parts are [block of items, l, m] in fp32. Blocks: items along x, tiles of the result along y. Widths and strides are
    multiples of eight elements.
    """
    unroll = items_at_once(row_tiles, column_tiles)
    fetch_a, fetch_b = row_fetcher(2 * row_tiles, 8), row_fetcher(column_tiles, 8)
    multiply = row_multiplier(kind, row_tiles, column_tiles)
    a_words, b_words, sum_count = 8 * row_tiles, 4 * column_tiles, 4 * row_tiles * column_tiles
    all_a, all_b, width_of_tile = unroll * a_words, unroll * b_words, 8 * column_tiles
    parked = 16 * width_of_tile

    @device
    def accumulate(sums, g, x, l0, m0, rows, width, first, end, lane, number):
        a = cuda.local.array(all_a, np.uint32)
        b = cuda.local.array(all_b, np.uint32)
        for i in range(sum_count):
            sums[i] = np.float32(0)
        row, own = np.int64(lane >> _u32(2)), np.int64((lane & _u32(3)) << _u32(3))
        chunks = _u32(_u32(width + np.int64(DEPTH - 1)) // _u32(DEPTH))
        item = _u32(first + number)
        while item < end:
            for i in range(unroll):
                t = _u32(item // chunks)
                k = np.int64(_u32(_u32(item - _u32(t * chunks)) * _u32(DEPTH))) + own
                k = k if item < end else width
                t = np.int64(min(t, _u32(_u32(rows) - _u32(1))))
                fetch_a(a, i * a_words, g[POINTER], t * g[STRIDE], width, l0, g[BLOCKS], row, k, width)
                fetch_b(b, i * b_words, x[POINTER], t * x[STRIDE], width, m0, x[BLOCKS], row, k, width)
                item = _u32(item + _u32(WARPS))
            for i in range(unroll):
                multiply(sums, a, i * a_words, b, i * b_words)

    @device
    def park(shared, sums, row_tile, lane, number):
        at = _u32(_u32(number * _u32(parked)) + _u32((lane >> _u32(2)) * _u32(width_of_tile)))
        at = _u32(at + _u32((lane & _u32(3)) << _u32(1)))
        for column_tile in range(column_tiles):
            for i in range(4):
                place = _u32(at + _u32(8 * (i >> 1) * width_of_tile + 8 * column_tile + (i & 1)))
                shared[place] = sums[4 * (row_tile * column_tiles + column_tile) + i]

    @device
    def add_up(shared, parts, start, l0, l_count, m0, m_count, thread):
        for turn in range(-(-parked // THREADS)):
            place = _u32(thread + _u32(turn * THREADS))
            row, column = _u32(place // _u32(width_of_tile)), _u32(place % _u32(width_of_tile))
            to, across = l0 + np.int64(row), m0 + np.int64(column)
            if place < _u32(parked) and to < l_count and across < m_count:
                value = np.float32(0)
                for other in range(WARPS):
                    value += shared[_u32(place + _u32(other * parked))]
                parts[start + to * m_count + across] = value

    def kernel(parts, g, x, rows, width, items_of_block, tiles_across):
        shared = cuda.shared.array(0, np.float32, alignment=16)
        sums = cuda.local.array(sum_count, np.float32)
        thread = thread_index()
        lane, number = _u32(thread & _u32(31)), _u32(thread >> _u32(5))
        tile = _u32(block_y())
        down = _u32(tile // _u32(tiles_across))
        l0 = np.int64(_u32(down * _u32(16 * row_tiles)))
        m0 = np.int64(_u32(_u32(tile - _u32(down * _u32(tiles_across))) * _u32(8 * column_tiles)))
        items = _u32(_u32(rows) * _u32(_u32(width + np.int64(DEPTH - 1)) // _u32(DEPTH)))
        first = _u32(_u32(block_x()) * _u32(items_of_block))
        end = _u32(min(_u32(first + _u32(items_of_block)), items))
        accumulate(sums, g, x, l0, m0, rows, width, first, end, lane, number)
        start = block_x() * g[BLOCKS] * x[BLOCKS]
        for row_tile in range(row_tiles):
            block_barrier()
            park(shared, sums, row_tile, lane, number)
            block_barrier()
            add_up(shared, parts, start, l0 + np.int64(16 * row_tile), g[BLOCKS], m0, x[BLOCKS], thread)

    side = types.Tuple((ELEMENTS[kind].pointer, i64, i64))
    words = all_a + all_b + sum_count
    options = {"threads": THREADS, "shared_bytes": 4 * WARPS * parked, "min_blocks": 2 if words <= 56 else 1}
    return kernel, (f32p, side, side, i64, i64, i64, i64), options


@kernel_factory(("bf16", "bf16"), ("f32", "f16"))
def block_mix_gradient_portable(g_kind: str, x_kind: str):
    """The same parts for any kinds and extents: a warp an element, along x, of a block of rows, along y.

    Parameters: parts of the sum, g's, x's, rows, width, rows of a block.
    """
    load_g, load_x = ELEMENTS[g_kind].load, ELEMENTS[x_kind].load

    def kernel(parts, g, x, rows, width, rows_of_block):
        index, lane = _u32(block_x()), thread_index()
        row = _u32(index // _u32(x[BLOCKS]))
        block = np.int64(row)
        other = np.int64(_u32(index - _u32(row * _u32(x[BLOCKS]))))
        first = block_y() * rows_of_block
        value = np.float32(0)
        for turn in range(_u32(min(rows_of_block, rows - first))):
            t = first + np.int64(turn)
            g_at, x_at = t * g[STRIDE] + block * width, t * x[STRIDE] + other * width
            for step in range(_u32(_u32(width + np.int64(31)) >> _u32(5))):
                e = np.int64(_u32(_u32(_u32(step) << _u32(5)) + lane))
                if e < width:
                    value += load_g(g[POINTER], g_at + e) * load_x(x[POINTER], x_at + e)
        value = warp_sum(value)
        if lane == _u32(0):
            parts[block_y() * g[BLOCKS] * x[BLOCKS] + np.int64(index)] = value

    sides = tuple(types.Tuple((ELEMENTS[kind].pointer, i64, i64)) for kind in (g_kind, x_kind))
    return kernel, (f32p, *sides, i64, i64, i64), {"threads": 32}
