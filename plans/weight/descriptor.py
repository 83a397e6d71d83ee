"""Descriptor, arguments and float64 reference of the weight family."""

from __future__ import annotations

import enum
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from plans.core.errors import InvalidProblem
from plans.core.plan import Arguments, Operand
from plans.core.precision import ElementKind
from plans.core.sku import OpCategory
from plans.core.tensor import TensorMut, TensorRef
from plans.weight.sources import ChannelScale, Source

DORA_EPS = 2.0**-23
FLOATS = (ElementKind.BF16, ElementKind.F16, ElementKind.F32)


class Sink(enum.Enum):
    """What becomes of the delta."""

    DELTA = "delta"
    MERGE = "merge"
    DORA_ROW = "dora by output row"
    DORA_COLUMN = "dora by input channel"


class WeightLayout(enum.Enum):
    """How base and result lie in memory; the value is the kernels' name.

    CHECKPOINT: [out, in, *kernel]. FLAME: [in, out], and [*kernel, in, out] for convolutions.
    """

    CHECKPOINT = "oi"
    FLAME = "io"


@dataclass(frozen=True)
class WeightDescriptor:
    """out = round(W + sum_i scale_i * source_i), or the sum alone, or DoRA's form of it.

    With delta = sum_i scale_i * source_i and V = W + delta, DoRA is
    ``W + strength * (magnitude * V / (norm(V) + 2**-23) - W)``, the norm over each output row or each input channel.
    ``base`` is the kind of W (None for the delta alone), ``out`` the kind of the result, ``magnitude`` DoRA's.
    ``check_finite`` adds an operand, set to 1 where a result is not finite and otherwise left alone: whether W was
    finite there is for the caller to see. ``settled``: results that a tensor core's sum would leave in doubt are made
    again in pairs of fp32, so that the golden rule holds however far terms cancel; costs time where kernels are bound
    by instructions, and nothing where files are.
    """

    out_features: int
    in_features: int
    sources: tuple[Source, ...]
    out: ElementKind
    base: ElementKind | None = None
    kernel: tuple[int, ...] = ()
    sink: Sink = Sink.MERGE
    layout: WeightLayout = WeightLayout.CHECKPOINT
    magnitude: ElementKind | None = None
    check_finite: bool = False
    settled: bool = False

    category = OpCategory.ADAPTER_WEIGHT

    def __post_init__(self) -> None:
        if min(self.out_features, self.in_features, *self.kernel, 0) < 0:
            raise InvalidProblem(f"weight: extents must not be negative, found {self.shape}; give the base's")
        if not self.sources:
            raise InvalidProblem("weight: no sources given, wanted at least one; give the adapter's")
        if (self.base is None) != (self.sink is Sink.DELTA):
            raise InvalidProblem(
                f"weight: sink {self.sink.value} with base {self.base}: only a delta has no base; "
                "choose the sink by the base"
            )
        if self.is_dora != (self.magnitude is not None):
            raise InvalidProblem(
                f"weight: sink {self.sink.value} with magnitude {self.magnitude}: DoRA alone has one; "
                "choose the sink by it"
            )
        if self.base is None and any(isinstance(s, ChannelScale) for s in self.sources):
            raise InvalidProblem("weight: a channel scale multiplies the base, so it has no delta of its own; merge it")
        for operand in self.operands():
            if operand.element not in FLOATS and operand.name != "not_finite":
                wanted = ", ".join(kind.value for kind in FLOATS)
                raise InvalidProblem(
                    f"weight: {operand.name} holds {operand.element.value}, wanted one of {wanted}; cast it first"
                )

    @property
    def taps(self) -> int:
        """The product of the kernel's extents; 1 for a linear weight."""
        return math.prod(self.kernel)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of W and of the result, as stored."""
        if self.layout is WeightLayout.FLAME:
            return (*self.kernel, self.in_features, self.out_features)
        return (self.out_features, self.in_features, *self.kernel)

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns of the stored weight as a matrix."""
        if self.layout is WeightLayout.FLAME:
            return (self.taps * self.in_features, self.out_features)
        return (self.out_features, self.in_features * self.taps)

    @property
    def is_dora(self) -> bool:
        """Whether the sink decomposes the weight."""
        return self.sink in (Sink.DORA_ROW, Sink.DORA_COLUMN)

    @property
    def layout_name(self) -> str:
        """The layout, for the SKU."""
        return self.layout.name.lower()

    @property
    def epilogue_name(self) -> str:
        """The sink, for the SKU."""
        return self.sink.value

    @functools.cached_property
    def source_operands(self) -> tuple[tuple[Operand, ...], ...]:
        """The operands of each source."""
        return tuple(
            source.operands(f"source{i}", self.out_features, self.in_features, self.taps)
            for i, source in enumerate(self.sources)
        )

    def operands(self) -> tuple[Operand, ...]:
        """out, base, the sources' factors, magnitude, and the flag, as far as the descriptor has them."""
        found = [Operand("out", self.out, self.shape, writes=True, may_alias="base")]
        if self.base is not None:
            found.append(Operand("base", self.base, self.shape))
        for group in self.source_operands:
            found += group
        if self.magnitude is not None:
            per = self.out_features if self.sink is Sink.DORA_ROW else self.in_features
            found.append(Operand("magnitude", self.magnitude, (per,)))
        if self.check_finite:
            found.append(Operand("not_finite", ElementKind.I32, (1,), writes=True, shared=True))
        return tuple(found)

    def reference(
        self,
        factors: Sequence[Sequence[np.ndarray]],
        scales: Sequence[float],
        base: np.ndarray | None = None,
        magnitude: np.ndarray | None = None,
        strength: float = 1.0,
    ) -> tuple[np.ndarray, np.ndarray]:
        """The exact result in float64, in the stored shape, and the magnitude that the guarantee is relative to.

        The magnitude is |W| + sum_i |scale_i| * (source_i of the factors' absolute values), through DoRA's gain.
        """
        w = None if base is None else self._to_matrix(np.asarray(base, np.float64))
        shape = (self.out_features, self.in_features * self.taps)
        delta, size = np.zeros(shape), np.zeros(shape)
        for source, operands, given, scale in zip(self.sources, self.source_operands, factors, scales, strict=True):
            arrays = [np.asarray(f, np.float64).reshape(o.shape) for o, f in zip(operands, given, strict=True)]
            args = (self.out_features, self.in_features, self.taps)
            factor = w if isinstance(source, ChannelScale) else 1.0
            delta += scale * source.exact(arrays, *args) * factor
            size += np.abs(scale * source.exact([np.abs(a) for a in arrays], *args) * factor)
        if w is not None:
            delta, size = w + delta, np.abs(w) + size
        if self.is_dora:
            gain = self._gain(delta, np.asarray(magnitude, np.float64))
            delta, size = (
                w + strength * (gain * delta - w),
                np.abs(w) + np.abs(strength * gain) * size + np.abs(w * strength),
            )
        return self._from_matrix(delta), self._from_matrix(size)

    def _gain(self, v: np.ndarray, magnitude: np.ndarray) -> np.ndarray:
        cube = v.reshape(self.out_features, self.in_features, self.taps)
        axes = (1, 2) if self.sink is Sink.DORA_ROW else (0, 2)
        gain = magnitude / (np.sqrt((cube**2).sum(axes)) + DORA_EPS)
        if self.sink is Sink.DORA_ROW:
            return gain[:, None]
        return np.repeat(gain, self.taps)[None, :]

    def _to_matrix(self, stored: np.ndarray) -> np.ndarray:
        if self.layout is WeightLayout.FLAME:
            cube = stored.reshape(self.taps, self.in_features, self.out_features)
            return cube.transpose(2, 1, 0).reshape(self.out_features, self.in_features * self.taps)
        return stored.reshape(self.out_features, self.in_features * self.taps)

    def _from_matrix(self, matrix: np.ndarray) -> np.ndarray:
        if self.layout is WeightLayout.FLAME:
            cube = matrix.reshape(self.out_features, self.in_features, self.taps)
            return cube.transpose(2, 1, 0).reshape(self.shape)
        return matrix.reshape(self.shape)


class WeightArgs(Arguments):
    """The tensors and numbers of one run.

    ``factors`` holds, for each source, its tensors in the order of the source's operands; ``scales`` one number
    for each source (strength times alpha / rank); ``strength`` is DoRA's.
    """

    def __init__(
        self,
        out: TensorMut,
        factors: Sequence[Sequence[TensorRef]],
        scales: Sequence[float],
        base: TensorRef | None = None,
        magnitude: TensorRef | None = None,
        strength: float = 1.0,
        not_finite: TensorMut | None = None,
    ) -> None:
        super().__init__()
        self.out, self.base, self.magnitude, self.not_finite = out, base, magnitude, not_finite
        self.factors = tuple(tuple(group) for group in factors)
        self.scales = tuple(float(s) for s in scales)
        self.strength = float(strength)

    def tensors(self) -> list[TensorRef]:
        """Everything that was given, in declared order."""
        optional = (self.base, *(f for group in self.factors for f in group), self.magnitude, self.not_finite)
        return [self.out, *(t for t in optional if t is not None)]
