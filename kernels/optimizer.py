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
from kernels.elements import ELEMENTS
from kernels.expression import evaluator
from kernels.functions import absolute, maximum
from kernels.random import draw8, normal4, philox
from kernels.rows import WARP, reduce_team
from kernels.target import SIMULATOR, cuda, device, f32, f32p, i32p, i64, i64p, kernel_factory, u16p

THREADS = 32 if SIMULATOR else 256
RUN = 8
PIECE = THREADS * RUN * (1 if SIMULATOR else 4)
"""Elements of a block."""
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
def _not_rounded(values, index, stream, seed):
    pass


_ADAM = (12, (("mul", 2, 5), ("sub", 1, 2), ("add", 12, 13), ("sqrt", 3), ("div", 14, 15), ("sub", 0, 16)), (17, 14, 3))
_SGD = (12, (("mul", 2, 5), ("add", 1, 12), ("mul", 13, 4), ("sub", 0, 14)), (15, 13, 3))


@kernel_factory(
    (_ADAM, 2, "bf16", True, False), (_ADAM, 2, "f32", False, False), (_SGD, 1, "bf16", False, True),
)  # fmt: skip
def update(program, moments, kind, master, stochastic):
    """One step of every tensor: the program takes p, g, both moments and a group's numbers, and gives p and moments.

    Parameters: table, blocks, groups [groups, 8], scale (of gradients; nothing happens unless it is finite), origin
    (seed and step). With ``master`` the fp32 copy is what is stepped, and the parameter is its rounding.
    """
    step_of, second = evaluator(program), moments == 2
    read, write = _piece_io(kind)
    read32, write32 = _piece_io("f32")
    parameter_at = _pointer_at(kind)
    round_eight = _round_eight if stochastic else _not_rounded

    def kernel(table, blocks, groups, scale, origin):
        p, g, m, v = (cuda.local.array(RUN, np.float32), cuda.local.array(RUN, np.float32),
                      cuda.local.array(RUN, np.float32), cuda.local.array(RUN, np.float32))  # fmt: skip
        factor = scale[0]
        if bits.not_finite(factor):
            return
        block = warp.block_x()
        tensor, piece = np.int64(blocks[np.int64(2) * block]), np.int64(blocks[np.int64(2) * block + np.int64(1)])
        row = tensor * np.int64(COLUMNS)
        parameter, gradient = parameter_at(table[row]), memory.f32_at(table[row + np.int64(1)])
        copy, first = memory.f32_at(table[row + np.int64(2)]), memory.f32_at(table[row + np.int64(3)])
        other, packed = memory.f32_at(table[row + np.int64(4)]), table[row + np.int64(5)]
        count, at = packed >> np.int64(GROUP_BITS), (packed & np.int64((1 << GROUP_BITS) - 1)) * np.int64(NUMBERS)
        group = (groups[at], groups[at + 1], groups[at + 2], groups[at + 3], groups[at + 4], groups[at + 5],
                 groups[at + 6], groups[at + 7])  # fmt: skip
        start = piece * np.int64(PIECE) + np.int64(warp.thread_index()) * np.int64(RUN)
        for index in range(start, min(count, (piece + np.int64(1)) * np.int64(PIECE)), THREADS * RUN):
            left = count - index
            if master:
                read32(copy, index, left, p)
            else:
                read(parameter, index, left, p)
            read32(gradient, index, left, g)
            read32(first, index, left, m)
            if second:
                read32(other, index, left, v)
            else:
                for k in range(RUN):
                    v[k] = np.float32(0)
            for k in range(RUN):
                p[k], m[k], v[k] = step_of((p[k], g[k] * factor, m[k], v[k], *group))
            write32(first, index, left, m)
            if second:
                write32(other, index, left, v)
            if master:
                write32(copy, index, left, p)
            round_eight(p, index, origin[1] * np.int64(1 << 20) + tensor, origin[0])
            write(parameter, index, left, p)

    return kernel, (i64p, i32p, f32p, f32p, i64p), {"threads": THREADS}


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
