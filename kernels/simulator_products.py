"""Twins of `kernels.wgmma_registers`: products done when they are waited for, with what their operands hold then."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from kernels.simulator import current_thread, warpgroup_collective
from kernels.simulator_hopper import _operand

_THREAD = np.arange(128)
_ROW, _COLUMN = 16 * (_THREAD // 32) + _THREAD % 32 // 4, 2 * (_THREAD % 4)


@dataclass(eq=False)
class _Group:
    """One thread's part of a group of products: its sums and what they were, or the group before that adds to them; its
    words where it has any; whether another group follows that adds to the sums; and the results once they are there.
    """

    sums: np.ndarray
    old: np.ndarray | _Group
    words: np.ndarray | None
    product: tuple[Any, ...]
    followed: bool = False
    found: np.ndarray | None = None


def _start(sums, adds, words, *product) -> None:
    thread = current_thread()
    before = next((group for group in reversed(thread.products) if group.sums is sums), None)
    if before and not adds:
        raise RuntimeError(f"{thread.block}: products begin on sums that others are still added to")
    if before:
        before.followed = True
    old = before or (sums.copy() if adds else np.zeros(len(sums), np.float32))
    thread.products.append(_Group(sums, old, words, product))
    sums[:] = np.nan


def tile_products(sums, a, b, columns, places, k_major, to_f32, adds) -> None:
    """Products of tiles to be done; until then the sums are NaN."""
    _start(sums, adds, None, a, b, columns, places, k_major, to_f32)


def add_products(sums, words, b, columns, steps, step, k_major, to_f32) -> None:
    """Products of words and a tile to be done; until then the sums are NaN."""
    places = tuple((0, number * step) for number in range(steps))
    _start(sums, True, words, None, b, columns, places, (True, k_major), to_f32)


def settle(pending: int) -> None:
    """Do all but the last groups of products, for the whole warpgroup."""
    thread = current_thread()
    done = max(0, len(thread.products) - pending)
    groups = thread.products[:done]
    del thread.products[:done]
    warpgroup_collective(_multiply_all, (thread.block, groups))


def _multiply_all(lanes: list) -> list[None]:
    block, first = lanes[0]
    for number, group in enumerate(first):
        parts = [lane[1][number] for lane in lanes]
        if any(part.product != group.product for part in parts):
            raise RuntimeError(f"{block}: threads of a warpgroup wait for different products")
        _multiply(block, parts, *group.product)
    return [None] * len(lanes)


def _multiply(block, parts: list[_Group], a, b, columns, places, k_major, to_f32) -> None:
    index = np.arange(columns // 2)
    rows = _ROW[:, None] + 8 * (index >> 1 & 1)
    across = 8 * (index // 4) + _COLUMN[:, None] + (index & 1)
    matrix = np.zeros((64, columns), np.float32)
    matrix[rows, across] = np.array([part.old.found if isinstance(part.old, _Group) else part.old for part in parts])
    for number, (of_a, of_b) in enumerate(places):
        if a is None:
            left = _fragments([part.words[4 * number : 4 * number + 4] for part in parts], to_f32)
        else:
            left = _operand(block, a + of_a, k_major[0], 64, to_f32)
        matrix = matrix + left @ _operand(block, b + of_b, k_major[1], columns, to_f32).T
    for part, row in zip(parts, matrix[rows, across], strict=True):
        part.found = row
        if not part.followed:
            part.sums[:] = row


def _fragments(words: list, to_f32) -> np.ndarray:
    """The 64 x 16 left factor that a warpgroup's threads have four words each of."""
    words = np.array(words, np.uint32)
    halves = to_f32(np.stack([words & 0xFFFF, words >> 16], -1))
    left = np.zeros((64, 16), np.float32)
    for r in range(4):
        for half in range(2):
            left[_ROW + 8 * (r & 1), _COLUMN + 8 * (r >> 1) + half] = halves[:, r, half]
    return left
