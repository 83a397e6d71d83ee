"""What the bits of stored values tell without converting them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from lycoris.dtype import DTYPES, OPTIONS
from plans.core import ElementKind

KINDS = {name: ElementKind.of(DTYPES[name].numpy) for name in OPTIONS.values()}
"""safetensors name -> how plans call it, of the types that are merged."""

_EXPONENTS = {ElementKind.BF16: 0x7F80, ElementKind.F16: 0x7C00, ElementKind.F32: 0x7F800000}
"""The bits that are all set in a NaN and in an infinity, and in nothing else."""

_OVERFLOWS = {
    (ElementKind.F32, ElementKind.F16): 0x477FF000,
    (ElementKind.BF16, ElementKind.F16): 0x4780,
    (ElementKind.F32, ElementKind.BF16): 0x7F7F8000,
}
"""(from, to) -> the smallest magnitude that rounds to infinity; other conversions keep finite values finite."""

_CHUNK = 1 << 18  # elements looked at together, so that what lies between stays in the CPU's cache


def all_finite(data: np.ndarray, kind: ElementKind) -> bool:
    """Whether `data`, the bytes of elements of `kind`, holds no NaN and no infinity."""
    exponent = _EXPONENTS[kind]
    return all(int(magnitudes.max()) < exponent for magnitudes in _magnitudes(data, kind))


def overflows(data: np.ndarray, kind: ElementKind, out: ElementKind) -> bool:
    """Whether `data`, the bytes of elements of `kind`, holds finite values that are infinite once rounded to `out`."""
    if (kind, out) not in _OVERFLOWS:
        return False
    limit, exponent = _OVERFLOWS[kind, out], _EXPONENTS[kind]
    for magnitudes in _magnitudes(data, kind):
        if int(magnitudes.max()) >= limit and ((magnitudes >= limit) & (magnitudes < exponent)).any():
            return True
    return False


def became_infinite(before: np.ndarray, kind: ElementKind, after: np.ndarray, out: ElementKind) -> bool:
    """Whether an element of `after`, bytes of `out`, is NaN or infinite, and that of `before`, of `kind`, is not."""
    pairs = zip(_magnitudes(before, kind), _magnitudes(after, out), strict=True)
    return any(((a >= _EXPONENTS[out]) & (b < _EXPONENTS[kind])).any() for b, a in pairs)


def _magnitudes(data: np.ndarray, kind: ElementKind) -> Iterator[np.ndarray]:
    """The elements without their signs, as unsigned integers in the values' order, chunk by chunk."""
    bits = data.view(np.dtype(f"u{kind.itemsize}"))
    mask = bits.dtype.type((1 << (8 * kind.itemsize - 1)) - 1)
    for begin in range(0, bits.size, _CHUNK):
        yield bits[begin : begin + _CHUNK] & mask
