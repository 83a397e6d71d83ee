"""A low-rank product on tensor cores, as a part of a weight tile: left [rows, rank] @ right [rank, columns].

A warp owns 16 rows and all columns of its tile, in groups of 32. The columns of ``right`` are permuted on their
way into shared memory, so that lane 4 g + t ends up with eight neighbouring results, columns 8 t to 8 t + 7 of
a group, for rows g and g + 8: the base then moves in 16-byte accesses without a shuffle.

Factors of other kinds than the tensor core's are split into exact bf16 parts (bf16 1, fp16 2, fp32 3 parts of 8 bits);
products of parts below 2**-24 of the whole are left out. A pair of fp16 factors uses the fp16 instruction.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np

from kernels import bits, memory, tensor_core
from kernels.elements import ELEMENTS
from kernels.target import cuda, device

_PARTS = {"bf16": 1, "f16": 2, "f32": 3}
STEP = 16
MAX_HELD_WORDS = 48
MAX_FETCHED_WORDS = 32


def parts_of(left: str, right: str) -> tuple[int, int]:
    """How many 16-bit parts each factor is split into."""
    return (1, 1) if left == right == "f16" else (_PARTS[left], _PARTS[right])


def shared_elements(left: str, right: str, steps: int, columns: int) -> int:
    """16-bit elements of shared memory for a right factor of ``steps`` * 16 ranks."""
    return parts_of(left, right)[1] * steps * STEP * columns


def held_words(left: str, right: str, steps: int) -> int:
    """Registers for the left factor; 0 where there would be too many and each use loads it again."""
    words = 4 * steps * parts_of(left, right)[0]
    return words if words <= MAX_HELD_WORDS else 0


def part_pairs(left: str, right: str) -> tuple[tuple[int, int], ...]:
    """Which parts are multiplied, smallest products first."""
    left_parts, right_parts = parts_of(left, right)
    pairs = [(i, j) for i in range(left_parts) for j in range(right_parts) if i + j <= 2]
    return tuple(sorted(pairs, key=lambda pair: -sum(pair)))


Product = tuple
"""(left kind, right kind, steps of 16 ranks, left is [rows, rank] with an even rank, the rank fills its steps)."""


@dataclass(frozen=True)
class Tile:
    """16 * warps rows by 32 * groups columns; ``ragged`` where weights are not whole tiles.

    ``parked``: the base waits in shared memory instead of registers.
    """

    warps: int
    groups: int
    ragged: bool
    parked: bool


@functools.cache
def product(spec: Product, tile: Tile, shared_at: int, held_at: int, at: int) -> SimpleNamespace:
    """Device functions of one product whose parameters start at ``at``: left, right, rank, strides of left's row and
    rank and of right's rank.

    ``stage(p, shared, column0, columns, thread)`` brings the right factor to shared memory.
    ``hold(p, held, row, rows, lane)`` brings the left factor of the lane's rows to registers.
    ``multiply(p, shared, held, result, group, row, rows, lane)`` writes the lane's 16 results of a group: 8 of ``row``,
    8 of ``row + 8``.
    """
    left, right, steps, paired, full = spec
    groups = tile.groups
    native_f16 = left == right == "f16"
    pack = bits.pack_f16 if native_f16 else bits.pack_bf16
    left_parts, right_parts = parts_of(left, right)
    i_left, i_right, i_rank, i_row, i_step, i_next = range(at, at + 6)
    fragment = _left_fragment(left, pack, left_parts, paired, full, tile.ragged, (i_left, i_rank, i_row, i_step))
    columns_of_tile = 32 * groups
    swizzle = np.uint32(min(columns_of_tile // 8, 8) - 1)
    plane = steps * STEP * columns_of_tile
    multiply_parts = _multiply_nothing
    for left_part, right_part in part_pairs(left, right):
        multiply_parts = _multiply_part(
            multiply_parts,
            tensor_core.mma_f16 if native_f16 else tensor_core.mma_bf16,
            4 * left_part,
            shared_at + right_part * plane,
        )
    holds = held_words(left, right, steps) > 0
    step_words = 4 * left_parts

    @device
    def hold(p, held, row, rows, lane):
        if holds:
            for step in range(steps):
                fragment(p, held, held_at + step_words * step, row, rows, lane, step)

    @device
    def multiply(p, shared, held, result, group, row, rows, lane):
        for i in range(16):
            result[i] = np.float32(0)
        row_in_step = np.uint32((lane & np.uint32(7)) + (lane & np.uint32(8)))
        words = held if holds else cuda.local.array(step_words, np.uint32)
        for step in range(steps):
            if holds:
                words_at = held_at + step_words * step
            else:
                words_at = 0
                fragment(p, words, 0, row, rows, lane, step)
            k = np.uint32(np.uint32(step * STEP) + row_in_step)
            for pair in range(2):
                unit = np.uint32(np.uint32(group * 4 + 2 * pair) + (lane >> np.uint32(4)))
                shared_row = np.uint32(k * np.uint32(columns_of_tile) + (unit ^ (k & swizzle)) * np.uint32(8))
                multiply_parts(shared, np.int64(shared_row), words, words_at, result, pair)

    stage = _stage(right, right_parts, pack, steps, full, tile, shared_at, (i_right, i_rank, i_next))
    return SimpleNamespace(stage=stage, hold=hold, multiply=multiply)


@device
def _multiply_nothing(shared, shared_row, words, words_at, result, pair):
    pass


def _multiply_part(rest: Callable, mma: Callable, left_at: int, right_at: int) -> Callable:
    """``rest``, then the product of one part of each factor for two of a group's four 8-column tiles."""

    @device
    def multiply(shared, shared_row, words, words_at, result, pair):
        rest(shared, shared_row, words, words_at, result, pair)
        b = tensor_core.ldmatrix_transposed(shared, right_at + shared_row)
        a = words_at + left_at
        for half in range(2):
            i = 4 * pair + 2 * half
            c = mma(
                words[a], words[a + 1], words[a + 2], words[a + 3], b[2 * half], b[2 * half + 1],
                result[i], result[i + 1], result[i + 8], result[i + 9],
            )  # fmt: skip
            result[i] = c[0]
            result[i + 1] = c[1]
            result[i + 8] = c[2]
            result[i + 9] = c[3]

    return multiply


def _left_fragment(
    kind: str, pack: Callable, parts: int, paired: bool, full: bool, ragged: bool, positions: tuple[int, ...]
) -> Callable:
    """The lane's part of 16 rows by 16 ranks, split and packed.

    Rows and ranks outside the factor read the last one inside instead: those rows are never stored, and right's rows
    beyond the rank are zero.
    """
    i_left, i_rank, i_row, i_step = positions
    element = ELEMENTS[kind]
    load, is_packed = element.load, element.words == 4 and parts == 1
    width = 2 if paired else 1

    @device
    def inside(k, p):
        return k if full else min(k, p[i_rank] - np.int64(width))

    @device
    def fragment(p, words, at, row, rows, lane, step):
        first_k = np.int64(step * STEP) + np.int64((lane & np.uint32(3)) * np.uint32(2))
        for half in range(2):
            o = row + np.int64(8 * half)
            if ragged:
                o = min(o, rows - np.int64(1))
            row_at = o * p[i_row]
            for side in range(2):
                register = half + 2 * side
                k = first_k + np.int64(8 * side)
                if paired:
                    index = row_at + inside(k, p)
                    next_index = index + np.int64(1)
                else:
                    index = row_at + inside(k, p) * p[i_step]
                    next_index = row_at + inside(k + np.int64(1), p) * p[i_step]
                if paired and is_packed:
                    words[at + register] = memory.load32(p[i_left], index)
                else:
                    low = load(p[i_left], index)
                    high = load(p[i_left], next_index)
                    for part in range(parts):
                        words[at + 4 * part + register] = pack(low, high)
                        if part + 1 < parts:
                            low = low - bits.bf16_to_f32(bits.f32_to_bf16(low))
                            high = high - bits.bf16_to_f32(bits.f32_to_bf16(high))

    return fragment


def _stage(
    kind: str,
    parts: int,
    pack: Callable,
    steps: int,
    full: bool,
    tile: Tile,
    shared_at: int,
    positions: tuple[int, ...],
) -> Callable:
    """Copy the right factor's columns of a tile to shared memory: permuted, split into parts, zero beyond the rank."""
    i_right, i_rank, i_next = positions
    element = ELEMENTS[kind]
    fetch8, unpack8, words_of_8 = element.fetch8_cached, element.unpack8, element.words
    columns_of_tile, threads, ragged = 32 * tile.groups, 32 * tile.warps, tile.ragged
    chunks_in_row = columns_of_tile // 8
    swizzle = np.uint32(min(chunks_in_row, 8) - 1)
    chunks = steps * STEP * chunks_in_row
    rounds = -(-chunks // threads)
    even = chunks % (threads * min(rounds, MAX_FETCHED_WORDS // element.words)) == 0
    plane = steps * STEP * columns_of_tile
    as_stored = parts == 1

    @device
    def locate(chunk):
        return np.uint32(chunk // np.uint32(chunks_in_row)), np.uint32(chunk % np.uint32(chunks_in_row))

    @device
    def fetch(p, column0, columns, chunk, words, at):
        k, place = locate(chunk)
        column = column0 + np.int64(place * np.uint32(8))
        if ragged:
            column = min(column, columns - np.int64(8))
        row = np.int64(k) if full else min(np.int64(k), p[i_rank] - np.int64(1))
        fetch8(p[i_right], row * p[i_next] + column, words, at)
        if not full and np.int64(k) >= p[i_rank]:
            for i in range(words_of_8):
                words[at + i] = np.uint32(0)

    @device
    def put(shared, chunk, words, at, values):
        k, place = locate(chunk)
        if not as_stored:
            unpack8(words, at, values, 0)
        base = np.uint32(k * np.uint32(columns_of_tile) + (place & np.uint32(3)) * np.uint32(2))
        first_unit = np.uint32((place >> np.uint32(2)) * np.uint32(4))
        for part in range(parts):
            for j in range(4):
                unit = np.uint32((first_unit + np.uint32(j)) ^ (k & swizzle))
                index = shared_at + part * plane + np.int64(np.uint32(base + unit * np.uint32(8)))
                if as_stored:
                    memory.shared_store32(shared, index, words[at + j])
                else:
                    low, high = values[2 * j], values[2 * j + 1]
                    memory.shared_store32(shared, index, pack(low, high))
                    values[2 * j] = low - bits.bf16_to_f32(bits.f32_to_bf16(low))
                    values[2 * j + 1] = high - bits.bf16_to_f32(bits.f32_to_bf16(high))

    at_once = min(rounds, MAX_FETCHED_WORDS // words_of_8)
    fetched_words = at_once * words_of_8

    @device
    def stage(p, shared, column0, columns, thread):
        words = cuda.local.array(fetched_words, np.uint32)
        values = cuda.local.array(8, np.float32)
        for first in range(0, rounds, at_once):
            for turn in range(at_once):
                chunk = np.uint32(thread + np.uint32((first + turn) * threads))
                if even or chunk < np.uint32(chunks):
                    fetch(p, column0, columns, chunk, words, turn * words_of_8)
            for turn in range(at_once):
                chunk = np.uint32(thread + np.uint32((first + turn) * threads))
                if even or chunk < np.uint32(chunks):
                    put(shared, chunk, words, turn * words_of_8, values)

    return stage
