"""Low-rank products of a tile by warpgroups (sm_90a): 64 rows times a group's columns, which four warps read once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from kernels.barrier import shared_address
from kernels.target import device
from kernels.weight.low_rank_stage import HALF_TILE, STEP
from kernels.wgmma import multiply_held, operand_descriptor

if TYPE_CHECKING:
    from kernels.weight.low_rank_tile import Tile

Place = tuple
"""A Product, and where its factors are in shared memory and in registers."""


@functools.cache
def held_pairs(place: Place, tile: Tile) -> tuple[tuple[int, int], ...]:
    """What `multiply_held` multiplies: words of left from the first of ``held`` on, and right's from its first on."""
    spec, _, held_at = place
    plane = 2 * spec.ranks * tile.columns
    return tuple(
        (held_at + 4 * (spec.parts[0] * step + left_part), (plane * right_part + 2 * STEP * HALF_TILE * step) // 16)
        for step in range(spec.steps)
        for right_part in reversed(range(spec.parts[1]))
        for left_part in reversed(range(spec.smallest_left_part(right_part) + 1))
    )


def descriptor_of(place: Place) -> Callable:
    """``describe(shared, group)``: where a warpgroup finds a group's columns of the right factor."""
    spec, shared_at, _ = place
    half_tile, describe = 2 * spec.ranks * HALF_TILE, operand_descriptor(False)

    @device
    def describe_group(shared, group):
        columns_at = np.uint32(half_tile * (group // 2) + 64 * (group % 2))
        return describe(np.uint32(shared_address(shared, np.int64(shared_at)) + columns_at))

    return describe_group


def together(place: Place, tile: Tile) -> Callable:
    """``multiply(p, shared, held, result, group, row, rows, lane)`` of one product."""
    multiply = multiply_held(32, (held_pairs(place, tile),), (place[0].kind,))
    describe = descriptor_of(place)

    @device
    def one(p, shared, held, result, group, row, rows, lane):
        multiply(held, (result,), (describe(shared, group),))

    return one


def two_together(one: Place, two: Place, tile: Tile) -> Callable:
    """``multiply(shared, held, a, b, group)``: both products, under way and waited for at the same time."""
    pairs, kinds = (held_pairs(one, tile), held_pairs(two, tile)), (one[0].kind, two[0].kind)
    multiply, describe_one, describe_two = multiply_held(32, pairs, kinds), descriptor_of(one), descriptor_of(two)

    @device
    def both(shared, held, a, b, group):
        multiply(held, (a, b), (describe_one(shared, group), describe_two(shared, group)))

    return both
