"""The loading thread of the Hopper products: it asks TMA for all stages of all segments of all tiles of its block."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from kernels import barrier
from kernels.matmul.wgmma_tile import (
    DIAGONAL,
    GROUPS,
    PART_WORDS,
    ROWS,
    SEGMENT_WORDS,
    WAITS,
    WgmmaTile,
    placement,
    work_of,
)
from kernels.stages import begin_loading, next_stage, pair_of
from kernels.target import device
from kernels.warp import block_x, grid_x
from kernels.wgmma import DEPTH

_u32 = np.uint32


@device
def _upper_half(word):
    return _u32(np.uint64(word) >> np.uint64(32))


@device
def flags_of(word):
    """The flags of a segment, from its last word."""
    return _upper_half(word)


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


def _share_loader(tile: WgmmaTile) -> Callable:
    """A device function that asks for the block's share of a stage of B: columns of it, or part of its depth."""
    piece, own = tile.columns // tile.pieces, tile.pieces // tile.cluster
    load_columns, load_depth = (
        _operand_loader(tile.b_k_major, extent, tile.cluster) for extent in (piece, tile.columns)
    )
    piece_bytes, share, line_bytes = _u32(piece * DEPTH * 2), _u32(DEPTH // tile.depth_shares), _u32(128)
    shared_b, piece_columns, gated = tile.cluster > 1, _u32(piece), tile.gated

    @device
    def by_columns(target, full, map_b, column, k, columns):
        for i in range(own):
            number = barrier.cluster_rank() if shared_b else _u32(i)
            start = _u32(column + number * (columns if gated else piece_columns))
            load_columns(_u32(target + number * piece_bytes), map_b, full, start, k)

    @device
    def by_depth(target, full, map_b, column, k, columns):
        first = _u32(barrier.cluster_rank() * share)
        load_depth(_u32(target + first * line_bytes), map_b, full, column, _u32(k + first))

    return by_depth if tile.depth_shares > 1 else by_columns


def _stage_loader(tile: WgmmaTile) -> Callable:
    """A device function that asks for the block's share of one stage of A, from K's value k + shift on, and B."""
    load_a, load_b = _operand_loader(tile.a_k_major, ROWS, 1), _share_loader(tile)
    a_bytes = _u32(tile.a_bytes)

    @device
    def load(target, full, map_a, map_b, row, column, k, shift, columns):
        load_a(target, map_a, full, row, _u32(k + shift))
        load_b(_u32(target + a_bytes), full, map_b, column, k, columns)

    return load


def _diagonal_loader(tile: WgmmaTile) -> Callable:
    """A device function that asks for all stages of a segment whose B has diagonal blocks only: of the tile's columns,
    block by block, each with A's values that it takes.
    """
    piece, blocks = tile.diagonal // tile.cluster, tile.columns // tile.diagonal
    load_a, load_b = _operand_loader(tile.a_k_major, ROWS, 1), _operand_loader(True, piece, tile.cluster)
    a_bytes, block_columns, share = _u32(tile.a_bytes), _u32(tile.diagonal), _u32(piece)
    nbytes, stage_bytes = _u32(tile.a_bytes + tile.diagonal * DEPTH * 2), _u32(tile.stage_bytes)
    several = tile.cluster > 1
    following = next_stage(tile.stages)

    @device
    def load_diagonal(base, barriers, map_a, map_b, k_tiles, row, column, shift, stage, phase):
        rank = barrier.cluster_rank() if several else _u32(0)
        for number in range(blocks):
            start = _u32(column + _u32(number) * block_columns)
            k = _u32(_u32(start // block_columns) * _u32(k_tiles * _u32(DEPTH)))
            for _ in range(k_tiles):
                full, target = pair_of(barriers, stage), _u32(base + stage * stage_bytes)
                begin_loading(full, phase, nbytes)
                load_a(target, map_a, full, row, _u32(k + shift))
                place = _u32(target + a_bytes + rank * share * _u32(DEPTH * 2))
                load_b(place, map_b, full, _u32(start + rank * share), k)
                k = _u32(k + _u32(DEPTH))
                stage, phase = following(stage, phase)
        return stage, phase

    return load_diagonal


@device
def _nothing_diagonal(base, barriers, map_a, map_b, k_tiles, row, column, shift, stage, phase):
    return stage, phase


def segment_loader(tile: WgmmaTile) -> Callable:
    """A device function by which the loading thread asks for all stages of a segment of two matrices."""
    load, following = _stage_loader(tile), next_stage(tile.stages)
    diagonal, stage_bytes = tile.diagonal > 0, _u32(tile.stage_bytes)
    load_diagonal = _diagonal_loader(tile) if diagonal else _nothing_diagonal

    @device
    def load_segment(base, barriers, table, at, row, column, columns, q, stage, phase):
        map_a, map_b = np.uint64(table[at]), np.uint64(table[at + np.int64(1)])
        k_tiles, word = _u32(table[at + np.int64(2)]), table[at + np.int64(4)]
        k, shift, flags = _u32(word), _u32(0), flags_of(table[at + np.int64(5)])
        if flags & _u32(GROUPS) != _u32(0):
            group = _u32(column // _u32(word))
            column = _u32(column - group * _u32(word))
            k, shift = _u32(0), _u32(group * _upper_half(word))
        if flags & _u32(WAITS) != _u32(0):
            barrier.wait_for_previous_grid()
        if diagonal and flags & _u32(DIAGONAL) != _u32(0):
            return load_diagonal(base, barriers, map_a, map_b, k_tiles, row, column, shift, stage, phase)
        for _ in range(k_tiles):
            full, target = pair_of(barriers, stage), _u32(base + stage * stage_bytes)
            begin_loading(full, phase, stage_bytes)
            load(target, full, map_a, map_b, row, column, k, shift, columns)
            k = _u32(k + _u32(DEPTH))
            stage, phase = following(stage, phase)
        return stage, phase

    return load_segment


@device
def _acquire_maps(table, at):
    """Make a part's maps, which the host has written to memory, visible to the block's loads and stores."""
    first, segments, result = table[at], table[at + np.int64(1)], table[at + np.int64(2)]
    for segment in range(segments):
        words = first + np.int64(segment) * np.int64(SEGMENT_WORDS)
        barrier.tensor_map_acquire(np.uint64(table[words]))
        barrier.tensor_map_acquire(np.uint64(table[words + np.int64(1)]))
    if result != np.int64(0):
        barrier.tensor_map_acquire(np.uint64(result))


def producer(tile: WgmmaTile, load_segment: Callable) -> Callable:
    """The loading thread: every stage of every segment of every tile of the block."""
    place, work, cluster = placement(tile), work_of(tile), _u32(tile.cluster)

    @device
    def produce(base, barriers, table, parts, rows, columns, panel, q):
        stage, phase = _u32(0), _u32(1)
        tiles, total = work(parts, rows, columns)
        number = _u32(_u32(block_x()) // cluster)
        acquired = parts
        while number < total:
            part = _u32(number // tiles)
            row, column = place(_u32(number - part * tiles), rows, columns, panel)
            at = np.int64(part) * np.int64(PART_WORDS)
            if part != acquired:
                _acquire_maps(table, at)
                acquired = part
            first, segments = table[at], table[at + np.int64(1)]
            for segment in range(segments):
                words = first + np.int64(segment) * np.int64(SEGMENT_WORDS)
                stage, phase = load_segment(base, barriers, table, words, row, column, columns, q, stage, phase)
            number = _u32(number + _u32(_u32(grid_x()) // cluster))

    return produce
