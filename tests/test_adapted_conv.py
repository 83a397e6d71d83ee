"""Convolutions with live adapters, in both modes, against float64; gradients; channels first; what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from test_terms import exact_delta, trained

from lycoris import tensor
from lycoris.algorithms import FullModule, IA3Module, LoConModule, LoHaModule, LoKrModule
from lycoris.buffers import DeviceArray
from lycoris.errors import RefusedInput
from lycoris.nn import AdaptedConv
from lycoris.tensor.convolution import conv
from plans.convolution import Conv2dDescriptor, Convolution
from plans.core import ElementKind

F32, BF16 = ElementKind.F32, ElementKind.BF16
OUT, IN, TAPS = 16, 8, (3, 3)
ADAPTERS = {
    "locon": lambda **o: LoConModule.new_conv2d(IN, OUT, 3, 4, 2.0, **o),
    "locon tucker": lambda **o: LoConModule.new_conv2d(IN, OUT, 3, 4, 2.0, use_tucker=True, **o),
    "loha": lambda **o: LoHaModule.new_conv2d(IN, OUT, 3, 2, **o),
    "lokr": lambda **o: LoKrModule.new_conv2d(IN, OUT, 3, 99, 1.0, factor=4, **o),
    "full": lambda **o: FullModule.new((OUT, IN, 3, 3), bias=True, **o),
}
WINDOWS = {"plain": {}, "same": {"padding": 1}, "strided": {"stride": 2, "padding": (1, 0), "dilation": (1, 2)}}


def make_layer(device, rng, **options):
    weight = tensor.from_numpy(rng.standard_normal((OUT, IN, *TAPS)), device, BF16)
    return AdaptedConv(weight, tensor.from_numpy(rng.standard_normal(OUT), device, BF16), **options)


def make_adapter(device, rng, name):
    module = trained(rng, ADAPTERS[name](device=device))
    if module.bias is not None:
        module.bias = DeviceArray.from_numpy(rng.standard_normal(OUT), BF16, device)
    return module


def exact(layer, x, adapters):
    """float64 on the stored values, and the size of the sums' terms."""
    weight, bias = layer.weight.numpy().astype(np.float64), layer.bias.numpy().astype(np.float64)
    for module, strength in adapters:
        weight = weight + strength * module.scale() * exact_delta(module)
        bias = bias + (0 if module.bias is None else strength * module.bias.numpy().astype(np.float64))
    window = (layer.window.stride, layer.window.padding, layer.window.dilation)
    numbers = [(n, n) if isinstance(n, int) else tuple(n) for n in window]
    geometry = Convolution(x.shape[0], x.shape[1:3], IN, OUT, TAPS, *numbers, weight_layout="OIHW")
    y, size = Conv2dDescriptor(geometry).reference(x.numpy(), weight)
    return y + bias, size + np.abs(bias)


def assert_close(found, wanted, roundings):
    """Within so many roundings to bf16, each 2**-8 of the sum's terms."""
    worst = (np.abs(found.numpy().astype(np.float64) - wanted[0]) / wanted[1]).max() * 2**8
    assert worst <= roundings, worst


@pytest.mark.parametrize("mode", ["merged", "separate"])
@pytest.mark.parametrize("name", ADAPTERS)
def test_one_adapter(device, rng, name, mode):
    for window in WINDOWS.values():
        layer, module = make_layer(device, rng, mode=mode, **window), make_adapter(device, rng, name)
        layer.add("a", module, 0.75)
        x = tensor.from_numpy(rng.standard_normal((2, 6, 7, IN)), device, BF16)
        # The result's rounding and W's, or those of two intermediate results and a prepared factor.
        assert_close(layer(x), exact(layer, x, [(module, 0.75)]), 3.5)


def test_several_adapters_and_channels_first(device, rng):
    for mode in ("merged", "separate"):
        layer = make_layer(device, rng, mode=mode, padding=1, channels_first=True)
        modules = [make_adapter(device, rng, name) for name in ("locon", "lokr", "locon tucker")]
        for number, module in enumerate(modules):
            layer.add(str(number), module, 0.5 + number)
        values = rng.standard_normal((1, IN, 5, 4))
        x = tensor.from_numpy(values, device, BF16)
        y = layer(x)
        assert y.shape == (1, OUT, 5, 4)
        last = tensor.from_numpy(np.moveaxis(x.numpy(), 1, -1).copy(), device)
        found = tensor.from_numpy(np.moveaxis(y.numpy(), 1, -1).copy(), device)
        assert_close(found, exact(layer, last, [(m, 0.5 + i) for i, m in enumerate(modules)]), 4.5)


def test_merge_and_unmerge_restore_every_bit(device, rng):
    layer = make_layer(device, rng, padding=1)
    layer.add("a", make_adapter(device, rng, "full"))
    before = layer.weight.numpy().view(np.uint16).copy()
    x = tensor.from_numpy(rng.standard_normal((1, 4, 4, IN)), device, BF16)
    live = layer(x).numpy()
    layer.merge()
    np.testing.assert_array_equal(layer(x).numpy(), live)
    layer.unmerge()
    np.testing.assert_array_equal(layer.weight.numpy().view(np.uint16), before)


@pytest.mark.parametrize("name", ADAPTERS)
def test_training_moves_the_output_as_its_gradients_say(device, rng, name):
    layer, module = make_layer(device, rng, padding=1), make_adapter(device, rng, name)
    layer.train()
    layer.add("a", module)
    factors = {key: value for key, value in layer.parameters() if not key.endswith("diff_b")}
    for factor in factors.values():
        factor.requires_grad_()
    x = tensor.from_numpy(rng.standard_normal((2, 5, 4, IN)), device, BF16).requires_grad_()
    y = layer(x)
    assert_close(y, exact(layer, x, [(module, 1.0)]), 4)
    g = rng.standard_normal(y.shape)
    y.backward(tensor.from_numpy(g, device, BF16))
    values = {key: value.numpy().astype(np.float64) for key, value in module.factors.items()}
    for key, factor in factors.items():
        step = 1e-3 * rng.standard_normal(values[key[2:]].shape)
        ends = []
        for sign in (1, -1):
            module.factors[key[2:]] = DeviceArray.from_numpy(values[key[2:]] + sign * step, F32, device)
            ends.append(exact(layer, x, [(module, 1.0)])[0])
        module.factors[key[2:]] = DeviceArray.from_numpy(values[key[2:]], BF16, device)
        slope, found = (g * (ends[0] - ends[1])).sum() / 2, (factor.grad.numpy().astype(np.float64) * step).sum()
        size = np.sqrt((g**2).sum() * ((ends[0] - ends[1]) ** 2).sum()) / 2
        assert abs(found - slope) < 2**-5 * size, key
    assert np.isfinite(x.grad.numpy()).all()


@pytest.mark.parametrize("options", [{}, {"stride": 2, "padding": 1}, {"groups": 2, "dilation": 2}], ids=str)
def test_gradients_of_a_convolution_against_finite_differences(device, rng, options):
    groups = options.get("groups", 1)
    x = tensor.from_numpy(rng.standard_normal((2, 6, 5, 4)).astype(np.float32), device).requires_grad_()
    weight = tensor.from_numpy(rng.standard_normal((6, 4 // groups, 3, 2)).astype(np.float32), device).requires_grad_()
    bias = tensor.from_numpy(rng.standard_normal(6).astype(np.float32), device).requires_grad_()
    y = conv(x, weight, bias, **options)
    g = rng.standard_normal(y.shape)
    y.backward(tensor.from_numpy(g.astype(np.float32), device))
    values = [t.numpy().astype(np.float64) for t in (x, weight, bias)]
    numbers = [(n, n) for n in (options.get("stride", 1), options.get("padding", 0), options.get("dilation", 1))]
    geometry = Convolution(2, (6, 5), 4, 6, (3, 2), *numbers, groups, "OIHW")

    def loss(moved):
        return ((Conv2dDescriptor(geometry).reference(moved[0], moved[1])[0] + moved[2]) * g).sum()

    for number, given in enumerate((x, weight, bias)):
        step = 1e-5 * rng.standard_normal(given.shape)
        ends = [loss([v + sign * step if i == number else v for i, v in enumerate(values)]) for sign in (1, -1)]
        slope = (ends[0] - ends[1]) / 2
        assert (given.grad.numpy() * step).sum() == pytest.approx(slope, rel=1e-3, abs=1e-7)


def test_dora_and_ia3(device, rng):
    layer = make_layer(device, rng, padding=1)
    base = layer.weight.array()
    module = LoConModule.new_conv2d(IN, OUT, 3, 4, device=device, weight_decompose=True, base=base)
    layer.add("dora", trained(rng, module))
    x = tensor.from_numpy(rng.standard_normal((1, 4, 4, IN)), device, BF16)
    merged = layer(x)
    for _, factor in layer.parameters():
        factor.requires_grad_()
    y = layer(x)
    np.testing.assert_allclose(y.numpy().astype(np.float32), merged.numpy().astype(np.float32), atol=0.25)
    y.backward(tensor.ones(y.shape, BF16, device))
    assert all(np.isfinite(factor.grad.numpy()).all() for _, factor in layer.parameters())
    for mode in ("merged", "separate"):
        layer = make_layer(device, rng, padding=1, mode=mode)
        ia3 = IA3Module.new((OUT, IN, *TAPS), device=device)
        ia3.factors["weight"] = DeviceArray.from_numpy(np.ones(ia3.factors["weight"].shape), BF16, device)
        layer.add("ia3", ia3)
        doubled, size = exact(layer, x, [])
        bias = layer.bias.numpy().astype(np.float64)
        assert_close(layer(x), (2 * doubled - bias, 2 * size), 3)


def test_refusals(device):
    with pytest.raises(RefusedInput, match="use AdaptedLinear for a matrix"):
        AdaptedConv(tensor.zeros((4, 4), BF16, device))
    layer = AdaptedConv(tensor.zeros((OUT, IN, 3, 3), BF16, device))
    with pytest.raises(RefusedInput, match=r"x has 6 channels, .* takes 8; give channels last, or channels_first=True"):
        layer(tensor.zeros((1, 8, 6, 6), BF16, device))
    with pytest.raises(RefusedInput, match="x of f32"):
        layer(tensor.zeros((1, 6, 6, IN), F32, device))
    with pytest.raises(RefusedInput, match=r"wanted \[N, \*axes, C\]"):
        layer(tensor.zeros((6, 6, IN), BF16, device))
    with pytest.raises(RefusedInput, match="wanted one number or 2 for each"):
        AdaptedConv(layer.weight, stride=(1, 1, 1))(tensor.zeros((1, 6, 6, IN), BF16, device))
