"""Products of at most 16 rows of A with a large B [n, k]: bound by reading B once, in 16-byte loads.

Each warp of a block takes every so-manyth 32 depths of the block's rows of B, straight from memory into the tensor
core's registers: a lane loads eight neighbouring depths of a row, which serve as its fragments of two ``mma`` steps, and
A is loaded with the same depths in the same places. B's rows are the instruction's rows, A's its columns. The warps' sums
are added up in shared memory, always in the same order.

A factored segment, scale (A D^T) B^T with a small D [rank, k], takes D's rows as more rows of B, in every block: A D^T
(fp32) stays in shared memory and never takes a launch of its own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np

from kernels import memory, tensor_core, warp
from kernels.matmul_epilogue import epilogue
from kernels.matmul_problem import (
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
from kernels.matmul_store import UNIT, storer
from kernels.target import cuda, device, kernel_factory, types

CHUNK = 32
"""Depths of one step of a warp: eight a lane in groups of four."""
GROUP = 16
"""Rows of B in one fragment."""


@dataclass(frozen=True)
class SkinnyTile:
    """How a block works: fragments of B's rows, of A's rows (8 each), warps, and steps whose loads are under way at once."""

    row_groups: int
    a_groups: int
    warps: int
    unroll: int

    @property
    def rows(self) -> int:
        """Rows of B a block takes."""
        return GROUP * self.row_groups

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 32 * self.warps


def _loads(tile: SkinnyTile, kind: str) -> SimpleNamespace:
    """Device functions that load a step's fragments and multiply them."""
    mma = tensor_core.mma_f16 if kind == "f16" else tensor_core.mma_bf16
    row_groups, a_groups = tile.row_groups, tile.a_groups
    b_words, a_words = 8 * row_groups, 4 * a_groups

    @device
    def load(pointer, at, inside, words, to, stream):
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
    def fetch(s, a_at, b_at, a_inside, depth, whole, right, left, slot):
        """One step's words of B, two rows a group, and of A."""
        inside = whole or depth < s[K]
        for i in range(2 * row_groups):
            load(s[B], b_at[i] + depth, inside, right, slot * b_words + 4 * i, True)
        for i in range(a_groups):
            load(s[A], a_at[i] + depth, inside and a_inside[i] != np.uint32(0), left, slot * a_words + 4 * i, False)

    @device
    def multiply(right, left, slot, sums):
        for half in range(2):
            for i in range(row_groups):
                b = slot * b_words + 8 * i + 2 * half
                for j in range(a_groups):
                    a = slot * a_words + 4 * j + 2 * half
                    at = 4 * (i * a_groups + j)
                    c = mma(
                        right[b], right[b + 4], right[b + 1], right[b + 5], left[a], left[a + 1],
                        sums[at], sums[at + 1], sums[at + 2], sums[at + 3],
                    )  # fmt: skip
                    sums[at] = c[0]
                    sums[at + 1] = c[1]
                    sums[at + 2] = c[2]
                    sums[at + 3] = c[3]

    return SimpleNamespace(fetch=fetch, multiply=multiply, a_words=a_words, b_words=b_words)


def _segment(rest: Callable, position: int, kind: str, tile: SkinnyTile, gated: bool) -> Callable:
    """``rest``, then one segment's products in the warp's sums."""
    loads = _loads(tile, kind)
    fetch, multiply = loads.fetch, loads.multiply
    row_groups, a_groups, unroll, warps = tile.row_groups, tile.a_groups, tile.unroll, tile.warps
    right_words, left_words = unroll * loads.b_words, unroll * loads.a_words
    sums_count, half_groups = 4 * row_groups * a_groups, row_groups // 2
    turn_depth = unroll * warps * CHUNK

    @device
    def b_row(group, inner, row0, columns):
        """The row of B that a lane takes for a group: after a gate's split from either half, never beyond the last."""
        if gated and group >= half_groups:
            return columns + min(row0 + np.int64(GROUP * (group - half_groups)) + inner, columns - np.int64(1))
        return min(row0 + np.int64(GROUP * group) + inner, columns - np.int64(1))

    @device
    def segment(sums, result, p, row0, batch, number, lane):
        rest(sums, result, p, row0, batch, number, lane)
        s = p[position]
        if s[RATIO] != np.float32(1):
            for i in range(sums_count):
                sums[i] = sums[i] * s[RATIO]
        group, quarter = np.int64(lane >> np.uint32(2)), np.int64(np.uint32((lane & np.uint32(3)) * np.uint32(8)))
        b_at = cuda.local.array(2 * row_groups, np.int64)
        a_at = cuda.local.array(a_groups, np.int64)
        a_inside = cuda.local.array(a_groups, np.uint32)
        for i in range(row_groups):
            for half in range(2):
                row = b_row(i, group + np.int64(8 * half), row0, result[COLUMNS])
                b_at[2 * i + half] = batch * s[B_BATCH] + row * s[B_STRIDE]
        for i in range(a_groups):
            row = group + np.int64(8 * i)
            a_inside[i] = np.uint32(1) if row < result[ROWS] else np.uint32(0)
            a_at[i] = batch * s[A_BATCH] + min(row, result[ROWS] - np.int64(1)) * s[A_STRIDE]
        right = cuda.local.array(right_words, np.uint32)
        left = cuda.local.array(left_words, np.uint32)
        depth = np.int64(number) * np.int64(CHUNK) + quarter
        first = np.int64(0)
        while first + np.int64(turn_depth) <= s[K]:
            for u in range(unroll):
                fetch(s, a_at, b_at, a_inside, depth + np.int64(u * warps * CHUNK), True, right, left, u)
            for u in range(unroll):
                multiply(right, left, u, sums)
            depth += np.int64(turn_depth)
            first += np.int64(turn_depth)
        while first + np.int64(number) * np.int64(CHUNK) < s[K]:
            fetch(s, a_at, b_at, a_inside, depth, False, right, left, 0)
            multiply(right, left, 0, sums)
            depth += np.int64(warps * CHUNK)
            first += np.int64(warps * CHUNK)

    return segment


@device
def _nothing(sums, result, p, row0, batch, number, lane):
    pass


@functools.cache
def _reduction(tile: SkinnyTile, gated: bool) -> SimpleNamespace:
    """``park(shared, sums, number, lane)``: a warp's sums to shared memory, as [warp][row of A][row of B];
    ``total(shared, row, unit, values)``: eight neighbours' sums over all warps, and of their partners before a gate.
    """
    row_groups, a_groups, warps, pitch = tile.row_groups, tile.a_groups, tile.warps, tile.rows + 4
    plane, half_rows, sides = 8 * a_groups * pitch, tile.rows // 2, 2 if gated else 1

    @device
    def park(shared, sums, number, lane):
        base = np.uint32(number * np.uint32(plane))
        for i in range(row_groups):
            for j in range(a_groups):
                for value in range(4):
                    row = np.uint32(np.uint32(8 * j + (value & 1)) + np.uint32((lane & np.uint32(3)) * np.uint32(2)))
                    column = np.uint32(np.uint32(GROUP * i + 8 * (value >> 1)) + np.uint32(lane >> np.uint32(2)))
                    shared[np.uint32(base + np.uint32(row * np.uint32(pitch)) + column)] = sums[
                        4 * (i * a_groups + j) + value
                    ]

    @device
    def total(shared, row, unit, values):
        for side in range(sides):
            at = np.uint32(np.uint32(row * np.uint32(pitch)) + np.uint32(unit * np.uint32(UNIT)))
            at = np.uint32(at + np.uint32(side * half_rows))
            for i in range(UNIT):
                values[UNIT * side + i] = np.float32(0)
            for number in range(warps):
                for i in range(UNIT):
                    values[UNIT * side + i] += shared[np.uint32(at + np.uint32(number * plane + i))]

    return SimpleNamespace(park=park, total=total, elements=warps * plane)


_BASE, _FEW, _MANY = ("NT", "bf16", "bf16"), SkinnyTile(1, 1, 8, 8), SkinnyTile(2, 2, 8, 4)
_BIAS = (("bias", "bf16"), ("gelu",), ("residual", "bf16"))


@kernel_factory(
    ((_BASE,), "bf16", (), _FEW, True),
    ((_BASE, _BASE), "bf16", _BIAS, _MANY, True),
    ((("NT", "f16", "f16"),), "f32", (("gate", "silu", True),), SkinnyTile(2, 1, 8, 4), False),
)
def matmul_skinny(segments, out, steps, tile, wide):
    """Parameters: tiles of rows of B in one result, the result's, the segments', the epilogue's; a block a tile and batch."""
    gated = epilogue(steps).gated
    accumulate = _nothing
    for position, (_, kind, _) in enumerate(segments):
        accumulate = _segment(accumulate, position, kind, tile, gated)
    reduction, emit = _reduction(tile, gated), storer(out, steps, wide)
    park, total = reduction.park, reduction.total
    shared_elements, sums_count, last = reduction.elements, 4 * tile.row_groups * tile.a_groups, len(segments) - 1
    sides, threads = 2 if gated else 1, tile.threads
    columns_of_block = tile.rows // sides
    units_of_row, values_count = columns_of_block // UNIT, UNIT * sides

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
        for i in range(sums_count):
            sums[i] = sums[i] * p[last][SCALE]
        park(shared, sums, number, lane)
        warp.block_barrier()
        values = cuda.local.array(values_count, np.float32)
        index = thread
        while index < np.uint32(np.uint32(result[ROWS]) * np.uint32(units_of_row)):
            row = np.uint32(index // np.uint32(units_of_row))
            unit = np.uint32(index % np.uint32(units_of_row))
            column = row0 + np.int64(np.uint32(unit * np.uint32(UNIT)))
            if column < result[COLUMNS]:
                total(shared, row, unit, values)
                emit(values, result, e, np.int64(batch), np.int64(row), column)
            index = np.uint32(index + np.uint32(threads))

    parameters = (
        types.int64,
        result_parameters(out),
        types.Tuple([segment_parameters(segment) for segment in segments]),
        epilogue(steps).parameters,
    )
    return kernel, parameters, {"threads": tile.threads}
