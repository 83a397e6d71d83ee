"""Linear layers with one LoHa or one LoKr: base and adapter in one sum, forwards and for the gradient of x.

    hadamard_linear     y = x W^T + b + s x ((a1 b1) * (a2 b2))^T         arXiv:2108.06098
    kronecker_linear    y = x W^T + b + x kron(w1, w2)^T                  arXiv:2212.10650

The base is frozen. The gradient of LoHa's delta is no tensor here, and of LoKr's there is not even the delta.
"""

from __future__ import annotations

from collections.abc import Sequence

from lycoris.errors import RefusedInput
from lycoris.tensor import autograd, pointwise
from lycoris.tensor.adapter_gradients import hadamard_gradients, low_rank_gradients, mixing_gradient
from lycoris.tensor.launch import converted, empty, keep, kept, run_prepared, same_device, shaped
from lycoris.tensor.mixing import mixed
from lycoris.tensor.products import check_linear, flipped, matrix_of, product, sum_of_products
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
    _refuse_mixed("hadamard_linear", (x, weight, *factors))
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


def kronecker_linear(
    x: Tensor, weight: Tensor, w1: Tensor, seconds: Sequence[Tensor], bias: Tensor | None = None
) -> Tensor:
    """The sum x @ weight.T + x @ kron(w1, w2).T + bias: a frozen base layer with LoKr beside it, no delta built.

    x [..., b * d], weight [a * c, b * d], w1 [a, b] with the adapter's scale, ``seconds`` w2 [c, d], or w2's factors
    [c, rank] and [rank, d], all of one kind. The adapter's term is rounded to that kind once more than the sum.
    Gradients for x, w1 and w2 or its factors. Raises RefusedInput where shapes do not fit.
    """
    shape = check_linear("kronecker_linear", x, weight, bias)
    (a, b), c, d = w1.shape, seconds[0].shape[0], seconds[-1].shape[1]
    shapes = [factor.shape for factor in seconds]
    if (a * c, b * d) != weight.shape or len(seconds) > 2 or (len(seconds) == 2 and shapes[0][1] != shapes[1][0]):
        raise RefusedInput(
            f"kronecker_linear: w1 {w1.shape} and w2 {' @ '.join(map(str, shapes))} for a weight {weight.shape}, "
            "wanted extents whose products are the weight's; give the factors of this weight"
        )
    _refuse_mixed("kronecker_linear", (x, weight, w1, *seconds))
    kind = x.kind
    rows, matrix, mixing = _ready(matrix_of(x, weight.shape[1])), weight.detach(), _ready(w1)
    chain = [_ready(factor) for factor in reversed(seconds)]
    count = rows.shape[0]
    inners = [shaped(mixed(rows, mixing, d, kind, False), (count * a, d))]
    for factor in chain:
        inners.append(product(inners[-1], flipped(factor), kind))
    term = shaped(inners.pop(), (count, a * c))
    own = None if bias is None else bias.detach()
    out = shaped(sum_of_products(((rows, flipped(matrix)),), (1.0,), kind, own, term), shape)
    inputs = (x, w1, *seconds)
    if not autograd.wanted(inputs):
        return out
    x_shape = x.shape

    def pull(g: Tensor, edges: Sequence[autograd.Node | None]) -> list[Tensor | None]:
        g = _ready(matrix_of(g, matrix.shape[0]))
        grown = [shaped(g, (count * a, c))]
        for factor in chain[::-1] if edges[0] or edges[1] else chain[:0:-1]:
            grown.append(product(grown[-1], factor, kind))
        d_seconds = _second_gradients(grown, inners, edges[2:])
        d_x = d_w1 = None
        if edges[1]:
            d_w1 = mixing_gradient(shaped(grown[-1], (count, a * d)), rows, (a, b), d, edges[1].kind)
        if edges[0]:
            back = mixed(shaped(grown[-1], (count, a * d)), mixing, d, kind, True)
            d_x = shaped(sum_of_products(((g, matrix),), (1.0,), edges[0].kind, None, back), x_shape)
        return [d_x, d_w1, *d_seconds]

    return autograd.record("kronecker_linear", out, inputs, (rows, matrix, mixing, *chain), pull)


def _second_gradients(
    grown: Sequence[Tensor], inners: Sequence[Tensor], edges: Sequence[autograd.Node | None]
) -> list[Tensor | None]:
    """Those of w2, or of its factors [c, rank] and [rank, d]; ``grown`` and ``inners`` from the outside in."""
    if len(edges) == 1:
        return [product(flipped(grown[0]), inners[0], edges[0].kind) if edges[0] else None]
    asked = next((edge for edge in edges if edge), None)
    if asked is None:
        return [None, None]
    pairs = ((grown[1], inners[0]) if edges[1] else None, (grown[0], inners[1]) if edges[0] else None)
    d_right, d_left = low_rank_gradients(*pairs, asked.kind, 1.0)
    return [d_left, d_right]


def _ready(x: Tensor) -> Tensor:
    x = x.detach()
    return x if x.contiguous_ and x.aligned else converted(x, x.kind)


def _refuse_mixed(operation: str, tensors: Sequence[Tensor]) -> None:
    same_device(operation, tensors)
    kinds = {tensor.kind for tensor in tensors}
    if len(kinds) > 1:
        found = ", ".join(sorted(kind.value for kind in kinds))
        raise RefusedInput(f"{operation}: operands of {found}, wanted all of one kind; call to() first")
    pointwise.result_kind(operation, tensors)
