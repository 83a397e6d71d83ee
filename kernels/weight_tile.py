"""The weight kernel on tensor cores: a tile of the delta in registers, its base beside it, one rounding, one store.

A block of ``warps`` warps makes a tile of 16 * warps rows and 32 * groups columns. Base and result move in 16-byte
accesses; the base is requested before anything else, so that the product hides behind it. Lane 4 g + t holds rows g
and g + 8, columns 8 t to 8 t + 7 of each group of 32: ``delta[0:8]`` and ``delta[8:16]``.

Sinks: "merge" (and the bare delta, without a base), and DoRA by row in two launches: "norm" leaves each row's sum of
squares over each tile, "dora" adds those up and applies the gain.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np

from kernels import low_rank_tile, warp
from kernels.bits import not_finite
from kernels.elements import ELEMENTS
from kernels.parameters import flat_length, table_reader
from kernels.target import cuda, device, f32, f32p, i32p, i64, i64p, kernel_factory, types
from kernels.weight_portable import DORA_EPS
from kernels.weight_sources import source_parameters

Source = tuple
"""(name, kinds...) as in weight_sources; low-rank names end with their number of 16-rank steps."""


def _point_name(source: Source) -> Source:
    return tuple(part for part in source if isinstance(part, str))


def shared_bytes(sources: tuple[Source, ...], groups: int) -> int:
    """Dynamic shared memory of a tile: the right factors of every product."""
    return sum(2 * sum(elements for elements, _ in _areas(source, groups)) for source in sources)


def _areas(source: Source, groups: int) -> list[tuple[int, int]]:
    """(shared elements, held words) of each low-rank product of a source."""
    columns = 32 * groups
    if source[0] == "low_rank":
        pairs = [(*source[1:3], source[3])]
    elif source[0] == "hadamard":
        pairs = [(*source[1:3], source[5]), (*source[3:5], source[6])]
    else:
        pairs = []
    return [
        (low_rank_tile.shared_elements(left, right, steps, columns), low_rank_tile.held_words(left, right, steps))
        for left, right, steps in pairs
    ]


@device
def _nothing_staged(p, shared, column0, columns, thread):
    pass


@device
def _nothing_held(p, held, row, rows, lane):
    pass


def _low_rank(source, warps, groups, areas) -> SimpleNamespace:
    ((shared_at, held_at),) = areas
    part = low_rank_tile.product(source[1], source[2], source[3], warps, groups, shared_at, held_at, 0)
    multiply = part.multiply

    @device
    def add(p, shared, held, delta, w, group, row, rows, column, columns, lane):
        result = cuda.local.array(16, np.float32)
        multiply(p, shared, held, result, group, row, rows, lane)
        for i in range(16):
            delta[i] += p[6] * result[i]

    return SimpleNamespace(stage=part.stage, hold=part.hold, add=add)


def _hadamard(source, warps, groups, areas) -> SimpleNamespace:
    first = low_rank_tile.product(source[1], source[2], source[5], warps, groups, *areas[0], 0)
    second = low_rank_tile.product(source[3], source[4], source[6], warps, groups, *areas[1], 6)
    stage_first, hold_first, multiply_first = first.stage, first.hold, first.multiply
    stage_second, hold_second, multiply_second = second.stage, second.hold, second.multiply

    @device
    def stage(p, shared, column0, columns, thread):
        stage_first(p, shared, column0, columns, thread)
        stage_second(p, shared, column0, columns, thread)

    @device
    def hold(p, held, row, rows, lane):
        hold_first(p, held, row, rows, lane)
        hold_second(p, held, row, rows, lane)

    @device
    def add(p, shared, held, delta, w, group, row, rows, column, columns, lane):
        a = cuda.local.array(16, np.float32)
        b = cuda.local.array(16, np.float32)
        multiply_first(p, shared, held, a, group, row, rows, lane)
        multiply_second(p, shared, held, b, group, row, rows, lane)
        for i in range(16):
            delta[i] += p[12] * (a[i] * b[i])

    return SimpleNamespace(stage=stage, hold=hold, add=add)


def _kronecker(source, warps, groups, areas) -> SimpleNamespace:
    load1, second = ELEMENTS[source[1]].load, ELEMENTS[source[2]]
    fetch8, unpack8, words_of_8 = second.fetch8_cached, second.unpack8, second.words

    @device
    def add(p, shared, held, delta, w, group, row, rows, column, columns, lane):
        words = cuda.local.array(words_of_8, np.uint32)
        values = cuda.local.array(8, np.float32)
        block_column = np.uint32(column) // np.uint32(p[4])
        j = np.int64(np.uint32(column) - np.uint32(block_column * np.uint32(p[4])))
        for half in range(2):
            o = row + np.int64(8 * half)
            if o < rows and column < columns:
                block_row = np.uint32(o) // np.uint32(p[3])
                i = np.int64(np.uint32(o) - np.uint32(block_row * np.uint32(p[3])))
                small = p[5] * load1(p[0], np.int64(block_row) * p[2] + np.int64(block_column))
                fetch8(p[1], i * p[4] + j, words, 0)
                unpack8(words, 0, values, 0)
                for x in range(8):
                    delta[8 * half + x] += small * values[x]

    return SimpleNamespace(stage=_nothing_staged, hold=_nothing_held, add=add)


def _dense(source, warps, groups, areas) -> SimpleNamespace:
    kind = ELEMENTS[source[1]]
    fetch8, unpack8, words_of_8 = kind.fetch8, kind.unpack8, kind.words

    @device
    def add(p, shared, held, delta, w, group, row, rows, column, columns, lane):
        words = cuda.local.array(words_of_8, np.uint32)
        values = cuda.local.array(8, np.float32)
        for half in range(2):
            o = row + np.int64(8 * half)
            if o < rows and column < columns:
                fetch8(p[0], o * p[1] + column, words, 0)
                unpack8(words, 0, values, 0)
                for x in range(8):
                    delta[8 * half + x] += p[2] * values[x]

    return SimpleNamespace(stage=_nothing_staged, hold=_nothing_held, add=add)


def _channel(source, warps, groups, areas) -> SimpleNamespace:
    load, per_row = ELEMENTS[source[1]].load, source[2] == "out"

    @device
    def add(p, shared, held, delta, w, group, row, rows, column, columns, lane):
        for half in range(2):
            o = row + np.int64(8 * half)
            if o < rows and column < columns:
                for x in range(8):
                    if per_row:
                        m = load(p[0], o)
                    else:
                        m = load(p[0], np.int64(np.uint32(column + x) // np.uint32(p[1])))
                    delta[8 * half + x] += (p[2] * m) * w[8 * half + x]

    return SimpleNamespace(stage=_nothing_staged, hold=_nothing_held, add=add)


_MAKERS = {
    "low_rank": _low_rank,
    "hadamard": _hadamard,
    "kronecker": _kronecker,
    "dense": _dense,
    "channel": _channel,
}


@functools.cache
def _all_sources(sources: tuple[Source, ...], warps: int, groups: int) -> SimpleNamespace:
    """stage, hold and add of a sum of sources, each with its own parameters, shared area and registers."""
    shared_at, held_at = 0, 0

    @device
    def no_add(p, shared, held, delta, w, group, row, rows, column, columns, lane):
        pass

    every = SimpleNamespace(stage=_nothing_staged, hold=_nothing_held, add=no_add)
    for position, source in enumerate(sources):
        areas = []
        for elements, words in _areas(source, groups):
            areas.append((shared_at, held_at))
            shared_at += elements
            held_at += words
        every = _then(every, _MAKERS[source[0]](source, warps, groups, areas), position)
    every.held_words = max(1, held_at)
    return every


def _then(rest: SimpleNamespace, one: SimpleNamespace, position: int) -> SimpleNamespace:
    stage_rest, hold_rest, add_rest = rest.stage, rest.hold, rest.add
    stage_one, hold_one, add_one = one.stage, one.hold, one.add

    @device
    def stage(p, shared, column0, columns, thread):
        stage_rest(p, shared, column0, columns, thread)
        stage_one(p[position], shared, column0, columns, thread)

    @device
    def hold(p, held, row, rows, lane):
        hold_rest(p, held, row, rows, lane)
        hold_one(p[position], held, row, rows, lane)

    @device
    def add(p, shared, held, delta, w, group, row, rows, column, columns, lane):
        add_rest(p, shared, held, delta, w, group, row, rows, column, columns, lane)
        add_one(p[position], shared, held, delta, w, group, row, rows, column, columns, lane)

    return SimpleNamespace(stage=stage, hold=hold, add=add)


@functools.cache
def _tile_body(base, out, sources, sink, check, warps, groups) -> Callable:
    """The tile's device function; ``sink_p`` is (partials, magnitude, tiles in a row, strength) for DoRA."""
    every = _all_sources(sources, warps, groups)
    stage, hold, add, held_words = every.stage, every.hold, every.add, every.held_words
    has_base = base is not None
    base_element, out_element = ELEMENTS[base or out], ELEMENTS[out]
    fetch8, unpack8, base_words = base_element.fetch8, base_element.unpack8, base_element.words
    raw_words = 2 * groups * base_words
    finish = _SINKS[sink](out_element, check)
    begin, accumulate, end = finish.begin, finish.accumulate, finish.end

    @device
    def body(shared, tile_row, tile_column, base_pointer, out_pointer, rows, columns, flag, p, sink_p):
        thread = warp.thread_index()
        lane = np.uint32(thread & np.uint32(31))
        row = tile_row * np.int64(16 * warps) + np.int64(
            (thread >> np.uint32(5)) * np.uint32(16) + (lane >> np.uint32(2))
        )
        column0 = tile_column * np.int64(32 * groups)
        lane_column = column0 + np.int64((lane & np.uint32(3)) * np.uint32(8))
        raw = cuda.local.array(raw_words, np.uint32)
        held = cuda.local.array(held_words, np.uint32)
        delta = cuda.local.array(16, np.float32)
        w = cuda.local.array(16, np.float32)
        state = cuda.local.array(2, np.float32)
        if has_base:
            for group in range(groups):
                column = lane_column + np.int64(32 * group)
                for half in range(2):
                    o = row + np.int64(8 * half)
                    if o < rows and column < columns:
                        fetch8(base_pointer, o * columns + column, raw, (2 * group + half) * base_words)
        stage(p, shared, column0, columns, thread)
        hold(p, held, row, rows, lane)
        begin(state, row, rows, lane, sink_p)
        warp.block_barrier()
        for group in range(groups):
            column = lane_column + np.int64(32 * group)
            for i in range(16):
                delta[i] = np.float32(0)
                w[i] = np.float32(0)
            if has_base:
                for half in range(2):
                    unpack8(raw, (2 * group + half) * base_words, w, 8 * half)
            add(p, shared, held, delta, w, group, row, rows, column, columns, lane)
            for half in range(2):
                o = row + np.int64(8 * half)
                if o < rows and column < columns:
                    accumulate(state, half, out_pointer, o * columns + column, delta, w, flag, sink_p)
        end(state, tile_column, row, rows, lane, sink_p)

    return body


@device
def _begin_nothing(state, row, rows, lane, p):
    pass


@device
def _end_nothing(state, tile_column, row, rows, lane, p):
    pass


def _store_sink(out_element: SimpleNamespace, check: bool, combine: Callable, begin: Callable) -> SimpleNamespace:
    rounded, store8 = out_element.rounded, out_element.store8

    @device
    def accumulate(state, half, out_pointer, index, delta, w, flag, p):
        at = 8 * half
        for i in range(8):
            delta[at + i] = combine(state, half, delta[at + i], w[at + i], p)
        if check:
            bad = False
            for i in range(8):
                if not_finite(rounded(delta[at + i])) and not not_finite(w[at + i]):
                    bad = True
            if bad:
                flag[0] = np.int32(1)
        store8(out_pointer, index, delta, at)

    return SimpleNamespace(begin=begin, accumulate=accumulate, end=_end_nothing)


def _merge_sink(out_element: SimpleNamespace, check: bool) -> SimpleNamespace:
    @device
    def add_base(state, half, delta, w, p):
        return w + delta

    return _store_sink(out_element, check, add_base, _begin_nothing)


def _norm_sink(out_element: SimpleNamespace, check: bool) -> SimpleNamespace:
    @device
    def begin(state, row, rows, lane, p):
        state[0] = np.float32(0)
        state[1] = np.float32(0)

    @device
    def accumulate(state, half, out_pointer, index, delta, w, flag, p):
        for i in range(8):
            v = w[8 * half + i] + delta[8 * half + i]
            state[half] += v * v

    @device
    def end(state, tile_column, row, rows, lane, p):
        for half in range(2):
            total = warp.quad_sum(state[half])
            o = row + np.int64(8 * half)
            if (lane & np.uint32(3)) == np.uint32(0) and o < rows:
                p[0][o * p[2] + tile_column] = total

    return SimpleNamespace(begin=begin, accumulate=accumulate, end=end)


def _dora_sink(magnitude: str) -> Callable:
    load_magnitude = ELEMENTS[magnitude].load

    def make(out_element: SimpleNamespace, check: bool) -> SimpleNamespace:
        @device
        def begin(state, row, rows, lane, p):
            for half in range(2):
                o = row + np.int64(8 * half)
                squares = np.float32(0)
                if o < rows:
                    tile = np.int64(lane & np.uint32(3))
                    while tile < p[2]:
                        squares += p[0][o * p[2] + tile]
                        tile += np.int64(4)
                squares = warp.quad_sum(squares)
                state[half] = np.float32(0)
                if o < rows:
                    state[half] = load_magnitude(p[1], o) / (np.float32(math.sqrt(squares)) + DORA_EPS)

        @device
        def decompose(state, half, delta, w, p):
            return w + p[3] * (state[half] * (w + delta) - w)

        return _store_sink(out_element, check, decompose, begin)

    return make


_SINKS = {"merge": _merge_sink, "norm": _norm_sink} | {f"dora {m}": _dora_sink(m) for m in ELEMENTS}


def _parameters(base, out, sources, sink) -> tuple:
    sink_types = ()
    if sink == "norm" or sink.startswith("dora"):
        magnitude = sink.partition(" ")[2] or out
        sink_types = (f32p, ELEMENTS[magnitude].pointer, i64, f32)
    return (
        ELEMENTS[base or out].pointer, ELEMENTS[out].pointer, i64, i64, i32p,
        types.Tuple([source_parameters(_point_name(s)) for s in sources]), types.Tuple(sink_types),
    )  # fmt: skip


_OI = ("low_rank", "bf16", "bf16", 1)
_EXAMPLES = (
    ("bf16", "bf16", (_OI,), "merge", True, 8, 4),
    ("bf16", "bf16", (("low_rank", "f32", "f32", 1),), "merge", True, 8, 4),
    ("bf16", "bf16", (("low_rank", "f16", "f16", 4),), "merge", True, 8, 4),
    ("bf16", "bf16", (("hadamard", "bf16", "bf16", "bf16", "bf16", 4, 4),), "merge", True, 8, 4),
    ("bf16", "bf16", (_OI, _OI), "merge", True, 8, 4),
    ("bf16", "bf16", (_OI,), "norm", True, 8, 4),
    ("bf16", "bf16", (_OI,), "dora f32", True, 8, 4),
    (None, "bf16", (_OI,), "merge", False, 8, 4),
    ("f32", "f16", (("kronecker", "bf16", "f32"), ("dense", "f16"), ("channel", "bf16", "in")), "merge", True, 8, 4),
)


@kernel_factory(*_EXAMPLES)
def weight_tile(base, out, sources, sink, check, warps, groups):
    """One weight. Parameters: base, out, rows, columns, flag, sources, sink; grid (column tiles, row tiles)."""
    body = _tile_body(base, out, sources, sink, check, warps, groups)

    def kernel(base_pointer, out_pointer, rows, columns, flag, p, sink_p):
        shared = cuda.shared.array(0, np.uint16, alignment=128)
        body(shared, warp.block_y(), warp.block_x(), base_pointer, out_pointer, rows, columns, flag, p, sink_p)

    options = {"threads": 32 * warps, "shared_bytes": shared_bytes(sources, groups), "architectures": (8, 0)}
    return kernel, _parameters(base, out, sources, sink), options


@kernel_factory(("bf16", "bf16", (_OI,), "merge", True, 8, 4))
def weight_tile_grouped(base, out, sources, sink, check, warps, groups):
    """Many weights. Parameters: a table with a row of the single kernel's parameters for each weight, and three words
    a block: the weight's row in the table, its tile row and tile column."""
    body = _tile_body(base, out, sources, sink, check, warps, groups)
    parameters = types.Tuple(_parameters(base, out, sources, sink))
    read, width = table_reader(parameters), flat_length(parameters)

    def kernel(table, blocks):
        shared = cuda.shared.array(0, np.uint16, alignment=128)
        at = 3 * warp.block_x()
        q = read(table, np.int64(blocks[at]) * np.int64(width))
        body(shared, np.int64(blocks[at + 1]), np.int64(blocks[at + 2]), q[0], q[1], q[2], q[3], q[4], q[5], q[6])

    options = {"threads": 32 * warps, "shared_bytes": shared_bytes(sources, groups), "architectures": (8, 0)}
    return kernel, (i64p, i32p), options
