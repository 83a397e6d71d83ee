"""Dropouts of adapters while training, against layers with those parts left out; differences of biases in training."""

from __future__ import annotations

import numpy as np
import pytest
from test_terms import trained

from lycoris import tensor
from lycoris.algorithms import FullModule, LoConModule, LoHaModule, LoKrModule
from lycoris.buffers import DeviceArray
from lycoris.errors import RefusedInput
from lycoris.formats.keys import UP
from lycoris.graph import capture
from lycoris.nn import AdaptedConv, AdaptedLinear
from plans.core import ElementKind
from plans.random import first_uniform, philox, uniform

F32 = ElementKind.F32
OUT, IN = 12, 8
SHAPES = {"linear": (OUT, IN), "conv": (OUT, IN, 3, 3)}
LINEAR = {
    "locon": lambda **o: LoConModule.new_linear(IN, OUT, 4, 2.0, **o),
    "locon, scalar": lambda **o: LoConModule.new_linear(IN, OUT, 4, 2.0, use_scalar=True, **o),
    "loha": lambda **o: LoHaModule.new_linear(IN, OUT, 4, **o),
    "lokr": lambda **o: LoKrModule.new_linear(IN, OUT, 99, factor=4, **o),
    "full": lambda **o: FullModule.new((OUT, IN), **o),
}
CONV = {
    "locon": lambda **o: LoConModule.new_conv2d(IN, OUT, 3, 4, 2.0, **o),
    "locon, Tucker": lambda **o: LoConModule.new_conv2d(IN, OUT, 3, 4, 2.0, use_tucker=True, **o),
    "locon, scalar": lambda **o: LoConModule.new_conv2d(IN, OUT, 3, 4, 2.0, use_scalar=True, **o),
    "loha": lambda **o: LoHaModule.new_conv2d(IN, OUT, 3, 2, **o),
}
CASES = [("linear", name) for name in LINEAR] + [("conv", name) for name in CONV]


def make(device, rng, layer, name, **options):
    """A layer in training, and its input; all fp32, so that what is left out shows."""
    adapter = trained(rng, (LINEAR if layer == "linear" else CONV)[name](device=device, dtype=F32))
    if adapter.scalar is not None:
        adapter.scalar = DeviceArray.from_numpy(np.array(0.5, np.float32), device=device)
    weight = tensor.from_numpy(rng.standard_normal(SHAPES[layer]).astype(np.float32), device)
    made = AdaptedLinear(weight) if layer == "linear" else AdaptedConv(weight, padding=1)
    made.add("a", adapter, **options)
    shape = (5, IN) if layer == "linear" else (2, 4, 3, IN)
    x = tensor.from_numpy(rng.standard_normal(shape).astype(np.float32), device).requires_grad_()
    for _, factor in made.parameters():
        factor.requires_grad_()
    return made.train(), x


def mask(count, p, seed):
    return uniform(philox(count, seed, 0)) >= np.float32(p)


@pytest.mark.parametrize(("layer", "name"), CASES)
def test_ranks_and_rows_drop_out(device, rng, layer, name):
    made, x = make(device, rng, layer, name, rank_dropout=0.4)
    made.train(False)
    whole = made(x).numpy().astype(np.float64)
    made.train()
    tensor.manual_seed(3)
    found = made(x).numpy().astype(np.float64)
    module = made.adapters["a"].module
    if module.algorithm == "locon":
        kept = mask(4, 0.4, 3)
        up = module.factors[UP].numpy()
        dropped = up * kept.reshape(1, -1, *(1 for _ in up.shape[2:])).astype(np.float32)
        module.tensors()[UP].detach().copy_(tensor.from_numpy(dropped, device))
        wanted = made.train(False)(x).numpy().astype(np.float64)
    else:
        made.enable("a", False)
        bare = made(x).numpy().astype(np.float64)
        kept = mask(OUT, 0.4, 3)
        wanted = bare + (whole - bare) * kept
    assert 0 < kept.sum() < len(kept)
    assert np.abs(found - whole).max() > 0.01
    np.testing.assert_allclose(found, wanted, atol=1e-4)


@pytest.mark.parametrize("layer", SHAPES)
def test_elements_of_the_term_drop_out(device, rng, layer):
    made, x = make(device, rng, layer, "locon", dropout=0.25)
    whole = made.train(False)(x).numpy().astype(np.float64)
    made.enable("a", False)
    bare = made(x).numpy().astype(np.float64)
    made.train().enable("a")
    tensor.manual_seed(9)
    kept = mask(whole.size, 0.25, 9).reshape(whole.shape)
    np.testing.assert_allclose(made(x).numpy(), bare + (whole - bare) * kept / 0.75, atol=1e-4)


@pytest.mark.parametrize("layer", SHAPES)
def test_modules_drop_out(device, rng, layer):
    made, x = make(device, rng, layer, "locon", module_dropout=0.5)
    difference = DeviceArray.from_numpy(rng.standard_normal(OUT).astype(np.float32), device=device)
    module = made.remove("a")
    module.bias = difference
    made.add("a", module, module_dropout=0.5)
    with_it = made.train(False)(x).numpy()
    made.enable("a", False)
    bare = made(x).numpy()
    made.train().enable("a")
    tensor.manual_seed(5)
    for number in range(6):
        dropped = first_uniform(5, number) < 0.5
        np.testing.assert_allclose(made(x).numpy(), bare if dropped else with_it, atol=1e-4)
    assert {first_uniform(5, number) < 0.5 for number in range(6)} == {True, False}
    with tensor.no_grad(), pytest.raises(RefusedInput, match="module_dropout: drawn on the host, so not in recorded"):
        capture(lambda: _forward(made, x), device)


def _forward(layer, x):
    with tensor.enable_grad():
        return layer(x)


def test_a_number_on_the_host_is_that_of_the_device(device):
    for seed, number in ((0, 0), (7, 3), (2**40 + 11, 2**33 + 5)):
        assert first_uniform(seed, number) == uniform(philox(1, seed, number))[0]
    tensor.manual_seed(2**35)
    assert tensor.rand((1,), device=device).item() == first_uniform(2**35, 0)


@pytest.mark.parametrize("name", ["locon", "loha", "lokr", "full", "locon, DoRA"])
@pytest.mark.parametrize("with_bias", [False, True])
def test_differences_of_the_bias_are_trained(device, rng, name, with_bias):
    weight = tensor.from_numpy(rng.standard_normal((OUT, IN)).astype(np.float32), device)
    if name == "locon, DoRA":
        options = {"device": device, "dtype": F32, "weight_decompose": True, "base": weight.array()}
        module, strength = trained(rng, LoConModule.new_linear(IN, OUT, 4, **options)), 1.0
    else:
        module, strength = trained(rng, LINEAR[name](device=device, dtype=F32)), 0.5
    module.bias = DeviceArray.from_numpy(rng.standard_normal(OUT).astype(np.float32), device=device)
    bias = tensor.from_numpy(rng.standard_normal(OUT).astype(np.float32), device) if with_bias else None
    layer = AdaptedLinear(weight, bias)
    layer.add("a", module, strength)
    x = tensor.from_numpy(rng.standard_normal((5, IN)).astype(np.float32), device)
    frozen = layer(x).numpy()
    difference = dict(layer.parameters())["a.diff_b"].requires_grad_()
    y = layer.train()(x)
    np.testing.assert_allclose(y.numpy(), frozen, atol=1e-4)
    g = rng.standard_normal(y.shape).astype(np.float32)
    y.backward(tensor.from_numpy(g, device))
    np.testing.assert_allclose(difference.grad.numpy(), strength * g.sum(0), rtol=1e-5, atol=1e-6)
