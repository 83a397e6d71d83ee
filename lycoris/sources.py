"""From factors by their LyCORIS names to the weight plan's sources: which factor is which operand of which formula.

    binding = weight_source("loha", {"hada_w1_a": FactorSpec((640, 16), ElementKind.BF16), ...}, (640, 320, 3, 3))
    descriptor = WeightDescriptor(binding.out_features, binding.in_features, (binding.source,), out=..., base=...,
                                  kernel=binding.kernel)
    args = WeightArgs(out, [[tensors[name] for name in binding.factor_names]], [scale], base)

Every factor is used as the file stores it; nothing is transposed or copied.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from lycoris.errors import RefusedInput
from lycoris.formats.keys import DOWN, MID, UP
from lycoris.formats.shapes import Shape, delta_shape, fits
from plans.core import ElementKind
from plans.weight import ChannelScale, Dense, Hadamard, Kronecker, LowRank, Source


@dataclass(frozen=True, slots=True)
class FactorSpec:
    """Shape and element kind of a stored factor."""

    shape: Shape
    kind: ElementKind


@dataclass(frozen=True, slots=True)
class SourceBinding:
    """A plan's source and the factors that it takes, over a base of ``out_features`` x ``in_features`` x ``kernel``.

    ``factor_names`` are canonical names in the order of the source's operands. A base with one axis (a bias, a
    norm's weight) has ``in_features`` 1; ``kernel`` holds the extents of the base's filter, () for a linear weight.
    """

    source: Source
    factor_names: tuple[str, ...]
    out_features: int
    in_features: int
    kernel: tuple[int, ...]


def weight_source(
    algorithm: str,
    factors: Mapping[str, FactorSpec],
    base_shape: Shape,
    *,
    on_input: bool = False,
    name: str = "adapter",
) -> SourceBinding:
    """The source that makes the delta of ``factors`` over a base of ``base_shape``, [out, in, *kernel].

    A base that is stored transposed is given by its transposed shape, and read with ``WeightLayout.FLAME``. Where the
    base is flat, [out, in * taps], and the factors have a Tucker core, ``in_features`` and ``kernel`` are the core's.

    ``algorithm`` is a name of `lycoris.formats.keys.ALGORITHMS`; ``factors`` are by canonical name, and others (alpha,
    dora_scale, diff_b) may stand among them. ``on_input`` is IA3's: its vector scales input columns, not output rows.
    ``name`` says in messages whose factors they are.

    Raises RefusedInput where the factors do not fit each other or do not make ``base_shape``, naming the shapes.
    """
    found = delta_shape(algorithm, factors, name)
    out = base_shape[0] if base_shape else 1
    weight = _Weight(name, factors, out, base_shape[1] if len(base_shape) > 1 else 1, tuple(base_shape[2:]), on_input)
    if algorithm != "ia3" and not fits(found, base_shape):
        stored = ", ".join(f"{key} {list(spec.shape)}" for key, spec in factors.items() if len(spec.shape))
        raise RefusedInput(
            f"{name}: {stored} make a delta {list(found)}, wanted the base's {list(base_shape)}; "
            "give the base they were made for"
        )
    return _BINDERS[algorithm](weight)


@dataclass(frozen=True, slots=True)
class _Product:
    """Names of the factors of one low-rank product; with its core, `left` is stored [r, out] if `core_transposes`."""

    left: str
    right: str
    core: str
    core_transposes: bool = True


_LOCON = _Product(UP, DOWN, MID, core_transposes=False)
_LOHA = tuple(_Product(f"hada_w{i}_a", f"hada_w{i}_b", f"hada_t{i}") for i in (1, 2))
_LOKR = tuple((f"lokr_w{i}", _Product(f"lokr_w{i}_a", f"lokr_w{i}_b", f"lokr_t{i}")) for i in (1, 2))


@dataclass(frozen=True, slots=True)
class _Weight:
    """The base's extents, and one module's factors."""

    name: str
    factors: Mapping[str, FactorSpec]
    out: int
    channels: int
    kernel: tuple[int, ...]
    on_input: bool

    def product(self, names: _Product) -> tuple[LowRank, tuple[str, ...]]:
        """The product of the factors that are there, and their names."""
        left, right, core = (self.factors.get(key) for key in (names.left, names.right, names.core))
        if core is None:
            return LowRank(right.shape[0], left.kind, right.kind), (names.left, names.right)
        source = LowRank(
            core.shape[0], left.kind, right.kind, names.core_transposes, core=core.kind, core_rank=core.shape[1]
        )
        return source, (names.left, names.right, names.core)

    def half(self, full: str, product: _Product) -> tuple[ElementKind | LowRank, tuple[int, int], tuple[str, ...]]:
        """One half of a Kronecker product: how it is stored, its rows and columns as stored, its factors' names."""
        if full in self.factors:
            spec = self.factors[full]
            return spec.kind, spec.shape[:2], (full,)
        source, names = self.product(product)
        rows = self.factors[product.left].shape[1 if source.left_transposed else 0]
        return source, (rows, self.factors[product.right].shape[1]), names

    def split_by(self, core: str) -> _Weight:
        """The same weight with its columns divided by the filter of factor `core`, where there is one."""
        if core not in self.factors:
            return self
        kernel = self.factors[core].shape[2:]
        if math.prod(kernel) == math.prod(self.kernel):
            return self
        columns = self.channels * math.prod(self.kernel)
        return replace(self, channels=columns // max(1, math.prod(kernel)), kernel=tuple(kernel))

    def bind(self, source: Source, names: tuple[str, ...]) -> SourceBinding:
        """The source over this weight."""
        return SourceBinding(source, names, self.out, self.channels, self.kernel)


def _locon(w: _Weight) -> SourceBinding:
    return w.split_by(_LOCON.core).bind(*w.product(_LOCON))


def _loha(w: _Weight) -> SourceBinding:
    (first, first_names), (second, second_names) = (w.product(names) for names in _LOHA)
    return w.split_by(_LOHA[0].core).bind(Hadamard(first, second), first_names + second_names)


def _lokr(w: _Weight) -> SourceBinding:
    w = w.split_by(_LOKR[1][1].core)
    (w1, (a, b), w1_names), (w2, (c, _), w2_names) = (w.half(full, product) for full, product in _LOKR)
    if b == 0 or w.channels % b:
        raise RefusedInput(
            f"{w.name}: {w1_names[-1]} has {b} columns, wanted a divisor of the base's {w.channels} input channels; "
            "give the base that it was made for"
        )
    return w.bind(Kronecker(a, b, c, w.channels // b, w1, w2), w1_names + w2_names)


def _difference(key: str) -> Callable[[_Weight], SourceBinding]:
    return lambda w: w.bind(Dense(w.factors[key].kind), (key,))


def _ia3(w: _Weight) -> SourceBinding:
    vector, axis, wanted = w.factors["weight"], *(("in", w.channels) if w.on_input else ("out", w.out))
    if math.prod(vector.shape) != wanted:
        raise RefusedInput(
            f"{w.name}: weight has shape {list(vector.shape)}, wanted {wanted} elements, one for each of the base's "
            f"{axis}put channels; give the base that it was made for"
        )
    return w.bind(ChannelScale(vector.kind, axis), ("weight",))


_BINDERS: dict[str, Callable[[_Weight], SourceBinding]] = {
    "locon": _locon,
    "loha": _loha,
    "lokr": _lokr,
    "full": _difference("diff"),
    "norm": _difference("w_norm"),
    "ia3": _ia3,
}
