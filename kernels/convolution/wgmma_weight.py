"""The weight's gradient of a convolution on Hopper, channels last: for every tap a product over the output pixels.

dW[n, tap, c] = sum over pixels of G[pixel, n] X[source(pixel, tap), c]. A stage's depth are the 64 pixels of a box of
one image: TMA brings their channels of G, and those of the input pixels that the tap meets there, shifted and strided
by the map. What lies outside of an image arrives as zeros.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from kernels import barrier
from kernels.matmul.wgmma import persistent
from kernels.matmul.wgmma_store import ROWS_OF_A_MATRIX, STAGING_BYTES, tile_store
from kernels.matmul.wgmma_tile import ROWS, WgmmaTile
from kernels.stages import begin_loading, next_stage, pair_of
from kernels.target import device, i64, kernel_factory, types
from kernels.wgmma import DEPTH

SHAPE = types.Tuple((i64,) * 7)
"""Types of the shape: boxes across and down an image; taps across; the input's pixel at output pixel 0 along x and y;
the steps of a tap along x and y."""

ACROSS, DOWN, TAPS_X, FIRST_X, FIRST_Y, STEP_X, STEP_Y = range(7)
_CHANNELS = 64
_u32 = np.uint32


def _channel_loader(extent: int, multicast: int) -> Callable:
    """A device function that loads ``extent`` channels of a box of pixels, for ``multicast`` blocks."""
    everyone, boxes, box_bytes = np.uint16((1 << multicast) - 1), extent // _CHANNELS, _u32(_CHANNELS * DEPTH * 2)
    load_box, load_box_everywhere = barrier.tma_load(4), barrier.tma_load_multicast(4)

    @device
    def load(target, tensor_map, full, channel, x, y, image):
        for i in range(boxes):
            place, first = _u32(target + _u32(i) * box_bytes), _u32(channel + _u32(i) * _u32(_CHANNELS))
            if multicast > 1:
                load_box_everywhere(place, tensor_map, full, first, x, y, image, everyone)
            else:
                load_box(place, tensor_map, full, first, x, y, image)

    return load


def _pixel_loader(tile: WgmmaTile, box_width: int, stride_x: int, stride_y: int) -> Callable:
    """A device function that asks for all stages of a part: boxes of pixels of one tap.

    The segment's word for its first value of K is its first box, and the tap in the word's upper half.
    """
    piece, several = tile.columns // tile.pieces, tile.cluster > 1
    load_gradient, load_input = _channel_loader(ROWS, 1), _channel_loader(piece, tile.cluster)
    stage_bytes, a_bytes = _u32(tile.stage_bytes), _u32(tile.a_bytes)
    wide, tall, across, along = (_u32(n) for n in (box_width, DEPTH // box_width, stride_x, stride_y))
    following = next_stage(tile.stages)

    @device
    def load_segment(base, barriers, table, at, row, column, columns, q, stage, phase):
        gradient, source = np.uint64(table[at]), np.uint64(table[at + np.int64(1)])
        boxes, word = _u32(table[at + np.int64(2)]), np.uint64(table[at + np.int64(4)])
        box, tap = _u32(word), _u32(word >> np.uint64(32))
        tap_y = _u32(tap // _u32(q[TAPS_X]))
        tap_x = _u32(tap - _u32(tap_y * _u32(q[TAPS_X])))
        shift_y = _u32(_u32(q[FIRST_Y]) + tap_y * _u32(q[STEP_Y]))
        shift_x = _u32(_u32(q[FIRST_X]) + tap_x * _u32(q[STEP_X]))
        rank = barrier.cluster_rank() if several else _u32(0)
        start, share = _u32(column + rank * _u32(piece)), _u32(a_bytes + rank * _u32(piece * DEPTH * 2))
        for _ in range(boxes):
            line = _u32(box // _u32(q[ACROSS]))
            image = _u32(line // _u32(q[DOWN]))
            x = _u32(_u32(box - line * _u32(q[ACROSS])) * wide)
            y = _u32(_u32(line - image * _u32(q[DOWN])) * tall)
            full, target = pair_of(barriers, stage), _u32(base + stage * stage_bytes)
            begin_loading(full, phase, stage_bytes)
            load_gradient(target, gradient, full, row, x, y, image)
            in_x, in_y = _u32(x * across + shift_x), _u32(y * along + shift_y)
            load_input(_u32(target + share), source, full, start, in_x, in_y, image)
            box = _u32(box + _u32(1))
            stage, phase = following(stage, phase)
        return stage, phase

    return load_segment


@kernel_factory(
    ("bf16", "f32", WgmmaTile(256, 4, 2, False, False), 16, (1, 1)),
    ("f16", "f16", WgmmaTile(64, 4, 1, False, False), 8, (2, 2)),
)
def weight_gradient_wgmma(kind: str, out_kind: str, tile: WgmmaTile, box_width: int, stride: tuple[int, int]):
    """A weight's gradient by boxes of 64 / ``box_width`` by ``box_width`` output pixels, ``stride`` (y, x) apart.

    Parameters: those of `matmul.wgmma.persistent` with rows a group's output channels, columns its input channels, and
    parts of one segment each: a tap and some of its boxes. Maps are G's and x's [channels, width, height, images]; the
    last parameters are :data:`SHAPE`.
    """
    target = tile_store(out_kind, tile.columns, "tma", (), ROWS_OF_A_MATRIX)
    load = _pixel_loader(tile, box_width, stride[1], stride[0])
    return persistent(tile, kind, target, STAGING_BYTES, load, (), SHAPE)
