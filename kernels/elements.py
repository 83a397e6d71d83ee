"""Loads and stores of one, and of eight neighbouring, elements of a floating kind, as fp32 in registers.

A kind is "bf16", "f16" or "f32"; the 16-bit kinds live behind uint16 pointers. Eight elements are one 16-byte
access of a 16-bit kind and two of fp32, and must be aligned to 16 bytes. ``store8`` also follows a trace of what it
stored, by which a kernel tells in the end whether all of it was finite; ``store8_cached`` does the same and leaves it
in the L2 cache for as long as anything else.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np

from kernels import bits, memory
from kernels.target import cuda, device, f32p, u16p

KINDS = ("bf16", "f16", "f32")


def _fetch8(load128: Callable, accesses: int) -> Callable:
    """``fetch8(pointer, index, words, at)``: eight elements as words in registers, by one or two 16-byte accesses."""

    @device
    def fetch8(pointer, index, words, at):
        for access in range(accesses):
            a, b, c, d = load128(pointer, index + 4 * access)
            words[at + 4 * access] = a
            words[at + 4 * access + 1] = b
            words[at + 4 * access + 2] = c
            words[at + 4 * access + 3] = d

    return fetch8


def _store8_of_16_bits(store128: Callable, pack: Callable, follow: Callable) -> Callable:
    @device
    def store8(pointer, index, values, at, trace):
        a = pack(values[at], values[at + 1])
        b = pack(values[at + 2], values[at + 3])
        c = pack(values[at + 4], values[at + 5])
        d = pack(values[at + 6], values[at + 7])
        store128(pointer, index, a, b, c, d)
        return follow(follow(follow(follow(trace, a), b), c), d)

    return store8


def _store8_of_32_bits(store128: Callable) -> Callable:
    @device
    def store8(pointer, index, values, at, trace):
        for half in range(2):
            a = bits.f32_bits(values[at + 4 * half])
            b = bits.f32_bits(values[at + 4 * half + 1])
            c = bits.f32_bits(values[at + 4 * half + 2])
            d = bits.f32_bits(values[at + 4 * half + 3])
            store128(pointer, index + 4 * half, a, b, c, d)
            trace = bits.trace_f32(bits.trace_f32(bits.trace_f32(bits.trace_f32(trace, a), b), c), d)
        return trace

    return store8


def _sixteen_bit(to_f32, from_f32, low, high, pack, follow) -> SimpleNamespace:
    @device
    def load(pointer, index):
        return to_f32(pointer[index])

    @device
    def store(pointer, index, value):
        pointer[index] = from_f32(value)

    @device
    def unpack8(words, at, values, to):
        for i in range(4):
            values[to + 2 * i] = low(words[at + i])
            values[to + 2 * i + 1] = high(words[at + i])

    @device
    def rounded(value):
        return to_f32(from_f32(value))

    return SimpleNamespace(
        pointer=u16p, words=4, load=load, store=store, fetch8=_fetch8(memory.load128_stream, 1),
        fetch8_cached=_fetch8(memory.load128, 1), unpack8=unpack8, rounded=rounded,
        store8=_store8_of_16_bits(memory.store128_stream, pack, follow),
        store8_cached=_store8_of_16_bits(memory.store128, pack, follow),
    )  # fmt: skip


def _thirty_two_bit() -> SimpleNamespace:
    @device
    def load(pointer, index):
        return pointer[index]

    @device
    def store(pointer, index, value):
        pointer[index] = value

    @device
    def unpack8(words, at, values, to):
        for i in range(8):
            values[to + i] = bits.bits_f32(words[at + i])

    @device
    def rounded(value):
        return np.float32(value)

    return SimpleNamespace(
        pointer=f32p, words=8, load=load, store=store, fetch8=_fetch8(memory.load128_stream, 2),
        fetch8_cached=_fetch8(memory.load128, 2), unpack8=unpack8, rounded=rounded,
        store8=_store8_of_32_bits(memory.store128_stream), store8_cached=_store8_of_32_bits(memory.store128),
    )  # fmt: skip


ELEMENTS = {
    "bf16": _sixteen_bit(
        bits.bf16_to_f32, bits.f32_to_bf16, bits.low_bf16, bits.high_bf16, bits.pack_bf16, bits.trace_bf16
    ),
    "f16": _sixteen_bit(bits.f16_to_f32, bits.f32_to_f16, bits.low_f16, bits.high_f16, bits.pack_f16, bits.trace_f16),
    "f32": _thirty_two_bit(),
}


@device
def all_finite(trace):
    """Whether every word that ``store8`` followed from a trace of 0 on was finite; for all kinds alike."""
    return (trace & np.uint32(0x7FFF7FFF)) == np.uint32(0)


@functools.cache
def parked8(kind: str, parkers: int) -> tuple[Callable, Callable]:
    """Eight elements parked in shared memory on their way from global memory, in places of the thread's own.

    ``park(shared, at, slot, thread, pointer, index)`` starts the copies; once they have arrived,
    ``unpark(shared, at, slot, thread, values, to)`` gives the elements in fp32. No other thread reads them, so no
    barrier is needed; ``at`` counts 16-bit elements, a slot takes ``parkers * 2 * words`` of them.
    """
    words, unpack8 = ELEMENTS[kind].words, ELEMENTS[kind].unpack8
    pieces = words // 4
    elements_in_piece = 8 // pieces

    @device
    def place(at, slot, piece, thread):
        return at + np.int64(np.uint32(np.uint32((slot * pieces + piece) * parkers) + thread) * np.uint32(8))

    @device
    def park(shared, at, slot, thread, pointer, index):
        for piece in range(pieces):
            source = index + np.int64(piece * elements_in_piece)
            memory.copy_async16(shared, place(at, slot, piece, thread), pointer, source)

    @device
    def unpark(shared, at, slot, thread, values, to):
        raw = cuda.local.array(words, np.uint32)
        for piece in range(pieces):
            a, b, c, d = memory.shared_load128(shared, place(at, slot, piece, thread))
            raw[4 * piece] = a
            raw[4 * piece + 1] = b
            raw[4 * piece + 2] = c
            raw[4 * piece + 3] = d
        unpack8(raw, 0, values, to)

    return park, unpark
