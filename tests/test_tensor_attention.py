"""Attention on tensors: what PyTorch's function of that name takes, without copies, the same as its parts give."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lycoris import nn, tensor
from lycoris.errors import RefusedInput
from lycoris.tensor import Generator, attention
from plans.core import ElementKind

BF16, F16, F32, I32 = ElementKind.BF16, ElementKind.F16, ElementKind.F32, ElementKind.I32
sdpa = tensor.scaled_dot_product_attention


def drawn(rng, *shape, kind=F32, grad=False):
    return tensor.from_numpy(rng.standard_normal(shape).astype(np.float32), kind=kind, requires_grad=grad)


def numbers(x):
    return x.numpy().astype(np.float64)


def exact(q, k, v, mask=0.0, scale=None):
    q, k, v = (numbers(x) for x in (q, k, v))
    k, v = (np.repeat(x, q.shape[-3] // x.shape[-3], -3) for x in (k, v))
    scores = q @ np.swapaxes(k, -1, -2) * (1 / math.sqrt(q.shape[-1]) if scale is None else scale) + mask
    powers = np.exp(scores - scores.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True) @ v


def close(found, wanted, kind=F32):
    # One rounding to the kind, and for 16-bit kinds another of each weight.
    np.testing.assert_allclose(numbers(found), wanted, atol={F32: 1e-5, F16: 4e-3, BF16: 3e-2}[kind])


@pytest.mark.parametrize("kind", [F32, BF16, F16], ids=lambda kind: kind.value)
@pytest.mark.parametrize("lead", [(), (2,), (1, 2), (2, 1, 2)], ids=str)
def test_any_number_of_axes_before(rng, kind, lead):
    q, k, v = (drawn(rng, *lead, tokens, 8, kind=kind) for tokens in (5, 3, 3))
    out = sdpa(q, k, v, scale=0.5)
    assert (out.shape, out.kind) == (q.shape, kind)
    if lead:
        close(out, exact(q, k, v, scale=0.5), kind)


def test_masks_are_added_or_choose(rng):
    q, k, v = (drawn(rng, 2, 3, tokens, 4) for tokens in (5, 6, 6))
    added = drawn(rng, 3, 1, 6)
    close(sdpa(q, k, v, added), exact(q, k, v, numbers(added)))
    chosen = tensor.from_numpy(np.array([1, 0, 2, 1, 0, 1], np.int32))
    close(sdpa(q, k, v, chosen), exact(q, k, v, np.where(chosen.numpy() != 0, 0, -np.inf)))


def test_heads_that_share_keys(rng):
    q, k, v = drawn(rng, 1, 4, 3, 8, grad=True), *(drawn(rng, 1, 2, 5, 8, grad=True) for _ in range(2))
    out = sdpa(q, k, v, enable_gqa=True)
    close(out, exact(q, k, v))
    out.sum().backward()
    repeated = [tensor.from_numpy(np.repeat(x.numpy(), 2, 1), requires_grad=True) for x in (k, v)]
    sdpa(q.detach(), *repeated).sum().backward()
    for x, whole in zip((k, v), repeated, strict=True):
        np.testing.assert_allclose(x.grad.numpy(), whole.grad.numpy().reshape(1, 2, 2, 5, 8).sum(2), atol=1e-5)


def test_queries_behind_cached_keys(rng):
    q, k, v = (drawn(rng, 1, 2, tokens, 4) for tokens in (3, 7, 7))
    found = sdpa(q, k, v, is_causal=True, diagonal=4)
    hidden = np.arange(7) > np.arange(3)[:, None] + 4
    close(found, exact(q, k, v, np.where(hidden, -np.inf, 0)))


def test_heads_are_taken_as_they_lie(rng, monkeypatch):
    """No copy of q, k and v in heads, nor of the result."""

    def refuse(*_):
        raise AssertionError("copied")

    monkeypatch.setattr(attention, "converted", refuse)
    x = drawn(rng, 2, 5, 3, 2, 8, kind=BF16)
    q, k, v = (part.squeeze(2).permute(0, 2, 1, 3) for part in x.split(1, 2))
    assert sdpa(q, k, v).permute(0, 2, 1, 3).is_contiguous


def test_tensors_that_kernels_do_not_take_are_copied(rng):
    wide = drawn(rng, 1, 2, 5, 9, kind=BF16)
    q = wide[..., 1:]
    k, v = (drawn(rng, 1, 2, 8, 5, kind=BF16).transpose() for _ in range(2))
    close(sdpa(q, k, v), exact(q, k, v), BF16)


@pytest.mark.parametrize("kind", [F32, BF16], ids=lambda kind: kind.value)
def test_packed_attention_is_that_of_its_parts(rng, kind):
    qkv, g = drawn(rng, 2, 5, 48, kind=kind, grad=True), drawn(rng, 2, 5, 16, kind=kind)
    packed = tensor.self_attention(qkv, 2)
    packed.backward(g)
    again = tensor.from_numpy(qkv.numpy(), kind=kind, requires_grad=True)
    q, k, v = (part.squeeze(2).permute(0, 2, 1, 3) for part in again.reshape(2, 5, 3, 2, 8).split(1, 2))
    parts = sdpa(q, k, v).permute(0, 2, 1, 3).reshape(2, 5, 16)
    parts.backward(g)
    np.testing.assert_array_equal(packed.numpy(), parts.numpy())
    np.testing.assert_array_equal(qkv.grad.numpy(), again.grad.numpy())


def test_self_attention_is_what_it_is_composed_of(rng):
    layer, x = nn.SelfAttention(8, 2, generator=Generator(5)), drawn(rng, 2, 5, 8, grad=True)
    found = layer(x)
    found.sum().backward()
    grads = [p.grad.numpy() for p in (x, layer.qkv.weight, layer.out.weight)]
    for p in (x, layer.qkv.weight, layer.out.weight):
        p.grad = None
    q, k, v = layer.qkv(x).reshape(2, 5, 3, 2, 4).permute(2, 0, 3, 1, 4).split(1)
    mixed = q[0].matmul(k[0].transpose(), 0.5).softmax() @ v[0]
    composed = layer.out(mixed.permute(0, 2, 1, 3).reshape(2, 5, 8))
    np.testing.assert_allclose(found.numpy(), composed.numpy(), atol=1e-5)
    composed.sum().backward()
    for found, p in zip(grads, (x, layer.qkv.weight, layer.out.weight), strict=True):
        np.testing.assert_allclose(found, p.grad.numpy(), atol=2e-5)


def test_only_wanted_gradients_are_computed(rng):
    q, k, v = drawn(rng, 1, 1, 3, 8, grad=True), *(drawn(rng, 1, 1, 4, 8) for _ in range(2))
    sdpa(q, k, v).sum().backward()
    assert q.grad is not None
    assert k.grad is None
    q, v = q.detach(), drawn(rng, 1, 1, 4, 8, grad=True)
    sdpa(q, k, v).sum().backward()
    np.testing.assert_allclose(v.grad.numpy().sum(), 3 * 8, rtol=1e-5)


@pytest.mark.parametrize(
    ("reason", "shapes", "options"),
    [
        ("dropout_p is 0.1, wanted 0", [(2, 3, 8)] * 3, {"dropout_p": 0.1}),
        ("one width", [(2, 3, 8), (2, 3, 4), (2, 3, 4)], {}),
        ("k and v of one shape", [(2, 3, 8), (2, 3, 8), (2, 4, 8)], {}),
        ("as many axes", [(2, 3, 8), (3, 8), (3, 8)], {}),
        ("4 heads of q and 2 of k", [(4, 3, 8), (2, 3, 8), (2, 3, 8)], {}),
        ("4 heads of q and 3 of k", [(4, 3, 8), (3, 3, 8), (3, 3, 8)], {"enable_gqa": True}),
    ],
)
def test_bad_input_is_refused(rng, reason, shapes, options):
    with pytest.raises(RefusedInput, match=reason):
        sdpa(*(drawn(rng, *shape) for shape in shapes), **options)


def test_bad_masks_and_kinds_are_refused(rng):
    q = drawn(rng, 2, 3, 8)
    with pytest.raises(RefusedInput, match="attn_mask f32 \\(4, 3\\), wanted"):
        sdpa(q, q, q, drawn(rng, 4, 3))
    with pytest.raises(RefusedInput, match="is_causal beside attn_mask"):
        sdpa(q, q, q, drawn(rng, 3, 3), is_causal=True)
    with pytest.raises(RefusedInput, match="requires a gradient"):
        sdpa(q, q, q, drawn(rng, 3, 3, grad=True))
    with pytest.raises(RefusedInput, match="q, k, v of f32, bf16, f32"):
        sdpa(q, drawn(rng, 2, 3, 8, kind=BF16), q)
    with pytest.raises(RefusedInput, match="wanted \\[batch, tokens, 3 \\* heads \\* width\\]"):
        tensor.self_attention(drawn(rng, 2, 3, 20), 2)
