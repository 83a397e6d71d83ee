"""Linear layers with live adapters, in both modes, against float64; their gradients; what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from test_terms import exact_delta, trained

from kernels.target import SIMULATOR
from lycoris import tensor
from lycoris.algorithms import FullModule, IA3Module, LoConModule, LoHaModule, LoKrModule, NormModule
from lycoris.buffers import DeviceArray
from lycoris.errors import RefusedInput
from lycoris.nn import AdaptedLinear
from lycoris.tensor import no_grad
from plans.core import ElementKind

F32, BF16 = ElementKind.F32, ElementKind.BF16
OUT, IN = 64, 48
ADAPTERS = {
    "locon": lambda **o: LoConModule.new_linear(IN, OUT, 8, 4.0, **o),
    "locon of rank 3": lambda **o: LoConModule.new_linear(IN, OUT, 3, **o),
    "loha": lambda **o: LoHaModule.new_linear(IN, OUT, 4, 2.0, **o),
    "lokr": lambda **o: LoKrModule.new_linear(IN, OUT, 99, 1.0, factor=4, **o),
    "lokr of narrow blocks": lambda **o: LoKrModule.new_linear(IN, OUT, 99, 1.0, factor=8, **o),
    "lokr factored": lambda **o: LoKrModule.new_linear(IN, OUT, 2, 1.0, factor=4, decompose_both=True, **o),
    "full": lambda **o: FullModule.new((OUT, IN), bias=True, **o),
}


def make_layer(device, rng, bias=True, **options):
    weight = tensor.from_numpy(rng.standard_normal((OUT, IN)), device, BF16)
    vector = tensor.from_numpy(rng.standard_normal(OUT), device, BF16) if bias else None
    return AdaptedLinear(weight, vector, **options)


def make_adapter(device, rng, name):
    module = trained(rng, ADAPTERS[name](device=device))
    if module.bias is not None:
        module.bias = DeviceArray.from_numpy(rng.standard_normal(OUT), BF16, device)
    return module


def exact(layer, x, adapters):
    """float64 on the stored values."""
    weight = layer.weight.numpy().astype(np.float64)
    bias = 0 if layer.bias is None else layer.bias.numpy().astype(np.float64)
    for module, strength in adapters:
        weight = weight + strength * module.scale() * exact_delta(module).reshape(OUT, IN)
        bias = bias + (0 if module.bias is None else strength * module.bias.numpy().astype(np.float64))
    values = x.numpy().astype(np.float64)
    return values @ weight.T + bias, np.abs(values) @ np.abs(weight).T + np.abs(bias)


def assert_close(found, wanted, roundings):
    """Within so many roundings to bf16, each 2**-8 of the sum's terms."""
    value, size = wanted
    worst = (np.abs(found.numpy().astype(np.float64) - value) / size).max() * 2**8
    assert worst <= roundings, worst


@pytest.mark.parametrize("rows", [1, 7, 40], ids="{} rows".format)
@pytest.mark.parametrize("mode", ["merged", "separate"])
@pytest.mark.parametrize("name", ADAPTERS)
def test_one_adapter(device, rng, name, mode, rows):
    layer, module = make_layer(device, rng, mode=mode), make_adapter(device, rng, name)
    layer.add("a", module, 0.75)
    x = tensor.from_numpy(rng.standard_normal((rows, IN)), device, BF16)
    # The result's rounding, and W's, or those of an intermediate result and of a prepared factor.
    assert_close(layer(x), exact(layer, x, [(module, 0.75)]), 3)


@pytest.mark.parametrize("mode", ["merged", "separate"])
@pytest.mark.parametrize("names", [("locon", "locon"), ("lokr", "lokr"), ("locon", "loha", "lokr", "full")], ids=str)
def test_several_adapters(device, rng, names, mode):
    layer = make_layer(device, rng, mode=mode)
    modules = [make_adapter(device, rng, name) for name in names]
    for number, module in enumerate(modules):
        layer.add(str(number), module, 0.5 + number)
    x = tensor.from_numpy(rng.standard_normal((2, 5, IN)), device, BF16)
    assert_close(layer(x), exact(layer, x, [(m, 0.5 + i) for i, m in enumerate(modules)]), 3)
    layer.enable("0", False)
    layer.set_strength("1", -1)
    left = [(module, -1.0 if i == 0 else 1.5 + i) for i, module in enumerate(modules[1:])]
    assert_close(layer(x), exact(layer, x, left), 3)
    for number in range(len(modules)):
        assert layer.remove(str(number)) is modules[number]
    assert_close(layer(x), exact(layer, x, []), 1.01)


LAYOUTS = {
    "a batch": lambda x: x.reshape(2, 2, 2 * IN)[:, :, :IN].contiguous(),
    "columns": lambda x: x[:, :IN],
    "other columns, not aligned": lambda x: x[:, 4 : IN + 4],
    "a batch of columns": lambda x: x.reshape(2, 2, 2 * IN)[:, :, IN:],
    "transposed": lambda x: x.reshape(2 * IN, 4).t()[:, :IN],
    "one row": lambda x: x.reshape(-1)[8 : IN + 8],
    "no rows": lambda x: x[:0, :IN],
}


@pytest.mark.parametrize("mode", ["merged", "separate"])
@pytest.mark.parametrize("name", ["locon", "lokr"])
def test_inputs_of_any_layout(device, rng, name, mode):
    """One layer, which keeps for each layout what it has prepared; the second time is by what is kept."""
    layer, module = make_layer(device, rng, mode=mode), make_adapter(device, rng, name)
    layer.add("a", module, 0.75)
    whole = tensor.from_numpy(rng.standard_normal((4, 2 * IN)), device, BF16)
    for number, strength in enumerate((0.75, 0.75, -2.0)):
        if number == 2:
            layer.set_strength("a", strength)
        for view in LAYOUTS.values():
            x = view(whole)
            found = layer(x)
            assert found.shape == (*x.shape[:-1], OUT)
            if x.size:
                assert_close(found, exact(layer, x, [(module, strength)]), 3)
    with pytest.raises(RefusedInput, match=r"x \(4, 96\) and weight"):
        layer(whole)


MANY_ROWS = (
    [(70, 64, 48, 4)]
    if SIMULATOR
    else [
        (1000, 3072, 768, -1),
        (2100, 2048, 1024, 8),
        (4096, 1536, 3072, -1),
        (130, 4096, 4096, -1),
        (300, 3840, 960, 5),
    ]
)


@pytest.mark.parametrize(("rows", "out", "channels", "factor"), MANY_ROWS, ids=str)
def test_lokr_of_many_rows(device, rng, rows, out, channels, factor):
    """Several calls at once, whose passes over x and products overlap where the device can."""
    weight, bias = (tensor.from_numpy(rng.standard_normal(shape), device, BF16) for shape in ((out, channels), out))
    layer = AdaptedLinear(weight, bias, mode="separate")
    module = trained(rng, LoKrModule.new_linear(channels, out, 1 << 20, factor=factor, device=device))
    layer.add("a", module, 0.75)
    merged = weight.numpy().astype(np.float64) + 0.75 * module.scale() * exact_delta(module).reshape(out, channels)
    inputs = [tensor.from_numpy(rng.standard_normal((rows, channels)), device, BF16) for _ in range(3)]
    for x, found in zip(inputs, [layer(x) for x in inputs], strict=True):
        values, added = x.numpy().astype(np.float64), bias.numpy().astype(np.float64)
        size = np.abs(values) @ np.abs(merged).T + np.abs(added)
        assert_close(found, (values @ merged.T + added, size), 3)


def test_a_change_below_the_last_bit_is_kept_apart(device, rng):
    """Merged, a small delta is lost in W's rounding; separate, it is not."""
    layer = AdaptedLinear(tensor.full((OUT, IN), 256.0, BF16, device))
    module = LoConModule.new_linear(IN, OUT, 8, device=device)
    module.factors["lora_up.weight"] = DeviceArray.from_numpy(np.full((OUT, 8), 0.125), BF16, device)
    module.factors["lora_down.weight"] = DeviceArray.from_numpy(np.full((8, IN), 0.125), BF16, device)
    layer.add("small", module)
    x = np.zeros((4, IN))
    x[:, 0], x[:, 1] = 1, -1
    x[:, 2] = 1 / 256
    x = tensor.from_numpy(x, device, BF16)
    layer.mode = "merged"
    merged = layer(x).numpy().astype(np.float64)
    layer.mode = "separate"
    np.testing.assert_array_equal(merged, 1.0)
    assert_close(layer(x), (np.full((4, OUT), 1 + 0.125 / 256), np.ones((4, OUT))), 1.01)


@pytest.mark.parametrize("wd_on_out", [True, False], ids=["rows", "columns"])
def test_dora(device, rng, wd_on_out):
    layer = make_layer(device, rng)
    module = LoConModule.new_linear(
        IN, OUT, 8, device=device, weight_decompose=True, wd_on_out=wd_on_out, base=layer.weight.array()
    )
    layer.add("dora", trained(rng, module), 0.5)
    weight, axis = layer.weight.numpy().astype(np.float64), 1 if wd_on_out else 0
    moved = weight + module.scale() * exact_delta(module)
    norm = np.sqrt((moved**2).sum(axis, keepdims=True)) + 2.0**-23
    merged = 0.5 * weight + 0.5 * moved * module.dora_scale.numpy().astype(np.float64).reshape(norm.shape) / norm
    x = tensor.from_numpy(rng.standard_normal((5, IN)), device, BF16)
    values = x.numpy().astype(np.float64)
    bias = layer.bias.numpy().astype(np.float64)
    wanted = values @ merged.T + bias, np.abs(values) @ np.abs(merged).T
    assert_close(layer(x), wanted, 3)
    layer.train()
    for _, factor in layer.parameters():
        factor.requires_grad_()
    y = layer(x)
    assert_close(y, wanted, 3)
    y.backward(tensor.ones(y.shape, BF16, device))
    assert all(np.isfinite(factor.grad.numpy()).all() for _, factor in layer.parameters())


def test_ia3_scales_rows_or_columns(device, rng):
    for on_input, mode in ((False, "merged"), (True, "separate")):
        layer = make_layer(device, rng, bias=False, mode=mode)
        module = IA3Module.new((OUT, IN), on_input=on_input, device=device)
        vector = rng.standard_normal(IN if on_input else OUT)
        module.factors["weight"] = DeviceArray.from_numpy(vector, BF16, device)
        layer.add("ia3", module)
        stored = module.factors["weight"].numpy().astype(np.float64)
        base = layer.weight.numpy().astype(np.float64)
        change = base * (stored if on_input else stored[:, None])
        x = tensor.from_numpy(rng.standard_normal((5, IN)), device, BF16)
        values = x.numpy().astype(np.float64)
        size = np.abs(values) @ (np.abs(base) + np.abs(change)).T
        assert_close(layer(x), (values @ (base + change).T, size), 3)


def test_merge_and_unmerge_restore_every_bit(device, rng):
    layer, module = make_layer(device, rng), make_adapter(device, rng, "full")
    layer.add("a", module)
    before = layer.weight.numpy().view(np.uint16).copy(), layer.bias.numpy().view(np.uint16).copy()
    x = tensor.from_numpy(rng.standard_normal((3, IN)), device, BF16)
    live = layer(x).numpy()
    layer.merge()
    np.testing.assert_array_equal(layer(x).numpy(), live)
    for change in (layer.merge, lambda: layer.remove("a"), lambda: layer.set_strength("a", 2)):
        with pytest.raises(RefusedInput, match="call unmerge"):
            change()
    layer.unmerge()
    np.testing.assert_array_equal(layer.weight.numpy().view(np.uint16), before[0])
    np.testing.assert_array_equal(layer.bias.numpy().view(np.uint16), before[1])
    with pytest.raises(RefusedInput, match="not merged; call merge"):
        layer.unmerge()


def test_the_merged_weight_follows_the_factors(device, rng):
    layer, module = make_layer(device, rng, mode="merged"), make_adapter(device, rng, "locon")
    layer.add("a", module)
    x = tensor.from_numpy(rng.standard_normal((3, IN)), device, BF16)
    layer(x)
    kept = layer.merged_weight()
    assert layer.merged_weight() is kept
    module.tensors()["lora_up.weight"].mul_(2.0)
    assert_close(layer(x), exact(layer, x, [(module, 1.0)]), 3)
    assert layer.merged_weight() is not kept


@pytest.mark.parametrize("name", ADAPTERS)
def test_training_gives_the_gradients_of_the_term(device, rng, name):
    layer, module = make_layer(device, rng), make_adapter(device, rng, name)
    layer.train()
    layer.add("a", module, 1.5)
    factors = {key: value for key, value in layer.parameters() if not key.endswith("diff_b")}
    for factor in factors.values():
        factor.requires_grad_()
    x = tensor.from_numpy(rng.standard_normal((6, IN)), device, BF16).requires_grad_()
    y = layer(x)
    g = tensor.from_numpy(rng.standard_normal(y.shape), device, BF16)
    y.backward(g)
    assert layer.weight.grad is None
    values = {key: value.numpy().astype(np.float64) for key, value in module.factors.items()}
    gradient = 1.5 * module.scale() * g.numpy().astype(np.float64).T @ x.numpy().astype(np.float64)
    for key in factors:
        step = 1e-6 * rng.standard_normal(values[key[2:]].shape)
        ends = []
        for sign in (1, -1):
            moved = values | {key[2:]: values[key[2:]] + sign * step}
            ends.append(_delta(module, moved))
        slope = (gradient * (ends[0] - ends[1])).sum() / 2
        found = (factors[key].grad.numpy().astype(np.float64) * step).sum()
        size = np.sqrt((gradient**2).sum()) * np.abs(ends[0] - ends[1]).max() * np.sqrt(OUT * IN)
        assert abs(found - slope) < 2**-5 * size, key
    merged = layer.weight.numpy().astype(np.float64) + 1.5 * module.scale() * exact_delta(module).reshape(OUT, IN)
    wanted = g.numpy().astype(np.float64) @ merged
    assert np.abs(x.grad.numpy() - wanted).max() < 2**-6 * np.abs(wanted).max()


def _delta(module, values):
    from reference import delta64

    return delta64(module.algorithm, values).reshape(OUT, IN)


def test_dropouts_take_part_in_training_only(device, rng):
    layer, module = make_layer(device, rng, mode="separate"), make_adapter(device, rng, "locon")
    layer.add("a", module, dropout=0.5, rank_dropout=0.5, module_dropout=0.1)
    x = tensor.from_numpy(rng.standard_normal((6, IN)), device, BF16)
    assert_close(layer(x), exact(layer, x, [(module, 1.0)]), 3)
    layer.train()
    for _, factor in layer.parameters():
        factor.requires_grad_()
    tensor.manual_seed(3)
    first = layer(x).numpy()
    tensor.manual_seed(3)
    np.testing.assert_array_equal(layer(x).numpy(), first)
    with no_grad():
        assert (np.abs(first.astype(np.float64) - exact(layer, x, [(module, 1.0)])[0]) > 0.5).any()


def test_refusals(device, rng):
    layer, module = make_layer(device, rng), make_adapter(device, rng, "locon")
    layer.add("a", module)
    with pytest.raises(RefusedInput, match="an adapter 'a' is there already"):
        layer.add("a", module)
    with pytest.raises(RefusedInput, match=r"adapter 'b' is for a weight \[8, 8\], the layer's is \[64, 48\]"):
        layer.add("b", LoConModule.new_linear(8, 8, 2, device=device))
    with pytest.raises(RefusedInput, match="no adapter 'b' on this layer; it has 'a'"):
        layer.set_strength("b", 1)
    with pytest.raises(RefusedInput, match="is of norm"):
        layer.add("n", NormModule.new(OUT, device=device))
    with pytest.raises(RefusedInput, match="a DoRA takes the whole weight"):
        base = layer.weight.array()
        layer.add("d", LoConModule.new_linear(IN, OUT, 2, device=device, weight_decompose=True, base=base))
    with pytest.raises(RefusedInput, match=r"x of f32 .* wanted bf16"):
        layer(tensor.zeros((2, IN), F32, device))
    with pytest.raises(RefusedInput, match=r"x \(2, 47\) and weight"):
        layer(tensor.zeros((2, IN - 1), BF16, device))
    with pytest.raises(RefusedInput, match="mode 'fast'"):
        layer.mode = "fast"
    with pytest.raises(RefusedInput, match=r"wanted dropout, rank_dropout or module_dropout in \[0, 1\)"):
        layer.add("c", module, dropout=1.0)
    with pytest.raises(RefusedInput, match=r"weight \(8,\) .* wanted a contiguous \[out, in, \*kernel\]"):
        AdaptedLinear(tensor.zeros((8,), BF16, device))
