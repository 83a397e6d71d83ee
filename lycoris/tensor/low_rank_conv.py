"""A convolution with a low-rank adapter: base and adapter in one sum, rounded once, forwards and for the gradient of x.

With t = x * down, [N, *output axes, rank], and u = s g up:

    y = x * W + b + s t up^T        d_x = g * W + u * down (both transposed)        d_down = u^T x        d_up = s g^T t

t and u are rounded to x's kind, the adapter's terms are added in fp32. The base is frozen, and given as it is stored
for the kernels, so that a step does not turn it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from lycoris.errors import RefusedInput
from lycoris.tensor import autograd, pointwise
from lycoris.tensor.adapter_gradients import low_rank_gradients
from lycoris.tensor.convolution import (
    Window,
    channels_last,
    convolved,
    geometry_of,
    input_gradient,
    ready,
    weight_gradient,
)
from lycoris.tensor.launch import converted, same_device, shaped
from lycoris.tensor.products import bias_gradient, flipped, product
from lycoris.tensor.tensor import Tensor
from plans.core import ElementKind

F32 = ElementKind.F32


def low_rank_conv(
    x: Tensor,
    weight: Tensor,
    stored: Tensor,
    down: Tensor,
    up: Tensor,
    scale: float = 1.0,
    bias: Tensor | None = None,
    window: Window | None = None,
) -> Tensor:
    """The sum conv(x, weight) + bias + scale * conv(x, down) @ up.T: a frozen convolution with LoCon beside it.

    x [N, *axes, C], weight [out, C, *kernel] and ``stored``, which is `channels_last` of it, down [rank, C, *kernel],
    up [out, rank], all of one kind; no groups. Gradients for x, down, up and bias. Raises RefusedInput where shapes do
    not fit.
    """
    window = window or Window()
    rank = down.shape[0]
    if down.shape[1:] != weight.shape[1:] or up.shape != (weight.shape[0], rank) or window.groups != 1:
        raise RefusedInput(
            f"low_rank_conv: down {down.shape} and up {up.shape}, wanted {(rank, *weight.shape[1:])} and "
            f"{(weight.shape[0], rank)}, and no groups; give the factors of this weight"
        )
    inputs = (x, down, up) if bias is None else (x, down, up, bias)
    same_device("low_rank_conv", (weight, *inputs))
    kind = pointwise.result_kind("low_rank_conv", (x, weight, down, up))
    geometry = geometry_of(x.shape, weight.shape, window)
    inner = dataclasses.replace(geometry, out_channels=rank)
    rows, low, high = ready(x), channels_last(down), ready(up)
    pixels, out = geometry.out_pixels, weight.shape[0]
    t = shaped(convolved(rows, low, inner, kind), (pixels, rank))
    term = shaped(product(t, flipped(high), F32, scale), geometry.y_shape)
    y = convolved(rows, stored, geometry, kind, None if bias is None else bias.detach(), term)
    if not autograd.wanted(inputs):
        return y

    def pull(g: Tensor, edges: Sequence[autograd.Node | None]) -> list[Tensor | None]:
        g, d_x, d_down, d_up = ready(g), None, None, None
        flat = shaped(g, (pixels, out))
        if edges[0] or edges[1]:
            turned = flipped(converted(flipped(high), high.kind))
            u = shaped(product(flat, turned, g.kind, scale), inner.y_shape)
        if edges[0]:
            d_x = input_gradient(g, stored, geometry, edges[0].kind, input_gradient(u, low, inner, F32))
        if edges[1]:
            d_down = weight_gradient(u, rows, inner, down.shape, edges[1].kind)
        if edges[2]:
            _, d_up = low_rank_gradients(None, (flat, t), edges[2].kind, scale)
        return [d_x, d_down, d_up, *(bias_gradient(flat, edge.kind) if edge else None for edge in edges[3:])]

    return autograd.record("low_rank_conv", y, inputs, (rows, stored, low, high), pull)
