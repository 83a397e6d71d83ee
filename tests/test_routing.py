"""Rows with adapters of their own, and work that is recorded and launched again."""

from __future__ import annotations

import numpy as np
import pytest
from test_adapted_linear import BF16, F32, IN, OUT, assert_close, exact, make_adapter, make_layer

from lycoris import tensor
from lycoris.errors import RefusedInput
from lycoris.graph import capture


@pytest.mark.parametrize("names", [("locon", "locon of rank 3"), ("loha", "lokr"), ("locon", "lokr", "locon")], ids=str)
def test_rows_choose_their_adapters(device, rng, names):
    layer = make_layer(device, rng)
    modules = [make_adapter(device, rng, name) for name in names]
    for number, module in enumerate(modules):
        layer.add(str(number), module, 1.0 - 0.5 * number)
    x = tensor.from_numpy(rng.standard_normal((21, IN)), device, BF16)
    choice = [None if c == len(modules) else str(c) for c in rng.integers(0, len(modules) + 1, 21)]
    choice[:2] = [None, "0"]
    found = layer.route(x, choice).numpy()
    for number, module in enumerate([None, *modules], -1):
        rows = [r for r, name in enumerate(choice) if name == (None if module is None else str(number))]
        adapters = [] if module is None else [(module, 1.0 - 0.5 * number)]
        part = tensor.from_numpy(x.numpy()[rows], device)
        assert_close(tensor.from_numpy(found[rows], device), exact(layer, part, adapters), 3)
    numbers = np.array([len(modules) if name is None else int(name) for name in choice], np.int32)
    np.testing.assert_array_equal(layer.route(x, tensor.from_numpy(numbers, device)).numpy(), found)


def test_routing_follows_strengths(device, rng):
    layer, module = make_layer(device, rng), make_adapter(device, rng, "locon")
    layer.add("a", module)
    x = tensor.from_numpy(rng.standard_normal((3, IN)), device, BF16)
    for strength in (1.0, -2.0, 0.0):
        layer.set_strength("a", strength)
        assert_close(layer.route(x, ["a"] * 3), exact(layer, x, [(module, strength)]), 3)


def test_bad_choices(device, rng):
    layer = make_layer(device, rng)
    layer.add("a", make_adapter(device, rng, "locon"))
    x = tensor.from_numpy(rng.standard_normal((3, IN)), device, BF16)
    with pytest.raises(RefusedInput, match="no adapter 'b' on this layer; it has 'a'"):
        layer.route(x, ["a", "b", None])
    with pytest.raises(RefusedInput, match="2 names for 3 rows"):
        layer.route(x, ["a", None])
    with pytest.raises(RefusedInput, match=r"f32 of shape \(3,\), wanted i32 \[3\]"):
        layer.route(x, tensor.zeros((3,), F32, device))
    layer.add("f", make_adapter(device, rng, "full"))
    with pytest.raises(RefusedInput, match="'f' changes more than the weight's product"):
        layer.route(x, ["a", "f", None])
    layer.merge()
    with pytest.raises(RefusedInput, match="call unmerge"):
        layer.route(x, ["a", None, None])


@pytest.mark.parametrize("mode", ["merged", "separate"])
def test_a_captured_layer_follows_its_input(device, rng, mode):
    layer, module = make_layer(device, rng, mode=mode), make_adapter(device, rng, "locon")
    layer.add("a", module)
    x = tensor.from_numpy(rng.standard_normal((20, IN)), device, BF16)
    graph = capture(lambda: layer(x), device)
    result = graph.result
    for _ in range(2):
        x.copy_(tensor.from_numpy(rng.standard_normal((20, IN)), device, BF16))
        graph.replay()
        assert graph.result is result
        assert result.shape == (20, OUT)
        assert_close(result, exact(layer, x, [(module, 1.0)]), 3)
