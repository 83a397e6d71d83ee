"""Layers with one trained adapter, in bf16 through tensor-core plans: gradients of every factor against float64."""

from __future__ import annotations

import numpy as np
import pytest

from lycoris import tensor
from lycoris.algorithms import LoConModule, LoHaModule, LoKrModule
from lycoris.buffers import DeviceArray
from lycoris.errors import RefusedInput
from lycoris.nn import AdaptedLinear
from plans.core import ElementKind

BF16, F32 = ElementKind.BF16, ElementKind.F32
OUT, IN, ROWS = 48, 32, 21
MODULES = {
    "locon": lambda: LoConModule.new_linear(IN, OUT, 8, 2.0),
    "locon of rank 5": lambda: LoConModule.new_linear(IN, OUT, 5, 2.0),
    "loha": lambda: LoHaModule.new_linear(IN, OUT, 8, 4.0),
    "lokr": lambda: LoKrModule.new_linear(IN, OUT, 99, 1.0, factor=4),
    "lokr factored": lambda: LoKrModule.new_linear(IN, OUT, 2, 1.0, factor=4, decompose_both=True),
}


def made(name, rng, scalar=False):
    module = MODULES[name]()
    for factor, array in module.factors.items():
        put(module, factor, rng.standard_normal(array.shape) * 0.5)
    if scalar:
        module.scalar = DeviceArray.from_numpy(np.float32([0.75]).reshape(()), device=module.device)
    return module


def put(module, name, values):
    module.factors[name] = DeviceArray.from_numpy(values.astype(BF16.values), device=module.device)


def delta(f):
    """The delta at scale 1 of float64 factors."""
    if "lora_up.weight" in f:
        return f["lora_up.weight"] @ f["lora_down.weight"]
    if "hada_w1_a" in f:
        return (f["hada_w1_a"] @ f["hada_w1_b"]) * (f["hada_w2_a"] @ f["hada_w2_b"])
    w1, w2 = (f[f"lokr_w{i}"] if f"lokr_w{i}" in f else f[f"lokr_w{i}_a"] @ f[f"lokr_w{i}_b"] for i in (1, 2))
    return np.kron(w1, w2)


def slopes(f, d):
    """The gradient of every factor for a gradient ``d`` of the delta, by differences: each factor enters linearly."""
    found = {}
    for name, values in f.items():
        found[name] = np.empty_like(values)
        for index in np.ndindex(values.shape):
            unit = np.zeros_like(values)
            unit[index] = 1
            found[name][index] = (delta(f | {name: unit}) * d).sum()
    return found


def packed(array):
    return tensor.from_numpy(array.astype(np.float64), kind=BF16)


def apart(array):
    """Rows five elements further apart than they are long, the first one at an odd element."""
    return packed(np.pad(array, ((0, 0), (3, 2)))).narrow(1, 3, array.shape[1])


def backward(name, rng_seed, mode=None, scalar=False, place=packed):
    rng = np.random.default_rng(rng_seed)
    weight, x, g = (rng.standard_normal(s).astype(BF16.values) for s in ((OUT, IN), (ROWS, IN), (ROWS, OUT)))
    layer = AdaptedLinear(tensor.from_numpy(weight.astype(np.float64), kind=BF16), mode=mode)
    module = made(name, rng, scalar)
    layer.add("a", module, 0.5)
    layer.train()
    for _, parameter in layer.parameters():
        parameter.requires_grad_()
    rows = place(x).requires_grad_()
    y = layer(rows)
    y.backward(place(g))
    grads = {key.removeprefix("a."): parameter.grad.numpy() for key, parameter in layer.parameters()}
    values = {key: array.numpy().astype(np.float64) for key, array in module.factors.items()}
    arrays = [array.astype(np.float64) for array in (weight, x, g)]
    return y.numpy().astype(np.float64), rows.grad.numpy(), grads, values, arrays, module


@pytest.mark.parametrize("mode", [None, "merged"])
@pytest.mark.parametrize("name", MODULES)
def test_gradients_of_a_trained_layer(name, mode):
    y, d_x, grads, values, (weight, x, g), module = backward(name, 7, mode)
    scale = module.scale() * 0.5
    whole = weight + scale * delta(values)
    # Factors, and what passes between two products, are rounded to 8 bits, results too: some units of 2**-9 of the sum
    # of all terms' magnitudes.
    near(y, x @ whole.T, np.abs(x) @ np.abs(whole).T)
    near(d_x, g @ whole, np.abs(g) @ np.abs(whole))
    sizes = {key: np.abs(value) for key, value in values.items()}
    exact, reach = slopes(values, scale * g.T @ x), slopes(sizes, scale * np.abs(g).T @ np.abs(x))
    assert grads.keys() == exact.keys()
    for key, found in grads.items():
        near(found, exact[key], reach[key])


def near(found, exact, size):
    assert (np.abs(found - exact) <= 4 * 2.0**-9 * size + 1e-6).all(), np.max(np.abs(found - exact) / size)


@pytest.mark.parametrize("name", ["locon", "loha", "lokr factored"])
def test_gradients_are_the_same_bits_twice(name):
    first, second = backward(name, 3), backward(name, 3)
    assert first[1].tobytes() == second[1].tobytes()
    for key, found in first[2].items():
        assert found.tobytes() == second[2][key].tobytes(), key


@pytest.mark.parametrize("name", MODULES)
def test_inputs_and_gradients_may_lie_anywhere(name):
    first, second = backward(name, 3), backward(name, 3, place=apart)
    assert first[0].tobytes() == second[0].tobytes()
    assert first[1].tobytes() == second[1].tobytes()
    for key, found in first[2].items():
        assert found.tobytes() == second[2][key].tobytes(), key


@pytest.mark.parametrize("name", ["locon", "loha", "lokr"])
def test_a_scalar_is_trained_too(name):
    *_, grads, values, (_, x, g), module = backward(name, 5, scalar=True)
    exact = module.scale() * 0.5 * (delta(values) * (g.T @ x)).sum()
    size = module.scale() * 0.5 * (delta({k: np.abs(v) for k, v in values.items()}) * (np.abs(g).T @ np.abs(x))).sum()
    near(grads["scalar"], exact, size)


def test_dora_trains_magnitude_and_factors():
    rng = np.random.default_rng(11)
    weight, x, g = (rng.standard_normal(s).astype(BF16.values) for s in ((OUT, IN), (ROWS, IN), (ROWS, OUT)))
    layer = AdaptedLinear(tensor.from_numpy(weight.astype(np.float64), kind=BF16))
    base = layer.weight.array()
    module = LoConModule.new_linear(IN, OUT, 8, 4.0, weight_decompose=True, base=base)
    for factor, array in module.factors.items():
        put(module, factor, rng.standard_normal(array.shape) * 0.3)
    layer.add("a", module)
    layer.train()
    for _, parameter in layer.parameters():
        parameter.requires_grad_()
    y = layer(tensor.from_numpy(x.astype(np.float64), kind=BF16))
    y.backward(tensor.from_numpy(g.astype(np.float64), kind=BF16))
    weight, x, g = (array.astype(np.float64) for array in (weight, x, g))
    values = {key: array.numpy().astype(np.float64) for key, array in module.parameters().items()}

    def through(values):
        moved = weight + module.scale() * delta(values)
        return values["dora_scale"].reshape(-1, 1) * moved / np.sqrt((moved**2).sum(1, keepdims=True))

    near(y.numpy().astype(np.float64), x @ through(values).T, np.abs(x) @ np.abs(through(values)).T)
    for name, parameter in layer.parameters():
        step = rng.standard_normal(parameter.shape)
        ends = []
        for sign in (1e-6, -1e-6):
            key = name.removeprefix("a.")
            ends.append((g * (x @ through(values | {key: values[key] + sign * step}).T)).sum())
        slope, found = (ends[0] - ends[1]) / 2e-6, (parameter.grad.numpy() * step).sum()
        # What is rounded to 8 bits on the way (outputs, the gradient of the product, t, u): errors of single elements
        # are independent, so that their sum grows as its terms' root mean square does.
        size = np.linalg.norm(g) * np.linalg.norm(x @ (through(values) - through(values | {key: values[key] + step})).T)
        assert abs(found - slope) < 2.0**-6 * size, name


@pytest.mark.parametrize(
    ("reason", "call"),
    [
        ("factors .*wanted a1, b1, a2, b2", lambda x, w: tensor.hadamard_linear(x, w, [x, w, w, w])),
        ("wanted extents whose products are the weight's", lambda x, w: tensor.kronecker_linear(x, w, w, [w])),
        (
            "operands of bf16, f32, wanted all of one kind",
            lambda x, w: tensor.kronecker_linear(x, w, tensor.ones((2, 2)), [tensor.ones((2, 2))]),
        ),
    ],
)
def test_what_does_not_fit_is_refused(reason, call):
    with pytest.raises(RefusedInput, match=reason):
        call(tensor.ones((3, 4), BF16), tensor.ones((4, 4), BF16))
