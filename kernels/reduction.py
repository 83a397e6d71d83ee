"""Reductions of an expression over the middle axis of [outer, n, inner], in two forms; fp32, always in one order.

*along*: inner is 1, a team of threads walks along a row. *across*: threads stand on neighbouring columns and walk down,
the warps of a block on different rows. Either splits the axis over blocks where there are few results; the parts are
then reduced by a second launch. The expression sees its operands' elements, the position on the axis, operands by
(outer, n) alone, and 1 / n.
"""

from __future__ import annotations

import numpy as np

from kernels import warp
from kernels.barrier import early_options, entrance
from kernels.elements import ELEMENTS
from kernels.expression import Program, column, evaluator, gather, written
from kernels.hardware import WARP
from kernels.rows import POINTERS, ROW_LOADS, Held, Operands, Shape, block_of, holder, stage
from kernels.target import SIMULATOR, cuda, device, f32, i64, kernel_factory, types
from kernels.teams import COMBINE

THREADS = 32 if SIMULATOR else 256
"""Threads of a block of the form *across*."""
BLOCKS_ALONG, BLOCKS_ACROSS = (6, 6) if SIMULATOR else (1056, 528)
"""Blocks below which an axis is split: as many as an H200 has room for at once, so that none comes late."""
_UNROLL = 4
"""Rows whose loads are issued together."""

_VALUE = (3, (), (0,))
_SQUARE = (4, (("sub", 0, 1), ("square", 4)), (5,))


@kernel_factory(
    ("sum", _VALUE, ("bf16",), "f32", Shape(256, 8, 0)),
    ("max", _VALUE, ("f32",), "bf16", Shape(8, 1, 0)),
    ("sum", _SQUARE, ("bf16", "f32"), "f32", Shape(32, 8, 0)),
)
def along(operation, program, kinds, out, shape, early=False):
    """out[row, part] = scale * reduction of program over one part of a row of [rows, n].

    Parameters: matrices, out, 1 / n, scale, rows, n, elements of a part (a multiple of the access), parts; the
    grid's second axis.
    """
    own = Held(Operands(kinds, (), (), (), ()), (), shape)
    reduce_row = stage(((operation, program),), own)
    store, team, words = ELEMENTS[out].store, shape.team, own.words
    threads, _ = block_of(team)
    width, enter = shape.width, entrance(early, any_size=True)

    def kernel(sources, target, inverse, scale, rows, n, part, parts):
        shared = cuda.shared.array(WARP, np.float32)
        held = cuda.local.array(words, np.uint32)
        enter()
        thread = np.int64(warp.thread_index())
        row = warp.block_x() * np.int64(threads // team) + thread // np.int64(team)
        split = warp.block_y()
        if row < rows or team < WARP:
            start = split * part
            stop = min(n, start + part)
            lane = thread % np.int64(team)
            first = np.int64(np.uint32(start) // np.uint32(width)) + lane
            (value,) = reduce_row(
                sources, (), (), min(row, rows - np.int64(1)) * n, first, stop, held, shared, (inverse,)
            )
            if lane == np.int64(0) and row < rows:
                store(target, row * parts + split, value * scale)

    sources = types.Tuple([ELEMENTS[kind].pointer for kind in kinds])
    return (
        kernel,
        (sources, ELEMENTS[out].pointer, f32, f32, i64, i64, i64, i64),
        {"threads": threads} | early_options(early),
    )


def _down(operation: str, program: Program, kinds: tuple[str, ...], lines: tuple[str, ...], width: int, warps: int):
    """A device function: a thread's columns, reduced over every ``warps``-th row of a part, in ``sums``."""
    hold, unhold, words = holder(kinds, width)
    line_values = gather(tuple(ROW_LOADS[kind] for kind in lines))
    at_line = written("at_line", "row", [f"return ({'row, ' * len(lines)})"], {})
    evaluate, (combine, start) = evaluator(program), COMBINE[operation]
    element_of, count = column(len(kinds), width), width * len(kinds)
    held_count = words * _UNROLL

    @device
    def down(sources, line_operands, base, inner, first, stop, inverse, line, sums):
        held = cuda.local.array(held_count, np.uint32)
        values = cuda.local.array(count, np.float32)
        for j in range(width):
            sums[j] = start
        for row in range(first, stop, np.int64(warps * _UNROLL)):
            for u in range(_UNROLL):
                at = row + np.int64(u * warps)
                if at < stop:
                    hold(sources, base + at * inner, held, u * words)
            for u in range(_UNROLL):
                at = row + np.int64(u * warps)
                if at < stop:
                    unhold(held, u * words, values, 0)
                    known = (np.float32(at), *line_values(line_operands, at_line(line + at)), inverse)
                    for j in range(width):
                        (found,) = evaluate(element_of(values, j, known))
                        sums[j] = combine(sums[j], found)

    return down


@kernel_factory(
    ("sum", _VALUE, ("bf16",), (), "f32", 8),
    ("max", _VALUE, ("f32",), (), "f32", 1),
    ("sum", (5, (("sub", 1, 3), ("mul", 5, 0)), (6,)), ("bf16", "bf16"), ("f32",), "f32", 8),
)
def across(operation, program, kinds, lines, out, width, early=False):
    """out[part, outer, column] = scale * reduction of program over one part of the middle axis.

    Parameters: tensors, operands by (outer, n), out, 1 / n, scale, outer, n, inner, rows of a part. The grid: tiles of
    columns times outer, then parts.
    """
    warps = THREADS // WARP
    tile = WARP * width
    down = _down(operation, program, kinds, lines, width, warps)
    combine, start = COMBINE[operation]
    store, cells, enter = ELEMENTS[out].store, tile * warps, entrance(early, any_size=True)

    def kernel(sources, line_operands, target, inverse, scale, outer, n, inner, part):
        parts = cuda.shared.array(cells, np.float32)
        sums = cuda.local.array(width, np.float32)
        enter()
        thread = np.int64(warp.thread_index())
        lane, own = thread % np.int64(WARP), thread // np.int64(WARP)
        tiles = np.uint32(inner + np.int64(tile - 1)) // np.uint32(tile)
        block = np.uint32(warp.block_x())
        slab = np.int64(block // tiles)
        column0 = np.int64(block - np.uint32(slab) * tiles) * np.int64(tile)
        first = warp.block_y() * part
        stop = min(n, first + part)
        mine = column0 + lane * np.int64(width)
        for j in range(width):
            sums[j] = start
        if mine < inner:
            down(sources, line_operands, slab * n * inner + mine, inner, first + own, stop, inverse, slab * n, sums)
        for j in range(width):
            parts[own * np.int64(tile) + lane * np.int64(width) + np.int64(j)] = sums[j]
        warp.block_barrier()
        for place in range(thread, tile, THREADS):
            if column0 + place < inner:
                value = parts[place]
                for other in range(1, warps):
                    value = combine(value, parts[np.int64(other * tile) + place])
                store(target, (warp.block_y() * outer + slab) * inner + column0 + place, value * scale)

    groups = [types.Tuple([POINTERS[kind] for kind in group]) for group in (kinds, lines)]
    return (
        kernel,
        (*groups, ELEMENTS[out].pointer, f32, f32, i64, i64, i64, i64),
        {"threads": THREADS} | early_options(early),
    )
