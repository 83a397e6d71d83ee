"""Segmented products on Hopper: TMA, mbarriers, wgmma, a persistent grid of specialised warpgroups.

out = epilogue(sum over segments of A_s B_s^T). One warpgroup asks TMA for tiles of A and B, ``stages`` ahead; two
multiply, each 64 rows of the block's 128. The blocks of a cluster are neighbours along the rows, so they need the
same tile of B: each loads its share and multicasts it. While a tile is stored, the loads of the next are under way.

What is to be computed stands in a table in device memory: parts, each a result of its own (one of a batch, or one part
of a sum that is split), then the segments that parts consist of, which name tensor maps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from kernels import barrier, bits, wgmma
from kernels.matmul.epilogue import epilogue
from kernels.matmul.wgmma_store import ROWS_OF_A_MATRIX, STAGING_BYTES, tile_store
from kernels.target import cuda, device, f32, i64, i64p, kernel_factory, types
from kernels.warp import block_barrier, block_x, grid_x, sync_warp, thread_index
from kernels.wgmma import DEPTH

PART_WORDS = 4
"""Words of a part: its first segment (as words from the table's start), how many it has, the map of its result, and
how many elements its result lies after the first part's."""

SEGMENT_WORDS = 6
"""Words of a segment: the maps of A and B; tiles of K, and products of 16 in the last of them; the first value of K;
the fp32 bits of a factor for what the segments before have summed, and 1 in the word's upper half if the grid before
this one makes A."""

ROWS = 128
WARPGROUP = 128
THREADS = 3 * WARPGROUP
_PRODUCER_REGISTERS, _CONSUMER_REGISTERS = 56, 224
_u32 = np.uint32


@dataclass(frozen=True)
class WgmmaTile:
    """How a block works.

    ``columns`` of the product's tile, ``stages`` of loads, ``cluster`` blocks that share B, the majors of A and B, and
    whether the tile's two halves of columns are a gate and a value, from the two halves of B's rows.
    """

    columns: int
    stages: int
    cluster: int
    a_k_major: bool = True
    b_k_major: bool = True
    gated: bool = False

    @property
    def pieces(self) -> int:
        """In how many pieces a tile of B is loaded."""
        return 2 if self.gated or self.cluster == 2 else 1

    @property
    def result_columns(self) -> int:
        """Columns of the result that a tile makes."""
        return self.columns // 2 if self.gated else self.columns

    @property
    def a_bytes(self) -> int:
        """Bytes of a stage of A."""
        return ROWS * DEPTH * 2

    @property
    def stage_bytes(self) -> int:
        """Bytes of a stage."""
        return self.a_bytes + self.columns * DEPTH * 2

    def shared_bytes(self, staging: int) -> int:
        """Shared memory of a block: stages, ``staging`` bytes of what waits to be stored, and barriers."""
        return self.stages * self.stage_bytes + staging + 16 * self.stages

    def boxes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """(rows, columns) of the boxes that the maps of A and B have, in the order in which the matrices are stored."""
        piece = self.columns // self.pieces
        return (ROWS, DEPTH) if self.a_k_major else (DEPTH, 64), (piece, DEPTH) if self.b_k_major else (DEPTH, 64)


def _placement(tile: WgmmaTile) -> Callable:
    """Rows and columns at which the tile of a number begins: panels of block rows, columns running slower inside."""
    cluster_rows, wide_tile, cluster = _u32(ROWS * tile.cluster), _u32(tile.result_columns), tile.cluster

    @device
    def place(number, rows, columns, panel):
        tall = _u32(_u32(rows + cluster_rows - _u32(1)) // cluster_rows)
        wide = _u32(_u32(columns + wide_tile - _u32(1)) // wide_tile)
        of_panel = _u32(number // _u32(panel * wide))
        first = _u32(of_panel * panel)
        height = min(panel, _u32(tall - first))
        inside = _u32(number - _u32(first * wide))
        across = _u32(inside // height)
        down = _u32(first + inside - _u32(across * height))
        rank = barrier.cluster_rank() if cluster > 1 else _u32(0)
        return _u32(down * cluster_rows + rank * _u32(ROWS)), _u32(across * wide_tile)

    return place


def _tile_count(tile: WgmmaTile) -> Callable:
    cluster_rows, wide_tile = _u32(ROWS * tile.cluster), _u32(tile.result_columns)

    @device
    def count(rows, columns):
        tall = _u32(_u32(rows + cluster_rows - _u32(1)) // cluster_rows)
        return _u32(tall * _u32(_u32(columns + wide_tile - _u32(1)) // wide_tile))

    return count


def _operand_loader(k_major: bool, extent: int, multicast: int) -> Callable:
    """A device function that loads ``extent`` of M or N by a stage's depth, for ``multicast`` blocks."""
    everyone, boxes, box_bytes = np.uint16((1 << multicast) - 1), extent // 64, _u32(64 * DEPTH * 2)
    load_box, load_box_everywhere = barrier.tma_load(2), barrier.tma_load_multicast(2)

    @device
    def box(target, tensor_map, full, column, row):
        if multicast > 1:
            load_box_everywhere(target, tensor_map, full, column, row, everyone)
        else:
            load_box(target, tensor_map, full, column, row)

    @device
    def load(target, tensor_map, full, along, k):
        if k_major:
            box(target, tensor_map, full, k, along)
        else:
            for i in range(boxes):
                shift = _u32(i)
                box(_u32(target + shift * box_bytes), tensor_map, full, _u32(along + shift * _u32(64)), k)

    return load


def _stage_loader(tile: WgmmaTile) -> Callable:
    """A device function that asks for the block's share of one stage of A and B."""
    piece = tile.columns // tile.pieces
    load_a, load_b = _operand_loader(tile.a_k_major, ROWS, 1), _operand_loader(tile.b_k_major, piece, tile.cluster)
    a_bytes, stage_bytes, piece_bytes = _u32(tile.a_bytes), _u32(tile.stage_bytes), _u32(piece * DEPTH * 2)
    own = tile.pieces // tile.cluster
    shared_b, piece_columns, gated = tile.cluster > 1, _u32(piece), tile.gated

    @device
    def load(target, full, map_a, map_b, row, k_a, column, k_b, columns):
        barrier.barrier_expect_bytes(full, stage_bytes)
        load_a(target, map_a, full, row, k_a)
        for i in range(own):
            number = barrier.cluster_rank() if shared_b else _u32(i)
            start = _u32(column + number * (columns if gated else piece_columns))
            load_b(_u32(target + a_bytes + number * piece_bytes), map_b, full, start, k_b)

    return load


def _work(tile: WgmmaTile) -> Callable:
    """A device function: tiles of one part, and tiles of all; a cluster takes every so-many-th."""
    count = _tile_count(tile)

    @device
    def work(parts, rows, columns):
        tiles = count(rows, columns)
        return tiles, _u32(tiles * parts)

    return work


def _segment_loader(tile: WgmmaTile) -> Callable:
    """A device function by which the loading thread asks for all stages of a segment of two matrices."""
    load = _stage_loader(tile)
    stages, stage_bytes = _u32(tile.stages), _u32(tile.stage_bytes)

    @device
    def load_segment(base, barriers, table, at, row, column, columns, q, stage, phase):
        map_a, map_b = np.uint64(table[at]), np.uint64(table[at + np.int64(1)])
        k_tiles, first = _u32(table[at + np.int64(2)]), _u32(table[at + np.int64(4)])
        if np.uint64(table[at + np.int64(5)]) >> np.uint64(32) != np.uint64(0):
            barrier.wait_for_previous_grid()
        for tile_of_k in range(k_tiles):
            k = _u32(first + _u32(tile_of_k) * _u32(DEPTH))
            full, target = _u32(barriers + stage * _u32(16)), _u32(base + stage * stage_bytes)
            barrier.barrier_wait(_u32(full + _u32(8)), phase)
            load(target, full, map_a, map_b, row, k, column, k, columns)
            stage = _u32(stage + _u32(1))
            if stage == stages:
                stage, phase = _u32(0), _u32(phase ^ _u32(1))
        return stage, phase

    return load_segment


def _producer(tile: WgmmaTile, load_segment: Callable) -> Callable:
    """The loading thread: every stage of every segment of every tile of the block."""
    place, work, cluster = _placement(tile), _work(tile), _u32(tile.cluster)

    @device
    def produce(base, barriers, table, parts, rows, columns, panel, q):
        stage, phase = _u32(0), _u32(1)
        tiles, total = work(parts, rows, columns)
        number = _u32(_u32(block_x()) // cluster)
        while number < total:
            part = _u32(number // tiles)
            row, column = place(_u32(number - part * tiles), rows, columns, panel)
            at = np.int64(part) * np.int64(PART_WORDS)
            first, segments = table[at], table[at + np.int64(1)]
            for segment in range(segments):
                words = first + np.int64(segment) * np.int64(SEGMENT_WORDS)
                stage, phase = load_segment(base, barriers, table, words, row, column, columns, q, stage, phase)
            number = _u32(number + _u32(_u32(grid_x()) // cluster))

    return produce


def _accumulator(tile: WgmmaTile, kind: str) -> Callable:
    """A device function that sums all segments of a tile; gives the sums, the next stage and its phase."""
    width, stages, stage_bytes, cluster = tile.columns, _u32(tile.stages), _u32(tile.stage_bytes), _u32(tile.cluster)
    zero, scaled = wgmma.zero_sums(width), wgmma.scaled_sums(width)
    whole = wgmma.multiply_add(width, wgmma.STEPS, tile.a_k_major, tile.b_k_major, kind)
    single = wgmma.multiply_add(width, 1, tile.a_k_major, tile.b_k_major, kind)
    settle_all, settle_older = wgmma.wait_products(width, 0), wgmma.wait_products(width, 1)
    bits_a, bits_b = (np.uint64(wgmma.descriptor_bits(major)) for major in (tile.a_k_major, tile.b_k_major))
    step_a, step_b = (np.uint64(wgmma.step_words(major)) for major in (tile.a_k_major, tile.b_k_major))
    a_bytes, several = _u32(tile.a_bytes), tile.cluster > 1
    steps = _u32(wgmma.STEPS)

    @device
    def release(barriers, stage):
        empty = _u32(barriers + stage * _u32(16) + _u32(8))
        lane = _u32(thread_index() & _u32(WARPGROUP - 1))
        if several:
            if lane < cluster:
                barrier.barrier_arrive_remote(empty, lane)
        elif lane == _u32(0):
            barrier.barrier_arrive(empty)

    @device
    def accumulate(base, barriers, table, part, group, stage, phase):
        sums = zero()
        started = _u32(0)
        first, segments = table[part], table[part + np.int64(1)]
        for segment in range(segments):
            at = first + np.int64(segment) * np.int64(SEGMENT_WORDS)
            k_tiles, last = _u32(table[at + np.int64(2)]), _u32(table[at + np.int64(3)])
            factor = bits.bits_f32(_u32(table[at + np.int64(5)]))
            if started != _u32(0) and factor != np.float32(1.0):
                sums = scaled(settle_all(sums), factor)
            for k in range(k_tiles):
                barrier.barrier_wait(_u32(barriers + stage * _u32(16)), phase)
                place = _u32(base + stage * stage_bytes)
                a = np.uint64(np.uint64(_u32(place + group * _u32(64 * DEPTH * 2)) >> _u32(4)) | bits_a)
                b = np.uint64(np.uint64(_u32(place + a_bytes) >> _u32(4)) | bits_b)
                if _u32(k) + _u32(1) < k_tiles or last == steps:
                    sums = whole(sums, a, b)
                    sums = settle_older(sums)
                    if started != _u32(0):
                        release(barriers, _u32((stage if stage != _u32(0) else stages) - _u32(1)))
                else:
                    if started != _u32(0):
                        sums = settle_all(sums)
                        release(barriers, _u32((stage if stage != _u32(0) else stages) - _u32(1)))
                    for _ in range(last):
                        sums = single(sums, a, b)
                        a, b = np.uint64(a + step_a), np.uint64(b + step_b)
                started = _u32(1)
                stage = _u32(stage + _u32(1))
                if stage == stages:
                    stage, phase = _u32(0), _u32(phase ^ _u32(1))
        sums = settle_all(sums)
        if started != _u32(0):
            release(barriers, _u32((stage if stage != _u32(0) else stages) - _u32(1)))
        return sums, stage, phase

    return accumulate


def _consumer(tile: WgmmaTile, kind: str, staging: int, store: Callable) -> Callable:
    """A multiplying warpgroup: its 64 rows of every tile of the block."""
    place, work, accumulate = _placement(tile), _work(tile), _accumulator(tile, kind)
    scaled = wgmma.scaled_sums(tile.columns)
    staging_at, cluster = _u32(tile.stages * tile.stage_bytes), _u32(tile.cluster)
    barriers_at = _u32(tile.stages * tile.stage_bytes + staging)

    @device
    def consume(base, table, parts, rows, columns, panel, group, out, factor, p, q):
        stage, phase = _u32(0), _u32(0)
        tiles, total = work(parts, rows, columns)
        number = _u32(_u32(block_x()) // cluster)
        while number < total:
            part = _u32(number // tiles)
            row, column = place(_u32(number - part * tiles), rows, columns, panel)
            words = np.int64(part) * np.int64(PART_WORDS)
            sums, stage, phase = accumulate(base, _u32(base + barriers_at), table, words, group, stage, phase)
            if factor != np.float32(1.0):
                sums = scaled(sums, factor)
            target = (np.uint64(table[words + np.int64(2)]), out[0], table[words + np.int64(3)], out[1])
            row = _u32(row + group * _u32(64))
            store(sums, _u32(base + staging_at), row, column, rows, columns, np.int64(part), target, p, q)
            number = _u32(number + _u32(_u32(grid_x()) // cluster))

    return consume


def _barriers(tile: WgmmaTile) -> Callable:
    """A device function by which one thread makes the barriers: full for the loads, empty for the products."""
    stages, users = tile.stages, _u32(2 * tile.cluster)

    @device
    def make(barriers):
        for stage in range(stages):
            full = _u32(barriers + _u32(stage) * _u32(16))
            barrier.barrier_init(full, _u32(1))
            barrier.barrier_init(_u32(full + _u32(8)), users)
        barrier.barrier_init_visible()

    return make


def persistent(
    tile: WgmmaTile,
    kind: str,
    target: tuple,
    staging: int,
    load_segment: Callable,
    steps: tuple,
    shape: types.BaseTuple,
) -> tuple:
    """A kernel of specialised warpgroups, as a factory returns it.

    ``target`` is what `tile_store` makes, ``load_segment`` asks for a segment's stages; both are given a tuple of type
    ``shape``. Parameters: the table, how many parts; rows and columns of a result, block rows a panel; the first
    result's pointer and row stride (read by direct stores only); the factor for the finished sum; the epilogue's; the
    shape's.
    """
    pointer, store, finish = target
    produce, consume = _producer(tile, load_segment), _consumer(tile, kind, staging, store)
    make_barriers = _barriers(tile)
    barriers_at, several = _u32(tile.stages * tile.stage_bytes + staging), tile.cluster > 1
    give, take = barrier.registers_give(_PRODUCER_REGISTERS), barrier.registers_take(_CONSUMER_REGISTERS)

    def kernel(table, parts, rows, columns, panel, out, factor, p, q):
        shared = cuda.shared.array(0, np.uint8, alignment=1024)
        base = barrier.shared_address(shared, np.int64(0))
        thread = thread_index()
        parts, rows, columns, panel = _u32(parts), _u32(rows), _u32(columns), _u32(panel)
        if thread == _u32(0):
            make_barriers(_u32(base + barriers_at))
        if several:
            barrier.cluster_barrier()
        else:
            block_barrier()
        group = _u32(thread // _u32(WARPGROUP))
        if group == _u32(0):
            give()
            if thread == _u32(0):
                produce(base, _u32(base + barriers_at), table, parts, rows, columns, panel, q)
        else:
            take()
            consume(base, table, parts, rows, columns, panel, _u32(group - _u32(1)), out, factor, p, q)
            finish()
        if several:
            sync_warp()  # the loading thread's warp arrives as one
            barrier.cluster_barrier()

    parameters = (i64p, i64, i64, i64, i64, types.Tuple((pointer, i64)), f32, epilogue(steps).parameters, shape)
    options = {"threads": THREADS, "shared_bytes": tile.shared_bytes(staging), "cluster": tile.cluster}
    return kernel, parameters, options | {"architectures": (9, 0, "a")}


def _example(columns: int, cluster: int, *, out: str = "bf16", mode: str = "tma", steps: tuple = (), **tile) -> tuple:
    return "bf16", out, WgmmaTile(columns, 4, cluster, **tile), mode, steps


@kernel_factory(
    _example(256, 2),
    _example(256, 1, out="f32"),
    _example(160, 2, steps=(("bias", "bf16"), ("gelu",))),
    _example(128, 1, mode="direct", out="f16"),
    _example(128, 1, a_k_major=False, b_k_major=False),
    _example(256, 2, gated=True, steps=(("gate", "silu", True),)),
)
def multiply_wgmma(kind: str, out_kind: str, tile: WgmmaTile, mode: str, steps: tuple):
    """Of matrices: one kind of A and B, one kind of result, a tile, a way to store ("tma" or "direct"), an epilogue."""
    assert epilogue(steps).gated == tile.gated, (steps, tile)
    staging = STAGING_BYTES if mode == "tma" else 0
    target = tile_store(out_kind, tile.columns, mode, steps, ROWS_OF_A_MATRIX)
    return persistent(tile, kind, target, staging, _segment_loader(tile), steps, types.Tuple(()))
