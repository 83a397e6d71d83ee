"""Rows of a matrix, each read once: reductions over a row, each of an expression of what came before, then results.

Softmax, the normalisations and their gradients are such programs. A team of threads, a warp or a block, has a row; it
keeps the row in registers where it fits (*resident*) and else reads it again for every stage (*streaming*). A sum has
one order: a thread's own elements, lanes by a butterfly, warps likewise.

What an expression sees of an element, in this order: the row's own operands, operands by column, the element's
position, operands by row, what these pick, 1 / n and scalars, the results of the stages before. Stages that do not need
each other are one pass. Columns that a stage reads are kept beside the row; others are read where results are made, as
registers are worth more than a second access to a cache.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from kernels import bits, warp
from kernels.barrier import early_options, entrance
from kernels.elements import ELEMENTS
from kernels.expression import Program, column, evaluator, scatter, written
from kernels.hardware import WARP
from kernels.target import SIMULATOR, cuda, device, f32, i32p, i64, i64p, kernel_factory, types
from kernels.teams import COMBINE, reduce_team

BLOCK = 32 if SIMULATOR else 128
"""Threads of a block whose rows have teams within a warp."""


_LITTLE = 8
"""Words of a row of one matrix in a thread that leave room for _THREADS_RESIDENT of them on a multiprocessor."""
_THREADS_RESIDENT = 1 if SIMULATOR else 2048


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


Stages = tuple[tuple[str, Program], ...]
Picks = tuple[tuple[int, int], ...]


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


@functools.cache
def holder(
    kinds: tuple[str, ...], width: int, places: tuple[int, ...] | None = None, cached: bool = False
) -> tuple[Callable, Callable, int]:
    """``hold(pointers, at, held, slot)`` and ``values(held, slot, values)``, and the words of a slot.

    ``places`` says which of the pointers are meant, and their values' places, where these are not the first ones.
    """
    known, holds, values, at = {"f32_bits": bits.f32_bits, "bits_f32": bits.bits_f32}, [], [], 0
    for i, (kind, place) in enumerate(zip(kinds, places or range(len(kinds)), strict=True)):
        element = ELEMENTS[kind]
        fetch = element.fetch8_cached if cached else element.fetch8
        known |= {f"fetch{i}": fetch, f"unpack{i}": element.unpack8, f"load{i}": element.load}
        if width == 1:
            holds.append(f"held[slot + {at}] = f32_bits(load{i}(pointers[{place}], at))")
            values.append(f"values[first + {place}] = bits_f32(held[slot + {at}])")
        else:
            holds.append(f"fetch{i}(pointers[{place}], at, held, slot + {at})")
            values.append(f"unpack{i}(held, slot + {at}, values, first + {place * width})")
        at += 1 if width == 1 else element.words
    hold = written("hold", "pointers, at, held, slot", holds or ["pass"], known)
    return hold, written("unhold", "held, slot, values, first", values or ["pass"], known), at


def columns_read(program: Program, operands: Operands) -> set[int]:
    """Which operands by column a program reads."""
    _, steps, outputs = program
    read = {value for name, *values in steps if name != "const" for value in values} | set(outputs)
    first = len(operands.full)
    return {c for c in range(len(operands.columns)) if first + c in read}


@functools.cache
def _columns_holder(operands: Operands, numbers: tuple[int, ...], width: int) -> tuple[Callable, Callable, int]:
    return holder(tuple(operands.columns[c] for c in numbers), width, numbers, True)


class Held(NamedTuple):
    """What a thread keeps of a resident row: the matrices, and the columns that a stage reads."""

    operands: Operands
    columns: tuple[int, ...]
    shape: Shape

    @property
    def words(self) -> int:
        """Registers of an access."""
        full = holder(self.operands.full, self.shape.width)[2]
        return full + _columns_holder(self.operands, self.columns, self.shape.width)[2]

    @property
    def bounded(self) -> bool:
        """Whether _THREADS_RESIDENT threads have the registers for what a row of one matrix needs."""
        return len(self.operands.full) == 1 and 0 < self.words * self.shape.chunks <= _LITTLE


def held_of(stages: Stages, operands: Operands, shape: Shape) -> Held:
    """A row with the columns that stages read."""
    by_stages = set().union(*(columns_read(program, operands) for _, program in stages))
    return Held(operands, tuple(sorted(by_stages)) if shape.chunks else (), shape)


def _loader(own: Held) -> Callable:
    """A device function that loads a resident row to registers."""
    hold, _, full_words = holder(own.operands.full, own.shape.width)
    hold_columns, _, _ = _columns_holder(own.operands, own.columns, own.shape.width)
    (team, width, chunks), words = own.shape, own.words

    @device
    def load(fulls, columns, base, lane, n, held):
        for chunk in range(chunks):
            at = (np.int64(chunk * team) + lane) * np.int64(width)
            if at < n:
                hold(fulls, base + at, held, chunk * words)
        for chunk in range(chunks):
            at = (np.int64(chunk * team) + lane) * np.int64(width)
            if at < n:
                hold_columns(columns, at, held, chunk * words + full_words)

    return load


def _each(own: Held, wanted: set[int], body: Callable) -> Callable:
    """A device function that runs ``value = body(value, values, at, ...)`` over a thread's accesses to its row.

    The body sees the columns ``wanted``; those that are not held are read where they are needed.
    """
    operands, (team, width, chunks) = own.operands, own.shape
    late = tuple(sorted(wanted - set(own.columns) if chunks else wanted))
    hold, unhold, full_words = holder(operands.full, width)
    _, unhold_columns, _ = _columns_holder(operands, own.columns, width)
    hold_late, unhold_late, late_words = _columns_holder(operands, late, width)
    first, words, late_count = len(operands.full) * width, own.words, max(1, late_words)
    count = max(1, width * (len(operands.full) + len(operands.columns)))

    @device
    def resident(fulls, columns, targets, base, lane, n, held, known, value):
        values, loaded = cuda.local.array(count, np.float32), cuda.local.array(late_count, np.uint32)
        for chunk in range(chunks):
            at = (np.int64(chunk * team) + lane) * np.int64(width)
            if at < n:
                unhold(held, chunk * words, values, 0)
                unhold_columns(held, chunk * words + full_words, values, first)
                hold_late(columns, at, loaded, 0)
                unhold_late(loaded, 0, values, first)
                value = body(value, values, at, targets, base, known)
        return value

    @device
    def streaming(fulls, columns, targets, base, lane, n, held, known, value):
        values, loaded = cuda.local.array(count, np.float32), cuda.local.array(late_count, np.uint32)
        for at in range(lane * np.int64(width), n, np.int64(team * width)):
            hold(fulls, base + at, held, 0)
            hold_late(columns, at, loaded, 0)
            unhold(held, 0, values, 0)
            unhold_late(loaded, 0, values, first)
            value = body(value, values, at, targets, base, known)
        return value

    return resident if chunks else streaming


def joint_stages(stages: Stages) -> list[tuple[int, ...]]:
    """The stages' numbers in groups of neighbours that do not need each other's results: one pass over the row each."""
    groups: list[tuple[int, ...]] = []
    for k, (_, (count, steps, outputs)) in enumerate(stages):
        read = {value for name, *values in steps if name != "const" for value in values} | set(outputs)
        if groups and not any(count - k + number in read for number in groups[-1]):
            groups[-1] = (*groups[-1], k)
        else:
            groups.append((k,))
    return groups


def stage(stages: Stages, own: Held, slot: int = 0) -> Callable:
    """A device function: reductions over the row in one pass, a tuple of them in every thread of the team.

    A program sees as many values less as it stands further behind in the pass.
    """
    joins = {f"join{i}": COMBINE[operation][0] for i, (operation, _) in enumerate(stages)}
    programs = {f"evaluate{i}": evaluator(program) for i, (_, program) in enumerate(stages)}
    parts = [f"join{i}(values[{i}], evaluate{i}((*x, {'zero, ' * i}))[0]), " for i in range(len(stages))]
    join = written("join", "values, x", [f"return ({''.join(parts)})"], {**joins, **programs, "zero": np.float32(0)})
    start = tuple(COMBINE[operation][1] for operation, _ in stages)
    operands, width = own.operands, own.shape.width
    element_of = column(len(operands.full) + len(operands.columns), width)
    finish = reduce_team(own.shape.team, tuple(operation for operation, _ in stages), slot)
    wanted = set().union(*(columns_read(program, operands) for _, program in stages))

    @device
    def accumulate(value, values, at, targets, base, known):
        first = np.float32(at)
        for j in range(width):
            value = join(value, element_of(values, j, (first + np.float32(j), *known)))
        return value

    each = _each(own, wanted, accumulate)

    @device
    def reduce_row(fulls, columns, targets, base, lane, n, held, parts, known):
        return finish(each(fulls, columns, targets, base, lane, n, held, known, start), parts)

    return reduce_row


def _results(program: Program, own: Held) -> Callable:
    """A device function that stores the matrices that are results."""
    operands, width = own.operands, own.shape.width
    evaluate, kinds = evaluator(program), operands.targets
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
        first = np.float32(at)
        for j in range(width):
            put(results, j, evaluate(element_of(values, j, (first + np.float32(j), *known))))
        store(targets, base + at, results)
        return value

    return _each(own, columns_read(program, operands), write)


def _chain(stages: Stages, own: Held, final: Program | None, last: Program | None) -> Callable:
    """A device function of the whole row: every stage, the matrices, then the row's own results."""
    common, known = "fulls, columns, targets, base, lane, n, held", {}
    lines, groups = [], joint_stages(stages)
    for k, group in enumerate(groups):
        known[f"stage{k}"] = stage(tuple(stages[number] for number in group), own, group[0])
        lines.append(f"k{k + 1} = (*k{k}, *stage{k}({common}, parts, k{k}))")
    everything = f"k{len(groups)}"
    if final is not None:
        known["write"], known["float32"] = _results(final, own), np.float32
        lines.append(f"write({common.replace('n,', 'stored,')}, {everything}, float32(0))")
    if last is not None:
        stores = tuple(ELEMENTS[kind].store for kind in own.operands.row_targets)
        known["evaluate_row"], known["store_row"] = evaluator(last), scatter(stores)
        at = "".join("row, " for _ in stores)
        lines += ["if lane == 0 and row < count:", f"    store_row(row_targets, ({at}), evaluate_row({everything}))"]
    return written("chain", f"{common}, stored, parts, row, count, row_targets, k0", lines, known)


def _row_values(operands: Operands, picks: Picks) -> Callable:
    """A device function ``(fulls, row_operands, row, base, n)``: the row's operands and what is picked by them."""
    known = {f"load{i}": ROW_LOADS[kind] for i, kind in enumerate(operands.row)} | {
        "int64": np.int64,
        "zero": np.float32(0),
    }
    known |= {f"pick{i}": ELEMENTS[operands.full[source]].load for i, (source, _) in enumerate(picks)}
    lines = [f"r{i} = load{i}(row_operands[{i}], row)" for i in range(len(operands.row))]
    for i, (source, by) in enumerate(picks):
        place = f"base + max(int64(0), min(n - int64(1), int64(r{by})))"
        lines.append(f"p{i} = pick{i}(fulls[{source}], {place}) if n > int64(0) else zero")
    found = [f"r{i}, " for i in range(len(operands.row))] + [f"p{i}, " for i in range(len(picks))]
    return written("row_values", "fulls, row_operands, row, base, n", [*lines, f"return ({''.join(found)})"], known)


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
    (*_LAYER, Operands(("bf16",), (), (), ("bf16",), ()), Shape(256, 8, 2), (), True),
)
def rows(stages, final, last, operands, shape, picks=(), early=False):
    """The programs ``stages`` ((operation, program), ...), ``final`` and ``last`` (of the row alone) over every row.

    ``picks`` are (matrix, row operand): the row's element at the column that the operand names, the nearest where there
    is none. Parameters: matrices, columns, row operands, matrices out, row results, (1 / n, scalars...), rows, n.
    Accesses of 8 elements want n to be a multiple of 8 and everything but row operands aligned to 16 bytes.
    """
    own = held_of(stages, operands, shape)
    load, chain = _loader(own), _chain(stages, own, final, last)
    row_values = _row_values(operands, picks)
    held_count, team = max(1, own.words * max(1, shape.chunks)), shape.team
    threads, _ = block_of(team)
    cells = WARP * max(1, len(stages))
    enter = entrance(early, any_size=True)

    def kernel(fulls, columns, row_operands, targets, row_targets, scalars, count, n):
        held = cuda.local.array(held_count, np.uint32)
        parts = cuda.shared.array(cells, np.float32)
        enter()
        thread = np.int64(warp.thread_index())
        row = warp.block_x() * np.int64(threads // team) + thread // np.int64(team)
        # Teams of a warp meet in its butterflies, so those beyond the last row take part, and store nothing.
        if row < count or team < WARP:
            stored = n if row < count else np.int64(0)
            at = min(row, count - np.int64(1))
            lane = thread % np.int64(team)
            base = at * n
            load(fulls, columns, base, lane, n, held)
            known = (*row_values(fulls, row_operands, at, base, n), *scalars)
            chain(fulls, columns, targets, base, lane, n, held, stored, parts, row, count, row_targets, known)

    program = stages[0][1] if stages else final
    scalars = program[0] - len(operands.full) - len(operands.columns) - 1 - len(operands.row) - len(picks)
    groups = [types.Tuple([POINTERS[kind] for kind in group]) for group in operands]
    options = {"threads": threads, "min_blocks": _THREADS_RESIDENT // threads if own.bounded else 1}
    return kernel, (*groups, types.UniTuple(f32, scalars), i64, i64), options | early_options(early)
