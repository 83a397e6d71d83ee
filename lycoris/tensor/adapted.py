"""A linear layer with one LoHa: base and adapter in one sum, forwards and for the gradient of x.

    hadamard_linear     y = x W^T + b + s x ((a1 b1) * (a2 b2))^T         arXiv:2108.06098

The base is frozen. The gradient of the delta is no tensor here.
"""

from __future__ import annotations

from collections.abc import Sequence

from lycoris.errors import RefusedInput
from lycoris.tensor import autograd, pointwise
from lycoris.tensor.adapter_gradients import hadamard_gradients
from lycoris.tensor.launch import converted, empty, keep, kept, run_prepared, same_device, shaped
from lycoris.tensor.products import check_linear, flipped, matrix_of, sum_of_products
from lycoris.tensor.tensor import Tensor
from plans.core import ElementKind
from plans.weight import Hadamard, LowRank, Sink, WeightArgs, WeightDescriptor, WeightPlan


def hadamard_linear(
    x: Tensor,
    weight: Tensor,
    factors: Sequence[Tensor],
    scale: float = 1.0,
    bias: Tensor | None = None,
    merged: Tensor | None = None,
) -> Tensor:
    """The sum x @ weight.T + scale * x @ ((a1 @ b1) * (a2 @ b2)).T + bias: a frozen base layer with LoHa beside it.

    x [..., in], weight [out, in], factors a1 [out, rank], b1 [rank, in], a2, b2 alike, all of one kind. The delta is
    rounded to that kind, unscaled, and made anew on the way back. With ``merged``, the rounded sum of weight and delta,
    products take that instead of both. Gradients for x and the factors. Raises RefusedInput where shapes do not fit.
    """
    shape = check_linear("hadamard_linear", x, weight, bias)
    rank = factors[0].shape[-1]
    wanted = ((weight.shape[0], rank), (rank, weight.shape[1])) * 2
    if tuple(factor.shape for factor in factors) != wanted:
        raise RefusedInput(
            f"hadamard_linear: factors {[factor.shape for factor in factors]}, wanted a1, b1, a2, b2 {list(wanted)}; "
            "give the factors of this weight"
        )
    refuse_mixed("hadamard_linear", (x, weight, *factors))
    rows, matrix = matrix_of(x, weight.shape[1]), weight.detach()
    own = [_ready(factor) for factor in factors]

    def through(a: Tensor, order: bool, kind: ElementKind, added: Tensor | None) -> Tensor:
        """The sum of a's products with base and delta; on the way forward both transposed."""
        weights = ((merged.detach(), 1.0),) if merged is not None else ((matrix, 1.0), (_delta(own, matrix), scale))
        pairs = [(a, flipped(w) if order else w) for w, _ in weights]
        return sum_of_products(pairs, [s for _, s in weights], kind, added)

    out = shaped(through(rows, True, x.kind, None if bias is None else bias.detach()), shape)
    inputs = (x, *factors)
    if not autograd.wanted(inputs):
        return out
    x_shape = x.shape

    def pull(g: Tensor, edges: Sequence[autograd.Node | None]) -> list[Tensor | None]:
        g = matrix_of(g, matrix.shape[0])
        d_x = shaped(through(g, False, edges[0].kind, None), x_shape) if edges[0] else None
        asked = next((edge for edge in edges[1:] if edge), None)
        found = hadamard_gradients(g, rows, own, asked.kind, scale) if asked else [None] * 4
        return [d_x, *(d if edge else None for d, edge in zip(found, edges[1:], strict=True))]

    saved = (rows, matrix, *own) if merged is None else (rows, merged, *own)
    return autograd.record("hadamard_linear", out, inputs, saved, pull)


def _delta(factors: Sequence[Tensor], weight: Tensor) -> Tensor:
    """The delta (a1 b1) * (a2 b2), unscaled, in the weight's kind."""
    out, rank = empty(weight.shape, weight.kind, weight.device), factors[0].shape[1]
    key = ("Hadamard delta", out.layout, rank, out.device.ordinal)
    found = kept(key)
    if found is None:
        source = Hadamard(*(LowRank(rank, out.kind, out.kind) for _ in range(2)))
        descriptor = WeightDescriptor(*out.shape, (source,), out=out.kind, sink=Sink.DELTA)
        plan = WeightPlan.select(None, descriptor, device=out.device)
        found = keep(key, plan, [out], factors, lambda result, *refs: WeightArgs(result, [refs], [1.0]))
    run_prepared(found[0], (out, *factors))
    return out


def _ready(x: Tensor) -> Tensor:
    x = x.detach()
    return x if x.contiguous_ and x.aligned else converted(x, x.kind)


def refuse_mixed(operation: str, tensors: Sequence[Tensor]) -> None:
    """Raise RefusedInput for operands on several devices, or of several kinds."""
    same_device(operation, tensors)
    kinds = {tensor.kind for tensor in tensors}
    if len(kinds) > 1:
        found = ", ".join(sorted(kind.value for kind in kinds))
        raise RefusedInput(f"{operation}: operands of {found}, wanted all of one kind; call to() first")
    pointwise.result_kind(operation, tensors)
