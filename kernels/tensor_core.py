"""Tensor-core primitives of sm_80 and later: ldmatrix and mma.sync m16n8k16, fp32 accumulation.

Fragment layouts are PTX's: lane = 4 g + t. A (16x16): register r holds row g + 8 (r & 1), columns
2 t + 8 (r >> 1) and the next. B (16x8): register r holds rows 2 t + 8 r and the next, column g. C (16x8):
value i is row g + 8 (i >> 1), column 2 t + (i & 1).
"""

from __future__ import annotations

import numpy as np

from kernels.memory import _words
from kernels.ptx import SHARED, instruction
from kernels.simulator import collective

_LANE = np.arange(32)
_G, _T = _LANE >> 2, _LANE & 3
_C_ROW, _C_COLUMN = np.array([0, 0, 8, 8]), np.array([0, 1, 0, 1])


def _rows_of_matrices(lanes):
    """Four 8x8 matrices of 16-bit values; lanes 8j..8j+7 give the addresses of matrix j's rows."""
    return [np.stack([_words(a, o, 4).view(np.uint16) for a, o in lanes[8 * j : 8 * j + 8]]) for j in range(4)]


def _deal(matrices):
    packed = [m[:, 0::2].astype(np.uint32) | m[:, 1::2].astype(np.uint32) << 16 for m in matrices]
    return [tuple(p[lane >> 2, lane & 3] for p in packed) for lane in range(32)]


def _deal_plain(lanes):
    return _deal(_rows_of_matrices(lanes))


def _deal_transposed(lanes):
    return _deal([matrix.T for matrix in _rows_of_matrices(lanes)])


def _ldmatrix(array, index):
    return collective(_deal_plain, (array, index))


def _ldmatrix_transposed(array, index):
    return collective(_deal_transposed, (array, index))


def _ldmatrix_ahead(array, index, offset):
    return collective(_deal_plain, (array, index + np.int64(offset) // array.itemsize))


def _ldmatrix_transposed_ahead(array, index, offset):
    return collective(_deal_transposed, (array, index + np.int64(offset) // array.itemsize))


def _transpose(lanes):
    packed = np.array([word for (word,) in lanes], np.uint32).reshape(8, 4)
    return [word for (word,) in _deal([packed.view(np.uint16).T])]


def _transposed_matrix(word):
    return collective(_transpose, (word,))


def _halves(words, to_f32):
    words = np.asarray(words, np.uint32)
    return to_f32(np.stack([words & 0xFFFF, words >> 16], -1))


def _bf16_f32(u):
    return (u.astype(np.uint32) << 16).view(np.float32)


def _f16_f32(u):
    return u.astype(np.uint16).view(np.float16).astype(np.float32)


HALVES_TO_F32 = {"bf16": _bf16_f32, "f16": _f16_f32}
"""Twins' conversions of arrays of 16-bit values."""


def accumulate(a, b, c):
    """The sum c + a @ b in fp32, as the twins make it; tensor cores cut terms off, each generation its own way."""
    return c + a @ b


def _mma(to_f32, depth=16):
    of_b = depth // 8
    of_a = 2 * of_b

    def combine(lanes):
        fragment_a = _halves([v[:of_a] for v in lanes], to_f32)
        fragment_b = _halves([v[of_a : of_a + of_b] for v in lanes], to_f32)
        a, b = np.zeros((16, depth), np.float32), np.zeros((depth, 8), np.float32)
        for r in range(of_a):
            for half in range(2):
                a[_G + 8 * (r & 1), 2 * _T + 8 * (r >> 1) + half] = fragment_a[:, r, half]
        for r in range(of_b):
            for half in range(2):
                b[2 * _T + 8 * r + half, _G] = fragment_b[:, r, half]
        rows, columns = _G[:, None] + _C_ROW, 2 * _T[:, None] + _C_COLUMN
        c = np.empty((16, 8), np.float32)
        c[rows, columns] = [v[of_a + of_b :] for v in lanes]
        return [tuple(v) for v in accumulate(a, b, c)[rows, columns]]

    def mma(*operands):
        return collective(combine, operands)

    return mma


_MMA = (
    "mma.sync.aligned.m16n8k16.row.col.f32.{0}.{0}.f32 {{$0,$1,$2,$3}},{{$4,$5,$6,$7}},{{$8,$9}},{{$10,$11,$12,$13}};"
)

mma_bf16 = instruction(_MMA.format("bf16"), "rrrrrrffff", "ffff", twin=_mma(_bf16_f32), pure=True)
# Half as deep: A (16x8) is registers 0 and 1, B (8x8) register 0.
mma_bf16_short = instruction(
    "mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {$0,$1,$2,$3},{$4,$5},{$6},{$7,$8,$9,$10};",
    "rrrffff",
    "ffff",
    twin=_mma(_bf16_f32, 8),
    pure=True,
)
mma_f16 = instruction(_MMA.format("f16"), "rrrrrrffff", "ffff", twin=_mma(_f16_f32), pure=True)
MMA = {"bf16": mma_bf16, "f16": mma_f16}
"""The product of a kind of factors."""

ldmatrix = instruction(
    "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {$0,$1,$2,$3}, [$4];", (SHARED,), "rrrr", twin=_ldmatrix
)
ldmatrix_transposed = instruction(
    "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {$0,$1,$2,$3}, [$4];",
    (SHARED,),
    "rrrr",
    twin=_ldmatrix_transposed,
)
# The same, `offset` bytes ahead: a constant offset becomes a part of the instruction, where LLVM would compute another
# address.
ldmatrix_ahead = instruction(
    "{ .reg .b32 at; add.u32 at, $4, $5; ldmatrix.sync.aligned.m8n8.x4.shared.b16 {$0,$1,$2,$3}, [at]; }",
    (SHARED, "r"),
    "rrrr",
    twin=_ldmatrix_ahead,
)
ldmatrix_transposed_ahead = instruction(
    "{ .reg .b32 at; add.u32 at, $4, $5; ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {$0,$1,$2,$3}, [at]; }",
    (SHARED, "r"),
    "rrrr",
    twin=_ldmatrix_transposed_ahead,
)
# An 8x8 matrix of 16-bit values, in fragments as B's register: lane 4 g + t holds row g, columns 2 t and the next.
transposed_matrix = instruction(
    "movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;", "r", "r", twin=_transposed_matrix, pure=True
)
