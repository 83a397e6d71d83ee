"""Shape algebra of adapter factors: which delta they make, and whether it is the shape of a base weight.

Shapes are always taken from the factors. LoKr in particular is never factorised again: the writers split a dimension
in different ways.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from lycoris.errors import RefusedInput

Shape = tuple[int, ...]
Axis = Literal["row", "column"]

_UNSOUND = "give an adapter as its trainer saved it"

_RANK_AXES: dict[str, tuple[tuple[str, int], ...]] = {
    "locon": (("lora_down.weight", 0),),
    "loha": (("hada_w1_b", 0),),
    # A Tucker w2_a is (r, c) where a plain one is (c, r): the core says the rank of the first.
    "lokr": (("lokr_w1_a", 1), ("lokr_t2", 0), ("lokr_w2_a", 1)),
}
"""Algorithm -> (factor, axis) that holds the rank by LyCORIS' rule; the first that a module has counts."""


class HasShape(Protocol):
    """A tensor, an array or a file's entry."""

    @property
    def shape(self) -> Shape:
        """Elements along each axis."""


def rank_of(algorithm: str, factors: Mapping[str, HasShape]) -> int | None:
    """The rank that LyCORIS divides alpha by; None where nothing is factored (LoKr with both factors full, full...)."""
    for name, axis in _RANK_AXES.get(algorithm, ()):
        if name in factors:
            return factors[name].shape[axis]
    return None


def delta_shape(algorithm: str, factors: Mapping[str, HasShape], name: str = "adapter") -> Shape:
    """Shape of the delta that `factors` make, as they are stored: `(out, in * k...)` where they are stored flat.

    LoCon `up (O, r, 1...), down (r, I, *k)` -> (O, I, *k); Tucker `mid (r, r, *k)` -> (O, I, *k).
    LoHa `a (O, r), b (r, N)` -> (O, N); Tucker `t (r, r, *k), a (r, O), b (r, I)` -> (O, I, *k).
    LoKr `w1 (a, b), w2 (c, d, *k)` -> (ac, bd, *k), the Kronecker product over the two channel axes.
    full, norm: the difference's own shape. ia3: the vector's length, (n,).

    Args:
        algorithm: A name of `lycoris.formats.keys.ALGORITHMS`.
        factors: By canonical name.
        name: Whose factors they are, for messages.

    Raises:
        RefusedInput: a factor has too few axes, rank 0, or does not fit the next.
    """
    return _ALGEBRA[algorithm](_Factors(name, {key: tuple(factor.shape) for key, factor in factors.items()}))


def fits(found: Shape, wanted: Shape) -> bool:
    """Whether a delta of shape `found` can be laid over a weight of shape `wanted`, element for element.

    Axes of length 1 at the end do not count (a 1x1 convolution is a linear layer), and either side may be flat:
    `(out, everything else)`.
    """
    found, wanted = squeeze(found), squeeze(wanted)
    if found == wanted:
        return True
    flat = min(len(found), len(wanted)) == 2
    return flat and found[0] == wanted[0] and math.prod(found) == math.prod(wanted)


def squeeze(shape: Shape) -> Shape:
    """`shape` without the axes of length 1 at its end; its first axis stays."""
    end = len(shape)
    while end > 1 and shape[end - 1] == 1:
        end -= 1
    return tuple(shape[:end])


def dora_axis(magnitude: Shape, delta: Shape, name: str = "adapter") -> Axis:
    """Which norm a LyCORIS `dora_scale` replaces: of each output row, (O, 1...), or of each input column, (1, I, 1...).

    Raises:
        RefusedInput: it is neither.
    """
    if len(magnitude) == 1 or (magnitude[:1] == delta[:1] and math.prod(magnitude[1:]) == 1):
        return "row"
    if len(magnitude) > 1 and math.prod(magnitude) == magnitude[1]:
        return "column"
    raise RefusedInput(
        f"{name}: dora_scale has shape {list(magnitude)}, wanted [{delta[0] if delta else 0}, 1...] (norms of rows) or "
        f"[1, in, 1...] (norms of columns); {_UNSOUND}"
    )


@dataclass(frozen=True, slots=True)
class _Factors:
    """Shapes of one module's factors, with the checks that every algorithm makes."""

    name: str
    shapes: dict[str, Shape]

    def __contains__(self, key: str) -> bool:
        return key in self.shapes

    def get(self, key: str, ndim: int = 2, pointwise: bool = False) -> Shape:
        """Shape of factor `key`, which has at least `ndim` axes; `pointwise`: and only ones behind the second."""
        shape = self.shapes[key]
        wanted = "[rows, columns]" if pointwise else f"at least {ndim} axes"
        if len(shape) < ndim or (pointwise and math.prod(shape[2:]) != 1):
            raise RefusedInput(f"{self.name}: {key} has shape {list(shape)}, wanted {wanted}; {_UNSOUND}")
        return shape

    def join(self, left: str, left_axis: int, right: str, right_axis: int) -> None:
        """The two axes are contracted with each other: refuse them unless they are equally long, and not empty."""
        ranks = self.shapes[left][left_axis], self.shapes[right][right_axis]
        if ranks[0] != ranks[1]:
            raise RefusedInput(
                f"{self.name}: {left} {list(self.shapes[left])} and {right} {list(self.shapes[right])} do not fit: "
                f"ranks {ranks[0]} and {ranks[1]}, wanted the same; {_UNSOUND}"
            )
        if ranks[0] == 0:
            raise RefusedInput(
                f"{self.name}: {left} {list(self.shapes[left])} has rank 0, wanted at least 1; {_UNSOUND}"
            )

    def product(self, a: str, b: str) -> Shape:
        """(O, r) (r, N) -> (O, N)."""
        rows, columns = self.get(a, pointwise=True), self.get(b)
        self.join(a, 1, b, 0)
        return (rows[0], *columns[1:])

    def tucker(self, core: str, a: str, b: str) -> Shape:
        """(r, r, *k), (r, O), (r, I) -> (O, I, *k)."""
        middle, rows, columns = self.get(core), self.get(a, pointwise=True), self.get(b, pointwise=True)
        self.join(a, 0, core, 0)
        self.join(core, 1, b, 0)
        return (rows[1], columns[1], *middle[2:])


def _locon(f: _Factors) -> Shape:
    if "lora_mid.weight" not in f:
        return f.product("lora_up.weight", "lora_down.weight")
    up = f.get("lora_up.weight", pointwise=True)
    down, mid = f.get("lora_down.weight", pointwise=True), f.get("lora_mid.weight")
    f.join("lora_up.weight", 1, "lora_mid.weight", 0)
    f.join("lora_mid.weight", 1, "lora_down.weight", 0)
    return (up[0], down[1], *mid[2:])


def _loha(f: _Factors) -> Shape:
    if "hada_t1" in f:
        sides = [f.tucker(f"hada_t{i}", f"hada_w{i}_a", f"hada_w{i}_b") for i in (1, 2)]
    else:
        sides = [f.product(f"hada_w{i}_a", f"hada_w{i}_b") for i in (1, 2)]
    if sides[0] != sides[1]:
        raise RefusedInput(
            f"{f.name}: hada_w1_a @ hada_w1_b has shape {list(sides[0])}, hada_w2_a @ hada_w2_b {list(sides[1])}, "
            f"wanted the same; {_UNSOUND}"
        )
    f.join("hada_w1_b", 0, "hada_w2_b", 0)
    return sides[0]


def _lokr(f: _Factors) -> Shape:
    w1 = f.get("lokr_w1", pointwise=True) if "lokr_w1" in f else f.product("lokr_w1_a", "lokr_w1_b")
    if "lokr_w2" in f:
        w2 = f.get("lokr_w2")
    elif "lokr_t2" in f:
        w2 = f.tucker("lokr_t2", "lokr_w2_a", "lokr_w2_b")
    else:
        w2 = f.product("lokr_w2_a", "lokr_w2_b")
    if "lokr_w1_b" in f and "lokr_w2_b" in f:
        f.join("lokr_w1_b", 0, "lokr_w2_b", 0)
    return (w1[0] * w2[0], w1[1] * w2[1], *w2[2:])


_ALGEBRA: dict[str, Callable[[_Factors], Shape]] = {
    "locon": _locon,
    "loha": _loha,
    "lokr": _lokr,
    "full": lambda f: f.get("diff", ndim=1),
    "norm": lambda f: f.get("w_norm", ndim=1),
    "ia3": lambda f: (math.prod(f.get("weight", ndim=1)),),
}
