"""Adapters' deltas and terms as differentiable tensors: against the weight engine, float64, and finite differences."""

from __future__ import annotations

import numpy as np
import pytest
from module_cases import NEW
from reference import delta64

from lycoris import tensor
from lycoris.algorithms import LoConModule, LoHaModule, LoKrModule, NormModule
from lycoris.algorithms.terms import diff_weight, linear_term
from lycoris.buffers import DeviceArray
from lycoris.errors import RefusedInput
from plans.core import ElementKind

F32, BF16 = ElementKind.F32, ElementKind.BF16
LINEAR = {
    "locon": lambda **o: LoConModule.new_linear(24, 40, 8, 4.0, **o),
    "loha": lambda **o: LoHaModule.new_linear(24, 40, 4, 2.0, **o),
    "lokr full": lambda **o: LoKrModule.new_linear(24, 40, 99, 1.0, factor=4, **o),
    "lokr factored": lambda **o: LoKrModule.new_linear(32, 64, 2, 1.0, factor=4, **o),
    "lokr both": lambda **o: LoKrModule.new_linear(64, 64, 2, 1.0, factor=8, decompose_both=True, **o),
}


def trained(rng, module):
    """The module with random factors."""
    for name, array in module.factors.items():
        values = 0.5 * rng.standard_normal(array.shape)
        module.factors[name] = DeviceArray.from_numpy(values, array.kind, array.device)
    return module


def exact_delta(module):
    factors = {name: array.numpy().astype(np.float64) for name, array in module.factors.items()}
    return delta64(module.algorithm, factors).reshape(module.shape)


@pytest.mark.parametrize("name", NEW)
def test_deltas_are_the_weight_engines(device, rng, name):
    module = trained(rng, NEW[name][0](dtype=F32, device=device))
    found = diff_weight(module.algorithm, module.tensors(), module.shape).numpy()
    np.testing.assert_allclose(found, exact_delta(module), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("make", LINEAR.values(), ids=LINEAR.keys())
def test_terms_of_linear_layers(device, rng, make):
    module = trained(rng, make(dtype=F32, device=device))
    x = tensor.from_numpy(rng.standard_normal((3, 5, module.shape[1])).astype(np.float32), device)
    exact = module.scale() * x.numpy().astype(np.float64) @ exact_delta(module).T
    np.testing.assert_allclose(module.forward(x).numpy(), exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", LINEAR.values(), ids=LINEAR.keys())
def test_terms_in_bf16(device, rng, make):
    module = trained(rng, make(device=device))
    x = tensor.from_numpy(rng.standard_normal((7, module.shape[1])), device, BF16)
    delta = exact_delta(module)
    values = x.numpy().astype(np.float64)
    exact = module.scale() * values @ delta.T
    # Every factor, both intermediate results and the result are rounded to bf16: 2**-8 each of what is summed.
    size = module.scale() * np.abs(values) @ np.abs(delta).T + np.abs(exact)
    spread = np.abs(module.forward(x).numpy().astype(np.float64) - exact) / (size.mean() * 2**-8)
    assert spread.max() < 6, spread.max()


@pytest.mark.parametrize("make", LINEAR.values(), ids=LINEAR.keys())
def test_gradients_against_finite_differences(device, rng, make):
    module = trained(rng, make(dtype=F32, device=device))
    factors = module.tensors()
    x = tensor.from_numpy(rng.standard_normal((4, module.shape[1])).astype(np.float32), device).requires_grad_()
    weights = rng.standard_normal((4, module.shape[0]))
    for factor in factors.values():
        factor.requires_grad_()
    y = module.forward(x)
    y.backward(tensor.from_numpy(weights.astype(np.float32), device))
    values = {name: factor.numpy().astype(np.float64) for name, factor in factors.items()}

    def loss(changed, inputs):
        return (module.scale() * inputs @ delta64(module.algorithm, changed).reshape(module.shape).T * weights).sum()

    inputs, step = x.numpy().astype(np.float64), 1e-4
    found = {"x": x.grad.numpy()} | {name: factor.grad.numpy() for name, factor in factors.items()}
    for name, gradient in found.items():
        direction = rng.standard_normal(gradient.shape)
        ends = []
        for sign in (1, -1):
            moved = {n: v + sign * step * direction if n == name else v for n, v in values.items()}
            ends.append(loss(moved, inputs + sign * step * direction if name == "x" else inputs))
        slope = (ends[0] - ends[1]) / (2 * step)
        assert (gradient * direction).sum() == pytest.approx(slope, rel=2e-3, abs=2e-3), name


def test_a_trained_scalar_takes_part(device, rng):
    module = trained(rng, LoConModule.new_linear(16, 24, 8, dtype=F32, device=device, use_scalar=True))
    module.scalar = DeviceArray.from_numpy(np.float32(0.25), device=device)
    scalar = module.tensors()["scalar"].requires_grad_()
    x = tensor.from_numpy(rng.standard_normal((4, 16)).astype(np.float32), device)
    term = x.numpy() @ exact_delta(module).T
    y = module.forward(x)
    np.testing.assert_allclose(y.numpy(), 0.25 * term, rtol=1e-4, atol=1e-5)
    y.backward(tensor.ones(y.shape, device=device))
    assert scalar.grad.item() == pytest.approx(term.sum(), rel=1e-3)


def test_refusals(device, rng):
    module = LoConModule.new_linear(16, 24, 8, device=device)
    with pytest.raises(RefusedInput, match=r"x has shape \(4, 15\), wanted \[..., 16\]"):
        module.forward(tensor.zeros((4, 15), BF16, device))
    with pytest.raises(RefusedInput, match="norm: has no delta beside the base's"):
        linear_term("norm", NormModule.new(4, device=device).tensors(), tensor.zeros((2, 4), BF16, device), (4, 4))
    conv = LoConModule.new_conv2d(4, 4, 3, 2, device=device)
    with pytest.raises(RefusedInput, match="a term of a DoRA or of a convolution"):
        conv.forward(tensor.zeros((2, 36), BF16, device))
