"""Rows of a matrix, each read once: reductions over a row, each of an expression of what came before, then results.

Softmax, the normalisations and their gradients are such programs. A team of threads, a warp or a block, has a row; it
keeps the row in registers where it fits (*resident*) and else reads it again for every stage (*streaming*). A sum has
one order: a thread's own elements, lanes by a butterfly, warps likewise.

What an expression sees of an element, in this order: the row's own operands, operands by column, the element's
position, operands by row, 1 / n and scalars, the results of the stages before.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from kernels import bits, warp
from kernels.elements import ELEMENTS
from kernels.expression import Program, column, evaluator, gather, scatter, written
from kernels.functions import maximum, minimum
from kernels.target import SIMULATOR, cuda, device, f32, i32p, i64, i64p, kernel_factory, types

WARP = 32
BLOCK = 32 if SIMULATOR else 128
"""Threads of a block whose rows have teams within a warp."""


def block_of(team: int) -> tuple[int, int]:
    """Threads of a block, and rows that it takes: a larger team has a block of its own."""
    return (BLOCK, BLOCK // team) if team <= WARP else (team, 1)


class Shape(NamedTuple):
    """Threads of a row's team (a power of two), elements of an access (8 or 1), accesses of a thread to a resident row.

    No access streams.
    """

    team: int
    width: int
    chunks: int


class Operands(NamedTuple):
    """The kinds of a kernel's operands: matrices and vectors by column and by row, in and out."""

    full: tuple[str, ...]
    columns: tuple[str, ...]
    row: tuple[str, ...]
    targets: tuple[str, ...]
    row_targets: tuple[str, ...]


@device
def _load_integer(pointer, index):
    return np.float32(pointer[index])


ROW_LOADS = {kind: element.load for kind, element in ELEMENTS.items()} | {"i32": _load_integer, "i64": _load_integer}
POINTERS = {kind: element.pointer for kind, element in ELEMENTS.items()} | {"i32": i32p, "i64": i64p}


@device
def _plus(a, b):
    return a + b


COMBINE = {
    "sum": (_plus, np.float32(0)), "max": (maximum, np.float32(-np.inf)), "min": (minimum, np.float32(np.inf)),
}  # fmt: skip
"""Reduction -> what joins two values, and what it starts from."""


@functools.cache
def reduce_team(team: int, operation: str) -> Callable:
    """A device function ``(value, parts)``: the team's values as one, in every thread, always in the same order.

    ``parts`` is shared memory of 32 fp32 numbers, the kernel's own: NVVM refuses one that two device functions share.
    """
    combine, start = COMBINE[operation]
    warps, steps = team // WARP, min(team, WARP).bit_length() - 1
    widest = min(team, WARP) // 2

    @device
    def reduce_warp(value, parts):
        for shift in range(steps):
            value = combine(value, warp.shuffle_xor(value, np.uint32(np.uint32(widest) >> np.uint32(shift))))
        return value

    @device
    def reduce_block(value, parts):
        thread = np.int64(warp.thread_index())
        value = reduce_warp(value, parts)
        if thread % np.int64(WARP) == np.int64(0):
            parts[thread // np.int64(WARP)] = value
        warp.block_barrier()
        lane = thread % np.int64(WARP)
        value = parts[lane] if lane < np.int64(warps) else start
        value = reduce_warp(value, parts)
        warp.block_barrier()
        return value

    return reduce_block if warps > 1 else reduce_warp


@functools.cache
def holder(kinds: tuple[str, ...], width: int) -> tuple[Callable, Callable, int]:
    """``hold(pointers, at, held, slot)`` and ``values(held, slot, values)``, and the words of a slot."""
    known, holds, values, at = {"f32_bits": bits.f32_bits, "bits_f32": bits.bits_f32}, [], [], 0
    for i, kind in enumerate(kinds):
        element = ELEMENTS[kind]
        known |= {f"fetch{i}": element.fetch8, f"unpack{i}": element.unpack8, f"load{i}": element.load}
        if width == 1:
            holds.append(f"held[slot + {at}] = f32_bits(load{i}(pointers[{i}], at))")
            values.append(f"values[{i}] = bits_f32(held[slot + {at}])")
        else:
            holds.append(f"fetch{i}(pointers[{i}], at, held, slot + {at})")
            values.append(f"unpack{i}(held, slot + {at}, values, {i * width})")
        at += 1 if width == 1 else element.words
    hold = written("hold", "pointers, at, held, slot", holds or ["pass"], known)
    return hold, written("unhold", "held, slot, values", values or ["pass"], known), at


@functools.cache
def _column_values(kinds: tuple[str, ...], width: int, first: int) -> Callable:
    """``values(pointers, at, words, values)``: the columns' elements behind those of the row's own operands."""
    known, fetches, unpacks, at = {}, [], [], 0
    for i, kind in enumerate(kinds):
        element, to = ELEMENTS[kind], (first + i) * width
        known |= {f"fetch{i}": element.fetch8_cached, f"unpack{i}": element.unpack8, f"load{i}": element.load}
        if width == 1:
            fetches.append(f"values[{to}] = load{i}(pointers[{i}], at)")
        else:
            fetches.append(f"fetch{i}(pointers[{i}], at, words, {at})")
            unpacks.append(f"unpack{i}(words, {at}, values, {to})")
        at += element.words
    return written("column_values", "pointers, at, words, values", [*fetches, *unpacks] or ["pass"], known)


@functools.cache
def walk(operands: Operands, shape: Shape) -> tuple[Callable, Callable]:
    """Device functions: ``load`` of a resident row to registers, and ``element(held, slot, ..., at)``: its values."""
    hold, unhold, words = holder(operands.full, shape.width)
    column_values = _column_values(operands.columns, shape.width, len(operands.full))
    column_words = max(1, sum(ELEMENTS[kind].words for kind in operands.columns))
    team, width, chunks = shape

    @device
    def load(fulls, base, lane, n, held):
        for chunk in range(chunks):
            at = (np.int64(chunk * team) + lane) * np.int64(width)
            if at < n:
                hold(fulls, base + at, held, chunk * words)

    @device
    def element(fulls, columns, base, at, held, chunk, values):
        loaded = cuda.local.array(column_words, np.uint32)
        if chunks == 0:
            hold(fulls, base + at, held, 0)
            unhold(held, 0, values)
        else:
            unhold(held, chunk * words, values)
        column_values(columns, at, loaded, values)

    return load, element


def _each(operands: Operands, shape: Shape, body: Callable) -> Callable:
    """A device function that runs ``value = body(value, values, at, ...)`` over a thread's accesses to its row."""
    _, element = walk(operands, shape)
    team, width, chunks = shape
    count = max(1, width * (len(operands.full) + len(operands.columns)))

    @device
    def resident(fulls, columns, targets, base, lane, n, held, known, value):
        values = cuda.local.array(count, np.float32)
        for chunk in range(chunks):
            at = (np.int64(chunk * team) + lane) * np.int64(width)
            if at < n:
                element(fulls, columns, base, at, held, chunk, values)
                value = body(value, values, at, targets, base, known)
        return value

    @device
    def streaming(fulls, columns, targets, base, lane, n, held, known, value):
        values = cuda.local.array(count, np.float32)
        for at in range(lane * np.int64(width), n, np.int64(team * width)):
            element(fulls, columns, base, at, held, 0, values)
            value = body(value, values, at, targets, base, known)
        return value

    return resident if chunks else streaming


def stage(operation: str, program: Program, operands: Operands, shape: Shape) -> Callable:
    """A device function: one reduction over the row, in every thread of the team."""
    evaluate, (combine, start) = evaluator(program), COMBINE[operation]
    element_of = column(len(operands.full) + len(operands.columns), shape.width)
    finish, width = reduce_team(shape.team, operation), shape.width

    @device
    def accumulate(value, values, at, targets, base, known):
        for j in range(width):
            position = np.float32(at + np.int64(j))
            (found,) = evaluate(element_of(values, j, (position, *known)))
            value = combine(value, found)
        return value

    each = _each(operands, shape, accumulate)

    @device
    def reduce_row(fulls, columns, targets, base, lane, n, held, parts, known):
        return finish(each(fulls, columns, targets, base, lane, n, held, known, start), parts)

    return reduce_row


def _results(program: Program, operands: Operands, shape: Shape) -> Callable:
    """A device function that stores the matrices that are results."""
    evaluate, width, kinds = evaluator(program), shape.width, operands.targets
    element_of = column(len(operands.full) + len(operands.columns), width)
    known_names = {f"store{i}": ELEMENTS[k].store8 if width > 1 else ELEMENTS[k].store for i, k in enumerate(kinds)}
    known_names["uint32"] = np.uint32
    rest = "results, {}, uint32(0)" if width > 1 else "results[{}]"
    lines = [f"store{i}(targets[{i}], at, {rest.format(i * width)})" for i in range(len(kinds))]
    store = written("store", "targets, at, results", lines, known_names)
    put_lines = [f"results[{i * width} + j] = found[{i}]" for i in range(len(kinds))]
    put = written("put", "results, j, found", put_lines, {})
    count = width * len(kinds)

    @device
    def write(value, values, at, targets, base, known):
        results = cuda.local.array(count, np.float32)
        for j in range(width):
            position = np.float32(at + np.int64(j))
            put(results, j, evaluate(element_of(values, j, (position, *known))))
        store(targets, base + at, results)
        return value

    return _each(operands, shape, write)


def _chain(stages: tuple, operands: Operands, shape: Shape, final: Program | None, last: Program | None) -> Callable:
    """A device function of the whole row: every stage, the matrices, then the row's own results."""
    known = {f"stage{k}": stage(name, program, operands, shape) for k, (name, program) in enumerate(stages)}
    common = "fulls, columns, targets, base, lane, n, held"
    lines = []
    for k in range(len(stages)):
        lines += [f"s{k} = stage{k}({common}, parts, k{k})", f"k{k + 1} = (*k{k}, s{k})"]
    if final is not None:
        known["write"], known["float32"] = _results(final, operands, shape), np.float32
        lines.append(f"write({common.replace('n,', 'stored,')}, k{len(stages)}, float32(0))")
    if last is not None:
        stores = tuple(ELEMENTS[kind].store for kind in operands.row_targets)
        known["evaluate_row"], known["store_row"] = evaluator(last), scatter(stores)
        at = "".join("row, " for _ in stores)
        lines += ["if lane == 0 and row < count:", f"    store_row(row_targets, ({at}), evaluate_row(k{len(stages)}))"]
    return written("chain", f"{common}, stored, parts, row, count, row_targets, k0", lines, known)


_SUM = (4, (), (0,))
_SOFTMAX = (
    (("max", (3, (), (0,))), ("sum", (4, (("sub", 0, 3), ("exp", 4)), (5,)))),
    (5, (("sub", 0, 3), ("exp", 5), ("div", 6, 4)), (7,)),
    None,
)  # fmt: skip
_NORM = (
    (("sum", (5, (("square", 0),), (5,))),),
    (6, (("mul", 5, 3), ("add", 6, 4), ("rsqrt", 7), ("mul", 0, 8), ("mul", 9, 1)), (10,)),
    (3, (("mul", 2, 0),), (3,)),
)  # fmt: skip


_LAYER = (
    (("sum", (4, (), (0,))), ("sum", (5, (("mul", 4, 2), ("sub", 0, 5), ("square", 6)), (7,)))),
    (6, (("mul", 4, 2), ("sub", 0, 6), ("mul", 5, 2), ("add", 8, 3), ("rsqrt", 9), ("mul", 7, 10)), (11,)),
    None,
)  # fmt: skip


@kernel_factory(
    (*_LAYER, Operands(("bf16",), (), (), ("bf16",), ()), Shape(256, 8, 2)),
    (*_SOFTMAX, Operands(("bf16",), (), (), ("bf16",), ()), Shape(256, 8, 2)),
    (*_SOFTMAX, Operands(("f32",), (), (), ("f32",), ()), Shape(4, 1, 8)),
    (*_SOFTMAX, Operands(("f32",), (), (), ("f32",), ()), Shape(1024, 8, 0)),
    (*_NORM, Operands(("bf16",), ("bf16",), (), ("bf16",), ("f32",)), Shape(32, 8, 4)),
)
def rows(stages, final, last, operands, shape):
    """The programs ``stages`` ((operation, program), ...), ``final`` and ``last`` (of the row alone) over every row.

    Parameters: matrices, columns, row operands, matrices out, row results, (1 / n, scalars...), rows, n. Accesses of 8
    elements want n to be a multiple of 8 and everything but row operands aligned to 16 bytes.
    """
    load, _ = walk(operands, shape)
    chain = _chain(stages, operands, shape, final, last)
    row_values = gather(tuple(ROW_LOADS[kind] for kind in operands.row))
    _, _, words = holder(operands.full, shape.width)
    held_count, team, own = max(1, words * max(1, shape.chunks)), shape.team, len(operands.row)
    threads, _ = block_of(team)
    at_row = written("at_row", "row", [f"return ({'row, ' * own})"], {})

    def kernel(fulls, columns, row_operands, targets, row_targets, scalars, count, n):
        held = cuda.local.array(held_count, np.uint32)
        parts = cuda.shared.array(WARP, np.float32)
        thread = np.int64(warp.thread_index())
        row = warp.block_x() * np.int64(threads // team) + thread // np.int64(team)
        # Teams of a warp meet in its butterflies, so those beyond the last row take part, and store nothing.
        if row < count or team < WARP:
            stored = n if row < count else np.int64(0)
            at = min(row, count - np.int64(1))
            lane = thread % np.int64(team)
            base = at * n
            load(fulls, base, lane, n, held)
            known = (*row_values(row_operands, at_row(at)), *scalars)
            chain(fulls, columns, targets, base, lane, n, held, stored, parts, row, count, row_targets, known)

    program = stages[0][1] if stages else final
    scalars = program[0] - len(operands.full) - len(operands.columns) - 1 - own
    groups = [types.Tuple([POINTERS[kind] for kind in group]) for group in operands]
    return kernel, (*groups, types.UniTuple(f32, scalars), i64, i64), {"threads": threads}
