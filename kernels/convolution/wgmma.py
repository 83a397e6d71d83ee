"""Convolutions on Hopper, channels last: the pipeline of `matmul.wgmma` over boxes of pixels instead of rows.

A tile's 128 rows are a box of output pixels of one image. For every tap and 64 channels TMA brings the input pixels
that the box meets there, shifted and strided by the map; what lies outside of the image arrives as zeros, which is the
padding. The gradient of the input (stride 1) is the same with taps the other way round, and the weight read along its
output channels.

A row's number is 128 times its box's plus its place inside, boxes counted through an image, then through the images.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from kernels import barrier
from kernels.matmul.wgmma import persistent
from kernels.matmul.wgmma_store import STAGING_BYTES, WARP_ROWS, Rows, tile_store
from kernels.matmul.wgmma_tile import ROWS, WgmmaTile
from kernels.stages import begin_loading, next_stage, pair_of
from kernels.target import device, i64, kernel_factory, types
from kernels.wgmma import DEPTH

SHAPE = types.Tuple((i64,) * 12)
"""Types of the shape: boxes across and down an image, output width and height, images; taps across and in all, tiles of
channels; the input's pixel at output pixel 0 along x and y, and the steps of a tap along x and y (negative ones of a
gradient)."""

ACROSS, DOWN, WIDTH, HEIGHT, IMAGES, TAPS_X, TAPS, C_TILES, FIRST_X, FIRST_Y, STEP_X, STEP_Y = range(12)
_u32 = np.uint32


def _locate(box_width: int) -> Callable:
    """A device function: image, y and x of a row's pixel."""
    box_height, mask, shift = _u32(ROWS // box_width), _u32(box_width - 1), _u32(box_width.bit_length() - 1)

    @device
    def locate(row, q):
        across, down = _u32(q[ACROSS]), _u32(q[DOWN])
        box, inside = _u32(row // _u32(ROWS)), _u32(row & _u32(ROWS - 1))
        line = _u32(box // across)
        image = _u32(line // down)
        y = _u32(_u32(line - image * down) * box_height + (inside >> shift))
        x = _u32(_u32(_u32(box - line * across) << shift) + (inside & mask))
        return image, y, x

    return locate


def _rows_of_pixels(box_width: int) -> Rows:
    """Where a box's pixels lie in the result, and how a warp's 16 of them are stored."""
    locate, store_box = _locate(box_width), barrier.tma_store(4)

    @device
    def of_epilogue(row, rows, q):
        image, y, x = locate(row, q)
        image, y = min(image, _u32(q[IMAGES] - np.int64(1))), min(y, _u32(q[HEIGHT] - np.int64(1)))
        x = min(x, _u32(q[WIDTH] - np.int64(1)))
        return _u32(_u32(image * _u32(q[HEIGHT]) + y) * _u32(q[WIDTH]) + x)

    @device
    def send(tensor_map, slot, column, row, rows, q):
        image, y, x = locate(row, q)
        if image < _u32(q[IMAGES]):
            store_box(tensor_map, slot, column, x, y, image)

    return Rows(of_epilogue, send)


def _tap_loader(tile: WgmmaTile, box_width: int, stride_x: int, stride_y: int) -> Callable:
    """A device function that asks for all stages of a tile: taps, then channels."""
    locate = _locate(box_width)
    load_pixels, load_weight = barrier.tma_load(4), barrier.tma_load(3)
    load_weight_everywhere, everyone = barrier.tma_load_multicast(3), np.uint16((1 << tile.cluster) - 1)
    following, stage_bytes, a_bytes = next_stage(tile.stages), _u32(tile.stage_bytes), _u32(tile.a_bytes)
    piece, several, k_major = tile.columns // tile.pieces, tile.cluster > 1, tile.b_k_major
    piece_bytes, boxes, box_bytes = _u32(piece * DEPTH * 2), piece // 64, _u32(64 * DEPTH * 2)
    across, along = _u32(stride_x), _u32(stride_y)

    @device
    def weight_box(target, tensor_map, full, first, tap, second):
        if several:
            load_weight_everywhere(target, tensor_map, full, first, tap, second, everyone)
        else:
            load_weight(target, tensor_map, full, first, tap, second)

    @device
    def load_tap(target, full, map_a, map_b, image, y, x, column, tap, c):
        load_pixels(target, map_a, full, c, x, y, image)
        rank = barrier.cluster_rank() if several else _u32(0)
        place, start = _u32(target + a_bytes + rank * piece_bytes), _u32(column + rank * _u32(piece))
        if k_major:
            weight_box(place, map_b, full, c, tap, start)
        else:
            for i in range(boxes):
                shift = _u32(i)
                weight_box(_u32(place + shift * box_bytes), map_b, full, _u32(start + shift * _u32(64)), tap, c)

    @device
    def load_segment(base, barriers, table, at, row, column, columns, q, stage, phase):
        map_a, map_b = np.uint64(table[at]), np.uint64(table[at + np.int64(1)])
        image, y, x = locate(row, q)
        y, x = _u32(y * along + _u32(q[FIRST_Y])), _u32(x * across + _u32(q[FIRST_X]))
        taps_x, taps, c_tiles = _u32(q[TAPS_X]), _u32(q[TAPS]), _u32(q[C_TILES])
        tap_y, tap_x = _u32(0), _u32(0)
        for tap in range(taps):
            at_y, at_x = _u32(y + tap_y * _u32(q[STEP_Y])), _u32(x + tap_x * _u32(q[STEP_X]))
            for tile_of_c in range(c_tiles):
                full, target = pair_of(barriers, stage), _u32(base + stage * stage_bytes)
                begin_loading(full, phase, stage_bytes)
                c = _u32(_u32(tile_of_c) * _u32(DEPTH))
                load_tap(target, full, map_a, map_b, image, at_y, at_x, column, _u32(tap), c)
                stage, phase = following(stage, phase)
            tap_x = _u32(tap_x + _u32(1))
            if tap_x == taps_x:
                tap_x, tap_y = _u32(0), _u32(tap_y + _u32(1))
        return stage, phase

    return load_segment


def warp_box(box_width: int) -> tuple[int, int]:
    """Height and width of the pixels that a warp stores at a time."""
    width = min(box_width, WARP_ROWS)
    return WARP_ROWS // width, width


@kernel_factory(
    ("bf16", "bf16", WgmmaTile(160, 4, 2), 16, (1, 1), (("bias", "bf16"), ("silu",))),
    ("bf16", "f32", WgmmaTile(128, 4, 1), 8, (2, 2), ()),
    ("f16", "f16", WgmmaTile(128, 4, 2, b_k_major=False), 32, (1, 1), ()),
)
def convolve_wgmma(kind: str, out_kind: str, tile: WgmmaTile, box_width: int, stride: tuple[int, int], steps: tuple):
    """A convolution by boxes of 128 / ``box_width`` by ``box_width`` output pixels, ``stride`` (y, x) apart.

    Parameters: those of `matmul.wgmma.persistent` with rows as numbered above, one part of one segment whose maps are
    x's [channels, width, height, images] and the weight's [channels, taps, columns]; the last are :data:`SHAPE`.
    """
    target = tile_store(out_kind, tile.columns, "tma", steps, _rows_of_pixels(box_width))
    load = _tap_loader(tile, box_width, stride[1], stride[0])
    return persistent(tile, kind, target, STAGING_BYTES, load, steps, SHAPE)
