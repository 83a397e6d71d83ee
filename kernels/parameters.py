"""Kernel parameters as nested tuples, given by value or read from a table in device memory.

A table row is 64-bit words in the order of the flattened parameters: an address, an integer, or the bits of an
fp32 value. One kernel body then serves a single problem and a group of them.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from kernels import bits, memory
from kernels.target import device, f32, f32p, i32p, i64, i64p, types, u16p

_READERS: dict = {u16p: memory.u16_at, f32p: memory.f32_at, i32p: memory.i32_at, i64p: memory.i64_at}


def flat_length(parameters) -> int:
    """How many scalar parameters a nested tuple of Numba types flattens to."""
    if isinstance(parameters, types.BaseTuple):
        return sum(flat_length(p) for p in parameters)
    return 1


def table_reader(parameters: types.BaseTuple) -> Callable:
    """A device function ``read(table, at)`` that builds the nested tuple from table words at ``at``."""

    @device
    def nothing(table, at):
        return ()

    read = nothing
    position = flat_length(parameters)
    for parameter in reversed(tuple(parameters)):
        position -= flat_length(parameter)
        read = _prepend(_scalar_reader(parameter), position, read)
    return read


def _prepend(head: Callable, position: int, tail: Callable) -> Callable:
    @device
    def read(table, at):
        return (head(table, at + position), *tail(table, at))

    return read


def _scalar_reader(parameter) -> Callable:
    if isinstance(parameter, types.BaseTuple):
        return table_reader(parameter)
    if parameter == i64:

        @device
        def read_integer(table, at):
            return table[at]

        return read_integer
    if parameter == f32:

        @device
        def read_float(table, at):
            return bits.bits_f32(np.uint32(table[at]))

        return read_float
    pointer_at = _READERS[parameter]

    @device
    def read_pointer(table, at):
        return pointer_at(table[at])

    return read_pointer
