"""Every differentiable operation on tensors beside its formula in NumPy: what the derivative test goes over."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from lycoris import tensor
from lycoris.tensor import Tensor
from plans.core import ElementKind

F64 = np.ndarray


@dataclass(frozen=True)
class Case:
    """``ours`` on tensors of ``shapes`` and ``exact`` on float64 arrays; ``draw`` makes arguments off every corner."""

    name: str
    ours: Callable[..., Tensor]
    exact: Callable[..., F64]
    shapes: tuple[tuple[int, ...], ...]
    draw: Callable = lambda rng, shape: rng.uniform(0.2, 1.4, shape) * rng.choice([-1.0, 1.0], shape)


def positive(rng, shape):
    return rng.uniform(0.3, 3, shape)


def distinct(rng, shape):
    """Numbers that are all at least 0.1 apart."""
    return rng.permutation(np.arange(math.prod(shape)) * 0.1 - 0.55).reshape(shape) + rng.uniform(0, 0.02, shape)


erf = np.vectorize(math.erf)
_INDEX = np.array([2, 0, 2, 1], np.int32)
_EACH = np.array([[1, 0, 3], [1, 2, 0], [1, 1, 1]], np.int32)
_TARGET = np.array([4, 0, -1, 2], np.int32)


def _case(name, ours, exact, *shapes, **options) -> Case:
    return Case(name, ours, exact, shapes, **options)


_WEIGHT, _BIAS = np.linspace(-1, 1.3, 24).reshape(4, 6), np.array([0.5, -1, 2, 0.25])


def _weight() -> Tensor:
    """A frozen layer's."""
    return tensor.from_numpy(_WEIGHT, kind=ElementKind.F32)


def _bias() -> Tensor:
    return tensor.from_numpy(_BIAS, kind=ElementKind.F32)


def _directions(rows):
    return rows / np.sqrt((rows**2).sum(1, keepdims=True))


def _softmax(x, axis=-1):
    powers = np.exp(x - x.max(axis, keepdims=True))
    return powers / powers.sum(axis, keepdims=True)


def _layer_norm(x, w=1.0, b=0.0, eps=1e-5):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps) * w + b


def _rms_norm(x, w=1.0, eps=1e-6):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * w


def _group_norm(x, w, b):
    y = _layer_norm(x.reshape(2, 2, 6)).reshape(2, 4, 3)
    return y * w[:, None] + b[:, None]


def _attention(q, k, v, causal=False):
    scores = q @ np.swapaxes(k, -1, -2) / math.sqrt(q.shape[-1])
    hidden = np.arange(k.shape[-2]) > np.arange(q.shape[-2])[:, None]
    return _softmax(np.where(hidden & causal, -np.inf, scores)) @ v


def _self_attention(qkv, heads):
    q, k, v = np.moveaxis(qkv.reshape(*qkv.shape[:2], 3, heads, -1), 2, 0).swapaxes(2, 3)
    return _attention(q, k, v).swapaxes(1, 2).reshape(*qkv.shape[:2], -1)


def _cross_entropy(x, target=_TARGET):
    lse = np.log(np.exp(x).sum(-1))
    known = (target >= 0) & (target < x.shape[-1])
    return np.where(known, lse - np.take_along_axis(x, np.where(known, target, 0)[:, None], -1)[:, 0], 0)


def _dropped(x):
    from plans.random import philox, uniform

    return np.where((uniform(philox(x.size, 5, 0)) >= np.float32(0.4)).reshape(x.shape), x / 0.6, 0)


def _index(array):
    return tensor.from_numpy(array)


def _huber(x, y, delta=0.7):
    d = np.abs(x - y)
    return np.where(d > delta, delta * (d - delta / 2), d**2 / 2).mean()


POINTWISE = [
    _case("neg", lambda x: -x, np.negative, (3, 5)),
    _case("abs", abs, np.abs, (3, 5)),
    _case("square", lambda x: x**2, np.square, (3, 5)),
    _case("sqrt", lambda x: x.sqrt(), np.sqrt, (3, 5), draw=positive),
    _case("rsqrt", lambda x: x.rsqrt(), lambda x: x**-0.5, (3, 5), draw=positive),
    _case("reciprocal", lambda x: x.reciprocal(), lambda x: 1 / x, (3, 5)),
    _case("exp", lambda x: x.exp(), np.exp, (3, 5)),
    _case("log", lambda x: x.log(), np.log, (3, 5), draw=positive),
    _case("sin", lambda x: x.sin(), np.sin, (3, 5)),
    _case("cos", lambda x: x.cos(), np.cos, (3, 5)),
    _case("tanh", lambda x: x.tanh(), np.tanh, (3, 5)),
    _case("erf", lambda x: x.erf(), erf, (3, 5)),
    _case("sigmoid", lambda x: x.sigmoid(), lambda x: 1 / (1 + np.exp(-x)), (3, 5)),
    _case("relu", lambda x: x.relu(), lambda x: np.maximum(x, 0), (3, 5)),
    _case("gelu", lambda x: x.gelu(), lambda x: x / 2 * (1 + erf(x / math.sqrt(2))), (3, 5)),
    _case("silu", lambda x: x.silu(), lambda x: x / (1 + np.exp(-x)), (3, 5)),
    _case("softplus", lambda x: x.softplus(), lambda x: np.log1p(np.exp(x)), (3, 5)),
    _case("leaky_relu", lambda x: x.leaky_relu(0.1), lambda x: np.where(x > 0, x, 0.1 * x), (3, 5)),
    _case("clamp", lambda x: x.clamp(-0.1, 0.15), lambda x: np.clip(x, -0.1, 0.15), (3, 5)),
    _case("add", lambda a, b: a + b, np.add, (3, 5), (5,)),
    _case("sub", lambda a, b: a - b, np.subtract, (3, 1), (3, 5)),
    _case("mul", lambda a, b: a * b, np.multiply, (2, 3, 5), (3, 1)),
    _case("div", lambda a, b: a / b, np.divide, (3, 5), (1, 5)),
    _case("pow", lambda a, b: a**b, np.power, (3, 5), (3, 5), draw=positive),
    _case("maximum", lambda a, b: a.maximum(b), np.maximum, (3, 5), (3, 5)),
    _case("minimum", lambda a, b: a.minimum(b), np.minimum, (3, 5), (5,)),
    _case("add_scalar", lambda x: 2 - x * 3 + 1, lambda x: 3 - 3 * x, (4,)),
    _case("div_scalar", lambda x: 2 / x - x / 4, lambda x: 2 / x - x / 4, (4,)),
    _case("pow_scalar", lambda x: x**1.7, lambda x: x**1.7, (4,), draw=positive),
    _case("scalar_pow", lambda x: 1.3**x, lambda x: 1.3**x, (4,)),
    _case(
        "where", lambda c, a, b: tensor.where(c > 0, a, b), lambda c, a, b: np.where(c > 0, a, b), (3, 5), (5,), (3, 1)
    ),
    _case("where_scalar", lambda a: tensor.where(a > 0, a * a, 3.0), lambda a: np.where(a > 0, a * a, 3), (3, 5)),
    _case("fma", tensor.fma, lambda a, b, c: a * b + c, (3, 5), (5,), (3, 1)),
    _case("fuse", tensor.fuse(lambda a, b: a.silu() * b + a), lambda a, b: a / (1 + np.exp(-a)) * b + a, (3, 5), (5,)),
    _case("to", lambda x: x.to(x.kind) * 2, lambda x: 2 * x, (4,)),
    _case("clone", lambda x: x.clone(), lambda x: x, (4,)),
    _case("contiguous", lambda x: x.t().contiguous(), lambda x: x.T, (3, 5)),
]
REDUCTIONS = [
    _case("sum", lambda x: x.sum(), np.sum, (3, 5)),
    _case("sum, axes", lambda x: x.sum((0, 2)), lambda x: x.sum((0, 2)), (3, 4, 2)),
    _case("sum, kept", lambda x: x.sum(1, keepdim=True), lambda x: x.sum(1, keepdims=True), (3, 4, 2)),
    _case("mean", lambda x: x.mean(0), lambda x: x.mean(0), (3, 5)),
    _case("max", lambda x: x.max(1), lambda x: x.max(1), (3, 4), draw=distinct),
    _case("min", lambda x: x.min(), np.min, (3, 4), draw=distinct),
    _case("var", lambda x: x.var(1), lambda x: x.var(1, ddof=1), (3, 5)),
    _case("var, all", lambda x: x.var(correction=0), np.var, (3, 5)),
]
VIEWS = [
    _case("reshape", lambda x: x.reshape(5, -1), lambda x: x.reshape(5, 3), (3, 5)),
    _case("reshape of a transpose", lambda x: x.t().reshape(15), lambda x: x.T.reshape(15), (3, 5)),
    _case("view", lambda x: x.view(15), lambda x: x.reshape(15), (3, 5)),
    _case("permute", lambda x: x.permute(2, 0, 1), lambda x: x.transpose(2, 0, 1), (2, 3, 4)),
    _case("transpose", lambda x: x.transpose(0, 2), lambda x: x.swapaxes(0, 2), (2, 3, 4)),
    _case("t", lambda x: x.t(), np.transpose, (3, 5)),
    _case("expand", lambda x: x.expand(4, 3, 5), lambda x: np.broadcast_to(x, (4, 3, 5)), (3, 1)),
    _case("unsqueeze", lambda x: x.unsqueeze(1), lambda x: x[:, None], (3, 5)),
    _case("squeeze", lambda x: x.squeeze(1), lambda x: x[:, 0], (3, 1, 2)),
    _case("narrow", lambda x: x.narrow(1, 1, 3), lambda x: x[:, 1:4], (3, 5)),
    _case("getitem", lambda x: x[1:, None, ..., ::2], lambda x: x[1:, None, ..., ::2], (3, 4, 5)),
    _case("getitem, numbers", lambda x: x[-1, :, 0], lambda x: x[-1, :, 0], (3, 4, 5)),
    _case("split", lambda x: x.split([2, 3], 1)[1], lambda x: x[:, 2:], (3, 5)),
    _case("cat", lambda a, b: tensor.cat([a, b, a], 1), lambda a, b: np.concatenate([a, b, a], 1), (2, 3), (2, 1)),
    _case("stack", lambda a, b: tensor.stack([a, b], 1), lambda a, b: np.stack([a, b], 1), (2, 3), (2, 3)),
    _case("pad", lambda x: x.pad([(1, 0), (-1, 2)]), lambda x: np.pad(x[:, 1:], ((1, 0), (0, 2))), (3, 5)),
    _case("flip", lambda x: x.flip(1), lambda x: x[:, ::-1], (3, 5)),
    _case("triu", lambda x: x.triu(1), lambda x: np.triu(x, 1), (4, 5)),
]
OTHERS = [
    _case("index_select", lambda x: x.index_select(1, _index(_INDEX)), lambda x: x[:, _INDEX], (3, 4, 2)),
    _case("gather", lambda x: x.gather(1, _index(_EACH)), lambda x: np.take_along_axis(x, _EACH, 1), (3, 4)),
    _case("embedding", lambda w: tensor.embedding(_index(_EACH), w), lambda w: w[_EACH], (4, 3)),
    _case("softmax", lambda x: x.softmax(), _softmax, (3, 5)),
    _case("softmax, axis", lambda x: x.softmax(0), lambda x: _softmax(x, 0), (3, 5)),
    _case("log_softmax", lambda x: x.log_softmax(), lambda x: np.log(_softmax(x)), (3, 5)),
    _case("layer_norm", tensor.layer_norm, _layer_norm, (3, 7), (7,), (7,)),
    _case("layer_norm, plain", tensor.layer_norm, _layer_norm, (3, 7)),
    _case("rms_norm", tensor.rms_norm, _rms_norm, (3, 7), (7,)),
    _case("layer_norm, gradients in one pass", tensor.layer_norm, _layer_norm, (2, 256), (256,), (256,)),
    _case("rms_norm, gradients in one pass", tensor.rms_norm, _rms_norm, (2, 256), (256,)),
    _case("rms_norm, plain", tensor.rms_norm, _rms_norm, (2, 3, 7)),
    _case("group_norm", lambda x, w, b: tensor.group_norm(x, 2, w, b), _group_norm, (2, 4, 3), (4,), (4,)),
    _case("dropout", lambda x: x.dropout(0.4, seed=5), _dropped, (5, 7)),
    _case("matmul", lambda a, b: a @ b, np.matmul, (3, 5), (5, 4)),
    _case("matmul, transposed", lambda a, b: a.t() @ b.t(), lambda a, b: a.T @ b.T, (5, 3), (4, 5)),
    _case("matmul, scaled", lambda a, b: a.matmul(b, 0.3), lambda a, b: 0.3 * a @ b, (2, 3, 5), (2, 5, 4)),
    _case("matmul, batch", lambda a, b: a @ b, np.matmul, (2, 3, 5), (5, 4)),
    _case("matmul, batches", lambda a, b: a @ b, np.matmul, (2, 1, 3, 5), (3, 5, 4)),
    _case("matmul, vectors", lambda a, b: a @ b, np.matmul, (5,), (5, 4)),
    _case("matmul, column", lambda a, b: a @ b, np.matmul, (3, 5), (5,)),
    _case("bmm", lambda a, b: a.bmm(b.transpose()), lambda a, b: a @ b.swapaxes(1, 2), (2, 3, 5), (2, 4, 5)),
    _case("linear", tensor.linear, lambda x, w, b: x @ w.T + b, (2, 3, 5), (4, 5), (4,)),
    _case("linear, residual", lambda x, w, b, r: tensor.linear(x, w, b, r), lambda x, w, b, r: x @ w.T + b + r,
          (2, 3, 5), (4, 5), (4,), (2, 3, 4)),
    _case("hadamard_linear", lambda x, *f: tensor.hadamard_linear(x, _weight(), f, 0.5, _bias()),
          lambda x, a, b, c, d: x @ (_WEIGHT + 0.5 * (a @ b) * (c @ d)).T + _BIAS,
          (2, 3, 6), (4, 3), (3, 6), (4, 3), (3, 6)),
    _case("decomposed_linear",
          lambda x, d, u, m: tensor.decomposed_linear(x, _weight(), d, u, m, 0.5, _bias()),
          lambda x, d, u, m: x @ (m[:, None] * _directions(_WEIGHT + 0.5 * u @ d)).T + _BIAS,
          (2, 3, 6), (2, 6), (4, 2), (4,)),
    _case("decomposed_linear, eight ranks", lambda x, d, u, m: tensor.decomposed_linear(x, _weight(), d, u, m, 0.5),
          lambda x, d, u, m: x @ (m[:, None] * _directions(_WEIGHT + 0.5 * u @ d)).T, (3, 6), (8, 6), (4, 8), (4,)),
    _case("kronecker_linear", lambda x, w1, w2: tensor.kronecker_linear(x, _weight(), w1, [w2], _bias()),
          lambda x, w1, w2: x @ (_WEIGHT + np.kron(w1, w2)).T + _BIAS, (2, 3, 6), (2, 3), (2, 2)),
    _case("kronecker_linear, factored", lambda x, w1, a, b: tensor.kronecker_linear(x, _weight(), w1, [a, b]),
          lambda x, w1, a, b: x @ (_WEIGHT + np.kron(w1, a @ b)).T, (5, 6), (2, 2), (2, 1), (1, 3)),
    _case("scaled_dot_product_attention", tensor.scaled_dot_product_attention, _attention,
          (2, 5, 3), (2, 4, 3), (2, 4, 3)),
    _case("scaled_dot_product_attention, causal",
          lambda q, k, v: tensor.scaled_dot_product_attention(q, k, v, is_causal=True),
          lambda q, k, v: _attention(q, k, v, True), (1, 2, 3, 4), (1, 2, 5, 4), (1, 2, 5, 4)),
    _case("self_attention", lambda x: tensor.self_attention(x, 2), lambda x: _self_attention(x, 2), (2, 4, 12)),
    _case("low_rank_linear", lambda x, w, d, u, b: tensor.low_rank_linear(x, w, d, u, 0.5, b),
          lambda x, w, d, u, b: x @ (w + 0.5 * u @ d).T + b, (2, 3, 5), (4, 5), (2, 5), (4, 2), (4,)),
    _case("low_rank_linear, eight ranks", lambda x, w, d, u: tensor.low_rank_linear(x, w, d, u, 0.5),
          lambda x, w, d, u: x @ (w + 0.5 * u @ d).T, (3, 5), (4, 5), (8, 5), (4, 8)),
    _case("low_rank_linear, residual", lambda x, w, d, u, b, r: tensor.low_rank_linear(x, w, d, u, 0.5, b, r),
          lambda x, w, d, u, b, r: x @ (w + 0.5 * u @ d).T + b + r, (3, 5), (4, 5), (2, 5), (4, 2), (4,), (3, 4)),
    _case("low_rank_linear, eight ranks and residual",
          lambda x, w, d, u, r: tensor.low_rank_linear(x, w, d, u, 0.5, None, r),
          lambda x, w, d, u, r: x @ (w + 0.5 * u @ d).T + r, (2, 3, 5), (4, 5), (8, 5), (4, 8), (2, 3, 4)),
    _case("cross_entropy", lambda x: tensor.cross_entropy(x, _index(_TARGET)), _cross_entropy, (4, 5)),
    _case("cross_entropy_loss", lambda x: tensor.cross_entropy_loss(x, _index(_TARGET)),
          lambda x: _cross_entropy(x).mean(), (4, 5)),
    _case("linear_cross_entropy",
          lambda x, w, b: tensor.linear_cross_entropy(x, w, _index(_TARGET), b, chunk=3) * 2,
          lambda x, w, b: 2 * _cross_entropy(x @ w.T + b).mean(), (4, 3), (5, 3), (5,)),
    _case("mse_loss", tensor.mse_loss, lambda x, y: ((x - y) ** 2).mean(), (3, 5), (3, 5)),
    _case("l1_loss", tensor.l1_loss, lambda x, y: np.abs(x - y).mean(), (3, 5), (3, 5)),
    _case("huber_loss", lambda x, y: tensor.huber_loss(x, y, 0.7), _huber, (3, 5), (3, 5)),
    _case("bce_with_logits_loss", tensor.bce_with_logits_loss,
          lambda x, y: (np.maximum(x, 0) - x * y + np.log1p(np.exp(-np.abs(x)))).mean(), (3, 5), (3, 5)),
    _case("checkpoint", lambda x, w: tensor.checkpoint(lambda a, b: (a @ b).gelu() * 2, x, w),
          lambda x, w: (x @ w) * (1 + erf(x @ w / math.sqrt(2))), (3, 5), (5, 4)),
]  # fmt: skip
CASES = POINTWISE + REDUCTIONS + VIEWS + OTHERS
