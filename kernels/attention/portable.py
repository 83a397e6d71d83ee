"""Attention and its gradients for any kinds, widths and masks, in fp32: what runs where tensor cores' kernels do not.

A warp has a few rows of the results (queries, or keys for their gradients); their vectors lie in shared memory, as do
32 vectors of the other side at a time, in fp32. First a lane is one of those 32, and makes its scores with all rows of
the warp; the weights that come of them go through shared memory, and then a lane has every 32nd column of the results.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from kernels import functions
from kernels.attention.statistics import BATCH, HEAD, POINTER, TOKEN
from kernels.elements import ELEMENTS
from kernels.target import SIMULATOR, device, i32p, i64, types
from kernels.warp import shuffle_xor

WARPS, ROWS = (1, 2) if SIMULATOR else (4, 4)
"""Warps of a block, and rows of a warp."""
THREADS, BLOCK_ROWS, OTHERS = 32 * WARPS, WARPS * ROWS, 32
MOST_WIDTH = 256
MASK_QUERY, MASK_KEY = 3, 4
"""Positions of a mask's strides, after those of batches and heads."""

_u32 = np.uint32
_NOTHING = np.float32(-math.inf)
_LOG2_E = np.float32(math.log2(math.e))


def shared_bytes(width: int, weights: int) -> int:
    """Shared memory of a block: two tensors' rows and others, and so many weights of each pair."""
    return 4 * (2 * BLOCK_ROWS * width + 2 * OTHERS * (width + 1) + weights * BLOCK_ROWS * OTHERS)


def groups_of(width: int) -> int:
    """Columns of a lane."""
    return max(1, -(-width // 32))


def mask_parameters(mask: str) -> types.Type:
    """Type of a mask [batch, head, query, key] of a kind, with all its strides; of none."""
    if not mask:
        return types.Tuple(())
    pointer = i32p if mask == "i32" else ELEMENTS[mask].pointer
    return types.Tuple((pointer, i64, i64, i64, i64))


def masker(mask: str) -> Callable:
    """``masked(score, mask, batch, head, query, key)``: a score to base 2 with a mask's number added.

    Of an integer mask, 0 hides the key.
    """
    if not mask:

        @device
        def unmasked(score, mask, batch, head, query, key):
            return score

        return unmasked
    whole = mask == "i32"
    load = None if whole else ELEMENTS[mask].load

    @device
    def masked(score, mask, batch, head, query, key):
        at = batch * mask[BATCH] + head * mask[HEAD] + query * mask[MASK_QUERY] + key * mask[MASK_KEY]
        if whole:
            return _NOTHING if mask[POINTER][at] == 0 else score
        return score + load(mask[POINTER], at) * _LOG2_E

    return masked


def scorer(mask: str, causal: bool) -> Callable:
    """``score(product, mask, problem, batch, head, query, key)``: to base 2, minus infinity where the key is hidden.

    ``problem``: queries, keys, diagonal, factor.
    """
    masked = masker(mask)

    @device
    def score(product, mask, problem, batch, head, query, key):
        queries, keys, diagonal, factor = problem
        if key >= keys or query >= queries or (causal and key > query + diagonal):
            return _NOTHING
        return masked(product * factor, mask, batch, head, query, key)

    return score


def stager(kind: str, lines: int) -> Callable:
    """``stage(shared, at, pitch, x, base, start, end, width, thread)``: some rows of a tensor to shared memory.

    Rows ``start`` and following of ``x``, which begin at ``base``, to ``at``, each ``pitch`` after the one before.
    Those from ``end`` on are zero.
    """
    load = ELEMENTS[kind].load

    @device
    def stage(shared, at, pitch, x, base, start, end, width, thread):
        line, column = np.int64(thread // _u32(32)), np.int64(thread % _u32(32))
        while line < np.int64(lines):
            place = column
            while place < width:
                value = np.float32(0)
                if start + line < end:
                    value = load(x[POINTER], base + (start + line) * x[TOKEN] + place)
                shared[at + line * pitch + place] = value
                place += np.int64(32)
            line += np.int64(WARPS)

    return stage


@device
def base_of(x, batch, head):
    """Where a head's rows begin."""
    return batch * x[BATCH] + head * x[HEAD]


@device
def dots(shared, own_at, other_at, width, values):
    """Products of the warp's rows with one other vector, each to its place in ``values``."""
    for row in range(ROWS):
        values[row] = np.float32(0)
    for column in range(width):
        other = shared[other_at + column]
        for row in range(ROWS):
            values[row] += shared[own_at + row * width + column] * other


def gatherer(groups: int) -> Callable:
    """``gather(shared, weights_at, others_at, width, sums, lane)``: sums += weights times the 32 other vectors."""

    @device
    def gather(shared, weights_at, others_at, width, sums, lane):
        for other in range(OTHERS):
            for group in range(groups):
                column = np.int64(lane) + np.int64(32 * group)
                if column < width:
                    value = shared[others_at + other * (width + 1) + column]
                    for row in range(ROWS):
                        sums[row * groups + group] += shared[weights_at + row * OTHERS + other] * value

    return gather


@device
def warp_maximum(value):
    """The largest of the warp's values, in every lane."""
    for shift in range(5):
        value = functions.maximum(value, shuffle_xor(value, _u32(_u32(16) >> _u32(shift))))
    return value


def writer(kind: str, groups: int) -> Callable:
    """``write(x, base, row0, rows, width, sums, factors, lane)``: the warp's rows of a result, times factors."""
    store = ELEMENTS[kind].store

    @device
    def write(x, base, row0, rows, width, sums, factors, lane):
        for row in range(ROWS):
            if row0 + np.int64(row) < rows:
                for group in range(groups):
                    column = np.int64(lane) + np.int64(32 * group)
                    if column < width:
                        at = base + (row0 + np.int64(row)) * x[TOKEN] + column
                        store(x[POINTER], at, sums[row * groups + group] * factors[row])

    return write
