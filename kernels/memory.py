"""Global and shared memory: 4- and 16-byte accesses, asynchronous copies, addresses kept in tables.

Every primitive takes (pointer or shared array, element index); indices count the pointer's own elements, and
the address must be a multiple of the access size.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

import numpy as np

from kernels.ptx import GLOBAL, SHARED, instruction
from kernels.simulator import current_thread
from kernels.target import SIMULATOR, f32p, i32p, i64p, types, u16p

_WORD = 4


def _words(array, index, count):
    """A view of `count` 32-bit words at an element index, refused where misaligned or out of range."""
    start = int(index)
    elements = count * _WORD // array.itemsize
    if start < 0 or start + elements > len(array):
        raise IndexError(f"elements {start}..{start + elements} of an array of {len(array)}")
    _refuse_misaligned(array, start, count * _WORD)
    return array[start : start + elements].view(np.uint32)


def _refuse_misaligned(array, index, size):
    if (array.ctypes.data + int(index) * array.itemsize) % size:
        raise IndexError(f"element {int(index)} is not aligned to {size} bytes")


def _load128(pointer, index):
    return tuple(_words(pointer, index, 4))


def _load64(pointer, index):
    return tuple(_words(pointer, index, 2))


def _store128(pointer, index, a, b, c, d):
    _words(pointer, index, 4)[:] = (a, b, c, d)


def _store64(pointer, index, a, b):
    _words(pointer, index, 2)[:] = (a, b)


def _load32(pointer, index):
    return _words(pointer, index, 1)[0]


def _store32(pointer, index, a):
    _words(pointer, index, 1)[0] = a


def _prefetch(pointer, index):
    pass


# Of 128 bytes to L2: a hint, which changes nothing that anybody reads, so that it may come before what was written.
# L2 gives it up last, since it is read only after what the launch before still moves.
prefetch_to_keep = instruction("prefetch.global.L2::evict_last [$0];", (GLOBAL,), twin=_prefetch)
load128_stream = instruction(
    "ld.global.L1::no_allocate.L2::128B.v4.u32 {$0,$1,$2,$3}, [$4];", (GLOBAL,), "rrrr", twin=_load128
)
load128 = instruction("ld.global.nc.v4.u32 {$0,$1,$2,$3}, [$4];", (GLOBAL,), "rrrr", twin=_load128)
store128 = instruction("st.global.v4.b32 [$0], {$1,$2,$3,$4};", (GLOBAL, *"rrrr"), twin=_store128)
store128_stream = instruction("st.global.cs.v4.b32 [$0], {$1,$2,$3,$4};", (GLOBAL, *"rrrr"), twin=_store128)
load64 = instruction("ld.global.nc.v2.u32 {$0,$1}, [$2];", (GLOBAL,), "rr", twin=_load64)
load32 = instruction("ld.global.nc.b32 $0, [$1];", (GLOBAL,), "r", twin=_load32)
# Of what the same launch may write.
load64_written = instruction("ld.global.v2.u32 {$0,$1}, [$2];", (GLOBAL,), "rr", twin=_load64)
load32_written = instruction("ld.global.b32 $0, [$1];", (GLOBAL,), "r", twin=_load32)
shared_load128 = instruction("ld.shared.v4.u32 {$0,$1,$2,$3}, [$4];", (SHARED,), "rrrr", twin=_load128)
shared_load64 = instruction("ld.shared.v2.u32 {$0,$1}, [$2];", (SHARED,), "rr", twin=_load64)
shared_store64 = instruction("st.shared.v2.b32 [$0], {$1,$2};", (SHARED, *"rr"), twin=_store64)
shared_store128 = instruction("st.shared.v4.b32 [$0], {$1,$2,$3,$4};", (SHARED, *"rrrr"), twin=_store128)
shared_store32 = instruction("st.shared.b32 [$0], $1;", (SHARED, "r"), twin=_store32)


def _copy_async16(shared, index, pointer, source):
    current_thread().copies.append((_words(shared, index, 4), _words(pointer, source, 4)))


def _copy_async4(shared, index, pointer, source):
    current_thread().copies.append((_words(shared, index, 1), _words(pointer, source, 1)))


def _copy_async_commit():
    thread = current_thread()
    thread.copy_groups.append(thread.copies)
    thread.copies = []


def _arrive(groups):
    for group in groups:
        for destination, source in group:
            destination[:] = source


def _copy_async_wait_all():
    thread = current_thread()
    _arrive([*thread.copy_groups, thread.copies])
    thread.copy_groups, thread.copies = [], []


@functools.cache
def copy_async_wait(pending: int) -> Callable:
    """A primitive that waits until at most ``pending`` of the thread's committed groups of copies are under way."""

    def _copy_async_wait():
        thread = current_thread()
        done = max(0, len(thread.copy_groups) - pending)
        _arrive(thread.copy_groups[:done])
        del thread.copy_groups[:done]

    return instruction(f"cp.async.wait_group {pending};", "", twin=_copy_async_wait)


@functools.cache
def copy_async_fill(size: int) -> Callable:
    """``copy(shared, index, pointer, source, count)``: ``size`` bytes (4, 8 or 16) of 16-bit elements, asynchronously.

    Only the first ``count`` bytes are read; the rest of the destination becomes zero.
    """

    def _copy_async_fill(shared, index, pointer, source, count):
        target, words = _words(shared, index, size // _WORD), np.zeros(size // 2, np.uint16)
        taken = int(count) // 2
        if taken:
            words[:taken] = pointer[int(source) : int(source) + taken]
            _refuse_misaligned(pointer, source, size)
        current_thread().copies.append((target, words.view(np.uint32)))

    cached = "cg" if size == 16 else "ca"
    template = f"cp.async.{cached}.shared.global [$0], [$1], {size}, $2;"
    return instruction(template, (SHARED, GLOBAL, "r"), twin=_copy_async_fill)


copy_async16 = instruction("cp.async.cg.shared.global.L2::128B [$0], [$1], 16;", (SHARED, GLOBAL), twin=_copy_async16)
copy_async4 = instruction("cp.async.ca.shared.global [$0], [$1], 4;", (SHARED, GLOBAL), twin=_copy_async4)
copy_async_commit = instruction("cp.async.commit_group;", "", twin=_copy_async_commit)
copy_async_wait_all = instruction("cp.async.wait_all;", "", twin=_copy_async_wait_all)


_FAR = 1 << 62


class _Unbounded:
    """A flat array at a host address, of unknown length, as a pointer read from a table is."""

    __slots__ = ("address", "dtype", "itemsize")

    def __init__(self, address: int, dtype: np.dtype) -> None:
        self.address, self.dtype, self.itemsize = int(address), dtype, dtype.itemsize

    def _view(self, start: int, count: int) -> np.ndarray:
        raw = (ctypes.c_uint8 * (count * self.itemsize)).from_address(self.address + start * self.itemsize)
        return np.frombuffer(raw, self.dtype)

    def __len__(self) -> int:
        return _FAR

    def __getitem__(self, key):
        if isinstance(key, slice):
            return self._view(key.start, key.stop - key.start)
        return self._view(int(key), 1)[0]

    def __setitem__(self, index, value) -> None:
        self._view(int(index), 1)[0] = value

    @property
    def ctypes(self):
        return _Address(self.address)


class _Address:
    __slots__ = ("data",)

    def __init__(self, data: int) -> None:
        self.data = data


def _pointer_at(pointer_type, dtype):
    """A primitive that makes a typed pointer of a 64-bit address."""
    if SIMULATOR:
        return lambda address: _Unbounded(address, np.dtype(dtype))
    from numba.cuda.extending import intrinsic

    def typing(_context, _address):
        def generate(context, builder, signature, arguments):
            return builder.inttoptr(arguments[0], context.get_value_type(pointer_type))

        return pointer_type(types.int64), generate

    return intrinsic(typing)


u16_at = _pointer_at(u16p, np.uint16)
f32_at = _pointer_at(f32p, np.float32)
i32_at = _pointer_at(i32p, np.int32)
i64_at = _pointer_at(i64p, np.int64)
