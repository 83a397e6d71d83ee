"""The gradient of a matrix that mixes blocks of rows: d_w[l, m] = sum_{t, e} g[t, l, e] x[t, m, e].

For LoKr's w1. A small result over a long sum: reading g and x is all the work. Both lie with e contiguous, and a sum
does not ask in which order its terms come (see ``matmul.narrow``): what a lane wants of them are pieces of 16 bytes,
which it copies asynchronously to places of its own in a ring of several steps, so that nobody waits for anybody. Warps
and blocks share the pairs of a row and 32 of its e, and add up in order (``partial_sums``).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from kernels import memory
from kernels.barrier import HOPPER, early_options, entrance, wait_for_previous_grid
from kernels.elements import ELEMENTS
from kernels.matmul.narrow import row_multiplier
from kernels.target import SIMULATOR, blocks_by_shared, cuda, device, f32p, i64, kernel_factory, types
from kernels.warp import block_barrier, block_x, block_y, grid_x, thread_index, warp_sum

WARPS = 2 if SIMULATOR else 8
THREADS = 32 * WARPS
DEPTH = 32
"""Values of e that a warp takes at once: eight a lane, four lanes a block."""

MOST_ROW_TILES, MOST_COLUMN_TILES = 4, 8
"""Groups of 16 blocks l and of 8 blocks m that registers have room for."""

POINTER, STRIDE, BLOCKS = range(3)
"""Positions of g's and x's parameters: it, elements from a row to the next, and its blocks."""
_RING_BYTES = {False: (24 if SIMULATOR else 96) << 10, True: 200 << 10}
"""Of a multiprocessor's shared memory for what is under way, by whether it is one of Hopper's."""

_u32 = np.uint32


def blocks_at_once(row_tiles: int, column_tiles: int) -> int:
    """Blocks of threads on a multiprocessor: what their registers have room for."""
    return 2 if 4 * row_tiles * column_tiles + 8 * row_tiles + 4 * column_tiles <= 56 else 1


def _stages(row_tiles: int, column_tiles: int, ring_bytes: int) -> tuple[int, int]:
    """Steps under way, and words of shared memory of one of a warp's."""
    words = 32 * 4 * (2 * row_tiles + column_tiles)
    return max(2, min(8, ring_bytes // blocks_at_once(row_tiles, column_tiles) // (4 * WARPS * words))), words


def _stager(tiles: int) -> Callable:
    """``stage(shared, at, pointer, start, width, row0, rows, row, e)``: a lane's piece of its row in each tile.

    The pieces are 128 words apart. Zeros beyond the last row and e.
    """
    copy_some = memory.copy_async_fill(16)

    @device
    def stage(shared, at, pointer, start, width, row0, rows, row, e):
        for tile in range(tiles):
            line = row0 + np.int64(8 * tile) + row
            nbytes = _u32(16) if line < rows and e < width else _u32(0)
            copy_some(shared, np.int64(_u32(at + _u32(128 * tile))), pointer, start + line * width + e, nbytes)

    return stage


def _accumulator(kind: str, row_tiles: int, column_tiles: int, stages: int, staged: int) -> Callable:
    """A device function: a warp's sums over its items, which come in runs of two: neighbours in memory.

    ``stages`` of them are under way, each ``staged`` words of shared memory.
    """
    stage_g, stage_x = _stager(2 * row_tiles), _stager(column_tiles)
    multiply, arrived = row_multiplier(kind, row_tiles, column_tiles), memory.copy_async_wait(stages - 2)
    a_words, b_words, sum_count, g_words = (
        8 * row_tiles,
        4 * column_tiles,
        4 * row_tiles * column_tiles,
        256 * row_tiles,
    )

    @device
    def stage(shared, at, g, x, l0, m0, width, chunks, item, end, lane):
        if item < end:
            row = np.int64(lane >> _u32(2))
            t = _u32(item // chunks)
            e = np.int64(_u32(_u32(_u32(item - _u32(t * chunks)) * _u32(DEPTH)) + _u32((lane & _u32(3)) << _u32(3))))
            t, place = np.int64(t), _u32(at + _u32(lane << _u32(2)))
            stage_g(shared, place, g[POINTER], t * g[STRIDE], width, l0, g[BLOCKS], row, e)
            stage_x(shared, _u32(place + _u32(g_words)), x[POINTER], t * x[STRIDE], width, m0, x[BLOCKS], row, e)
        memory.copy_async_commit()

    @device
    def take(words, shared, at, tiles):
        for tile in range(tiles):
            found = memory.shared_load128(shared, np.int64(_u32(at + _u32(128 * tile))))
            for i in range(4):
                words[4 * tile + i] = found[i]

    @device
    def following(item, first):
        return _u32(item + (_u32(1) if _u32(item - first) & _u32(1) == _u32(0) else _u32(2 * WARPS - 1)))

    @device
    def accumulate(sums, shared, g, x, l0, m0, width, first, end, lane, number):
        a, b = cuda.local.array(a_words, np.uint32), cuda.local.array(b_words, np.uint32)
        for i in range(sum_count):
            sums[i] = np.float32(0)
        chunks, ring = _u32(_u32(width + np.int64(DEPTH - 1)) // _u32(DEPTH)), _u32(number * _u32(stages * staged))
        item = _u32(first + _u32(number << _u32(1)))
        ahead, now, last = item, _u32(0), _u32((stages - 1) * staged)
        for i in range(stages - 1):
            stage(shared, _u32(ring + _u32(i * staged)), g, x, l0, m0, width, chunks, ahead, end, lane)
            ahead = following(ahead, first)
        free = last
        while item < end:
            arrived()
            stage(shared, _u32(ring + free), g, x, l0, m0, width, chunks, ahead, end, lane)
            at = _u32(_u32(ring + now) + _u32(lane << _u32(2)))
            take(a, shared, at, 2 * row_tiles)
            take(b, shared, _u32(at + _u32(g_words)), column_tiles)
            multiply(sums, a, 0, b, 0)
            free, now = now, _u32(now + _u32(staged)) if now != last else _u32(0)
            item, ahead = following(item, first), following(ahead, first)

    return accumulate


@kernel_factory(
    ("bf16", 1, 1), ("bf16", 3, 6), ("bf16", 4, 8), ("f16", 2, 2), ("bf16", 3, 6, "early"), ("bf16", 1, 1, "beside")
)
def block_mix_gradient(kind: str, row_tiles: int, column_tiles: int, order: str = ""):
    """Parameters: parts of the sum, g's, x's, rows, width of a block, items of a block of threads, tiles along m.

    Parts are [block of items, l, m] in fp32. Blocks: tiles of the result along x, items along y. Widths and strides are
    multiples of eight elements. On sm_90 the grid takes its places "early", or runs "beside" the one before it, none of
    whose results it takes, and ends after that one.
    """
    stages, staged = _stages(row_tiles, column_tiles, _RING_BYTES[order != ""])
    accumulate, enter = _accumulator(kind, row_tiles, column_tiles, stages, staged), entrance(order == "early")
    beside = order == "beside"
    sum_count, width_of_tile = 4 * row_tiles * column_tiles, 8 * column_tiles
    parked = 16 * width_of_tile

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
        enter()
        shared = cuda.shared.array(0, np.float32, alignment=16)
        sums = cuda.local.array(sum_count, np.float32)
        thread = thread_index()
        lane, number = _u32(thread & _u32(31)), _u32(thread >> _u32(5))
        tile = _u32(block_x())
        down = _u32(tile // _u32(tiles_across))
        l0 = np.int64(_u32(down * _u32(16 * row_tiles)))
        m0 = np.int64(_u32(_u32(tile - _u32(down * _u32(tiles_across))) * _u32(8 * column_tiles)))
        items = _u32(_u32(rows) * _u32(_u32(width + np.int64(DEPTH - 1)) // _u32(DEPTH)))
        first = _u32(_u32(block_y()) * _u32(items_of_block))
        end = _u32(min(_u32(first + _u32(items_of_block)), items))
        accumulate(sums, shared, g, x, l0, m0, width, first, end, lane, number)
        memory.copy_async_wait_all()
        start = block_y() * g[BLOCKS] * x[BLOCKS]
        for row_tile in range(row_tiles):
            block_barrier()
            park(shared, sums, row_tile, lane, number)
            block_barrier()
            add_up(shared, parts, start, l0 + np.int64(16 * row_tile), g[BLOCKS], m0, x[BLOCKS], thread)
        # One block that waits is enough, and more would keep others from multiprocessors that are free.
        if beside and end == items and block_x() == grid_x() - 1:
            wait_for_previous_grid()

    side = types.Tuple((ELEMENTS[kind].pointer, i64, i64))
    shared_bytes = 4 * WARPS * max(stages * staged, parked)
    blocks = min(blocks_at_once(row_tiles, column_tiles), blocks_by_shared(shared_bytes))
    options = {"threads": THREADS, "shared_bytes": shared_bytes, "min_blocks": blocks}
    return (
        kernel,
        (f32p, side, side, i64, i64, i64, i64),
        options | (HOPPER if beside else early_options(order == "early")),
    )


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
