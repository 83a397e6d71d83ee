"""Random numbers that depend on a seed, a stream and an element's index alone: Philox4x32-10.

J. Salmon et al., Parallel random numbers: as easy as 1, 2, 3, SC11. The counter is (index / 4, stream), the key the
seed; element i takes word i % 4. So a number can be made again, in any order and by any kernel.
"""

from __future__ import annotations

import math

import numpy as np

from kernels import warp
from kernels.elements import ELEMENTS
from kernels.functions import log, square_root
from kernels.ptx import instruction
from kernels.target import SIMULATOR, cuda, device, f32, i64, i64p, kernel_factory

THREADS = 32 if SIMULATOR else 256
RUN = 8
"""Elements of a thread."""
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
INCREMENTS = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10

_OPTIONS = {"threads": THREADS}
_M0, _M1 = (np.uint64(m) for m in MULTIPLIERS)
_W0, _W1 = INCREMENTS
_UNIT = np.float32(2.0**-24)
_TURN = np.float32(2.0**-23 * math.pi)

cosine = instruction("cos.approx.ftz.f32 $0, $1;", "f", "f", twin=np.cos, pure=True)
sine = instruction("sin.approx.ftz.f32 $0, $1;", "f", "f", twin=np.sin, pure=True)


@device
def philox(block, stream, seed):
    """Four random words for a block of four elements."""
    a, b = np.uint32(block & np.int64(0xFFFFFFFF)), np.uint32((block >> np.int64(32)) & np.int64(0xFFFFFFFF))
    c, d = np.uint32(stream & np.int64(0xFFFFFFFF)), np.uint32((stream >> np.int64(32)) & np.int64(0xFFFFFFFF))
    k0, k1 = np.uint32(seed & np.int64(0xFFFFFFFF)), np.uint32((seed >> np.int64(32)) & np.int64(0xFFFFFFFF))
    for _ in range(ROUNDS):
        p, q = np.uint64(a) * _M0, np.uint64(c) * _M1
        high0, high1 = np.uint32(p >> np.uint64(32)), np.uint32(q >> np.uint64(32))
        low0, low1 = np.uint32(p & np.uint64(0xFFFFFFFF)), np.uint32(q & np.uint64(0xFFFFFFFF))
        a, b, c, d = np.uint32(high1 ^ b ^ k0), low1, np.uint32(high0 ^ d ^ k1), low0
        k0, k1 = np.uint32(k0 + np.uint32(_W0)), np.uint32(k1 + np.uint32(_W1))
    return a, b, c, d


@device
def uniform(word):
    """A number in [0, 1), a multiple of 2**-24."""
    return np.float32(word >> np.uint32(8)) * _UNIT


@device
def uniform4(words, at, values):
    """Four uniform numbers."""
    for k in range(4):
        values[at + k] = uniform(words[k])


@device
def normal4(words, at, values):
    """Box and Muller: two numbers of the unit normal distribution from two words."""
    for k in range(2):
        radius = square_root(np.float32(-2) * log((np.float32(words[2 * k] >> np.uint32(8)) + np.float32(1)) * _UNIT))
        angle = (np.float32(words[2 * k + 1] >> np.uint32(8)) - np.float32(8388608)) * _TURN
        values[at + 2 * k] = radius * cosine(angle)
        values[at + 2 * k + 1] = radius * sine(angle)


_DISTRIBUTIONS = {"uniform": uniform4, "normal": normal4}


@device
def draw8(fill, first, stream, seed, words, values):
    """Eight numbers for the elements from ``first``, a multiple of 8, on."""
    for half in range(2):
        a, b, c, d = philox((first >> np.int64(2)) + np.int64(half), stream, seed)
        words[0] = a
        words[1] = b
        words[2] = c
        words[3] = d
        fill(words, 4 * half, values)


@kernel_factory(("uniform", "f32", False), ("normal", "bf16", True))
def random(distribution, kind, counted):
    """out[i] = low + width * number i. Parameters: out (aligned to 16 bytes), low, width, seed, stream, count.

    With ``counted`` a last one: an origin of two numbers, from which seed and stream are counted.
    """
    fill, element = _DISTRIBUTIONS[distribution], ELEMENTS[kind]
    store8, store, pointer = element.store8, element.store, element.pointer

    @device
    def make(out, low, width, seed, stream, count):
        words = cuda.local.array(4, np.uint32)
        values = cuda.local.array(RUN, np.float32)
        first = (warp.block_x() * np.int64(THREADS) + np.int64(warp.thread_index())) * np.int64(RUN)
        if first < count:
            draw8(fill, first, stream, seed, words, values)
            for k in range(RUN):
                values[k] = low + width * values[k]
            if first + np.int64(RUN) <= count:
                store8(out, first, values, 0, np.uint32(0))
            else:
                for k in range(RUN):
                    if first + np.int64(k) < count:
                        store(out, first + np.int64(k), values[k])

    def kernel(out, low, width, seed, stream, count):
        make(out, low, width, seed, stream, count)

    def kernel_counted(out, low, width, seed, stream, count, origin):
        make(out, low, width, origin[0] + seed, origin[1] + stream, count)

    parameters = (pointer, f32, f32, i64, i64, i64)
    return (kernel_counted, (*parameters, i64p), _OPTIONS) if counted else (kernel, parameters, _OPTIONS)


@kernel_factory(("bf16", "bf16", False), ("f32", "f32", True))
def dropout(kind, out_kind, counted):
    """out[i] = source[i] * scale where number i is at least p, else 0.

    Parameters: source, out (both aligned to 16 bytes), p, scale, seed, stream, count; with ``counted`` an origin.
    """
    source_element, out_element = ELEMENTS[kind], ELEMENTS[out_kind]
    fetch8, unpack8, load, words_count = (
        source_element.fetch8, source_element.unpack8, source_element.load, source_element.words,
    )  # fmt: skip
    store8, store = out_element.store8, out_element.store

    @device
    def drop(source, out, p, scale, seed, stream, count):
        fetched = cuda.local.array(words_count, np.uint32)
        words = cuda.local.array(4, np.uint32)
        chances = cuda.local.array(RUN, np.float32)
        values = cuda.local.array(RUN, np.float32)
        first = (warp.block_x() * np.int64(THREADS) + np.int64(warp.thread_index())) * np.int64(RUN)
        if first < count:
            draw8(uniform4, first, stream, seed, words, chances)
            if first + np.int64(RUN) <= count:
                fetch8(source, first, fetched, 0)
                unpack8(fetched, 0, values, 0)
                for k in range(RUN):
                    values[k] = values[k] * scale if chances[k] >= p else np.float32(0)
                store8(out, first, values, 0, np.uint32(0))
            else:
                for k in range(RUN):
                    if first + np.int64(k) < count:
                        value = load(source, first + np.int64(k)) * scale
                        store(out, first + np.int64(k), value if chances[k] >= p else np.float32(0))

    def kernel(source, out, p, scale, seed, stream, count):
        drop(source, out, p, scale, seed, stream, count)

    def kernel_counted(source, out, p, scale, seed, stream, count, origin):
        drop(source, out, p, scale, origin[0] + seed, origin[1] + stream, count)

    parameters = (source_element.pointer, out_element.pointer, f32, f32, i64, i64, i64)
    return (kernel_counted, (*parameters, i64p), _OPTIONS) if counted else (kernel, parameters, _OPTIONS)
