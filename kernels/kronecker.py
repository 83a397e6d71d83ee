"""One Kronecker product over a weight: out[l c + i, m e + j] = W + (scale w1[l, m]) * w2[i, j], one rounding.

A thread keeps two runs of eight neighbouring elements of w2 in registers, loaded or multiplied out of its factors,
and walks over blocks m of one block row l: w2 is read once for several blocks, and base and result move in 16-byte
accesses, eight of them in flight.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np

from kernels import warp
from kernels.elements import ELEMENTS, finite_check
from kernels.parameters import flat_length, table_reader
from kernels.target import SIMULATOR, cuda, device, f32, i32p, i64, i64p, kernel_factory, types

THREADS = 32 if SIMULATOR else 256
RUNS = 2
UNROLL = 4
RUNS_IN_TILE = RUNS * THREADS


@functools.cache
def _second_half(second: tuple) -> tuple[tuple, Callable]:
    """Parameter types of w2 and ``run(p, i, run, runs, values, at)``: eight elements of row i of w2 in fp32.

    ``("full", kind)``: w2. ``("low_rank", left, right)``: left [c, rank], right [rank, e], rank, left's strides.
    """
    if second[0] == "full":
        element = ELEMENTS[second[1]]
        fetch8, unpack8, words_of_8 = element.fetch8_cached, element.unpack8, element.words

        @device
        def load_run(p, i, run, runs, values, at):
            words = cuda.local.array(words_of_8, np.uint32)
            fetch8(p[0], (i * runs + run) * np.int64(8), words, 0)
            unpack8(words, 0, values, at)

        return (element.pointer,), load_run

    left, right = ELEMENTS[second[1]], ELEMENTS[second[2]]
    load_left, fetch8, unpack8, words_of_8 = left.load, right.fetch8_cached, right.unpack8, right.words

    @device
    def multiply_run(p, i, run, runs, values, at):
        words = cuda.local.array(words_of_8, np.uint32)
        factors = cuda.local.array(8, np.float32)
        for x in range(8):
            values[at + x] = np.float32(0)
        left_at = i * p[3]
        right_at = run * np.int64(8)
        for _ in range(p[2]):
            fetch8(p[1], right_at, words, 0)
            unpack8(words, 0, factors, 0)
            a = load_left(p[0], left_at)
            for x in range(8):
                values[at + x] += a * factors[x]
            left_at += p[4]
            right_at += runs * np.int64(8)

    return (left.pointer, right.pointer, i64, i64, i64), multiply_run


@functools.cache
def _body(base, out, first, second, check, ragged) -> tuple[tuple, Callable]:
    has_base = base is not None
    base_element, out_element = ELEMENTS[base or out], ELEMENTS[out]
    fetch8, unpack8, base_words = base_element.fetch8, base_element.unpack8, base_element.words
    store8, check_finite, load1 = out_element.store8, finite_check(out), ELEMENTS[first].load
    second_types, second_run = _second_half(second)
    raw_words, values_held = UNROLL * RUNS * base_words, 8 * RUNS

    @device
    def run_of(first_run, all_runs, r):
        flat = np.uint32(first_run + np.uint32(r * THREADS))
        if ragged:
            flat = min(flat, np.uint32(all_runs - np.uint32(1)))
        return np.uint32(flat)

    @device
    def fetch_batch(base_pointer, raw, at, block, last_block, stride):
        for u in range(UNROLL):
            inside = block + u
            if ragged:
                inside = min(inside, last_block - np.int64(1))
            offset = inside * stride
            for r in range(RUNS):
                fetch8(base_pointer, at[r] + offset, raw, (u * RUNS + r) * base_words)

    @device
    def body(tile, block_row, chunk, base_pointer, out_pointer, w1, blocks, chunk_blocks, height, runs, scale, flag, p):
        """``blocks`` are b, ``height`` c, ``runs`` e / 8; ``chunk_blocks`` of the b blocks are this block's.

        Where they do not come out even, runs beyond w2 and blocks beyond the chunk read the last one inside, and
        their stores are left out.
        """
        values = cuda.local.array(values_held, np.float32)
        raw = cuda.local.array(raw_words, np.uint32)
        result = cuda.local.array(8, np.float32)
        w = cuda.local.array(8, np.float32)
        at = cuda.local.array(RUNS, np.int64)
        first_run = np.uint32(np.uint32(tile) * np.uint32(RUNS_IN_TILE) + warp.thread_index())
        all_runs = np.uint32(np.uint32(height) * np.uint32(runs))
        block = chunk * chunk_blocks
        last_block = min(block + chunk_blocks, blocks)
        stride = runs * np.int64(8)
        for r in range(RUNS):
            flat = run_of(first_run, all_runs, r)
            i = np.uint32(flat // np.uint32(runs))
            in_row = np.int64(np.uint32(flat - i * np.uint32(runs)))
            at[r] = ((block_row * height + np.int64(i)) * blocks * runs + in_row) * np.int64(8)
        if has_base:
            fetch_batch(base_pointer, raw, at, block, last_block, stride)
        for r in range(RUNS):
            flat = run_of(first_run, all_runs, r)
            i = np.uint32(flat // np.uint32(runs))
            second_run(p, np.int64(i), np.int64(np.uint32(flat - i * np.uint32(runs))), runs, values, 8 * r)
        while block < last_block:
            for u in range(UNROLL):
                if not ragged or block + u < last_block:
                    weight = scale * load1(w1, block_row * blocks + block + u)
                    offset = (block + u) * stride
                    for r in range(RUNS):
                        if has_base:
                            unpack8(raw, (u * RUNS + r) * base_words, w, 0)
                        for x in range(8):
                            product = weight * values[8 * r + x]
                            result[x] = w[x] + product if has_base else product
                        if not ragged or np.uint32(first_run + np.uint32(r * THREADS)) < all_runs:
                            if check:
                                check_finite(result, 0, w, 0, flag)
                            store8(out_pointer, at[r] + offset, result, 0)
            block += np.int64(UNROLL)
            if has_base and block < last_block:
                fetch_batch(base_pointer, raw, at, block, last_block, stride)

    parameters = (
        base_element.pointer, out_element.pointer, ELEMENTS[first].pointer, i64, i64, i64, i64, f32, i32p,
        types.Tuple(second_types),
    )  # fmt: skip
    return parameters, body


def _min_blocks(base: str | None, out: str) -> int:
    """Blocks on a multiprocessor that the register allocation must allow for."""
    return 2 if "f32" in (base, out) else 3


_FULL = ("full", "bf16")


@kernel_factory(
    ("bf16", "bf16", "bf16", _FULL, True, False),
    ("bf16", "bf16", "bf16", ("low_rank", "bf16", "bf16"), True, True),
    (None, "bf16", "bf16", _FULL, False, False),
    ("f32", "f32", "f32", ("low_rank", "f16", "f32"), True, True),
)
def kronecker_merge(base, out, first, second, check, ragged):
    """One weight. Parameters: base, out, w1, b, blocks of a chunk, c, e / 8, scale, flag, w2; grid (tiles of w2,
    a, chunks of b)."""
    parameters, body = _body(base, out, first, second, check, ragged)

    def kernel(base_pointer, out_pointer, w1, blocks, chunk_blocks, height, runs, scale, flag, p):
        body(warp.block_x(), warp.block_y(), warp.block_z(), base_pointer, out_pointer, w1, blocks, chunk_blocks,
             height, runs, scale, flag, p)  # fmt: skip

    return kernel, parameters, {"threads": THREADS, "min_blocks": _min_blocks(base, out)}


@kernel_factory(("bf16", "bf16", "bf16", _FULL, True, True))
def kronecker_merge_grouped(base, out, first, second, check, ragged):
    """Many weights. Parameters: a table with a row of the single kernel's parameters for each weight, and four words a
    block: the weight's row in the table and the block's three coordinates."""
    parameters, body = _body(base, out, first, second, check, ragged)
    parameters = types.Tuple(parameters)
    read, width = table_reader(parameters), flat_length(parameters)

    def kernel(table, blocks):
        at = 4 * warp.block_x()
        q = read(table, np.int64(blocks[at]) * np.int64(width))
        body(np.int64(blocks[at + 1]), np.int64(blocks[at + 2]), np.int64(blocks[at + 3]),
             q[0], q[1], q[2], q[3], q[4], q[5], q[6], q[7], q[8], q[9])  # fmt: skip

    return kernel, (i64p, i32p), {"threads": THREADS, "min_blocks": _min_blocks(base, out)}
