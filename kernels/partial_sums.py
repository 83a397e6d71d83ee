"""The second stage of long sums: their parts added up in order, scaled, rounded once.

A few thousand elements in hundreds of parts: a warp takes 32 neighbours, and the warps of a block share the parts; the
more warps, the fewer loads one after the other. Or few parts, or elements enough to fill the chip: a thread takes all
of an element's.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from kernels.barrier import early_options, entrance
from kernels.elements import ELEMENTS
from kernels.target import SIMULATOR, cuda, device, f32, f32p, i64, kernel_factory, types
from kernels.warp import block_barrier, block_x, thread_index

ALONE, SOME, ALL = (0, 2, 4) if SIMULATOR else (0, 8, 16)
"""Warps of a block that share an element's parts."""
AT_ONCE = 8
"""Loads of a thread under way together."""
_ALONE_THREADS = 64 if SIMULATOR else 256
FEW, MANY = 16, 1 << 16
"""Parts that a thread adds up alone, and elements of which each has a thread, however many parts there are."""
MANY_PARTS = 65
"""Parts that SOME warps would not load at once."""

OUT, PARTS, NUMBER, ROWS, COLUMNS = range(5)
"""Positions of a result's parameters: it, its parts, how many there are, the extents of each."""
_u32 = np.uint32


def warps_of(elements: int, parts: int) -> int:
    """How many warps share the parts, for so many elements of so many parts at most."""
    if parts <= FEW or elements >= MANY:
        return ALONE
    return ALL if parts >= MANY_PARTS else SOME


def threads_of(warps: int) -> int:
    """Threads of a block."""
    return 32 * warps or _ALONE_THREADS


def elements_of_block(warps: int) -> int:
    """Elements of a block."""
    return 32 if warps else _ALONE_THREADS


def _emitter(out: str, transposed: tuple[bool, ...], elements: int, add_up: Callable) -> Callable:
    """``emit(shared, results, block, scale, thread)``: the block's elements of whichever result it belongs to."""

    @device
    def nothing(shared, results, block, scale, thread):
        pass

    emit = nothing
    for number in reversed(range(len(transposed))):
        emit = _emit_or(out, number, transposed[number], elements, add_up, emit)
    return emit


def _emit_or(out: str, number: int, turned: bool, elements: int, add_up: Callable, rest: Callable) -> Callable:
    store, of_block = ELEMENTS[out].store, _u32(elements)

    @device
    def emit(shared, results, block, scale, thread):
        s = results[number]
        count = s[ROWS] * s[COLUMNS]
        own = _u32(_u32(count + np.int64(elements - 1)) // of_block)
        if block < own:
            at = np.int64(_u32(_u32(block * of_block) + (thread & _u32(elements - 1))))
            value = add_up(shared, s[PARTS], s[NUMBER], count, at, thread)
            if thread < of_block and at < count:
                row = _u32(_u32(at) // _u32(s[COLUMNS]))
                column = np.int64(_u32(_u32(at) - _u32(row * _u32(s[COLUMNS]))))
                store(s[OUT], column * s[ROWS] + np.int64(row) if turned else at, scale * value)
        else:
            rest(shared, results, _u32(block - own), scale, thread)

    return emit


@device
def _alone(shared, parts, number, count, at, thread):
    """A thread's own element; several parts are on the way at once."""
    found, value = cuda.local.array(AT_ONCE, np.float32), np.float32(0)
    if at < count:
        for turn in range(_u32(_u32(_u32(number) + _u32(AT_ONCE - 1)) // _u32(AT_ONCE))):
            first = np.int64(_u32(_u32(turn) * _u32(AT_ONCE)))
            for i in range(AT_ONCE):
                part = first + np.int64(i)
                found[i] = parts[part * count + at] if part < number else np.float32(0)
            for i in range(AT_ONCE):
                value += found[i]
    return value


def _together(warps: int) -> Callable:
    """The same of a warp's elements, by all warps of the block."""

    @device
    def add_up(shared, parts, number, count, at, thread):
        loaded = cuda.local.array(AT_ONCE, np.float32)
        warp = _u32(thread >> _u32(5))
        value = np.float32(0)
        if at < count:
            part, step = np.int64(warp), np.int64(AT_ONCE * warps)
            while part < number:
                for ahead in range(AT_ONCE):
                    later = part + np.int64(ahead * warps)
                    loaded[ahead] = parts[later * count + at] if later < number else np.float32(0)
                for ahead in range(AT_ONCE):
                    value += loaded[ahead]
                part += step
        shared[thread] = value
        block_barrier()
        value = np.float32(0)
        if thread < _u32(32):
            for other in range(warps):
                value += shared[_u32(thread + _u32(32 * other))]
        return value

    return add_up


@kernel_factory(
    ("f32", (False,), SOME), ("bf16", (True, False), SOME), ("f16", (False, False, False, False), SOME),
    ("bf16", (True, False), ALONE), ("f32", (False, False), ALL, True),
)  # fmt: skip
def sum_parts(out: str, transposed: tuple[bool, ...], warps: int, early: bool = False):
    """Parameters: a tuple of each result's, and the scale. Blocks of `elements_of_block` of each result in turn.

    Parts are [number, rows, columns] in fp32; the result is [rows, columns], or [columns, rows] where ``transposed``.
    ``warps`` share the parts of an element, or none: then a thread adds up all of them.
    """
    emit = _emitter(out, transposed, elements_of_block(warps), _together(warps) if warps else _alone)
    threads, enter = threads_of(warps), entrance(early)

    def kernel(results, scale):
        shared = cuda.shared.array(threads, np.float32)
        enter()
        emit(shared, results, _u32(block_x()), scale, thread_index())

    result = types.Tuple((ELEMENTS[out].pointer, f32p, i64, i64, i64))
    parameters = (types.Tuple((result,) * len(transposed)), f32)
    return kernel, parameters, {"threads": threads} | early_options(early)
