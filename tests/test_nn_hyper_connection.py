"""HyperConnection around a sublayer: forward and gradients against float64, and what the layer promises."""

from __future__ import annotations

import numpy as np
import pytest

from lycoris import optim, tensor
from lycoris.errors import RefusedInput
from lycoris.graph import capture
from lycoris.nn import HyperConnection, Linear
from lycoris.tensor import Generator
from plans.core import ElementKind, InvalidProblem
from plans.hyper_connection.common import weight_line
from plans.hyper_connection.math import Projection, aggregate_of, logits_of, mixed_of, projected_of, weights_of
from plans.sinkhorn import SinkhornMode

BF16, F16, F32 = ElementKind.BF16, ElementKind.F16, ElementKind.F32
N, C = 3, 8
MODES = pytest.mark.parametrize("mode", SinkhornMode, ids=lambda mode: mode.value)


def exact_forward(layer, arrays, x, weight):
    """The layer around y = x W^T in float64."""
    eps = float(np.float32(layer.eps))
    projection = Projection(layer.sinkhorn_iters, eps, layer.mode)
    flat = x.reshape(-1, *x.shape[-2:])
    if layer.hidden_dim is None:
        line = weight_line(*(arrays[name] for name in ("h_pre", "h_post", "h_res")))[None]
        logits = line, np.zeros_like(line)
    else:
        projected = projected_of(flat, arrays["projection"], eps)[0]
        logits = logits_of(projected, arrays["alpha"], arrays["bias"], x.shape[-2])
    weights, _ = weights_of(logits, x.shape[-2], projection)
    aggregate, _ = aggregate_of(flat, weights, arrays.get("norm_weight"), eps)
    update = aggregate @ weight.T
    return mixed_of(flat, weights, (update, np.abs(update)))[0].reshape(x.shape)


def layer_of(rng, hidden_dim=None, norm=False, mode=SinkhornMode.EXP, kind=F32):
    """A layer with random parameters, and them in float64."""
    sublayer = Linear(C, C, bias=False)
    weight = tensor.from_numpy(rng.standard_normal(C), kind=F32, requires_grad=True) if norm else None
    layer = HyperConnection(sublayer, N, hidden_dim, norm_weight=weight, sinkhorn_iters=5, mode=mode, kind=kind)
    arrays = {}
    for name, part in layer.tensors().items():
        values = 0.5 * rng.standard_normal(part.shape)
        with tensor.no_grad():
            part.copy_(tensor.from_numpy(values, kind=part.kind))
        arrays[name] = part.numpy().astype(np.float64)
    return layer, arrays


@MODES
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize("hidden_dim", [None, C], ids=["static", "dynamic"])
def test_forward_and_gradients(rng, hidden_dim, norm, mode):
    layer, arrays = layer_of(rng, hidden_dim, norm, mode)
    x = rng.standard_normal((2, 3, N, C)).astype(np.float32)
    leaf = tensor.from_numpy(x, requires_grad=True)
    out = layer(leaf)
    values = arrays | {"x": x.astype(np.float64)}

    def exact(moved):
        return exact_forward(layer, moved, moved["x"], moved["sublayer.weight"])

    # Sums of a few tens of terms of about 1, through five iterations.
    np.testing.assert_allclose(out.numpy(), exact(values), rtol=1e-4, atol=1e-5)
    d_out = rng.standard_normal(x.shape)
    out.backward(tensor.from_numpy(d_out, kind=F32))
    for name, part in (layer.tensors() | {"x": leaf}).items():
        direction = rng.standard_normal(part.shape)
        ends = [(exact(values | {name: values[name] + s * direction}) * d_out).sum() for s in (1e-5, -1e-5)]
        found = (part.grad.numpy().astype(np.float64) * direction).sum()
        assert found == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-3, abs=1e-3), name


@pytest.mark.parametrize("hidden_dim", [None, C], ids=["static", "dynamic"])
def test_bf16_streams_train(rng, hidden_dim):
    layer = HyperConnection(lambda x: x * 2, N, hidden_dim, kind=BF16)
    x = tensor.from_numpy(rng.standard_normal((4, N, C)), kind=BF16, requires_grad=True)
    out = layer(x)
    assert out.kind is BF16 and out.shape == x.shape
    out.sum().backward()
    assert x.grad.shape == x.shape
    for name, part in layer.tensors().items():
        assert np.isfinite(part.grad.numpy()).all(), name


class Training:
    """Two connections in a row, learning to map streams to others; what a call returns is the loss before its step."""

    def __init__(self, hidden_dim, mode):
        generator = Generator(3)
        self.layers = [
            HyperConnection(Linear(C, C, generator=generator), N, hidden_dim, mode=mode, sinkhorn_iters=5,
                            generator=generator)
            for _ in range(2)
        ]  # fmt: skip
        self.parameters = [part for layer in self.layers for part in layer.tensors().values()]
        self.x, self.wanted = (tensor.randn((6, N, C), seed=seed) for seed in (1, 2))
        self.optimizer = optim.AdamW(self.parameters, 0.05)

    def __call__(self):
        with tensor.enable_grad():
            self.optimizer.zero_grad()
            loss = tensor.mse_loss(self.layers[1](self.layers[0](self.x)), self.wanted)
            loss.backward()
            self.optimizer.step()
            return loss.detach()


@pytest.mark.parametrize(
    ("hidden_dim", "mode"), [(None, SinkhornMode.EXP), (C, SinkhornMode.SOFTMAX)], ids=["static", "dynamic"]
)
def test_it_learns_and_a_recorded_step_is_the_eager_one(hidden_dim, mode):
    eager, recorded, steps = Training(hidden_dim, mode), Training(hidden_dim, mode), 5
    started = [part.numpy().copy() for part in eager.parameters]
    losses = [eager().item() for _ in range(steps)]
    assert losses[-1] < 0.9 * losses[0]
    assert all((part.numpy() != before).any() for part, before in zip(eager.parameters, started, strict=True))
    graph = capture(recorded)  # makes the first step
    for loss in losses[1:]:
        graph.replay()
        assert graph.result.item() == loss
    for one, other in zip(eager.parameters, recorded.parameters, strict=True):
        assert one.numpy().tobytes() == other.numpy().tobytes()


def test_layers_in_a_row(rng):
    """The gradient of one layer's streams is that of the next one's input; the graph is walked once."""
    layers = [layer_of(rng)[0] for _ in range(2)]
    x = tensor.from_numpy(rng.standard_normal((2, N, C)), kind=F32, requires_grad=True)
    middle = layers[0](x)
    last = layers[1](middle)
    last.sum().backward(retain_graph=True)
    first = x.grad.numpy()
    x.grad = None
    last.sum().backward()
    np.testing.assert_array_equal(x.grad.numpy(), first)
    leaf = tensor.from_numpy(middle.numpy(), requires_grad=True)
    layers[1](leaf).sum().backward()
    again = tensor.from_numpy(x.numpy(), requires_grad=True)
    layers[0](again).backward(leaf.grad)
    np.testing.assert_array_equal(again.grad.numpy(), first)


def test_a_sublayer_that_stops_gradients_leaves_those_of_the_streams(rng):
    layer = HyperConnection(lambda x: x.detach(), N)
    x = tensor.from_numpy(rng.standard_normal((2, N, C)), kind=F32, requires_grad=True)
    layer(x).sum().backward()
    # Columns of M sum to 1, so every stream hands its gradient on.
    np.testing.assert_allclose(x.grad.numpy(), 1, rtol=1e-5)
    assert (layer.h_pre.grad.numpy() == 0).all()


def test_streams_at_any_address_and_stride(rng):
    layer, _ = layer_of(rng)
    values = rng.standard_normal((3, N, C)).astype(np.float32)
    expected = layer(tensor.from_numpy(values)).numpy()
    shifted = tensor.from_numpy(np.concatenate([[0], values.ravel()]).astype(np.float32))[1:].reshape(3, N, C)
    turned = tensor.from_numpy(np.ascontiguousarray(values.transpose(2, 0, 1))).permute(1, 2, 0)
    for x in (shifted, turned):
        np.testing.assert_array_equal(layer(x).numpy(), expected)


def test_without_gradients_nothing_is_recorded(rng):
    layer, _ = layer_of(rng)
    with tensor.no_grad():
        out = layer(tensor.from_numpy(rng.standard_normal((2, N, C)), kind=F32))
    assert not out.requires_grad


def test_gradients_of_chosen_tensors(rng):
    layer, _ = layer_of(rng, C)
    x = tensor.from_numpy(rng.standard_normal((2, N, C)), kind=F32)
    d_alpha, d_weight = tensor.grad(layer(x).sum(), [layer.alpha, layer.sublayer.weight])
    assert d_alpha.shape == (3,) and d_weight.shape == (C, C)
    assert layer.alpha.grad is None


def test_what_starts_a_layer():
    layer = HyperConnection(lambda x: x, 4, 64, kind=BF16)
    assert layer.projection.shape == (24, 256) and layer.projection.kind is BF16
    assert 0.015 < layer.projection.numpy().astype(np.float32).std() < 0.025
    np.testing.assert_array_equal(layer.alpha.numpy(), np.float32(0.01))
    assert not layer.bias.numpy().any()
    assert sorted(layer.tensors()) == ["alpha", "bias", "projection"]
    static = HyperConnection(Linear(8, 8), 60)
    assert not static.h_pre.numpy().any() and not static.h_post.numpy().any()
    assert 0.009 < static.h_res.numpy().std() < 0.011
    assert sorted(static.tensors()) == [
        "h_post", "h_pre", "h_res", "sublayer.bias", "sublayer.weight",
    ]  # fmt: skip


def test_what_does_not_fit_is_refused(rng):
    layer = HyperConnection(lambda x: x, N, C)
    wide = HyperConnection(lambda x: tensor.cat([x, x], -1), N)
    other = HyperConnection(lambda x: x, N, norm_weight=tensor.ones((C + 1,)))
    good = tensor.zeros((2, N, C))
    for call, message in (
        (lambda: layer(tensor.zeros((2, N, C + 1))), r"streams of shape \(2, 3, 9\), wanted \[..., 3, 8\]"),
        (lambda: layer(tensor.zeros((C,))), r"streams of shape \(8,\), wanted"),
        (lambda: layer(tensor.zeros((0, N, C))), r"streams of shape \(0, 3, 8\), wanted"),
        (lambda: layer(tensor.zeros((2, N, C), F16)), "streams of f16, wanted f32 or bf16; convert them first"),
        (lambda: wide(good), r"the sublayer gave f32 of shape \(2, 16\), wanted f32 of \(2, 8\)"),
        (lambda: other(good), r"norm_weight is f32 of shape \(9,\), wanted f32 or bf16 of \(8,\)"),
        (lambda: HyperConnection(lambda x: x, 0), "0 streams, wanted 1 or more"),
    ):
        with pytest.raises(RefusedInput, match=message):
            call()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden_dim": 0}, "hidden_dim 0 and n_streams 3, wanted all positive"),
        ({"hidden_dim": 2}, "hidden_dim 2 < n_streams 3, wanted at least one channel a stream"),
        ({"sinkhorn_iters": 1001}, "sinkhorn iterations 1001, wanted 1 to 1000"),
        ({"eps": 0.0}, r"eps 0.0, wanted a finite number in \(0, 1\)"),
    ],
)
def test_settings_that_contradict_themselves_are_refused_at_once(settings, message):
    with pytest.raises(InvalidProblem, match=message):
        HyperConnection(lambda x: x, N, **settings)
