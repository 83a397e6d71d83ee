"""Gradients: every operation against finite differences in float64, and what the graph promises."""

from __future__ import annotations

import functools
import itertools

import numpy as np
import pytest
from gradient_cases import CASES

from lycoris import tensor
from lycoris.errors import RefusedInput
from lycoris.tensor import autograd, methods, pointwise
from plans.core import ElementKind

BF16, F16, F32, I32 = ElementKind.BF16, ElementKind.F16, ElementKind.F32, ElementKind.I32

WITHOUT_GRADIENT = {
    "sign", "floor", "ceil", "round", "gt", "ge", "lt", "le", "eq", "ne", "backward", "register_hook", "full_like",
    "__dlpack__", "__dlpack_device__",
    # made of, or other names for, what has a case of its own
    "sum_all", "mean_all", "max_all", "min_all", "__getitem__", "__matmul__",
}  # fmt: skip
NOT_OPERATIONS = {
    "Generator", "Tensor", "arange", "backward", "default_generator", "empty", "enable_grad", "from_array",
    "from_cuda_array", "from_dlpack", "from_numpy", "full", "grad", "is_grad_enabled", "manual_seed", "no_grad", "ones",
    "rand", "randn", "zeros",
}  # fmt: skip


def leaf(array, kind=F32):
    return tensor.from_numpy(array, kind=kind, requires_grad=True)


def numbers(x):
    return x.numpy().astype(np.float64)


def test_every_operation_has_a_case():
    covered = {case.name.split(",")[0] for case in CASES}
    every = {*methods.METHODS, *pointwise.UNARY, *pointwise.BINARY, *tensor.__all__}
    assert every - covered - WITHOUT_GRADIENT - NOT_OPERATIONS == set()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_gradients_are_those_of_finite_differences(rng, case):
    arrays = [case.draw(rng, shape).astype(np.float32).astype(np.float64) for shape in case.shapes]
    leaves = [leaf(array) for array in arrays]
    out = case.ours(*leaves)
    exact = case.exact(*arrays)
    # Sums of at most a few tens of terms of about 1, each operation within a few units of 2**-24.
    np.testing.assert_allclose(numbers(out), exact, rtol=2e-5, atol=2e-5)
    weights = rng.standard_normal(exact.shape)
    out.backward(tensor.from_numpy(weights, kind=F32))
    for number, (array, x) in enumerate(zip(arrays, leaves, strict=True)):
        gradient = np.zeros(array.shape) if x.grad is None else numbers(x.grad)
        for _ in range(2):
            direction = rng.standard_normal(array.shape)
            ends = []
            for sign in (1e-5, -1e-5):
                moved = [a + sign * direction if i == number else a for i, a in enumerate(arrays)]
                ends.append((case.exact(*moved) * weights).sum())
            slope = (ends[0] - ends[1]) / 2e-5
            assert (gradient * direction).sum() == pytest.approx(slope, rel=1e-3, abs=2e-4), number


@pytest.mark.parametrize("kind", [BF16, F16], ids=lambda k: k.value)
@pytest.mark.parametrize(
    "name", ["gelu", "mul", "sum, axes", "softmax", "layer_norm", "linear", "matmul, batch", "getitem"]
)
def test_narrow_kinds_give_gradients_in_fp32(rng, name, kind):
    (case,) = (case for case in CASES if case.name == name)
    arrays = [case.draw(rng, shape) for shape in case.shapes]
    wide = [leaf(tensor.from_numpy(a, kind=kind).numpy().astype(np.float64)) for a in arrays]
    narrow = [leaf(a, kind) for a in arrays]
    weights = tensor.from_numpy(rng.standard_normal(case.exact(*arrays).shape), kind=kind)
    case.ours(*wide).backward(weights.to(F32))
    out = case.ours(*narrow)
    assert out.kind is kind
    out.backward(weights)
    for a, b in zip(wide, narrow, strict=True):
        assert b.grad.kind is F32
        # The result's and the intermediate gradients' own rounding, to 8 bits in bf16.
        np.testing.assert_allclose(numbers(b.grad), numbers(a.grad), rtol=0.05, atol=0.1)


def test_contributions_are_added_in_fp32():
    x = leaf(np.ones(4), BF16)
    total = x * 1
    for _ in range(300):
        total = total + x
    total.backward(tensor.ones((4,), BF16))
    np.testing.assert_array_equal(x.grad.numpy(), np.full(4, 301, np.float32))


def test_two_runs_have_the_same_bits(rng):
    array, w = rng.standard_normal((9, 16)), rng.standard_normal((16, 16))

    def run():
        a, b = leaf(array), leaf(w)
        h = (a @ b).gelu()
        (tensor.layer_norm(h + a) @ b).softmax().square().mean().backward()
        return a.grad.numpy().tobytes() + b.grad.numpy().tobytes()

    assert run() == run()


def test_gradients_accumulate_and_may_be_replaced():
    x = leaf(np.array([1.0, 2.0]))
    (x * 3).sum().backward()
    (x * x).sum().backward()
    np.testing.assert_array_equal(x.grad.numpy(), [5, 7])
    x.grad.mul_(2)
    np.testing.assert_array_equal(x.grad.numpy(), [10, 14])
    x.grad = None
    x.sum().backward()
    np.testing.assert_array_equal(x.grad.numpy(), [1, 1])


def test_a_gradient_is_the_leaf_s_own():
    x, y = leaf(np.ones(3)), leaf(np.ones(3))
    seed = tensor.ones((3,))
    (x + y).backward(seed)
    x.grad.mul_(5)
    np.testing.assert_array_equal(y.grad.numpy(), np.ones(3))
    np.testing.assert_array_equal(seed.numpy(), np.ones(3))


def test_unneeded_pullbacks_never_run():
    x, w = tensor.ones((2, 3)), leaf(np.ones((4, 3)))
    out = tensor.linear(x, w)
    assert out.node.inputs[0] is None
    out.sum().backward()
    assert x.grad is None
    assert w.grad.shape == (4, 3)


def test_grad_changes_no_leaf():
    x, y = leaf(np.array([2.0])), leaf(np.array([3.0]))
    middle = x * y
    out = middle.square()
    found = tensor.grad(out, [middle, x, y], retain_graph=True)
    assert [g.item() for g in found] == [12, 36, 24]
    assert x.grad is None
    z = leaf(np.array([1.0]))
    assert tensor.grad([out], [z]) == [None]


def test_no_grad_and_detach():
    x = leaf(np.ones(2))
    with tensor.no_grad():
        y = x * 2
        with tensor.enable_grad():
            assert (x * 2).requires_grad
    assert not y.requires_grad
    assert not x.detach().requires_grad
    assert tensor.is_grad_enabled()
    (x.detach() * x).sum().backward()
    np.testing.assert_array_equal(x.grad.numpy(), [1, 1])


def test_hooks_see_and_replace_gradients():
    x = leaf(np.array([1.0, 2.0]))
    h = x * 3
    seen = []
    remove = h.register_hook(lambda g: seen.append(g.numpy().tolist()))
    x.register_hook(lambda g: g * 10)
    h.sum().backward(retain_graph=True)
    assert seen == [[1, 1]]
    np.testing.assert_array_equal(x.grad.numpy(), [30, 30])
    remove()
    x.grad = None
    h.sum().backward()
    assert len(seen) == 1
    y = leaf(np.ones(2))
    y.register_hook(lambda g: g.sum())
    with pytest.raises(RefusedInput, match=r"a hook of leaf gave a gradient of shape \(\), wanted \(2,\)"):
        y.sum().backward()


def test_a_graph_is_freed_unless_retained():
    x = leaf(np.array([2.0]))
    y = x.square()
    y.backward(retain_graph=True)
    y.backward()
    assert x.grad.item() == 8
    with pytest.raises(RefusedInput, match="the graph behind square was freed; pass retain_graph=True"):
        y.backward()


@pytest.mark.parametrize(
    "view", [lambda x: x, lambda x: x[1:], lambda x: x.reshape(1, 3)], ids=["whole", "part", "view"]
)
def test_a_change_in_place_of_what_is_needed_is_caught(view):
    x = leaf(np.ones(3))
    h = x * 2
    y = h.exp()
    with tensor.no_grad():
        view(h).add_(1)
    with pytest.raises(RefusedInput, match="a tensor that the gradient of exp needs was changed in place"):
        y.sum().backward()


def test_a_change_in_place_of_what_is_not_needed_is_allowed():
    x = leaf(np.ones(3))
    h = x * 2
    y = h + 1
    with tensor.no_grad():
        h.zero_()
    y.sum().backward()
    np.testing.assert_array_equal(x.grad.numpy(), [2, 2, 2])


def test_leaves_change_in_place_within_no_grad_only():
    x = leaf(np.ones(3))
    with pytest.raises(
        RefusedInput, match="sub_: a tensor that requires a gradient is changed in place within no_grad"
    ):
        x.sub_(1)
    with tensor.no_grad():
        x.sub_(0.5)
    np.testing.assert_array_equal(x.numpy(), [0.5] * 3)


def test_checkpoint_reaches_leaves_beside_its_arguments():
    x, w = leaf(np.ones((2, 3))), leaf(np.full((3, 3), 0.5))
    y = tensor.checkpoint(lambda a: (a @ w).tanh(), x)
    y.sum().backward()
    plain_x, plain_w = leaf(np.ones((2, 3))), leaf(np.full((3, 3), 0.5))
    (plain_x @ plain_w).tanh().sum().backward()
    np.testing.assert_array_equal(x.grad.numpy(), plain_x.grad.numpy())
    np.testing.assert_array_equal(w.grad.numpy(), plain_w.grad.numpy())
    frozen = tensor.ones((2, 3))
    z = tensor.checkpoint(lambda a: (a @ w).tanh(), frozen)
    z.sum().backward()
    assert frozen.grad is None
    assert not tensor.checkpoint(lambda a: a * 2, frozen).requires_grad


def test_a_leaf_that_is_used_again_and_again_has_one_gradient():
    x, calls = leaf(np.array([1.0, 2.0])), []
    doubled = x * 2
    x.register_hook(lambda g: calls.append(g.numpy()))
    y = (doubled + x * 3 + (x * x) * 0.5).sum()
    np.testing.assert_array_equal(tensor.grad(y, [x], retain_graph=True)[0].numpy(), [6, 7])
    y.backward()
    np.testing.assert_array_equal(x.grad.numpy(), [6, 7])
    np.testing.assert_array_equal(calls, [[6, 7]] * 2)


def test_grad_computes_what_leads_to_its_inputs_only(monkeypatch):
    x, w = leaf(np.ones((2, 3))), leaf(np.full((3, 3), 0.5))
    pulled = []
    record = autograd.record

    def watched(name, out, inputs, saved, pull, kind=None):
        def seen(g, edges):
            pulled.append((name, [edge is not None for edge in edges]))
            return pull(g, edges)

        return record(name, out, inputs, saved, seen, kind)

    monkeypatch.setattr(autograd, "record", watched)
    hidden = x.tanh()
    y = (hidden @ w).square().sum()
    (found,) = tensor.grad(y, [hidden], retain_graph=True)
    assert [name for name, _ in pulled] == ["sum", "square", "matmul"]
    assert pulled[-1][1] == [True, False]
    pulled.clear()
    tensor.grad(y, [w], retain_graph=True)
    assert pulled[-1] == ("matmul", [False, True])
    assert tensor.grad(y, [leaf(np.ones(2))]) == [None]
    np.testing.assert_allclose(found.numpy(), 2 * (np.tanh(np.ones((2, 3))) @ w.numpy()) @ w.numpy().T, rtol=1e-5)
    assert x.grad is None
    y.backward()  # nothing of it was freed by what was not needed
    assert x.grad is not None


def test_checkpoint_draws_the_same_numbers_again():
    def inner(a):
        return (a @ w).dropout(0.4, generator=generator)

    def outer(a, call):
        return call(inner, tensor.dropout(a, 0.3)) * tensor.rand((4, 3))

    found = []
    for call in (lambda fn, *args: fn(*args), tensor.checkpoint):
        generator, x, w = tensor.Generator(2), leaf(np.ones((4, 3))), leaf(np.full((3, 3), 0.5))
        tensor.manual_seed(7)
        y = call(functools.partial(outer, call=call), x)
        tensor.rand((2,)), tensor.rand((2,), generator=generator)  # what comes between counts for neither
        y.sum().backward()
        found.append([t.numpy().tobytes() for t in (y, x.grad, w.grad, tensor.rand((2,)))] + [generator.number])
    assert found[0] == found[1]
    count = itertools.count()
    y = tensor.checkpoint(lambda a: a.dropout(0.5) if next(count) == 0 else a.dropout(0.5).dropout(0.5), x)
    with pytest.raises(RefusedInput, match="more random numbers on the way back than before"):
        y.sum().backward()


def test_max_shares_its_gradient_among_equals():
    x = leaf(np.array([[3.0, 1.0, 3.0], [2.0, 2.0, 2.0]]))
    x.max(1).sum().backward()
    np.testing.assert_allclose(x.grad.numpy(), [[0.5, 0, 0.5], [1 / 3] * 3], rtol=1e-6)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda x: x.backward(), r"a tensor of shape \(2,\) without its gradient, wanted one element"),
        (lambda x: x.backward(tensor.ones((3,))), r"gradient of shape \(3,\), wanted the tensor's, \(2,\)"),
        (lambda x: tensor.ones(()).backward(), "the tensor requires no gradient"),
        (lambda x: tensor.grad(x.sum(), [tensor.ones(())]), "grad: input 0 requires no gradient"),
        (lambda x: (x * 2).requires_grad_(), "the result of an operation; detach"),
        (lambda x: tensor.arange(3, kind=I32).requires_grad_(), "a tensor of i32 has no gradient"),
        (lambda x: tensor.ones(()).register_hook(print), "requires no gradient; call requires_grad_"),
        (lambda x: x.__dlpack__(), "requires a gradient, which others do not see"),
    ],
)
def test_what_is_refused(act, message):
    with pytest.raises(RefusedInput, match=message):
        act(leaf(np.ones(2)))


@pytest.mark.parametrize(
    "use",
    [
        lambda x: [x[:2], x[2:] * 2],
        lambda x: [x[:3], x[1:] * 2],
        lambda x: [x[:2], x * 3],
        lambda x: [x * 3, x[:2], x[::2]],
        lambda x: [x[:, 1:2], x[0], x[3:]],
        lambda x: [x[::2], x[1::2] * 2],
        lambda x: [part * i for i, part in enumerate(x.t().split(2, 1))],
    ],
    ids=["apart", "overlapping", "part and whole", "whole and parts", "two axes", "interleaved", "transposed"],
)
@pytest.mark.parametrize(
    "through", [lambda x: x, lambda x: x * 1, lambda x: x.t().contiguous().t()], ids=["leaf", "node", "turned"]
)
def test_gradients_of_slices_are_put_together(rng, use, through):
    array = rng.standard_normal((4, 3))
    x = leaf(array)
    total = tensor.zeros(())
    for part in use(through(x)):
        total = total + (part * part).sum()
    total.backward()

    def loss(values):
        y = tensor.from_numpy(values, kind=F32)
        return sum(float((numbers(part) ** 2).sum()) for part in use(y))

    for at in np.ndindex(array.shape):
        step = np.zeros(array.shape)
        step[at] = 0.25  # of a quadratic, so that differences are exact but for rounding
        slope = (loss(array + step) - loss(array - step)) / 0.5
        assert x.grad.numpy()[at] == pytest.approx(slope, rel=1e-4, abs=1e-4)


def test_slices_that_do_not_overlap_keep_their_kind():
    x = tensor.ones((4, 6), BF16, requires_grad=True)
    h = x * 1
    seen = []
    h.register_hook(lambda g: seen.append((g.kind, g.shape)))
    a, b = h.split(3, 1)
    (a * 2 + b).sum().backward()
    assert seen == [(BF16, (4, 6))]
    np.testing.assert_array_equal(x.grad.numpy(), [[2, 2, 2, 1, 1, 1]] * 4)
