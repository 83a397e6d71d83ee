"""Conversion between floating kinds: exact where it widens, one rounding to nearest even where it narrows."""

from __future__ import annotations

import itertools

import numpy as np

from kernels import warp
from kernels.elements import ELEMENTS, KINDS
from kernels.target import SIMULATOR, cuda, i64, kernel_factory

THREADS = 32 if SIMULATOR else 256
RUN = 8
"""Elements a thread converts: one or two 16-byte accesses on either side."""


@kernel_factory(*itertools.product(KINDS, repeat=2))
def cast(source_kind, out_kind):
    """
    out[i] = round(source[i]). Parameters: source, out, count; both pointers aligned to 16 bytes.

    A thread takes eight neighbours; the last count % 8 are taken one by one.
    """
    source_element, out_element = ELEMENTS[source_kind], ELEMENTS[out_kind]
    fetch8, unpack8, load = source_element.fetch8, source_element.unpack8, source_element.load
    store8, store = out_element.store8, out_element.store
    word_count = source_element.words

    def kernel(source, out, count):
        words = cuda.local.array(word_count, np.uint32)
        values = cuda.local.array(RUN, np.float32)
        first = (warp.block_x() * np.int64(THREADS) + np.int64(warp.thread_index())) * np.int64(RUN)
        if first + np.int64(RUN) <= count:
            fetch8(source, first, words, 0)
            unpack8(words, 0, values, 0)
            store8(out, first, values, 0)
        else:
            for index in range(first, count):
                store(out, index, load(source, index))

    return kernel, (source_element.pointer, out_element.pointer, i64), {"threads": THREADS}
