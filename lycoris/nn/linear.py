"""A linear layer with live adapters: the base and its adapters in one sum, rounded once.

    layer = AdaptedLinear(weight, bias)
    layer.add("style", module, strength=0.8)
    y = layer(x)

LoCon's small product comes first, and its second one is further terms of the base's own sum; LoKr mixes the blocks of x
by w1 and adds w2 to the sum of every block of the output; everything else is a second weight beside the first. Any
number of adapters takes part. With "merged" there is one product with the kept merged weight.
"""

from __future__ import annotations

from collections.abc import Sequence

from lycoris import tensor
from lycoris.algorithms.terms import linear_term
from lycoris.errors import RefusedInput
from lycoris.formats.keys import MID
from lycoris.nn.adapted import Adapted, Adapter
from lycoris.nn.linear_fused import fused_decomposed, fused_linear, is_decomposed, is_fused
from lycoris.nn.linear_sum import LinearSum, Ways, dense_of, is_plain_locon, locon_factors, low_rank_of, ways_of
from lycoris.nn.routing import Routes, choice_tensor, routed
from lycoris.tensor import Tensor, autograd
from lycoris.tensor.launch import converted
from lycoris.tensor.products import check_linear


class AdaptedLinear(Adapted):
    """y = x W^T + b + sum_i s_i x dW_i^T: x [..., in], W [out, in] -> [..., out]; see `lycoris.nn.adapted` for modes.

    Gradients reach x and every adapter's factors; the base is frozen. Raises RefusedInput where x does not fit.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, *, mode: str | None = None) -> None:
        super().__init__(weight, bias, mode=mode)
        if weight.ndim != 2:
            raise RefusedInput(f"AdaptedLinear: weight {weight.shape}, wanted [out, in]; use AdaptedConv")

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """See the class."""
        return self.forward(x, residual)

    def route(self, x: Tensor, choice: Sequence[str | None] | Tensor) -> Tensor:
        """Each row with the adapter that ``choice`` names for it, None for none: x [rows, in] -> [rows, out].

        ``choice`` may be a tensor of int32: the adapters' numbers in the order of `adapters`, their count for none.
        An adapter that is switched off adds nothing. Raises RefusedInput for an unknown name, another count than x has
        rows, a DoRA, a difference of the bias, and while the adapters are merged.
        """
        self._refuse_merged("route")
        check_linear("route", x, self.weight, self.bias)
        if x.ndim != 2 or x.kind is not self.weight.kind:
            raise RefusedInput(
                f"route: x {x.shape} of {x.kind.value}, wanted [rows, in] of {self.weight.kind.value}; "
                "call to() or reshape() first"
            )
        with autograd.no_grad():
            numbers = choice_tensor(choice, list(self._adapters), x.shape[0], x)
            x = x if x.is_contiguous and x.aligned else converted(x, x.kind)
            if not any(adapter.active for adapter in self._adapters.values()):
                return tensor.linear(x, self.weight, self.bias)
            return routed(x, self.weight, self.bias, self._kept("routes", self._make_routes), numbers)

    def _make_routes(self) -> Routes:
        low_rank, dense = {}, {}
        for number, (name, adapter) in enumerate(self._adapters.items()):
            if adapter.module.dora_scale is not None or adapter.module.bias is not None:
                raise RefusedInput(f"route: adapter {name!r} changes more than the weight's product; remove it")
            if not adapter.active:
                continue
            if is_plain_locon(adapter):
                way = low_rank_of(adapter, self.weight.kind)
                low_rank[number] = (way.down, way.up, way.scale)
            else:
                dense[number] = dense_of(adapter, self.weight)
        return Routes.of(low_rank, dense, len(self._adapters))

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """See the class; with ``residual``, a tensor like y, that is added."""
        if x.kind is not self.weight.kind or x.device is not self.weight.device:
            raise RefusedInput(
                f"AdaptedLinear: x of {x.kind.value} on {x.device.name}, wanted {self.weight.kind.value} on "
                f"{self.weight.device.name}; call to({self.weight.kind.value}), or bring it there"
            )
        check_linear("AdaptedLinear", x, self.weight, self.bias)
        found = self.active()
        if found and found[0].module.dora_scale is not None:
            return _sum(self._dora(x, found[0]) if self._recorded(x, found) else self._merged(x), residual)
        if self._recorded(x, found):
            return self._differentiable(x, found, residual)
        mode = self.mode or ("separate" if self.training else "merged")
        made: LinearSum = self._kept(mode, self._merged_sum if mode == "merged" or not found else self._separate_sum)
        return _sum(made(x), residual)

    def _merged_sum(self) -> LinearSum:
        return LinearSum(self.merged_weight(), self.merged_bias(), Ways((), (), ()))

    def _separate_sum(self) -> LinearSum:
        return LinearSum(self.weight, self.merged_bias(), ways_of(self.active(), self.weight))

    def _recorded(self, x: Tensor, found: list[Adapter]) -> bool:
        if not autograd.is_grad_enabled():
            return False
        return autograd.wanted([x, *[factor for adapter in found for factor in adapter.tensors.values()]])

    def _merged(self, x: Tensor) -> Tensor:
        return tensor.linear(x, self.merged_weight(), self.merged_bias())

    def _differentiable(self, x: Tensor, found: list[Adapter], residual: Tensor | None) -> Tensor:
        """The base frozen, each adapter's term beside it; one alone takes part in the base's own sum."""
        base = self.weight.detach() if self.weight.requires_grad else self.weight
        staying = self.staying(found)
        bias = self.live_bias(staying)
        if len(staying) == 1 and self._alone(staying[0], x, bias):
            merged = self.merged_weight() if self.mode == "merged" and len(found) == 1 else None
            return fused_linear(x, base, bias, staying[0], self.live_factors(staying[0]), merged, residual)
        y = tensor.linear(x, base, bias, residual)
        for adapter in staying:
            y = y + self.without_dropped(self._term(x, adapter), adapter)
        return y

    def _alone(self, adapter: Adapter, x: Tensor, bias: Tensor | None) -> bool:
        """Whether `fused_linear` takes the adapter: without dropouts after it, but of LoCon beside a frozen bias."""
        locon = adapter.module.algorithm == "locon"
        dropping = self.training and (adapter.dropout or (adapter.rank_dropout and not locon))
        trained = bias is not None and bias.requires_grad and not locon
        return is_fused(adapter, x.kind) and not dropping and not trained

    def _term(self, x: Tensor, adapter: Adapter) -> Tensor:
        module, factors = adapter.module, self.live_factors(adapter)
        scale = adapter.scale if module.scalar is None else factors["scalar"] * adapter.scale
        if module.algorithm == "locon" and MID not in factors:
            down, up = locon_factors(factors, x.kind)
            return tensor.linear(tensor.linear(x, down) * scale, up).to(x.kind)
        if module.algorithm == "ia3":
            return tensor.linear(
                x, (self.weight.detach() * _ia3(factors["weight"], module.on_input) * scale).to(x.kind)
            )
        return linear_term(module.algorithm, factors, x, self.weight.shape, scale).to(x.kind)

    def _dora(self, x: Tensor, adapter: Adapter) -> Tensor:
        bias = self.live_bias([adapter])
        if is_decomposed(adapter) and not (bias is not None and bias.requires_grad):
            return fused_decomposed(x, self.weight, bias, adapter, self.live_factors(adapter))
        return tensor.linear(x, self.decomposed(adapter).to(x.kind), bias)


def _ia3(vector: Tensor, on_input: bool) -> Tensor:
    return vector.reshape(1, -1) if on_input else vector.reshape(-1, 1)


def _sum(y: Tensor, residual: Tensor | None) -> Tensor:
    return y if residual is None else y + residual
