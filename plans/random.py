"""Random numbers, and dropout, that a seed, a stream and an element's index decide: made again, they are the same.

For example:

    plan = RandomPlan.select(stream, RandomDescriptor(4096 * 3072, ElementKind.BF16, Distribution.NORMAL))
    plan.run(stream, None, RandomArgs(out, low=0.0, width=0.02, seed=7, number=0))
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from kernels import random as kernel
from plans.core import (
    ArchSku,
    BackendKind,
    Device,
    ElementKind,
    InvalidProblem,
    MathPrecision,
    OpCategory,
    Operand,
    Plan,
    PrecisionGuarantee,
    Sku,
    TensorMut,
    TensorRef,
    Workspace,
)
from plans.core.plan import Arguments

_KINDS = (ElementKind.BF16, ElementKind.F16, ElementKind.F32)
_VECTOR_BYTES = 16
_WORD = 2**32
_ORIGIN = (Operand("origin", ElementKind.I64, (2,)),)


class Distribution(enum.Enum):
    """UNIFORM on [0, 1), multiples of 2**-24; NORMAL with mean 0 and deviation 1. The value is the kernels' name."""

    UNIFORM = "uniform"
    NORMAL = "normal"


def philox(count: int, seed: int, number: int) -> np.ndarray:
    """The words of ``count`` elements of stream ``number``: Philox4x32-10 (J. Salmon et al., SC11), uint32."""
    block = np.arange(-(-count // 4), dtype=np.uint64)
    low, shift = np.uint64(_WORD - 1), np.uint64(32)
    stream = np.full_like(block, number % _WORD**2)
    a, b, c, d = block & low, block >> shift, stream & low, stream >> shift
    words = _philox_rounds((a, b, c, d), seed, np.uint64)
    return np.stack(words, 1).reshape(-1)[:count].astype(np.uint32)


def _philox_rounds(words: tuple, seed: int, number: type) -> tuple:
    """All rounds on four words, each a ``number`` (a Python integer, or NumPy's of 64 bits) or an array of such."""
    (a, b, c, d), keys = words, [seed % _WORD, seed // _WORD % _WORD]
    low, shift, m0, m1 = (number(value) for value in (_WORD - 1, 32, *kernel.MULTIPLIERS))
    for _ in range(kernel.ROUNDS):
        p, q = a * m0, c * m1
        a, b, c, d = (q >> shift) ^ b ^ number(keys[0]), q & low, (p >> shift) ^ d ^ number(keys[1]), p & low
        keys = [(key + step) % _WORD for key, step in zip(keys, kernel.INCREMENTS, strict=True)]
    return a, b, c, d


def first_uniform(seed: int, number: int) -> float:
    """Element 0 of a stream of uniform numbers, as the kernels make it, without a device or arrays."""
    first, *_ = _philox_rounds((0, 0, number % _WORD, number // _WORD % _WORD), seed, int)
    return (first >> 8) * 2.0**-24


def uniform(words: np.ndarray) -> np.ndarray:
    """Words as multiples of 2**-24 in [0, 1), float64."""
    return (words >> 8) * 2.0**-24


def normal(words: np.ndarray) -> np.ndarray:
    """Pairs of words as pairs of normal numbers, by Box and Muller, float64."""
    pairs = np.pad(words >> 8, (0, len(words) % 2)).reshape(-1, 2).astype(np.float64)
    radius = np.sqrt(-2 * np.log((pairs[:, 0] + 1) * 2.0**-24))
    angle = (pairs[:, 1] - 2.0**23) * (2.0**-23 * math.pi)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1).reshape(-1)[: len(words)]


@dataclass(frozen=True)
class RandomDescriptor:
    """out[i] = round(low + width * number i) for ``count`` elements.

    ``counted``: seed and stream are counted from an origin in device memory, which may change between two runs.
    """

    count: int
    element: ElementKind
    distribution: Distribution
    counted: bool = False

    category = OpCategory.RANDOM

    def __post_init__(self) -> None:
        if self.count < 0:
            raise InvalidProblem(f"random: {self.count} elements, wanted 0 or more; give the tensor's count")

    def operands(self) -> tuple[Operand, ...]:
        """``out``, and ``origin`` [seed, stream] where it is counted."""
        return (Operand("out", self.element, (self.count,), writes=True), *_ORIGIN[: self.counted])

    def reference(self, low: float, width: float, seed: int, number: int) -> tuple[np.ndarray, np.ndarray]:
        """The numbers in float64, and their magnitude."""
        words = philox(-(-self.count // 2) * 2, seed, number)
        own = (uniform if self.distribution is Distribution.UNIFORM else normal)(words)[: self.count]
        low, width = np.float64(np.float32(low)), np.float64(np.float32(width))
        if self.distribution is Distribution.UNIFORM:
            return low + width * own, np.abs(low) + np.abs(width * own)
        radius = np.sqrt(-2 * np.log(((words >> 8)[0::2] + 1) * 2.0**-24)).repeat(2)[: self.count]
        # Near a radius of 0 the logarithm's last bit counts by its root.
        return low + width * own, np.abs(low) + np.abs(width) * (radius + 2.0**-6)


class RandomArgs(Arguments):
    """The result, the affine map, the seed and the number of the stream, both 0 to 2**63 - 1, and their origin."""

    def __init__(
        self, out: TensorMut, low: float, width: float, seed: int, number: int, origin: TensorRef | None = None
    ) -> None:
        super().__init__()
        self.out, self.origin = out, origin
        self.rest = (np.float32(low), np.float32(width), _number("seed", seed), _number("stream", number))

    def tensors(self) -> list[TensorRef]:
        """``out`` and ``origin``."""
        return [self.out, *_given(self.origin)]


def _given(tensor: TensorRef | None) -> list[TensorRef]:
    return [] if tensor is None else [tensor]


def _number(name: str, value: int) -> int:
    if not 0 <= value < 2**63:
        raise InvalidProblem(f"random: {name} {value}, wanted 0 to 2**63 - 1; give another")
    return value


@dataclass(frozen=True)
class DropoutDescriptor:
    """out[i] = round(x[i] * scale) where uniform number i is at least p, else 0.

    ``counted`` as in :class:`RandomDescriptor`.
    """

    count: int
    element: ElementKind
    out: ElementKind
    counted: bool = False

    category = OpCategory.RANDOM

    def __post_init__(self) -> None:
        if self.count < 0:
            raise InvalidProblem(f"dropout: {self.count} elements, wanted 0 or more; give the tensor's count")

    def operands(self) -> tuple[Operand, ...]:
        """``out`` and ``x``, and ``origin`` where it is counted; out may be x."""
        same = "x" if self.out is self.element else ""
        return (
            Operand("out", self.out, (self.count,), writes=True, may_alias=same),
            Operand("x", self.element, (self.count,)),
            *_ORIGIN[: self.counted],
        )

    def reference(self, x: np.ndarray, p: float, scale: float, seed: int, number: int) -> tuple[np.ndarray, np.ndarray]:
        """The result in float64, and its magnitude."""
        kept = uniform(philox(self.count, seed, number)) >= np.float32(p)
        exact = np.where(kept, x.astype(np.float64) * np.float64(np.float32(scale)), 0)
        return exact, np.abs(exact)


class DropoutArgs(Arguments):
    """The tensors, the probability of a zero, what others are multiplied by, seed, the stream's number, the origin."""

    def __init__(
        self,
        out: TensorMut,
        x: TensorRef,
        p: float,
        scale: float,
        seed: int,
        number: int,
        origin: TensorRef | None = None,
    ) -> None:
        super().__init__()
        self.out, self.x, self.origin = out, x, origin
        self.rest = (np.float32(p), np.float32(scale), _number("seed", seed), _number("stream", number))

    def tensors(self) -> list[TensorRef]:
        """``out``, ``x`` and ``origin``."""
        return [self.out, self.x, *_given(self.origin)]


def _refuses(d: RandomDescriptor | DropoutDescriptor) -> str:
    for operand in d.operands():
        if operand.element not in _KINDS and operand not in _ORIGIN:
            return f"makes {', '.join(k.value for k in _KINDS)}, not {operand.element.value}"
    return ""


class _Program:
    """One launch, eight elements a thread."""

    def __init__(self, d: RandomDescriptor | DropoutDescriptor, device: Device) -> None:
        self.count, self.counted, self.launch = d.count, d.counted, None
        if d.count:
            self.launch = self.make(d).launcher((-(-d.count // (kernel.THREADS * kernel.RUN)), 1, 1))

    def make(self, d: RandomDescriptor) -> Callable:
        """The kernel."""
        return kernel.random(d.distribution.value, d.element.value, d.counted)

    def bind(self, args: RandomArgs | DropoutArgs, workspace: Workspace) -> list[tuple[Callable, tuple]]:
        """The launch; none where there is nothing to make."""
        if self.launch is None:
            return []
        data = [tensor.data for tensor in args.tensors()]
        origin = [data.pop()] if self.counted else []
        return [(self.launch, (*reversed(data), *args.rest, self.count, *origin))]


class _DropoutProgram(_Program):
    def make(self, d: DropoutDescriptor) -> Callable:
        return kernel.dropout(d.element.value, d.out.value, d.counted)


def _guarantee(units: float, derivation: str) -> PrecisionGuarantee:
    return PrecisionGuarantee(
        math_precision=MathPrecision.F32,
        accumulator=ElementKind.F32,
        deterministic=True,
        bit_stable_on_same_hardware=True,
        rounding_units=units,
        derivation=derivation,
    )


_UNIFORM = _guarantee(2.0, "a product and a sum")
_NORMAL = _guarantee(
    16.0, "sine and cosine within 2**-20.9 of the radius (PTX ISA), its logarithm 1 ulp, root, product and sum 1 each"
)
_DROPPED = _guarantee(1.0, "one product")


class RandomPlan(Plan):
    """Random numbers; see :class:`RandomDescriptor`."""

    name = "random"
    skus = (
        Sku(
            name="philox",
            backend=BackendKind.VECTOR,
            arch=ArchSku.ANY,
            refuses=_refuses,
            guarantee=lambda d: _UNIFORM if d.distribution is Distribution.UNIFORM else _NORMAL,
            build=_Program,
            alignment=_VECTOR_BYTES,
        ),
    )


class DropoutPlan(Plan):
    """Elements dropped at random; see :class:`DropoutDescriptor`."""

    name = "dropout"
    skus = (
        Sku(
            name="philox",
            backend=BackendKind.VECTOR,
            arch=ArchSku.ANY,
            refuses=_refuses,
            guarantee=lambda d: _DROPPED,
            build=_DropoutProgram,
            alignment=_VECTOR_BYTES,
        ),
    )
