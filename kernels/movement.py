"""Elements moved, not computed: windows of a tensor (copies, padding, reversal, triangles), rows chosen by an index.

Bits are moved as they are. Where a window or an index lies outside of its tensor, a fill value is stored.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np

from kernels import bits, warp
from kernels.elements import ELEMENTS
from kernels.expression import offsets, written
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
INDICES = {"i32": i32p, "i64": i64p}


@functools.cache
def _inside(dimensions: int) -> Callable:
    """``inside(index, extents, shifts, signs, limits, strides)``: whether the source has the element, and its offset.

    The source's coordinate is shift + sign * coordinate. Also gives the difference of the last two coordinates.
    """
    known = {"uint32": np.uint32, "int64": np.int64}
    lines = ["rest = uint32(index)", "at = int64(0)", "ok = True"]
    for d in reversed(range(dimensions)):
        if d:
            lines += [f"q{d} = rest // uint32(extents[{d}])", f"c{d} = int64(rest - q{d} * uint32(extents[{d}]))"]
            lines.append(f"rest = q{d}")
        else:
            lines.append("c0 = int64(rest)")
        lines += [f"s{d} = shifts[{d}] + signs[{d}] * c{d}", f"ok = ok and s{d} >= 0 and s{d} < limits[{d}]"]
        lines.append(f"at += s{d} * strides[{d}]")
    lines.append(f"return ok, at, c{dimensions - 1} - c{max(0, dimensions - 2)}")
    return written("inside", "index, extents, shifts, signs, limits, strides", lines, known)


@kernel_factory(("bf16", 1), ("f32", 3), ("i64", 6))
def window(kind, dimensions):
    """out[c] = source[shift + sign * c] where that is inside and c[-1] - c[-2] >= diagonal, else fill.

    Parameters: source, out, fill, extents of out, shifts, signs, extents and strides of the source, strides of out,
    diagonal, count (below 2**32).
    """
    pointer, fill_type, convert = WORDS[kind]
    inside, place = _inside(dimensions), offsets(dimensions, 1)

    def kernel(source, out, fill, extents, shifts, signs, limits, strides, out_strides, diagonal, count):
        index = warp.block_x() * np.int64(THREADS) + np.int64(warp.thread_index())
        if index < count:
            ok, at, above = inside(index, extents, shifts, signs, limits, strides)
            (to,) = place(index, extents, out_strides)
            if ok and above >= diagonal:
                out[to] = source[at]
            else:
                out[to] = convert(fill)

    axes = types.UniTuple(i64, dimensions)
    return kernel, (pointer, pointer, fill_type, *(axes,) * 6, i64, i64), {"threads": THREADS}


@device
def _coordinates(index, chosen, inner):
    """Index of [outer, chosen, inner] as (outer, j, i)."""
    line = np.uint32(index) // np.uint32(inner)
    i = np.uint32(index) - line * np.uint32(inner)
    slab = line // np.uint32(chosen)
    return np.int64(slab), np.int64(line - slab * np.uint32(chosen)), np.int64(i)


@kernel_factory(("bf16", "i32", False), ("f32", "i64", True))
def take(kind, index_kind, elementwise):
    """out[o, j, i] = source[o, index[j], i], or with index[o, j, i]; fill where the index is outside of 0..n-1.

    Parameters: source, index, out, fill, n, chosen, inner, count = outer * chosen * inner, below 2**32.
    """
    pointer, fill_type, convert = WORDS[kind]

    def kernel(source, index, out, fill, n, chosen, inner, count):
        at = warp.block_x() * np.int64(THREADS) + np.int64(warp.thread_index())
        if at < count:
            slab, j, i = _coordinates(at, chosen, inner)
            from_row = np.int64(index[at if elementwise else j])
            if from_row >= 0 and from_row < n:
                out[at] = source[(slab * n + from_row) * inner + i]
            else:
                out[at] = convert(fill)

    return kernel, (pointer, INDICES[index_kind], pointer, fill_type, i64, i64, i64, i64), {"threads": THREADS}


@kernel_factory(("bf16", "f32", "i32"), ("f32", "f32", "i64"))
def take_backward(kind, out_kind, index_kind):
    """d_source[o, index[j], i] = sum of g[o, j, i] over the j of that index, in their order.

    ``d_source`` is zero beforehand. A block has one j, and does the sum if no earlier j has the same index; then it
    looks for later ones. Parameters: index, g, d_source, n, chosen, inner; the grid: chosen, outer.
    """
    load, store = ELEMENTS[kind].load, ELEMENTS[out_kind].store

    def kernel(index, g, out, n, chosen, inner):
        same = cuda.shared.array(THREADS, np.int32)
        thread, j, slab = np.int64(warp.thread_index()), warp.block_x(), warp.block_y()
        row = np.int64(index[j])
        found = row < np.int64(0) or row >= n
        for other in range(thread, j, THREADS):
            found = found or np.int64(index[other]) == row
        if warp.uniform_any(found):
            return
        for column in range(np.int64(0), inner, THREADS):
            i = column + thread
            total = np.float32(0)
            for first in range(j, chosen, THREADS):
                other = first + thread
                hit = other < chosen and np.int64(index[min(other, chosen - np.int64(1))]) == row
                same[thread] = np.int32(hit)
                if warp.uniform_any(hit):
                    for k in range(min(np.int64(THREADS), chosen - first)):
                        if same[k] != np.int32(0) and i < inner:
                            total += load(g, (slab * chosen + first + k) * inner + i)
                warp.block_barrier()
            if i < inner:
                store(out, (slab * n + row) * inner + i, total)

    pointers = (INDICES[index_kind], ELEMENTS[kind].pointer, ELEMENTS[out_kind].pointer)
    return kernel, (*pointers, i64, i64, i64), {"threads": THREADS}


@kernel_factory(("bf16", "i32"), ("f32", "i64"))
def gather_backward(kind, index_kind):
    """d_source[o, index[o, j, i], i] += g[o, j, i], one thread for all j of an (o, i), in their order; fp32.

    ``d_source`` is zero beforehand. Parameters: index, g, d_source, n, chosen, inner, count = outer * inner.
    """
    load = ELEMENTS[kind].load

    def kernel(index, g, out, n, chosen, inner, count):
        at = warp.block_x() * np.int64(THREADS) + np.int64(warp.thread_index())
        if at < count:
            slab = np.int64(np.uint32(at) // np.uint32(inner))
            i = at - slab * inner
            for j in range(chosen):
                from_at = (slab * chosen + j) * inner + i
                row = np.int64(index[from_at])
                if row >= np.int64(0) and row < n:
                    to = (slab * n + row) * inner + i
                    out[to] = out[to] + load(g, from_at)

    return kernel, (INDICES[index_kind], ELEMENTS[kind].pointer, f32p, i64, i64, i64, i64), {"threads": THREADS}
