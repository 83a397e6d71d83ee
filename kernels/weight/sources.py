"""Sources of a weight delta, evaluated at one element: the mathematics of the adapters in pairs of fp32.

A delta may be far smaller than the terms that it is a sum of, and cancel the base besides; what an fp32 sum of those
terms rounds away is then no longer small. Values are therefore pairs (:mod:`kernels.double_float`).

Coordinates are native: output row ``o`` of O and flat input column ``j`` of J = I * taps, as checkpoint files lay
them out. A source is its parameter types and ``value(p, o, j, w)``, where ``w`` is the base's element; its scale is
the last parameter.

    low_rank    scale * sum_k left[o, k] right[k, j]
    hadamard    scale * (sum_k a[o, k] b[k, j]) * (sum_k c[o, k] d[k, j])
    kronecker   scale * w1[o // c, j // e] * w2[o % c, j % e]
    kronecker_product   the same with w2 = left @ right
    dense       scale * diff[o, j]
    channel     scale * m[o or j // taps] * w

Kronecker products and channels by column carry the reciprocals of their divisors (:mod:`kernels.division`), with which
``narrow`` coordinates, of 31 bits, are divided.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np

from kernels.division import divide
from kernels.double_float import add_pairs, multiply_add, multiply_pairs
from kernels.elements import ELEMENTS
from kernels.target import cuda, device, f32, i64, types

_RANKS_AT_ONCE = 8
"""Ranks whose elements are requested together: one after the other each would wait for memory."""

Source = tuple


@device
def _wide_quotient(n, divisor, reciprocal):
    return n // divisor


@device
def _narrow_quotient(n, divisor, reciprocal):
    return np.int64(divide(np.uint32(n), reciprocal))


def _factor_types(left: str, right: str) -> tuple:
    return (ELEMENTS[left].pointer, ELEMENTS[right].pointer, i64, i64, i64, i64)


@functools.cache
def _dot(left: str, right: str, at: int) -> Callable:
    """sum_k left[o * row_stride + k * rank_stride] * right[k * J + j], parameters starting at ``at``."""
    load_left, load_right = ELEMENTS[left].load, ELEMENTS[right].load
    # Numba indexes a mixed tuple only with constants, and takes captured integers, not sums of them, as such.
    i_left, i_right, i_rank, i_row, i_step, i_next = range(at, at + 6)

    @device
    def dot(p, o, j):
        high, low = np.float32(0), np.float32(0)
        left_at = o * p[i_row]
        right_at = j
        a = cuda.local.array(_RANKS_AT_ONCE, np.float32)
        b = cuda.local.array(_RANKS_AT_ONCE, np.float32)
        together = p[i_rank] // np.int64(_RANKS_AT_ONCE)
        for _ in range(together):
            for k in range(_RANKS_AT_ONCE):
                a[k], b[k] = load_left(p[i_left], left_at), load_right(p[i_right], right_at)
                left_at += p[i_step]
                right_at += p[i_next]
            for k in range(_RANKS_AT_ONCE):
                high, low = multiply_add(a[k], b[k], high, low)
        for _ in range(p[i_rank] - together * np.int64(_RANKS_AT_ONCE)):
            high, low = multiply_add(load_left(p[i_left], left_at), load_right(p[i_right], right_at), high, low)
            left_at += p[i_step]
            right_at += p[i_next]
        return high, low

    return dot


def _low_rank(quotient: Callable, left: str, right: str) -> tuple[tuple, Callable]:
    dot = _dot(left, right, 0)

    @device
    def value(p, o, j, w):
        high, low = dot(p, o, j)
        return multiply_pairs(high, low, p[6], np.float32(0))

    return (*_factor_types(left, right), f32), value


def _hadamard(quotient: Callable, a: str, b: str, c: str, d: str) -> tuple[tuple, Callable]:
    first, second = _dot(a, b, 0), _dot(c, d, 6)

    @device
    def value(p, o, j, w):
        a, a_low = first(p, o, j)
        b, b_low = second(p, o, j)
        high, low = multiply_pairs(a, a_low, b, b_low)
        return multiply_pairs(high, low, p[12], np.float32(0))

    return (*_factor_types(a, b), *_factor_types(c, d), f32), value


def _kronecker(quotient: Callable, w1: str, w2: str) -> tuple[tuple, Callable]:
    """Parameters: w1 [a, b], w2 [c, e], b, c, e, the reciprocals of c and e, scale."""
    load1, load2 = ELEMENTS[w1].load, ELEMENTS[w2].load

    @device
    def value(p, o, j, w):
        row = quotient(o, p[3], p[5])
        column = quotient(j, p[4], p[6])
        small = load1(p[0], row * p[2] + column)
        large = load2(p[1], (o - row * p[3]) * p[4] + (j - column * p[4]))
        high, low = multiply_pairs(small, np.float32(0), large, np.float32(0))
        return multiply_pairs(high, low, p[7], np.float32(0))

    return (ELEMENTS[w1].pointer, ELEMENTS[w2].pointer, i64, i64, i64, i64, i64, f32), value


def _kronecker_product(quotient: Callable, w1: str, left: str, right: str) -> tuple[tuple, Callable]:
    """Parameters: w1 [a, b], b, c, e, their last two's reciprocals, the product's six, scale.

    w2 = left [c, rank] @ right [rank, e].
    """
    load1, dot = ELEMENTS[w1].load, _dot(left, right, 6)

    @device
    def value(p, o, j, w):
        row = quotient(o, p[2], p[4])
        column = quotient(j, p[3], p[5])
        small = load1(p[0], row * p[1] + column)
        large, large_low = dot(p, o - row * p[2], j - column * p[3])
        high, low = multiply_pairs(large, large_low, small, np.float32(0))
        return multiply_pairs(high, low, p[12], np.float32(0))

    return (ELEMENTS[w1].pointer, i64, i64, i64, i64, i64, *_factor_types(left, right), f32), value


def _dense(quotient: Callable, kind: str) -> tuple[tuple, Callable]:
    """Parameters: diff [O, J], J, scale."""
    load = ELEMENTS[kind].load

    @device
    def value(p, o, j, w):
        return multiply_pairs(load(p[0], o * p[1] + j), np.float32(0), p[2], np.float32(0))

    return (ELEMENTS[kind].pointer, i64, f32), value


def _channel(quotient: Callable, kind: str, axis: str) -> tuple[tuple, Callable]:
    """Parameters: m [O] or [I], taps, its reciprocal, scale."""
    load = ELEMENTS[kind].load
    if axis == "out":

        @device
        def value(p, o, j, w):
            high, low = multiply_pairs(load(p[0], o), np.float32(0), w, np.float32(0))
            return multiply_pairs(high, low, p[3], np.float32(0))

    else:

        @device
        def value(p, o, j, w):
            high, low = multiply_pairs(load(p[0], quotient(j, p[1], p[2])), np.float32(0), w, np.float32(0))
            return multiply_pairs(high, low, p[3], np.float32(0))

    return (ELEMENTS[kind].pointer, i64, i64, f32), value


_MAKERS = {
    "low_rank": _low_rank,
    "hadamard": _hadamard,
    "kronecker": _kronecker,
    "kronecker_product": _kronecker_product,
    "dense": _dense,
    "channel": _channel,
}


@functools.cache
def point_source(source: Source, narrow: bool = False) -> tuple[types.Tuple, Callable]:
    """(parameter tuple type, value function) of a source given as (name, kinds...)."""
    parameters, value = _MAKERS[source[0]](_narrow_quotient if narrow else _wide_quotient, *source[1:])
    return types.Tuple(parameters), value


def source_parameters(source: Source) -> types.Tuple:
    """The parameter tuple type of a source; the same for every kernel that evaluates it."""
    return point_source(source)[0]


@functools.cache
def summed(sources: tuple[Source, ...], narrow: bool = False) -> Callable:
    """``total(p, o, j, w)``: the sum over the sources, in their order."""

    @device
    def zero(p, o, j, w):
        return np.float32(0), np.float32(0)

    total = zero
    for position, source in enumerate(sources):
        total = _plus(total, point_source(source, narrow)[1], position)
    return total


def _plus(rest: Callable, value: Callable, position: int) -> Callable:
    @device
    def total(p, o, j, w):
        high, low = rest(p, o, j, w)
        more, more_low = value(p[position], o, j, w)
        return add_pairs(high, low, more, more_low)

    return total
