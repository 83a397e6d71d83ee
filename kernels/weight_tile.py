"""The weight kernel on tensor cores: a tile of the delta in registers, its base beside it, one rounding, one store.

A block makes one tile. Base and result move in 16-byte
accesses; the base is requested before anything else and waits in shared memory, so that the product hides behind it. Lane 4 g + t holds rows g
and g + 8, columns 8 t to 8 t + 7 of each group of 32: ``delta[0:8]`` and ``delta[8:16]``.

Sinks: "delta", "merge", and DoRA by row in two launches: "norm" leaves each row's sum of
squares over each tile, "dora" adds those up and applies the gain.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np

from kernels import low_rank_tile, memory, warp
from kernels.elements import ELEMENTS, largest8, parked8
from kernels.low_rank_tile import Tile
from kernels.parameters import flat_length, table_reader
from kernels.target import cuda, device, f32, f32p, i32p, i64, i64p, kernel_factory, types
from kernels.weight_portable import DORA_EPS
from kernels.weight_sources import source_parameters

Source = tuple
"""(name, kinds...) as in weight_sources, followed by the (steps, paired, full) of each product that it has."""

_PRODUCTS = {"low_rank": 1, "hadamard": 2}


def products(source: Source) -> list[low_rank_tile.Product]:
    """The low-rank products of a source."""
    count = _PRODUCTS.get(source[0], 0)
    return [(*source[1 + 2 * i : 3 + 2 * i], *source[1 + 2 * count + i]) for i in range(count)]


def _point_name(source: Source) -> Source:
    return tuple(part for part in source if isinstance(part, str))


def _factor_elements(sources: tuple[Source, ...], groups: int) -> int:
    return sum(low_rank_tile.shared_elements(*p[:3], 32 * groups) for s in sources for p in products(s))


def shared_bytes(base: str | None, sources: tuple[Source, ...], tile: Tile) -> int:
    """Dynamic shared memory of a tile: the right factors of every product, then the base."""
    base_bytes = 4 * ELEMENTS[base].words * 2 * tile.groups * 32 * tile.warps if base and tile.parked else 0
    return 2 * _factor_elements(sources, tile.groups) + base_bytes


def held_words(sources: tuple[Source, ...]) -> int:
    """Registers that hold left factors."""
    return sum(low_rank_tile.held_words(*p[:3]) for s in sources for p in products(s))


@device
def _nothing_staged(p, shared, column0, columns, thread):
    pass


@device
def _nothing_held(p, held, row, rows, lane):
    pass


def _low_rank(source, parts, first) -> SimpleNamespace:
    multiply = parts[0].multiply

    @device
    def add(p, shared, held, delta, w, group, row, rows, column, columns, lane):
        result = cuda.local.array(16, np.float32)
        multiply(p, shared, held, result, group, row, rows, lane)
        for i in range(16):
            delta[i] = p[6] * result[i] if first else delta[i] + p[6] * result[i]

    return SimpleNamespace(stage=parts[0].stage, hold=parts[0].hold, add=add)


def _hadamard(source, parts, first) -> SimpleNamespace:
    stage_a, hold_a, multiply_a = parts[0].stage, parts[0].hold, parts[0].multiply
    stage_b, hold_b, multiply_b = parts[1].stage, parts[1].hold, parts[1].multiply

    @device
    def stage(p, shared, column0, columns, thread):
        stage_a(p, shared, column0, columns, thread)
        stage_b(p, shared, column0, columns, thread)

    @device
    def hold(p, held, row, rows, lane):
        hold_a(p, held, row, rows, lane)
        hold_b(p, held, row, rows, lane)

    @device
    def add(p, shared, held, delta, w, group, row, rows, column, columns, lane):
        a = cuda.local.array(16, np.float32)
        b = cuda.local.array(16, np.float32)
        multiply_a(p, shared, held, a, group, row, rows, lane)
        multiply_b(p, shared, held, b, group, row, rows, lane)
        for i in range(16):
            value = (p[12] * a[i]) * b[i]
            delta[i] = value if first else delta[i] + value

    return SimpleNamespace(stage=stage, hold=hold, add=add)


def _pointwise(prepare: Callable, first: bool) -> SimpleNamespace:
    """A source without products: ``prepare(p, values, w, o, column, half)`` gives eight values of a row."""

    @device
    def add(p, shared, held, delta, w, group, row, rows, column, columns, lane):
        values = cuda.local.array(8, np.float32)
        inside = min(column, columns - np.int64(8))
        for half in range(2):
            prepare(p, values, w, min(row + np.int64(8 * half), rows - np.int64(1)), inside, half)
            for x in range(8):
                at = 8 * half + x
                delta[at] = values[x] if first else delta[at] + values[x]

    return SimpleNamespace(stage=_nothing_staged, hold=_nothing_held, add=add)


def _kronecker(source, parts, first) -> SimpleNamespace:
    load1, second = ELEMENTS[source[1]].load, ELEMENTS[source[2]]
    fetch8, unpack8, words_of_8 = second.fetch8_cached, second.unpack8, second.words

    @device
    def gather(p, values, w, o, column, half):
        words = cuda.local.array(words_of_8, np.uint32)
        block_column = np.uint32(column) // np.uint32(p[4])
        j = np.int64(np.uint32(column) - np.uint32(block_column * np.uint32(p[4])))
        block_row = np.uint32(o) // np.uint32(p[3])
        i = np.int64(np.uint32(o) - np.uint32(block_row * np.uint32(p[3])))
        small = p[5] * load1(p[0], np.int64(block_row) * p[2] + np.int64(block_column))
        fetch8(p[1], i * p[4] + j, words, 0)
        unpack8(words, 0, values, 0)
        for x in range(8):
            values[x] = small * values[x]

    return _pointwise(gather, first)


def _dense(source, parts, first) -> SimpleNamespace:
    kind = ELEMENTS[source[1]]
    fetch8, unpack8, words_of_8 = kind.fetch8, kind.unpack8, kind.words

    @device
    def scaled(p, values, w, o, column, half):
        words = cuda.local.array(words_of_8, np.uint32)
        fetch8(p[0], o * p[1] + column, words, 0)
        unpack8(words, 0, values, 0)
        for x in range(8):
            values[x] = p[2] * values[x]

    return _pointwise(scaled, first)


def _channel(source, parts, first) -> SimpleNamespace:
    load, per_row = ELEMENTS[source[1]].load, source[2] == "out"

    @device
    def scaled_base(p, values, w, o, column, half):
        for x in range(8):
            if per_row:
                m = load(p[0], o)
            else:
                m = load(p[0], np.int64(np.uint32(column + x) // np.uint32(p[1])))
            values[x] = (p[2] * m) * w[8 * half + x]

    return _pointwise(scaled_base, first)


_MAKERS = {
    "low_rank": _low_rank,
    "hadamard": _hadamard,
    "kronecker": _kronecker,
    "dense": _dense,
    "channel": _channel,
}


@functools.cache
def _all_sources(sources: tuple[Source, ...], tile: Tile) -> SimpleNamespace:
    """stage, hold and add of a sum of sources, each with its own parameters, shared area and registers."""
    shared_at, held_at = 0, 0
    every = None
    for position, source in enumerate(sources):
        parts, at = [], 0
        for spec in products(source):
            parts.append(low_rank_tile.product(spec, tile, shared_at, held_at, at))
            shared_at += low_rank_tile.shared_elements(*spec[:3], 32 * tile.groups)
            held_at += low_rank_tile.held_words(*spec[:3])
            at += 6
        every = _then(every, _MAKERS[source[0]](source, parts, first=position == 0), position)
    return every


@device
def _no_add(p, shared, held, delta, w, group, row, rows, column, columns, lane):
    pass


_NOTHING = SimpleNamespace(stage=_nothing_staged, hold=_nothing_held, add=_no_add)


def _then(rest: SimpleNamespace | None, one: SimpleNamespace, position: int) -> SimpleNamespace:
    rest = rest or _NOTHING
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
def _base_access(base: str | None, out: str, sources: tuple[Source, ...], tile: Tile) -> tuple[Callable, Callable, int]:
    """``request(shared, raw, slot, thread, pointer, index)`` and ``take(shared, raw, slot, thread, w, to)`` for eight
    elements of the base, and the words of ``raw`` that they need."""
    element = ELEMENTS[base or out]
    fetch8, unpack8, words = element.fetch8, element.unpack8, element.words
    park, unpark = parked8(base or out, 32 * tile.warps)
    at = _factor_elements(sources, tile.groups)
    has_base, parked = base is not None, tile.parked

    @device
    def request(shared, raw, slot, thread, pointer, index):
        if parked:
            park(shared, at, slot, thread, pointer, index)
        else:
            fetch8(pointer, index, raw, slot * words)

    @device
    def take(shared, raw, slot, thread, w, to):
        if not has_base:
            for i in range(8):
                w[to + i] = np.float32(0)
        elif parked:
            unpark(shared, at, slot, thread, w, to)
        else:
            unpack8(raw, slot * words, w, to)

    return request, take, 2 * tile.groups * words if has_base and not parked else 1


@functools.cache
def _tile_body(base, out, sources, sink, check, tile) -> Callable:
    """The tile's device function; ``sink_p`` is (partials, magnitude, tiles in a row, strength) for DoRA.

    In a ragged weight, addresses outside are moved inside, so that loads need no branches, and stores are guarded.
    """
    warps, groups, ragged = tile.warps, tile.groups, tile.ragged
    every = _all_sources(sources, tile)
    stage, hold = every.stage, every.hold
    words_held = max(1, held_words(sources))
    has_base = base is not None
    request, _, raw_words = _base_access(base, out, sources, tile)
    finish = _SINKS[sink](ELEMENTS[out])
    begin, end, overflow = finish.begin, finish.end, ELEMENTS[out].overflow
    all_groups = _group_chain(base, out, sources, sink, check, tile)
    check = check and finish.stores

    @device
    def body(shared, tile_row, tile_column, base_pointer, out_pointer, rows, columns, flag, p, sink_p):
        thread = warp.thread_index()
        lane = np.uint32(thread & np.uint32(31))
        row_in_tile = (thread >> np.uint32(5)) * np.uint32(16) + (lane >> np.uint32(2))
        row = tile_row * np.int64(16 * warps) + np.int64(row_in_tile)
        column0 = tile_column * np.int64(32 * groups)
        lane_column = column0 + np.int64((lane & np.uint32(3)) * np.uint32(8))
        raw = cuda.local.array(raw_words, np.uint32)
        held = cuda.local.array(words_held, np.uint32)
        state = cuda.local.array(2, np.float32)
        if has_base:
            for half in range(2):
                o = row + np.int64(8 * half)
                if ragged:
                    o = min(o, rows - np.int64(1))
                row_at = o * columns
                for group in range(groups):
                    column = lane_column + np.int64(32 * group)
                    if ragged:
                        column = min(column, columns - np.int64(8))
                    request(shared, raw, 2 * group + half, thread, base_pointer, row_at + column)
        stage(p, shared, column0, columns, thread)
        hold(p, held, row, rows, lane)
        begin(state, row, rows, lane, sink_p)
        memory.copy_async_wait_all()
        warp.block_barrier()
        size = all_groups(
            np.float32(0),
            shared,
            raw,
            held,
            state,
            out_pointer,
            row,
            rows,
            lane_column,
            columns,
            thread,
            lane,
            p,
            sink_p,
        )
        if check and not (size < overflow):
            flag[0] = np.int32(1)
        end(state, tile_column, row, rows, lane, sink_p)

    return body


@device
def _no_group(size, shared, raw, held, state, out_pointer, row, rows, lane_column, columns, thread, lane, p, sink_p):
    return size


def _group_chain(base, out, sources, sink, check, tile) -> Callable:
    """All groups of 32 columns, one after the other; unrolled, since registers cannot be indexed by a variable."""
    chain = _no_group
    for group in range(tile.groups):
        chain = _then_group(chain, base, out, sources, sink, check, tile, group)
    return chain


def _then_group(rest: Callable, base, out, sources, sink, check, tile, group: int) -> Callable:
    add, ragged = _all_sources(sources, tile).add, tile.ragged
    _, take, _ = _base_access(base, out, sources, tile)
    finish = _SINKS[sink](ELEMENTS[out])
    accumulate, check = finish.accumulate, check and finish.stores

    @device
    def groups(size, shared, raw, held, state, out_pointer, row, rows, lane_column, columns, thread, lane, p, sink_p):
        size = rest(
            size, shared, raw, held, state, out_pointer, row, rows, lane_column, columns, thread, lane, p, sink_p
        )
        warp.sync_warp()
        delta = cuda.local.array(16, np.float32)
        w = cuda.local.array(16, np.float32)
        column = lane_column + np.int64(32 * group)
        for half in range(2):
            take(shared, raw, 2 * group + half, thread, w, 8 * half)
        add(p, shared, held, delta, w, group, row, rows, column, columns, lane)
        for half in range(2):
            o = row + np.int64(8 * half)
            if not ragged or (o < rows and column < columns):
                accumulate(state, half, out_pointer, o * columns + column, delta, w, sink_p)
                if check:
                    size = largest8(size, delta, 8 * half)
        return size

    return groups


@device
def _begin_nothing(state, row, rows, lane, p):
    pass


@device
def _end_nothing(state, tile_column, row, rows, lane, p):
    pass


def _store_sink(out_element: SimpleNamespace, combine: Callable, begin: Callable) -> SimpleNamespace:
    store8 = out_element.store8

    @device
    def accumulate(state, half, out_pointer, index, delta, w, p):
        at = 8 * half
        for i in range(8):
            delta[at + i] = combine(state, half, delta[at + i], w[at + i], p)
        store8(out_pointer, index, delta, at)

    return SimpleNamespace(begin=begin, accumulate=accumulate, end=_end_nothing, stores=True)


def _merge_sink(has_base: bool) -> Callable:
    def make(out_element: SimpleNamespace) -> SimpleNamespace:
        @device
        def add_base(state, half, delta, w, p):
            return w + delta if has_base else delta

        return _store_sink(out_element, add_base, _begin_nothing)

    return make


def _norm_sink(out_element: SimpleNamespace) -> SimpleNamespace:
    @device
    def begin(state, row, rows, lane, p):
        state[0] = np.float32(0)
        state[1] = np.float32(0)

    @device
    def accumulate(state, half, out_pointer, index, delta, w, p):
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

    return SimpleNamespace(begin=begin, accumulate=accumulate, end=end, stores=False)


def _dora_sink(magnitude: str) -> Callable:
    load_magnitude = ELEMENTS[magnitude].load

    def make(out_element: SimpleNamespace) -> SimpleNamespace:
        @device
        def begin(state, row, rows, lane, p):
            for half in range(2):
                o = row + np.int64(8 * half)
                squares = np.float32(0)
                row_at = min(o, rows - np.int64(1)) * p[2]
                for first in range(np.int64(lane & np.uint32(3)), p[2], np.int64(32)):
                    for u in range(8):
                        tile = first + np.int64(4 * u)
                        part = p[0][row_at + min(tile, p[2] - np.int64(1))]
                        squares += part if tile < p[2] else np.float32(0)
                squares = warp.quad_sum(squares)
                state[half] = np.float32(0)
                if o < rows:
                    state[half] = load_magnitude(p[1], o) / (np.float32(math.sqrt(squares)) + DORA_EPS)

        @device
        def decompose(state, half, delta, w, p):
            return w + p[3] * (state[half] * (w + delta) - w)

        return _store_sink(out_element, decompose, begin)

    return make


_SINKS = {"delta": _merge_sink(False), "merge": _merge_sink(True), "norm": _norm_sink} | {
    f"dora {m}": _dora_sink(m) for m in ELEMENTS
}


def _parameters(base, out, sources, sink) -> tuple:
    sink_types = ()
    if sink == "norm" or sink.startswith("dora"):
        magnitude = sink.partition(" ")[2] or out
        sink_types = (f32p, ELEMENTS[magnitude].pointer, i64, f32)
    return (
        ELEMENTS[base or out].pointer, ELEMENTS[out].pointer, i64, i64, i32p,
        types.Tuple([source_parameters(_point_name(s)) for s in sources]), types.Tuple(sink_types),
    )  # fmt: skip


_OI = ("low_rank", "bf16", "bf16", (1, True, True))
_WHOLE, _RAGGED, _PARKED = Tile(8, 4, False, False), Tile(8, 4, True, False), Tile(8, 4, True, True)
_EXAMPLES = (
    ("bf16", "bf16", (_OI,), "merge", True, _WHOLE),
    ("bf16", "bf16", (("low_rank", "bf16", "f16", (1, False, False)),), "merge", True, _RAGGED),
    ("bf16", "bf16", (("low_rank", "f32", "f32", (1, True, True)),), "merge", True, _WHOLE),
    ("bf16", "bf16", (("low_rank", "f16", "f16", (4, True, True)),), "merge", True, Tile(8, 4, False, True)),
    ("bf16", "bf16", (("hadamard", *["bf16"] * 4, (4, True, True), (4, True, True)),), "merge", True, _PARKED),
    ("bf16", "bf16", (_OI, _OI), "merge", True, _WHOLE),
    ("bf16", "bf16", (_OI,), "norm", True, _WHOLE),
    ("bf16", "bf16", (_OI,), "dora f32", True, _WHOLE),
    (None, "bf16", (_OI,), "delta", False, _WHOLE),
    ("f32", "f16", (("kronecker", "bf16", "f32"), ("dense", "f16"), ("channel", "bf16", "in")), "merge", True, _PARKED),
)


def _options(base: str | None, sources: tuple[Source, ...], tile: Tile) -> dict:
    """Launch bounds: as many blocks on a multiprocessor as the left factors and the base leave registers for."""
    held = held_words(sources) + (2 * tile.groups * ELEMENTS[base].words if base and not tile.parked else 0)
    return {
        "threads": 32 * tile.warps,
        "min_blocks": 3 if tile.parked and held <= 16 else 2,
        "shared_bytes": shared_bytes(base, sources, tile),
        "architectures": (8, 0),
    }


@kernel_factory(*_EXAMPLES)
def weight_tile(base, out, sources, sink, check, tile):
    """One weight. Parameters: base, out, rows, columns, flag, sources, sink; grid (column tiles, row tiles)."""
    body = _tile_body(base, out, sources, sink, check, tile)

    def kernel(base_pointer, out_pointer, rows, columns, flag, p, sink_p):
        shared = cuda.shared.array(0, np.uint16, alignment=128)
        body(shared, warp.block_y(), warp.block_x(), base_pointer, out_pointer, rows, columns, flag, p, sink_p)

    return kernel, _parameters(base, out, sources, sink), _options(base, sources, tile)


@kernel_factory(("bf16", "bf16", (_OI,), "merge", True, _WHOLE))
def weight_tile_grouped(base, out, sources, sink, check, tile):
    """Many weights in one launch.

    Parameters: a table with a row of the single kernel's parameters for each weight, and three words a block: the
    weight's row in the table, its tile row and tile column.
    """
    body = _tile_body(base, out, sources, sink, check, tile)
    parameters = types.Tuple(_parameters(base, out, sources, sink))
    read, width = table_reader(parameters), flat_length(parameters)

    def kernel(table, blocks):
        shared = cuda.shared.array(0, np.uint16, alignment=128)
        at = 3 * warp.block_x()
        q = read(table, np.int64(blocks[at]) * np.int64(width))
        body(shared, np.int64(blocks[at + 1]), np.int64(blocks[at + 2]), q[0], q[1], q[2], q[3], q[4], q[5], q[6])

    return kernel, (i64p, i32p), _options(base, sources, tile)
