"""The sums of a product and of blocks times a second factor, in groups of columns, against float64."""

from __future__ import annotations

import numpy as np
import pytest

from kernels.target import SIMULATOR
from lycoris import tensor
from lycoris.tensor.autograd import grad
from lycoris.tensor.kronecker import diagonal, sum_with_blocks, together_of
from lycoris.tensor.products import flipped
from plans.core import ElementKind

BF16, F32 = ElementKind.BF16, ElementKind.F32


def packed(values, kind):
    return tensor.from_numpy(np.asarray(values, np.float64), kind=kind)


@pytest.mark.parametrize("kind", [BF16, F32], ids=lambda kind: kind.value)
@pytest.mark.parametrize("stored", ["rows of columns", "rows of k"])
@pytest.mark.parametrize(("groups", "together", "depth", "columns"), [(1, 1, 3, 5), (3, 1, 8, 16), (2, 4, 8, 8)])
def test_blocks_beside_a_product(groups, together, depth, columns, stored, kind, rng):
    m, k = 7, 24
    a = rng.integers(-3, 4, (m, k))
    b = rng.integers(-3, 4, (k, groups * together * columns))
    blocks = rng.integers(-3, 4, (m, groups * together * depth))
    second = rng.integers(-3, 4, (depth, columns))
    bias = rng.integers(-3, 4, groups * together * columns)
    if stored == "rows of columns":
        base, wide = packed(b, kind), diagonal(packed(second, kind), together)
    else:
        base, wide = flipped(packed(b.T, kind)), flipped(diagonal(packed(second.T, kind), together))
    given = packed(a, kind), base, packed(blocks, kind), wide
    wanted = a @ b + (blocks.reshape(m, groups * together, depth) @ second).reshape(m, -1)
    # Whole numbers this small are exact in every kind's sum and in fp32.
    assert (sum_with_blocks(*given, together, F32).numpy() == wanted).all()
    assert (sum_with_blocks(*given, together, F32, packed(bias, kind)).numpy() == wanted + bias).all()


def test_narrow_blocks_go_together_by_a_divisor(device):
    least = 256 if device.arch[0] >= 9 else 128
    assert together_of(48, 64, device) == least // 64
    assert together_of(7, 64, device) == 7
    assert together_of(8, least, device) == 1
    assert together_of(1, 3, device) == 1


def test_a_diagonal_of_blocks(rng):
    block = rng.standard_normal((3, 5))
    found = diagonal(packed(block, F32), 4).numpy()
    assert (found == np.kron(np.eye(4), block.astype(np.float32))).all()


WIDE = [(9, (2, 3), (80, 72))]
if not SIMULATOR:
    WIDE += [(9, (2, 2), (72, 80)), (2048, (8, 8), (384, 384)), (515, (8, 6), (1536, 384))]
NARROW = [] if SIMULATOR else [(520, (6, 5), (40, 24)), (4096, (48, 48), (64, 64)), (1031, (96, 48), (128, 64))]


@pytest.mark.parametrize(("rows", "mixing", "block"), WIDE + NARROW, ids=str)
def test_gradients_of_wide_and_narrow_blocks(rows, mixing, block, rng):
    """Where w1's gradient may be made beside x's, and where one pass makes both factors'; twice bit for bit."""
    (a, b), (c, d) = mixing, block
    shapes = ((rows, b * d), (a * c, b * d), (a, b), (c, d), (rows, a * c))
    given = [packed(0.25 * rng.standard_normal(shape), BF16) for shape in shapes]
    x, weight, w1, w2, g = (tensor.numpy().astype(np.float64) for tensor in given)
    wanted = [part.requires_grad_() for part in (given[0], *given[2:4])]

    def gradients():
        y = tensor.kronecker_linear(wanted[0], given[1], wanted[1], [wanted[2]], scale=0.5)
        return [found.numpy() for found in grad([y], wanted, [given[4]])]

    weighted = (g.T @ x).reshape(a, c, b, d) * 0.5
    exact = (
        g @ (weight + 0.5 * np.kron(w1, w2)),
        np.einsum("ucmd,cd->um", weighted, w2),
        np.einsum("ucmd,um->cd", weighted, w1),
    )
    first, second = gradients(), gradients()
    for found, again, value in zip(first, second, exact, strict=True):
        np.testing.assert_array_equal(found, again)
        assert np.linalg.norm(found.astype(np.float64) - value) <= 2**-7 * np.linalg.norm(value)


@pytest.mark.parametrize(
    ("rows", "mixing", "block", "rank"), [(9, (2, 3), (24, 16), 8)] if SIMULATOR else [(2048, (8, 8), (384, 384), 16)]
)
def test_gradients_of_w2_s_factors(rows, mixing, block, rank, rng):
    (a, b), (c, d) = mixing, block
    shapes = ((rows, b * d), (a * c, b * d), (a, b), (c, rank), (rank, d), (rows, a * c))
    given = [packed(0.25 * rng.standard_normal(shape), BF16) for shape in shapes]
    x, weight, w1, left, right, g = (tensor.numpy().astype(np.float64) for tensor in given)
    wanted = [part.requires_grad_() for part in (given[0], *given[2:5])]
    y = tensor.kronecker_linear(wanted[0], given[1], wanted[1], wanted[2:], scale=0.5)
    weighted = (g.T @ x).reshape(a, c, b, d) * 0.5
    d_w2 = np.einsum("ucmd,um->cd", weighted, w1)
    exact = (
        g @ (weight + 0.5 * np.kron(w1, left @ right)),
        np.einsum("ucmd,cd->um", weighted, left @ right),
        d_w2 @ right.T,
        left.T @ d_w2,
    )
    for found, value in zip(grad([y], wanted, [given[5]]), exact, strict=True):
        assert np.linalg.norm(found.numpy().astype(np.float64) - value) <= 2**-7 * np.linalg.norm(value)


@pytest.mark.parametrize(
    ("mixing", "block"), [((3, 8), (8, 16))] if SIMULATOR else [((3, 8), (8, 16)), ((8, 8), (384, 384))], ids=str
)
@pytest.mark.parametrize("trained", [(1,), (2,), (0, 1), (0, 2), (1, 2)], ids=str)
def test_some_gradients(mixing, block, trained, rng):
    """Those that are asked for, whatever else would be made in the same pass: as when all are."""
    rows, (a, b), (c, d) = 9 if SIMULATOR else 1024, mixing, block
    shapes = ((rows, b * d), (a * c, b * d), (a, b), (c, d), (rows, a * c))
    values = [0.25 * rng.standard_normal(shape) for shape in shapes]

    def gradients(numbers):
        x, weight, w1, w2, g = (packed(value, BF16) for value in values)
        wanted = [part.requires_grad_() if i in numbers else part for i, part in enumerate((x, w1, w2))]
        y = tensor.kronecker_linear(wanted[0], weight, wanted[1], [wanted[2]], scale=0.5)
        return [found.numpy().astype(np.float64) for found in grad([y], [wanted[i] for i in numbers], [g])]

    every = gradients((0, 1, 2))
    for i, found in zip(trained, gradients(trained), strict=True):
        assert np.linalg.norm(found - every[i]) <= 2**-6 * np.linalg.norm(every[i])
