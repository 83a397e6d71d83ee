"""Layers with weights: linear, embedding, normalisations; dropout; attention and the block of a transformer."""

from __future__ import annotations

import math

from lycoris import tensor
from lycoris.errors import RefusedInput
from lycoris.nn.module import Module
from lycoris.tensor import Generator, Tensor
from plans.core import Device, ElementKind

F32 = ElementKind.F32


class Linear(Module):
    """y = x W^T + b: weight [out, in], bias [out]; both start uniform in +-1 / sqrt(in), as torch.nn.Linear's do."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        kind: ElementKind = F32,
        device: Device | None = None,
        generator: Generator | None = None,
    ) -> None:
        if in_features < 1 or out_features < 1:
            raise RefusedInput(
                f"Linear: {in_features} to {out_features} features, wanted 1 or more of each; give the layer's widths"
            )
        bound = 1 / math.sqrt(in_features)
        options = {"kind": kind, "device": device, "generator": generator, "requires_grad": True}
        self.weight = tensor.rand((out_features, in_features), -bound, bound, **options)
        self.bias = tensor.rand((out_features,), -bound, bound, **options) if bias else None

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Of x [..., in] gives [..., out], plus a tensor of that shape."""
        return tensor.linear(x, self.weight, self.bias, residual)


class Embedding(Module):
    """Rows of a table [count, width] by index; the table starts normal with deviation 0.02."""

    def __init__(
        self,
        count: int,
        width: int,
        *,
        kind: ElementKind = F32,
        device: Device | None = None,
        generator: Generator | None = None,
    ) -> None:
        self.weight = tensor.randn(
            (count, width), 0.0, 0.02, kind=kind, device=device, generator=generator, requires_grad=True
        )

    def forward(self, index: Tensor) -> Tensor:
        """Of an index [...] of i32 or i64 gives [..., width]."""
        return tensor.embedding(index, self.weight)


class LayerNorm(Module):
    """Layer normalisation over the last axis, with weight and bias [width]."""

    def __init__(self, width: int, eps: float = 1e-5, *, kind: ElementKind = F32, device: Device | None = None) -> None:
        self.weight = tensor.ones((width,), kind, device, requires_grad=True)
        self.bias = tensor.zeros((width,), kind, device, requires_grad=True)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Of x [..., width] gives the same shape."""
        return tensor.layer_norm(x, self.weight, self.bias, self.eps)


class RMSNorm(Module):
    """Root mean square normalisation over the last axis, with weight [width]."""

    def __init__(self, width: int, eps: float = 1e-6, *, kind: ElementKind = F32, device: Device | None = None) -> None:
        self.weight = tensor.ones((width,), kind, device, requires_grad=True)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Of x [..., width] gives the same shape."""
        return tensor.rms_norm(x, self.weight, self.eps)


class GroupNorm(Module):
    """Group normalisation of [N, channels, *space], with weight and bias [channels]."""

    def __init__(
        self, groups: int, channels: int, eps: float = 1e-5, *, kind: ElementKind = F32, device: Device | None = None
    ) -> None:
        if groups < 1 or channels % groups:
            raise RefusedInput(
                f"GroupNorm: {groups} groups of {channels} channels, wanted a divisor; give another number of groups"
            )
        self.weight = tensor.ones((channels,), kind, device, requires_grad=True)
        self.bias = tensor.zeros((channels,), kind, device, requires_grad=True)
        self.groups, self.eps = groups, eps

    def forward(self, x: Tensor) -> Tensor:
        """Of x [N, channels, *space] gives the same shape."""
        return tensor.group_norm(x, self.groups, self.weight, self.bias, self.eps)


class Dropout(Module):
    """Zeros with probability p while training, from a generator; otherwise x itself."""

    def __init__(self, p: float = 0.5, *, generator: Generator | None = None) -> None:
        if not 0 <= p < 1:
            raise RefusedInput(f"Dropout: p is {p}, wanted 0 up to, not including, 1; give a probability there")
        self.p, self.generator = p, generator

    def forward(self, x: Tensor) -> Tensor:
        """Of x gives the same shape."""
        return tensor.dropout(x, self.p, generator=self.generator) if self.training and self.p else x


class SelfAttention(Module):
    """Multi-head self-attention, arXiv:1706.03762: softmax(Q K^T / sqrt(width of a head)) V, no scores in memory."""

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        kind: ElementKind = F32,
        device: Device | None = None,
        generator: Generator | None = None,
    ) -> None:
        if heads < 1 or width % heads:
            raise RefusedInput(
                f"SelfAttention: {heads} heads of width {width}, wanted a divisor; give another number of heads"
            )
        self.heads = heads
        self.qkv = Linear(width, 3 * width, kind=kind, device=device, generator=generator)
        self.out = Linear(width, width, kind=kind, device=device, generator=generator)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Of x [batch, length, width] gives the same shape, plus a tensor of that."""
        return self.out(tensor.self_attention(self.qkv(x), self.heads), residual)


class MLP(Module):
    """Linear, GELU, linear."""

    def __init__(
        self,
        width: int,
        hidden: int,
        *,
        kind: ElementKind = F32,
        device: Device | None = None,
        generator: Generator | None = None,
    ) -> None:
        self.up = Linear(width, hidden, kind=kind, device=device, generator=generator)
        self.down = Linear(hidden, width, kind=kind, device=device, generator=generator)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Of x [..., width] gives the same shape, plus a tensor of that."""
        return self.down(self.up(x).gelu(), residual)


class TransformerBlock(Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), with layer normalisation before each, arXiv:2002.04745."""

    def __init__(
        self,
        width: int,
        heads: int,
        expansion: int = 4,
        dropout: float = 0.0,
        *,
        kind: ElementKind = F32,
        device: Device | None = None,
        generator: Generator | None = None,
    ) -> None:
        options = {"kind": kind, "device": device}
        self.norm1 = LayerNorm(width, **options)
        self.attention = SelfAttention(width, heads, **options, generator=generator)
        self.norm2 = LayerNorm(width, **options)
        self.mlp = MLP(width, expansion * width, **options, generator=generator)
        self.dropout = Dropout(dropout, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        """Of x [batch, length, width] gives the same shape."""
        if self.dropout.training and self.dropout.p:
            x = x + self.dropout(self.attention(self.norm1(x)))
            return x + self.dropout(self.mlp(self.norm2(x)))
        x = self.attention(self.norm1(x), x)
        return self.mlp(self.norm2(x), x)
