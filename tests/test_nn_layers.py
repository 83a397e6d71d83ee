"""Layers against their formulas, models by name, adapters put on them and trained; the example, cut down."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.progress import Progress

from lycoris import nn, optim, tensor
from lycoris.algorithms import LoConModule, LoHaModule, LoKrModule, load, save
from lycoris.errors import RefusedInput
from lycoris.graph import capture
from lycoris.tensor import Generator
from plans.core import ElementKind

BF16, F32 = ElementKind.BF16, ElementKind.F32
EXAMPLES = Path(__file__).parents[1] / "examples"


def softmax(x):
    powers = np.exp(x - x.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def norm(x, layer):
    y = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    return y * layer.weight.numpy() + layer.bias.numpy()


def linear(x, layer):
    return x @ layer.weight.numpy().T + layer.bias.numpy()


def attention(x, layer, heads):
    batch, length, width = x.shape
    q, k, v = np.moveaxis(linear(x, layer.qkv).reshape(batch, length, 3, heads, -1), 2, 0).swapaxes(2, 3)
    mixed = softmax(q @ k.swapaxes(2, 3) / math.sqrt(width // heads)) @ v
    return linear(mixed.swapaxes(1, 2).reshape(batch, length, width), layer.out)


def test_a_transformer_block_is_its_formula(rng):
    block = nn.TransformerBlock(8, 2, 2, generator=Generator(3))
    x = rng.standard_normal((2, 5, 8)).astype(np.float32)
    y = x + attention(norm(x, block.norm1), block.attention, 2)
    hidden = linear(norm(y, block.norm2), block.mlp.up)
    hidden = hidden / 2 * (1 + np.vectorize(math.erf)(hidden / math.sqrt(2)))
    y = y + linear(hidden, block.mlp.down)
    # Products of 8 terms of about 1, in fp32.
    np.testing.assert_allclose(block(tensor.from_numpy(x)).numpy(), y, rtol=2e-5, atol=2e-5)


def test_other_layers_are_their_operations(rng):
    x = tensor.from_numpy(rng.standard_normal((2, 4, 3)), kind=F32)
    np.testing.assert_array_equal(nn.RMSNorm(3)(x).numpy(), tensor.rms_norm(x, tensor.ones((3,))).numpy())
    group = nn.GroupNorm(2, 4)
    np.testing.assert_array_equal(group(x).numpy(), tensor.group_norm(x, 2, group.weight, group.bias).numpy())
    table = nn.Embedding(5, 3, generator=Generator(1))
    index = tensor.from_numpy(np.array([[4, 0]], np.int32))
    np.testing.assert_array_equal(table(index).numpy(), table.weight.numpy()[[[4, 0]]])


def test_dropout_takes_part_while_training():
    x, layer = tensor.ones((64,)), nn.Dropout(0.5, generator=Generator(2))
    assert (layer(x).numpy() == 0).any()
    assert layer.train(False)(x) is x


class Model(nn.Module):
    def __init__(self, seed=0, kind=F32):
        generator = Generator(seed)
        self.first = nn.Linear(4, 6, kind=kind, generator=generator)
        self.layers = [nn.Linear(6, 6, kind=kind, generator=generator), nn.LayerNorm(6, kind=kind)]
        self.scale = tensor.ones((6,), kind)

    def forward(self, x):
        x = self.first(x)
        for layer in self.layers:
            x = layer(x)
        return x * self.scale


NAMES = ["scale", "first.weight", "first.bias", "layers.0.weight", "layers.0.bias", "layers.1.weight", "layers.1.bias"]


def test_models_name_their_tensors():
    model = Model()
    assert sorted(model.tensors()) == sorted(NAMES)
    assert sorted(model.trained()) == sorted(NAMES[1:])
    model.requires_grad_(False)
    assert model.trained() == {}
    model.train(False)
    assert not model.layers[1].training


def test_a_model_s_state_goes_into_another(rng):
    one, other = Model(1), Model(2)
    x = tensor.from_numpy(rng.standard_normal((2, 4)), kind=F32)
    other.load_state_dict(one.state_dict())
    np.testing.assert_array_equal(one(x).numpy(), other(x).numpy())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("scale"), "scale is missing"),
        (lambda s: s.update(extra=np.zeros(1)), "extra is no tensor of the model"),
        (lambda s: s.update(scale=np.zeros(2, np.float32)), r"scale is float32 \(2,\), wanted float32 \(6,\)"),
        (lambda s: s.update(scale=np.zeros(6)), "scale is float64"),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(change, message):
    model = Model()
    state, before = Model(5).state_dict(), model.state_dict()
    change(state)
    with pytest.raises(RefusedInput, match=message):
        model.load_state_dict(state)
    after = model.state_dict()
    assert all(after[name].tobytes() == before[name].tobytes() for name in before)


@pytest.mark.parametrize("algorithm", [LoConModule, LoHaModule, LoKrModule], ids=lambda a: a.algorithm)
@pytest.mark.parametrize("kind", [F32, BF16], ids=lambda k: k.value)
def test_adapters_are_trained_and_saved(rng, tmp_path, algorithm, kind):
    model = Model(kind=kind)
    x = tensor.from_numpy(rng.standard_normal((3, 4)), kind=kind)
    before, weights = model(x).numpy().tobytes(), model.state_dict()
    adapters = nn.adapt(model, algorithm, 2, seed=4)
    model.train()
    assert list(adapters) == ["first", "layers_0"]
    assert model(x).numpy().tobytes() == before  # a new adapter's delta is zero
    optimizer = optim.AdamW(nn.parameters_of(adapters), 0.05)
    wanted = tensor.from_numpy(np.tile([[1.0, -1.0, 1.0, -1.0, 1.0, -1.0]], (3, 1)), kind=kind)
    losses = []
    for _ in range(5):
        loss = tensor.mse_loss(model(x), wanted)
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    after = model.state_dict()
    assert all(after[name].tobytes() == weights[name].tobytes() for name in weights)  # the base is frozen
    save(tmp_path / "a.safetensors", {f"lycoris_{name}": module for name, module in adapters.items()})
    again = load(tmp_path / "a.safetensors")
    for name, module in adapters.items():
        found = again[f"lycoris_{name}"].get_diff_weight().numpy()
        assert found.tobytes() == module.get_diff_weight().numpy().tobytes()


@pytest.mark.parametrize("algorithm", [LoConModule, LoHaModule, LoKrModule], ids=lambda a: a.algorithm)
def test_factors_that_start_at_zero_learn_faster(algorithm):
    adapters = nn.adapt(Model(), algorithm, 2, seed=4)
    slow, fast = nn.lora_plus(adapters, 0.25, 8.0)
    assert (slow["rate"], fast["rate"]) == (0.25, 2.0)
    assert all((factor.numpy() == 0).all() for factor in fast["parameters"])
    assert all((factor.numpy() != 0).any() for factor in slow["parameters"])
    assert len(fast["parameters"]) == len(adapters)
    assert len(optim.SGD([slow, fast]).parameters) == len(nn.parameters_of(adapters))


def test_layers_may_be_left_out():
    model = Model()
    assert list(nn.adapt(model, LoConModule, 2, where=lambda path: path.startswith("layers"))) == ["layers_0"]
    assert isinstance(model.layers[0], nn.AdaptedLinear)
    assert isinstance(model.first, nn.Linear)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: nn.Linear(0, 3), "0 to 3 features, wanted 1 or more"),
        (lambda: nn.SelfAttention(8, 3), "3 heads of width 8, wanted a divisor"),
        (lambda: nn.GroupNorm(3, 4), "3 groups of 4 channels, wanted a divisor"),
        (lambda: nn.Dropout(1.0), "p is 1.0, wanted 0 up to"),
    ],
)
def test_layers_that_contradict_themselves(act, message):
    with pytest.raises(RefusedInput, match=message):
        act()


def test_the_digits_example(tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    monkeypatch.setattr(sys, "path", [str(EXAMPLES), *sys.path])
    import train_digits

    small = train_digits.Settings(width=4, heads=2, blocks=1, rank=1, batch=2, steps=2, adapter_steps=1, images=10)
    with Progress(disable=True) as progress:
        report = train_digits.run(small, tmp_path, progress)
    assert list(report) == ["base", "locon", "loha", "lokr"]
    for name in ("locon", "loha", "lokr"):
        assert report[name]["accuracy"] == report[name]["merged accuracy"]
        assert (tmp_path / f"{name}.safetensors").stat().st_size > 0
    digits, again = train_digits.load(small), train_digits.VisionTransformer(small)
    parameters = list(again.trained().values())
    losses = train_digits.fit(again, parameters, digits, digits.classes, small, 2, 2e-3, lambda: None)
    assert losses == report["base"]["losses"]
    assert train_digits.digest(again.state_dict()) == report["base"]["digest"]


def test_a_captured_training_step_is_the_eager_one():
    x, wanted = tensor.randn((1, 3, 4), seed=3), tensor.randn((1, 3, 4), seed=4)

    def made():
        block = nn.TransformerBlock(4, 2, 2, generator=Generator(0))
        parameters = nn.parameters_of(nn.adapt(block, LoConModule, 2, seed=1))
        optimizer = optim.AdamW(parameters, 0.01)

        def gradients():
            with tensor.enable_grad():
                optimizer.zero_grad()
                loss = tensor.mse_loss(block.train()(x), wanted)
                loss.backward()
                return loss.detach()

        return parameters, optimizer, gradients

    eager, eager_optimizer, eager_gradients = made()
    captured, optimizer, gradients = made()
    graph = capture(gradients)
    losses = []
    for _ in range(2):
        losses.append(eager_gradients().item())
        eager_optimizer.step()
        graph.replay()
        optimizer.step()
        assert graph.result.item() == losses[-1]
    assert losses[1] < losses[0]
    assert [p.numpy().tobytes() for p in captured] == [p.numpy().tobytes() for p in eager]
