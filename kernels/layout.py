"""Changes of layout: a batched matrix transpose through shared memory, tile by tile, coalesced on both sides.

Elements are moved, never converted, so the result has the same bits. The filter axes of convolution weights are a
permutation of the rows on one of the two sides.
"""

from __future__ import annotations

import numpy as np

from kernels import warp
from kernels.target import SIMULATOR, cuda, device, f32p, i32p, i64, kernel_factory, types, u16p

TILE = 32
THREADS = 32 if SIMULATOR else 256

_PASS = THREADS // TILE
_PASSES = TILE // _PASS
# One element of padding in a row, so that a column of the tile lies in 32 different banks.
_ROW = TILE + 1
_CELLS = TILE * _ROW

_WORDS = {"u16": (u16p, types.uint16), "i32": (i32p, types.int32), "f32": (f32p, types.float32)}


@device
def _unchanged(row, channels, taps):
    return row


@device
def _taps_first(row, channels, taps):
    """Row (channel, tap) of [channels * taps] is row (tap, channel) of [taps * channels]."""
    channel = np.uint32(row) // np.uint32(taps)
    tap = np.uint32(row) - channel * np.uint32(taps)
    return np.int64(tap) * channels + np.int64(channel)


_ROW_MAPS = {
    "none": (_unchanged, _unchanged),
    "read": (_taps_first, _unchanged),
    "write": (_unchanged, _taps_first),
}


@kernel_factory(("u16", "none"), ("u16", "read"), ("f32", "write"), ("i32", "read"))
def transpose(word, mapped):
    """out[b, write(c), r] = source[b, read(r), c] for source [batch, rows, columns], out [batch, columns, rows].

    ``mapped`` says which of the two maps takes (channel, tap) to (tap, channel); the other changes nothing.
    Parameters: source, out, rows, columns, tiles down, tiles across, channels, taps. One block a tile; each extent
    below 2**31.
    """
    pointer, element = _WORDS[word]
    read, write = _ROW_MAPS[mapped]

    def kernel(source, out, rows, columns, down, across, channels, taps):
        tile = cuda.shared.array(_CELLS, element)
        thread = np.int64(warp.thread_index())
        lane = thread % np.int64(TILE)
        first = thread // np.int64(TILE)

        block = np.uint32(warp.block_x())
        line = block // np.uint32(across)
        column = np.int64(block - line * np.uint32(across)) * np.int64(TILE)
        batch = line // np.uint32(down)
        row = np.int64(line - batch * np.uint32(down)) * np.int64(TILE)
        start = np.int64(batch) * rows * columns

        for step in range(_PASSES):
            at = first + np.int64(step * _PASS)
            if row + at < rows and column + lane < columns:
                tile[at * np.int64(_ROW) + lane] = source[
                    start + read(row + at, channels, taps) * columns + column + lane
                ]
        warp.block_barrier()
        for step in range(_PASSES):
            at = first + np.int64(step * _PASS)
            if column + at < columns and row + lane < rows:
                out[start + write(column + at, channels, taps) * rows + row + lane] = tile[lane * np.int64(_ROW) + at]

    return kernel, (pointer, pointer, i64, i64, i64, i64, i64, i64), {"threads": THREADS}
