"""What an adapter adds to its layer, as differentiable tensors: the delta of the weight, and the term of the output.

    delta = diff_weight("locon", tensors, shape)         # [out, in, *kernel], at scale 1
    y = x @ W.T + linear_term("lokr", tensors, x, scale)  # no delta is built for LoCon and LoKr

``tensors`` are an adapter's factors by canonical name. Formulas: LoCon arXiv:2106.09685, LoHa arXiv:2108.06098, LoKr
arXiv:2212.10650, Tucker forms arXiv:2309.14859.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from lycoris import tensor
from lycoris.errors import RefusedInput
from lycoris.formats.keys import DOWN, MID, UP
from lycoris.formats.shapes import Shape
from lycoris.tensor import Tensor
from lycoris.tensor.mixing import mix_blocks

Tensors = Mapping[str, Tensor]


def diff_weight(algorithm: str, tensors: Tensors, shape: Shape) -> Tensor:
    """The delta of a weight of ``shape`` [out, in, *kernel], at scale 1, with gradients for every factor.

    Raises RefusedInput for (IA)^3 and norms, which have no delta of a linear layer's weight.
    """
    if algorithm not in _DELTAS:
        raise RefusedInput(f"{algorithm}: has no delta beside the base's; merge it into the weight")
    return _DELTAS[algorithm](tensors, shape).reshape(*shape)


def linear_term(algorithm: str, tensors: Tensors, x: Tensor, shape: Shape, scale: float | Tensor = 1.0) -> Tensor:
    """The term scale * x @ delta.T of a linear layer [out, in]: x [..., in] -> [..., out]."""
    special = _TERMS.get(algorithm)
    if special is not None and MID not in tensors and "lokr_t2" not in tensors:
        return special(tensors, x, scale)
    return tensor.linear(x, diff_weight(algorithm, tensors, shape).reshape(shape[0], -1) * scale)


def _flat(x: Tensor, rows: int | None = None) -> Tensor:
    return x.reshape(x.shape[0] if rows is None else rows, -1)


def _tucker(core: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """sum_ij left[o, i] core[i, j, ...] right[j, q] as [o, q * taps]."""
    first, second, taps = core.shape[0], core.shape[1], math.prod(core.shape[2:])
    inner = core.reshape(first, second, taps).permute(0, 2, 1) @ right
    return left @ inner.permute(0, 2, 1).reshape(first, right.shape[1] * taps)


def _locon(tensors: Tensors, shape: Shape) -> Tensor:
    up, down = _flat(tensors[UP]), _flat(tensors[DOWN])
    return _tucker(tensors[MID], up, down) if MID in tensors else up @ down


def _product(tensors: Tensors, left: str, right: str, core: str) -> Tensor:
    """A low-rank product, with its core where there is one, whose left factor is then stored transposed."""
    if core in tensors:
        return _tucker(tensors[core], tensors[left].t(), tensors[right])
    return tensors[left] @ tensors[right]


def _loha(tensors: Tensors, shape: Shape) -> Tensor:
    first, second = (_product(tensors, f"hada_w{i}_a", f"hada_w{i}_b", f"hada_t{i}") for i in (1, 2))
    return first * second


def _halves(tensors: Tensors) -> tuple[Tensor, Tensor]:
    """LoKr's w1 [a, b] and w2 [c, d * taps], multiplied out."""
    w1, w2 = (
        _flat(tensors[f"lokr_w{i}"])
        if f"lokr_w{i}" in tensors
        else _product(tensors, f"lokr_w{i}_a", f"lokr_w{i}_b", f"lokr_t{i}")
        for i in (1, 2)
    )
    return w1, w2


def _lokr(tensors: Tensors, shape: Shape) -> Tensor:
    w1, w2 = _halves(tensors)
    (a, b), (c, columns) = w1.shape, w2.shape
    return (w1.reshape(a, 1, b, 1) * w2.reshape(1, c, 1, columns)).reshape(a * c, b * columns)


def _locon_term(tensors: Tensors, x: Tensor, scale: float | Tensor) -> Tensor:
    inner = tensor.linear(x, _flat(tensors[DOWN]).to(x.kind))
    return tensor.linear(inner * scale, _flat(tensors[UP]).to(x.kind))


def _lokr_term(tensors: Tensors, x: Tensor, scale: float | Tensor) -> Tensor:
    """kron(w1, w2) x = (I kron w2) (w1 kron I) x; a factored w2 is two products of that kind."""
    w1 = tensors["lokr_w1"] if "lokr_w1" in tensors else tensors["lokr_w1_a"] @ tensors["lokr_w1_b"]
    mixed = mix_blocks(x, (_flat(w1) * scale).to(x.kind))
    a = w1.shape[0]
    inner = mixed.reshape(-1, mixed.shape[-1] // a)
    for factor in ("lokr_w2",) if "lokr_w2" in tensors else ("lokr_w2_b", "lokr_w2_a"):
        inner = tensor.linear(inner, _flat(tensors[factor]).to(x.kind))
    return inner.reshape(*x.shape[:-1], a * inner.shape[-1])


_DELTAS: dict[str, Callable[[Tensors, Shape], Tensor]] = {
    "locon": _locon,
    "loha": _loha,
    "lokr": _lokr,
    "full": lambda tensors, shape: tensors["diff"],
}
_TERMS: dict[str, Callable[[Tensors, Tensor, float | Tensor], Tensor]] = {"locon": _locon_term, "lokr": _lokr_term}
