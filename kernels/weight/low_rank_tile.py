"""A low-rank product on tensor cores, as a part of a weight tile: left [rows, rank] @ right [rank, columns].

A warp owns 16 rows and all columns of its tile, in groups of 32. The columns of ``right`` are permuted on their
way into shared memory, so that lane 4 g + t ends up with eight neighbouring results, columns 8 t to 8 t + 7 of a
group, for rows g and g + 8: the base then moves in 16-byte accesses without a shuffle. Its ranks are
permuted too, so that a lane's part of ``left`` is four or eight neighbouring ranks, one access.

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
from kernels.bits import magnitude
from kernels.division import remainder
from kernels.elements import ELEMENTS
from kernels.target import cuda, device
from kernels.weight.low_rank_stage import STEP, stage_of
from kernels.weight.low_rank_together import together

_PARTS = {"bf16": 1, "f16": 2, "f32": 3}
MAX_HELD_WORDS = 64
ROWS_OF_LANE = 2
RESULTS = 8 * ROWS_OF_LANE
_EVERY_BIT, _SIGNLESS = np.uint32(0xFFFFFFFF), np.uint32(0x7FFF7FFF)


@dataclass(frozen=True)
class Product:
    """The compile-time shape of a product.

    ``steps`` of 16 ranks, ``full`` if the rank fills them; ``vector``: how many neighbouring ranks of left are one
    access, 2, 4 or 8 of a row-major left, else 1.
    """

    left: str
    right: str
    steps: int
    vector: int
    full: bool

    @property
    def parts(self) -> tuple[int, int]:
        """How many 16-bit parts each factor is split into."""
        return (1, 1) if self.native_f16 else (_PARTS[self.left], _PARTS[self.right])

    @property
    def steps_at_once(self) -> int:
        """Steps whose left factor one access brings."""
        return 2 if self.vector == 8 else 1

    @property
    def native_f16(self) -> bool:
        """Whether the fp16 instruction multiplies the factors as they are."""
        return self.left == self.right == "f16"

    @property
    def kind(self) -> str:
        """What the tensor core multiplies."""
        return "f16" if self.native_f16 else "bf16"

    def interleaved(self, tile: Tile) -> bool:
        """Whether words of the left factor are made of every other rank instead of two neighbours.

        Where one access brings several words that need no splitting, the tensor core's operands would be copies of
        them, which ptxas makes anew for every product; a walk copies them once a tile anyway.
        """
        return self.vector > 2 and self.parts[0] == 1 and self.left != "f32" and tile.base != "walk"

    @property
    def ranks(self) -> int:
        """Ranks of all steps, zeros beyond the rank among them."""
        return self.steps * STEP

    def smallest_left_part(self, right_part: int) -> int:
        """The last of left's parts that is multiplied with a part of right; the others are all before it."""
        return min(self.parts[0] - 1, 2 - right_part)

    @property
    def pairs(self) -> int:
        """How many products of parts a step has."""
        return sum(self.smallest_left_part(part) + 1 for part in range(self.parts[1]))

    @property
    def error(self) -> float:
        """How wrong a settled product may be, in units of its terms' magnitudes.

        The least exact tensor core that runs it (sm_80: Fasi et al., Numerical behavior of NVIDIA tensor cores, 2021;
        sm_90 loses half of that: Khattak and Mikaitis, arXiv:2512.07004) adds eight products at a time to what it has:
        each of the nine loses less than 2**-24 of the largest, the sum 2**-23 of itself. Twice a step, with all parts:
        23 times 2**-24; the parts left out 3; adding up the steps one each; a factor outside and its product 2. Leading
        parts make up for 0.98 of the magnitudes at least.
        """
        return 1.02 * (27 + self.steps) * 2.0**-24

    def shared_elements(self, tile: Tile) -> int:
        """16-bit elements of shared memory for the right factor."""
        return self.parts[1] * self.ranks * 32 * tile.groups

    @property
    def held_words(self) -> int:
        """Registers for the left factor; 0 where there would be too many and each use loads it again."""
        words = 4 * self.steps * self.parts[0]
        return words if words <= MAX_HELD_WORDS else 0


@dataclass(frozen=True)
class Tile:
    """16 * warps rows by 32 * groups columns; ``ragged`` where weights are not whole tiles.

    ``base``: where a tile's base waits: "registers", "shared" memory, or in shared memory for two tiles at a time of a
    "walk" over several below each other. ``settled``: results that the tensor core's sum leaves in doubt are made again
    (`weight/settle.py`). ``wgmma``: four warps multiply together (sm_90a).
    """

    warps: int
    groups: int
    ragged: bool
    base: str
    settled: bool = False
    wgmma: bool = False

    @property
    def rows(self) -> int:
        """Rows of the tile."""
        return 16 * self.warps

    @property
    def columns(self) -> int:
        """Columns of the tile."""
        return 32 * self.groups


@functools.cache
def product(
    spec: Product, tile: Tile, shared_at: int, held_at: int, at: int, periods: tuple[int, int] | None = None
) -> SimpleNamespace:
    """Device functions of one product whose parameters start at ``at``: left, right, rank, strides of left's row and
    rank and of right's rank.

    ``stage(p, shared, column0, columns, thread)`` brings the right factor to shared memory.
    ``hold(p, held, row, rows, lane)`` brings the left factor of the lane's rows to registers.
    ``multiply(p, shared, held, result, group, row, rows, lane)`` writes the lane's results of a group: eight of each of
    the rows ``row`` and ``row + 8``. ``measure(..., lane, factor)`` writes by how much a settled tile's may be wrong,
    times a factor.
    ``periods``: positions of two parameters by which rows and columns are reduced first, as in a Kronecker product;
    their reciprocals are two positions further.
    """
    fragment = left_fragment(spec, tile, at, periods)
    parts, plane = _multiply_nothing, spec.ranks * tile.columns
    for right_part in reversed(range(spec.parts[1])):
        smallest = spec.smallest_left_part(right_part)
        parts = _multiply_part(parts, spec, smallest, 2 * (shared_at + right_part * plane))
    if tile.settled and spec.steps > 1:
        parts = _from_zero(parts)
    magnitudes = _multiply_part(_multiply_nothing, spec, 0, 2 * shared_at, magnitudes=True)
    sum_magnitudes, error = _over_steps(magnitudes, fragment, spec, tile, held_at), np.float32(spec.error)
    loads, words_at_once = spec.steps // spec.steps_at_once, 4 * spec.parts[0] * spec.steps_at_once
    holds = spec.held_words > 0

    @device
    def hold(p, held, row, rows, lane):
        if holds:
            for load in range(loads):
                fragment(p, held, held_at + words_at_once * load, row, rows, lane, load)

    @device
    def measure(p, shared, held, result, group, row, rows, lane, factor):
        sum_magnitudes(p, shared, held, result, group, row, rows, lane)
        wrong = error * magnitude(factor)
        for i in range(RESULTS):
            result[i] = wrong * result[i]

    return SimpleNamespace(
        stage=stage_of(spec, tile, shared_at, at, periods),
        hold=hold,
        multiply=together((spec, shared_at, held_at), tile)
        if tile.wgmma
        else _over_steps(parts, fragment, spec, tile, held_at),
        place=(spec, shared_at, held_at),
        measure=measure,
    )


def _over_steps(parts: Callable, fragment: Callable, spec: Product, tile: Tile, held_at: int) -> Callable:
    """``parts`` for all steps of a group and both pairs of its 8-column tiles, the results zero before."""
    holds, columns_of_tile, steps_at_once = spec.held_words > 0, tile.columns, spec.steps_at_once
    step_words = 4 * spec.parts[0]
    loads, words_at_once = spec.steps // steps_at_once, steps_at_once * step_words
    swizzle = np.uint32(min(columns_of_tile // 8, 8) - 1)

    @device
    def all_steps(p, shared, held, result, group, row, rows, lane):
        for i in range(RESULTS):
            result[i] = np.float32(0)
        # Units of eight columns are permuted by the row's last bits; bits of row, unit and group stay apart.
        unit = np.uint32((lane >> np.uint32(4)) ^ (lane & swizzle))
        lane_at = np.uint32((lane & np.uint32(15)) * np.uint32(columns_of_tile) | unit * np.uint32(8))
        words = held if holds else cuda.local.array(words_at_once, np.uint32)
        for load in range(loads):
            words_at = held_at + words_at_once * load if holds else 0
            if not holds:
                fragment(p, words, 0, row, rows, lane, load)
            for sub in range(steps_at_once):
                step_bytes = 2 * STEP * columns_of_tile * (load * steps_at_once + sub)
                for pair in range(2):
                    index = np.int64(np.uint32(lane_at ^ np.uint32(8 * (4 * group + 2 * pair))))
                    parts(shared, index, step_bytes, words, words_at + step_words * sub, result, pair)

    return all_steps


@device
def _multiply_nothing(shared, index, step_bytes, words, words_at, result, pair):
    pass


def _multiply_part(
    rest: Callable, spec: Product, smallest: int, right_bytes: int, magnitudes: bool = False
) -> Callable:
    """``rest``, then one part of right times those of left, the ``smallest`` first, for two of a group's four 8-column
    tiles.

    ``magnitudes``: without the factors' signs.
    """
    mma = tensor_core.mma_f16 if spec.native_f16 else tensor_core.mma_bf16
    kept = _SIGNLESS if magnitudes else _EVERY_BIT

    @device
    def multiply(shared, index, step_bytes, words, words_at, result, pair):
        rest(shared, index, step_bytes, words, words_at, result, pair)
        b = tensor_core.ldmatrix_transposed_ahead(shared, index, np.uint32(right_bytes + step_bytes))
        for part in range(smallest + 1):
            a = words_at + 4 * (smallest - part)
            for half in range(2):
                i = 4 * pair + 2 * half
                c = mma(
                    np.uint32(words[a] & kept), np.uint32(words[a + 1] & kept), np.uint32(words[a + 2] & kept),
                    np.uint32(words[a + 3] & kept), np.uint32(b[2 * half] & kept), np.uint32(b[2 * half + 1] & kept),
                    result[i], result[i + 1], result[i + 8], result[i + 9],
                )  # fmt: skip
                result[i] = c[0]
                result[i + 1] = c[1]
                result[i + 8] = c[2]
                result[i + 9] = c[3]

    return multiply


def _from_zero(parts: Callable) -> Callable:
    """The same with each step summed from zero and then added: it cuts off no more than its own terms are worth."""

    @device
    def step(shared, index, step_bytes, words, words_at, result, pair):
        own = cuda.local.array(RESULTS, np.float32)
        for i in range(RESULTS):
            own[i] = np.float32(0)
        parts(shared, index, step_bytes, words, words_at, own, pair)
        for row in range(ROWS_OF_LANE):
            for i in range(4):
                result[8 * row + 4 * pair + i] += own[8 * row + 4 * pair + i]

    return step


def left_fragment(spec: Product, tile: Tile, at: int, periods: tuple[int, int] | None) -> Callable:
    """The lane's part of the left factor for one access: 16 ranks of each of its rows, or 32.

    Lane 4 g + t takes the neighbouring ranks 4 t to 4 t + 3 of a step, or 8 t to 8 t + 7 of two. Rows and ranks outside
    the factor read the last inside instead: those rows are never stored, and right's rows beyond the rank are zero.
    """
    i_left, _, i_rank, i_row, i_step, _ = range(at, at + 6)
    i_period = periods[0] if periods else 0
    i_reciprocal = i_period + 2
    periodic, ragged, full, vector = periods is not None, tile.ragged, spec.full, spec.vector
    element, parts = ELEMENTS[spec.left], spec.parts[0]
    load, fetch8, unpack8 = element.load, element.fetch8_cached, element.unpack8
    pack = bits.pack_f16 if spec.native_f16 else bits.pack_bf16
    step_words = 4 * parts
    packed, interleaved = element.words == 4 and parts == 1, spec.interleaved(tile)
    ranks_at_once = 8 if vector == 8 else 4
    words_of_8 = element.words

    @device
    def split(words, low, high, to):
        for part in range(parts):
            words[to + 4 * part] = pack(low, high)
            if part + 1 < parts:
                low = low - bits.bf16_to_f32(bits.f32_to_bf16(low))
                high = high - bits.bf16_to_f32(bits.f32_to_bf16(high))

    @device
    def load_ranks(p, row_at, first, values, raw):
        """Four or eight ranks of a row: raw words of 16-bit kinds that need no splitting, else fp32 values."""
        if vector == 1:
            for i in range(4):
                k = first + np.int64(i)
                if not full:
                    k = min(k, p[i_rank] - np.int64(1))
                values[i] = load(p[i_left], row_at + k * p[i_step])
        elif vector == 2:
            for i in range(2):
                k = first + np.int64(2 * i)
                if not full:
                    k = min(k, p[i_rank] - np.int64(2))
                raw[i] = memory.load32(p[i_left], row_at + k)
            if not packed:
                unpack8(raw, 0, values, 0)
        else:
            k = first if full else min(first, p[i_rank] - np.int64(ranks_at_once))
            if vector == 8:
                fetch8(p[i_left], row_at + k, raw, 0)
            elif words_of_8 == 8:
                raw[0], raw[1], raw[2], raw[3] = memory.load128(p[i_left], row_at + k)
            else:
                raw[0], raw[1] = memory.load64(p[i_left], row_at + k)
            if not packed:
                unpack8(raw, 0, values, 0)

    @device
    def fragment(p, words, at_word, row, rows, lane, load_index):
        values = cuda.local.array(8, np.float32)
        raw = cuda.local.array(8, np.uint32)
        for i in range(8):
            raw[i] = np.uint32(0)
        first = np.int64(load_index * 4 * ranks_at_once) + np.int64(lane & np.uint32(3)) * np.int64(ranks_at_once)
        for part_row in range(ROWS_OF_LANE):
            o = row + np.int64(8 * part_row)
            if ragged:
                o = min(o, rows - np.int64(1))
            if periodic:
                o = np.int64(remainder(o, p[i_period], p[i_reciprocal]))
            load_ranks(p, o * p[i_row], first, values, raw)
            to = at_word + part_row
            for sub in range(ranks_at_once // 4):
                word_at = to + step_words * sub
                first_word, second_word = raw[2 * sub], raw[2 * sub + 1]
                if interleaved:
                    words[word_at] = bits.low_halves(first_word, second_word)
                    words[word_at + 2] = bits.high_halves(first_word, second_word)
                elif packed and vector > 1:
                    words[word_at] = first_word
                    words[word_at + 2] = second_word
                else:
                    for side in range(2):
                        pair = 4 * sub + 2 * side
                        split(words, values[pair], values[pair + 1], word_at + 2 * side)

    return fragment
