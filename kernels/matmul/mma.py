"""Products on tensor cores of sm_80 and later: cp.async stages, ldmatrix, mma.sync m16n8k16, fp32 sums.

A block walks over the depths of all segments as over one, so that copies of a segment are under way while the previous
one is multiplied. Sums pass through shared memory to eight neighbouring columns a lane, where the epilogue and 16-byte
stores take them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np

from kernels import bits, memory, warp
from kernels.matmul.epilogue import epilogue
from kernels.matmul.mma_tile import MmaTile, Operand, loader, multiplier
from kernels.matmul.pipeline import pipeline
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
    tile_of_block,
)
from kernels.matmul.store import storer
from kernels.parameters import flat_length, table_reader
from kernels.target import blocks_by_shared, cuda, device, i32p, i64, i64p, kernel_factory, types

PANEL = 8
BATCHES, PART = 0, 1
"""Positions of the work's parameters: results of the batch, and tiles of depth that a block takes."""


@dataclass(frozen=True)
class Problem:
    """The compile-time shape: all segments' layout and kind, how many there are, the result's kind, the epilogue.

    ``a_vector``, ``b_vector``: elements that lines of the operands are multiples of. ``wide``: results and what the
    epilogue reads may be accessed eight at a time. ``ragged``: tiles may reach over an edge.
    """

    layout: str
    kind: str
    segments: int
    out: str
    steps: tuple
    a_vector: int
    b_vector: int
    wide: bool
    ragged: bool

    @property
    def gated(self) -> bool:
        """Whether the epilogue halves the columns."""
        return epilogue(self.steps).gated

    def operands(self, tile: MmaTile) -> tuple[Operand, Operand]:
        """Both sides of a tile."""
        return (
            Operand(tile.rows, tile.depth, self.layout[0] == "N", self.a_vector, self.ragged, False),
            Operand(tile.columns, tile.depth, self.layout[1] == "T", self.b_vector, self.ragged, self.gated),
        )


def _picker(segments: int) -> Callable:
    """``pick(p, number)``: the segment of that number."""

    @device
    def first(p, number):
        return p[0]

    pick = first
    for position in range(1, segments):
        pick = _or_segment(pick, position)
    return pick


def _or_segment(rest: Callable, position: int) -> Callable:
    @device
    def pick(p, number):
        if number == np.uint32(position):
            return p[position]
        return rest(p, number)

    return pick


def _source(problem: Problem, tile: MmaTile) -> SimpleNamespace:
    """Segments by their parameters; ``q`` is (result, segments, first row, first column, batch)."""
    a_side, b_side = problem.operands(tile)
    a_load, b_load = loader(a_side, tile.threads), loader(b_side, tile.threads)
    a_begin, a_fetch, b_begin, b_fetch = a_load.begin, a_load.fetch, b_load.begin, b_load.fetch
    pick, count, depth, b_offset = _picker(problem.segments), problem.segments, tile.depth, tile.rows * tile.depth

    @device
    def segments(q):
        return np.uint32(count)

    @device
    def depth_tiles(q, number):
        return np.uint32(np.uint32(pick(q[1], number)[K] + np.int64(depth - 1)) // np.uint32(depth))

    @device
    def begin(q, number, a_at, b_at, thread):
        result, p, row0, column0, batch = q
        s = pick(p, number)
        a_begin(a_at, batch * s[A_BATCH], s[A_STRIDE], row0, result[ROWS], np.int64(0), thread)
        b_begin(b_at, batch * s[B_BATCH], s[B_STRIDE], column0, result[COLUMNS], result[COLUMNS], thread)

    @device
    def fetch(q, number, shared, at, a_at, b_at, depth0, thread):
        result, p, row0, column0, _ = q
        s = pick(p, number)
        a_fetch(shared, at, s[A], a_at, s[A_STRIDE], row0, result[ROWS], depth0, s[K], thread)
        b_to = at + np.int64(b_offset)
        b_fetch(shared, b_to, s[B], b_at, s[B_STRIDE], column0, result[COLUMNS], depth0, s[K], thread)

    @device
    def factors(q, number):
        s = pick(q[1], number)
        return s[RATIO], s[SCALE]

    return SimpleNamespace(
        segments=segments, depth_tiles=depth_tiles, begin=begin, fetch=fetch, factors=factors, several=count > 1,
        a_words=a_load.words, b_words=b_load.words,
    )  # fmt: skip


@functools.cache
def finisher(tile: MmaTile, out: str, steps: tuple, wide: bool, ragged: bool) -> Callable:
    """``finish(shared, sums, result, e, row0, column0, batch)``: a block's sums through the epilogue to memory.

    Sixteen rows at a time pass through each warp's own part of shared memory.
    """
    emit, gated = storer(out, steps, wide), epilogue(steps).gated
    columns_of_warp, rows_of_warp, warp_columns = tile.columns_of_warp, tile.rows_of_warp, tile.warp_columns
    result_columns = columns_of_warp // 2 if gated else columns_of_warp
    pitch, blocks = columns_of_warp + 4, columns_of_warp // 8
    units = 16 * blocks // (2 if gated else 1)
    units_of_row, sides = units // 16, 2 if gated else 1
    row_blocks = rows_of_warp // 16
    warp_elements, values_count = 2 * 16 * pitch, 8 * sides

    @device
    def park(shared, base, sums, block, lane):
        for j in range(blocks):
            at = 4 * (block * blocks + j)
            for half in range(2):
                row = np.uint32(np.uint32(lane >> np.uint32(2)) + np.uint32(8 * half))
                column = np.uint32(np.uint32(8 * j) + np.uint32((lane & np.uint32(3)) * np.uint32(2)))
                index = np.uint32(np.uint32(np.uint32(row * np.uint32(pitch)) + column) * np.uint32(2))
                low, high = bits.f32_bits(sums[at + 2 * half]), bits.f32_bits(sums[at + 2 * half + 1])
                memory.shared_store64(shared, base + np.int64(index), low, high)

    @device
    def unpark(shared, base, row, unit, values):
        index = np.uint32(
            np.uint32(np.uint32(row * np.uint32(pitch)) + np.uint32(unit * np.uint32(8 * sides))) * np.uint32(2)
        )
        for i in range(2 * sides):
            a, b, c, d = memory.shared_load128(shared, base + np.int64(index) + np.int64(8 * i))
            values[4 * i] = bits.bits_f32(a)
            values[4 * i + 1] = bits.bits_f32(b)
            values[4 * i + 2] = bits.bits_f32(c)
            values[4 * i + 3] = bits.bits_f32(d)

    @device
    def finish(shared, sums, result, e, row0, column0, batch):
        memory.copy_async_wait_all()
        warp.block_barrier()
        thread = warp.thread_index()
        number, lane = np.uint32(thread >> np.uint32(5)), np.uint32(thread & np.uint32(31))
        warp_row, warp_column = (
            np.uint32(number // np.uint32(warp_columns)),
            np.uint32(number % np.uint32(warp_columns)),
        )
        row0 += np.int64(np.uint32(warp_row * np.uint32(rows_of_warp)))
        column0 += np.int64(np.uint32(warp_column * np.uint32(result_columns)))
        base = np.int64(np.uint32(number * np.uint32(warp_elements)))
        values = cuda.local.array(values_count, np.float32)
        for block in range(row_blocks):
            park(shared, base, sums, block, lane)
            warp.sync_warp()
            for turn in range(-(-units // 32)):
                index = np.uint32(lane + np.uint32(32 * turn))
                row_in_block = np.uint32(index // np.uint32(units_of_row))
                unit = np.uint32(index % np.uint32(units_of_row))
                row = row0 + np.int64(np.uint32(row_in_block + np.uint32(16 * block)))
                column = column0 + np.int64(np.uint32(unit * np.uint32(8)))
                inside = not ragged or (row < result[ROWS] and column < result[COLUMNS])
                if index < np.uint32(units) and inside:
                    unpark(shared, base, row_in_block, unit, values)
                    emit(values, result, e, batch, row, column)
            warp.sync_warp()

    return finish


def _body(problem: Problem, tile: MmaTile) -> Callable:
    """``body(block, work, result, p, e)``: a tile of a result, or a part of its sum."""
    source = _source(problem, tile)
    a_side, b_side = problem.operands(tile)
    walk = pipeline(source, multiplier(problem.kind, tile, a_side, b_side), tile)
    finish = finisher(tile, problem.out, problem.steps, problem.wide, problem.ragged)
    tile_rows, tile_columns = tile.rows, tile.columns // 2 if problem.gated else tile.columns
    locate, segments, depth_tiles = tile_of_block(tile_rows, tile_columns, PANEL), problem.segments, source.depth_tiles
    sums_count = tile.rows_of_warp * tile.columns_of_warp // 32

    @device
    def body(block, work, result, p, e):
        shared = cuda.shared.array(0, np.uint16, alignment=128)
        tile_row, tile_column, rest = locate(block, result[ROWS], result[COLUMNS])
        part = np.uint32(rest // np.uint32(work[BATCHES]))
        batch = np.int64(np.uint32(rest - np.uint32(part * np.uint32(work[BATCHES]))))
        row0 = np.int64(tile_row) * np.int64(tile_rows)
        column0 = np.int64(tile_column) * np.int64(tile_columns)
        q = (result, p, row0, column0, batch)
        total = np.uint32(0)
        for number in range(segments):
            total = np.uint32(total + depth_tiles(q, np.uint32(number)))
        first = np.uint32(min(np.uint32(part * np.uint32(work[PART])), total))
        count = np.uint32(min(np.uint32(work[PART]), np.uint32(total - first)))
        sums = cuda.local.array(sums_count, np.float32)
        walk(shared, sums, q, first, count)
        finish(shared, sums, result, e, row0, column0, np.int64(rest))

    return body


def _parameters(problem: Problem) -> tuple:
    segment = segment_parameters((problem.layout, problem.kind, problem.kind))
    return (
        types.Tuple((i64, i64)),
        result_parameters(problem.out),
        types.Tuple([segment] * problem.segments),
        epilogue(problem.steps).parameters,
    )


def launch_bounds(tile: MmaTile) -> dict:
    """Launch bounds: as many blocks as sums, fragments and addresses leave registers for."""
    sums = tile.rows_of_warp * tile.columns_of_warp // 32
    warps_on_multiprocessor = 32 if sums <= 32 else 16 if sums <= 64 else 8
    by_registers = max(1, warps_on_multiprocessor * 32 // tile.threads)
    return {
        "threads": tile.threads,
        "min_blocks": min(by_registers, blocks_by_shared(tile.shared_bytes)),
        "shared_bytes": tile.shared_bytes,
    }


_LARGE, _SMALL = MmaTile(128, 128, 32, 2, 4, 4), MmaTile(64, 64, 32, 2, 2, 4)
_MIDDLE = MmaTile(128, 64, 32, 4, 2, 4)
_BASE = Problem("NT", "bf16", 1, "bf16", (), 8, 8, True, False)
_BIAS = (("bias", "bf16"), ("gelu",), ("residual", "bf16"))
_EXAMPLES = (
    (_BASE, _LARGE),
    (Problem("NT", "bf16", 3, "bf16", _BIAS, 8, 8, True, True), _LARGE),
    (Problem("NT", "bf16", 1, "bf16", (("gate", "silu", True),), 8, 8, True, True), _LARGE),
    (Problem("NN", "bf16", 1, "bf16", (), 8, 8, True, True), _MIDDLE),
    (Problem("TN", "f16", 1, "f32", (), 8, 8, True, True), _SMALL),
    (Problem("TT", "bf16", 2, "f32", _BIAS, 2, 1, False, True), _SMALL),
)


@kernel_factory(*_EXAMPLES)
def matmul_mma(problem, tile):
    """One problem. Parameters: the work (batches, tiles of depth a block takes), the result's, the segments', the
    epilogue's; a block a tile of a result, or of each part of its sum, which are then results of their own.
    """
    body = _body(problem, tile)

    def kernel(work, result, p, e):
        body(warp.block_x(), work, result, p, e)

    return kernel, _parameters(problem), launch_bounds(tile)


@kernel_factory((_BASE, _LARGE))
def matmul_mma_grouped(problem, tile):
    """Many problems in one launch.

    Parameters: a table with a row of the single kernel's parameters for each problem, and two words a block: the
    problem and the block's number in its own launch.
    """
    body = _body(problem, tile)
    parameters = types.Tuple(_parameters(problem))
    read, width = table_reader(parameters), flat_length(parameters)

    def kernel(table, blocks):
        at = np.int64(2) * warp.block_x()
        q = read(table, np.int64(blocks[at]) * np.int64(width))
        body(np.int64(blocks[at + np.int64(1)]), q[0], q[1], q[2], q[3])

    return kernel, (i64p, i32p), launch_bounds(tile)
