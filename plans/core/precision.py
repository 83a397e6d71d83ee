"""Element kinds, arithmetic, and what a SKU promises about its result.

All tolerances of the library are guarantees, written here or beside the SKU that makes them, each with its
derivation; tests use them and nothing else.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

import ml_dtypes
import numpy as np


class ElementKind(enum.Enum):
    """How an element is stored. The value is the kernels' name for the kind."""

    BF16 = "bf16"
    F16 = "f16"
    F32 = "f32"
    I32 = "i32"
    I64 = "i64"

    # Members are their own identity; Enum hashes their names in Python, which every plan lookup would pay for.
    __hash__ = object.__hash__

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return _STORAGE[self].itemsize

    @property
    def storage(self) -> np.dtype:
        """The NumPy dtype that kernels see: 16-bit floats are bits in uint16."""
        return _STORAGE[self]

    @property
    def values(self) -> np.dtype:
        """The NumPy dtype that has the element's values."""
        return _VALUES[self]

    @classmethod
    def of(cls, dtype: np.dtype) -> ElementKind:
        """The kind that stores values of a NumPy dtype; ``KeyError`` where there is none."""
        return _OF[np.dtype(dtype)]


_VALUES = {
    ElementKind.BF16: np.dtype(ml_dtypes.bfloat16),
    ElementKind.F16: np.dtype(np.float16),
    ElementKind.F32: np.dtype(np.float32),
    ElementKind.I32: np.dtype(np.int32),
    ElementKind.I64: np.dtype(np.int64),
}
_STORAGE = _VALUES | {ElementKind.BF16: np.dtype(np.uint16), ElementKind.F16: np.dtype(np.uint16)}
_OF = {dtype: kind for kind, dtype in _VALUES.items()}


class MathPrecision(enum.Enum):
    """The arithmetic a SKU computes in."""

    F32 = "f32"
    BF16_TENSOR_CORE = "bf16 products, fp32 sums"


@dataclass(frozen=True)
class PrecisionGuarantee:
    """What a SKU promises about its result.

    The result is some ``x`` rounded once, to nearest even, to the output's kind, with
    ``|x - exact| <= rounding_units * 2**-24 * magnitude``: ``magnitude`` is the family's own (for a merge
    ``|W| + sum of |terms|``), and ``derivation`` says where the number comes from. ``settled`` results also keep the
    golden rule, ``|x - exact| <= 2**-12 ulp + 8 * 2**-24 * (|W| + |exact - W|)``, however far their terms cancel.
    """

    math_precision: MathPrecision
    accumulator: ElementKind
    deterministic: bool
    bit_stable_on_same_hardware: bool
    rounding_units: float
    derivation: str
    settled: bool = False

    @classmethod
    def exact(cls, derivation: str) -> PrecisionGuarantee:
        """Nothing but the final rounding."""
        return cls(
            math_precision=MathPrecision.F32,
            accumulator=ElementKind.F32,
            deterministic=True,
            bit_stable_on_same_hardware=True,
            rounding_units=0.0,
            derivation=derivation,
        )

    def bound(self, magnitude: np.ndarray) -> np.ndarray:
        """The largest error before the final rounding, for float64 magnitudes."""
        return self.rounding_units * 2.0**-24 * magnitude

    def accepts(self, found: np.ndarray, exact: np.ndarray, magnitude: np.ndarray, kind: ElementKind) -> np.ndarray:
        """Which elements keep the promise; ``found`` has the kind's values, the others are float64."""
        reach = self.bound(magnitude)
        low, high = (round_to(exact - reach, kind), round_to(exact + reach, kind))
        value = found.astype(np.float64)
        return (low.astype(np.float64) <= value) & (value <= high.astype(np.float64))


def round_to(exact: np.ndarray, kind: ElementKind) -> np.ndarray:
    """Round float64 once, to nearest even, to a kind.

    Casting float64 to bf16 goes through fp32, which rounds twice; the fp32 value is therefore made sticky
    (odd in its last bit where it is inexact), so that the second rounding cannot see a false tie.
    """
    exact = np.asarray(exact, np.float64)
    if kind is not ElementKind.BF16:
        with np.errstate(over="ignore"):
            return exact.astype(kind.values)
    with np.errstate(over="ignore"):
        single = exact.astype(np.float32)
    inexact = np.isfinite(single) & (single.astype(np.float64) != exact)
    away = np.abs(single.astype(np.float64)) > np.abs(exact)
    bits = single.view(np.uint32)
    truncated = np.where(inexact & away, bits - np.uint32(1), bits)
    sticky = np.where(inexact, truncated | np.uint32(1), truncated).astype(np.uint32)
    return sticky.view(np.float32).astype(kind.values)
