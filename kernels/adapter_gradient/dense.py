"""Gradients of LoHa's factors from the gradient of the weight, D, where another kernel has made it.

By the tiles of ``hadamard`` on tensor cores, or an element a thread for any kinds and extents.
"""

from __future__ import annotations

import numpy as np

from kernels import bits, memory, warp
from kernels.adapter_gradient.hadamard import (
    FEATURES,
    PANEL,
    PRODUCTS,
    SIDE,
    TILE,
    HadamardTile,
    factor_stager,
    finisher,
    launch_bounds,
)
from kernels.elements import ELEMENTS
from kernels.matmul.problem import tile_of_block
from kernels.target import SIMULATOR, cuda, device, f32, f32p, i64, kernel_factory, types

THREADS = 32 if SIMULATOR else 128
A, B, OTHER_A, OTHER_B = range(4)
"""Positions of the portable kernel's factors: those of the product itself, and of the other one."""
_u32 = np.uint32


@kernel_factory((HadamardTile(1, 8, 8, 8, 8, True),), (HadamardTile(4, 8, 8, 8, 8, True),))
def contract_hadamard(tile: HadamardTile):
    """Parameters: D [out, in] in fp32 with even in, then as of ``hadamard_gradient``, whose pointers to g and x are not
    used.
    """
    stage, finish = factor_stager(tile), finisher(tile)
    locate = tile_of_block(TILE.rows, TILE.columns, PANEL)
    tile_rows, tile_columns, warp_columns = TILE.rows, TILE.columns, TILE.warp_columns
    rows_of_warp, columns_of_warp = TILE.rows_of_warp, TILE.columns_of_warp
    blocks, groups, sum_count = rows_of_warp // 16, columns_of_warp // 8, rows_of_warp * columns_of_warp // 32

    @device
    def load(sums, d, q, thread):
        g, x, _, row0, column0 = q
        lane, number = _u32(thread & _u32(31)), _u32(thread >> _u32(5))
        row = _u32(_u32(_u32(number // _u32(warp_columns)) * _u32(rows_of_warp)) + _u32(lane >> _u32(2)))
        column = _u32(
            _u32(_u32(number % _u32(warp_columns)) * _u32(columns_of_warp)) + _u32((lane & _u32(3)) << _u32(1))
        )
        for block in range(blocks):
            for half in range(2):
                to = row0 + np.int64(_u32(row + _u32(16 * block + 8 * half)))
                for j in range(groups):
                    across = column0 + np.int64(_u32(column + _u32(8 * j)))
                    i = 4 * (block * groups + j) + 2 * half
                    sums[i], sums[i + 1] = np.float32(0), np.float32(0)
                    if to < g[FEATURES] and across < x[FEATURES]:
                        low, high = memory.load64(d, to * x[FEATURES] + across)
                        sums[i], sums[i + 1] = bits.bits_f32(low), bits.bits_f32(high)

    def kernel(d, g, x, rows, products, rank):
        shared = cuda.shared.array(0, np.uint16, alignment=128)
        sums = cuda.local.array(sum_count, np.float32)
        row, column, _ = locate(warp.block_x(), g[FEATURES], x[FEATURES])
        q = (g, x, rows, np.int64(row) * np.int64(tile_rows), np.int64(column) * np.int64(tile_columns))
        thread = warp.thread_index()
        stage(shared, products, rank, q, thread)
        load(sums, d, q, thread)
        memory.copy_async_wait_all()
        finish(shared, sums, products, rank, q, row, column)

    return kernel, (f32p, SIDE, SIDE, i64, PRODUCTS, i64), launch_bounds(tile)


@kernel_factory(("f32", "bf16", True), ("bf16", "f32", False))
def hadamard_portable(out: str, kind: str, of_rows: bool):
    """One gradient, an element a thread: of an a, [out, rank], where ``of_rows``, else of a b, [rank, in].

    Parameters: the result, D in fp32, a tuple of the factors, out, in, rank, scale.
    """
    store, load = ELEMENTS[out].store, ELEMENTS[kind].load

    @device
    def term(d, factors, row, column, k, columns, rank):
        """D times the other product at one element, times the factor that it is contracted with."""
        other = np.float32(0)
        for i in range(rank):
            at = np.int64(i)
            other += load(factors[OTHER_A], row * rank + at) * load(factors[OTHER_B], at * columns + column)
        own = load(factors[B], k * columns + column) if of_rows else load(factors[A], row * rank + k)
        return d[row * columns + column] * other * own

    def kernel(result, d, factors, rows, columns, rank, scale):
        index = _u32(_u32(_u32(warp.block_x()) * _u32(THREADS)) + warp.thread_index())
        width = rank if of_rows else columns
        line = np.int64(_u32(index // _u32(width)))
        place = np.int64(index) - line * width
        if line < (rows if of_rows else rank):
            value = np.float32(0)
            for i in range(columns if of_rows else rows):
                row, column = (line, np.int64(i)) if of_rows else (np.int64(i), place)
                value += term(d, factors, row, column, place if of_rows else line, columns, rank)
            store(result, np.int64(index), scale * value)

    pointer = ELEMENTS[kind].pointer
    parameters = (ELEMENTS[out].pointer, f32p, types.UniTuple(pointer, 4), i64, i64, i64, f32)
    return kernel, parameters, {"threads": THREADS}
