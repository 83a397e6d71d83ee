"""Products of attention on tensor cores: scores of two tiles, and what is in registers times a tile.

A block's warps have rows of its tile each: one warp's results of a product, turned to 16-bit pairs in place, are the
left factor of its next product, and nothing passes through shared memory between them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np

from kernels import bits, tensor_core
from kernels.attention.tiles import Tile, in_turn, placer
from kernels.matmul.mma_tile import STEP, UNIT, swizzle
from kernels.target import cuda, device

_u32 = np.uint32


class Fragments:
    """Where ``ldmatrix`` finds 16 lines by 16 columns of a tile: one number a lane, and constants.

    Lane bits say which half of the lines and which half of the columns its 8x8 matrix takes. Places of further columns
    differ in a few bits, or by a constant, as units are swapped within groups; further lines by a constant.
    """

    def __init__(self, width: int, line_bit: int, unit_bit: int) -> None:
        self.width, self.group = width, swizzle(width // UNIT)[1] + 1
        place = placer(width)

        @device
        def anchor(line0, lane):
            half = _u32(_u32(lane >> _u32(line_bit)) & _u32(1))
            line = _u32(_u32(line0 + _u32(half * _u32(8))) + _u32(lane & _u32(7)))
            return place(line, _u32(_u32(lane >> _u32(unit_bit)) & _u32(1)))

        self.anchor = anchor

    def flip(self, step: int) -> int:
        """Bits of the anchor to flip for columns from 16 ``step`` on."""
        return 2 * step % self.group * UNIT

    def ahead(self, block: int, step: int) -> int:
        """Bytes to add for lines from 16 ``block`` on and those columns."""
        return 2 * (STEP * block * self.width + 2 * step // self.group * self.group * UNIT)


def lefts(width: int) -> Fragments:
    """Rows of a left factor, its depth the columns of the tile."""
    return Fragments(width, 3, 4)


def rights(width: int) -> Fragments:
    """Columns of a right factor that are the lines of the tile, its depth the tile's columns."""
    return Fragments(width, 4, 3)


def rights_transposed(width: int) -> Fragments:
    """Columns of a right factor that are those of the tile, its depth the tile's lines."""
    return Fragments(width, 3, 4)


def _pair_multiplier(kind: str, word: int, low: int) -> Callable:
    """``multiply(words, b, sums)``: 16 rows times 16 columns, of depth 16, with the places in the arrays built in."""
    mma = tensor_core.MMA[kind]

    @device
    def multiply(words, b, sums):
        a0, a1, a2, a3 = words[word], words[word + 1], words[word + 2], words[word + 3]
        for half in range(2):
            at = low + 4 * half
            b0, b1 = (b[0], b[1]) if half == 0 else (b[2], b[3])
            c = mma(a0, a1, a2, a3, b0, b1, sums[at], sums[at + 1], sums[at + 2], sums[at + 3])
            sums[at] = c[0]
            sums[at + 1] = c[1]
            sums[at + 2] = c[2]
            sums[at + 3] = c[3]

    return multiply


@functools.cache
def score_multiplier(kind: str, tile: Tile) -> Callable:
    """``multiply(shared, rows_at, columns_at, sums, line0, lane)``: sums += rows columns^T over the width.

    Sums lie as [16-row block][8-column block][4], as ``mma`` wants them.
    """
    row_blocks, steps, pairs = tile.row_blocks, tile.width // STEP, tile.columns // STEP
    left_words, left, right = 4 * row_blocks, lefts(tile.width), rights(tile.width)
    left_anchor, right_anchor = left.anchor, right.anchor

    def of_left(block: int, step: int) -> Callable:
        flip, ahead = left.flip(step), left.ahead(block, step)

        @device
        def load(state):
            shared, left_at, _, words, _ = state
            a0, a1, a2, a3 = tensor_core.ldmatrix_ahead(shared, np.int64(left_at ^ _u32(flip)), _u32(ahead))
            words[4 * block] = a0
            words[4 * block + 1] = a1
            words[4 * block + 2] = a2
            words[4 * block + 3] = a3

        return load

    def of_pair(pair: int, step: int) -> Callable:
        flip, ahead = right.flip(step), right.ahead(pair, step)
        made = [_pair_multiplier(kind, 4 * block, 4 * (block * 2 * pairs + 2 * pair)) for block in range(row_blocks)]
        first, second = made[0], made[-1]

        @device
        def multiply(state):
            shared, _, right_at, words, sums = state
            b = tensor_core.ldmatrix_ahead(shared, np.int64(right_at ^ _u32(flip)), _u32(ahead))
            first(words, b, sums)
            if row_blocks == 2:
                second(words, b, sums)

        return multiply

    steps_in_turn = []
    for step in range(steps):
        steps_in_turn += [of_left(block, step) for block in range(row_blocks)]
        steps_in_turn += [of_pair(pair, step) for pair in range(pairs)]
    every = in_turn(steps_in_turn)

    @device
    def multiply(shared, rows_at, columns_at, sums, line0, lane):
        words = cuda.local.array(left_words, np.uint32)
        left_at = _u32(rows_at + left_anchor(line0, lane))
        right_at = _u32(columns_at + right_anchor(_u32(0), lane))
        every((shared, left_at, right_at, words, sums))

    return multiply


def packer(kind: str, tile: Tile) -> Callable:
    """``pack(sums, words)``: a warp's results [rows, columns] as the left factor of the next product."""
    to_pair, blocks = bits.PACK[kind], tile.columns // 8

    def packed(number: int) -> Callable:
        block, step = divmod(number, blocks // 2)
        at, word = 4 * (block * blocks + 2 * step), 4 * number

        @device
        def pack(state):
            sums, words = state
            for i in range(4):
                words[word + i] = to_pair(sums[at + 2 * i], sums[at + 2 * i + 1])

        return pack

    every = in_turn([packed(number) for number in range(tile.row_blocks * blocks // 2)])

    @device
    def pack(sums, words):
        every((sums, words))

    return pack


def register_multiplier(kind: str, tile: Tile) -> Callable:
    """``multiply(shared, at, words, sums, lane)``: sums [rows, width] += what is packed times lines of a tile."""
    row_blocks, steps, pairs = tile.row_blocks, tile.columns // STEP, tile.width // STEP
    right = rights_transposed(tile.width)
    anchor = right.anchor

    def of_pair(pair: int, step: int) -> Callable:
        flip, ahead = right.flip(pair), right.ahead(step, pair)
        made = [
            _pair_multiplier(kind, 4 * (block * steps + step), 4 * (block * 2 * pairs + 2 * pair))
            for block in range(row_blocks)
        ]
        first, second = made[0], made[-1]

        @device
        def multiply(state):
            shared, right_at, words, sums = state
            b = tensor_core.ldmatrix_transposed_ahead(shared, np.int64(right_at ^ _u32(flip)), _u32(ahead))
            first(words, b, sums)
            if row_blocks == 2:
                second(words, b, sums)

        return multiply

    every = in_turn([of_pair(pair, step) for step in range(steps) for pair in range(pairs)])

    @device
    def multiply(shared, at, words, sums, lane):
        every((shared, _u32(at + anchor(_u32(0), lane)), words, sums))

    return multiply
