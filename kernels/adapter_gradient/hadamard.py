"""Gradients of LoHa's factors, of which the gradient of the weight is the sum: it never goes to memory.

For a delta (a1 b1) * (a2 b2), a_i [out, rank] and b_i [rank, in], and D = g^T x, the gradient of the weight:

    d_a1 = (D * (a2 b2)) b1^T    d_b1 = a1^T (D * (a2 b2))    and the same with 1 and 2 exchanged.

A block accumulates a tile of D over all rows of g and x on tensor cores (``matmul.pipeline``), multiplies it in
registers with the tile of the other product, which it makes anew, and contracts what that gives with both factors. On
its way through shared memory that is two bf16 parts, what it rounds to and what rounding left. Tiles' contributions are
parts of sums that ``partial_sums`` adds up in order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np

from kernels import bits, memory, warp
from kernels.elements import ELEMENTS
from kernels.matmul.mma_tile import MmaTile, Operand, loader, multiplier, place_of
from kernels.matmul.pipeline import pipeline
from kernels.matmul.problem import tile_of_block
from kernels.target import SIMULATOR, blocks_by_shared, cuda, device, f32p, i64, kernel_factory, types

PANEL = 8
POINTER, STRIDE, FEATURES = range(3)
"""Positions of g's and x's parameters: it, elements from a row to the next, and its columns."""
A, B, A_PARTS, B_PARTS = range(4)
"""Positions of a product's parameters: its factors, and the parts of their gradients."""
SIDE = types.Tuple((ELEMENTS["bf16"].pointer, i64, i64))
PRODUCTS = types.UniTuple(types.Tuple((ELEMENTS["bf16"].pointer,) * 2 + (f32p,) * 2), 2)
"""Types of g's and x's parameters, and of both products'."""
TILE = MmaTile(32, 32, 16, 2, 1, 3) if SIMULATOR else MmaTile(128, 128, 32, 2, 4, 4)
_u32 = np.uint32


@dataclass(frozen=True)
class HadamardTile:
    """Ranks in groups of 16, and what lines of the operands are multiples of: g's and x's, the factors'."""

    steps: int
    g_vector: int
    x_vector: int
    a_vector: int
    b_vector: int
    ragged: bool

    @property
    def ranks(self) -> int:
        """Ranks with those that are filled up by zeros."""
        return 16 * self.steps

    @property
    def factors_at(self) -> int:
        """16-bit elements of shared memory before the factors: the stages, or later both parts of the product."""
        return max(TILE.stages * TILE.stage_elements, 2 * TILE.rows * TILE.columns)

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a block."""
        return 2 * (self.factors_at + 2 * self.ranks * (TILE.rows + TILE.columns))

    def factor_operands(self) -> tuple[Operand, Operand]:
        """A tile of an a, lines of ranks, and of a b, lines of columns."""
        return (
            Operand(TILE.rows, self.ranks, True, self.a_vector, True, False),
            Operand(TILE.columns, self.ranks, False, self.b_vector, True, False),
        )


def _source(tile: HadamardTile) -> SimpleNamespace:
    """The depth of D: rows of g and x. ``q`` is (g, x, rows, first row of D, first column)."""
    a_side = Operand(TILE.rows, TILE.depth, False, tile.g_vector, tile.ragged, False)
    b_side = Operand(TILE.columns, TILE.depth, False, tile.x_vector, tile.ragged, False)
    a_load, b_load = loader(a_side, TILE.threads), loader(b_side, TILE.threads)
    a_begin, a_fetch, b_begin, b_fetch = a_load.begin, a_load.fetch, b_load.begin, b_load.fetch
    depth, b_offset = TILE.depth, TILE.rows * TILE.depth

    @device
    def segments(q):
        return _u32(1)

    @device
    def depth_tiles(q, number):
        return _u32(_u32(q[2] + np.int64(depth - 1)) // _u32(depth))

    @device
    def begin(q, number, a_at, b_at, thread):
        g, x, _, row0, column0 = q
        a_begin(a_at, np.int64(0), g[STRIDE], row0, g[FEATURES], np.int64(0), thread)
        b_begin(b_at, np.int64(0), x[STRIDE], column0, x[FEATURES], np.int64(0), thread)

    @device
    def fetch(q, number, shared, at, a_at, b_at, depth0, thread):
        g, x, rows, row0, column0 = q
        a_fetch(shared, at, g[POINTER], a_at, g[STRIDE], row0, g[FEATURES], depth0, rows, thread)
        b_to = at + np.int64(b_offset)
        b_fetch(shared, b_to, x[POINTER], b_at, x[STRIDE], column0, x[FEATURES], depth0, rows, thread)

    @device
    def factors(q, number):
        return np.float32(1), np.float32(1)

    sides = {"a_words": a_load.words, "b_words": b_load.words, "sides": (a_side, b_side)}
    return SimpleNamespace(
        segments=segments, depth_tiles=depth_tiles, begin=begin, fetch=fetch, factors=factors, several=False, **sides
    )


def factor_stager(tile: HadamardTile) -> Callable:
    """``stage(shared, products, rank, q, thread)``: starts the copies of all factors' tiles, zero beyond the rank."""
    a_side, b_side = tile.factor_operands()
    a_load, b_load = loader(a_side, TILE.threads), loader(b_side, TILE.threads)
    a_begin, a_fetch, b_begin, b_fetch = a_load.begin, a_load.fetch, b_load.begin, b_load.fetch
    a_words, b_words, first = a_load.words, b_load.words, tile.factors_at
    a_elements, elements = TILE.rows * tile.ranks, (TILE.rows + TILE.columns) * tile.ranks

    @device
    def stage(shared, products, rank, q, thread):
        g, x, _, row0, column0 = q
        zero = np.int64(0)
        a_at = cuda.local.array(a_words, np.int64)
        b_at = cuda.local.array(b_words, np.int64)
        a_begin(a_at, zero, rank, row0, g[FEATURES], zero, thread)
        b_begin(b_at, zero, x[FEATURES], column0, x[FEATURES], zero, thread)
        for i in range(2):
            at = np.int64(first + i * elements)
            a_fetch(shared, at, products[i][A], a_at, rank, row0, g[FEATURES], zero, rank, thread)
            at = np.int64(first + i * elements + a_elements)
            b_fetch(shared, at, products[i][B], b_at, x[FEATURES], column0, x[FEATURES], zero, rank, thread)

    return stage


def _parker(tile: HadamardTile) -> Callable:
    """``park(shared, sums, a_at, b_at, lane, number)``: D times a product, in two parts, to shared memory."""

    @device
    def nothing(shared, sums, a_at, b_at, lane, number):
        pass

    park = nothing
    for block in range(TILE.rows_of_warp // 16):
        park = _park_block(tile, block, park)
    return park


def _park_block(tile: HadamardTile, block: int, before: Callable) -> Callable:
    """``before``, and the same of 16 rows of a warp. The number is a constant, as all sums are to stay in registers."""
    a_side, b_side = tile.factor_operands()
    blocks, warp_columns, columns_of_warp = TILE.rows_of_warp // 16, TILE.warp_columns, TILE.columns_of_warp
    rows = MmaTile(TILE.rows, TILE.columns, tile.ranks, TILE.rows // 16, warp_columns, 1)
    made, place = (
        multiplier("bf16", rows, a_side, b_side),
        place_of(Operand(TILE.rows, TILE.columns, True, 8, False, False)),
    )
    groups, count, plane = columns_of_warp // 8, columns_of_warp // 2, TILE.rows * TILE.columns

    @device
    def park(shared, sums, a_at, b_at, lane, number):
        before(shared, sums, a_at, b_at, lane, number)
        other = cuda.local.array(count, np.float32)
        for i in range(count):
            other[i] = np.float32(0)
        warp_row, warp_column = _u32(number // _u32(warp_columns)), _u32(number % _u32(warp_columns))
        block_row = _u32(_u32(warp_row * _u32(blocks)) + _u32(block))
        made(shared, a_at, b_at, other, block_row, warp_column, lane)
        for half in range(2):
            line = _u32(_u32(block_row * _u32(16)) + _u32(_u32(8 * half) + _u32(lane >> _u32(2))))
            for j in range(groups):
                i = 4 * j + 2 * half
                low = sums[block * count + i] * other[i]
                high = sums[block * count + i + 1] * other[i + 1]
                rounded = bits.pack_bf16(low, high)
                left = bits.pack_bf16(low - bits.low_bf16(rounded), high - bits.high_bf16(rounded))
                unit = _u32(_u32(warp_column * _u32(groups)) + _u32(j))
                at = np.int64(_u32(place(line, unit) + _u32(_u32(lane & _u32(3)) << _u32(1))))
                memory.shared_store32(shared, at, rounded)
                memory.shared_store32(shared, at + np.int64(plane), left)

    return park


def _contractor(tile: HadamardTile, of_rows: bool) -> Callable:
    """``contract(shared, factor_at, parts, start, line0, lines, rank, lane, number)``: the tile's part of a gradient.

    Of an a where ``of_rows``: lines are rows of D, contracted over its columns with b; else lines are columns,
    contracted over the rows with a. Parts are [line, rank].
    """
    lines_of_tile, depth = (TILE.rows, TILE.columns) if of_rows else (TILE.columns, TILE.rows)
    warps, ranks, plane = TILE.threads // 32, tile.ranks, TILE.rows * TILE.columns
    product = Operand(lines_of_tile, depth, of_rows, 8, False, False)
    factor = Operand(ranks, depth, of_rows, 8, False, False)
    made = multiplier("bf16", MmaTile(lines_of_tile, ranks, depth, lines_of_tile // 16, 1, 1), product, factor)
    turns, sum_count, groups = lines_of_tile // 16 // warps, ranks // 2, ranks // 8
    assert lines_of_tile % (16 * warps) == 0, (TILE, "every warp takes as many lines")

    @device
    def contract(shared, factor_at, parts, start, line0, lines, rank, lane, number):
        sums = cuda.local.array(sum_count, np.float32)
        g, first = _u32(lane >> _u32(2)), np.int64(_u32(_u32(lane & _u32(3)) << _u32(1)))
        for turn in range(turns):
            for i in range(sum_count):
                sums[i] = np.float32(0)
            block = _u32(_u32(turn * warps) + number)
            for part in range(2):
                made(shared, np.int64(part * plane), factor_at, sums, block, _u32(0), lane)
            for half in range(2):
                line = line0 + np.int64(_u32(_u32(_u32(block * _u32(16)) + _u32(8 * half)) + g))
                at = start + line * rank + first
                if line < lines:
                    for j in range(groups):
                        for i in range(2):
                            if first + np.int64(8 * j + i) < rank:
                                parts[at + np.int64(8 * j + i)] = sums[4 * j + 2 * half + i]

    return contract


def finisher(tile: HadamardTile) -> Callable:
    """``finish(shared, sums, products, rank, q, tile_row, tile_column)``: from a tile of D to all four gradients."""
    park, contract_rows, contract_columns = _parker(tile), _contractor(tile, True), _contractor(tile, False)
    first, a_elements = tile.factors_at, TILE.rows * tile.ranks
    elements = (TILE.rows + TILE.columns) * tile.ranks

    @device
    def finish(shared, sums, products, rank, q, tile_row, tile_column):
        g, x, _, row0, column0 = q
        thread = warp.thread_index()
        for i in range(2):
            thread = bits.again(thread)
            lane, number = _u32(thread & _u32(31)), _u32(thread >> _u32(5))
            other = np.int64(first + (1 - i) * elements)
            own = np.int64(first + i * elements)
            warp.block_barrier()
            park(shared, sums, other, other + np.int64(a_elements), lane, number)
            warp.block_barrier()
            start = np.int64(tile_column) * g[FEATURES] * rank
            contract_rows(
                shared, own + np.int64(a_elements), products[i][A_PARTS], start, row0, g[FEATURES], rank, lane, number
            )
            thread = bits.again(thread)
            lane, number = _u32(thread & _u32(31)), _u32(thread >> _u32(5))
            start = np.int64(tile_row) * x[FEATURES] * rank
            contract_columns(shared, own, products[i][B_PARTS], start, column0, x[FEATURES], rank, lane, number)

    return finish


def launch_bounds(tile: HadamardTile) -> dict:
    """Launch bounds: two blocks on a multiprocessor where registers and shared memory leave room for them."""
    blocks = min(2 if tile.steps == 1 else 1, blocks_by_shared(tile.shared_bytes))
    return {"threads": TILE.threads, "shared_bytes": tile.shared_bytes, "min_blocks": blocks}


@kernel_factory(
    (HadamardTile(1, 8, 8, 8, 8, False),),
    (HadamardTile(1, 8, 8, 8, 8, True),),
    (HadamardTile(2, 8, 8, 1, 8, True),),
    (HadamardTile(4, 8, 8, 8, 8, True),),
)
def hadamard_gradient(tile: HadamardTile):
    """Parameters: g's, x's, rows, both products', rank. A block a tile of D.

    Parts are [tile of D's columns, out, rank] of an a's gradient, [tile of its rows, in, rank] of a b's, in fp32.
    """
    source = _source(tile)
    walk = pipeline(source, multiplier("bf16", TILE, *source.sides), TILE)
    stage, finish, depth_tiles = factor_stager(tile), finisher(tile), source.depth_tiles
    locate = tile_of_block(TILE.rows, TILE.columns, PANEL)
    sum_count, tile_rows, tile_columns = TILE.rows_of_warp * TILE.columns_of_warp // 32, TILE.rows, TILE.columns

    def kernel(g, x, rows, products, rank):
        shared = cuda.shared.array(0, np.uint16, alignment=128)
        sums = cuda.local.array(sum_count, np.float32)
        row, column, _ = locate(warp.block_x(), g[FEATURES], x[FEATURES])
        q = (g, x, rows, np.int64(row) * np.int64(tile_rows), np.int64(column) * np.int64(tile_columns))
        stage(shared, products, rank, q, warp.thread_index())
        walk(shared, sums, q, _u32(0), depth_tiles(q, _u32(0)))
        memory.copy_async_wait_all()
        finish(shared, sums, products, rank, q, row, column)

    return kernel, (SIDE, SIDE, i64, PRODUCTS, i64), launch_bounds(tile)
