"""Elements moved, not computed: windows of a tensor, as of copies, padding, reversal and triangles.

Bits are moved as they are. Where a window lies outside of its tensor, a fill value is stored.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np

from kernels import bits, memory, warp
from kernels.barrier import early_options, entrance
from kernels.expression import written
from kernels.target import SIMULATOR, cuda, device, f32, f32p, i32p, i64, i64p, kernel_factory, types, u16p

THREADS = 32 if SIMULATOR else 256


@device
def _as_i32(value):
    return np.int32(value)


@device
def _as_i64(value):
    return np.int64(value)


@device
def _as_f32(value):
    return np.float32(value)


WORDS = {
    "bf16": (u16p, f32, bits.f32_to_bf16), "f16": (u16p, f32, bits.f32_to_f16), "f32": (f32p, f32, _as_f32),
    "i32": (i32p, i64, _as_i32), "i64": (i64p, i64, _as_i64),
}  # fmt: skip
"""Kind -> pointer, type of a fill value as parameter, its conversion."""
BYTES = {"bf16": 2, "f16": 2, "f32": 4, "i32": 4, "i64": 8}


@device
def _pack_halves(values, k):
    return np.uint32(np.uint32(values[2 * k]) | np.uint32(np.uint32(values[2 * k + 1]) << np.uint32(16)))


@device
def _pack_f32(values, k):
    return bits.f32_bits(values[k])


@device
def _pack_i32(values, k):
    return np.uint32(values[k])


@device
def _pack_i64(values, k):
    value = values[k // 2]
    return np.uint32((value >> np.int64(32)) if k % 2 else (value & np.int64(0xFFFFFFFF)))


PACK = {"bf16": _pack_halves, "f16": _pack_halves, "f32": _pack_f32, "i32": _pack_i32, "i64": _pack_i64}
"""Kind -> ``pack(values, k)``: the 32-bit word ``k`` of elements."""


@functools.cache
def _line(dimensions: int, run: int) -> Callable:
    """``line(index, extents, shifts, signs, limits, strides, out_strides)`` of the first of ``run`` elements.

    Gives whether the source has the line along the last axis, the line's offset there, the element's offset in out, its
    last coordinate, and the one before. The source's coordinate is shift + sign * coordinate.
    """
    known = {"uint32": np.uint32, "int64": np.int64}
    lines = ["rest = uint32(index)", "at = int64(0)", "ok = True"]
    for d in reversed(range(1, dimensions)):
        lines += [f"q{d} = rest // uint32(extents[{d}])", f"c{d} = int64(rest - q{d} * uint32(extents[{d}]))"]
        lines.append(f"rest = q{d}")
    lines += ["c0 = int64(rest)", f"c{dimensions - 1} *= int64({run})"]
    for d in range(dimensions - 1):
        lines += [f"s{d} = shifts[{d}] + signs[{d}] * c{d}", f"ok = ok and s{d} >= 0 and s{d} < limits[{d}]"]
        lines.append(f"at += s{d} * strides[{d}]")
    to = " + ".join(f"c{d} * out_strides[{d}]" for d in range(dimensions))
    lines.append(f"return ok, at, {to}, c{dimensions - 1}, c{max(0, dimensions - 2)}")
    return written("line", "index, extents, shifts, signs, limits, strides, out_strides", lines, known)


@kernel_factory(("bf16", 1, 8), ("f32", 3, 1), ("i64", 6, 2), ("i32", 2, 4))
def window(kind, dimensions, run, early=False):
    """out[c] = source[shift + sign * c] where that is inside and c[-1] - c[-2] >= diagonal, else fill.

    A thread has ``run`` elements of the last axis: one, or what 16 bytes hold, where out is aligned to as much and its
    last axis walked in steps of 1. Parameters: source, out, fill, extents of out (the last one in runs), shifts, signs,
    extents and strides of the source, strides of out, diagonal, count of runs (below 2**32).
    """
    pointer, fill_type, convert = WORDS[kind]
    line, pack, last = _line(dimensions, run), PACK[kind], dimensions - 1
    element, enter = pointer.dtype, entrance(early, any_size=True)

    def kernel(source, out, fill, extents, shifts, signs, limits, strides, out_strides, diagonal, count):
        values = cuda.local.array(run, element)
        enter()
        index = warp.block_x() * np.int64(THREADS) + np.int64(warp.thread_index())
        if index < count:
            ok, at, to, c, before = line(index, extents, shifts, signs, limits, strides, out_strides)
            for k in range(run):
                place = shifts[last] + signs[last] * (c + np.int64(k))
                inside = ok and place >= np.int64(0) and place < limits[last]
                # With one axis, c is the coordinate before too, and any element is on the diagonal.
                if inside and c + np.int64(k) - (before + np.int64(k if last == 0 else 0)) >= diagonal:
                    values[k] = source[at + place * strides[last]]
                else:
                    values[k] = convert(fill)
            if run == 1:
                out[to] = values[0]
            else:
                memory.store128_stream(out, to, pack(values, 0), pack(values, 1), pack(values, 2), pack(values, 3))

    axes = types.UniTuple(i64, dimensions)
    return kernel, (pointer, pointer, fill_type, *(axes,) * 6, i64, i64), {"threads": THREADS} | early_options(early)
