"""Optimiser steps and gradient tools over many tensors in one launch each.

A table in device memory has a row of 64-bit words a tensor: addresses, count, group. A second one has two numbers a
block: its tensor, and which piece of it. Numbers that change with every step (learning rate, bias corrections) are read
from device memory too, so that a step can be captured in a graph.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np

from kernels import bits, memory, warp
from kernels.barrier import early_options, entrance
from kernels.elements import ELEMENTS
from kernels.expression import column, evaluator, gather, scatter, written
from kernels.functions import absolute, maximum
from kernels.hardware import WARP
from kernels.pointwise import alike, fetch_groups, keep, store_groups
from kernels.random import draw8, normal4, philox
from kernels.target import SIMULATOR, cuda, device, f32, f32p, i32p, i64, i64p, kernel_factory, u16p
from kernels.teams import reduce_team

THREADS = 32 if SIMULATOR else 256
RUN = 8
PIECE = THREADS * RUN * (1 if SIMULATOR else 4)
"""Elements of a block."""
MIN_BLOCKS = 1 if SIMULATOR else 4
"""Blocks of a step that a multiprocessor holds at once: enough for every access to be under way."""
COLUMNS = 6
"""Words of a row: parameter, gradient, fp32 copy, first and second moment, and count * 2**16 + group."""
GROUP_BITS = 16
NUMBERS = 8
"""Numbers of a group: learning rate, beta1 or momentum, beta2, eps, weight decay, 1 / (1 - beta1^t),
1 / sqrt(1 - beta2^t), and 1 where SGD is Nesterov's."""
STATISTICS = 4
"""Numbers of a tensor: sum of squares, largest magnitude, how many are NaN, how many infinite."""
_CELLS = STATISTICS * WARP

_AT = {u16p: memory.u16_at, f32p: memory.f32_at}


def _pointer_at(kind: str) -> Callable:
    return _AT[ELEMENTS[kind].pointer]


@functools.cache
def _piece_io(kind: str) -> tuple[Callable, Callable]:
    """Up to eight elements: together where they are all there, else one by one."""
    element = ELEMENTS[kind]
    fetch8, unpack8, store8, load, store, count = (
        element.fetch8, element.unpack8, element.store8, element.load, element.store, element.words,
    )  # fmt: skip

    @device
    def read(pointer, index, left, values):
        if left >= np.int64(RUN):
            words = cuda.local.array(count, np.uint32)
            fetch8(pointer, index, words, 0)
            unpack8(words, 0, values, 0)
        else:
            for k in range(RUN):
                values[k] = load(pointer, index + np.int64(k)) if np.int64(k) < left else np.float32(0)

    @device
    def write(pointer, index, left, values):
        if left >= np.int64(RUN):
            store8(pointer, index, values, 0, np.uint32(0))
        else:
            for k in range(RUN):
                if np.int64(k) < left:
                    store(pointer, index + np.int64(k), values[k])

    return read, write


@device
def _stochastic(value, word):
    """Bf16 as fp32: up with the probability of the part that is cut off. Infinities and NaN stay."""
    if bits.not_finite(value):
        return value
    raised = np.uint32(bits.f32_bits(value) + (word & np.uint32(0xFFFF)))
    return bits.bits_f32(raised & np.uint32(0xFFFF0000))


@device
def _round_eight(values, index, stream, seed):
    for half in range(2):
        words = philox((index >> np.int64(2)) + np.int64(half), stream, seed)
        for k in range(4):
            values[4 * half + k] = _stochastic(values[4 * half + k], words[k])


@device
def _round_one(value, index, stream, seed):
    """As `_round_eight` rounds the element."""
    words = cuda.local.array(4, np.uint32)
    words[0], words[1], words[2], words[3] = philox(index >> np.int64(2), stream, seed)
    for k in range(4):
        if index & np.int64(3) == np.int64(k):
            value = _stochastic(value, words[k])
    return value


@device
def _eight_as_they_are(values, index, stream, seed):
    pass


@device
def _one_as_it_is(value, index, stream, seed):
    return value


_ADAM = (
    13,
    (("mul", 1, 12), ("mul", 2, 5), ("sub", 13, 14), ("root", 3), ("div", 15, 16), ("sub", 0, 17)),
    (18, 15, 3),
)
_SGD = (12, (("mul", 1, 11), ("mul", 2, 4), ("add", 12, 13), ("mul", 14, 3), ("sub", 0, 15)), (16, 14))


def _movers(ins: tuple[str, ...], outs: tuple[str, ...]) -> tuple[Callable, ...]:
    """Loads and stores of eight elements, of one, and each operand's offset of an element."""
    eight = fetch_groups(ins, (False,) * len(ins)), store_groups(outs)
    load, store = gather(tuple(ELEMENTS[k].load for k in ins)), scatter(tuple(ELEMENTS[k].store for k in outs))
    return *eight, load, store, alike(len(ins)), alike(len(outs))


@kernel_factory(
    (_ADAM, 2, "bf16", True, False), (_ADAM, 2, "f32", False, False), (_SGD, 1, "bf16", False, True),
)  # fmt: skip
def update(program, moments, kind, master, stochastic, early=False):
    """One step of every tensor: the program takes p, g, the moments, a group's numbers and the scale; gives p, moments.

    Parameters: table, blocks, groups [groups, 8], scale (of gradients; nothing happens unless it is finite), origin
    (seed and step). With ``master`` the fp32 copy is what is stepped, and the parameter is its rounding.
    """
    stepped = "f32" if master else kind
    ins, outs = (stepped, "f32", *("f32",) * moments), (stepped, *("f32",) * moments, *(kind,) * master)
    count, steps, results_of = program
    evaluate = evaluator((count, steps, (*results_of, *results_of[:1] * master)))
    fetch, store, load_one, store_one, at_in, at_out = _movers(ins, outs)
    element_of, put, enter = column(len(ins), RUN), keep(len(outs)), entrance(early, any_size=True)
    parameter_at, round_eight = _pointer_at(kind), _round_eight if stochastic else _eight_as_they_are
    round_one = _round_one if stochastic else _one_as_it_is
    words_count, in_count, out_count = sum(ELEMENTS[k].words for k in ins), RUN * len(ins), RUN * len(outs)
    known = {"parameter_at": parameter_at, "f32_at": memory.f32_at, "int64": np.int64}
    pointers_of = written("pointers_of", "table, row", _pointer_lines(moments, master), known)

    def kernel(table, blocks, groups, scale, origin):
        enter()
        words, values = cuda.local.array(words_count, np.uint32), cuda.local.array(in_count, np.float32)
        results = cuda.local.array(out_count, np.float32)
        factor, block = scale[0], warp.block_x()
        if bits.not_finite(factor):
            return
        tensor, piece = np.int64(blocks[np.int64(2) * block]), np.int64(blocks[np.int64(2) * block + np.int64(1)])
        row, seed, stream = tensor * np.int64(COLUMNS), origin[0], origin[1] * np.int64(1 << 20) + tensor
        sources, targets = pointers_of(table, row)
        packed = table[row + np.int64(5)]
        size, at = packed >> np.int64(GROUP_BITS), (packed & np.int64((1 << GROUP_BITS) - 1)) * np.int64(NUMBERS)
        numbers = (groups[at], groups[at + 1], groups[at + 2], groups[at + 3], groups[at + 4], groups[at + 5],
                   groups[at + 6], groups[at + 7], factor)  # fmt: skip
        start = piece * np.int64(PIECE) + np.int64(warp.thread_index()) * np.int64(RUN)
        for index in range(start, min(size, (piece + np.int64(1)) * np.int64(PIECE)), THREADS * RUN):
            if index + np.int64(RUN) <= size:
                fetch(sources, at_in(index), words, values)
                for j in range(RUN):
                    put(results, j, evaluate(element_of(values, j, numbers)))
                round_eight(results, index, stream, seed)
                store(targets, at_out(index), results)
            else:
                for one in range(index, size):
                    found = evaluate((*load_one(sources, at_in(one)), *numbers))
                    store_one(targets, at_out(one), (round_one(found[0], one, stream, seed), *found[1:]))

    options = {"threads": THREADS, "min_blocks": MIN_BLOCKS}
    return kernel, (i64p, i32p, f32p, f32p, i64p), options | early_options(early)


def _pointer_lines(moments: int, master: bool) -> list[str]:
    """Sources and targets of a row: parameter or copy, gradient, moments; parameter or copy, moments, parameter."""
    lines = ["parameter, gradient = parameter_at(table[row]), f32_at(table[row + int64(1)])"]
    if master:
        lines.append("copy = f32_at(table[row + int64(2)])")
    kept = [f"f32_at(table[row + int64({3 + k})])" for k in range(moments)]
    stepped = "copy" if master else "parameter"
    lines += [f"m{k} = {pointer}" for k, pointer in enumerate(kept)]
    moment = "".join(f"m{k}, " for k in range(moments))
    return [*lines, f"return ({stepped}, gradient, {moment}), ({stepped}, {moment}{'parameter, ' * master})"]


@kernel_factory(("f32",), ("bf16",))
def statistics(kind):
    """Of each block's piece: sum of squares, largest magnitude, NaN and infinite elements.

    Parameters: table (address and count a tensor), blocks, out [blocks, 4].
    """
    read, _ = _piece_io(kind)
    pointer_at = _pointer_at(kind)
    join = reduce_team(THREADS, ("sum", "max", "sum", "sum"))

    def kernel(table, blocks, out):
        shared = cuda.shared.array(_CELLS, np.float32)
        values = cuda.local.array(RUN, np.float32)
        block = warp.block_x()
        tensor, piece = np.int64(blocks[np.int64(2) * block]), np.int64(blocks[np.int64(2) * block + np.int64(1)])
        source, count = pointer_at(table[np.int64(2) * tensor]), table[np.int64(2) * tensor + np.int64(1)]
        squares, top, nans, infinite = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
        start = piece * np.int64(PIECE) + np.int64(warp.thread_index()) * np.int64(RUN)
        for index in range(start, min(count, (piece + np.int64(1)) * np.int64(PIECE)), THREADS * RUN):
            read(source, index, count - index, values)
            for k in range(RUN):
                x = values[k]
                squares += x * x
                top = maximum(top, absolute(x))
                if x != x:
                    nans += np.float32(1)
                elif bits.not_finite(x):
                    infinite += np.float32(1)
        squares, top, nans, infinite = join((squares, top, nans, infinite), shared)
        if warp.thread_index() == np.uint32(0):
            out[np.int64(4) * block] = squares
            out[np.int64(4) * block + np.int64(1)] = top
            out[np.int64(4) * block + np.int64(2)] = nans
            out[np.int64(4) * block + np.int64(3)] = infinite

    return kernel, (i64p, i32p, f32p), {"threads": THREADS}


@kernel_factory(())
def collect():
    """Each tensor's statistics from its blocks' in their order, and those of all tensors in the last row.

    Parameters: parts [blocks, 4], ends (the blocks up to each tensor's end), out [tensors + 1, 4], tensors. The grid
    has tensors + 1 blocks of one warp.
    """
    join = reduce_team(WARP, ("sum", "max", "sum", "sum"))

    def kernel(parts, ends, out, tensors):
        shared = cuda.shared.array(_CELLS, np.float32)
        tensor = warp.block_x()
        first, last = np.int64(0), np.int64(ends[tensors - np.int64(1)])
        if tensor < tensors:
            first = np.int64(ends[tensor - np.int64(1)]) if tensor > np.int64(0) else np.int64(0)
            last = np.int64(ends[tensor])
        squares, top, nans, infinite = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
        for block in range(first + np.int64(warp.thread_index()), last, WARP):
            squares += parts[np.int64(4) * block]
            top = maximum(top, parts[np.int64(4) * block + np.int64(1)])
            nans += parts[np.int64(4) * block + np.int64(2)]
            infinite += parts[np.int64(4) * block + np.int64(3)]
        squares, top, nans, infinite = join((squares, top, nans, infinite), shared)
        if warp.thread_index() == np.uint32(0):
            out[np.int64(4) * tensor] = squares
            out[np.int64(4) * tensor + np.int64(1)] = top
            out[np.int64(4) * tensor + np.int64(2)] = nans
            out[np.int64(4) * tensor + np.int64(3)] = infinite

    return kernel, (f32p, i32p, f32p, i64), {"threads": WARP}


@kernel_factory((False,), (True,))
def adjust(noisy):
    """Gradients g become min(max(factor[tensor] * g, -limit), limit) + deviation * noise, in place, fp32.

    Parameters: table (address and count a tensor), blocks, factors, limit, deviation, seed, step.
    """
    read, write = _piece_io("f32")

    def kernel(table, blocks, factors, limit, deviation, seed, step):
        values = cuda.local.array(RUN, np.float32)
        noise = cuda.local.array(RUN, np.float32)
        words = cuda.local.array(4, np.uint32)
        block = warp.block_x()
        tensor, piece = np.int64(blocks[np.int64(2) * block]), np.int64(blocks[np.int64(2) * block + np.int64(1)])
        target, count = memory.f32_at(table[np.int64(2) * tensor]), table[np.int64(2) * tensor + np.int64(1)]
        factor = factors[tensor]
        start = piece * np.int64(PIECE) + np.int64(warp.thread_index()) * np.int64(RUN)
        for index in range(start, min(count, (piece + np.int64(1)) * np.int64(PIECE)), THREADS * RUN):
            read(target, index, count - index, values)
            if noisy:
                draw8(normal4, index, step * np.int64(1 << 20) + tensor, seed, words, noise)
            for k in range(RUN):
                x = values[k] * factor
                x = x if x != x else max(min(x, limit), -limit)
                values[k] = x + deviation * noise[k] if noisy else x
            write(target, index, count - index, values)

    return kernel, (i64p, i32p, f32p, f32, f32, i64, i64), {"threads": THREADS}
