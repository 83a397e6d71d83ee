"""Rows or elements chosen by an index, and gradients of what was chosen from.

Rows' gradients are added up without atomic sums: places of the index are sorted by the rows that they name, so that a
row's sum belongs to one thread for each column, and the index alone decides its order.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np

from kernels import bits, memory, warp
from kernels.barrier import early_options, entrance
from kernels.elements import ELEMENTS
from kernels.movement import BYTES, THREADS, WORDS
from kernels.target import SIMULATOR, cuda, device, f32p, i32p, i64, i64p, kernel_factory, types

ACCESSES = 4
"""Accesses of a thread that are under way together."""
RANGE = 64 if SIMULATOR else 4096
"""Places of an index that are sorted together."""
SEGMENT = 8 if SIMULATOR else 64
"""Places of a row that a thread adds up, where columns are too few to keep the device busy with a row of many."""
FEW_COLUMNS = 2**10 if SIMULATOR else 2**17
SEEKERS = 8
"""Threads that find the rank of a place."""
INDICES = {"i32": i32p, "i64": i64p}


@device
def _coordinates(index, chosen, inner):
    """Index of [outer, chosen, inner] as (outer, j, i)."""
    line = np.uint32(index) // np.uint32(inner)
    i = np.uint32(index) - line * np.uint32(inner)
    slab = line // np.uint32(chosen)
    return np.int64(slab), np.int64(line - slab * np.uint32(chosen)), np.int64(i)


@kernel_factory(("bf16", "i32", False), ("f32", "i64", True))
def take(kind, index_kind, elementwise, early=False):
    """out[o, j, i] = source[o, index[j], i], or with index[o, j, i]; fill where the index is outside of 0..n-1.

    Parameters: source, index, out, fill, n, chosen, inner, count = outer * chosen * inner, below 2**32.
    """
    pointer, fill_type, convert = WORDS[kind]
    enter = entrance(early, any_size=True)

    def kernel(source, index, out, fill, n, chosen, inner, count):
        enter()
        at = warp.block_x() * np.int64(THREADS) + np.int64(warp.thread_index())
        if at < count:
            slab, j, i = _coordinates(at, chosen, inner)
            from_row = np.int64(index[at if elementwise else j])
            if from_row >= 0 and from_row < n:
                out[at] = source[(slab * n + from_row) * inner + i]
            else:
                out[at] = convert(fill)

    return (
        kernel,
        (pointer, INDICES[index_kind], pointer, fill_type, i64, i64, i64, i64),
        {"threads": THREADS} | early_options(early),
    )


@kernel_factory(("bf16", "i32"), ("i64", "i64"))
def take_rows(kind, index_kind, early=False):
    """out[o, j] = source[o, index[j]], rows of whole 16-byte accesses; words of ``fill`` where the index is outside.

    Parameters: source, index, out, fill, n (at least 1), chosen, inner and count = outer * chosen * inner in accesses,
    count below 2**32. Source and out are aligned to 16 bytes.
    """
    pointer = WORDS[kind][0]
    step = 16 // BYTES[kind]
    run = 4 * ACCESSES
    enter = entrance(early, any_size=True)

    def kernel(source, index, out, fill, n, chosen, inner, count):
        enter()
        words = cuda.local.array(run, np.uint32)
        rows = cuda.local.array(ACCESSES, np.int64)
        places = cuda.local.array(ACCESSES, np.int64)
        first = warp.block_x() * np.int64(THREADS * ACCESSES) + np.int64(warp.thread_index())
        for k in range(ACCESSES):
            slab, j, i = _coordinates(min(first + np.int64(k * THREADS), count - np.int64(1)), chosen, inner)
            rows[k] = np.int64(index[j])
            places[k] = slab * n * inner + i
        for k in range(ACCESSES):
            row = rows[k] if rows[k] >= np.int64(0) and rows[k] < n else np.int64(0)
            a, b, c, d = memory.load128_stream(source, (places[k] + row * inner) * np.int64(step))
            words[4 * k] = a
            words[4 * k + 1] = b
            words[4 * k + 2] = c
            words[4 * k + 3] = d
        for k in range(ACCESSES):
            at = first + np.int64(k * THREADS)
            if at < count:
                if rows[k] < np.int64(0) or rows[k] >= n:
                    memory.store128_stream(out, at * np.int64(step), fill, fill, fill, fill)
                else:
                    memory.store128_stream(
                        out, at * np.int64(step), words[4 * k], words[4 * k + 1], words[4 * k + 2], words[4 * k + 3]
                    )

    index = INDICES[index_kind]
    return (
        kernel,
        (pointer, index, pointer, types.uint32, i64, i64, i64, i64),
        {"threads": THREADS} | early_options(early),
    )


@kernel_factory(("i32",), ("i64",))
def sort_places(index_kind, early=False):
    """Places of an index in the order of the rows that they name, those of a row in their own; one outside names row n.

    By rank: a place comes after as many others as it is larger than. Parameters: index, sorted, first, count, n. Of
    ``count`` places from ``first`` on, RANGE at most, ``sorted`` gets rows, places, and where the places of the same
    row end, RANGE of each. A block takes THREADS / SEEKERS places.
    """
    pointer = INDICES[index_kind]
    steps = SEEKERS.bit_length() - 1
    enter = entrance(early, any_size=True)

    def kernel(index, out, first, count, n):
        enter()
        rows = cuda.shared.array(RANGE, np.int32)
        thread = np.int64(warp.thread_index())
        for at in range(thread, count, THREADS):
            row = np.int64(index[first + at])
            rows[at] = np.int32(row if row >= np.int64(0) and row < n else n)
        warp.block_barrier()
        place = warp.block_x() * np.int64(THREADS // SEEKERS) + thread // np.int64(SEEKERS)
        own = rows[min(place, count - np.int64(1))]
        before, end = np.int32(0), np.int32(0)
        for at in range(thread % np.int64(SEEKERS), count, SEEKERS):
            other = rows[at]
            if other < own or (other == own and at < place):
                before = np.int32(before + np.int32(1))
            if other <= own:
                end = np.int32(end + np.int32(1))
        ranks, ends = np.float32(before), np.float32(end)
        for shift in range(steps):
            ranks += warp.shuffle_xor(ranks, np.uint32(np.uint32(1) << np.uint32(shift)))
            ends += warp.shuffle_xor(ends, np.uint32(np.uint32(1) << np.uint32(shift)))
        if place < count and thread % np.int64(SEEKERS) == np.int64(0):
            rank = np.int64(ranks)
            out[rank] = own
            out[np.int64(RANGE) + rank] = np.int32(first + place)
            out[np.int64(2 * RANGE) + rank] = np.int32(ends)

    return kernel, (pointer, i32p, i64, i64, i64), {"threads": THREADS} | early_options(early)


@functools.cache
def _row_access(kind: str, width: int) -> tuple[Callable, Callable, Callable, int]:
    """``hold(pointer, at, words, slot)``, ``add(words, slot, sums)`` and ``put(pointer, at, sums)`` of an access."""
    element = ELEMENTS[kind]
    fetch8, unpack8, store8, load = element.fetch8, element.unpack8, element.store8, element.load
    words_of = element.words if width > 1 else 1

    @device
    def hold(pointer, at, words, slot):
        if width > 1:
            fetch8(pointer, at, words, slot * words_of)
        else:
            words[slot] = bits.f32_bits(load(pointer, at))

    @device
    def add(words, slot, sums):
        values = cuda.local.array(width, np.float32)
        if width > 1:
            unpack8(words, slot * words_of, values, 0)
        else:
            values[0] = bits.bits_f32(words[slot])
        for k in range(width):
            sums[k] += values[k]

    @device
    def put(pointer, at, sums):
        if width > 1:
            store8(pointer, at, sums, 0, np.uint32(0))
        else:
            pointer[at] = sums[0]

    return hold, add, put, words_of


@device
def _begins(rows, place):
    """Whether a place of the sorted ones is the first of its row."""
    return place == np.int64(0) or rows[max(place - np.int64(1), np.int64(0))] != rows[place]


@kernel_factory(("bf16", 8), ("f32", 1), ("f16", 1))
def add_rows(kind, width, early=False):
    """d_source[o, row, i] += sum of g[o, place, i] over the row's places, up to the next multiple of ``segment``.

    What later segments of a row add up to goes to ``parts`` [segments, outer * inner]. Parameters: sorted, g, d_source,
    parts, n, chosen, inner and units = outer * inner in accesses, count of places, segment, threads of a place; the
    grid: units over threads, places over THREADS / threads.
    """
    hold, add, _, words_of = _row_access(kind, width)
    hold32, add32, put32, words_of32 = _row_access("f32", width)
    held = words_of * ACCESSES
    enter = entrance(early, any_size=True)

    def kernel(ordered, g, out, parts, n, chosen, inner, units, count, segment, team):
        enter()
        words = cuda.local.array(held, np.uint32)
        sums = cuda.local.array(width, np.float32)
        old = cuda.local.array(words_of32, np.uint32)
        thread = np.uint32(warp.thread_index())
        group = np.uint32(thread // np.uint32(team))
        lane = np.uint32(thread - group * np.uint32(team))
        place = warp.block_y() * np.int64(np.uint32(THREADS) // np.uint32(team)) + np.int64(group)
        unit = warp.block_x() * team + np.int64(lane)
        if place >= count or unit >= units:
            return
        row, begins = np.int64(ordered[place]), _begins(ordered, place)
        number = np.int64(np.uint32(place) // np.uint32(segment))
        if row >= n or not (begins or place == number * segment):
            return
        slab = np.int64(np.uint32(unit) // np.uint32(inner))
        i = unit - slab * inner
        end = min(np.int64(ordered[np.int64(2 * RANGE) + place]), (number + np.int64(1)) * segment)
        for k in range(width):
            sums[k] = np.float32(0)
        for at in range(place, end, ACCESSES):
            for k in range(ACCESSES):
                if at + np.int64(k) < end:
                    j = np.int64(ordered[np.int64(RANGE) + at + np.int64(k)])
                    hold(g, ((slab * chosen + j) * inner + i) * np.int64(width), words, k)
            for k in range(ACCESSES):
                if at + np.int64(k) < end:
                    add(words, k, sums)
        if begins:
            to = ((slab * n + row) * inner + i) * np.int64(width)
            hold32(out, to, old, 0)
            add32(old, 0, sums)
            put32(out, to, sums)
        else:
            put32(parts, (number * units + unit) * np.int64(width), sums)

    pointers = (i32p, ELEMENTS[kind].pointer, f32p, f32p)
    return kernel, (*pointers, i64, i64, i64, i64, i64, i64, i64), {"threads": THREADS} | early_options(early)


@kernel_factory((8,), (1,))
def add_parts(width, early=False):
    """d_source[o, row, i] += the sums of a row's segments after its first, in their order.

    Parameters: sorted, d_source, parts, n, inner and units in accesses, count of places, segment, threads of a segment;
    the grid: units over threads, segments over THREADS / threads.
    """
    hold, add, put, words_of = _row_access("f32", width)
    enter = entrance(early, any_size=True)

    def kernel(ordered, out, parts, n, inner, units, count, segment, team):
        enter()
        words = cuda.local.array(words_of, np.uint32)
        sums = cuda.local.array(width, np.float32)
        thread = np.uint32(warp.thread_index())
        group = np.uint32(thread // np.uint32(team))
        lane = np.uint32(thread - group * np.uint32(team))
        number = warp.block_y() * np.int64(np.uint32(THREADS) // np.uint32(team)) + np.int64(group)
        unit, place = warp.block_x() * team + np.int64(lane), number * segment
        if number == np.int64(0) or place >= count or unit >= units:
            return
        row, before = np.int64(ordered[place]), place - segment - np.int64(1)
        # The first later segment of a row adds up all of them.
        later = before >= np.int64(0) and np.int64(ordered[max(before, np.int64(0))]) == row
        if row >= n or _begins(ordered, place) or later:
            return
        slab = np.int64(np.uint32(unit) // np.uint32(inner))
        to = ((slab * n + row) * inner + unit - slab * inner) * np.int64(width)
        for k in range(width):
            sums[k] = np.float32(0)
        for part in range(number, number + np.int64(RANGE)):
            if part * segment >= np.int64(ordered[np.int64(2 * RANGE) + place]):
                break
            hold(parts, (part * units + unit) * np.int64(width), words, 0)
            add(words, 0, sums)
        hold(out, to, words, 0)
        add(words, 0, sums)
        put(out, to, sums)

    return kernel, (i32p, f32p, f32p, i64, i64, i64, i64, i64, i64), {"threads": THREADS} | early_options(early)


@kernel_factory(("bf16", "i32"), ("f32", "i64"))
def gather_backward(kind, index_kind, early=False):
    """d_source[o, index[o, j, i], i] += g[o, j, i], one thread for all j of an (o, i), in their order; fp32.

    ``d_source`` is zero beforehand. Parameters: index, g, d_source, n, chosen, inner, count = outer * inner.
    """
    load = ELEMENTS[kind].load
    enter = entrance(early, any_size=True)

    def kernel(index, g, out, n, chosen, inner, count):
        enter()
        at = warp.block_x() * np.int64(THREADS) + np.int64(warp.thread_index())
        if at < count:
            slab = np.int64(np.uint32(at) // np.uint32(inner))
            i = at - slab * inner
            for j in range(chosen):
                from_at = (slab * chosen + j) * inner + i
                row = np.int64(index[from_at])
                if row >= np.int64(0) and row < n:
                    to = (slab * n + row) * inner + i
                    out[to] = out[to] + load(g, from_at)

    return (
        kernel,
        (INDICES[index_kind], ELEMENTS[kind].pointer, f32p, i64, i64, i64, i64),
        {"threads": THREADS} | early_options(early),
    )
