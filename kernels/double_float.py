"""Pairs of fp32 that stand for their sum, some 48 bits: the second keeps what fp32 rounds away.

Dekker, A floating-point technique for extending the available precision, 1971; Ogita, Rump and Oishi, Accurate sum and
dot product, 2005. Each operation is one block of PTX whose roundings are spelled out, since a compiler that fuses a
product with a sum would break it. A result that is not finite shows in the first word; the second may then be NaN.
The twins take the same steps.
"""

from __future__ import annotations

import math

import numpy as np

from kernels.bits import not_finite
from kernels.ptx import instruction
from kernels.target import device


def _f32(value):
    return float(np.float32(value))


def _two_sum(x, y):
    s = _f32(x + y)
    v = _f32(s - x)
    return s, _f32(_f32(x - _f32(s - v)) + _f32(y - v))


def _two_product(x, y):
    p = _f32(x * y)
    return p, x * y - p


def _normalized(s, e):
    high = _f32(s + e) if math.isfinite(s) else s
    return np.float32(high), np.float32(e - _f32(high - s))


def _multiply_add(a, b, high, low):
    p, r = _two_product(float(a), float(b))
    s, e = _two_sum(float(high), p)
    return np.float32(s), np.float32(float(low) + _f32(e + r))


def _add_pairs(a_high, a_low, b_high, b_low):
    s, e = _two_sum(float(a_high), float(b_high))
    return _normalized(s, _f32(e + _f32(float(a_low) + float(b_low))))


def _multiply_pairs(a_high, a_low, b_high, b_low):
    a, b = float(a_high), float(b_high)
    p, r = _two_product(a, b)
    return _normalized(p, _f32(_f32(a * float(b_low) + r) + float(a_low) * b))


# s = x + y, and e = what that rounded away [Knuth].
_TWO_SUM = (
    "add.rn.f32 s, {0}, {1}; sub.rn.f32 v, s, {0}; sub.rn.f32 x, s, v; sub.rn.f32 x, {0}, x; sub.rn.f32 y, {1}, v; "
    "add.rn.f32 e, x, y; "
)
_TWO_PRODUCT = "mul.rn.f32 p, {0}, {1}; neg.f32 n, p; fma.rn.f32 r, {0}, {1}, n; "
# The pair of s and a smaller e, by which the first word is again the nearest to the sum; s itself where it is not
# finite, since e is then NaN.
_NORMALIZED = (
    "testp.finite.f32 f, {0}; add.rn.f32 h, {0}, {1}; selp.f32 h, h, {0}, f; "
    "sub.rn.f32 v, h, {0}; sub.rn.f32 $1, {1}, v; mov.f32 $0, h; "
)
_REGISTERS = "{ .reg .pred f; .reg .f32 s, v, x, y, e, p, n, r, h; "

# (a, b, high, low): the pair plus a * b; not normalized, which the end of a dot product does.
multiply_add = instruction(
    _REGISTERS
    + _TWO_PRODUCT.format("$2", "$3")
    + _TWO_SUM.format("$4", "p")
    + "add.rn.f32 e, e, r; add.rn.f32 $1, $5, e; mov.f32 $0, s; }",
    "ffff",
    "ff",
    twin=_multiply_add,
    pure=True,
)
add_pairs = instruction(
    _REGISTERS
    + _TWO_SUM.format("$2", "$4")
    + "add.rn.f32 r, $3, $5; add.rn.f32 e, e, r; "
    + _NORMALIZED.format("s", "e")
    + "}",
    "ffff",
    "ff",
    twin=_add_pairs,
    pure=True,
)
multiply_pairs = instruction(
    _REGISTERS
    + _TWO_PRODUCT.format("$2", "$4")
    + "fma.rn.f32 r, $2, $5, r; fma.rn.f32 r, $3, $4, r; "
    + _NORMALIZED.format("p", "r")
    + "}",
    "ffff",
    "ff",
    twin=_multiply_pairs,
    pure=True,
)


@device
def rounded_pair(high, low):
    """A pair as one fp32 value."""
    return high if not_finite(high) else np.float32(high + low)
