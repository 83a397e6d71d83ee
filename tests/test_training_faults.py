"""Faults of training that other libraries have, by name: each is shown to differ, and ours to be right."""

from __future__ import annotations

import numpy as np
import pytest

from lycoris import nn, tensor
from lycoris.algorithms import LoConModule, LoHaModule
from lycoris.algorithms.terms import diff_weight
from lycoris.buffers import DeviceArray
from lycoris.errors import RefusedInput
from plans.core import ElementKind
from plans.core.precision import round_to

BF16, F32 = ElementKind.BF16, ElementKind.F32


def filled(rng, module, size=0.5):
    """The module with random factors."""
    for name, array in module.factors.items():
        values = size * rng.standard_normal(array.shape)
        module.factors[name] = DeviceArray.from_numpy(values, array.kind, array.device)
    return module


def numbers(x):
    return x.numpy().astype(np.float64)


def tucker(t, a, b):
    """sum_ij t[i, j, h, w] a[i, o] b[j, q]."""
    return np.einsum("ijhw,io,jq->oqhw", t, a, b)


def test_loha_tucker_gradients(rng):
    """PEFT, ComfyUI and LyCORIS 3 give a gradient of w*_a that is off by a factor of about 2 (notes/peers.md)."""
    module = filled(rng, LoHaModule.new_conv2d(5, 6, 3, 2, use_tucker=True, dtype=F32, seed=1))
    factors = module.tensors()
    for factor in factors.values():
        factor.requires_grad_()
    weights = rng.standard_normal(module.shape)
    diff_weight("loha", factors, module.shape).backward(tensor.from_numpy(weights, kind=F32))
    t1, t2, a2, b1, b2 = (numbers(factors[n]) for n in ("hada_t1", "hada_t2", "hada_w2_a", "hada_w1_b", "hada_w2_b"))
    outer = weights * tucker(t2, a2, b2)
    right = np.einsum("oqhw,ijhw,jq->io", outer, t1, b1)
    np.testing.assert_allclose(numbers(factors["hada_w1_a"].grad), right, rtol=1e-4, atol=1e-4)
    # They contract with the other product's core and factor.
    faulty = np.einsum("oqhw,ijhw,jq->io", outer, t2, b2)
    assert np.linalg.norm(faulty - right) > 0.5 * np.linalg.norm(right)


@pytest.mark.parametrize("algorithm", [LoConModule, LoHaModule], ids=lambda a: a.algorithm)
def test_the_scale_counts_once(rng, algorithm):
    """lycoris-lora 4.1.3 merges LoHa and LoKr with alpha / rank squared."""
    module = filled(rng, algorithm.new_linear(16, 8, 4, 1.0, dtype=F32, seed=1))
    assert module.scale() == 0.25
    layer = nn.AdaptedLinear(tensor.zeros((8, 16)))
    layer.add("a", module)
    layer.train()
    for factor in module.tensors().values():
        factor.requires_grad_()
    x = tensor.from_numpy(rng.standard_normal((3, 16)), kind=F32)
    delta = numbers(diff_weight(algorithm.algorithm, module.tensors(), module.shape))
    trained = numbers(layer(x))
    np.testing.assert_allclose(trained, 0.25 * numbers(x) @ delta.T, rtol=1e-4, atol=1e-5)
    layer.train(False)
    np.testing.assert_allclose(numbers(layer(x)), trained, rtol=1e-4, atol=1e-5)


def test_a_small_delta_is_not_lost_beside_a_bf16_base(rng):
    """lycoris-lora's forward takes (W + dW) - W in bf16: of a delta below W's last bit little is left."""
    base = round_to(0.02 * rng.standard_normal((32, 64)), BF16)
    module = filled(rng, LoConModule.new_linear(64, 32, 8, dtype=BF16, seed=1), 2e-3)
    layer = nn.AdaptedLinear(tensor.from_numpy(base))
    x = tensor.from_numpy(rng.standard_normal((5, 64)), kind=BF16)
    layer.train()
    layer.add("a", module)
    for factor in module.tensors().values():
        factor.requires_grad_()
    up, down = numbers(module.tensors()["lora_up.weight"]), numbers(module.tensors()["lora_down.weight"])
    delta = up @ down
    faulty = round_to(
        round_to(base.astype(np.float64) + delta, BF16).astype(np.float64) - base.astype(np.float64), BF16
    )
    lost = np.linalg.norm(faulty.astype(np.float64) - delta) / np.linalg.norm(delta)
    assert lost > 0.3
    layer(x).backward(tensor.ones((5, 32), BF16))
    # Gradients of the factors know nothing of the base, so that nothing is lost: bf16's rounding of intermediates.
    expected = np.ones((32, 5)) @ (numbers(x) @ down.T)
    np.testing.assert_allclose(
        numbers(module.tensors()["lora_up.weight"].grad), expected, rtol=0.02, atol=0.02 * np.abs(expected).max()
    )


def test_gradients_of_dora_s_norms_and_of_a_trained_scalar(rng):
    """lycoris-lora's bypass ignores dora_scale, and its merge the scalar."""
    base = tensor.from_numpy(rng.standard_normal((6, 8)), kind=F32)
    options = {"dtype": F32, "seed": 1, "weight_decompose": True, "use_scalar": True, "base": base.array()}
    module = filled(rng, LoConModule.new_linear(8, 6, 2, 1.0, **options))
    layer = nn.AdaptedLinear(base)
    layer.add("a", module)
    layer.train()
    factors = module.tensors()
    for factor in factors.values():
        factor.requires_grad_()
    with tensor.no_grad():
        factors["scalar"].fill_(0.7)
    x, weights = rng.standard_normal((4, 8)), rng.standard_normal((4, 6))
    layer(tensor.from_numpy(x, kind=F32)).backward(tensor.from_numpy(weights, kind=F32))
    values = {name: numbers(factor) for name, factor in factors.items()}

    def loss(changed):
        v = values | changed
        moved = numbers(base) + 0.5 * v["scalar"] * v["lora_up.weight"] @ v["lora_down.weight"]
        norm = np.linalg.norm(moved, axis=1, keepdims=True) + 2.0**-23
        return (x @ (v["dora_scale"].reshape(-1, 1) * moved / norm).T * weights).sum()

    for name, factor in factors.items():
        direction = rng.standard_normal(values[name].shape)
        ends = [loss({name: values[name] + sign * 1e-5 * direction}) for sign in (1, -1)]
        slope = (numbers(factor.grad) * direction).sum()
        assert slope == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-3, abs=1e-4), name


def test_a_loss_that_is_not_finite_is_said_so():
    x = tensor.from_numpy(np.array([0.0]), kind=F32, requires_grad=True)
    loss = x.log().sum()
    with pytest.raises(RefusedInput, match="backward: the tensor is -inf; nothing was computed, look at the inputs"):
        loss.backward(check_finite=True)
    assert x.grad is None
    loss.backward()
    assert not np.isfinite(x.grad.numpy()).all()
