"""bf16 and fp16 as bits: conversions in registers, one rounding (to nearest, ties to even) on the way down."""

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


f32_to_bf16 = instruction("cvt.rn.bf16.f32 $0, $1;", "f", "h", twin=_f32_to_bf16, pure=True)
pack_bf16 = instruction("cvt.rn.bf16x2.f32 $0, $2, $1;", "ff", "r", twin=_pack_bf16, pure=True)
f16_to_f32 = instruction("cvt.f32.f16 $0, $1;", "h", "f", twin=_f16_to_f32, pure=True)
f32_to_f16 = instruction("cvt.rn.f16.f32 $0, $1;", "f", "h", twin=_f32_to_f16, pure=True)
pack_f16 = instruction("cvt.rn.f16x2.f32 $0, $2, $1;", "ff", "r", twin=_pack_f16, pure=True)
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
def not_finite(x):
    """Whether an fp32 value is an infinity or NaN."""
    return (np.float32(x).view(np.uint32) & np.uint32(0x7F800000)) == np.uint32(0x7F800000)


def _largest(a, b):
    size = np.abs(np.float32(b))
    return np.float32(np.nan) if np.isnan(a) or np.isnan(size) else max(np.float32(a), size)


# The running largest |b|, NaN once there was one: one instruction an element.
largest = instruction(
    "{ .reg .f32 size; abs.f32 size, $2; max.NaN.f32 $0, $1, size; }", "ff", "f", twin=_largest, pure=True
)
