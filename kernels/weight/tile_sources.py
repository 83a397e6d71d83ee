"""Sources of a weight delta inside a tile: the adapters' mathematics on fragments of tensor-core products.

A lane holds eight neighbouring columns of each of its rows ``row + 8 i``: ``delta[8 i : 8 i + 8]``, and the base's
values in ``w`` alike. A source is stage (factors to shared memory), hold (factors to registers) and add (one group of
32 columns); sums of sources are chains of these. The formulas are those of :mod:`kernels.weight.sources`, and so are
the parameter tuples. In a settled tile ``add`` also adds to ``reach`` by how much each element of the delta may be
wrong.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np

from kernels import bits
from kernels.bits import magnitude
from kernels.division import divide
from kernels.elements import ELEMENTS
from kernels.target import cuda, device
from kernels.weight import low_rank_tile
from kernels.weight.low_rank_tile import RESULTS, ROWS_OF_LANE, Product, Tile
from kernels.weight.low_rank_together import two_together

_ONE_ROUNDING, _TWO_ROUNDINGS = np.float32(2.0**-24), np.float32(2.0**-23)

Source = tuple
"""(name, kinds...) as in weight_sources, followed by a Product for each low-rank product that it has."""


def products(source: Source) -> list[Product]:
    """The low-rank products of a source."""
    return [part for part in source if isinstance(part, Product)]


def point_name(source: Source) -> Source:
    """The source's name in weight_sources."""
    return tuple(part for part in source if isinstance(part, str))


def factor_elements(sources: tuple[Source, ...], tile: Tile) -> int:
    """16-bit elements of shared memory for the right factors of every product."""
    return sum(product.shared_elements(tile) for source in sources for product in products(source))


def held_words(sources: tuple[Source, ...], tile: Tile) -> int:
    """Registers that hold factors between hold and add."""
    return sum(_own_words(source, tile) for source in sources)


def product_words(sources: tuple[Source, ...]) -> int:
    """Those of them that hold the left factors of products."""
    return sum(product.held_words for source in sources for product in products(source))


def _own_words(source: Source, tile: Tile) -> int:
    runs = ROWS_OF_LANE * tile.groups
    gathered = {"kronecker_product": 1, "kronecker": 1 + ELEMENTS[source[2]].words if source[0] == "kronecker" else 0}
    return product_words((source,)) + runs * gathered.get(source[0], 0)


@device
def _nothing_staged(p, shared, column0, columns, thread):
    pass


@device
def _nothing_held(p, held, row, rows, column, columns, lane):
    pass


def _product_of(source: Source, tile: Tile, at: list[int], first: int, periods=None) -> list[SimpleNamespace]:
    """The products of a source with places in shared memory and registers from ``at`` on, which moves on."""
    made = []
    for index, spec in enumerate(products(source)):
        made.append(low_rank_tile.product(spec, tile, at[0], at[1], first + 6 * index, periods))
        at[0] += spec.shared_elements(tile)
        at[1] += spec.held_words
    return made


def _low_rank(source: Source, tile: Tile, at: list[int], first: bool) -> SimpleNamespace:
    (product,) = _product_of(source, tile, at, 0)
    multiply, measure, hold_product, settled = product.multiply, product.measure, product.hold, tile.settled

    @device
    def hold(p, held, row, rows, column, columns, lane):
        hold_product(p, held, row, rows, lane)

    @device
    def add(p, shared, held, delta, reach, w, group, row, rows, column, columns, lane):
        result = cuda.local.array(RESULTS, np.float32)
        multiply(p, shared, held, result, group, row, rows, lane)
        for i in range(RESULTS):
            delta[i] = p[6] * result[i] if first else delta[i] + p[6] * result[i]
        if settled:
            measure(p, shared, held, result, group, row, rows, lane, p[6])
            for i in range(RESULTS):
                reach[i] += result[i]

    return SimpleNamespace(stage=product.stage, hold=hold, add=add)


def _hadamard(source: Source, tile: Tile, at: list[int], first: bool) -> SimpleNamespace:
    one, two = _product_of(source, tile, at, 0)
    stage_one, hold_one, multiply_one = one.stage, one.hold, one.multiply
    stage_two, hold_two, multiply_two = two.stage, two.hold, two.multiply
    measure_one, measure_two, settled = one.measure, two.measure, tile.settled
    together = tile.wgmma
    multiply_both = two_together(one.place, two.place, tile) if together else _nothing_staged

    @device
    def stage(p, shared, column0, columns, thread):
        stage_one(p, shared, column0, columns, thread)
        stage_two(p, shared, column0, columns, thread)

    @device
    def hold(p, held, row, rows, column, columns, lane):
        hold_one(p, held, row, rows, lane)
        hold_two(p, held, row, rows, lane)

    @device
    def add(p, shared, held, delta, reach, w, group, row, rows, column, columns, lane):
        a = cuda.local.array(RESULTS, np.float32)
        b = cuda.local.array(RESULTS, np.float32)
        if together:
            multiply_both(shared, held, a, b, group)
        else:
            multiply_one(p, shared, held, a, group, row, rows, lane)
            multiply_two(p, shared, held, b, group, row, rows, lane)
        for i in range(RESULTS):
            value = (p[12] * a[i]) * b[i]
            delta[i] = value if first else delta[i] + value
        if settled:
            a_reach = cuda.local.array(RESULTS, np.float32)
            b_reach = cuda.local.array(RESULTS, np.float32)
            measure_one(p, shared, held, a_reach, group, row, rows, lane, np.float32(1))
            measure_two(p, shared, held, b_reach, group, row, rows, lane, np.float32(1))
            for i in range(RESULTS):
                wrong = a_reach[i] * (magnitude(b[i]) + b_reach[i]) + magnitude(a[i]) * b_reach[i]
                reach[i] += magnitude(p[12]) * wrong

    return SimpleNamespace(stage=stage, hold=hold, add=add)


def _kronecker_product(source: Source, tile: Tile, at: list[int], first: bool) -> SimpleNamespace:
    """w2 = left @ right is multiplied anew in every tile, at rows modulo c and columns modulo e."""
    (product,) = _product_of(source, tile, at, 6, periods=(2, 3))
    multiply, measure, hold_product, stage = product.multiply, product.measure, product.hold, product.stage
    settled = tile.settled
    load1, weights_at, groups, ragged = ELEMENTS[source[1]].load, at[1], tile.groups, tile.ragged
    at[1] += ROWS_OF_LANE * groups

    @device
    def hold(p, held, row, rows, column, columns, lane):
        hold_product(p, held, row, rows, lane)
        for i in range(ROWS_OF_LANE):
            o = np.uint32(row + np.int64(8 * i))
            if ragged:
                o = min(o, np.uint32(np.uint32(rows) - np.uint32(1)))
            row_at = np.int64(divide(o, p[4])) * p[1]
            for group in range(groups):
                j = np.uint32(column + np.int64(32 * group))
                if ragged:
                    j = min(j, np.uint32(np.uint32(columns) - np.uint32(8)))
                weight = p[12] * load1(p[0], row_at + np.int64(divide(j, p[5])))
                held[weights_at + group * ROWS_OF_LANE + i] = bits.f32_bits(weight)

    @device
    def add(p, shared, held, delta, reach, w, group, row, rows, column, columns, lane):
        result = cuda.local.array(RESULTS, np.float32)
        multiply(p, shared, held, result, group, row, rows, lane)
        for i in range(ROWS_OF_LANE):
            weight = bits.bits_f32(held[weights_at + group * ROWS_OF_LANE + i])
            for x in range(8):
                value = weight * result[8 * i + x]
                delta[8 * i + x] = value if first else delta[8 * i + x] + value
        if settled:
            measure(p, shared, held, result, group, row, rows, lane, np.float32(1))
            for i in range(ROWS_OF_LANE):
                weight = magnitude(bits.bits_f32(held[weights_at + group * ROWS_OF_LANE + i]))
                for x in range(8):
                    reach[8 * i + x] += weight * result[8 * i + x]

    return SimpleNamespace(stage=stage, hold=hold, add=add)


def _pointwise(gather: Callable, tile: Tile, first: bool) -> SimpleNamespace:
    """A source without products: ``gather(p, values, w, o, column, i)`` gives eight values of the lane's i-th row."""
    settled = tile.settled

    @device
    def add(p, shared, held, delta, reach, w, group, row, rows, column, columns, lane):
        values = cuda.local.array(8, np.float32)
        inside = min(column, columns - np.int64(8))
        for i in range(ROWS_OF_LANE):
            gather(p, values, w, min(row + np.int64(8 * i), rows - np.int64(1)), inside, i)
            for x in range(8):
                at = 8 * i + x
                delta[at] = values[x] if first else delta[at] + values[x]
                if settled:
                    reach[at] += _TWO_ROUNDINGS * magnitude(values[x])

    return SimpleNamespace(stage=_nothing_staged, hold=_nothing_held, add=add)


def _kronecker(source: Source, tile: Tile, at: list[int], first: bool) -> SimpleNamespace:
    """Eight elements of w2 for each row and group, and their weight, are requested with the base."""
    load1, second = ELEMENTS[source[1]].load, ELEMENTS[source[2]]
    fetch8, unpack8, words_of_8 = second.fetch8_cached, second.unpack8, second.words
    groups, ragged, settled, words_at = tile.groups, tile.ragged, tile.settled, at[1]
    weights_at = words_at + ROWS_OF_LANE * groups * words_of_8
    at[1] += _own_words(source, tile)

    @device
    def hold(p, held, row, rows, column, columns, lane):
        height, width = np.uint32(p[3]), np.uint32(p[4])
        for i in range(ROWS_OF_LANE):
            o = np.uint32(row + np.int64(8 * i))
            if ragged:
                o = min(o, np.uint32(np.uint32(rows) - np.uint32(1)))
            block_row = divide(o, p[5])
            w2_row = np.int64(np.uint32(o - np.uint32(block_row * height))) * p[4]
            weights_row = np.int64(block_row) * p[2]
            for group in range(groups):
                j = np.uint32(column + np.int64(32 * group))
                if ragged:
                    j = min(j, np.uint32(np.uint32(columns) - np.uint32(8)))
                block_column = divide(j, p[6])
                w2_column = np.uint32(j - np.uint32(block_column * width))
                slot = group * ROWS_OF_LANE + i
                fetch8(p[1], w2_row + np.int64(w2_column), held, words_at + slot * words_of_8)
                weight = p[7] * load1(p[0], weights_row + np.int64(block_column))
                held[weights_at + slot] = bits.f32_bits(weight)

    @device
    def add(p, shared, held, delta, reach, w, group, row, rows, column, columns, lane):
        values = cuda.local.array(8, np.float32)
        for i in range(ROWS_OF_LANE):
            slot = group * ROWS_OF_LANE + i
            unpack8(held, words_at + slot * words_of_8, values, 0)
            weight = bits.bits_f32(held[weights_at + slot])
            for x in range(8):
                value = weight * values[x]
                delta[8 * i + x] = value if first else delta[8 * i + x] + value
                if settled:
                    reach[8 * i + x] += _TWO_ROUNDINGS * magnitude(value)

    return SimpleNamespace(stage=_nothing_staged, hold=hold, add=add)


def _dense(source: Source, tile: Tile, at: list[int], first: bool) -> SimpleNamespace:
    kind = ELEMENTS[source[1]]
    fetch8, unpack8, words_of_8 = kind.fetch8, kind.unpack8, kind.words

    @device
    def gather(p, values, w, o, column, i):
        words = cuda.local.array(words_of_8, np.uint32)
        fetch8(p[0], o * p[1] + column, words, 0)
        unpack8(words, 0, values, 0)
        for x in range(8):
            values[x] = p[2] * values[x]

    return _pointwise(gather, tile, first)


def _channel(source: Source, tile: Tile, at: list[int], first: bool) -> SimpleNamespace:
    load, per_row = ELEMENTS[source[1]].load, source[2] == "out"

    @device
    def gather(p, values, w, o, column, i):
        for x in range(8):
            index = o if per_row else np.int64(divide(column + np.int64(x), p[2]))
            values[x] = (p[3] * load(p[0], index)) * w[8 * i + x]

    return _pointwise(gather, tile, first)


_MAKERS = {
    "low_rank": _low_rank,
    "hadamard": _hadamard,
    "kronecker_product": _kronecker_product,
    "kronecker": _kronecker,
    "dense": _dense,
    "channel": _channel,
}


@device
def _no_add(p, shared, held, delta, reach, w, group, row, rows, column, columns, lane):
    pass


@functools.cache
def summed(sources: tuple[Source, ...], tile: Tile) -> SimpleNamespace:
    """stage, hold and add of a sum of sources, each with its own parameters, shared area and registers."""
    at = [0, 0]
    every = SimpleNamespace(stage=_nothing_staged, hold=_nothing_held, add=_no_add)
    for position, source in enumerate(sources):
        every = _then(every, _MAKERS[source[0]](source, tile, at, position == 0), position, tile.settled)
    assert at == [factor_elements(sources, tile), held_words(sources, tile)], at
    return every


def _then(rest: SimpleNamespace, one: SimpleNamespace, position: int, settled: bool) -> SimpleNamespace:
    stage_rest, hold_rest, add_rest = rest.stage, rest.hold, rest.add
    stage_one, hold_one, add_one = one.stage, one.hold, one.add

    @device
    def stage(p, shared, column0, columns, thread):
        stage_rest(p, shared, column0, columns, thread)
        stage_one(p[position], shared, column0, columns, thread)

    @device
    def hold(p, held, row, rows, column, columns, lane):
        hold_rest(p, held, row, rows, column, columns, lane)
        hold_one(p[position], held, row, rows, column, columns, lane)

    @device
    def add(p, shared, held, delta, reach, w, group, row, rows, column, columns, lane):
        add_rest(p, shared, held, delta, reach, w, group, row, rows, column, columns, lane)
        add_one(p[position], shared, held, delta, reach, w, group, row, rows, column, columns, lane)
        if settled and position > 0:
            for i in range(RESULTS):
                reach[i] += _ONE_ROUNDING * magnitude(delta[i])

    return SimpleNamespace(stage=stage, hold=hold, add=add)
