"""A convolution with live adapters: the base and its adapters' terms added up in fp32, or a kept merged weight.

    layer = AdaptedConv(weight, bias, padding=1)        # weight [out, in / groups, *kernel]
    layer.add("style", module, strength=0.8)
    y = layer(x)                                        # x [N, *axes, C]

Separate: a LoCon is a convolution with its down factor (or a product with it and a convolution with its Tucker core),
then a product with its up factor; every other adapter is a convolution with its delta. Their sum stays in fp32 and is
added to the base's before the one rounding.
"""

from __future__ import annotations

from collections.abc import Mapping

from lycoris import tensor
from lycoris.algorithms.terms import diff_weight
from lycoris.errors import RefusedInput
from lycoris.formats.keys import DOWN, MID, UP
from lycoris.nn.adapted import Adapted, Adapter
from lycoris.ops.weight import delta
from lycoris.tensor import Tensor, autograd, from_array
from lycoris.tensor.convolution import Extents, Window, channels_last, conv, convolved, geometry_of, ready
from lycoris.tensor.launch import shaped
from lycoris.tensor.low_rank_conv import low_rank_conv
from lycoris.tensor.products import flipped, sum_of_products
from lycoris.tensor.views import permute
from plans.convolution import Convolution
from plans.core import ElementKind


class AdaptedConv(Adapted):
    """y = x * W + b + sum_i s_i x * dW_i in one to three axes; see `lycoris.nn.adapted` for the modes.

    x is [N, *axes, C], or [N, C, *axes] with ``channels_first``, and so is y. Gradients reach x and every adapter's
    factors; the base is frozen. Raises RefusedInput where x does not fit.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Extents = 1,
        padding: Extents = 0,
        dilation: Extents = 1,
        groups: int = 1,
        *,
        channels_first: bool = False,
        mode: str | None = None,
    ) -> None:
        super().__init__(weight, bias, mode=mode)
        if not 3 <= weight.ndim <= 5:
            raise RefusedInput(
                f"AdaptedConv: weight {weight.shape}, wanted [out, in / groups, *kernel]; use AdaptedLinear for a "
                "matrix"
            )
        self.window, self.channels_first = Window(stride, padding, dilation, groups), channels_first

    def __call__(self, x: Tensor) -> Tensor:
        """See the class."""
        return self.forward(x)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        if x.kind is not self.weight.kind or x.device is not self.weight.device:
            raise RefusedInput(
                f"AdaptedConv: x of {x.kind.value} on {x.device.name}, wanted {self.weight.kind.value} on "
                f"{self.weight.device.name}; call to({self.weight.kind.value}), or bring it there"
            )
        if self.channels_first:
            axes = self.weight.ndim - 2
            return permute(self._forward(permute(x, 0, *range(2, x.ndim), 1)), 0, axes + 1, *range(1, axes + 1))
        return self._forward(x)

    def _forward(self, x: Tensor) -> Tensor:
        found = self.active()
        mode = self.mode or ("separate" if self.training else "merged")
        dora = bool(found) and found[0].module.dora_scale is not None
        if autograd.wanted((x, *(factor for adapter in found for factor in adapter.tensors.values()))):
            return self._dora(x, found[0]) if dora else self._differentiable(x, found)
        geometry = geometry_of(x.shape, self.weight.shape, self.window)
        x, bias = ready(x), self.merged_bias()
        if mode == "merged" or dora or not found:
            weight: Tensor = self._kept("merged, channels last", lambda: channels_last(self.merged_weight()))
            return convolved(x, weight, geometry, x.kind, bias)
        return convolved(x, self._stored(), geometry, x.kind, bias, self._terms(x, found, geometry))

    def _stored(self) -> Tensor:
        """The base as kernels read it."""
        return self._kept("base, channels last", lambda: channels_last(self.weight), ())

    def _terms(self, x: Tensor, found: list[Adapter], geometry: Convolution) -> Tensor:
        """The adapters' terms, summed in fp32: LoCons' as one product, then a convolution with each other's delta."""
        factored = [adapter for adapter in found if self._factored(adapter)]
        term = self._products(x, factored) if factored else None
        for weight in self._kept("deltas", lambda: [self._delta(a) for a in found if not self._factored(a)]):
            term = convolved(x, weight, geometry, ElementKind.F32, None, term)
        return term

    def _products(self, x: Tensor, factored: list[Adapter]) -> Tensor:
        """The sum of scale * inner @ up.T over LoCons, fp32, [N, *output axes, out]."""
        with autograd.no_grad():
            inner = [ready(self._inner(x, adapter)) for adapter in factored]
            ups = [ready(_matrix(adapter.tensors, UP, x)) for adapter in factored]
        rows, out = inner[0].size // max(1, inner[0].shape[-1]), self.weight.shape[0]
        flat = [shaped(t, (rows, t.shape[-1])) for t in inner]
        total = sum_of_products(
            [(t, flipped(up)) for t, up in zip(flat, ups, strict=True)], [a.scale for a in factored], ElementKind.F32
        )
        return shaped(total, (*inner[0].shape[:-1], out))

    def _delta(self, adapter: Adapter) -> Tensor:
        """An adapter's scaled delta in the weight's kind, channels last."""
        shape, kind = self.weight.shape, self.weight.kind
        if adapter.module.algorithm == "ia3":
            merged = from_array(adapter.module.merge_into(self.weight.array(), adapter.strength))
            return channels_last(merged - self.weight.detach())
        binding, factors, scale = adapter.module.weight_term(shape)
        made = delta(binding.source, factors, shape, scale * adapter.strength, kind)
        return channels_last(from_array(made.reshape(shape)))

    def _conv(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        w = self.window
        return conv(x, weight, bias, w.stride, w.padding, w.dilation, w.groups)

    def _factored(self, adapter: Adapter) -> bool:
        """Whether the term is computed by factors: LoCon without groups or a scalar."""
        return adapter.module.algorithm == "locon" and self.window.groups == 1 and adapter.module.scalar is None

    def _inner(self, x: Tensor, adapter: Adapter) -> Tensor:
        """What comes before LoCon's up factor: the convolution with down, or down as a product and then the core's."""
        down = adapter.tensors[DOWN].to(x.kind)
        if MID in adapter.tensors:
            return self._conv(tensor.linear(x, _matrix(adapter.tensors, DOWN, x)), adapter.tensors[MID].to(x.kind))
        return self._conv(x, down.reshape(down.shape[0], *self.weight.shape[1:]))

    def _differentiable(self, x: Tensor, found: list[Adapter]) -> Tensor:
        """The base frozen, each adapter's term beside it; a LoCon alone takes part in the base's own sum."""
        base, staying = self.weight.detach(), self.staying(found)
        bias = self.live_bias(staying)
        if len(staying) == 1 and self._alone(staying[0]):
            adapter = staying[0]
            down = adapter.tensors[DOWN].to(x.kind)
            down, up = down.reshape(down.shape[0], *base.shape[1:]), _matrix(self.live_factors(adapter), UP, x)
            return low_rank_conv(x, base, self._stored(), down, up, adapter.scale, bias, self.window)
        w = self.window
        y = conv(x, base, bias, w.stride, w.padding, w.dilation, w.groups, stored=self._stored())
        for adapter in staying:
            y = y + self.without_dropped(self._term(x, adapter), adapter)
        return y

    def _alone(self, adapter: Adapter) -> bool:
        """Whether `low_rank_conv` takes the adapter: a LoCon without Tucker core, of which no elements drop out."""
        dropping = self.training and adapter.dropout
        return self._factored(adapter) and MID not in adapter.tensors and not dropping

    def _term(self, x: Tensor, adapter: Adapter) -> Tensor:
        module, factors = adapter.module, self.live_factors(adapter)
        scale = adapter.scale if module.scalar is None else factors["scalar"] * adapter.scale
        if self._factored(adapter):
            return tensor.linear(self._inner(x, adapter) * scale, _matrix(factors, UP, x))
        if module.algorithm == "ia3":
            vector = factors["weight"].reshape(
                *((1, -1) if module.on_input else (-1, 1)), *(1 for _ in self.window_axes)
            )
            weight = self.weight.detach() * vector
        else:
            weight = diff_weight(module.algorithm, factors, self.weight.shape)
        return self._conv(x, (weight * scale).to(x.kind))

    @property
    def window_axes(self) -> range:
        """The axes that the filter moves along."""
        return range(self.weight.ndim - 2)

    def _dora(self, x: Tensor, adapter: Adapter) -> Tensor:
        return self._conv(x, self.decomposed(adapter).to(x.kind), self.live_bias([adapter]))


def _matrix(factors: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    factor = factors[name]
    return factor.reshape(factor.shape[0], -1).to(x.kind)
