"""Products by fp32 FMA, tiled through shared memory: any kinds, layouts and extents, any GPU and the simulator."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from kernels import warp
from kernels.elements import ELEMENTS
from kernels.matmul.epilogue import epilogue
from kernels.matmul.problem import (
    A_BATCH,
    A_STRIDE,
    B_BATCH,
    B_STRIDE,
    COLUMNS,
    OUT,
    OUT_BATCH,
    OUT_STRIDE,
    ROWS,
    SCALE,
    A,
    B,
    K,
    result_parameters,
    segment_parameters,
    tile_of_block,
)
from kernels.parameters import flat_length, table_reader
from kernels.target import cuda, device, i32p, i64p, kernel_factory, types

PANEL = 8


@dataclass(frozen=True)
class Tile:
    """Rows and columns of a block's tile, the depth of one step, and rows and columns of a thread."""

    rows: int
    columns: int
    depth: int
    thread_rows: int
    thread_columns: int

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return (self.rows // self.thread_rows) * (self.columns // self.thread_columns)


@functools.cache
def _load_operand(kind: str, depth_first: bool, extent: int, tile: Tile) -> Callable:
    """``load(shared, pointer, at, stride, first, jump, count, k0, k, thread)``: a tile of one operand as fp32.

    Shared memory holds it depth by depth. Rows of the tile from ``extent / 2`` on are ``jump`` rows further in memory;
    ``count`` says how many of either half there are.
    """
    element_load, depth, threads, half = ELEMENTS[kind].load, tile.depth, tile.threads, extent // 2
    pitch = extent + 1

    @device
    def load(shared, pointer, at, stride, first, jump, count, k0, k, thread):
        for i in range(thread, np.uint32(extent * depth), np.uint32(threads)):
            if depth_first:
                row, inner = np.uint32(i // np.uint32(depth)), np.uint32(i % np.uint32(depth))
            else:
                inner, row = np.uint32(i // np.uint32(extent)), np.uint32(i % np.uint32(extent))
            split = jump > np.int64(0) and row >= np.uint32(half)
            line = first + np.int64(np.uint32(row - np.uint32(half)) if split else row)
            source_k = k0 + np.int64(inner)
            value = np.float32(0)
            if line < count and source_k < k:
                if split:
                    line += jump
                value = element_load(
                    pointer, at + (line * stride + source_k if depth_first else source_k * stride + line)
                )
            shared[np.uint32(np.uint32(inner * np.uint32(pitch)) + row)] = value

    return load


def _accumulate(rest: Callable, segment: tuple, position: int, tile: Tile, gated: bool) -> Callable:
    """``rest``, then one segment's products added to the thread's sums, times its scale."""
    layout, a_kind, b_kind = segment
    load_a = _load_operand(a_kind, layout[0] == "N", tile.rows, tile)
    load_b = _load_operand(b_kind, layout[1] == "T", tile.columns, tile)
    depth, rows, columns = tile.depth, tile.thread_rows, tile.thread_columns
    row_step, column_step = tile.rows // rows, tile.columns // columns
    a_pitch, b_pitch, count = tile.rows + 1, tile.columns + 1, rows * columns

    @device
    def accumulate(sums, shared_a, shared_b, row0, column0, batch, result, p, thread):
        rest(sums, shared_a, shared_b, row0, column0, batch, result, p, thread)
        s = p[position]
        y, x = np.uint32(thread // np.uint32(column_step)), np.uint32(thread % np.uint32(column_step))
        jump = result[COLUMNS] if gated else np.int64(0)
        own = cuda.local.array(count, np.float32)
        for i in range(count):
            own[i] = np.float32(0)
        k0 = np.int64(0)
        while k0 < s[K]:
            warp.block_barrier()
            load_a(shared_a, s[A], batch * s[A_BATCH], s[A_STRIDE], row0, np.int64(0), result[ROWS], k0, s[K], thread)
            load_b(shared_b, s[B], batch * s[B_BATCH], s[B_STRIDE], column0, jump, result[COLUMNS], k0, s[K], thread)
            warp.block_barrier()
            for inner in range(depth):
                for i in range(rows):
                    a = shared_a[np.uint32(np.uint32(inner * a_pitch + i * row_step) + y)]
                    for j in range(columns):
                        b = shared_b[np.uint32(np.uint32(inner * b_pitch + j * column_step) + x)]
                        own[i * columns + j] += a * b
            k0 += np.int64(depth)
        for i in range(count):
            sums[i] += s[SCALE] * own[i]

    return accumulate


@device
def _nothing(sums, shared_a, shared_b, row0, column0, batch, result, p, thread):
    pass


def _body(segments: tuple, out: str, steps: tuple, tile: Tile) -> Callable:
    """``body(block, result, p, e)``: the block's tile."""
    finish, store = epilogue(steps), ELEMENTS[out].store
    one, gated = finish.one, finish.gated
    accumulate = _nothing
    for position, segment in enumerate(segments):
        accumulate = _accumulate(accumulate, segment, position, tile, gated)
    rows, columns = tile.thread_rows, tile.thread_columns
    row_step, column_step = tile.rows // rows, tile.columns // columns
    result_columns = columns // 2 if gated else columns
    tile_rows, tile_columns = tile.rows, tile.columns // 2 if gated else tile.columns
    locate = tile_of_block(tile_rows, tile_columns, PANEL)
    a_elements, b_elements, count = (tile.rows + 1) * tile.depth, (tile.columns + 1) * tile.depth, rows * columns

    @device
    def body(block, result, p, e):
        shared_a = cuda.shared.array(a_elements, np.float32)
        shared_b = cuda.shared.array(b_elements, np.float32)
        thread = warp.thread_index()
        tile_row, tile_column, rest = locate(block, result[ROWS], result[COLUMNS])
        batch = np.int64(rest)
        row0 = np.int64(tile_row) * np.int64(tile_rows)
        column0 = np.int64(tile_column) * np.int64(tile_columns)
        sums = cuda.local.array(count, np.float32)
        for i in range(count):
            sums[i] = np.float32(0)
        accumulate(sums, shared_a, shared_b, row0, column0, batch, result, p, thread)
        y, x = np.uint32(thread // np.uint32(column_step)), np.uint32(thread % np.uint32(column_step))
        for i in range(rows):
            row = row0 + np.int64(np.uint32(i * row_step) + y)
            for j in range(result_columns):
                column = column0 + np.int64(np.uint32(j * column_step) + x)
                if row < result[ROWS] and column < result[COLUMNS]:
                    value = sums[i * columns + j]
                    if gated:
                        second = sums[i * columns + j + result_columns]
                        value = one(value, second, batch, row, column, result[COLUMNS], e)
                    else:
                        value = one(value, batch, row, column, e)
                    store(result[OUT], batch * result[OUT_BATCH] + row * result[OUT_STRIDE] + column, value)

    return body


def _parameters(segments: tuple, out: str, steps: tuple) -> tuple:
    return (
        result_parameters(out),
        types.Tuple([segment_parameters(segment) for segment in segments]),
        epilogue(steps).parameters,
    )


_NT, _TILE = ("NT", "bf16", "bf16"), Tile(64, 64, 16, 4, 4)
_EVERY_STEP = (
    ("scale_row", "f32"), ("scale_column", "f16"), ("bias", "bf16"), ("gate", "gelu", True), ("gelu_tanh",),
    ("residual", "f32"), ("relu",), ("silu",),
)  # fmt: skip


@kernel_factory(
    ((_NT,), "bf16", (), _TILE), ((_NT, ("TN", "f32", "f16"), ("NN", "f16", "bf16")), "f32", _EVERY_STEP, _TILE)
)
def matmul_portable(segments, out, steps, tile):
    """One problem. Parameters: the result's, the segments', the epilogue's; one block a tile and batch."""
    body = _body(segments, out, steps, tile)

    def kernel(result, p, e):
        body(warp.block_x(), result, p, e)

    return kernel, _parameters(segments, out, steps), {"threads": tile.threads}


@kernel_factory(((_NT,), "bf16", (), _TILE))
def matmul_portable_grouped(segments, out, steps, tile):
    """Many problems in one launch.

    Parameters: a table with a row of the single kernel's parameters for each problem, and two words a block: the
    problem and the block's number in its own launch.
    """
    body = _body(segments, out, steps, tile)
    parameters = types.Tuple(_parameters(segments, out, steps))
    read, width = table_reader(parameters), flat_length(parameters)

    def kernel(table, blocks):
        at = np.int64(2) * warp.block_x()
        q = read(table, np.int64(blocks[at]) * np.int64(width))
        body(np.int64(blocks[at + np.int64(1)]), q[0], q[1], q[2])

    return kernel, (i64p, i32p), {"threads": tile.threads}
