"""Bits of numbers in registers: bf16 and fp16 conversions, one rounding (to nearest, ties to even) on the way down."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from kernels.ptx import instruction
from kernels.target import device

_HIGH_HALF = np.uint32(0xFFFF0000)


def _bf16_bits(x: float) -> int:
    return int(np.float32(x).astype(ml_dtypes.bfloat16).view(np.uint16))


def _f16_bits(x: float) -> int:
    return int(np.float32(x).astype(np.float16).view(np.uint16))


@device
def bf16_to_f32(u):
    """The fp32 value of a bf16 given as its 16 bits: a shift, exact."""
    return np.uint32(np.uint32(u) << np.uint32(16)).view(np.float32)


@device
def low_bf16(pair):
    """The fp32 value of the lower of two packed bf16."""
    return np.uint32(pair << np.uint32(16)).view(np.float32)


@device
def high_bf16(pair):
    """The fp32 value of the upper of two packed bf16."""
    return np.uint32(pair & _HIGH_HALF).view(np.float32)


def _multiply_high(a, b):
    return np.uint32(int(a) * int(b) >> 32)


def _low_halves(a, b):
    return np.uint32(int(a) & 0xFFFF | (int(b) & 0xFFFF) << 16)


def _high_halves(a, b):
    return np.uint32(int(a) >> 16 | int(b) >> 16 << 16)


def _f32_to_bf16(x):
    return np.uint16(_bf16_bits(x))


def _pack_bf16(low, high):
    return np.uint32(_bf16_bits(low) | _bf16_bits(high) << 16)


def _f16_to_f32(u):
    return np.uint16(u).view(np.float16).astype(np.float32)


def _f32_to_f16(x):
    return np.uint16(_f16_bits(x))


def _pack_f16(low, high):
    return np.uint32(_f16_bits(low) | _f16_bits(high) << 16)


def _low_f16(pair):
    return np.uint16(int(pair) & 0xFFFF).view(np.float16).astype(np.float32)


def _high_f16(pair):
    return np.uint16(int(pair) >> 16).view(np.float16).astype(np.float32)


def _again(x):
    return np.uint32(x)


multiply_high = instruction("mul.hi.u32 $0, $1, $2;", "rr", "r", twin=_multiply_high, pure=True)
low_halves = instruction("prmt.b32 $0, $1, $2, 0x5410;", "rr", "r", twin=_low_halves, pure=True)
high_halves = instruction("prmt.b32 $0, $1, $2, 0x7632;", "rr", "r", twin=_high_halves, pure=True)
# The same number, of which the compiler does not know that it is: addresses made of it anew are not kept in registers
# from an earlier use.
again = instruction("mov.b32 $0, $1;", "r", "r", twin=_again)
f32_to_bf16 = instruction("cvt.rn.bf16.f32 $0, $1;", "f", "h", twin=_f32_to_bf16, pure=True)
pack_bf16 = instruction("cvt.rn.bf16x2.f32 $0, $2, $1;", "ff", "r", twin=_pack_bf16, pure=True)
f16_to_f32 = instruction("cvt.f32.f16 $0, $1;", "h", "f", twin=_f16_to_f32, pure=True)
f32_to_f16 = instruction("cvt.rn.f16.f32 $0, $1;", "f", "h", twin=_f32_to_f16, pure=True)
pack_f16 = instruction("cvt.rn.f16x2.f32 $0, $2, $1;", "ff", "r", twin=_pack_f16, pure=True)
PACK = {"bf16": pack_bf16, "f16": pack_f16}
"""Kind of 16 bits -> what rounds two fp32 values to a word, the first to its lower half."""

low_f16 = instruction("{ .reg .b16 l, h; mov.b32 {l, h}, $1; cvt.f32.f16 $0, l; }", "r", "f", twin=_low_f16, pure=True)
high_f16 = instruction(
    "{ .reg .b16 l, h; mov.b32 {l, h}, $1; cvt.f32.f16 $0, h; }", "r", "f", twin=_high_f16, pure=True
)


@device
def f32_bits(x):
    """The 32 bits of an fp32 value."""
    return np.float32(x).view(np.uint32)


@device
def bits_f32(u):
    """The fp32 value of 32 bits."""
    return np.uint32(u).view(np.float32)


@device
def magnitude(x):
    """An fp32 value without its sign."""
    return np.uint32(np.float32(x).view(np.uint32) & np.uint32(0x7FFFFFFF)).view(np.float32)


@device
def not_finite(x):
    """Whether an fp32 value is an infinity or NaN."""
    return (np.float32(x).view(np.uint32) & np.uint32(0x7F800000)) == np.uint32(0x7F800000)


def _trace_bf16(trace, pair):
    return _traced(trace, (_halves_bf16(pair)))


def _trace_f16(trace, pair):
    return _traced(trace, np.array([pair & 0xFFFF, pair >> 16], np.uint16).view(np.float16))


def _halves_bf16(pair):
    return (np.array([pair & 0xFFFF, pair >> 16], np.uint32) << 16).view(np.float32)


def _traced(trace, values):
    """NaN (all ones) in the half of the trace where a value is not finite, as 0 * value + trace leaves it."""
    low, high = (0 if np.isfinite(v) else mask for v, mask in zip(values, (0x7FFF, 0x7FFF0000), strict=True))
    return np.uint32(int(trace) | low | high)


def _trace_f32(trace, word):
    return trace if np.isfinite(np.uint32(word).view(np.float32)) else np.uint32(0x7FFFFFFF)


# trace = 0 * value + trace, for packed pairs or one fp32 value: zero, of either sign, until a value is not finite. One
# instruction a word of the result.
trace_bf16 = instruction(
    "{ .reg .b32 zero; mov.b32 zero, 0; fma.rn.bf16x2 $0, $2, zero, $1; }", "rr", "r", twin=_trace_bf16, pure=True
)
trace_f16 = instruction(
    "{ .reg .b32 zero; mov.b32 zero, 0; fma.rn.f16x2 $0, $2, zero, $1; }", "rr", "r", twin=_trace_f16, pure=True
)
trace_f32 = instruction(
    "{ .reg .f32 value, trace; mov.b32 value, $2; mov.b32 trace, $1; fma.rn.f32 trace, value, 0f00000000, trace; "
    "mov.b32 $0, trace; }",
    "rr",
    "r",
    twin=_trace_f32,
    pure=True,
)
