"""Segmented products on Hopper: TMA, mbarriers, wgmma, a persistent grid of specialised warpgroups.

out = epilogue(sum over segments of A_s B_s^T). One warpgroup asks TMA for tiles of A and B, ``stages`` ahead; two
multiply, each 64 rows of the block's 128. The blocks of a cluster are neighbours along the rows, so they need the
same tile of B: each loads its share and multicasts it. While a tile is stored, the loads of the next are under way.

What is to be computed stands in a table in device memory: parts, each a result of its own (one of a batch, or one part
of a sum that is split), then the segments that parts consist of, which name tensor maps.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from kernels import barrier, bits, wgmma
from kernels.hardware import WARPGROUP
from kernels.matmul.epilogue import epilogue
from kernels.matmul.wgmma_load import flags_of, producer, segment_loader
from kernels.matmul.wgmma_store import ROWS_OF_A_MATRIX, STAGING_BYTES, tile_store
from kernels.matmul.wgmma_tile import (
    DIAGONAL,
    LETS,
    PART_WORDS,
    SEGMENT_WORDS,
    THREADS,
    WgmmaTile,
    placement,
    work_of,
)
from kernels.stages import empty_of, next_stage, pair_maker, pair_of
from kernels.target import cuda, device, f32, i64, i64p, kernel_factory, types
from kernels.warp import block_barrier, block_x, grid_x, sync_warp, thread_index
from kernels.wgmma import DEPTH

_PRODUCER_REGISTERS, _CONSUMER_REGISTERS = 72, 216
_u32 = np.uint32


def _releaser(tile: WgmmaTile) -> Callable:
    """A device function that hands a stage back to the loading threads of all blocks that share it."""
    several, cluster = tile.cluster > 1, _u32(tile.cluster)

    @device
    def release(barriers, stage):
        empty = empty_of(pair_of(barriers, stage))
        lane = _u32(thread_index() & _u32(WARPGROUP - 1))
        if several:
            if lane < cluster:
                barrier.barrier_arrive_remote(empty, lane)
        elif lane == _u32(0):
            barrier.barrier_arrive(empty)

    return release


def _operands(tile: WgmmaTile) -> Callable:
    """A device function: the descriptors of a warpgroup's A and of B in a stage at an address."""
    describe_a, describe_b = (wgmma.operand_descriptor(major) for major in (tile.a_k_major, tile.b_k_major))
    a_bytes = _u32(tile.a_bytes)

    @device
    def operands(place, group):
        return describe_a(_u32(place + group * _u32(64 * DEPTH * 2))), describe_b(_u32(place + a_bytes))

    return operands


@device
def _no_blocks(sums, base, barriers, k_tiles, group, stage, phase):
    return sums, stage, phase


def _diagonal_blocks(tile: WgmmaTile, kind: str) -> Callable:
    """A device function that sums a segment whose B has diagonal blocks only: a block's stages make its columns."""
    blocks = _no_blocks
    for number in reversed(range(tile.columns // tile.diagonal if tile.diagonal else 0)):
        blocks = _diagonal_block(tile, kind, number, blocks)
    return blocks


def _diagonal_block(tile: WgmmaTile, kind: str, number: int, rest: Callable) -> Callable:
    """The stages of one block, then ``rest``."""
    multiply = wgmma.product(tile.diagonal, wgmma.STEPS, kind)
    add = wgmma.added_sums(tile.columns, number * tile.diagonal, tile.diagonal)
    release, operands = _releaser(tile), _operands(tile)
    following, stage_bytes = next_stage(tile.stages), _u32(tile.stage_bytes)

    @device
    def block(sums, base, barriers, k_tiles, group, stage, phase):
        for _ in range(k_tiles):
            barrier.barrier_wait(pair_of(barriers, stage), phase)
            a, b = operands(_u32(base + stage * stage_bytes), group)
            sums = add(sums, multiply(a, b))
            release(barriers, stage)
            stage, phase = following(stage, phase)
        return rest(sums, base, barriers, k_tiles, group, stage, phase)

    return block


def _accumulator(tile: WgmmaTile, kind: str) -> Callable:
    """A device function that sums all segments of a tile; gives the sums, the next stage and its phase."""
    width, stages, stage_bytes = tile.columns, _u32(tile.stages), _u32(tile.stage_bytes)
    zero, scaled = wgmma.zero_sums(width), wgmma.scaled_sums(width)
    whole = wgmma.multiply_add(width, wgmma.STEPS, tile.a_k_major, tile.b_k_major, kind)
    single = wgmma.multiply_add(width, 1, tile.a_k_major, tile.b_k_major, kind)
    settle_all, settle_older = wgmma.wait_products(width, 0), wgmma.wait_products(width, 1)
    step_a, step_b = (np.uint64(wgmma.step_words(major)) for major in (tile.a_k_major, tile.b_k_major))
    operands, following, steps = _operands(tile), next_stage(tile.stages), _u32(wgmma.STEPS)
    release, diagonal, diagonal_blocks = _releaser(tile), tile.diagonal > 0, _diagonal_blocks(tile, kind)

    @device
    def release_before(barriers, stage):
        release(barriers, _u32((stage if stage != _u32(0) else stages) - _u32(1)))

    @device
    def accumulate(base, barriers, table, part, group, stage, phase):
        sums = zero()
        held = _u32(0)  # whether products of the stage before are under way, which is then handed back after them
        first, segments = table[part], table[part + np.int64(1)]
        for segment in range(segments):
            at = first + np.int64(segment) * np.int64(SEGMENT_WORDS)
            k_tiles, last, word = _u32(table[at + np.int64(2)]), _u32(table[at + np.int64(3)]), table[at + np.int64(5)]
            factor, flags = bits.bits_f32(_u32(word)), flags_of(word)
            by_blocks = diagonal and flags & _u32(DIAGONAL) != _u32(0)
            if by_blocks or factor != np.float32(1.0):
                sums = settle_all(sums)
                if held != _u32(0):
                    release_before(barriers, stage)
                    held = _u32(0)
                sums = scaled(sums, factor)
            if by_blocks:
                sums, stage, phase = diagonal_blocks(sums, base, barriers, k_tiles, group, stage, phase)
                k_tiles = _u32(0)
            for k in range(k_tiles):
                barrier.barrier_wait(pair_of(barriers, stage), phase)
                a, b = operands(_u32(base + stage * stage_bytes), group)
                if _u32(k) + _u32(1) < k_tiles or last == steps:
                    sums = whole(sums, a, b)
                    sums = settle_older(sums)
                    if held != _u32(0):
                        release_before(barriers, stage)
                else:
                    for _ in range(last):
                        sums = single(sums, a, b)
                        sums = settle_older(sums)
                        if held != _u32(0):
                            release_before(barriers, stage)
                            held = _u32(0)
                        a, b = np.uint64(a + step_a), np.uint64(b + step_b)
                held = _u32(1)
                stage, phase = following(stage, phase)
        sums = settle_all(sums)
        if held != _u32(0):
            release_before(barriers, stage)
        return sums, stage, phase

    return accumulate


def _consumer(tile: WgmmaTile, kind: str, staging: int, store: Callable) -> Callable:
    """A multiplying warpgroup: its 64 rows of every tile of the block."""
    place, work, accumulate = placement(tile), work_of(tile), _accumulator(tile, kind)
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


@device
def lets_next_begin(table):
    """Whether the next grid may run beside this one, before blocks here end."""
    return table[1] > np.int64(0) and flags_of(table[table[0] + np.int64(5)]) & _u32(LETS) != _u32(0)


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
    produce, consume = producer(tile, load_segment), _consumer(tile, kind, staging, store)
    make_pairs = pair_maker(tile.stages, 2 * tile.cluster)
    barriers_at, several = _u32(tile.stages * tile.stage_bytes + staging), tile.cluster > 1
    give, take = barrier.registers_give(_PRODUCER_REGISTERS), barrier.registers_take(_CONSUMER_REGISTERS)

    def kernel(table, parts, rows, columns, panel, out, factor, p, q):
        shared = cuda.shared.array(0, np.uint8, alignment=1024)
        base = barrier.shared_address(shared, np.int64(0))
        thread = thread_index()
        parts, rows, columns, panel = _u32(parts), _u32(rows), _u32(columns), _u32(panel)
        if thread == _u32(0):
            make_pairs(_u32(base + barriers_at))
            barrier.barrier_init_visible()
        if several:
            barrier.cluster_barrier()
        else:
            block_barrier()
        group = _u32(thread // _u32(WARPGROUP))
        if group == _u32(0):
            give()
            if thread == _u32(0):
                produce(base, _u32(base + barriers_at), table, parts, rows, columns, panel, q)
            elif thread == _u32(32) and lets_next_begin(table):  # of a warp without work
                barrier.wait_for_previous_grid()
                barrier.next_grid_may_begin()
        else:
            take()
            consume(base, table, parts, rows, columns, panel, _u32(group - _u32(1)), out, factor, p, q)
            finish()
        if several:
            sync_warp()  # the loading thread's warp arrives as one
            barrier.cluster_barrier()

    parameters = (i64p, i64, i64, i64, i64, types.Tuple((pointer, i64)), f32, epilogue(steps).parameters, shape)
    options = {"threads": THREADS, "shared_bytes": tile.shared_bytes(staging), "cluster": tile.cluster}
    return kernel, parameters, options | barrier.HOPPER


def _example(columns: int, cluster: int, *, out: str = "bf16", mode: str = "tma", steps: tuple = (), **tile) -> tuple:
    return "bf16", out, WgmmaTile(columns, 4, cluster, **tile), mode, steps


@kernel_factory(
    _example(256, 2),
    _example(256, 1, out="f32"),
    _example(160, 2, steps=(("bias", "bf16"), ("gelu",))),
    _example(128, 1, mode="direct", out="f16"),
    _example(128, 1, a_k_major=False, b_k_major=False),
    _example(256, 2, gated=True, steps=(("gate", "silu", True),)),
    _example(256, 2, diagonal=64),
)
def multiply_wgmma(kind: str, out_kind: str, tile: WgmmaTile, mode: str, steps: tuple):
    """Of matrices: one kind of A and B, one kind of result, a tile, a way to store ("tma" or "direct"), an epilogue."""
    assert epilogue(steps).gated == tile.gated, (steps, tile)
    staging = STAGING_BYTES if mode == "tma" else 0
    target = tile_store(out_kind, tile.columns, mode, steps, ROWS_OF_A_MATRIX)
    return persistent(tile, kind, target, staging, segment_loader(tile), steps, types.Tuple(()))
