"""Parts of A^T B over many rows on Hopper, of a result of some hundred rows and columns; alone or beside another grid.

A block of threads makes 192 x 192 of a result over a share of the rows, which TMA brings by lines. The blocks that come
first may take more rows than the others: those that find multiprocessors free while the grid before still runs.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from kernels import barrier, bits, wgmma
from kernels.hardware import WARP, WARPGROUP
from kernels.memory import _words
from kernels.ptx import GLOBAL, instruction
from kernels.stages import PAIR_BYTES, begin_loading, hand_back, next_stage, pair_maker, pair_of
from kernels.target import HOPPER_SHARED_BYTES, cuda, device, f32p, i64, kernel_factory, types
from kernels.warp import block_barrier, block_x, grid_x, sync_warp, thread_index
from kernels.wgmma import DEPTH, step_words
from kernels.wgmma_registers import settle, tile_products, zero_sums

GROUPS = 3
"""Warpgroups that multiply, each 64 of the block's columns of A; and a warp loads."""

SIDE = 64 * GROUPS
"""Columns of A, and of B, of a block."""

THREADS = GROUPS * WARPGROUP + WARP

A, B = range(2)
"""Positions of maps [row of the sum, column]."""
ROWS, COLUMNS, ACROSS, TILES = range(4)
"""Positions of the result's rows and columns, of its tiles across, and of all."""
STAGES, SHARES, FIRST_STAGES, FIRST_SHARES = range(4)
"""Positions of stages of 64 rows and of shares, and how many of the stages the first so many shares have."""

_SUMS, _STORED = SIDE // 2, 16
_BOX_BYTES = DEPTH * 2 * DEPTH
_SIDE_BYTES = GROUPS * _BOX_BYTES
_STAGE_BYTES = 2 * _SIDE_BYTES
_STAGES = HOPPER_SHARED_BYTES // (_STAGE_BYTES + PAIR_BYTES)
_BARRIERS_AT = _STAGES * _STAGE_BYTES
_SHARED_BYTES = _BARRIERS_AT + PAIR_BYTES * _STAGES

_u32 = np.uint32
_load = barrier.tma_load(2)
_following, _make_pairs = next_stage(_STAGES), pair_maker(_STAGES, GROUPS * WARPGROUP // WARP)


def _store_pair(pointer, index, a, b):
    _words(pointer, index, 2)[:] = (a, b)


_store_pair = instruction("st.global.v2.b32 [$0], {$1,$2};", (GLOBAL, *"rr"), twin=_store_pair)


@device
def _share(shares, number):
    """A share's first stage, and the one before which it ends."""
    first, early, given = _u32(0), _u32(shares[FIRST_SHARES]), _u32(shares[FIRST_STAGES])
    stages, of = given, early
    if number >= early:
        number, of = _u32(number - early), _u32(_u32(shares[SHARES]) - early)
        first, stages = given, _u32(_u32(shares[STAGES]) - given)
    begin = _u32(_u32(stages * number) // of)
    end = _u32(_u32(stages * _u32(number + _u32(1))) // of)
    return _u32(first + begin), _u32(first + end)


@device
def _load_side(target, full, tensor_map, column, line):
    for box in range(GROUPS):
        across = _u32(column + _u32(box * DEPTH))
        _load(_u32(target + _u32(box * _BOX_BYTES)), np.uint64(tensor_map), full, across, line)


@device
def _produce(base, barriers, maps, row, column, first, end):
    """The loading thread."""
    stage, phase = _u32(0), _u32(1)
    while first < end:
        target, line = _u32(base + stage * _u32(_STAGE_BYTES)), _u32(first * _u32(DEPTH))
        full = begin_loading(pair_of(barriers, stage), phase, _u32(_STAGE_BYTES))
        _load_side(target, full, maps[A], row, line)
        _load_side(_u32(target + _u32(_SIDE_BYTES)), full, maps[B], column, line)
        stage, phase = _following(stage, phase)
        first = _u32(first + _u32(1))


def _accumulator(kind: str) -> Callable:
    """A device function: a warpgroup's sums over the block's share."""
    step = step_words(False)
    places = tuple((number * step, number * step) for number in range(DEPTH // 16))
    multiply = tile_products(SIDE, places, kind, (False, False), adds=True)
    clear, older, done = zero_sums(_SUMS), settle(1, _SUMS), settle(0, _SUMS)
    by_lines = wgmma.operand_descriptor(False)

    @device
    def accumulate(sums, base, barriers, group, first, end, lane):
        stage, phase, previous = _u32(0), _u32(0), _u32(0)
        clear(sums)
        while first < end:
            pair, place = pair_of(barriers, stage), _u32(base + stage * _u32(_STAGE_BYTES))
            barrier.barrier_wait(pair, phase)
            multiply(sums, by_lines(_u32(place + group * _u32(_BOX_BYTES))), by_lines(_u32(place + _u32(_SIDE_BYTES))))
            older(sums)
            if previous != _u32(0):
                hand_back(previous, lane)
            previous = pair
            stage, phase = _following(stage, phase)
            first = _u32(first + _u32(1))
        done(sums)

    return accumulate


@device
def _nothing(part, start, sums, line, across, rows, columns):
    pass


def _storer() -> Callable:
    """``store(part, start, sums, line, across, rows, columns)``: a lane's sums, from its first line and column on.

    Some columns after the other: as one loop the sums would be taken from registers to memory.
    """
    store = _nothing
    for first in reversed(range(0, _SUMS, _STORED)):
        store = _store_some(first, store)
    return store


def _store_some(first: int, rest: Callable) -> Callable:
    @device
    def store(part, start, sums, line, across, rows, columns):
        for number in range(0, _STORED, 2):
            to = np.int64(_u32(line + _u32(8 * (number >> 1 & 1))))
            at = np.int64(_u32(across + _u32(2 * first + 8 * (number >> 2))))
            if to < rows and at < columns:
                low, high = bits.f32_bits(sums[first + number]), bits.f32_bits(sums[first + number + 1])
                _store_pair(part, start + to * columns + at, low, high)
        rest(part, start, sums, line, across, rows, columns)

    return store


@kernel_factory(("bf16", False), ("bf16", True), ("f16", False))
def long_sum(kind: str, beside: bool):
    """Parameters: parts [share, row, column] in fp32, maps, extents, shares.

    Blocks are tiles of 192 x 192 of a share's result, one share after the other; columns are a multiple of eight. With
    ``beside`` the grid takes nothing of what the one before it makes, and ends after that one.
    """
    accumulate, store = _accumulator(kind), _storer()

    def kernel(parts, maps, extents, shares):
        shared = cuda.shared.array(0, np.uint8, alignment=1024)
        base, thread = barrier.shared_address(shared, np.int64(0)), thread_index()
        barriers = _u32(base + _u32(_BARRIERS_AT))
        group, lane = _u32(thread // _u32(WARPGROUP)), _u32(thread & _u32(WARP - 1))
        sums = cuda.local.array(_SUMS, np.float32)
        number = _u32(_u32(block_x()) // _u32(extents[TILES]))
        tile = _u32(_u32(block_x()) - _u32(number * _u32(extents[TILES])))
        down = _u32(tile // _u32(extents[ACROSS]))
        row, column = _u32(down * _u32(SIDE)), _u32(_u32(tile - _u32(down * _u32(extents[ACROSS]))) * _u32(SIDE))
        first, end = _share(shares, number)
        loads = group == _u32(GROUPS)
        if loads and lane == _u32(0):
            _make_pairs(barriers)
            barrier.barrier_init_visible()
            for which in range(2):
                barrier.tensor_map_acquire(np.uint64(maps[which]))
        block_barrier()
        if not beside:
            barrier.wait_for_previous_grid()
            barrier.next_grid_may_begin()
        if loads:
            if lane == _u32(0):
                _produce(base, barriers, maps, row, column, first, end)
            sync_warp()
        else:
            accumulate(sums, base, barriers, group, first, end, lane)
            line = _u32(row + _u32(_u32(thread >> _u32(5)) << _u32(4)) + (lane >> _u32(2)))
            across = _u32(column + ((lane & _u32(3)) << _u32(1)))
            start = np.int64(number) * extents[ROWS] * extents[COLUMNS]
            store(parts, start, sums, line, across, extents[ROWS], extents[COLUMNS])
        # One block that waits is enough, and more would keep others from multiprocessors that are free.
        if beside and block_x() == grid_x() - 1:
            barrier.wait_for_previous_grid()

    parameters = (f32p, types.Tuple((i64, i64)), types.Tuple((i64,) * 4), types.Tuple((i64,) * 4))
    return kernel, parameters, {"threads": THREADS, "shared_bytes": _SHARED_BYTES, "min_blocks": 1} | barrier.HOPPER
