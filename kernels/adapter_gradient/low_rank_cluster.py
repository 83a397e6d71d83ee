"""Gradients of a low-rank adapter's factors in one launch: the blocks of a cluster share the rows (sm_90).

As ``low_rank``, but for where sums of blocks meet: each block gathers those of its warps in shared memory, and adds up
a share of the cluster's from there.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from kernels import barrier, bits, memory
from kernels.adapter_gradient.low_rank import (
    COLUMNS,
    PARKED_PITCH,
    SPAN,
    STEP,
    SUMS,
    THREADS,
    WARPS,
    accumulator,
    park,
    ring,
)
from kernels.elements import ELEMENTS
from kernels.target import cuda, device, f32, i64, kernel_factory, types
from kernels.warp import block_barrier, block_x, block_y, block_z, sync_warp, thread_index

MOST_BLOCKS = 8
"""Blocks of a cluster that every device has room for."""

_PITCH = SPAN + 1
_u32 = np.uint32


def _meeting(cluster: int) -> Callable:
    """A barrier of the cluster, or of a block that is alone."""

    @device
    def meet():
        if cluster > 1:
            sync_warp()
            barrier.cluster_barrier()
        else:
            block_barrier()

    return meet


@device
def _gather(shared, to, thread):
    """All warps' sums of 16 ranks, in order, to the block's own place in shared memory."""
    for turn in range(STEP * SPAN // THREADS):
        place = _u32(thread + _u32(turn * THREADS))
        row, column = _u32(place // _u32(SPAN)), _u32(place % _u32(SPAN))
        at, value = _u32(_u32(row * _u32(PARKED_PITCH)) + column), np.float32(0)
        for other in range(WARPS):
            word = _u32(_u32(at + _u32(other * STEP * PARKED_PITCH)) << _u32(1))
            value += bits.bits_f32(memory.shared_load32(shared, np.int64(word)))
        own = _u32(to + _u32(_u32(row * _u32(_PITCH)) + column))
        memory.shared_store32(shared, np.int64(_u32(own << _u32(1))), bits.f32_bits(value))


def _cluster_emitter(out: str, tiles: int, cluster: int) -> Callable:
    """``emit(shared, at, side, turned, rank0, rank, column0, scale, thread)``: the block's share of the cluster's sums.

    ``at`` is where each block's own lie in words; results are [rank, column], or the other way round where ``turned``.
    """
    store, ranks = ELEMENTS[out].store, STEP * tiles
    share = -(-ranks * SPAN // (cluster * THREADS))

    @device
    def own_sum(shared, at, part):
        if cluster > 1:
            return bits.bits_f32(barrier.shared_load_remote(barrier.shared_address(shared, np.int64(at)), part))
        return bits.bits_f32(memory.shared_load32(shared, np.int64(at)))

    @device
    def emit(shared, at, side, turned, rank0, rank, column0, scale, thread):
        first = _u32(barrier.cluster_rank() * _u32(THREADS)) if cluster > 1 else _u32(0)
        for turn in range(share):
            place = _u32(_u32(first + thread) + _u32(turn * cluster * THREADS))
            row, column = _u32(place // _u32(SPAN)), _u32(place % _u32(SPAN))
            if turned:
                row, column = _u32(place % _u32(ranks)), _u32(place // _u32(ranks))
            k, across = rank0 + np.int64(row), column0 + np.int64(column)
            if place < _u32(ranks * SPAN) and k < rank and across < side[COLUMNS]:
                word = _u32(_u32(at + _u32(_u32(row * _u32(_PITCH)) + column)) << _u32(1))
                value = np.float32(0)
                for part in range(cluster):
                    value += own_sum(shared, word, _u32(part))
                store(side[SUMS], across * rank + k if turned else k * side[COLUMNS] + across, scale * value)

    return emit


@kernel_factory(
    ("bf16", "f32", 1, 1, 3, (True, False), True), ("bf16", "bf16", 4, 1, 8, (False, False)),
    ("f16", "f32", 2, 2, 1, (True, True)),
)  # fmt: skip
def low_rank_gradient_cluster(
    kind: str, out: str, tiles: int, parts: int, cluster: int, turned: tuple[bool, bool], beside: bool = False
):
    """Parameters: both sides', rows, rows of a block, rank, blocks of the first side, blocks of both, scale.

    As of ``low_rank_gradient``, but that a side's sums are the result, [rank, column], or stored the other way round
    where the side is ``turned``. Blocks: rows along x, columns along y, ranks along z.
    """
    sum_count, (stages, staged) = 32 * tiles, ring(tiles, parts)
    accumulate, emit = accumulator(kind, tiles, parts), _cluster_emitter(out, tiles, cluster)
    gathered, (first_turned, second_turned), meet = WARPS * STEP * PARKED_PITCH, turned, _meeting(cluster)

    @device
    def work(side, is_turned, block, rows, rows_of_block, rank, scale):
        shared = cuda.shared.array(0, np.uint16, alignment=1024)
        sums = cuda.local.array(sum_count, np.float32)
        thread = thread_index()
        lane, number = _u32(thread & _u32(31)), _u32(thread >> _u32(5))
        row0, rank0 = block_x() * rows_of_block, block_z() * np.int64(STEP * tiles)
        end, column0 = min(row0 + rows_of_block, rows), block * np.int64(SPAN)
        accumulate(sums, shared, side, column0, row0, end, rank0, rank, lane, number)
        memory.copy_async_wait_all()
        for tile in range(tiles):
            block_barrier()
            park(shared, sums, 32 * tile, lane, number)
            block_barrier()
            _gather(shared, _u32(gathered + tile * STEP * _PITCH), thread)
        meet()
        emit(shared, _u32(gathered), side, is_turned, rank0, rank, column0, scale, thread)
        meet()

    @device
    def side_of(first, second, is_first):
        if is_first:
            return first
        return second

    def kernel(first, second, rows, rows_of_block, rank, blocks_of_first, blocks, scale):
        block = block_y()
        is_first = block < blocks_of_first
        side, is_turned = side_of(first, second, is_first), first_turned if is_first else second_turned
        work(side, is_turned, block if is_first else block - blocks_of_first, rows, rows_of_block, rank, scale)
        last_ranks = (block_z() + 1) * (STEP * tiles) >= rank
        if beside and block == blocks - 1 and block_x() == cluster - 1 and last_ranks:
            barrier.wait_for_previous_grid()

    pointer = ELEMENTS[kind].pointer
    side = types.Tuple((ELEMENTS[out].pointer, pointer, pointer, i64, i64, i64, i64))
    sum_bytes = 4 * (gathered + tiles * STEP * _PITCH)
    options = {"threads": THREADS, "shared_bytes": max(2 * WARPS * stages * staged, sum_bytes), "cluster": cluster}
    options |= {"max_registers": 128 if tiles == 1 else None}
    return kernel, (side, side, i64, i64, i64, i64, i64, f32), options | barrier.HOPPER
