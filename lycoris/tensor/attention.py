"""Scaled dot-product attention with gradients, of separate q, k and v and of what one product made of all three.

Scores never go to memory, neither here nor on the way back, which needs the result and a number of each query.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from lycoris.errors import RefusedInput
from lycoris.tensor import autograd, views
from lycoris.tensor.launch import broadcast_strides, compact, converted, empty, run, same_device
from lycoris.tensor.tensor import FLOATS, Shape, Tensor
from plans.attention import (
    AttentionArgs,
    AttentionBackwardArgs,
    AttentionBackwardDescriptor,
    AttentionBackwardPlan,
    AttentionDescriptor,
    AttentionPlan,
    Mask,
)
from plans.core import ElementKind, TensorMut

_NAME = "scaled_dot_product_attention"
_UNIT = 8


def scaled_dot_product_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    diagonal: int = 0,
) -> Tensor:
    """softmax(scale q k^T + mask) v over the last two axes, as PyTorch's function of this name.

    q [..., heads, queries, width], k and v [..., heads, keys, width], of one kind, with any strides of the outer axes.
    ``attn_mask`` repeats to [..., heads, queries, keys]: of a floating kind it is added, of i32 the keys where it is 0
    take no part; it has no gradient. ``is_causal``: query i sees the keys up to i + ``diagonal`` (keys - queries for
    queries behind cached keys). ``scale`` is 1 / sqrt(width) where none is given. With ``enable_gqa`` k and v may have
    fewer heads, a divisor of q's. A query that sees no key gives zeros. The result lies in memory as
    [..., queries, heads, width]. Raises RefusedInput where shapes or kinds differ, and for a dropout.
    """
    _check(q, k, v, attn_mask, dropout_p, is_causal, enable_gqa)
    shape = q.shape
    inputs = tuple(_by_batch(x) for x in (q, k, v))
    mask = None if attn_mask is None else _mask_of(attn_mask, (*shape[:-1], k.shape[-2]))
    out = _attend(inputs, mask, is_causal, diagonal, scale)
    return out if out.ndim == len(shape) else views.reshape(out, *shape)


def _check(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout_p: float, is_causal: bool, enable_gqa: bool
) -> None:
    if dropout_p:
        raise RefusedInput(
            f"{_NAME}: dropout_p is {dropout_p}, wanted 0: weights are not in memory to be dropped; "
            "drop elements of the result, by tensor.dropout"
        )
    shapes = f"q {q.shape}, k {k.shape}, v {v.shape}"
    if min(q.ndim, k.ndim, v.ndim) < 2 or not q.ndim == k.ndim == v.ndim or q.shape[-1] != k.shape[-1]:
        raise RefusedInput(f"{_NAME}: {shapes}, wanted as many axes, 2 or more, and one width; reshape one of them")
    if k.shape != v.shape or q.shape[:-3] != k.shape[:-3]:
        raise RefusedInput(f"{_NAME}: {shapes}, wanted k and v of one shape, and q's batch; expand or reshape them")
    if q.kind is not k.kind or q.kind is not v.kind or q.kind not in FLOATS:
        kinds = ", ".join(x.kind.value for x in (q, k, v))
        raise RefusedInput(f"{_NAME}: q, k, v of {kinds}, wanted one of bf16, f16, f32 for all; call to() first")
    heads, key_heads = (x.shape[-3] if x.ndim > 2 else 1 for x in (q, k))
    if heads != key_heads and not (enable_gqa and key_heads and heads % key_heads == 0):
        raise RefusedInput(
            f"{_NAME}: {heads} heads of q and {key_heads} of k, wanted as many; repeat k and v, or pass "
            "enable_gqa=True where they are a divisor"
        )
    if mask is not None and (is_causal or mask.requires_grad):
        wrong = "is_causal beside attn_mask" if is_causal else "attn_mask requires a gradient, there is none"
        raise RefusedInput(f"{_NAME}: {wrong}; put the triangle into the mask, or detach() it")
    same_device(_NAME, (q, k, v) if mask is None else (q, k, v, mask))


def _by_batch(x: Tensor) -> Tensor:
    """[batch, heads, tokens, width], the axes before counted as one."""
    while x.ndim < 4:
        x = views.unsqueeze(x, 0)
    return x if x.ndim == 4 else views.reshape(x, math.prod(x.shape[:-3]), *x.shape[-3:])


def _mask_of(mask: Tensor, shape: Shape) -> Tensor:
    """A mask with every axis, repeated to the shape of the scores. Raises RefusedInput where it does not repeat."""
    mask = mask.detach()
    fits = mask.ndim <= len(shape) and all(
        extent in (1, wanted) for extent, wanted in zip(mask.shape[::-1], shape[::-1], strict=False)
    )
    if not fits or mask.kind not in (*FLOATS, ElementKind.I32):
        raise RefusedInput(
            f"{_NAME}: attn_mask {mask.kind.value} {mask.shape}, wanted bf16, f16, f32 or i32 that repeats to {shape}; "
            "reshape or convert it"
        )
    return _by_batch(mask.viewed(shape, broadcast_strides(mask, shape)))


def _ready(x: Tensor) -> Tensor:
    """The elements without a graph: as they lie, or a copy where kernels would not take that."""
    x = x.detach()
    side_by_side = x.strides[-1] == 1 or x.shape[-1] == 1
    fits = x.aligned and not any(s % _UNIT and e > 1 for s, e in zip(x.strides[:-1], x.shape[:-1], strict=True))
    if side_by_side and (fits or x.kind is ElementKind.F32 or x.shape[-1] % _UNIT):
        return x
    return converted(x, x.kind)


def _side_by_side(like: Tensor) -> Tensor:
    """A new tensor of the same shape, [batch, heads, tokens, width], that lies as [batch, tokens, heads, width]."""
    heads, tokens, width = like.shape[1:]
    out = empty(like.shape, like.kind, like.device)
    return out.viewed(like.shape, (tokens * heads * width, width, heads * width, 1))


def _problem(
    inputs: Sequence[Tensor], mask: Tensor | None, is_causal: bool, diagonal: int, out: Tensor
) -> AttentionDescriptor:
    q, k, v = inputs
    batch, heads, queries, width = q.shape
    return AttentionDescriptor(
        batch, heads, queries, k.shape[2], width, q.kind, k.shape[1] if k.shape[1] != heads else 0, is_causal,
        diagonal if is_causal else 0, None if mask is None else Mask(mask.kind, mask.strides),
        *(x.strides[:3] for x in (out, q, k, v)),
    )  # fmt: skip


def _forward(
    inputs: Sequence[Tensor], mask: Tensor | None, is_causal: bool, diagonal: int, scale: float | None
) -> tuple[AttentionDescriptor, Tensor, Tensor]:
    """The problem, the result and its log-sum-exps; no gradients."""
    q = inputs[0]
    out, lse = _side_by_side(q), empty(q.shape[:3], ElementKind.F32, q.device)
    descriptor = _problem(inputs, mask, is_causal, diagonal, out)
    plan = AttentionPlan.select(None, descriptor, device=q.device)
    refs = (x.ref() for x in inputs)
    run(plan, AttentionArgs(out.mut(), lse.mut(), *refs, None if mask is None else mask.ref(), scale))
    return descriptor, out, lse


def _backward(
    descriptor: AttentionBackwardDescriptor,
    results: Sequence[TensorMut],
    g: Tensor,
    saved: Sequence[Tensor],
    mask: Tensor | None,
    scale: float | None,
) -> None:
    """Gradients to the results, for that of the result; ``saved`` is it, the log-sum-exps, q, k and v."""
    plan = AttentionBackwardPlan.select(None, descriptor, device=g.device)
    reads = [x.ref() for x in ((g, *saved) if mask is None else (g, *saved, mask))]
    run(plan, AttentionBackwardArgs(results, reads, scale))


def _attend(
    inputs: Sequence[Tensor], mask: Tensor | None, is_causal: bool, diagonal: int, scale: float | None
) -> Tensor:
    """Attention of [batch, heads, tokens, width], recorded where a gradient is wanted."""
    ready = tuple(_ready(x) for x in inputs)
    descriptor, out, lse = _forward(ready, mask, is_causal, diagonal, scale)
    if not autograd.wanted(inputs):
        return out
    result = out.detach()

    def pull(g: Tensor, edges: Sequence[autograd.Node | None]) -> list[Tensor | None]:
        g, query, key_value = _ready(g), edges[0] is not None, any(edges[1:])
        wanted = (query, key_value, key_value)  # those of k and v are made together
        made = [_side_by_side(x) if made else None for x, made in zip(ready, wanted, strict=True)]
        strides = [None if x is None else x.strides[:3] for x in made]
        problem = AttentionBackwardDescriptor(descriptor, query, key_value, g.strides[:3], *strides)
        _backward(problem, [x.mut() for x in made if x is not None], g, (result, lse, *ready), mask, scale)
        return [
            None if edge is None else x if x.kind is edge.kind else converted(x, edge.kind)
            for x, edge in zip(made, edges, strict=True)
        ]

    return autograd.record("attention", out, inputs, (*ready, result), pull)


def self_attention(qkv: Tensor, heads: int, is_causal: bool = False, scale: float | None = None) -> Tensor:
    """Attention among the tokens of [batch, tokens, 3 * width], which holds q, k and v one after the other.

    Gives [batch, tokens, width], each in heads side by side; gradients are written where qkv's are wanted, so that
    nothing is copied. Raises RefusedInput where the last axis is not three times a multiple of ``heads``.
    """
    if qkv.ndim != 3 or heads < 1 or qkv.shape[-1] % (3 * heads):
        raise RefusedInput(
            f"self_attention: qkv {qkv.shape} for {heads} heads, wanted [batch, tokens, 3 * heads * width]; reshape it"
        )
    batch, tokens, columns = qkv.shape
    width = columns // (3 * heads)
    whole = compact(qkv.detach())
    strides = (tokens * columns, width, columns, 1)
    parts = [whole.viewed((batch, heads, tokens, width), strides, whole.offset + i * heads * width) for i in range(3)]
    inputs = [_ready(part) for part in parts]
    descriptor, mixed, lse = _forward(inputs, None, is_causal, 0, scale)
    out = mixed.viewed((batch, tokens, heads * width))
    if not autograd.wanted((qkv,)):
        return out

    def pull(g: Tensor, edges: Sequence[autograd.Node | None]) -> list[Tensor]:
        g = compact(g.detach())
        g = _ready(g.viewed(mixed.shape, mixed.strides))
        d_qkv = empty(whole.shape, whole.kind, whole.device)
        packed = (heads * width, *strides[:3])
        results = d_qkv.viewed((3, *mixed.shape), (*packed, 1))
        problem = AttentionBackwardDescriptor(descriptor, d_out_strides=g.strides[:3], packed=packed)
        _backward(problem, [results.mut()], g, (mixed, lse, *inputs), None, scale)
        return [d_qkv if d_qkv.kind is edges[0].kind else converted(d_qkv, edges[0].kind)]

    return autograd.record("self_attention", out, (qkv,), (whole, mixed), pull)
