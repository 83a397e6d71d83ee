"""Gradients of a low-rank adapter's factors: sums over rows of products with few ranks, sum_t narrow[t, r] wide[t, n].

For y = x W^T + s (x D^T) U^T these are d_up^T = s (x D^T)^T g and d_down = s (g U)^T x, both in one launch: reading g
and x once each is all the work. A warp takes 16 rows and 64 columns at once, which come to a ring of shared memory of
its own, several steps ahead. The warps of a block share the rows and add up in order; so do blocks, through workspace
(``partial_sums``).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from kernels import barrier, bits, memory, tensor_core
from kernels.elements import ELEMENTS
from kernels.target import SIMULATOR, cuda, device, f32, f32p, i64, kernel_factory, types
from kernels.warp import block_barrier, block_x, block_y, block_z, grid_x, sync_warp, thread_index

WARPS = 2 if SIMULATOR else 8
THREADS = 32 * WARPS
SPAN = 64
"""Columns that a block takes."""

STEP = 16
ROWS_OF_TURN = WARPS * STEP
"""Rows that a block takes at once."""

MOST_TILES = 4
"""Groups of 16 ranks that registers have room for."""

SUMS, WIDE, NARROW, COLUMNS, WIDE_STRIDE, NARROW_STRIDE, PART_STRIDE = range(7)
"""Positions of a side's parameters: its parts, both operands, columns, strides, and from one part of a rank on."""
_PITCH = SPAN + 8
"""Elements from a row of the wide operand in shared memory to the next, which then begins at other banks."""

_PARKED_PITCH = SPAN + 8
_RING_BYTES = {1: 96 << 10, 2: 96 << 10, 4: 150 << 10}
"""Of shared memory by groups of ranks: two blocks on Hopper's multiprocessors, or one that reads more at once."""
_u32 = np.uint32


def _narrow_pitch(tiles: int, parts: int) -> int:
    return STEP * tiles * parts + 8


def _stages(tiles: int, parts: int) -> tuple[int, int]:
    """Steps under way, and elements of shared memory of one of a warp's."""
    elements = STEP * (_PITCH + _narrow_pitch(tiles, parts))
    return max(2, min(4, _RING_BYTES[tiles] // (2 * WARPS * elements))), elements


def _stager(tiles: int, parts: int) -> Callable:
    """``stage(shared, at, side, row0, end, column0, rank0, rank, lane)``: a warp's step of both operands.

    Zeros beyond the last row, column and rank.
    """
    units, pitch, copy_some = 2 * tiles * parts, _narrow_pitch(tiles, parts), memory.copy_async_fill(16)

    @device
    def stage_wide(shared, at, side, row0, end, column0, lane):
        for turn in range(STEP * SPAN // 8 // 32):
            place = _u32(lane + _u32(32 * turn))
            line, own = _u32(place >> _u32(3)), _u32(_u32(place & _u32(7)) << _u32(3))
            row, column = row0 + np.int64(line), column0 + np.int64(own)
            nbytes = _u32(16) if row < end and column < side[COLUMNS] else _u32(0)
            to = _u32(at + _u32(line * _u32(_PITCH)) + own)
            copy_some(shared, np.int64(to), side[WIDE], row * side[WIDE_STRIDE] + column, nbytes)

    @device
    def stage_narrow(shared, at, side, row0, end, rank0, rank, lane):
        for turn in range(STEP * units // 32):
            place = _u32(lane + _u32(32 * turn))
            line, unit = _u32(place // _u32(units)), _u32(place % _u32(units))
            part, own = _u32(unit // _u32(2 * tiles)), _u32(unit % _u32(2 * tiles))
            first = rank0 + np.int64(_u32(own << _u32(3)))
            row = row0 + np.int64(line)
            count = min(max(rank - first, np.int64(0)), np.int64(8))
            count = count if row < end else np.int64(0)
            source = row * side[NARROW_STRIDE] + np.int64(part) * side[PART_STRIDE] + first
            to = np.int64(_u32(at + _u32(line * _u32(pitch)) + _u32(unit << _u32(3))))
            if count == np.int64(0) or count == np.int64(8):
                copy_some(shared, to, side[NARROW], source, _u32(_u32(count) << _u32(1)))
            else:  # such a copy takes no end between 16-byte units that memcheck would accept
                for i in range(8):
                    inside = np.int64(i) < count
                    shared[to + np.int64(i)] = side[NARROW][source + np.int64(i)] if inside else np.uint16(0)

    @device
    def stage(shared, at, side, row0, end, column0, rank0, rank, lane):
        if row0 < end:
            stage_wide(shared, at, side, row0, end, column0, lane)
            stage_narrow(shared, _u32(at + _u32(STEP * _PITCH)), side, row0, end, rank0, rank, lane)

    return stage


def _multiplier(kind: str, tiles: int, parts: int) -> Callable:
    """``multiply(sums, shared, at, lane)``: the products of a step, each part of a rank to the same sum."""
    mma, pitch = tensor_core.MMA[kind], _narrow_pitch(tiles, parts)

    @device
    def multiply(sums, shared, at, lane):
        low, odd, high = _u32(lane & _u32(7)), _u32((lane >> _u32(3)) & _u32(1)), _u32(lane >> _u32(4))
        b = cuda.local.array(16, np.uint32)
        wide = _u32(at + _u32(_u32(low + _u32(odd << _u32(3))) * _u32(_PITCH)) + _u32(high << _u32(3)))
        for pair in range(4):
            words = tensor_core.ldmatrix_transposed(shared, np.int64(_u32(wide + _u32(16 * pair))))
            for i in range(4):
                b[4 * pair + i] = words[i]
        narrow = _u32(_u32(low + _u32(high << _u32(3))) * _u32(pitch) + _u32(odd << _u32(3)))
        narrow = _u32(at + _u32(STEP * _PITCH) + narrow)
        for part in range(parts):
            for tile in range(tiles):
                place = _u32(narrow + _u32(STEP * (part * tiles + tile)))
                a = tensor_core.ldmatrix_transposed(shared, np.int64(place))
                for j in range(8):
                    s = 32 * tile + 4 * j
                    sums[s], sums[s + 1], sums[s + 2], sums[s + 3] = mma(
                        a[0], a[1], a[2], a[3], b[2 * j], b[2 * j + 1],
                        sums[s], sums[s + 1], sums[s + 2], sums[s + 3],
                    )  # fmt: skip

    return multiply


def _accumulator(kind: str, tiles: int, parts: int) -> Callable:
    """A device function: a warp's sums over its rows of the block's."""
    (stages, staged), sum_count = _stages(tiles, parts), 32 * tiles
    stage, multiply = _stager(tiles, parts), _multiplier(kind, tiles, parts)
    arrived = memory.copy_async_wait(stages - 2)

    @device
    def accumulate(sums, shared, side, column0, row0, end, rank0, rank, lane, number):
        for i in range(sum_count):
            sums[i] = np.float32(0)
        ring = _u32(number * _u32(stages * staged))
        row = row0 + np.int64(_u32(number * _u32(STEP)))
        for i in range(stages - 1):
            ahead = row + np.int64(i * ROWS_OF_TURN)
            stage(shared, _u32(ring + _u32(i * staged)), side, ahead, end, column0, rank0, rank, lane)
            memory.copy_async_commit()
        now, last = _u32(0), _u32((stages - 1) * staged)
        free = last
        while row < end:
            arrived()
            sync_warp()
            ahead = row + np.int64((stages - 1) * ROWS_OF_TURN)
            stage(shared, _u32(ring + free), side, ahead, end, column0, rank0, rank, lane)
            memory.copy_async_commit()
            multiply(sums, shared, _u32(ring + now), lane)
            free = now
            now = _u32(now + _u32(staged)) if now != last else _u32(0)
            row += np.int64(ROWS_OF_TURN)

    return accumulate


@device
def _park(shared, sums, first, lane, number):
    """A warp's sums of 16 ranks as [rank, column] in its place of shared memory, fp32."""
    g, t = _u32(lane >> _u32(2)), _u32(lane & _u32(3))
    at = _u32(_u32(number * _u32(STEP * _PARKED_PITCH)) + _u32(_u32(g * _u32(_PARKED_PITCH)) + _u32(t << _u32(1))))
    for j in range(8):
        for half in range(2):
            s = first + 4 * j + 2 * half
            place = np.int64(_u32(_u32(at + _u32(8 * half * _PARKED_PITCH + 8 * j)) << _u32(1)))
            memory.shared_store64(shared, place, bits.f32_bits(sums[s]), bits.f32_bits(sums[s + 1]))


@device
def _add_up(shared, side, start, rank0, rank, column0, thread):
    """All warps' sums of 16 ranks, in order, to the block's part."""
    values = cuda.local.array(4, np.float32)
    for turn in range(STEP * SPAN // 4 // THREADS):
        place = _u32(thread + _u32(turn * THREADS))
        row, column = _u32(place // _u32(SPAN // 4)), _u32(_u32(place % _u32(SPAN // 4)) << _u32(2))
        at = _u32(_u32(_u32(row * _u32(_PARKED_PITCH)) + column) << _u32(1))
        for i in range(4):
            values[i] = np.float32(0)
        for other in range(WARPS):
            words = memory.shared_load128(shared, np.int64(_u32(at + _u32(2 * other * STEP * _PARKED_PITCH))))
            for i in range(4):
                values[i] += bits.bits_f32(words[i])
        to, across = rank0 + np.int64(row), column0 + np.int64(column)
        if to < rank and across < side[COLUMNS]:
            memory.store128_stream(
                side[SUMS], start + to * side[COLUMNS] + across,
                bits.f32_bits(values[0]), bits.f32_bits(values[1]), bits.f32_bits(values[2]), bits.f32_bits(values[3]),
            )  # fmt: skip


@kernel_factory(("bf16", 1, 1), ("bf16", 1, 2), ("bf16", 2, 2), ("bf16", 4, 2), ("f16", 4, 1), ("bf16", 1, 1, True))
def low_rank_gradient(kind: str, tiles: int, parts: int, beside: bool = False):
    """Parameters: both sides', rows, rows of a block (a multiple of ``ROWS_OF_TURN``), rank, blocks of the first side.

    ``tiles`` are groups of 16 ranks of a block, ``parts`` the values that add up to a rank's. Blocks: 64 columns of the
    first side, then of the second, along x; rows along y; ranks along z. Parts of the sums are [rows' block, rank,
    column] in fp32. Columns and strides are multiples of eight elements. ``beside``: the grid may run beside the one
    before it, none of whose results it takes, and ends after that one (sm_90).
    """
    sum_count, (stages, staged) = 32 * tiles, _stages(tiles, parts)
    accumulate = _accumulator(kind, tiles, parts)

    @device
    def work(side, block, rows, rows_of_block, rank):
        shared = cuda.shared.array(0, np.uint16, alignment=16)
        sums = cuda.local.array(sum_count, np.float32)
        thread = thread_index()
        lane, number = _u32(thread & _u32(31)), _u32(thread >> _u32(5))
        row0, rank0 = block_y() * rows_of_block, block_z() * np.int64(STEP * tiles)
        end, column0 = min(row0 + rows_of_block, rows), block * np.int64(SPAN)
        accumulate(sums, shared, side, column0, row0, end, rank0, rank, lane, number)
        memory.copy_async_wait_all()
        start = block_y() * rank * side[COLUMNS]
        for tile in range(tiles):
            block_barrier()
            _park(shared, sums, 32 * tile, lane, number)
            block_barrier()
            _add_up(shared, side, start, rank0 + np.int64(STEP * tile), rank, column0, thread)

    @device
    def side_of(first, second, is_first):
        if is_first:
            return first
        return second

    def kernel(first, second, rows, rows_of_block, rank, blocks_of_first):
        block = block_x()
        is_first = block < blocks_of_first
        side = side_of(first, second, is_first)
        work(side, block if is_first else block - blocks_of_first, rows, rows_of_block, rank)
        # One block that waits is enough, and more would keep others from multiprocessors that are free.
        last_rows, last_ranks = (block_y() + 1) * rows_of_block >= rows, (block_z() + 1) * (STEP * tiles) >= rank
        if beside and block == grid_x() - 1 and last_rows and last_ranks:
            barrier.wait_for_previous_grid()

    pointer = ELEMENTS[kind].pointer
    side = types.Tuple((f32p, pointer, pointer, i64, i64, i64, i64))
    shared_bytes = max(2 * WARPS * stages * staged, 4 * WARPS * STEP * _PARKED_PITCH)
    options = {"threads": THREADS, "shared_bytes": shared_bytes, "max_registers": 128 if tiles == 1 else None}
    options |= barrier.HOPPER if beside else {}
    return kernel, (side, side, i64, i64, i64, i64), options


@kernel_factory(("f32", "bf16", "bf16", 1, False), ("bf16", "f32", "bf16", 2, True))
def low_rank_gradient_portable(out: str, wide: str, narrow: str, parts: int, transposed: bool):
    """One side for any kinds and extents: a thread an element of the result, [rank, column] or ``transposed``.

    Parameters: the result, both operands, columns, strides, from one part of a rank to the next, rows, rank, scale.
    """
    store, load_wide, load_narrow = ELEMENTS[out].store, ELEMENTS[wide].load, ELEMENTS[narrow].load

    def kernel(result, a, b, columns, a_stride, b_stride, part_stride, rows, rank, scale):
        index = _u32(_u32(_u32(block_x()) * _u32(THREADS)) + thread_index())
        row = np.int64(index // _u32(columns))
        column = np.int64(_u32(index - _u32(_u32(row) * _u32(columns))))
        if row < rank:
            value = np.float32(0)
            for t in range(rows):
                at = np.int64(t) * b_stride + row
                factor = load_narrow(b, at)
                for part in range(1, parts):
                    factor += load_narrow(b, at + np.int64(part) * part_stride)
                value += factor * load_wide(a, np.int64(t) * a_stride + column)
            store(result, column * rank + row if transposed else row * columns + column, scale * value)

    pointers = (ELEMENTS[out].pointer, ELEMENTS[wide].pointer, ELEMENTS[narrow].pointer)
    return kernel, (*pointers, i64, i64, i64, i64, i64, i64, f32), {"threads": THREADS}
