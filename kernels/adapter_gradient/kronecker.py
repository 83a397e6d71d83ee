"""Gradients of both of a LoKr's factors on Hopper, from one pass over g and x.

    d_w1[l, m] = sum_t (g_tl w2) . x_tm        d_w2 = sum_tl g_tl^T v_tl        v_tl = sum_m w1[l, m] x_tm

For narrow blocks, where reading is all the work. TMA brings a row's blocks as lines of tiles, several rows ahead, and
both factors stay in shared memory. A warpgroup has a tile of a row's blocks l, or all of them of every other row. What
it multiplies by w2, and the transpose of what it mixes by w1, are, rounded to the operands' kind, from registers the
left factors of the gradients, which stay in registers until the end. Blocks of threads write parts that are added up in
order, d_w2's transposed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from kernels import barrier, bits, wgmma
from kernels.hardware import WARP, WARPGROUP
from kernels.stages import PAIR_BYTES, begin_loading, hand_back, next_stage, pair_maker, pair_of
from kernels.target import HOPPER_SHARED_BYTES, cuda, device, f32p, i64, kernel_factory, types
from kernels.warp import block_barrier, block_x, grid_x, sync_warp, thread_index, uniform
from kernels.wgmma import DEPTH, step_words
from kernels.wgmma_registers import add_products, settle, tile_products, zero_sums

GROUPS = 2
THREADS = GROUPS * WARPGROUP + WARP
"""Two warpgroups that multiply, and a warp that loads."""

MOST_LINES, MOST_TILES, MOST_BOXES = 64, 2, 2
"""Blocks l of a tile, tiles of a row, and 64 columns of g's blocks that registers have room for."""

_LINE, _SUMS, _WORDS = 2 * DEPTH, DEPTH // 2, DEPTH // 4
_BOX_BYTES = DEPTH * _LINE
_MOST_STAGES = 12

G, X, W1, W2 = range(4)
"""Positions of maps: of g [row, block, column], x alike, w1 [l, m], w2 [column of g's, column of x's]."""
ROWS, OUT_BLOCKS, IN_BLOCKS, OUT_WIDTH, IN_WIDTH = range(5)
"""Positions of extents."""
FIRST_BLOCKS, FIRST_ROWS = range(2)
"""Positions of what is said of shares: so many blocks of threads take so many rows, and the others the rest."""

_u32 = np.uint32


@dataclass(frozen=True)
class KroneckerTile:
    """How a block works: ``lines`` blocks of g a tile, a multiple of 16, in ``tiles`` of a row, 1 or 2; ``boxes`` of 64
    columns of g's blocks; ``in_lines`` blocks of x, a multiple of 16.
    """

    lines: int
    tiles: int
    boxes: int
    in_lines: int

    @property
    def rows(self) -> int:
        """Rows of a stage."""
        return GROUPS // self.tiles

    @property
    def loaded_bytes(self) -> int:
        """Bytes that arrive in a stage."""
        return self.rows * self.x_bytes + GROUPS * self.boxes * self.lines * _LINE

    @property
    def x_bytes(self) -> int:
        """Bytes of a row of x."""
        return self.in_lines * _LINE

    @property
    def stage_bytes(self) -> int:
        """Rows of x, and a tile of g for each warpgroup: products take 64 lines of it, whatever is beyond its own."""
        return self.rows * self.x_bytes + GROUPS * self.boxes * _BOX_BYTES

    @property
    def w2_bytes(self) -> int:
        """Bytes of w2."""
        return self.boxes * _BOX_BYTES

    @property
    def factor_bytes(self) -> int:
        """Bytes of both factors, w1 after w2."""
        return self.w2_bytes + self.tiles * self.lines * _LINE

    @property
    def stages(self) -> int:
        """As many as there is room for."""
        room = HOPPER_SHARED_BYTES - self.factor_bytes - PAIR_BYTES
        return min(_MOST_STAGES, room // (self.stage_bytes + PAIR_BYTES))

    @property
    def barriers_at(self) -> int:
        """Where barriers begin, after stages and factors: two of each stage, and the factors'."""
        return self.stages * self.stage_bytes + self.factor_bytes

    @property
    def shared_bytes(self) -> int:
        """All of it."""
        return self.barriers_at + PAIR_BYTES * (self.stages + 1)


_load_rows, _load_matrix = barrier.tma_load(3), barrier.tma_load(2)


@device
def _share(shares, rows):
    """The block's first row, the one before which it ends, and blocks that take rows in turns with it."""
    block, blocks = _u32(block_x()), _u32(shares[FIRST_BLOCKS])
    if block < blocks:
        return block, _u32(0), _u32(shares[FIRST_ROWS]), blocks
    return _u32(block - blocks), _u32(shares[FIRST_ROWS]), rows, _u32(_u32(grid_x()) - blocks)


def _producer(tile: KroneckerTile) -> Callable:
    """The loading thread: both factors, and all stages of the block."""
    following, stage_bytes, loaded = next_stage(tile.stages), _u32(tile.stage_bytes), _u32(tile.loaded_bytes)
    rows, tiles, boxes, lines, x_bytes = tile.rows, tile.tiles, tile.boxes, tile.lines, tile.x_bytes
    factors_at, w2_bytes, factor_bytes = tile.stages * tile.stage_bytes, tile.w2_bytes, _u32(tile.factor_bytes)
    stages = tile.stages

    @device
    def load_factors(base, own, maps):
        barrier.barrier_expect_bytes(own, factor_bytes)
        at = _u32(base + _u32(factors_at))
        for box in range(boxes):
            place = _u32(at + _u32(box * _BOX_BYTES))
            _load_matrix(place, np.uint64(maps[W2]), own, _u32(0), _u32(box * DEPTH))
        for number in range(tiles):
            place = _u32(at + _u32(w2_bytes + number * lines * _LINE))
            _load_matrix(place, np.uint64(maps[W1]), own, _u32(0), _u32(number * lines))

    @device
    def load_stage(target, full, maps, first):
        for row in range(rows):
            at = _u32(target + _u32(row * x_bytes))
            _load_rows(at, np.uint64(maps[X]), full, _u32(0), _u32(0), _u32(first + _u32(row)))
        for group in range(GROUPS):
            row, line = _u32(first + _u32(group // tiles)), _u32(group % tiles * lines)
            for box in range(boxes):
                place = _u32(target + _u32(rows * x_bytes + (group * boxes + box) * _BOX_BYTES))
                _load_rows(place, np.uint64(maps[G]), full, _u32(box * DEPTH), line, row)

    @device
    def produce(base, barriers, maps, share):
        load_factors(base, pair_of(barriers, stages), maps)
        stage, phase, (number, begin, end, blocks) = _u32(0), _u32(1), share
        first = _u32(begin + _u32(number * _u32(rows)))
        while first < end:
            full, target = pair_of(barriers, stage), _u32(base + stage * stage_bytes)
            begin_loading(full, phase, loaded)
            load_stage(target, full, maps, first)
            stage, phase = following(stage, phase)
            first = _u32(first + _u32(blocks * _u32(rows)))

    return produce


def _products(tile: KroneckerTile, kind: str) -> tuple[Callable, ...]:
    """Primitives: g w2 and the transpose of v are started; they are left factors of d_w1 and of d_w2's transpose."""
    along, across, box_words = step_words(True), step_words(False), _BOX_BYTES >> 4
    steps = [(box, step) for box in range(tile.boxes) for step in range(DEPTH // 16)]
    places = tuple((box * box_words + step * along, box * box_words + step * across) for box, step in steps)
    turned = tuple((step * across, step * along) for step in range(tile.in_lines // 16))
    return (
        tile_products(DEPTH, places, kind, (True, False)),
        tile_products(tile.lines, turned, kind, (False, True)),
        add_products(tile.in_lines, DEPTH // 16, kind, k_major=True),
        add_products(DEPTH, tile.lines // 16, kind),
    )


def _accumulator(tile: KroneckerTile, kind: str) -> Callable:
    """A device function: a warpgroup's sums over all stages of the block."""
    grow, mix, add_first, add_second = _products(tile, kind)
    v_count, v_words, pack = tile.lines // 2, tile.lines // 4, bits.PACK[kind]
    # No products run together with those whose left factor is in registers: ptxas (13.0) then makes all of them wait.
    grown, mixed = settle(0, _SUMS), settle(0, v_count)
    first_done, second_done = settle(0, tile.in_lines // 2), settle(0, _SUMS)
    by_rows, by_lines = wgmma.operand_descriptor(True), wgmma.operand_descriptor(False)
    following, stage_bytes, x_bytes = next_stage(tile.stages), _u32(tile.stage_bytes), _u32(tile.x_bytes)
    tiles, rows, own_bytes, several = _u32(tile.tiles), _u32(tile.rows), _u32(tile.boxes * _BOX_BYTES), tile.boxes > 1
    w2_at, stages = _u32(tile.stages * tile.stage_bytes), tile.stages
    w1_at, w1_bytes, g_at = _u32(w2_at + _u32(tile.w2_bytes)), _u32(tile.lines * _LINE), _u32(tile.rows * tile.x_bytes)

    @device
    def accumulate(d_w1, low, high, base, barriers, share, group, lane):
        u, u_packed = cuda.local.array(_SUMS, np.float32), cuda.local.array(_WORDS, np.uint32)
        v, v_packed = cuda.local.array(v_count, np.float32), cuda.local.array(v_words, np.uint32)
        w2, w1 = by_lines(_u32(base + w2_at)), by_rows(uniform(_u32(base + w1_at + _u32(group % tiles) * w1_bytes)))
        barrier.barrier_wait(pair_of(barriers, stages), _u32(0))
        stage, phase, (number, begin, end, blocks) = _u32(0), _u32(0), share
        row = _u32(begin + _u32(number * rows))
        while row < end:
            pair, place = pair_of(barriers, stage), _u32(base + stage * stage_bytes)
            of_g = uniform(_u32(place + g_at + group * own_bytes))
            of_x = uniform(_u32(place + _u32(group // tiles) * x_bytes))
            barrier.barrier_wait(pair, phase)
            grow(u, by_rows(of_g), w2)
            grown(u)
            for i in range(_WORDS):
                u_packed[i] = pack(u[2 * i], u[2 * i + 1])
            add_first(d_w1, u_packed, by_rows(of_x))
            first_done(d_w1)
            mix(v, by_lines(of_x), w1)
            mixed(v)
            for i in range(v_words):
                v_packed[i] = pack(v[2 * i], v[2 * i + 1])
            add_second(low, v_packed, by_lines(of_g))
            if several:
                add_second(high, v_packed, by_lines(_u32(of_g + _u32(_BOX_BYTES))))
            second_done(low)
            if several:
                second_done(high)
            hand_back(pair, lane)
            stage, phase = following(stage, phase)
            row = _u32(row + _u32(blocks * rows))

    return accumulate


@device
def _store(target, start, sums, count, column0, row0, rows, columns, own):
    """Sums of a warpgroup's 64 lines from ``row0`` on to columns of a matrix from ``column0`` on."""
    lane = _u32(own & _u32(31))
    line = _u32(row0 + _u32(_u32(own >> _u32(5)) << _u32(4)) + (lane >> _u32(2)))
    across = _u32((lane & _u32(3)) << _u32(1))
    for number in range(count):
        row = _u32(line + _u32(8 * (number >> 1 & 1)))
        column = np.int64(_u32(across + _u32(column0 + 8 * (number >> 2) + (number & 1))))
        if row < rows and column < columns:
            target[start + np.int64(row) * columns + column] = sums[number]


@device
def _park(shared, at, sums, count, own):
    for number in range(count):
        shared[_u32(_u32(at + number * WARPGROUP) + own)] = sums[number]


@device
def _add_parked(shared, at, sums, count, own):
    for number in range(count):
        sums[number] += shared[_u32(_u32(at + number * WARPGROUP) + own)]


def _finisher(tile: KroneckerTile) -> tuple[Callable, Callable]:
    """Device functions: one warpgroup leaves its sums to the other, after a barrier; both write the block's parts."""
    first_count, lines, split, several = tile.in_lines // 2, _u32(tile.lines), tile.tiles > 1, tile.boxes > 1
    low_at, high_at = first_count * WARPGROUP, (first_count + _SUMS) * WARPGROUP

    @device
    def leave(shared, d_w1, low, high, own):
        if not split:
            _park(shared, 0, d_w1, first_count, own)
        _park(shared, low_at, low, _SUMS, own)
        if several:
            _park(shared, high_at, high, _SUMS, own)

    @device
    def finish(shared, parts, extents, d_w1, low, high, group, own):
        blocks, columns, width = _u32(extents[OUT_BLOCKS]), extents[IN_BLOCKS], extents[OUT_WIDTH]
        first, second = block_x() * extents[OUT_BLOCKS] * columns, block_x() * width * extents[IN_WIDTH]
        if group == _u32(0):
            if not split:
                _add_parked(shared, 0, d_w1, first_count, own)
            _store(parts[0], first, d_w1, first_count, 0, _u32(0), min(blocks, lines), columns, own)
            _add_parked(shared, low_at, low, _SUMS, own)
            _store(parts[1], second, low, _SUMS, 0, _u32(0), _u32(extents[IN_WIDTH]), width, own)
            if several:
                _add_parked(shared, high_at, high, _SUMS, own)
                _store(parts[1], second, high, _SUMS, DEPTH, _u32(0), _u32(extents[IN_WIDTH]), width, own)
        elif split:
            _store(parts[0], first, d_w1, first_count, 0, lines, blocks, columns, own)

    return leave, finish


def _barriers(tile: KroneckerTile) -> Callable:
    """A device function by which one thread makes the barriers."""
    make_pairs, stages = pair_maker(tile.stages, GROUPS * WARPGROUP // WARP), tile.stages

    @device
    def make(barriers):
        make_pairs(barriers)
        barrier.barrier_init(pair_of(barriers, stages), _u32(1))
        barrier.barrier_init_visible()

    return make


@kernel_factory(("bf16", KroneckerTile(48, 1, 1, 48)), ("bf16", KroneckerTile(64, 2, 2, 64), True))
def kronecker_gradient(kind: str, tile: KroneckerTile, beside: bool = False):
    """Parameters: parts of both gradients, the maps :data:`G` to :data:`W2`, :data:`ROWS` to :data:`IN_WIDTH`,
    :data:`FIRST_BLOCKS` and :data:`FIRST_ROWS`.

    Parts are [block of threads, l, m] and [block of threads, column of x's, column of g's] in fp32. With ``beside`` the
    grid takes nothing of what the one before it makes, and ends after that one.
    """
    produce, accumulate, (leave, finish) = _producer(tile), _accumulator(tile, kind), _finisher(tile)
    make_barriers, barriers_at = _barriers(tile), _u32(tile.barriers_at)
    first_count = tile.in_lines // 2
    clear_first, clear_second = zero_sums(first_count), zero_sums(_SUMS)

    def kernel(parts, maps, extents, shares):
        shared = cuda.shared.array(0, np.float32, alignment=1024)
        base, thread = barrier.shared_address(shared, np.int64(0)), thread_index()
        barriers, share = _u32(base + barriers_at), _share(shares, _u32(extents[ROWS]))
        group, own = _u32(thread // _u32(WARPGROUP)), _u32(thread & _u32(WARPGROUP - 1))
        d_w1 = cuda.local.array(first_count, np.float32)
        low, high = cuda.local.array(_SUMS, np.float32), cuda.local.array(_SUMS, np.float32)
        loads = group == _u32(GROUPS)
        if loads and own == _u32(0):
            make_barriers(barriers)
            for number in range(4):
                barrier.tensor_map_acquire(np.uint64(maps[number]))
        block_barrier()
        if not beside:
            barrier.wait_for_previous_grid()
            barrier.next_grid_may_begin()
        clear_first(d_w1)
        clear_second(low)
        clear_second(high)
        if loads:
            if own == _u32(0):
                produce(base, barriers, maps, share)
            sync_warp()
        else:
            accumulate(d_w1, low, high, base, barriers, share, group, _u32(own & _u32(WARP - 1)))
        block_barrier()
        if group == _u32(1):
            leave(shared, d_w1, low, high, own)
        block_barrier()
        if not loads:
            finish(shared, parts, extents, d_w1, low, high, group, own)
        # One block that waits is enough, and more would keep others from multiprocessors that are free.
        if beside and block_x() == grid_x() - 1:
            barrier.wait_for_previous_grid()

    parameters = (types.Tuple((f32p, f32p)), types.Tuple((i64,) * 4), types.Tuple((i64,) * 5), types.Tuple((i64, i64)))
    options = {"threads": THREADS, "shared_bytes": tile.shared_bytes, "min_blocks": 1}
    return kernel, parameters, options | barrier.HOPPER
