"""
Loads and stores of one, and of eight neighbouring, elements of a floating kind, as fp32 in registers.

A kind is "bf16", "f16" or "f32"; the 16-bit kinds live behind uint16 pointers. Eight elements are one 16-byte
access of a 16-bit kind and two of fp32, and must be aligned to 16 bytes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np

from kernels import bits, memory
from kernels.target import device, f32p, u16p

KINDS = ("bf16", "f16", "f32")


def _sixteen_bit(to_f32, from_f32, low, high, pack, overflow: float) -> SimpleNamespace:
    @device
    def load(pointer, index):
        return to_f32(pointer[index])

    @device
    def store(pointer, index, value):
        pointer[index] = from_f32(value)

    @device
    def fetch8(pointer, index, words, at):
        a, b, c, d = memory.load128_stream(pointer, index)
        words[at] = a
        words[at + 1] = b
        words[at + 2] = c
        words[at + 3] = d

    @device
    def fetch8_cached(pointer, index, words, at):
        a, b, c, d = memory.load128(pointer, index)
        words[at] = a
        words[at + 1] = b
        words[at + 2] = c
        words[at + 3] = d

    @device
    def unpack8(words, at, values, to):
        for i in range(4):
            values[to + 2 * i] = low(words[at + i])
            values[to + 2 * i + 1] = high(words[at + i])

    @device
    def store8(pointer, index, values, at):
        memory.store128_stream(
            pointer,
            index,
            pack(values[at], values[at + 1]),
            pack(values[at + 2], values[at + 3]),
            pack(values[at + 4], values[at + 5]),
            pack(values[at + 6], values[at + 7]),
        )

    @device
    def rounded(value):
        return to_f32(from_f32(value))

    return SimpleNamespace(
        pointer=u16p, words=4, load=load, store=store, fetch8=fetch8, fetch8_cached=fetch8_cached,
        unpack8=unpack8, store8=store8, rounded=rounded, overflow=np.float32(overflow),
    )  # fmt: skip


def _thirty_two_bit() -> SimpleNamespace:
    @device
    def load(pointer, index):
        return pointer[index]

    @device
    def store(pointer, index, value):
        pointer[index] = value

    @device
    def fetch8(pointer, index, words, at):
        for half in range(2):
            a, b, c, d = memory.load128_stream(pointer, index + 4 * half)
            words[at + 4 * half] = a
            words[at + 4 * half + 1] = b
            words[at + 4 * half + 2] = c
            words[at + 4 * half + 3] = d

    @device
    def fetch8_cached(pointer, index, words, at):
        for half in range(2):
            a, b, c, d = memory.load128(pointer, index + 4 * half)
            words[at + 4 * half] = a
            words[at + 4 * half + 1] = b
            words[at + 4 * half + 2] = c
            words[at + 4 * half + 3] = d

    @device
    def unpack8(words, at, values, to):
        for i in range(8):
            values[to + i] = bits.bits_f32(words[at + i])

    @device
    def store8(pointer, index, values, at):
        for half in range(2):
            memory.store128_stream(
                pointer,
                index + 4 * half,
                bits.f32_bits(values[at + 4 * half]),
                bits.f32_bits(values[at + 4 * half + 1]),
                bits.f32_bits(values[at + 4 * half + 2]),
                bits.f32_bits(values[at + 4 * half + 3]),
            )

    @device
    def rounded(value):
        return np.float32(value)

    return SimpleNamespace(
        pointer=f32p, words=8, load=load, store=store, fetch8=fetch8, fetch8_cached=fetch8_cached,
        unpack8=unpack8, store8=store8, rounded=rounded, overflow=np.float32(np.inf),
    )  # fmt: skip


# Half a unit in the last place above the largest finite value: from there on rounding gives infinity.
_BF16_OVERFLOW, _F16_OVERFLOW = np.uint32(0x7F7F8000).view(np.float32), 65520.0

ELEMENTS = {
    "bf16": _sixteen_bit(
        bits.bf16_to_f32, bits.f32_to_bf16, bits.low_bf16, bits.high_bf16, bits.pack_bf16, _BF16_OVERFLOW
    ),
    "f16": _sixteen_bit(
        bits.f16_to_f32, bits.f32_to_f16, bits.low_f16, bits.high_f16, bits.pack_f16, _F16_OVERFLOW
    ),
    "f32": _thirty_two_bit(),
}


@functools.cache
def finite_check(kind: str) -> Callable:
    """``check(values, at, w, from_w, flag)`` for eight results: raise the flag where one is not finite as ``kind``,
    though its base is. One instruction an element until then."""
    overflow, rounded = ELEMENTS[kind].overflow, ELEMENTS[kind].rounded

    @device
    def check(values, at, w, from_w, flag):
        size = np.float32(0)
        for i in range(8):
            size = bits.largest(size, values[at + i])
        if not (size < overflow):
            for i in range(8):
                if bits.not_finite(rounded(values[at + i])) and not bits.not_finite(w[from_w + i]):
                    flag[0] = np.int32(1)

    return check
