"""Division by reciprocals, pairs of fp32, and what pairs are for: deltas far smaller than their terms."""

from __future__ import annotations

import numpy as np
import pytest
from golden import assert_golden
from hypothesis import given
from hypothesis import strategies as st
from weight_cases import BF16, F16, F32, Inputs, Shape, describe, run

from kernels import double_float, warp
from kernels.division import divide, reciprocal_of, remainder
from plans.weight import Hadamard, LowRank
from plans.weight.portable import PORTABLE

LAST = 2**31 - 1
numbers = st.integers(0, LAST)


@given(numbers, st.integers(1, LAST))
def test_the_reciprocal_divides_every_31_bit_number(n, divisor):
    reciprocal = reciprocal_of(divisor)
    factor, shift = reciprocal & 0xFFFFFFFF, reciprocal >> 32
    assert 2 * n * factor >> (32 + shift) == n // divisor
    assert reciprocal < 2**63


def _divisions(ns, divisor, reciprocal, quotients, remainders):
    i = warp.thread_index()
    quotients[i] = divide(ns[i], reciprocal)
    remainders[i] = remainder(ns[i], divisor, reciprocal)


@pytest.mark.parametrize("divisor", [1, 2, 3, 7, 8, 40, 641, 1536, 65537, 2**30 + 1, LAST])
def test_division_in_a_kernel(run_kernel, rng, divisor):
    edges = [0, 1, divisor - 1, divisor, min(divisor + 1, LAST), LAST // divisor * divisor, LAST - 1, LAST]
    ns = np.array([*edges, *rng.integers(0, LAST, 24)], np.uint32)
    quotients, remainders = run_kernel(
        _divisions, [ns, divisor, reciprocal_of(divisor)], [(np.uint32, 32), (np.uint32, 32)]
    )
    np.testing.assert_array_equal(quotients, ns // np.uint32(divisor))
    np.testing.assert_array_equal(remainders, ns % np.uint32(divisor))


def _products(a, a_low, b, b_low, high, low):
    i = warp.thread_index()
    high[i], low[i] = double_float.multiply_pairs(a[i], a_low[i], b[i], b_low[i])


def _sums(a, a_low, b, b_low, high, low):
    i = warp.thread_index()
    high[i], low[i] = double_float.add_pairs(a[i], a_low[i], b[i], b_low[i])


def _pairs(rng):
    values = rng.standard_normal(32) * 2.0 ** rng.integers(-20, 20, 32)
    high = values.astype(np.float32)
    return high, (values - high).astype(np.float32)


@pytest.mark.parametrize(("kernel", "exact"), [(_products, np.multiply), (_sums, np.add)], ids=["product", "sum"])
def test_pairs_keep_44_bits(run_kernel, rng, kernel, exact):
    (a, a_low), (b, b_low) = _pairs(rng), _pairs(rng)
    high, low = run_kernel(kernel, [a, a_low, b, b_low], [(np.float32, 32), (np.float32, 32)])
    wide = [np.longdouble(x) + y for x, y in ((a, a_low), (b, b_low))]
    size = exact(*map(np.abs, wide))
    assert (np.abs(np.longdouble(high) + low - exact(*wide)) <= size * 2.0**-44).all()
    np.testing.assert_array_equal(high, high + low)


@pytest.mark.parametrize(("kernel", "exact"), [(_products, np.multiply), (_sums, np.add)], ids=["product", "sum"])
def test_the_first_word_of_a_pair_says_what_is_not_finite(run_kernel, kernel, exact):
    numbers = np.array([np.inf, -np.inf, np.nan, 3e38, -3e38, 1.5, 0], np.float32)
    pairs = np.stack(np.meshgrid(numbers, numbers), -1).reshape(-1, 2)
    for a, b in (pairs[:32].T, pairs[-32:].T):
        a_low, b_low = a * np.float32(2.0**-25), b * np.float32(2.0**-25)
        with np.errstate(invalid="ignore", over="ignore"):
            wanted = exact(a, b)
        assert not np.isfinite(wanted).all()
        high, _ = run_kernel(kernel, [a, a_low, b, b_low], [(np.float32, 32), (np.float32, 32)])
        bad = ~np.isfinite(wanted)
        np.testing.assert_array_equal(high[bad], wanted[bad])
        assert np.isfinite(high[~bad]).all()


def _dots(a, b, terms, high, low):
    i = np.int64(warp.thread_index())
    total, rest = np.float32(0), np.float32(0)
    for k in range(terms):
        total, rest = double_float.multiply_add(a[i * terms + k], b[i * terms + k], total, rest)
    high[i], low[i] = double_float.add_pairs(total, rest, np.float32(0), np.float32(0))


def test_dot_products_that_cancel(run_kernel, rng):
    terms = 24
    a, b = rng.standard_normal((2, 32, terms), np.float32)
    b[:, terms // 2 :] = b[:, : terms // 2] * (1 + np.float32(2.0**-18))
    a[:, terms // 2 :] = -a[:, : terms // 2]
    high, low = run_kernel(_dots, [a.reshape(-1), b.reshape(-1), terms], [(np.float32, 32), (np.float32, 32)])
    products = a.astype(np.longdouble) * b
    allowed = np.abs(products).sum(1) * terms**2 * 2.0**-48
    assert (np.abs(np.longdouble(high) + low - products.sum(1)) <= allowed).all()


@pytest.mark.parametrize("hadamard", [False, True], ids=["locon", "loha"])
@pytest.mark.parametrize(("base", "factor"), [(BF16, BF16), (BF16, F32), (F16, F16)], ids=lambda kind: kind.value)
def test_a_delta_far_smaller_than_its_terms_merges_right(device, rng, base, factor, hadamard):
    """Pairs of ranks cancel but for a few thousandths; one fp32 sum would break the golden rule near many ties."""
    rank, product = 32, LowRank(32, factor, factor)
    source = Hadamard(product, LowRank(1, factor, factor)) if hadamard else product
    descriptor = describe(Shape(1, 1, 24, 40), (source,), base)
    inputs = Inputs.random(descriptor, rng)
    left, right = inputs.factors[0][:2]
    left[:, rank // 2 :] = -left[:, : rank // 2]
    right[rank // 2 :] = (right[: rank // 2].astype(np.float64) * (1 + 2.0**-6)).astype(right.dtype)
    exact, _ = inputs.reference(descriptor)
    delta = exact - inputs.base.astype(np.float64)
    inputs.base[...] = (-delta * rng.uniform(0.25, 0.75, delta.shape)).astype(inputs.base.dtype)
    exact, _ = inputs.reference(descriptor)
    assert_golden(run(descriptor, PORTABLE, inputs, device).values, exact, inputs.base, base.values)
