"""What comes together as one gradient: rounded once, whichever operation adds it up, and shared with nothing."""

from __future__ import annotations

import numpy as np
import pytest

from lycoris import tensor
from lycoris.errors import RefusedInput
from lycoris.tensor import Tensor
from plans.core import ElementKind

BF16, F32 = ElementKind.BF16, ElementKind.F32
ROWS, WIDTH = 6, 16

ADDING = {
    "layer_norm": lambda x, w: tensor.layer_norm(x, w[0], w[1]),
    "layer_norm, plain": lambda x, w: tensor.layer_norm(x),
    "rms_norm": lambda x, w: tensor.rms_norm(x, w[0]),
    "rms_norm, plain": lambda x, w: tensor.rms_norm(x),
    "linear": lambda x, w: tensor.linear(x, w),
    "low_rank_linear": lambda x, w: tensor.low_rank_linear(x, w, w[:8].clone(), w[:, :8].clone(), 0.5),
    "low_rank_linear, frozen": lambda x, w: tensor.low_rank_linear(x, w, w[:3].clone(), w[:, :3].clone(), 0.5),
}
"""Operations whose pullback adds what the gradient of their first operand is already."""


def values(rng: np.random.Generator, *shape: int, kind: ElementKind = F32) -> Tensor:
    return tensor.from_numpy(rng.standard_normal(shape), kind=kind)


def numbers(x: Tensor) -> np.ndarray:
    return x.numpy().astype(np.float64)


@pytest.mark.parametrize("kind", [F32, BF16], ids=lambda kind: kind.value)
@pytest.mark.parametrize("others", [0, 1, 2, 3])
@pytest.mark.parametrize("name", ADDING)
def test_an_operation_adds_what_others_contributed(rng, name, others, kind):
    x, w = values(rng, 2, ROWS // 2, WIDTH, kind=kind), values(rng, WIDTH, WIDTH, kind=kind)
    g, gs = values(rng, *x.shape, kind=kind), [values(rng, *x.shape, kind=kind) for _ in range(others)]
    h = x.requires_grad_() * 1
    out = ADDING[name](h, w)
    results, seeds = [out, *(h.clone() for _ in gs)], [g, *gs]
    alone = tensor.grad([out], [h], [g], retain_graph=True)[0]
    (found,) = tensor.grad(results, [h], seeds, retain_graph=True)
    (again,) = tensor.grad(results, [h], seeds)
    assert found.kind is kind
    np.testing.assert_array_equal(again.numpy(), found.numpy())
    exact = numbers(alone) + sum(numbers(seed) for seed in gs)
    size = abs(numbers(alone)) + sum(abs(numbers(seed)) for seed in gs)
    # `alone` was rounded once, the sum once more; fp32's additions besides.
    unit = 2.0**-8 if kind is BF16 else 2.0**-22
    assert np.all(abs(numbers(found) - exact) <= unit * (size + abs(exact)))


def test_three_contributions_are_rounded_once():
    x = tensor.zeros((4,), F32, requires_grad=True)
    h = x.to(BF16)
    parts = [tensor.full((4,), value, BF16) for value in (256.0, 0.75, 0.75)]
    (found,) = tensor.grad([h.clone() for _ in parts], [h], parts)
    np.testing.assert_array_equal(numbers(found), np.full(4, 258.0))  # 257.5; rounded after each it would be 256


@pytest.mark.parametrize("first", ["norm", "sum"])
def test_the_order_of_the_operations_does_not_matter(rng, first):
    x = values(rng, ROWS, WIDTH).requires_grad_()
    h = x * 1
    branches = {"norm": lambda: tensor.layer_norm(h), "sum": lambda: h * 3}
    order = [first, *(name for name in branches if name != first)]
    made = {name: branches[name]() for name in order}
    g = values(rng, ROWS, WIDTH)
    (found,) = tensor.grad(list(made.values()), [h], [g, g])
    h = x * 1
    (norm,) = tensor.grad(tensor.layer_norm(h), [h], [g])
    np.testing.assert_allclose(numbers(found), numbers(norm) + 3 * numbers(g), rtol=1e-6, atol=1e-6)


def test_what_has_no_part_in_the_result_takes_nothing_away(rng):
    x = values(rng, ROWS, WIDTH).requires_grad_()
    h = x * 1
    unused = [h * 2 for _ in range(3)]
    g = values(rng, ROWS, WIDTH)
    (found,) = tensor.grad([tensor.layer_norm(h), h * 3], [h], [g, g])
    (norm,) = tensor.grad(tensor.layer_norm(h), [h], [g])
    assert len(unused) == 3
    np.testing.assert_allclose(numbers(found), numbers(norm) + 3 * numbers(g), rtol=1e-6, atol=1e-6)


def test_a_result_that_is_a_seed_too_counts_once(rng):
    x = values(rng, ROWS, WIDTH).requires_grad_()
    h = x * 1
    y, g = tensor.layer_norm(h), values(rng, ROWS, WIDTH)
    (found,) = tensor.grad([y, h, h * 2], [h], [g, g, g])
    h = x * 1
    (norm,) = tensor.grad(tensor.layer_norm(h), [h], [g])
    np.testing.assert_allclose(numbers(found), numbers(norm) + 3 * numbers(g), rtol=1e-6, atol=1e-6)


def test_hooks_see_the_sum(rng):
    x = values(rng, ROWS, WIDTH).requires_grad_()
    h = x * 1
    seen = []
    h.register_hook(lambda g: seen.append(numbers(g)))
    g = values(rng, ROWS, WIDTH)
    tensor.backward([tensor.layer_norm(h), h * 3], [g, g])
    np.testing.assert_array_equal(seen[0], numbers(x.grad))
    assert len(seen) == 1


def test_one_gradient_of_two_leaves_is_not_changed_by_a_sum_of_one(rng):
    x, y = (values(rng, 3).requires_grad_() for _ in range(2))
    g = values(rng, 3)
    # The addition hands one gradient to both; x's is then added to, twice.
    total = (x + y) + x * 2 + x * 4
    total.backward(g)
    np.testing.assert_allclose(numbers(y.grad), numbers(g), rtol=0, atol=0)
    np.testing.assert_allclose(numbers(x.grad), 7 * numbers(g), rtol=1e-6)


def test_a_residual_has_the_result_s_gradient(rng):
    x, w, r = (values(rng, *shape).requires_grad_() for shape in ((2, 3, 5), (4, 5), (2, 3, 4)))
    g = values(rng, 2, 3, 4)
    y = tensor.linear(x, w, None, r)
    np.testing.assert_allclose(numbers(y), numbers(x) @ numbers(w).T + numbers(r), rtol=1e-5, atol=1e-5)
    y.backward(g)
    np.testing.assert_array_equal(r.grad.numpy(), g.numpy())
    with pytest.raises(RefusedInput, match=r"linear: residual \(4,\), wanted the result's shape, \(2, 3, 4\)"):
        tensor.linear(x, w, None, values(rng, 4))
