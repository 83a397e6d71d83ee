"""Expressions over tensors of which some lie across: their neighbours are not the result's, as of a transposed matrix.

A block takes a tile of the two axes, rows along which such operands' neighbours lie, and columns along which the
others' do. It reads tiles of operands that lie across in 16-byte accesses along their rows, and turns them round in
shared memory; a thread then has eight neighbouring columns of two rows. Groups of eight columns lie in shared memory
with their 16-byte pieces in another order each, so that neither side meets itself in a bank.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from kernels import memory, warp
from kernels.barrier import early_options, entrance
from kernels.elements import ELEMENTS
from kernels.expression import column, evaluator, offsets, written
from kernels.pointwise import RUN, keep, pointers, store_groups
from kernels.target import SIMULATOR, cuda, device, f32, i64, kernel_factory, types

THREADS = 32 if SIMULATOR else 256
TILE = 64
"""Rows and columns of a tile."""
_CHUNKS = TILE // RUN
_UNITS = TILE // 2 * _CHUNKS
"""Pairs of rows by groups of eight columns."""

_ADD = (2, (("add", 0, 1),), (2,))


class Turn(NamedTuple):
    """A tile of an operand that lies across: from global memory to registers, on to shared memory, and out of it."""

    fetch: Callable
    park: Callable
    pick: Callable
    words: int
    cells: int


@functools.cache
def turn_of(kind: str) -> Turn:
    """``fetch(pointer, at, step, rows, columns, thread, words, slot)``, ``park(shared, cell, thread, words, slot)``,
    and ``pick(shared, cell, pair, chunk, values, to)``: eight columns of a row to ``to``, of the next one behind.

    Words of a thread and 32-bit cells of a tile; ``rows`` and ``columns`` are how many there are.
    """
    unpack8, wide = ELEMENTS[kind].unpack8, ELEMENTS[kind].words == 8
    piece = 4 if wide else 8
    pieces, pitch = TILE // piece, TILE if wide else TILE // 2
    rounds = TILE * pieces // THREADS

    @device
    def cell_of(line, number):
        """Where a line's 16-byte piece lies."""
        other = np.uint32(number ^ np.uint32(np.uint32(line >> np.uint32(3)) & np.uint32(7)))
        return np.uint32(np.uint32(line * np.uint32(pitch)) + np.uint32(other * np.uint32(4)))

    @device
    def fetch(pointer, at, step, rows, columns, thread, words, slot):
        for k in range(rounds):
            unit = np.uint32(thread + np.uint32(k * THREADS))
            line, number = np.uint32(unit // np.uint32(pieces)), np.uint32(unit % np.uint32(pieces))
            row = np.int64(np.uint32(number * np.uint32(piece)))
            if np.int64(line) < columns and row < rows:
                a, b, c, d = memory.load128_stream(pointer, at + np.int64(line) * step + row)
                words[slot + 4 * k] = a
                words[slot + 4 * k + 1] = b
                words[slot + 4 * k + 2] = c
                words[slot + 4 * k + 3] = d

    @device
    def park(shared, cell, thread, words, slot):
        for k in range(rounds):
            unit = np.uint32(thread + np.uint32(k * THREADS))
            to = cell_of(np.uint32(unit // np.uint32(pieces)), np.uint32(unit % np.uint32(pieces)))
            a, b, c, d = words[slot + 4 * k], words[slot + 4 * k + 1], words[slot + 4 * k + 2], words[slot + 4 * k + 3]
            memory.shared_store128(shared, np.int64(np.uint32(np.uint32(cell) + to)), a, b, c, d)

    @device
    def pick(shared, cell, pair, chunk, values, to):
        raw, two = cuda.local.array(8, np.uint32), cuda.local.array(8, np.float32)
        for k in range(RUN):
            line = np.uint32(np.uint32(chunk * np.uint32(RUN)) + np.uint32(k))
            if wide:
                at = np.uint32(cell_of(line, np.uint32(pair >> np.uint32(1))) + np.uint32(np.uint32(pair & 1) * 2))
                raw[0], raw[1] = memory.shared_load64(shared, np.int64(np.uint32(np.uint32(cell) + at)))
            else:
                at = np.uint32(cell_of(line, np.uint32(pair >> np.uint32(2))) + np.uint32(pair & np.uint32(3)))
                raw[0] = shared[np.int64(np.uint32(np.uint32(cell) + at))]
            unpack8(raw, 0, two, 0)
            values[to + k] = two[0]
            values[to + RUN + k] = two[1]

    return Turn(fetch, park, pick, 4 * rounds, TILE * pitch)


class _Places(NamedTuple):
    """What stands where: words of registers, cells of shared memory."""

    words: tuple[int, ...]
    cells: tuple[int, ...]
    all_words: int
    all_cells: int


def _places(ins: tuple[str, ...], ways: tuple[str, ...]) -> _Places:
    words, cells, word, cell = [], [], 0, 0
    for kind, way in zip(ins, ways, strict=True):
        words.append(word)
        cells.append(cell)
        if way == "across":
            word, cell = word + turn_of(kind).words, cell + turn_of(kind).cells
    return _Places(tuple(words), tuple(cells), max(1, word), max(4, cell))


def shared_bytes(ins: tuple[str, ...], ways: tuple[str, ...]) -> int:
    """Shared memory of a block."""
    return 4 * _places(ins, ways).all_cells


def _movers(ins: tuple[str, ...], ways: tuple[str, ...]) -> tuple[Callable, Callable, Callable, Callable]:
    """Device functions over all operands: fetch and park tiles, pick two rows' values, and complete those of a row."""
    known, fetches, parks, picks, rows = {"float32": np.float32}, [], [], [], []
    places, count = _places(ins, ways), len(ins)
    for i, (kind, way) in enumerate(zip(ins, ways, strict=True)):
        element, turn = ELEMENTS[kind], turn_of(kind)
        if way == "across":
            known |= {f"fetch{i}": turn.fetch, f"park{i}": turn.park, f"pick{i}": turn.pick}
            at = f"sources[{i}], bases[{i}], steps[{i}], rows, columns, thread, words, {places.words[i]}"
            fetches.append(f"fetch{i}({at})")
            parks.append(f"park{i}(shared, {places.cells[i]}, thread, words, {places.words[i]})")
            picks.append(f"pick{i}(shared, {places.cells[i]}, pair, chunk, pairs, {2 * i * RUN})")
            rows += [f"for j in range({RUN}):", f"    values[{i * RUN} + j] = pairs[{2 * i * RUN} + {RUN} * half + j]"]
        elif way == "along":
            known |= {f"fetch{i}": element.fetch8, f"unpack{i}": element.unpack8}
            rows += [f"fetch{i}(sources[{i}], bases[{i}] + row * steps[{i}] + column, loaded, 0)"]
            rows.append(f"unpack{i}(loaded, 0, values, {i * RUN})")
        else:
            known[f"load{i}"] = element.load
            rows.append(f"s{i} = load{i}(sources[{i}], bases[{i}] + row * steps[{i}])")
            rows += [f"for j in range({RUN}):", f"    values[{i * RUN} + j] = s{i}"]
    fetch = written("fetch", "sources, bases, steps, rows, columns, thread, words", fetches or ["pass"], known)
    park = written("park", "shared, thread, words", parks or ["pass"], known)
    pick = written("pick", "shared, pair, chunk, pairs", picks or ["pass"], known)
    complete = written("complete", "sources, bases, steps, row, column, half, pairs, loaded, values", rows, known)
    assert count
    return fetch, park, pick, complete


@functools.cache
def _target_places(count: int) -> Callable:
    """A device function: each target's offset of a row and a column of the tile."""
    parts = "".join(f"bases[{i}] + row * steps[{i}] + column, " for i in range(count))
    return written("target_places", "bases, steps, row, column", [f"return ({parts})"], {})


@kernel_factory(
    (_ADD, ("bf16", "bf16"), ("bf16",), ("across", "along"), 2),
    (_ADD, ("f32", "bf16"), ("f32", ), ("across", "repeated"), 3),
)  # fmt: skip
def turned(program, ins, outs, ways, dimensions, early=False):
    """The expression over tiles; a source lies "across", "along" the columns, or is "repeated" along them.

    Parameters: sources, targets, scalars, extents in tiles (rows and columns last), strides in tiles of sources,
    targets, and of the tile's first row and column; steps of sources (from column to column where they lie across,
    else from row to row) and targets; rows, columns. Every access is aligned to 16 bytes. The grid has a block a tile.
    """
    fetch, park, pick, complete = _movers(ins, ways)
    store, evaluate, put = store_groups(outs), evaluator(program), keep(len(outs))
    element_of, target_places = column(len(ins), RUN), _target_places(len(outs))
    places_in, places_out = offsets(dimensions, len(ins)), offsets(dimensions, len(outs))
    origin, enter = offsets(dimensions, 2), entrance(early, any_size=True)
    places, in_count, out_count = _places(ins, ways), len(ins) * RUN, len(outs) * RUN
    all_words, all_cells, pair_count = places.all_words, places.all_cells, 2 * in_count

    def kernel(sources, targets, scalars, extents, strides_in, strides_out, strides_tile, steps_in, steps_out, r, c):
        shared = cuda.shared.array(all_cells, np.uint32, alignment=16)
        words, pairs = cuda.local.array(all_words, np.uint32), cuda.local.array(pair_count, np.float32)
        loaded, values = cuda.local.array(8, np.uint32), cuda.local.array(in_count, np.float32)
        results = cuda.local.array(out_count, np.float32)
        enter()
        thread, tile = np.uint32(warp.thread_index()), warp.block_x()
        bases, bases_out = places_in(tile, extents, strides_in), places_out(tile, extents, strides_out)
        first_row, first_column = origin(tile, extents, strides_tile)
        rows, columns = r - first_row, c - first_column
        fetch(sources, bases, steps_in, rows, columns, thread, words)
        park(shared, thread, words)
        warp.block_barrier()
        for unit in range(np.int64(thread), _UNITS, THREADS):
            chunk, pair = (
                np.uint32(np.uint32(unit) % np.uint32(_CHUNKS)),
                np.uint32(np.uint32(unit) // np.uint32(_CHUNKS)),
            )
            at = np.int64(np.uint32(chunk * np.uint32(RUN)))
            pick(shared, pair, chunk, pairs)
            for half in range(2):
                row = np.int64(np.uint32(np.uint32(pair * np.uint32(2)) + np.uint32(half)))
                if row < rows and at < columns:
                    complete(sources, bases, steps_in, row, at, half, pairs, loaded, values)
                    for j in range(RUN):
                        put(results, j, evaluate(element_of(values, j, scalars)))
                    store(targets, target_places(bases_out, steps_out, row, at), results)

    axes, ins_axes, outs_axes = (types.UniTuple(i64, dimensions * n) for n in (1, len(ins), len(outs)))
    scalars = types.UniTuple(f32, program[0] - len(ins))
    steps = types.UniTuple(i64, len(ins)), types.UniTuple(i64, len(outs))
    parameters = (
        pointers(ins),
        pointers(outs),
        scalars,
        axes,
        ins_axes,
        outs_axes,
        types.UniTuple(i64, 2 * dimensions),
    )
    return kernel, (*parameters, *steps, i64, i64), {"threads": THREADS} | early_options(early)
