"""The walk of a block over the depth of a product: copies some stages ahead, products of the stage that has arrived.

What is multiplied is a source's business. Its depth comes in segments, each a whole number of tiles. ``q`` is whatever
its device functions take:

``segments(q)``                                              how many there are, uint32, at least 1
``depth_tiles(q, number)``                                   tiles of depth of one of them, uint32
``begin(q, number, a_at, b_at, thread)``                     finds the thread's units of a segment
``fetch(q, number, shared, at, a_at, b_at, depth0, thread)`` starts the copies of the tile at ``depth0`` to a stage
``factors(q, number)``                                       the sums' factor before it (ratio), and its scale

``a_words`` and ``b_words``: how many numbers ``a_at`` and ``b_at`` keep; ``several``: whether there may be more than
one segment.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import numpy as np

from kernels import memory, warp
from kernels.matmul.mma_tile import MmaTile
from kernels.target import cuda, device


def _scaler(count: int) -> Callable:
    """``multiply_by(sums, factor)``: all sums times a factor."""

    @device
    def multiply_by(sums, factor):
        if factor != np.float32(1):
            for i in range(count):
                sums[i] = sums[i] * factor

    return multiply_by


def pipeline(source: SimpleNamespace, multiply: Callable, tile: MmaTile) -> Callable:
    """``walk(shared, sums, q, first, count)``: tiles of depth [first, first + count), counted over all segments.

    Leaves the scaled sums of the warp's part, as ``multiply`` keeps them.
    """
    segments, depth_tiles, begin, fetch, factors = (
        source.segments, source.depth_tiles, source.begin, source.fetch, source.factors
    )  # fmt: skip
    several, a_words, b_words, depth = source.several, source.a_words, source.b_words, tile.depth
    stages, stage_elements, b_offset = tile.stages, tile.stage_elements, tile.rows * tile.depth
    sums_count, warp_columns = tile.rows_of_warp * tile.columns_of_warp // 32, tile.warp_columns
    arrived, multiply_by = memory.copy_async_wait(stages - 2), _scaler(sums_count)

    @device
    def following_stage(at):
        at += np.int64(stage_elements)
        return np.int64(0) if at == np.int64(stages * stage_elements) else at

    @device
    def walk(shared, sums, q, first, count):
        thread = warp.thread_index()
        lane, warp_number = np.uint32(thread & np.uint32(31)), np.uint32(thread >> np.uint32(5))
        warp_row = np.uint32(warp_number // np.uint32(warp_columns))
        warp_column = np.uint32(warp_number % np.uint32(warp_columns))
        a_at = cuda.local.array(a_words, np.int64)
        b_at = cuda.local.array(b_words, np.int64)
        for i in range(sums_count):
            sums[i] = np.float32(0)
        fetching, skipped = np.uint32(0), first
        if several:
            last = np.uint32(segments(q) - np.uint32(1))
            while fetching < last and skipped >= depth_tiles(q, fetching):
                skipped = np.uint32(skipped - depth_tiles(q, fetching))
                fetching = np.uint32(fetching + np.uint32(1))
        multiplying = fetching
        to_fetch = np.uint32(depth_tiles(q, fetching) - skipped)
        to_multiply = to_fetch
        depth0 = np.int64(np.uint32(skipped * np.uint32(depth)))
        begin(q, fetching, a_at, b_at, thread)
        fetched_at, multiplied_at = np.int64(0), np.int64(0)
        for turn in range(np.uint32(count + np.uint32(stages - 1))):
            if np.uint32(turn) >= np.uint32(stages - 1):
                arrived()
                warp.block_barrier()
            if np.uint32(turn) < count:
                if several and to_fetch == np.uint32(0):
                    fetching = np.uint32(fetching + np.uint32(1))
                    to_fetch, depth0 = depth_tiles(q, fetching), np.int64(0)
                    begin(q, fetching, a_at, b_at, thread)
                fetch(q, fetching, shared, fetched_at, a_at, b_at, depth0, thread)
                to_fetch = np.uint32(to_fetch - np.uint32(1))
                depth0 += np.int64(depth)
                fetched_at = following_stage(fetched_at)
            memory.copy_async_commit()
            if np.uint32(turn) >= np.uint32(stages - 1):
                if several and to_multiply == np.uint32(0):
                    multiplying = np.uint32(multiplying + np.uint32(1))
                    to_multiply = depth_tiles(q, multiplying)
                    multiply_by(sums, factors(q, multiplying)[0])
                multiply(shared, multiplied_at, multiplied_at + np.int64(b_offset), sums, warp_row, warp_column, lane)
                to_multiply = np.uint32(to_multiply - np.uint32(1))
                multiplied_at = following_stage(multiplied_at)
        multiply_by(sums, factors(q, multiplying)[1])

    return walk
