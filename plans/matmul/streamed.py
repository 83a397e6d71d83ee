"""How Hopper's narrow products are shared out among multiprocessors, and what their launches are told."""

from __future__ import annotations

from typing import NamedTuple

from kernels.matmul.streamed_tile import GROUP_ROWS, StreamTile
from kernels.wgmma import DEPTH
from plans.core.device import Device
from plans.core.operand import Operand
from plans.core.tensor import TensorRef
from plans.core.tensor_map import Box, map_address
from plans.matmul.program import MatmulProgram

_UNIT = 8
_MOST_ROWS, _MOST_PAIRED = 4 * GROUP_ROWS, 2 * GROUP_ROWS
"""Rows of a tile, and of one whose depth two blocks share."""

_PAIR = 2

# In cycles as a product's count has them, 0.69 ns each on an H200: what a multiprocessor reads beside a product on all
# others (55 to 77 GB/s), what each of all reads (30 GB/s, memory's rate), and a launch's beginning and end.
_BYTES_A_CYCLE, _BYTES_A_CYCLE_OF_ALL, _FIXED_CYCLES = 44.0, 21.0, 3000.0


class Stream(NamedTuple):
    """A launch: the block's tile, rows of a tile, tiles of a result and of all, blocks."""

    tile: StreamTile
    height: int
    tiles: int
    all_tiles: int
    blocks: int

    def arguments(self, depth: int) -> tuple[int, int, int, int]:
        """What the kernel is told of it."""
        return self.height, self.tiles, self.all_tiles, -(-depth // DEPTH)

    def cycles(self, depth: int, bytes_a_cycle: float) -> float:
        """How long it takes, by the bytes that its blocks read of both operands."""
        nbytes = 2 * self.all_tiles * (self.height + self.tile.columns) * depth
        return _FIXED_CYCLES + nbytes / (self.blocks * bytes_a_cycle)


def _rounds(rows: int, results: int, workers: int, most: int) -> int:
    """How many tiles of the greatest height each has to take."""
    return -(-results * -(-rows // most) // workers)


def stream_of(
    rows: int, results: int, columns: int, multiprocessors: int, beside: int = 0, by_lines: bool = False
) -> Stream:
    """How ``results`` of ``rows`` are shared out: tiles of equal height, as many as give all blocks the same.

    Pairs of blocks share a tile's depth where each pair has one tile at most; else blocks walk. ``beside``: on so many
    blocks, in pairs, beside another grid.
    """
    pairs, beside = max(1, multiprocessors // _PAIR), beside // _PAIR * _PAIR
    parts = 1 if beside or _rounds(rows, results, pairs, _MOST_PAIRED) > 1 else _PAIR
    workers, most = (pairs, _MOST_PAIRED) if parts > 1 else (beside or multiprocessors, _MOST_ROWS)
    of_one = max(1, _rounds(rows, results, workers, most) * workers // results)
    height = min(most, -(-rows // (of_one * _UNIT)) * _UNIT)
    tiles = -(-rows // height)
    tile = StreamTile(-(-height // GROUP_ROWS), columns, parts, _PAIR if beside else parts, by_lines)
    blocks = parts * results * tiles if parts > 1 else beside or min(workers, results * tiles)
    return Stream(tile, height, tiles, results * tiles, blocks)


def blocks_beside(second: MatmulProgram, device: Device, rows: int, results: int, columns: int, depth: int) -> int:
    """Multiprocessors, in pairs, that a product leaves idle in its last round of tiles.

    0 where a narrow product before it would end sooner, all in all, on all of them: the first tiles of the others need
    its result in the end.
    """
    blocks, cycles = second.spare()
    if not blocks:
        return 0
    late = stream_of(rows, results, columns, device.multiprocessors, blocks).cycles(depth, _BYTES_A_CYCLE) - cycles
    before = stream_of(rows, results, columns, device.multiprocessors).cycles(depth, _BYTES_A_CYCLE_OF_ALL)
    return blocks if late < before else 0


def rows_map(device: Device, tensor: TensorRef, operand: Operand, box: tuple[int, int]) -> tuple[int, int]:
    """The address of the map of a matrix, or of a batch of them, moved in boxes of (lines, columns), swizzled by lines;
    and 1 where there is a batch, else 0.
    """
    lines, columns = operand.shape[-2:]
    batched = len(operand.shape) > 2
    results, step = (operand.shape[0], operand.strides[0]) if batched else (1, lines * operand.strides[-2])
    extents, strides = (columns, lines, results), (operand.strides[-2], step)
    span = box[1] * operand.element.itemsize
    matrix = Box(tensor.address, operand.element, extents, strides, (*box[::-1], 1), swizzle=span)
    return map_address(device, matrix), int(batched)
