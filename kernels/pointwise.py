"""Expressions over tensors, element by element, in any mixture of kinds; fp32 registers, one rounding at the store.

Three forms of one kernel. *flat*: all operands lie alike without gaps; eight elements a thread, 16-byte accesses.
*rows*: several axes whose innermost one every operand walks in steps of 1 or not at all; eight elements a thread.
*strided*: any strides, one element a thread.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np

from kernels import warp
from kernels.barrier import early_options, entrance
from kernels.elements import ELEMENTS
from kernels.expression import Program, column, evaluator, gather, offsets, scatter, written
from kernels.target import SIMULATOR, cuda, device, f32, i64, kernel_factory, types

THREADS = 32 if SIMULATOR else 256
RUN = 8
"""Elements of a thread in the forms *flat* and *rows*."""

_ADD = (2, (("add", 0, 1),), (2,))
_GATED = (4, (("sigmoid", 0), ("mul", 0, 4), ("mul", 5, 1), ("mul", 6, 3)), (7, 5))
_WAVES = (1, (("sin", 0), ("cos", 0), ("add", 1, 2)), (3,))
_POWERS = (1, (("exp", 0), ("erf", 1), ("pow", 0, 2), ("log", 3), ("tanh", 4), ("const", 0.5), ("div", 5, 6)), (7,))


def pointers(kinds: tuple[str, ...]) -> types.BaseTuple:
    """The pointer types of operands."""
    return types.Tuple([ELEMENTS[kind].pointer for kind in kinds])


@functools.cache
def fetch_groups(kinds: tuple[str, ...], repeated: tuple[bool, ...]) -> Callable:
    """A device function ``(pointers, offsets, words, values)``: eight elements of every operand to ``values``.

    All loads are issued before the first is used. A repeated operand is one element, eight times.
    """
    known, fetches, unpacks, at = {}, [], [], 0
    for i, (kind, same) in enumerate(zip(kinds, repeated, strict=True)):
        element = ELEMENTS[kind]
        if same:
            known[f"load{i}"] = element.load
            fetches.append(f"s{i} = load{i}(pointers[{i}], offsets[{i}])")
            unpacks += [f"for j in range({RUN}):", f"    values[{i * RUN} + j] = s{i}"]
        else:
            fetch = element.fetch8_cached if any(repeated) else element.fetch8
            known |= {f"fetch{i}": fetch, f"unpack{i}": element.unpack8}
            fetches.append(f"fetch{i}(pointers[{i}], offsets[{i}], words, {at})")
            unpacks.append(f"unpack{i}(words, {at}, values, {i * RUN})")
            at += element.words
    return written("fetch_groups", "pointers, offsets, words, values", [*fetches, *unpacks] or ["pass"], known)


@functools.cache
def store_groups(kinds: tuple[str, ...]) -> Callable:
    """A device function ``(pointers, offsets, values)``: eight elements of every operand from ``values``."""
    known = {f"store{i}": ELEMENTS[kind].store8 for i, kind in enumerate(kinds)} | {"uint32": np.uint32}
    lines = [f"store{i}(pointers[{i}], offsets[{i}], values, {i * RUN}, uint32(0))" for i in range(len(kinds))]
    return written("store_groups", "pointers, offsets, values", lines, known)


@functools.cache
def keep(count: int) -> Callable:
    """A device function ``(values, j, results)``: results to element ``j`` of each group of eight."""
    return written("keep", "values, j, results", [f"values[{i * RUN} + j] = results[{i}]" for i in range(count)], {})


def _eight(program: Program, ins: tuple[str, ...], outs: tuple[str, ...], repeated: tuple[bool, ...]) -> Callable:
    """A device function ``(sources, sources_at, targets, targets_at, scalars)`` over eight elements."""
    fetch, store, evaluate = fetch_groups(ins, repeated), store_groups(outs), evaluator(program)
    element_of, put = column(len(ins), RUN), keep(len(outs))
    words_count = max(1, sum(ELEMENTS[kind].words for kind in ins))
    in_count, out_count = max(1, len(ins)) * RUN, len(outs) * RUN

    @device
    def eight(sources, sources_at, targets, targets_at, scalars):
        words = cuda.local.array(words_count, np.uint32)
        values = cuda.local.array(in_count, np.float32)
        results = cuda.local.array(out_count, np.float32)
        fetch(sources, sources_at, words, values)
        for j in range(RUN):
            put(results, j, evaluate(element_of(values, j, scalars)))
        store(targets, targets_at, results)

    return eight


def _one(program: Program, ins: tuple[str, ...], outs: tuple[str, ...]) -> Callable:
    """A device function like that of :func:`_eight` over one element."""
    load = gather(tuple(ELEMENTS[kind].load for kind in ins))
    store = scatter(tuple(ELEMENTS[kind].store for kind in outs))
    evaluate = evaluator(program)

    @device
    def one(sources, sources_at, targets, targets_at, scalars):
        store(targets, targets_at, evaluate((*load(sources, sources_at), *scalars)))

    return one


@functools.cache
def alike(count: int) -> Callable:
    """A device function: ``count`` times the same offset."""
    return written("alike", "at", [f"return ({'at, ' * count})"], {})


@kernel_factory(
    (_ADD, ("bf16", "f32"), ("bf16",)), (_GATED, ("bf16", "f16", "f32"), ("bf16", "f32")),
    (_POWERS, ("f32",), ("f32",)), (_WAVES, ("bf16",), ("bf16",)), (_ADD, ("bf16", "bf16"), ("bf16",), True),
)  # fmt: skip
def flat(program, ins, outs, early=False):
    """targets[i] = program(sources[i], scalars). Parameters: sources, targets, scalars, count; aligned to 16 bytes."""
    eight, one = _eight(program, ins, outs, (False,) * len(ins)), _one(program, ins, outs)
    at_in, at_out, enter = alike(len(ins)), alike(len(outs)), entrance(early, any_size=True)

    def kernel(sources, targets, scalars, count):
        enter()
        first = (warp.block_x() * np.int64(THREADS) + np.int64(warp.thread_index())) * np.int64(RUN)
        if first + np.int64(RUN) <= count:
            eight(sources, at_in(first), targets, at_out(first), scalars)
        else:
            for index in range(first, count):
                one(sources, at_in(index), targets, at_out(index), scalars)

    scalars = types.UniTuple(f32, program[0] - len(ins))
    return kernel, (pointers(ins), pointers(outs), scalars, i64), {"threads": THREADS} | early_options(early)


@kernel_factory(
    (_ADD, ("bf16", "bf16"), ("bf16",), (False, True), 2), (_ADD, ("f32", "bf16"), ("f32",), (False, False), 3)
)
def rows(program, ins, outs, repeated, dimensions, early=False):
    """The expression over several axes, eight elements of the innermost one a thread.

    Parameters: sources, targets, scalars, extents (the innermost in units of eight), strides of the sources and then of
    the targets (the innermost in steps of eight), units. Every access is aligned to 16 bytes.
    """
    eight = _eight(program, ins, outs, repeated)
    places_in, places_out = offsets(dimensions, len(ins)), offsets(dimensions, len(outs))
    enter = entrance(early, any_size=True)

    def kernel(sources, targets, scalars, extents, strides_in, strides_out, units):
        enter()
        unit = warp.block_x() * np.int64(THREADS) + np.int64(warp.thread_index())
        if unit < units:
            at_in, at_out = places_in(unit, extents, strides_in), places_out(unit, extents, strides_out)
            eight(sources, at_in, targets, at_out, scalars)

    return kernel, _placed(program, ins, outs, dimensions), {"threads": THREADS} | early_options(early)


@kernel_factory(
    (_ADD, ("bf16", "f32"), ("f32",), 1), (_ADD, ("bf16", "f16"), ("bf16",), 4), (_WAVES, ("f32",), ("f32",), 2)
)
def strided(program, ins, outs, dimensions, early=False):
    """The expression over any strides, one element a thread; parameters as of :func:`rows`, in single elements."""
    one = _one(program, ins, outs)
    places_in, places_out = offsets(dimensions, len(ins)), offsets(dimensions, len(outs))
    enter = entrance(early, any_size=True)

    def kernel(sources, targets, scalars, extents, strides_in, strides_out, units):
        enter()
        unit = warp.block_x() * np.int64(THREADS) + np.int64(warp.thread_index())
        if unit < units:
            at_in, at_out = places_in(unit, extents, strides_in), places_out(unit, extents, strides_out)
            one(sources, at_in, targets, at_out, scalars)

    return kernel, _placed(program, ins, outs, dimensions), {"threads": THREADS} | early_options(early)


def _placed(program: Program, ins: tuple[str, ...], outs: tuple[str, ...], dimensions: int) -> tuple:
    return (
        pointers(ins), pointers(outs), types.UniTuple(f32, program[0] - len(ins)), types.UniTuple(i64, dimensions),
        types.UniTuple(i64, dimensions * len(ins)), types.UniTuple(i64, dimensions * len(outs)), i64,
    )  # fmt: skip
