"""The right factor of a low-rank product on its way to shared memory, for the tensor core's fragments."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from kernels import bits, memory
from kernels.division import remainder
from kernels.elements import ELEMENTS
from kernels.target import cuda, device

if TYPE_CHECKING:
    from kernels.weight.low_rank_tile import Product, Tile

MAX_FETCHED_WORDS = 32
STEP = 16
"""Ranks that a tensor core multiplies at a time."""
HALF_TILE = 64
"""Columns that a warpgroup's product finds side by side: 128 bytes, the swizzle's width."""


def stage_of(spec: Product, tile: Tile, shared_at: int, at: int, periods: tuple[int, int] | None) -> Callable:
    """``stage(p, shared, column0, columns, thread)``: the right factor's columns of a tile in shared memory.

    Permuted, split into parts, zero beyond the rank.
    """
    _, i_right, i_rank, _, _, i_next = range(at, at + 6)
    i_period = periods[1] if periods else 0
    i_reciprocal = i_period + 2
    periodic, ragged, full, parts = periods is not None, tile.ragged, spec.full, spec.parts[1]
    pack = bits.pack_f16 if spec.native_f16 else bits.pack_bf16
    element = ELEMENTS[spec.right]
    fetch8, unpack8, words_of_8 = element.fetch8_cached, element.unpack8, element.words
    columns_of_tile, threads = tile.columns, 32 * tile.warps
    chunks_in_row = columns_of_tile // 8
    side_by_side = HALF_TILE if tile.wgmma else columns_of_tile
    units, half_tile = side_by_side // 8, spec.ranks * side_by_side
    swizzle, wgmma = np.uint32(min(units, 8) - 1), tile.wgmma
    chunks = spec.ranks * chunks_in_row
    rounds = -(-chunks // threads)
    at_once = min(rounds, MAX_FETCHED_WORDS // words_of_8)
    fetched_words = at_once * words_of_8
    even = chunks % (threads * at_once) == 0
    plane = spec.ranks * columns_of_tile
    as_stored = parts == 1
    by_eight, interleaved = spec.vector == 8, spec.interleaved(tile)

    @device
    def locate(chunk):
        return np.uint32(chunk // np.uint32(chunks_in_row)), np.uint32(chunk % np.uint32(chunks_in_row))

    @device
    def place_of_rank(k):
        """Where the tensor core meets rank k, so that lanes hold neighbouring ranks of left."""
        first, second = np.uint32(k & np.uint32(1)), np.uint32((k >> np.uint32(1)) & np.uint32(1))
        if interleaved:
            first, second = second, first
        odd = np.uint32(first | (second << np.uint32(3)))
        if by_eight:
            lane = np.uint32((k >> np.uint32(3)) & np.uint32(3))
            step = np.uint32((k & np.uint32(~31 & 0xFFFFFFFF)) | ((k & np.uint32(4)) << np.uint32(2)))
        else:
            lane = np.uint32((k >> np.uint32(2)) & np.uint32(3))
            step = np.uint32(k & np.uint32(~15 & 0xFFFFFFFF))
        return np.uint32(step | odd | (lane << np.uint32(1)))

    @device
    def fetch(p, column0, columns, chunk, words, to):
        k, place = locate(chunk)
        column = column0 + np.int64(place * np.uint32(8))
        if ragged:
            column = min(column, columns - np.int64(8))
        if periodic:
            column = np.int64(remainder(column, p[i_period], p[i_reciprocal]))
        row = np.int64(k) if full else min(np.int64(k), p[i_rank] - np.int64(1))
        fetch8(p[i_right], row * p[i_next] + column, words, to)
        if not full and np.int64(k) >= p[i_rank]:
            for i in range(words_of_8):
                words[to + i] = np.uint32(0)

    @device
    def put(shared, chunk, words, source, values):
        rank, place = locate(chunk)
        k = place_of_rank(rank)
        if not as_stored:
            unpack8(words, source, values, 0)
        first_unit = np.uint32((place >> np.uint32(2)) * np.uint32(4))
        base = np.uint32(k * np.uint32(side_by_side) + (place & np.uint32(3)) * np.uint32(2))
        if wgmma:
            base = np.uint32(base + np.uint32(first_unit // np.uint32(units)) * np.uint32(half_tile))
            first_unit = np.uint32(first_unit % np.uint32(units))
        for part in range(parts):
            for j in range(4):
                unit = np.uint32((first_unit + np.uint32(j)) ^ (k & swizzle))
                index = shared_at + part * plane + np.int64(np.uint32(base + unit * np.uint32(8)))
                if as_stored:
                    memory.shared_store32(shared, index, words[source + j])
                else:
                    low, high = values[2 * j], values[2 * j + 1]
                    memory.shared_store32(shared, index, pack(low, high))
                    values[2 * j] = low - bits.bf16_to_f32(bits.f32_to_bf16(low))
                    values[2 * j + 1] = high - bits.bf16_to_f32(bits.f32_to_bf16(high))

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
