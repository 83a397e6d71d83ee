"""What the attention kernels on tensor cores share: tiles in shared memory, products with a factor in registers.

A block's warps have rows of its tile each, as one warp's results of a product, turned to 16-bit pairs in place, are the
left factor of its next product: nothing passes through shared memory between them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from kernels import bits, memory, tensor_core, warp
from kernels.matmul.mma_tile import STEP, UNIT, Operand, place_of, swizzle
from kernels.target import cuda, device, i64, types, u16p

MATRIX = types.Tuple((u16p, i64, i64, i64))
"""Type of a tensor [batch, head, token, width]: it, and elements from a batch, a head, a token to the next."""
POINTER, BATCH, HEAD, TOKEN = range(4)

MMA = {"bf16": tensor_core.mma_bf16, "f16": tensor_core.mma_f16}
PACK = {"bf16": bits.pack_bf16, "f16": bits.pack_f16}
_u32 = np.uint32


@dataclass(frozen=True)
class Tile:
    """Rows that a block keeps, columns that it takes at a time, warps that share the rows, and the padded width."""

    rows: int
    columns: int
    warps: int
    width: int

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 32 * self.warps

    @property
    def rows_of_warp(self) -> int:
        """Rows of a warp's part."""
        return self.rows // self.warps

    @property
    def row_blocks(self) -> int:
        """Groups of 16 rows of a warp's part."""
        return self.rows_of_warp // STEP

    @property
    def row_elements(self) -> int:
        """Elements of a tensor's tile of rows."""
        return self.rows * self.width

    @property
    def column_elements(self) -> int:
        """Elements of a tensor's tile of columns."""
        return self.columns * self.width


def padded(width: int) -> int:
    """A width as tiles have it."""
    return -(-width // STEP) * STEP


def in_turn(steps: Sequence[Callable]) -> Callable:
    """``run(state)``: device functions of one argument, one after the other.

    What a loop over register arrays would do if it were sure to be unrolled: each function has its number built in.
    """
    if len(steps) == 1:
        return steps[0]
    middle = len(steps) // 2
    return _then(in_turn(steps[:middle]), in_turn(steps[middle:]))


def _then(first: Callable, second: Callable) -> Callable:
    @device
    def both(state):
        first(state)
        second(state)

    return both


def placer(width: int) -> Callable:
    """``place(line, unit)``: where a unit of a tile begins, in elements from its start."""
    return place_of(Operand(STEP, width, True, UNIT, True, False))


@functools.cache
def loader(lines: int, width: int, threads: int) -> Callable:
    """``fetch(shared, at, pointer, base, stride, start, end, columns, thread)``: a block starts the copies of a tile.

    Its lines are rows ``start`` and following of a matrix whose rows begin at elements ``base``, ``base + stride`` and
    so on; those from row ``end`` on and columns from ``columns`` on become zeros. ``start`` and ``end`` are uint32,
    strides below 2**32, so that an address is one multiplication.
    """
    units = width // UNIT
    place, copy = placer(width), memory.copy_async_fill(2 * UNIT)
    # Units change places with a period of 8 lines: turns of such are a constant apart.
    lines_of_turn = min(threads // units // 8 * 8 or threads // units, lines)
    turns, even = -(-lines // lines_of_turn), lines % lines_of_turn == 0 and lines_of_turn * units == threads

    @device
    def fetch(shared, at, pointer, base, stride, start, end, columns, thread):
        thread = bits.again(thread)
        line0, unit = _u32(thread // _u32(units)), _u32(thread % _u32(units))
        column = np.int64(_u32(unit * _u32(UNIT)))
        to, end = at + np.int64(place(line0, unit)), end if column < columns else _u32(0)
        for turn in range(turns):
            line = _u32(line0 + _u32(turn * lines_of_turn))
            if even or (line0 < _u32(lines_of_turn) and line < _u32(lines)):
                row = _u32(start + line)
                source = base + column + np.int64(row) * np.int64(_u32(stride))
                if lines_of_turn % 8:
                    to = at + np.int64(place(line, unit))
                copy(shared, to, pointer, source, _u32(16) if row < end else _u32(0))
            to += np.int64(lines_of_turn * width)

    return fetch


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
    mma = MMA[kind]

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
    to_pair, blocks = PACK[kind], tile.columns // 8

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


def storer(kind: str, tile: Tile) -> Callable:
    """``store(shared, at, sums, factors, pointer, first, stride, left, columns, line0, lane)``: a warp's result rows.

    Each row times its factor, rounded, by way of the warp's own lines of a tile in shared memory that no copy reaches
    any more. ``first``, ``stride``, ``left`` and ``columns`` are those of the tile, as for ``loader``.
    """
    place, units, to_pair = placer(tile.width), tile.width // UNIT, PACK[kind]
    turns = tile.rows_of_warp * units // 32

    def parked(number: int) -> Callable:
        block, half = divmod(number, 2)

        @device
        def park(state):
            shared, at, sums, factors, line0, lane = state
            line = _u32(_u32(line0 + _u32(STEP * block + 8 * half)) + _u32(lane >> _u32(2)))
            column = _u32(_u32(lane & _u32(3)) << _u32(1))
            for unit in range(units):
                i = 4 * (block * units + unit) + 2 * half
                word = to_pair(sums[i] * factors[number], sums[i + 1] * factors[number])
                memory.shared_store32(shared, at + np.int64(_u32(place(line, _u32(unit)) + column)), word)

        return park

    park = in_turn([parked(number) for number in range(2 * tile.row_blocks)])

    @device
    def store(shared, at, sums, factors, pointer, first, stride, left, columns, line0, lane):
        warp.sync_warp()
        park((shared, at, sums, factors, line0, lane))
        warp.sync_warp()
        for turn in range(turns):
            index = _u32(lane + _u32(32 * turn))
            line, unit = _u32(line0 + _u32(index // _u32(units))), _u32(index % _u32(units))
            column = np.int64(_u32(unit * _u32(UNIT)))
            if line < left and column < columns:
                a, b, c, d = memory.shared_load128(shared, at + np.int64(place(line, unit)))
                memory.store128_stream(pointer, first + np.int64(line) * stride + column, a, b, c, d)

    return store


def clearer(count: int, value: float = 0.0) -> Callable:
    """``clear(sums)``: all numbers of a register array."""
    start = np.float32(value)

    @device
    def clear(sums):
        for i in range(count):
            sums[i] = start

    return clear


def lane_of(tile: Tile) -> Callable:
    """``where(thread)``: the thread's lane, and the first line of its warp's rows.

    Found anew from a number that the compiler takes for another one, neither they nor what follows from them take up
    registers from one use to the next.
    """
    rows_of_warp = tile.rows_of_warp

    @device
    def where(thread):
        thread = bits.again(thread)
        return _u32(thread & _u32(31)), _u32(_u32(thread >> _u32(5)) * _u32(rows_of_warp))

    return where


@device
def row_of(number, line0, lane):
    """The line of a tile that values ``2 * (number & 1)`` and the next of a lane's blocks of 16 rows belong to."""
    return _u32(_u32(line0 + _u32(8 * number)) + _u32(lane >> _u32(2)))


@device
def clamped(value, most):
    """An int64 within 0 and ``most``, as uint32."""
    return _u32(min(max(value, np.int64(0)), np.int64(most)))
