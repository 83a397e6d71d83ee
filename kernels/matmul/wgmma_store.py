"""What becomes of a warpgroup's sums: the epilogue, one rounding, and the way to memory.

"tma": each warp rounds 16 rows of a chunk of columns into a slot of shared memory and has TMA store it, clipped at the
result's edges, while it goes on with the next slot. "direct": guarded stores of single elements, for results whose
rows TMA cannot address.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from kernels import barrier, bits, wgmma
from kernels.elements import ELEMENTS
from kernels.matmul.epilogue import epilogue
from kernels.target import device
from kernels.warp import sync_warp, thread_index

CHUNK_BYTES = 64
"""Bytes of a row of a slot: what TMA swizzles by, so that the 16-byte units of eight rows fall into all banks."""

WARP_ROWS = 16
SLOTS = 4
SLOT_BYTES = WARP_ROWS * CHUNK_BYTES
STAGING_BYTES = 8 * SLOTS * SLOT_BYTES
"""Shared memory of the eight storing warps."""

_u32 = np.uint32


def chunk_columns(kind: str) -> int:
    """Columns of a slot."""
    return CHUNK_BYTES // (4 if kind == "f32" else 2)


@dataclass(frozen=True)
class Rows:
    """Where a tile's rows lie: device functions.

    ``of_epilogue(row, rows, q)`` is the row that the epilogue's operands have, one of theirs in any case;
    ``send(map, slot, column, row, rows, q)`` stores a slot of 16 rows.
    """

    of_epilogue: Callable
    send: Callable


_send_matrix = barrier.tma_store(2)


@device
def _matrix_row(row, rows, q):
    return min(row, rows - _u32(1))


@device
def _send_rows(tensor_map, slot, column, row, rows, q):
    if row < rows:
        _send_matrix(tensor_map, slot, column, row)


ROWS_OF_A_MATRIX = Rows(_matrix_row, _send_rows)


def tile_store(out_kind: str, tile_columns: int, mode: str, steps: tuple, where: Rows) -> tuple:
    """(pointer type of the result, ``store``, ``finish``).

    ``store(sums, staging, row, column, rows, columns, batch, out, p, q)`` stores a warpgroup's 64 rows; ``out``
    is (map, pointer, first element, row stride). ``finish()`` waits until shared memory may be given up.
    """
    element = ELEMENTS[out_kind]
    if mode == "direct":
        return element.pointer, _direct(element, tile_columns, steps), _nothing
    assert mode == "tma", mode
    return element.pointer, _by_tma(out_kind, tile_columns, steps, where), _finish


@device
def _nothing():
    pass


_wait_all = barrier.tma_store_wait_read(0)


@device
def _finish():
    _wait_all()


@dataclass(frozen=True)
class _Pairs:
    """The epilogue of pairs of neighbouring results: device functions.

    ``fetch(row, column, rows, columns, batch, p, q)`` gives what it reads for one;
    ``finish(a, b, second_a, second_b, words, p)`` gives the pair of two sums and, where there is a gate, of the two
    beside them.
    """

    fetch: Callable
    finish: Callable

    @staticmethod
    def of(steps: tuple, where: Rows) -> _Pairs:
        """Those of an epilogue."""
        last = epilogue(steps)
        fetch_two, two, plain, gated, of_epilogue = last.fetch, last.two, last.plain, last.gated, where.of_epilogue

        @device
        def fetch(row, column, rows, columns, batch, p, q):
            if plain:
                return ()
            row, column = np.int64(of_epilogue(row, rows, q)), np.int64(min(column, columns - _u32(2)))
            if gated:
                return fetch_two(batch, row, column, np.int64(columns), p)
            return fetch_two(batch, row, column, p)

        @device
        def finish(a, b, second_a, second_b, words, p):
            if plain:
                return a, b
            if gated:
                return two(a, b, second_a, second_b, words, p)
            return two(a, b, words, p)

        return _Pairs(fetch, finish)


def _values(tile_columns: int, steps: tuple, first: int, count: int) -> tuple[Callable, Callable]:
    """Primitives for ``count`` sums from ``first`` on, and for those of the tile's other half (no gate: the same)."""
    half = tile_columns // 4 if epilogue(steps).gated else 0
    return wgmma.part_of_sums(tile_columns, first, count), wgmma.part_of_sums(tile_columns, first + half, count)


def _in_order(parts: list[Callable]) -> Callable:
    """A device function that calls several, one after the other, with the same arguments."""

    @device
    def nothing(sums, staging, row, column, rows, columns, batch, out, p, q):
        pass

    chain = nothing
    for part in reversed(parts):
        chain = _before(part, chain)
    return chain


def _before(part: Callable, rest: Callable) -> Callable:
    @device
    def both(sums, staging, row, column, rows, columns, batch, out, p, q):
        part(sums, staging, row, column, rows, columns, batch, out, p, q)
        rest(sums, staging, row, column, rows, columns, batch, out, p, q)

    return both


@dataclass(frozen=True)
class _Chunk:
    """A chunk of columns: device functions.

    ``fetch(row, column, rows, columns, batch, p, q)`` gives what the epilogue reads for it, and
    ``store(sums, staging, row, column, rows, columns, batch, out, p, q, words)`` stores it.
    """

    fetch: Callable
    store: Callable


def _by_tma(kind: str, tile_columns: int, steps: tuple, where: Rows) -> Callable:
    gated = epilogue(steps).gated
    width = chunk_columns(kind)
    result_columns = tile_columns // 2 if gated else tile_columns
    make = _wide_chunk if kind == "f32" else _packed_chunk
    count = result_columns // width
    chunks = [make(kind, tile_columns, steps, i, _slot(i, count), where) for i in range(count)]
    together = max(1, _WORDS // max(1, sum(_WORDS_OF[step[0]] for step in steps if step[0] in _WORDS_OF)))
    return _in_order([_fetched_first(chunks[i : i + together]) for i in range(0, count, together)])


_WORDS_OF = {"bias": 4, "scale_column": 4, "scale_row": 2, "residual": 8}
"""Registers a thread that the operands of a chunk of 32 columns take."""
_WORDS = 48
"""Registers for operands that are on their way."""


def _fetched_first(chunks: list[_Chunk]) -> Callable:
    """A device function that stores several chunks, after asking for all that their epilogues read.

    What makes shared memory visible to TMA waits for loads that are under way, so that asking one chunk ahead would
    wait for memory at every chunk.
    """
    every = functools.reduce(lambda rest, chunk: _joined(chunk, rest), reversed(chunks))
    fetch, store = every.fetch, every.store

    @device
    def part(sums, staging, row, column, rows, columns, batch, out, p, q):
        words = fetch(row, column, rows, columns, batch, p, q)
        store(sums, staging, row, column, rows, columns, batch, out, p, q, words)

    return part


def _joined(chunk: _Chunk, rest: _Chunk) -> _Chunk:
    """Two as one."""
    fetch_one, fetch_rest, store_one, store_rest = chunk.fetch, rest.fetch, chunk.store, rest.store

    @device
    def fetch(row, column, rows, columns, batch, p, q):
        words = fetch_one(row, column, rows, columns, batch, p, q)
        return words, fetch_rest(row, column, rows, columns, batch, p, q)

    @device
    def store(sums, staging, row, column, rows, columns, batch, out, p, q, words):
        store_one(sums, staging, row, column, rows, columns, batch, out, p, q, words[0])
        store_rest(sums, staging, row, column, rows, columns, batch, out, p, q, words[1])

    return _Chunk(fetch, store)


@device
def _first_row(row):
    """A warp's first row of its warpgroup's."""
    return _u32(row + (_u32(thread_index() >> _u32(5)) & _u32(3)) * _u32(WARP_ROWS))


def _stores_since(number: int, count: int) -> int:
    """How many stores a warp has begun since it last used the slot of a chunk, tile after tile of ``count`` chunks."""
    if number >= SLOTS:
        return SLOTS - 1
    last_use = (count - 1 - number) // SLOTS * SLOTS + number
    return count - 1 - last_use + number


def _slot(number: int, count: int) -> Callable:
    """A device function: the warp's slot for a chunk, free to be written."""
    own, wait_slot = _u32(number % SLOTS * SLOT_BYTES), barrier.tma_store_wait_read(_stores_since(number, count))

    @device
    def slot(staging):
        thread = thread_index()
        warp = _u32((thread >> _u32(5)) - _u32(4))
        if thread & _u32(31) == _u32(0):
            wait_slot()
        sync_warp()
        return _u32(staging + warp * _u32(SLOTS * SLOT_BYTES) + own)

    return slot


def _sender(where: Rows) -> Callable:
    """A device function that stores a slot that all lanes have written, unless its columns lie outside the result."""
    send_rows = where.send

    @device
    def send(slot, row, column, rows, columns, out, q):
        barrier.shared_visible_to_tma()
        sync_warp()
        if thread_index() & _u32(31) == _u32(0):
            if column < columns:
                send_rows(out[0], slot, column, row, rows, q)
            barrier.tma_store_commit()

    return send


def _square(fetch_pair: Callable) -> Callable:
    """A device function: what the epilogue reads for the lane's four pairs of a warp's rows and 16 columns."""

    @device
    def fetch(row, column, rows, columns, batch, p, q):
        lane = _u32(thread_index() & _u32(31))
        top, left = _u32(_first_row(row) + (lane >> _u32(2))), _u32(column + ((lane & _u32(3)) << _u32(1)))
        below, right = _u32(top + _u32(8)), _u32(left + _u32(8))
        return (
            fetch_pair(top, left, rows, columns, batch, p, q), fetch_pair(below, left, rows, columns, batch, p, q),
            fetch_pair(top, right, rows, columns, batch, p, q), fetch_pair(below, right, rows, columns, batch, p, q),
        )  # fmt: skip

    return fetch


def _packed_chunk(kind: str, tile_columns: int, steps: tuple, number: int, slot_of: Callable, where: Rows) -> _Chunk:
    """16-bit results: 32 columns, four products' widths, two stmatrix."""
    first_half, second_half = _values(tile_columns, steps, 16 * number, 16)
    pairs, pack, start, send = _Pairs.of(steps, where), bits.PACK[kind], _u32(32 * number), _sender(where)
    fetch_square, finish = _square(pairs.fetch), pairs.finish

    @device
    def fetch(row, column, rows, columns, batch, p, q):
        left = _u32(column + start)
        first = fetch_square(row, left, rows, columns, batch, p, q)
        return first, fetch_square(row, _u32(left + _u32(16)), rows, columns, batch, p, q)

    @device
    def store_quarter(a, b, i, slot, p, words):
        """Sums of 16 columns: values i to i + 7."""
        lane = _u32(thread_index() & _u32(31))
        v0, v1 = finish(a[0], a[1], b[0], b[1], words[0], p)
        v2, v3 = finish(a[2], a[3], b[2], b[3], words[1], p)
        v4, v5 = finish(a[4], a[5], b[4], b[5], words[2], p)
        v6, v7 = finish(a[6], a[7], b[6], b[7], words[3], p)
        line = _u32(lane & _u32(15))
        unit = _u32((_u32(2) * i + (lane >> _u32(4))) ^ ((line >> _u32(1)) & _u32(3)))
        place = _u32(slot + line * _u32(CHUNK_BYTES) + unit * _u32(16))
        barrier.store_matrix(place, pack(v0, v1), pack(v2, v3), pack(v4, v5), pack(v6, v7))

    @device
    def store(sums, staging, row, column, rows, columns, batch, out, p, q, words):
        slot = slot_of(staging)
        a, b = first_half(sums), second_half(sums)
        store_quarter(a[:8], b[:8], _u32(0), slot, p, words[0])
        store_quarter(a[8:], b[8:], _u32(1), slot, p, words[1])
        send(slot, _first_row(row), _u32(column + start), rows, columns, out, q)

    return _Chunk(fetch, store)


def _wide_chunk(kind: str, tile_columns: int, steps: tuple, number: int, slot_of: Callable, where: Rows) -> _Chunk:
    """fp32 results: 16 columns, two products' widths, 8-byte stores."""
    first_half, second_half = _values(tile_columns, steps, 8 * number, 8)
    pairs, start, send = _Pairs.of(steps, where), _u32(16 * number), _sender(where)
    fetch_square, finish = _square(pairs.fetch), pairs.finish

    @device
    def put(slot, line, unit, half, pair):
        place = _u32(slot + line * _u32(CHUNK_BYTES) + (unit ^ ((line >> _u32(1)) & _u32(3))) * _u32(16) + half)
        barrier.shared_store64(place, bits.f32_bits(pair[0]), bits.f32_bits(pair[1]))

    @device
    def fetch(row, column, rows, columns, batch, p, q):
        return fetch_square(row, _u32(column + start), rows, columns, batch, p, q)

    @device
    def store(sums, staging, row, column, rows, columns, batch, out, p, q, words):
        slot = slot_of(staging)
        a, b = first_half(sums), second_half(sums)
        lane = _u32(thread_index() & _u32(31))
        line, across = _u32(lane >> _u32(2)), _u32((lane & _u32(3)) << _u32(1))
        unit, half = _u32(across >> _u32(2)), _u32((across & _u32(2)) << _u32(2))
        put(slot, line, unit, half, finish(a[0], a[1], b[0], b[1], words[0], p))
        put(slot, _u32(line + _u32(8)), unit, half, finish(a[2], a[3], b[2], b[3], words[1], p))
        put(slot, line, _u32(unit + _u32(2)), half, finish(a[4], a[5], b[4], b[5], words[2], p))
        put(slot, _u32(line + _u32(8)), _u32(unit + _u32(2)), half, finish(a[6], a[7], b[6], b[7], words[3], p))
        send(slot, _first_row(row), _u32(column + start), rows, columns, out, q)

    return _Chunk(fetch, store)


def _direct(element, tile_columns: int, steps: tuple) -> Callable:
    last = epilogue(steps)
    result_columns = tile_columns // 2 if last.gated else tile_columns
    return _in_order([_direct_part(element, tile_columns, steps, i) for i in range(result_columns // 8)])


def _direct_part(element, tile_columns: int, steps: tuple, number: int) -> Callable:
    """Eight columns, guarded one by one."""
    last = epilogue(steps)
    gated, one, store_one = last.gated, last.one, element.store
    first_half, second_half = _values(tile_columns, steps, 4 * number, 4)
    start = _u32(8 * number)

    @device
    def put(value, second, row, column, rows, columns, batch, out, p, q):
        if row < rows and column < columns:
            if gated:
                value = one(value, second, batch, np.int64(row), np.int64(column), np.int64(columns), p)
            else:
                value = one(value, batch, np.int64(row), np.int64(column), p)
            store_one(out[1], out[2] + np.int64(row) * out[3] + np.int64(column), value)

    @device
    def part(sums, staging, row, column, rows, columns, batch, out, p, q):
        thread = thread_index()
        lane, warp = _u32(thread & _u32(31)), _u32((thread >> _u32(5)) & _u32(3))
        top = _u32(row + warp * _u32(WARP_ROWS) + (lane >> _u32(2)))
        left = _u32(column + start + ((lane & _u32(3)) << _u32(1)))
        below, right = _u32(top + _u32(8)), _u32(left + _u32(1))
        a, b = first_half(sums), second_half(sums)
        put(a[0], b[0], top, left, rows, columns, batch, out, p, q)
        put(a[1], b[1], top, right, rows, columns, batch, out, p, q)
        put(a[2], b[2], below, left, rows, columns, batch, out, p, q)
        put(a[3], b[3], below, right, rows, columns, batch, out, p, q)

    return part
