"""A low-rank product that a warp keeps in registers, 16 rows by 64 columns, without shared memory.

Lane l ends up with eight neighbouring columns, run l % 8 of the warp's eight, in rows 2 (l // 8), the next, and both
eight further down: eight lanes together access whole lines of a weight. Runs need not be neighbours, since each lane
says where its own is.

Columns of ``right`` are multiplied by rows of ``left``, so that lane 4 g + t of the tensor core has run g in four rows;
results then move to the lanes that want them. Ranks are permuted so that parts of both factors are whole accesses to
memory: neighbouring ranks of rows g and g + 8, and the same ranks of run g.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np

from kernels import tensor_core, warp
from kernels.bits import bits_f32, f32_bits, high_halves, low_halves
from kernels.elements import ELEMENTS
from kernels.target import cuda, device
from kernels.weight.low_rank_tile import Product, Tile, left_fragment

ROWS = 16
RUNS = 8
SLOTS = 4
MAX_RANK = 32
"""As many as registers have room for beside the walk's own."""
_RANKS = 4
"""Ranks of a step that are a lane's own."""


@device
def run_of_lane(thread):
    """Which of the warp's runs is a thread's."""
    return np.uint32(thread & np.uint32(7))


@device
def first_row(thread):
    """The first of a thread's rows among the warp's."""
    return np.int64(((thread & np.uint32(31)) >> np.uint32(3)) * np.uint32(2))


@device
def row_of_slot(slot):
    """The slot-th of a lane's rows, counted from its first."""
    return slot + 6 * (slot // 2)


@functools.cache
def low_rank_runs(spec: Product, ragged: bool) -> Callable:
    """``multiply(p, values, row0, rows, column, lane)``: a lane's eight columns from ``column`` on, of four rows.

    ``p``: left, right, rank, strides of left's row and rank and of right's rank; both factors are of the tensor core's
    kind. Rows beyond ``rows`` read the last one.
    """
    assert spec.parts == (1, 1), spec
    fragment = left_fragment(spec, Tile(1, 1, ragged, "walk"), 0, None)
    fetch8, full, steps_at_once = ELEMENTS[spec.right].fetch8_cached, spec.full, spec.steps_at_once
    mma = tensor_core.mma_f16 if spec.native_f16 else tensor_core.mma_bf16
    left_words, right_words, results = 4 * steps_at_once, 4 * _RANKS, 8 * SLOTS
    ranks_at_once, loads = _RANKS * steps_at_once, spec.steps // steps_at_once

    @device
    def fetch_ranks(p, first, column, words):
        for i in range(_RANKS):
            k = first + np.int64(i)
            inside = full or k < p[2]
            fetch8(p[1], (k if inside else p[2] - np.int64(1)) * p[5] + column, words, 4 * i)
            if not inside:
                for word in range(4):
                    words[4 * i + word] = np.uint32(0)

    @device
    def step(values, left, left_at, right):
        for pair in range(4):
            first, second = right[pair], right[4 + pair]
            third, fourth = right[8 + pair], right[12 + pair]
            for half in range(2):
                at = 16 * half + 2 * pair
                values[at], values[at + 8], values[at + 1], values[at + 9] = mma(
                    low_halves(first, second), high_halves(first, second),
                    low_halves(third, fourth), high_halves(third, fourth),
                    left[left_at + half], left[left_at + half + 2],
                    values[at], values[at + 8], values[at + 1], values[at + 9],
                )  # fmt: skip

    @device
    def multiply(p, values, row0, rows, column, lane):
        left = cuda.local.array(left_words, np.uint32)
        right = cuda.local.array(right_words, np.uint32)
        for i in range(results):
            values[i] = np.float32(0)
        g, t = np.uint32(lane >> np.uint32(2)), np.uint32(lane & np.uint32(3))
        column_of_g = np.int64(f32_bits(warp.shuffle_from(bits_f32(np.uint32(column)), g)))
        own = np.int64(t * np.uint32(ranks_at_once))
        for load in range(loads):
            fragment(p, left, 0, row0 + np.int64(g), rows, lane, load)
            for sub in range(steps_at_once):
                first = own + np.int64(4 * ranks_at_once * load + _RANKS * sub)
                fetch_ranks(p, first, column_of_g, right)
                step(values, left, 4 * sub, right)
        has_mine = np.uint32(np.uint32(4) * run_of_lane(lane) + (lane >> np.uint32(3)))
        for i in range(results):
            values[i] = warp.shuffle_from(values[i], has_mine)

    return multiply
