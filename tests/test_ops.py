"""The library's tensor operations against NumPy in float64, and what they refuse."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import tucker

from lycoris import RefusedInput
from lycoris.buffers import DeviceArray
from lycoris.ops import (
    factorization,
    make_hadamard_weight,
    make_hadamard_weight_tucker,
    make_kronecker,
    make_kronecker_conv_kernel,
    rebuild_conv_tucker,
    rebuild_tucker,
)
from plans.core import ElementKind, InvalidProblem
from plans.weight import WeightLayout

KINDS = (ElementKind.BF16, ElementKind.F16, ElementKind.F32)
# Relative to the sum of the terms' absolute values: one rounding to the kind, and less than 64 fp32 roundings.
ROUNDING = {ElementKind.BF16: 2.0**-8, ElementKind.F16: 2.0**-11, ElementKind.F32: 2.0**-24}


def draw(rng, kind, *shape):
    """A tensor on the device, and its values in float64."""
    array = DeviceArray.from_numpy(rng.standard_normal(shape), kind)
    return array, array.numpy().astype(np.float64)


def assert_rounded(found, exact, magnitude):
    assert found.shape == exact.shape
    bound = ROUNDING[found.kind] * np.abs(exact) + 64 * 2.0**-24 * magnitude + 2.0**-24
    assert (np.abs(found.numpy().astype(np.float64) - exact) <= bound).all()


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.value)
@pytest.mark.parametrize("kernel", [(), (3,), (3, 3), (1, 2, 3)], ids=str)
def test_make_hadamard_weight(rng, kind, kernel):
    (a1, x1), (b1, y1), (a2, x2), (b2, y2) = (draw(rng, kind, *shape) for shape in [(5, 3), (3, 7, *kernel)] * 2)
    found = make_hadamard_weight(a1, b1, a2, b2, scale=0.5)
    exact, size = (0.5 * np.tensordot(f(x1), f(y1), 1) * np.tensordot(f(x2), f(y2), 1) for f in (np.asarray, np.abs))
    assert found.kind is kind
    assert_rounded(found, exact, size)


@pytest.mark.parametrize("kernel", [(), (3,), (3, 3), (1, 2, 3)], ids=str)
def test_make_hadamard_weight_tucker(rng, kernel):
    shapes = [(2, 3, *kernel), (2, 5), (3, 7)]
    pairs = [draw(rng, ElementKind.BF16, *shape) for shape in shapes * 2]
    found = make_hadamard_weight_tucker(*(array for array, _ in pairs), scale=-0.5, kind=ElementKind.F32)
    values = [value for _, value in pairs]
    exact, size = (tucker(*map(f, values[:3])) * tucker(*map(f, values[3:])) * 0.5 for f in (np.asarray, np.abs))
    assert found.kind is ElementKind.F32
    assert_rounded(found, -exact, size)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.value)
def test_make_kronecker_of_matrices_is_numpys(rng, kind):
    (w1, x1), (w2, x2) = draw(rng, kind, 3, 2), draw(rng, kind, 4, 5)
    exact = 2 * np.kron(x1, x2)
    assert_rounded(make_kronecker(w1, w2, scale=2.0), exact, np.abs(exact))


@pytest.mark.parametrize("taps", [(1, 1), (3, 3), (2, 5)], ids=str)
def test_make_kronecker_conv_kernel_writes_flames_layout(rng, taps):
    (w1, x1), (w2, x2) = draw(rng, ElementKind.BF16, 3, 2), draw(rng, ElementKind.BF16, 4, 5, *taps)
    exact = np.stack([[np.kron(x1, x2[:, :, h, w]).T for w in range(taps[1])] for h in range(taps[0])])
    found = make_kronecker_conv_kernel(w1, w2)
    assert found.shape == (*taps, 10, 12)
    assert_rounded(found, exact, np.abs(exact))
    checkpoint = make_kronecker(w1, w2).numpy()
    np.testing.assert_array_equal(found.numpy(), checkpoint.transpose(2, 3, 1, 0))


@pytest.mark.parametrize("layout", WeightLayout, ids=lambda layout: layout.name.lower())
@pytest.mark.parametrize("kernel", [(), (3,), (3, 3), (1, 2, 3)], ids=str)
def test_rebuild_tucker(rng, kernel, layout):
    (t, x), (a, y), (b, z) = (draw(rng, ElementKind.F16, *shape) for shape in [(2, 3, *kernel), (2, 5), (3, 7)])
    found = rebuild_tucker(t, a, b, scale=3.0, layout=layout)
    exact, size = (3 * tucker(f(x), f(y), f(z)) for f in (np.asarray, np.abs))
    if layout is WeightLayout.FLAME:
        exact, size = (v.transpose(*range(2, v.ndim), 1, 0) for v in (exact, size))
    assert_rounded(found, exact, size)


@pytest.mark.parametrize("taps", [(1, 1), (3, 3), (2, 5)], ids=str)
def test_rebuild_conv_tucker_contracts_every_tap(rng, taps):
    (core, x), (down, y), (up, z) = (
        draw(rng, ElementKind.BF16, *shape) for shape in [(*taps, 3, 2), (1, 1, 7, 3), (1, 1, 2, 5)]
    )
    found = rebuild_conv_tucker(core, down, up, scale=0.25)
    exact, size = (0.25 * (f(y[0, 0]) @ f(x) @ f(z[0, 0])) for f in (np.asarray, np.abs))
    assert found.shape == (*taps, 7, 5)
    assert_rounded(found, exact, size)


@settings(max_examples=200)
@given(st.integers(1, 5000), st.integers(-3, 200))
def test_factorization_splits_as_lycoris_does(dimension, factor):
    m, n = factorization(dimension, factor)
    assert m * n == dimension and m <= n
    divisors = [d for d in range(1, dimension + 1) if dimension % d == 0]
    if factor > 0 and dimension % factor == 0:
        assert factor in (m, n)
    else:
        allowed = [d for d in divisors if d * d <= dimension and (factor < 0 or d <= factor)]
        assert m == max(allowed, default=1)


# From the docstring of LyCORIS' own function.
@pytest.mark.parametrize(
    ("dimension", "splits"),
    {
        127: ((1, 127), (1, 127), (1, 127), (1, 127), (1, 127)),
        128: ((8, 16), (2, 64), (4, 32), (8, 16), (8, 16)),
        250: ((10, 25), (2, 125), (2, 125), (5, 50), (10, 25)),
        360: ((18, 20), (2, 180), (4, 90), (8, 45), (15, 24)),
        512: ((16, 32), (2, 256), (4, 128), (8, 64), (16, 32)),
        1024: ((32, 32), (2, 512), (4, 256), (8, 128), (16, 64)),
    }.items(),
)
def test_factorization_of_common_dimensions(dimension, splits):
    assert tuple(factorization(dimension, factor) for factor in (-1, 2, 4, 8, 16)) == splits


def zeros(*shape):
    return DeviceArray.zeros(shape, ElementKind.F32)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: make_hadamard_weight(zeros(5, 3), zeros(3, 7), zeros(7, 3), zeros(3, 5)),
            RefusedInput,
            "weight: operand source0.second.left has shape (7, 3), wanted (5, 3)",
        ),
        (
            lambda: make_hadamard_weight(zeros(3, 5), zeros(3, 5), zeros(5, 3), zeros(3, 5)),
            RefusedInput,
            "weight: operand source0.first.left has shape (3, 5), wanted (3, 3)",
        ),
        (
            lambda: make_hadamard_weight(zeros(5), zeros(3, 7), zeros(5, 3), zeros(3, 7)),
            RefusedInput,
            "make_hadamard_weight: w1_a has shape (5,), wanted at least 2 axes",
        ),
        (
            lambda: make_kronecker(zeros(5), zeros(3, 7)),
            RefusedInput,
            "make_kronecker: w1 has shape (5,), wanted at least 2 axes",
        ),
        (
            lambda: make_kronecker(zeros(5, 2, 3, 3), zeros(3, 7)),
            RefusedInput,
            "weight: operand source0.w1 has shape (5, 2, 3, 3), wanted (5, 2)",
        ),
        (
            lambda: rebuild_tucker(zeros(2, 3, 3, 3), zeros(5, 2), zeros(3, 7)),
            RefusedInput,
            "weight: operand source0.left has shape (5, 2), wanted (2, 2)",
        ),
        (
            lambda: rebuild_conv_tucker(zeros(3, 3, 2, 2), zeros(3, 3, 7, 2), zeros(1, 1, 2, 5)),
            RefusedInput,
            "rebuild_conv_tucker: down has shape (3, 3, 7, 2), wanted [1, 1, rows, columns]",
        ),
        (lambda: factorization(0), RefusedInput, "factorization: dimension 0, wanted 1 or more"),
        (
            lambda: make_kronecker(zeros(2, 2), zeros(3, 7), kind=ElementKind.I32),
            InvalidProblem,
            "weight: out holds i32, wanted one of bf16, f16, f32",
        ),
    ],
)
def test_what_does_not_fit_is_refused(call, error, message):
    with pytest.raises(error, match="^" + re.escape(message)):
        call()
