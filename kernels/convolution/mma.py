"""Convolutions and their gradients on tensor cores, channels last: implicit products, one segment a filter tap.

A block gathers pixels' channels as lines of its tile straight from the activation, zeros where a tap meets padding;
what is a matrix besides (weight, gradient) is loaded as in a product. The batch of results are groups, for the weight's
gradient taps.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np

from kernels import warp
from kernels.convolution.geometry import GEOMETRY, filter_taps, gather
from kernels.elements import ELEMENTS
from kernels.matmul.epilogue import epilogue
from kernels.matmul.mma import BATCHES, PANEL, PART, finisher, launch_bounds
from kernels.matmul.mma_tile import UNIT, MmaTile, Operand, loader, multiplier, place_of, unit_copier
from kernels.matmul.pipeline import pipeline
from kernels.matmul.problem import COLUMNS, OUT, OUT_BATCH, OUT_STRIDE, ROWS, result_parameters, tile_of_block
from kernels.target import cuda, device, i64, kernel_factory, types

X, X_CHANNELS, DEPTH, W, W_STRIDE, W_TAP, W_GROUP = range(7)
"""Positions of a convolution's operands: the gathered activation, its channels, those of a group that are summed over;
the weight, and its strides of lines, taps and groups."""
G, G_CHANNELS, PIXELS, SOURCE, SOURCE_CHANNELS = range(5)
"""Positions of a weight gradient's: the result's gradient, its channels, its pixels; the activation, its channels."""


@dataclass(frozen=True)
class ConvolutionProblem:
    """The compile-time shape: 16-bit kind, the result's kind, the epilogue, the neighbours that lines of the activation
    and of the matrix are multiples of, and whether results are accessed eight at a time.
    """

    kind: str
    out: str
    steps: tuple
    gathered_vector: int
    matrix_vector: int
    wide: bool


@functools.cache
def _pixel_lines(operand: Operand, threads: int, transposed: bool) -> SimpleNamespace:
    """Like ``loader``, of a tile whose lines are a row's pixel and whose depth are its channels.

    ``begin(at, g, base, channels, row0, rows, tap, thread)``: at is negative where the tap meets nothing;
    ``fetch(shared, shared_at, pointer, at, depth0, depths, thread)``.
    """
    count, even = -(-operand.units // threads), operand.units % threads == 0
    units_of_line, units = operand.units_of_line, operand.units
    place_of_row, source = gather(transposed)
    place, copy_unit = place_of(operand), unit_copier(operand.vector, True)

    @device
    def line_and_unit(i, thread):
        index = np.uint32(thread + np.uint32(i * threads))
        return np.uint32(index // np.uint32(units_of_line)), np.uint32(index % np.uint32(units_of_line))

    @device
    def begin(at, g, base, channels, row0, rows, tap, thread):
        for i in range(count):
            line, unit = line_and_unit(i, thread)
            row = row0 + np.int64(line)
            at[i] = np.int64(-1)
            if row < rows:
                pixel = source(g, place_of_row(g, np.uint32(row)), tap)
                if pixel >= np.int64(0):
                    at[i] = base + pixel * channels + np.int64(np.uint32(unit * np.uint32(UNIT)))

    @device
    def fetch(shared, shared_at, pointer, at, depth0, depths, thread):
        for i in range(count):
            line, unit = line_and_unit(i, thread)
            if even or np.uint32(thread + np.uint32(i * threads)) < np.uint32(units):
                left = depths - depth0 - np.int64(np.uint32(unit * np.uint32(UNIT)))
                inside = at[i] >= np.int64(0) and left > np.int64(0)
                from_ = at[i] + depth0 if inside else np.int64(0)
                to = shared_at + np.int64(place(line, unit))
                copy_unit(shared, to, pointer, from_, left if inside else np.int64(0))

    return SimpleNamespace(begin=begin, fetch=fetch, words=count)


@functools.cache
def _pixel_depths(operand: Operand, threads: int) -> SimpleNamespace:
    """Like ``loader``, of a tile whose depth are output pixels and whose rows are channels of the pixels a tap meets.

    ``fetch(shared, shared_at, g, pointer, base, channels, tap, column0, columns, depth0, depths, thread)``.
    """
    count, even = -(-operand.units // threads), operand.units % threads == 0
    units_of_line, units = operand.units_of_line, operand.units
    place_of_pixel, source = gather(False)
    place, copy_unit = place_of(operand), unit_copier(operand.vector, True)

    @device
    def fetch(shared, shared_at, g, pointer, base, channels, tap, column0, columns, depth0, depths, thread):
        for i in range(count):
            index = np.uint32(thread + np.uint32(i * threads))
            line, unit = np.uint32(index // np.uint32(units_of_line)), np.uint32(index % np.uint32(units_of_line))
            if even or index < np.uint32(units):
                column = column0 + np.int64(np.uint32(unit * np.uint32(UNIT)))
                left, from_, pixel = np.int64(0), np.int64(0), depth0 + np.int64(line)
                if pixel < depths and column < columns:
                    met = source(g, place_of_pixel(g, np.uint32(pixel)), tap)
                    if met >= np.int64(0):
                        from_ = base + met * channels + column
                        left = columns - column
                copy_unit(shared, shared_at + np.int64(place(line, unit)), pointer, from_, left)

    return SimpleNamespace(fetch=fetch)


@device
def _alone(q, number):
    return np.float32(1), np.float32(1)


def _taps_source(problem: ConvolutionProblem, tile: MmaTile, transposed: bool) -> tuple[SimpleNamespace, tuple]:
    """Segments are taps; ``q`` is (geometry, result, operands, first row, first column, group). With both sides."""
    a_side = Operand(tile.rows, tile.depth, True, problem.gathered_vector, True, False)
    b_side = Operand(tile.columns, tile.depth, not transposed, problem.matrix_vector, True, False)
    a_load, b_load = _pixel_lines(a_side, tile.threads, transposed), loader(b_side, tile.threads)
    a_begin, a_fetch, b_begin, b_fetch = a_load.begin, a_load.fetch, b_load.begin, b_load.fetch
    depth, b_offset = tile.depth, tile.rows * tile.depth

    @device
    def segments(q):
        return filter_taps(q[0])

    @device
    def depth_tiles(q, number):
        return np.uint32(np.uint32(q[2][DEPTH] + np.int64(depth - 1)) // np.uint32(depth))

    @device
    def begin(q, number, a_at, b_at, thread):
        g, result, o, row0, column0, group = q
        a_begin(a_at, g, group * o[DEPTH], o[X_CHANNELS], row0, result[ROWS], number, thread)
        base = group * o[W_GROUP] + np.int64(number) * o[W_TAP]
        b_begin(b_at, base, o[W_STRIDE], column0, result[COLUMNS], np.int64(0), thread)

    @device
    def fetch(q, number, shared, at, a_at, b_at, depth0, thread):
        result, o = q[1], q[2]
        a_fetch(shared, at, o[X], a_at, depth0, o[DEPTH], thread)
        b_to = at + np.int64(b_offset)
        b_fetch(shared, b_to, o[W], b_at, o[W_STRIDE], q[4], result[COLUMNS], depth0, o[DEPTH], thread)

    source = SimpleNamespace(
        segments=segments, depth_tiles=depth_tiles, begin=begin, fetch=fetch, factors=_alone, several=True,
        a_words=a_load.words, b_words=b_load.words,
    )  # fmt: skip
    return source, (a_side, b_side)


def _pixels_source(problem: ConvolutionProblem, tile: MmaTile) -> tuple[SimpleNamespace, tuple]:
    """One segment, the output pixels; ``q`` is (geometry, result, operands, first row, first column, the group's first
    channel, tap). With both sides.
    """
    a_side = Operand(tile.rows, tile.depth, False, problem.matrix_vector, True, False)
    b_side = Operand(tile.columns, tile.depth, False, problem.gathered_vector, True, False)
    a_load, b_load = loader(a_side, tile.threads), _pixel_depths(b_side, tile.threads)
    a_begin, a_fetch, b_fetch = a_load.begin, a_load.fetch, b_load.fetch
    depth, b_offset = tile.depth, tile.rows * tile.depth

    @device
    def segments(q):
        return np.uint32(1)

    @device
    def depth_tiles(q, number):
        return np.uint32(np.uint32(q[2][PIXELS] + np.int64(depth - 1)) // np.uint32(depth))

    @device
    def begin(q, number, a_at, b_at, thread):
        result, o = q[1], q[2]
        a_begin(a_at, np.int64(0), o[G_CHANNELS], q[3], result[ROWS], np.int64(0), thread)

    @device
    def fetch(q, number, shared, at, a_at, b_at, depth0, thread):
        g, result, o, row0, column0, base, tap = q
        a_fetch(shared, at, o[G], a_at, o[G_CHANNELS], row0, result[ROWS], depth0, o[PIXELS], thread)
        b_to = at + np.int64(b_offset)
        channels = o[SOURCE_CHANNELS]
        b_fetch(shared, b_to, g, o[SOURCE], base, channels, tap, column0, result[COLUMNS], depth0, o[PIXELS], thread)

    source = SimpleNamespace(
        segments=segments, depth_tiles=depth_tiles, begin=begin, fetch=fetch, factors=_alone, several=False,
        a_words=a_load.words, b_words=1,
    )  # fmt: skip
    return source, (a_side, b_side)


_LARGE, _MIDDLE = MmaTile(128, 128, 32, 2, 4, 4), MmaTile(128, 64, 32, 4, 2, 4)
_SMALL = MmaTile(64, 64, 32, 2, 2, 4)
_BIAS = (("bias", "bf16"), ("silu",), ("residual", "bf16"))


@kernel_factory(
    (False, ConvolutionProblem("bf16", "bf16", (), 8, 8, True), _LARGE),
    (False, ConvolutionProblem("f16", "f32", _BIAS, 4, 2, False), _SMALL),
    (True, ConvolutionProblem("bf16", "bf16", (), 8, 8, True), _MIDDLE),
)
def convolve_mma(transposed, problem, tile):
    """Y[pixel, group, n] = sum over taps and depth of X[source(pixel, tap), group, depth] W; or the input's gradient.

    Parameters: geometry, the result's (rows are pixels, columns channels of a group, the batch groups), the operands',
    the epilogue's; a block a tile and group.
    """
    source, sides = _taps_source(problem, tile, transposed)
    walk = pipeline(source, multiplier(problem.kind, tile, *sides), tile)
    finish = finisher(tile, problem.out, problem.steps, problem.wide, True)
    tile_rows, tile_columns, depth_tiles = tile.rows, tile.columns, source.depth_tiles
    locate, sums_count = tile_of_block(tile_rows, tile_columns, PANEL), tile.rows_of_warp * tile.columns_of_warp // 32

    def kernel(g, result, o, e):
        shared = cuda.shared.array(0, np.uint16, alignment=128)
        tile_row, tile_column, group = locate(warp.block_x(), result[ROWS], result[COLUMNS])
        row0 = np.int64(tile_row) * np.int64(tile_rows)
        column0 = np.int64(tile_column) * np.int64(tile_columns)
        q = (g, result, o, row0, column0, np.int64(group))
        sums = cuda.local.array(sums_count, np.float32)
        walk(shared, sums, q, np.uint32(0), np.uint32(filter_taps(g) * depth_tiles(q, np.uint32(0))))
        finish(shared, sums, result, e, row0, column0, np.int64(group))

    pointer = ELEMENTS[problem.kind].pointer
    operands = types.Tuple((pointer, i64, i64, pointer, i64, i64, i64))
    parameters = (GEOMETRY, result_parameters(problem.out), operands, epilogue(problem.steps).parameters)
    return kernel, parameters, launch_bounds(tile)


@kernel_factory(
    (ConvolutionProblem("bf16", "f32", (), 8, 8, True), _SMALL),
    (ConvolutionProblem("f16", "bf16", (("residual", "bf16"),), 1, 2, False), _SMALL),
)
def weight_gradient_mma(problem, tile):
    """dW[n, tap, depth] = sum over output pixels of G[pixel, n] X[source(pixel, tap), depth of n's group].

    Parameters: work (taps, tiles of pixels that a block takes), groups, geometry, the result's (rows are a group's n,
    columns its depth, the batch taps, or parts and taps), the operands', the epilogue's. Blocks are tiles, then taps,
    groups, parts of the sum.
    """
    source, sides = _pixels_source(problem, tile)
    walk = pipeline(source, multiplier(problem.kind, tile, *sides), tile)
    finish = finisher(tile, problem.out, problem.steps, problem.wide, True)
    tile_rows, tile_columns, depth_tiles = tile.rows, tile.columns, source.depth_tiles
    locate, sums_count = tile_of_block(tile_rows, tile_columns, PANEL), tile.rows_of_warp * tile.columns_of_warp // 32

    def kernel(work, groups, g, result, o, e):
        shared = cuda.shared.array(0, np.uint16, alignment=128)
        tile_row, tile_column, rest = locate(warp.block_x(), result[ROWS], result[COLUMNS])
        taps = np.uint32(work[BATCHES])
        tap = np.uint32(rest % taps)
        parts_and_groups = np.uint32(rest // taps)
        group = np.uint32(parts_and_groups % np.uint32(groups))
        part = np.uint32(parts_and_groups // np.uint32(groups))
        first_row = np.int64(group) * result[ROWS]
        rows = (result[OUT], first_row + result[ROWS], result[COLUMNS], result[OUT_STRIDE], result[OUT_BATCH])
        row0 = first_row + np.int64(tile_row) * np.int64(tile_rows)
        column0 = np.int64(tile_column) * np.int64(tile_columns)
        q = (g, rows, o, row0, column0, np.int64(group) * result[COLUMNS], tap)
        total = depth_tiles(q, np.uint32(0))
        first = np.uint32(min(np.uint32(part * np.uint32(work[PART])), total))
        count = np.uint32(min(np.uint32(work[PART]), np.uint32(total - first)))
        sums = cuda.local.array(sums_count, np.float32)
        walk(shared, sums, q, first, count)
        finish(shared, sums, rows, e, row0, column0, np.int64(np.uint32(np.uint32(part * taps) + tap)))

    pointer = ELEMENTS[problem.kind].pointer
    operands = types.Tuple((pointer, i64, i64, pointer, i64))
    work, result = types.Tuple((i64, i64)), result_parameters(problem.out)
    parameters = (work, i64, GEOMETRY, result, operands, epilogue(problem.steps).parameters)
    return kernel, parameters, launch_bounds(tile)
