"""A linear layer with one adapter that is trained: base and adapter as one sum in both directions."""

from __future__ import annotations

from collections.abc import Mapping

from lycoris import tensor
from lycoris.formats.keys import DORA, MID, UP
from lycoris.nn.adapted import Adapter
from lycoris.nn.linear_sum import locon_factors
from lycoris.tensor import Tensor, pointwise
from lycoris.tensor.adapted import hadamard_linear
from lycoris.tensor.decomposed import decomposed_linear
from lycoris.tensor.kronecker import kronecker_linear
from plans.adapter_gradient import MOST_RANK
from plans.core import ElementKind
from plans.expression import leaf

_HADAMARD = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")


def is_fused(adapter: Adapter, kind: ElementKind) -> bool:
    """Whether `fused_linear` is the fast way for inputs of a kind: for a LoCon, LoHa or LoKr without a Tucker core.

    Tensor cores contract LoHa's gradients in bf16 and up to a rank only.
    """
    names, algorithm = adapter.tensors, adapter.module.algorithm
    if algorithm == "loha":
        plain = "hada_t1" not in names and "hada_t2" not in names
        return plain and kind is ElementKind.BF16 and names["hada_w1_b"].shape[0] <= MOST_RANK
    if algorithm == "lokr":
        return "lokr_t2" not in names
    return algorithm == "locon" and MID not in names


def fused_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    adapter: Adapter,
    names: Mapping[str, Tensor],
    merged: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """The sum x @ weight.T + bias + scale * x @ delta.T, [..., in] -> [..., out], with gradients for x and the factors.

    A LoCon's takes ``residual``, a tensor like the result, into the sum; others add it afterwards. ``names`` are the
    adapter's factors, which take part in x's kind. With ``merged``, products with LoHa's delta are those of the merged
    weight.
    """
    kind = x.kind
    if adapter.module.algorithm == "loha":
        factors = [names[name] for name in _HADAMARD]
        if adapter.module.scalar is not None:
            factors[0] = _scaled(factors[0], names["scalar"], kind)
        y = hadamard_linear(x, weight, [factor.to(kind) for factor in factors], adapter.scale, bias, merged)
        return y if residual is None else y + residual
    if adapter.module.algorithm == "lokr":
        first = names["lokr_w1"] if "lokr_w1" in names else names["lokr_w1_a"] @ names["lokr_w1_b"]
        seconds = ("lokr_w2",) if "lokr_w2" in names else ("lokr_w2_a", "lokr_w2_b")
        w1 = _flat(first).to(kind) if adapter.module.scalar is None else _scaled(_flat(first), names["scalar"], kind)
        factors = [_flat(names[name]).to(kind) for name in seconds]
        y = kronecker_linear(x, weight, w1, factors, bias, adapter.scale)
        return y if residual is None else y + residual
    down, up = locon_factors(names, kind)
    if adapter.module.scalar is not None:
        up = _scaled(names[UP].reshape(*up.shape), names["scalar"], kind)
    return tensor.low_rank_linear(x, weight, down, up, adapter.scale, bias, residual)


def is_decomposed(adapter: Adapter) -> bool:
    """Whether `fused_decomposed` takes the adapter: DoRA by rows over a LoCon without Tucker core, at full strength."""
    module = adapter.module
    plain = module.algorithm == "locon" and MID not in adapter.tensors and module.scalar is None
    return plain and module.wd_on_out and adapter.strength == 1


def fused_decomposed(
    x: Tensor, weight: Tensor, bias: Tensor | None, adapter: Adapter, factors: Mapping[str, Tensor]
) -> Tensor:
    """DoRA's x @ (m V / (|V| + 2**-23)).T + bias with gradients for x, factors and m; V is no tensor."""
    down, up = locon_factors(factors, x.kind)
    magnitude = factors[DORA].reshape(-1)
    return decomposed_linear(x, weight, down, up, magnitude, adapter.module.scale(), bias)


def _flat(x: Tensor) -> Tensor:
    return x.reshape(x.shape[0], -1)


def _scaled(x: Tensor, scale: Tensor | float, kind: ElementKind) -> Tensor:
    """The product with a number, rounded to a kind once."""
    if isinstance(scale, Tensor):
        return pointwise.apply(leaf(0) * leaf(1), (x, scale), kind=kind)
    return pointwise.apply(leaf(0) * leaf(1), (x,), (scale,), kind)
