"""Element types of safetensors files: one table that readers, writers and the command line go by.

Source: the `Dtype` enum of safetensors 0.8; a test checks that both agree.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import ml_dtypes
import numpy as np


@dataclass(frozen=True, slots=True)
class DType:
    """A safetensors element type.

    Attributes:
        name: Spelling in a file's header.
        bits: Bits per element. Types below 8 bits are packed without gaps.
        numpy: Type of the array that views the stored bytes; uint8 where elements are packed into bytes.
        option: Spelling on the command line (`--dtype`). Set for the types that a merge reads and writes.
    """

    name: str
    bits: int
    numpy: np.dtype
    option: str | None = None

    @property
    def packed(self) -> bool:
        """Whether an element is smaller than a byte, so that NumPy cannot index it."""
        return self.bits < 8

    @property
    def mergeable(self) -> bool:
        """Whether a merge can read and write weights of this type."""
        return self.option is not None


def _row(name: str, bits: int, numpy_type: type, option: str | None = None) -> DType:
    return DType(name, bits, np.dtype(numpy_type), option)


DTYPES: dict[str, DType] = {
    dtype.name: dtype
    for dtype in (
        _row("BOOL", 8, np.bool_),
        _row("F4", 4, np.uint8),
        _row("F6_E2M3", 6, np.uint8),
        _row("F6_E3M2", 6, np.uint8),
        _row("U8", 8, np.uint8),
        _row("I8", 8, np.int8),
        _row("F8_E5M2", 8, ml_dtypes.float8_e5m2),
        _row("F8_E4M3", 8, ml_dtypes.float8_e4m3fn),
        _row("F8_E8M0", 8, ml_dtypes.float8_e8m0fnu),
        _row("F8_E4M3FNUZ", 8, ml_dtypes.float8_e4m3fnuz),
        _row("F8_E5M2FNUZ", 8, ml_dtypes.float8_e5m2fnuz),
        _row("I16", 16, np.int16),
        _row("U16", 16, np.uint16),
        _row("F16", 16, np.float16, option="fp16"),
        _row("BF16", 16, ml_dtypes.bfloat16, option="bf16"),
        _row("I32", 32, np.int32),
        _row("U32", 32, np.uint32),
        _row("F32", 32, np.float32, option="fp32"),
        _row("C64", 64, np.complex64),
        _row("F64", 64, np.float64),
        _row("I64", 64, np.int64),
        _row("U64", 64, np.uint64),
    )
}

MERGEABLE: frozenset[str] = frozenset(name for name, dtype in DTYPES.items() if dtype.mergeable)
"""safetensors names of the types that a merge reads and writes."""

OPTIONS: dict[str, str] = {dtype.option: name for name, dtype in DTYPES.items() if dtype.option is not None}
"""Command-line spelling -> safetensors name: {"fp16": "F16", "bf16": "BF16", "fp32": "F32"}."""


def bits_of(dtype: str, shape: Sequence[int]) -> int:
    """Bits that a tensor of safetensors type `dtype` and `shape` takes in a file."""
    return math.prod(shape) * DTYPES[dtype].bits
