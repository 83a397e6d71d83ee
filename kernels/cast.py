"""Conversion between floating kinds: exact where it widens, one rounding to nearest even where it narrows."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np

from kernels import memory, warp
from kernels.elements import ELEMENTS, KINDS
from kernels.target import SIMULATOR, cuda, device, i64, kernel_factory

THREADS = 32 if SIMULATOR else 256
RUN = 8
"""Elements a thread converts: one or two 16-byte accesses on either side."""


@kernel_factory(*itertools.product(KINDS, repeat=2))
def cast(source_kind, out_kind):
    """out[i] = round(source[i]). Parameters: source, out, count; both pointers aligned to 16 bytes.

    A thread takes eight neighbours; the last count % 8 are taken one by one. Between equal kinds bits are copied.
    """
    source_element, out_element = ELEMENTS[source_kind], ELEMENTS[out_kind]
    make = _copy if source_kind == out_kind else _convert
    eight, one = make(source_element, out_element)

    def kernel(source, out, count):
        first = (warp.block_x() * np.int64(THREADS) + np.int64(warp.thread_index())) * np.int64(RUN)
        if first + np.int64(RUN) <= count:
            eight(source, out, first)
        else:
            for index in range(first, count):
                one(source, out, index)

    return kernel, (source_element.pointer, out_element.pointer, i64), {"threads": THREADS}


def _convert(source_element, out_element) -> tuple[Callable, Callable]:
    """Device functions that convert eight elements, and one."""
    fetch8, unpack8, load = source_element.fetch8, source_element.unpack8, source_element.load
    store8, store = out_element.store8, out_element.store
    word_count = source_element.words

    @device
    def eight(source, out, index):
        words = cuda.local.array(word_count, np.uint32)
        values = cuda.local.array(RUN, np.float32)
        fetch8(source, index, words, 0)
        unpack8(words, 0, values, 0)
        store8(out, index, values, 0, np.uint32(0))

    @device
    def one(source, out, index):
        store(out, index, load(source, index))

    return eight, one


def _copy(element, _same) -> tuple[Callable, Callable]:
    """Device functions that copy eight elements, and one: a conversion would change the bits of a NaN."""
    accesses = element.words // 4
    per_access = RUN // accesses

    @device
    def eight(source, out, index):
        for i in range(accesses):
            at = index + np.int64(i * per_access)
            a, b, c, d = memory.load128_stream(source, at)
            memory.store128_stream(out, at, a, b, c, d)

    @device
    def one(source, out, index):
        out[index] = source[index]

    return eight, one
