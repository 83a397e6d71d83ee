"""Products of at most 16 rows of A with a large B [n, k]: bound by reading B once, in 16-byte loads.

Each warp of a block takes every so-manyth 32 depths of the block's rows of B, straight from memory into the tensor
core's registers: a lane loads eight neighbouring depths of a row, its fragments of two ``mma`` steps, and A is loaded
with the same depths in the same places. B's rows are the instruction's rows, A's its columns. The warps' sums are added
up in shared memory, always in the same order.

A grid that ``waits`` before one of its segments may begin while the grid before it still runs (sm_90).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from kernels import memory, tensor_core, warp
from kernels.barrier import HOPPER, next_grid_may_begin, wait_for_previous_grid
from kernels.matmul.epilogue import epilogue
from kernels.matmul.problem import (
    A_BATCH,
    A_STRIDE,
    B_BATCH,
    B_STRIDE,
    COLUMNS,
    RATIO,
    ROWS,
    SCALE,
    A,
    B,
    K,
    result_parameters,
    segment_parameters,
)
from kernels.matmul.skinny_sums import SkinnyTile, sums_of_block
from kernels.matmul.store import UNIT, storer
from kernels.target import cuda, device, i64, kernel_factory, types

CHUNK = 32
"""Depths of one step of a warp: eight for each of four lanes."""


@dataclass(frozen=True)
class SkinnyProblem:
    """The compile-time shape: 16-bit kind, how many segments, the result's kind, the epilogue, and whether results are
    accessed eight at a time. ``waits`` is the first segment that the launch before has to have ended for, if it may not
    have at the beginning: that segment's A and those after it may be its results.
    """

    kind: str
    segments: int
    out: str
    steps: tuple
    wide: bool
    waits: int | None = None


@device
def _load(pointer, at, inside, words, to, stream):
    if inside:
        if stream:
            a, b, c, d = memory.load128_stream(pointer, at)
        else:
            a, b, c, d = memory.load128(pointer, at)
    else:
        a = b = c = d = np.uint32(0)
    words[to] = a
    words[to + 1] = b
    words[to + 2] = c
    words[to + 3] = d


def _multiplier(kind: str, groups: int, a_groups: int) -> Callable:
    """``multiply(right, left, slot, sums)``: one step's products of all groups."""
    mma = tensor_core.MMA[kind]

    @device
    def multiply(right, left, slot, sums):
        for half in range(2):
            for i in range(groups):
                b = slot * 8 * groups + 8 * i + 2 * half
                for j in range(a_groups):
                    a = slot * 4 * a_groups + 4 * j + 2 * half
                    at = 4 * (i * a_groups + j)
                    c = mma(
                        right[b], right[b + 4], right[b + 1], right[b + 5], left[a], left[a + 1],
                        sums[at], sums[at + 1], sums[at + 2], sums[at + 3],
                    )  # fmt: skip
                    sums[at] = c[0]
                    sums[at + 1] = c[1]
                    sums[at + 2] = c[2]
                    sums[at + 3] = c[3]

    return multiply


def _finder(tile: SkinnyTile, gated: bool) -> Callable:
    """``find(s, a_at, b_at, result, row0, batch, lane_row)``: where a lane's rows begin.

    Rows beyond the last read the last: what they come to is not used.
    """
    row_groups, a_groups, half_groups = tile.row_groups, tile.a_groups, tile.row_groups // 2

    @device
    def b_row(group, lane_row, row0, columns):
        """The row of B a lane takes for a group: before a gate from either half, never beyond the last."""
        if gated and group >= half_groups:
            return columns + min(row0 + np.int64(16 * (group - half_groups)) + lane_row, columns - np.int64(1))
        return min(row0 + np.int64(16 * group) + lane_row, columns - np.int64(1))

    @device
    def find(s, a_at, b_at, result, row0, batch, lane_row):
        for i in range(row_groups):
            for half in range(2):
                row = b_row(i, lane_row + np.int64(8 * half), row0, result[COLUMNS])
                b_at[2 * i + half] = batch * s[B_BATCH] + row * s[B_STRIDE]
        for i in range(a_groups):
            row = min(lane_row + np.int64(8 * i), result[ROWS] - np.int64(1))
            a_at[i] = batch * s[A_BATCH] + row * s[A_STRIDE]

    return find


def _fetcher(tile: SkinnyTile, fresh: bool) -> Callable:
    """``fetch(s, a_at, b_at, depth, depths, whole, right, left, slot)``: a step's words of B and A.

    Zeros from ``depths`` on, where not ``whole``. ``fresh``: the grid before may have made A while this one ran.
    """
    row_groups, a_groups = tile.row_groups, tile.a_groups

    @device
    def fetch(s, a_at, b_at, depth, depths, whole, right, left, slot):
        inside = whole or depth < depths
        for i in range(2 * row_groups):
            _load(s[B], b_at[i] + depth, inside, right, slot * 8 * row_groups + 4 * i, True)
        for i in range(a_groups):
            _load(s[A], a_at[i] + depth, inside, left, slot * 4 * a_groups + 4 * i, fresh)

    return fetch


def _segment(rest: Callable, position: int, problem: SkinnyProblem, tile: SkinnyTile, gated: bool) -> Callable:
    """``rest``, then one segment's products in the warp's sums."""
    row_groups, a_groups, unroll, warps = tile.row_groups, tile.a_groups, tile.unroll, tile.warps
    waits, overlaps = problem.waits == position, problem.waits is not None
    find, fetch = _finder(tile, gated), _fetcher(tile, overlaps)
    multiply = _multiplier(problem.kind, row_groups, a_groups)
    right_words, left_words, b_rows = unroll * 8 * row_groups, unroll * 4 * a_groups, 2 * row_groups
    sums_count, turn_depth = 4 * row_groups * a_groups, unroll * warps * CHUNK

    @device
    def segment(sums, result, p, row0, batch, number, lane):
        rest(sums, result, p, row0, batch, number, lane)
        if waits:
            wait_for_previous_grid()
            # Not before: the next grid may rely on what came before this one being done.
            next_grid_may_begin()
        s = p[position]
        if s[RATIO] != np.float32(1):
            for i in range(sums_count):
                sums[i] = sums[i] * s[RATIO]
        b_at = cuda.local.array(b_rows, np.int64)
        a_at = cuda.local.array(a_groups, np.int64)
        find(s, a_at, b_at, result, row0, batch, np.int64(lane >> np.uint32(2)))
        right = cuda.local.array(right_words, np.uint32)
        left = cuda.local.array(left_words, np.uint32)
        first = np.int64(number) * np.int64(CHUNK)
        depth = first + np.int64(np.uint32((lane & np.uint32(3)) * np.uint32(8)))
        done, depths = np.int64(0), s[K]
        while done + np.int64(turn_depth) <= depths:
            for u in range(unroll):
                fetch(s, a_at, b_at, depth + np.int64(u * warps * CHUNK), depths, True, right, left, u)
            for u in range(unroll):
                multiply(right, left, u, sums)
            depth += np.int64(turn_depth)
            done += np.int64(turn_depth)
        while done + first < depths:
            fetch(s, a_at, b_at, depth, depths, False, right, left, 0)
            multiply(right, left, 0, sums)
            depth += np.int64(warps * CHUNK)
            done += np.int64(warps * CHUNK)

    return segment


@device
def _nothing(sums, result, p, row0, batch, number, lane):
    pass


_BIAS = (("bias", "bf16"), ("gelu",), ("residual", "bf16"))


@kernel_factory(
    (SkinnyProblem("bf16", 1, "bf16", (), True), SkinnyTile(1, 1, 4, 4)),
    (SkinnyProblem("bf16", 2, "bf16", _BIAS, True), SkinnyTile(2, 1, 8, 1)),
    (SkinnyProblem("f16", 1, "f32", (("gate", "silu", True),), False), SkinnyTile(2, 1, 8, 2)),
    (SkinnyProblem("bf16", 3, "bf16", (), True, 1), SkinnyTile(2, 2, 4, 2)),
)
def matmul_skinny(problem, tile):
    """Parameters: tiles of rows of B in one result, the result's, the segments', the epilogue's; a block a tile and
    batch.
    """
    gated = epilogue(problem.steps).gated
    accumulate = _nothing
    for position in range(problem.segments):
        accumulate = _segment(accumulate, position, problem, tile, gated)
    block_sums = sums_of_block(tile, gated)
    combine, take = block_sums.combine, block_sums.take
    emit, last, sides = storer(problem.out, problem.steps, problem.wide), problem.segments - 1, 2 if gated else 1
    columns_of_block, values_count, sums_count = tile.rows // sides, UNIT * sides, 4 * tile.row_groups * tile.a_groups
    units_of_row, threads, shared_elements = columns_of_block // UNIT, tile.threads, block_sums.elements

    def kernel(tiles, result, p, e):
        shared = cuda.shared.array(shared_elements, np.float32)
        block, thread = np.uint32(warp.block_x()), warp.thread_index()
        number, lane = np.uint32(thread >> np.uint32(5)), np.uint32(thread & np.uint32(31))
        batch = np.uint32(block // np.uint32(tiles))
        row0 = np.int64(np.uint32(block - np.uint32(batch * np.uint32(tiles)))) * np.int64(columns_of_block)
        sums = cuda.local.array(sums_count, np.float32)
        for i in range(sums_count):
            sums[i] = np.float32(0)
        accumulate(sums, result, p, row0, np.int64(batch), number, lane)
        combine(shared, sums, p[last][SCALE], number, lane, thread)
        values = cuda.local.array(values_count, np.float32)
        index = thread
        while index < np.uint32(np.uint32(result[ROWS]) * np.uint32(units_of_row)):
            row = np.uint32(index // np.uint32(units_of_row))
            unit = np.uint32(index % np.uint32(units_of_row))
            column = row0 + np.int64(np.uint32(unit * np.uint32(UNIT)))
            if column < result[COLUMNS]:
                take(shared, row, unit, values)
                emit(values, result, e, np.int64(batch), np.int64(row), column)
            index = np.uint32(index + np.uint32(threads))

    parameters = (
        i64,
        result_parameters(problem.out),
        types.Tuple([segment_parameters(("NT", problem.kind, problem.kind))] * problem.segments),
        epilogue(problem.steps).parameters,
    )
    options = {"threads": tile.threads, "min_blocks": tile.blocks}
    return kernel, parameters, options | (HOPPER if problem.waits is not None else {})
