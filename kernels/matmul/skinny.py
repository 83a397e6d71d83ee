"""Products of at most 16 rows of A with a large B [n, k]: bound by reading B once, in 16-byte loads.

Each warp of a block takes every so-manyth 32 depths of the block's rows of B, straight from memory into the tensor
core's registers: a lane loads eight neighbouring depths of a row, its fragments of two ``mma`` steps, and A is loaded
with the same depths in the same places. B's rows are the instruction's rows, A's its columns. The warps' sums are added
up in shared memory, always in the same order.

A low-rank segment, scale (A D^T) U^T with a small D [rank, k], has D's rows follow B's in every block, which costs
reads of L2 only: A D^T stays in shared memory, in fp32, and takes no launch of its own. Where the segment whose A it
takes is left out, that one's k comes negative: its A is walked, its products do not count.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from kernels import memory, tensor_core, warp
from kernels.barrier import wait_for_previous_grid
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
from kernels.matmul.skinny_sums import D_BATCH, D_STRIDE, RANK, D, SkinnyTile, low_rank_parameters, sums_of_block
from kernels.matmul.store import UNIT, storer
from kernels.target import cuda, device, i64, kernel_factory, types

CHUNK = 32
"""Depths of one step of a warp: eight for each of four lanes."""


@dataclass(frozen=True)
class SkinnyProblem:
    """The compile-time shape: 16-bit kind, how many segments, for each low-rank segment the segment whose A it takes
    (in rising order), the result's kind, the epilogue, whether results are accessed eight at a time, and how many of
    the last segments' A the launch before makes, which may not have ended (sm_90).
    """

    kind: str
    segments: int
    low_rank_of: tuple[int, ...]
    out: str
    steps: tuple
    wide: bool
    late: int = 0


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


@device
def _fetch_nothing(low, b_at, depth, inside, right, slot):
    pass


def _fetch_low_rank(rest: Callable, position: int, group: int, slot_words: int) -> Callable:
    """``rest``, then the rows of one D as one more group."""

    @device
    def fetch(low, b_at, depth, inside, right, slot):
        rest(low, b_at, depth, inside, right, slot)
        for half in range(2):
            to = slot * slot_words + 8 * group + 4 * half
            _load(low[position][D], b_at[2 * group + half] + depth, inside, right, to, False)

    return fetch


@device
def _find_nothing(low, b_at, batch, lane_row):
    pass


def _find_low_rank(rest: Callable, position: int, group: int) -> Callable:
    """``rest``, then where a lane's rows of one D begin; rows beyond the rank read the last, and are not used."""

    @device
    def find(low, b_at, batch, lane_row):
        rest(low, b_at, batch, lane_row)
        d = low[position]
        for half in range(2):
            row = max(min(lane_row + np.int64(8 * half), d[RANK] - np.int64(1)), np.int64(0))
            b_at[2 * group + half] = batch * d[D_BATCH] + row * d[D_STRIDE]

    return find


def _multiplier(kind: str, first: int, last: int, groups: int, a_groups: int) -> Callable:
    """``multiply(right, left, slot, sums)``: one step's products of the groups [first, last) of ``groups``."""
    mma = tensor_core.mma_f16 if kind == "f16" else tensor_core.mma_bf16

    @device
    def multiply(right, left, slot, sums):
        for half in range(2):
            for i in range(first, last):
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


def _finder(problem: SkinnyProblem, tile: SkinnyTile, gated: bool, own: list[int]) -> Callable:
    """``find(s, low, a_at, b_at, result, row0, batch, lane_row)``: where a lane's rows begin.

    Rows beyond the last read the last: what they come to is not used.
    """
    row_groups, a_groups, half_groups = tile.row_groups, tile.a_groups, tile.row_groups // 2
    find_low = _find_nothing
    for number in own:
        find_low = _find_low_rank(find_low, number, row_groups + number)

    @device
    def b_row(group, lane_row, row0, columns):
        """The row of B a lane takes for a group: before a gate from either half, never beyond the last."""
        if gated and group >= half_groups:
            return columns + min(row0 + np.int64(16 * (group - half_groups)) + lane_row, columns - np.int64(1))
        return min(row0 + np.int64(16 * group) + lane_row, columns - np.int64(1))

    @device
    def find(s, low, a_at, b_at, result, row0, batch, lane_row):
        for i in range(row_groups):
            for half in range(2):
                row = b_row(i, lane_row + np.int64(8 * half), row0, result[COLUMNS])
                b_at[2 * i + half] = batch * s[B_BATCH] + row * s[B_STRIDE]
        find_low(low, b_at, batch, lane_row)
        for i in range(a_groups):
            row = min(lane_row + np.int64(8 * i), result[ROWS] - np.int64(1))
            a_at[i] = batch * s[A_BATCH] + row * s[A_STRIDE]

    return find


def _fetcher(problem: SkinnyProblem, tile: SkinnyTile, own: list[int]) -> Callable:
    """``fetch(s, low, a_at, b_at, depth, depths, whole, right, left, slot)``: a step's words of B, D and A.

    Zeros from ``depths`` on, where not ``whole``.
    """
    row_groups, a_groups = tile.row_groups, tile.a_groups
    groups, fetch_low = row_groups + len(problem.low_rank_of), _fetch_nothing
    for number in own:
        fetch_low = _fetch_low_rank(fetch_low, number, row_groups + number, 8 * groups)

    @device
    def fetch(s, low, a_at, b_at, depth, depths, whole, right, left, slot):
        inside = whole or depth < depths
        for i in range(2 * row_groups):
            _load(s[B], b_at[i] + depth, inside, right, slot * 8 * groups + 4 * i, True)
        fetch_low(low, b_at, depth, inside, right, slot)
        for i in range(a_groups):
            _load(s[A], a_at[i] + depth, inside, left, slot * 4 * a_groups + 4 * i, False)

    return fetch


def _segment(rest: Callable, position: int, problem: SkinnyProblem, tile: SkinnyTile, gated: bool) -> Callable:
    """``rest``, then one segment's products in the warp's sums, and A D^T of the low-rank segments that take its A."""
    row_groups, a_groups, unroll, warps = tile.row_groups, tile.a_groups, tile.unroll, tile.warps
    groups = row_groups + len(problem.low_rank_of)
    own = [number for number, of in enumerate(problem.low_rank_of) if of == position]
    find, fetch = _finder(problem, tile, gated, own), _fetcher(problem, tile, own)
    first_low, last_low = (row_groups + own[0], row_groups + own[-1] + 1) if own else (0, 0)
    multiply = _multiplier(problem.kind, 0, row_groups, groups, a_groups)
    multiply_low = _multiplier(problem.kind, first_low, last_low, groups, a_groups)
    right_words, left_words, b_rows = unroll * 8 * groups, unroll * 4 * a_groups, 2 * groups
    row_sums, turn_depth = 4 * row_groups * a_groups, unroll * warps * CHUNK
    waits = problem.late and position == problem.segments - problem.late

    @device
    def segment(sums, result, p, low, row0, batch, number, lane):
        rest(sums, result, p, low, row0, batch, number, lane)
        if waits:
            wait_for_previous_grid()
        s = p[position]
        if s[RATIO] != np.float32(1):
            for i in range(row_sums):
                sums[i] = sums[i] * s[RATIO]
        b_at = cuda.local.array(b_rows, np.int64)
        a_at = cuda.local.array(a_groups, np.int64)
        find(s, low, a_at, b_at, result, row0, batch, np.int64(lane >> np.uint32(2)))
        right = cuda.local.array(right_words, np.uint32)
        left = cuda.local.array(left_words, np.uint32)
        first = np.int64(number) * np.int64(CHUNK)
        depth = first + np.int64(np.uint32((lane & np.uint32(3)) * np.uint32(8)))
        done, depths, counts = np.int64(0), abs(s[K]), s[K] > np.int64(0)
        while done + np.int64(turn_depth) <= depths:
            for u in range(unroll):
                at = depth + np.int64(u * warps * CHUNK)
                fetch(s, low, a_at, b_at, at, depths, True, right, left, u)
            for u in range(unroll):
                if counts:
                    multiply(right, left, u, sums)
                multiply_low(right, left, u, sums)
            depth += np.int64(turn_depth)
            done += np.int64(turn_depth)
        while done + first < depths:
            fetch(s, low, a_at, b_at, depth, depths, False, right, left, 0)
            if counts:
                multiply(right, left, 0, sums)
            multiply_low(right, left, 0, sums)
            depth += np.int64(warps * CHUNK)
            done += np.int64(warps * CHUNK)

    return segment


@device
def _nothing(sums, result, p, low, row0, batch, number, lane):
    pass


_BIAS = (("bias", "bf16"), ("gelu",), ("residual", "bf16"))


@kernel_factory(
    (SkinnyProblem("bf16", 1, (), "bf16", (), True), SkinnyTile(1, 1, 4, 4)),
    (SkinnyProblem("bf16", 1, (0,), "bf16", _BIAS, True), SkinnyTile(2, 2, 4, 2)),
    (SkinnyProblem("bf16", 2, (0, 0, 1), "bf16", (), True), SkinnyTile(2, 1, 8, 1)),
    (SkinnyProblem("f16", 1, (), "f32", (("gate", "silu", True),), False), SkinnyTile(2, 1, 8, 2)),
    (SkinnyProblem("bf16", 3, (), "bf16", (), True, 2), SkinnyTile(2, 2, 4, 2)),
)
def matmul_skinny(problem, tile):
    """Parameters: tiles of rows of B in one result, the result's, the segments', the low-rank segments', the
    epilogue's; a block a tile and batch.
    """
    gated = epilogue(problem.steps).gated
    accumulate = _nothing
    for position in range(problem.segments):
        accumulate = _segment(accumulate, position, problem, tile, gated)
    block_sums = sums_of_block(problem.kind, len(problem.low_rank_of), tile, gated)
    request, combine, take = block_sums.request, block_sums.combine, block_sums.take
    emit, last, sides = storer(problem.out, problem.steps, problem.wide), problem.segments - 1, 2 if gated else 1
    groups = tile.row_groups + len(problem.low_rank_of)
    columns_of_block, values_count, sums_count = tile.rows // sides, UNIT * sides, 4 * groups * tile.a_groups
    units_of_row, threads, shared_elements = columns_of_block // UNIT, tile.threads, block_sums.elements
    up_elements = block_sums.up_elements

    def kernel(tiles, result, p, low, e):
        shared = cuda.shared.array(shared_elements, np.float32)
        up = cuda.shared.array(up_elements, np.uint16, alignment=16)
        block, thread = np.uint32(warp.block_x()), warp.thread_index()
        number, lane = np.uint32(thread >> np.uint32(5)), np.uint32(thread & np.uint32(31))
        batch = np.uint32(block // np.uint32(tiles))
        row0 = np.int64(np.uint32(block - np.uint32(batch * np.uint32(tiles)))) * np.int64(columns_of_block)
        request(up, low, row0, result[COLUMNS], np.int64(batch), thread)
        sums = cuda.local.array(sums_count, np.float32)
        for i in range(sums_count):
            sums[i] = np.float32(0)
        accumulate(sums, result, p, low, row0, np.int64(batch), number, lane)
        combine(shared, up, sums, p[last][SCALE], low, number, lane, thread)
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
        types.Tuple([low_rank_parameters(problem.kind)] * len(problem.low_rank_of)),
        epilogue(problem.steps).parameters,
    )
    options = {"threads": tile.threads, "min_blocks": tile.blocks(len(problem.low_rank_of))}
    return kernel, parameters, options | ({"architectures": (9, 0)} if problem.late else {})
