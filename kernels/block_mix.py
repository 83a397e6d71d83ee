"""Blocks of a row mixed by a small matrix: out[t, l, e] = scale * sum_m w[l, m] x[t, m, e], that is (w kron I) x.

What LoKr needs before its second half: reading x and writing out is all the work. On tensor cores a warp takes 64 of a
row's e: lane (g, t) loads eight neighbours at e = 8 g of blocks 2 t and 2 t + 1, whose pairs are the instruction's
operand for eight groups of columns, and holds in the end 16 neighbours of each of its blocks l. Nothing passes through
shared memory but w.
"""

from __future__ import annotations

import numpy as np

from kernels import barrier, bits, memory, tensor_core
from kernels.elements import ELEMENTS
from kernels.ptx import instruction
from kernels.target import SIMULATOR, cuda, device, f32, i64, kernel_factory
from kernels.warp import block_barrier, block_x, grid_x, thread_index

WARPS = 2 if SIMULATOR else 8
THREADS = 32 * WARPS
SPAN = 64
"""Values of e that a warp takes at once."""

MOST_STEPS = 8
"""Groups of 16 blocks m that fit into registers."""

_MMA = {"bf16": tensor_core.mma_bf16, "f16": tensor_core.mma_f16}
_PACK = {"bf16": bits.pack_bf16, "f16": bits.pack_f16}
_u32 = np.uint32


def _low_halves(a, b):
    return _u32((int(a) & 0xFFFF) | (int(b) & 0xFFFF) << 16)


def _high_halves(a, b):
    return _u32(int(a) >> 16 | (int(b) >> 16) << 16)


low_halves = instruction("prmt.b32 $0, $1, $2, 0x5410;", "rr", "r", twin=_low_halves, pure=True)
high_halves = instruction("prmt.b32 $0, $1, $2, 0x7632;", "rr", "r", twin=_high_halves, pure=True)


def weight_pitch(steps: int) -> int:
    """Elements from a row of w to the next in shared memory: 16 bytes beyond whole steps, so rows differ in bank."""
    return 16 * steps + 8


@kernel_factory(("bf16", 1, False), ("bf16", 3, True), ("f16", 8, False), ("bf16", 3, False, True))
def mix_blocks(kind: str, steps: int, transposed: bool, early: bool = False):
    """Parameters: out, x, w, scale, rows, blocks of out, blocks of x, width e, row strides of out and x.

    ``steps`` are groups of 16 blocks of x. w is [blocks of out, blocks of x], or stored the other way round if
    ``transposed``. Widths and strides are multiples of eight elements. With ``early`` the next grid, which reads out,
    may begin at once (sm_90), and out stays in L2 for it.
    """
    element, mma, pack = ELEMENTS[kind], _MMA[kind], _PACK[kind]
    pitch, depth, operand_words = weight_pitch(steps), 16 * steps, 16 * steps
    store128 = memory.store128 if early else memory.store128_stream

    @device
    def stage_weight(shared, w, out_blocks, in_blocks, thread):
        """Put w into shared memory, with zeros up to whole tiles."""
        padded = _u32(_u32(_u32(out_blocks + np.int64(15)) >> _u32(4)) << _u32(4))
        count = _u32(padded * _u32(depth))
        for turn in range(_u32((count + _u32(THREADS - 1)) // _u32(THREADS))):
            place = _u32(_u32(turn) * _u32(THREADS) + thread)
            row, column = np.int64(place // _u32(depth)), np.int64(place % _u32(depth))
            value = np.uint16(0)
            if row < out_blocks and column < in_blocks:
                value = w[column * out_blocks + row] if transposed else w[row * in_blocks + column]
            if place < count:
                shared[row * np.int64(pitch) + column] = value

    @device
    def fetch(operand, x, start, in_blocks, width, e, t):
        """The lane's pairs of blocks for all steps: word 16 s + 8 h + j is group j of blocks 16 s + 8 h + 2 t, + 1."""
        for step in range(2 * steps):
            first = np.int64(_u32(_u32(8 * step) + (t << _u32(1))))
            place = min(e, width - np.int64(8))
            upper = start + min(first, in_blocks - np.int64(1)) * width + place
            lower = start + min(first + np.int64(1), in_blocks - np.int64(1)) * width + place
            a = memory.load128(x, upper)
            b = memory.load128(x, lower)
            for i in range(4):
                top = a[i] if first < in_blocks else _u32(0)
                below = b[i] if first + np.int64(1) < in_blocks else _u32(0)
                operand[8 * step + 2 * i] = low_halves(top, below)
                operand[8 * step + 2 * i + 1] = high_halves(top, below)

    @device
    def multiply(sums, shared, operand, block0, lane):
        for i in range(32):
            sums[i] = np.float32(0)
        row = np.int64(block0 + (lane & _u32(15)))
        for step in range(steps):
            at = row * np.int64(pitch) + np.int64(_u32(16 * step) + ((lane >> _u32(4)) << _u32(3)))
            a0, a1, a2, a3 = tensor_core.ldmatrix(shared, at)
            for j in range(8):
                sums[4 * j], sums[4 * j + 1], sums[4 * j + 2], sums[4 * j + 3] = mma(
                    a0, a1, a2, a3, operand[16 * step + j], operand[16 * step + 8 + j],
                    sums[4 * j], sums[4 * j + 1], sums[4 * j + 2], sums[4 * j + 3],
                )  # fmt: skip

    @device
    def store(out, start, sums, scale, block, out_blocks, width, e, half):
        """Sixteen neighbours of one block: sums 4 j + 2 half are the first eight, the next ones the others."""
        if block < out_blocks:
            for side in range(2):
                first = 2 * half + side
                at = e + np.int64(8 * side)
                if at < width:
                    store128(
                        out,
                        start + block * width + at,
                        pack(scale * sums[first], scale * sums[first + 4]),
                        pack(scale * sums[first + 8], scale * sums[first + 12]),
                        pack(scale * sums[first + 16], scale * sums[first + 20]),
                        pack(scale * sums[first + 24], scale * sums[first + 28]),
                    )

    def kernel(out, x, w, scale, rows, out_blocks, in_blocks, width, out_stride, x_stride):
        if early:
            barrier.next_grid_may_begin()
        shared = cuda.shared.array(0, np.uint16, alignment=16)
        operand = cuda.local.array(operand_words, np.uint32)
        sums = cuda.local.array(32, np.float32)
        thread = thread_index()
        lane, number = _u32(thread & _u32(31)), _u32(thread >> _u32(5))
        g, t = _u32(lane >> _u32(2)), _u32(lane & _u32(3))
        stage_weight(shared, w, out_blocks, in_blocks, thread)
        block_barrier()
        spans = _u32((width + np.int64(SPAN - 1)) // np.int64(SPAN))
        items = _u32(_u32(rows) * spans)
        item = _u32(_u32(block_x()) * _u32(WARPS) + number)
        while item < items:
            row = np.int64(item // spans)
            e0 = (np.int64(item) - row * np.int64(spans)) * np.int64(SPAN)
            fetch(operand, x, row * x_stride, in_blocks, width, e0 + np.int64(_u32(g << _u32(3))), t)
            for tile in range(_u32((out_blocks + np.int64(15)) >> np.int64(4))):
                block0 = _u32(_u32(tile) << _u32(4))
                multiply(sums, shared, operand, block0, lane)
                e = e0 + np.int64(_u32(t << _u32(4)))
                store(out, row * out_stride, sums, scale, np.int64(block0 + g), out_blocks, width, e, 0)
                store(out, row * out_stride, sums, scale, np.int64(block0 + g + _u32(8)), out_blocks, width, e, 1)
            item = _u32(item + _u32(grid_x()) * _u32(WARPS))

    pointer = element.pointer
    parameters = (pointer, pointer, pointer, f32, i64, i64, i64, i64, i64, i64)
    options = {"threads": THREADS, "min_blocks": 2 if steps <= 4 else 1}
    return kernel, parameters, options | ({"architectures": (9, 0, "a")} if early else {})


@kernel_factory(("bf16", "bf16", "bf16", False), ("f32", "bf16", "f16", True))
def mix_blocks_portable(out_kind: str, kind: str, weight_kind: str, transposed: bool):
    """The same for any kinds and extents: an element of out a thread. Parameters as there."""
    store_one, load_one, load_weight = ELEMENTS[out_kind].store, ELEMENTS[kind].load, ELEMENTS[weight_kind].load

    def kernel(out, x, w, scale, rows, out_blocks, in_blocks, width, out_stride, x_stride):
        index = _u32(_u32(block_x()) * _u32(THREADS) + thread_index())
        of_row = _u32(out_blocks * width)
        if np.int64(index) < rows * np.int64(of_row):
            row = np.int64(index // of_row)
            inside = _u32(index % of_row)
            block = np.int64(inside // _u32(width))
            e = np.int64(inside) - block * width
            value = np.float32(0)
            for m in range(in_blocks):
                weight = load_weight(
                    w, np.int64(m) * out_blocks + block if transposed else block * in_blocks + np.int64(m)
                )
                value += weight * load_one(x, row * x_stride + np.int64(m) * width + e)
            store_one(out, row * out_stride + np.int64(inside), scale * value)

    pointers = (ELEMENTS[out_kind].pointer, ELEMENTS[kind].pointer, ELEMENTS[weight_kind].pointer)
    return kernel, (*pointers, f32, i64, i64, i64, i64, i64, i64), {"threads": THREADS}
