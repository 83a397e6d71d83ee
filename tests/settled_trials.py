"""Adversarial elements of settled low-rank merges by the million, against the golden rule, in models of tensor cores.

    python tests/settled_trials.py [elements a row, 400000 where not given]

A row is a model of the tensor core, a rank and a family of factors; it prints how many elements were in doubt, how many
broke the rule (the exit status is 1 where one did), how many a plain merge breaks, and the largest error of a sum as a
part of its bound.
"""

from __future__ import annotations

import math
import sys
import time

import numpy as np
from numba import njit

from kernels.weight.low_rank_tile import STEP, Product

CORES = {"sm_80": (8, 1), "sm_90": (16, 2)}
"""Products that are added at a time, and bits that are kept below fp32's last: see tensor_core_model.py."""
RANKS = (1, 4, 8, 16, 17, 32, 48, 64, 128, 256)
FAMILIES = ("normal", "halves cancel", "below what is kept", "steps cancel", "any exponents", "one sign")
BF16_BITS, FP32_BITS = 8, 24
LEAST = 2.0**-140


@njit
def _power(x):
    """The largest power of two up to |x|."""
    return math.ldexp(1.0, math.frexp(x)[1] - 1) if x != 0.0 else LEAST


@njit
def _cut(x):
    """Cut to fp32, toward zero."""
    last = _power(x) * 2.0 ** (1 - FP32_BITS)
    return math.trunc(x / last) * last


@njit
def _rounded(x, bits):
    """Rounded once to so many bits, to nearest even."""
    last = _power(x) * 2.0 ** (1 - bits)
    scaled = x / last
    below = math.floor(scaled)
    rest = scaled - below
    if rest > 0.5 or (rest == 0.5 and below % 2 != 0):
        below += 1
    return below * last


@njit
def _accumulate(c, products, first, core):
    """One instruction: a step's products added to c."""
    block, kept = core
    for at in range(first, first + STEP, block):
        largest = abs(c)
        for k in range(at, at + block):
            largest = max(largest, abs(products[k]))
        last = _power(largest) * 2.0 ** -(FP32_BITS - 1 + kept)
        total = float(math.trunc(c / last))
        for k in range(at, at + block):
            total += math.trunc(products[k] / last)
        c = _cut(total * last)
    return c


@njit
def _draw(family, rank, a, b):
    for k in range(rank):
        x, y = np.random.standard_normal(), np.random.standard_normal()
        step = k // STEP
        if family == 1 and k >= rank // 2:
            x, y = -a[k - rank // 2], b[k - rank // 2] * (1 + 2.0 ** -np.random.randint(3, 8))
        elif family in (2, 3):
            x, y = 1 + np.random.random(), 1 + np.random.random()
            if family == 2 and k % STEP:
                x *= 2.0 ** -np.random.randint(8, 15)
            elif step % 2:
                x = -x
        elif family == 4:
            x *= 2.0 ** np.random.randint(-10, 11)
            y *= 2.0 ** np.random.randint(-10, 11)
        elif family == 5:
            x, y = abs(x), abs(y)
        a[k], b[k] = _rounded(x, BF16_BITS), _rounded(y, BF16_BITS)


@njit
def _base(delta, reach):
    """A base whose sum with delta lies near a tie of any size, or, one time in four, some bf16 number."""
    if np.random.random() < 0.25:
        return _rounded(np.random.standard_normal() * delta * 10.0 ** np.random.uniform(-1, 2), BF16_BITS)
    size = (abs(delta) + reach) * 2.0 ** np.random.uniform(-14, 4)
    last = _power(size) * 2.0 ** (1 - BF16_BITS)
    tie = (math.floor(size / last) + 0.5) * last * (1 if np.random.random() < 0.5 else -1)
    distance = reach * 2.0 ** np.random.uniform(-12, 2) * (1 if np.random.random() < 0.5 else -1)
    return _rounded(tie + distance - delta, FP32_BITS)


@njit
def _keeps(found, base, delta):
    """The golden rule."""
    exact = base + delta
    slack = 2.0**-12 * _power(exact) * 2.0 ** (1 - BF16_BITS) + 8 * 2.0**-24 * (abs(base) + abs(delta))
    return _rounded(exact - slack, BF16_BITS) <= found <= _rounded(exact + slack, BF16_BITS)


@njit
def trial(seed, count, rank, family, core, error):
    """Elements in doubt, those that break the rule settled and plain, and the largest error as a part of its bound."""
    np.random.seed(seed)
    steps = -(-rank // STEP)
    a, b = np.zeros(STEP * steps), np.zeros(STEP * steps)
    doubts, broken, plainly_broken, worst = 0, 0, 0, 0.0
    exact = size = total = chain = 0.0
    for i in range(count):
        if i % 4 == 0:
            _draw(family, rank, a, b)
            products = a * b
            magnitudes = np.abs(products)
            exact = products.sum()
            size = total = chain = 0.0
            for first in range(0, STEP * steps, STEP):
                size = _accumulate(size, magnitudes, first, core)
                total = _rounded(total + _accumulate(0.0, products, first, core), FP32_BITS)
                chain = _accumulate(chain, products, first, core)
            if size > 0:
                worst = max(worst, abs(total - exact) / (error * size))
        scale = _rounded(0.25 + np.random.random(), FP32_BITS)
        delta, reach = scale * exact, scale * _rounded(error * size, FP32_BITS)
        w = _base(delta, reach)
        x = _rounded(w + scale * total, FP32_BITS)
        found = _rounded(x, BF16_BITS)
        low, high = _rounded(x - reach, FP32_BITS), _rounded(x + reach, FP32_BITS)
        if _rounded(low, BF16_BITS) != _rounded(high, BF16_BITS):
            doubts += 1
            found = _rounded(_rounded(w + delta, FP32_BITS), BF16_BITS)
        plain = _rounded(_rounded(w + scale * chain, FP32_BITS), BF16_BITS)
        broken += not _keeps(found, w, delta)
        plainly_broken += not _keeps(plain, w, delta)
    return doubts, broken, plainly_broken, worst


def main(count: int) -> int:
    """All rows; the number of elements that broke the rule."""
    seed = int(time.time())
    print(f"seed {seed}, {count} elements a row")
    rows = [(name, rank, family) for name in CORES for rank in RANKS for family in range(len(FAMILIES))]
    all_broken = 0
    for name, rank, family in rows:
        seed += 1
        error = Product("bf16", "bf16", -(-rank // STEP), 1, False).error
        doubts, broken, plainly, worst = trial(seed, count, rank, family, CORES[name], error)
        all_broken += broken
        print(
            f"{name} rank {rank:3} {FAMILIES[family]:18} in doubt {doubts / count:.4f}, broken {broken}, "
            f"plainly {plainly}, worst {worst:.3f} of its bound",
            flush=True,
        )
    print(f"{all_broken} of {count * len(rows)} broken")
    return all_broken


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 400_000) > 0)
