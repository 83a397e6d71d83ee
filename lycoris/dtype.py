"""Element types of safetensors files: one table that readers, writers and the command line go by.

NumPy is imported where an array type is asked for, not for the names.
Source: the `Dtype` enum of safetensors 0.8; a test checks that both agree.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True, slots=True)
class DType:
    """A safetensors element type.

    Attributes:
        name: Spelling in a file's header.
        bits: Bits per element. Types below 8 bits are packed without gaps.
        array: NumPy's or ml_dtypes' name of the type that views the stored bytes; uint8 where elements are packed.
        option: Spelling on the command line (`--dtype`). Set for the types that a merge reads and writes.
    """

    name: str
    bits: int
    array: str
    option: str | None = None

    @property
    def numpy(self) -> np.dtype:
        """Type of the array that views the stored bytes."""
        return _numpy_dtype(self.array)

    @property
    def packed(self) -> bool:
        """Whether an element is smaller than a byte, so that NumPy cannot index it."""
        return self.bits < 8

    @property
    def mergeable(self) -> bool:
        """Whether a merge can read and write weights of this type."""
        return self.option is not None


@functools.cache
def _numpy_dtype(name: str) -> np.dtype:
    import ml_dtypes  # noqa: F401 - registers its types with NumPy
    import numpy as np

    return np.dtype(name)


DTYPES: dict[str, DType] = {
    dtype.name: dtype
    for dtype in (
        DType("BOOL", 8, "bool"),
        DType("F4", 4, "uint8"),
        DType("F6_E2M3", 6, "uint8"),
        DType("F6_E3M2", 6, "uint8"),
        DType("U8", 8, "uint8"),
        DType("I8", 8, "int8"),
        DType("F8_E5M2", 8, "float8_e5m2"),
        DType("F8_E4M3", 8, "float8_e4m3fn"),
        DType("F8_E8M0", 8, "float8_e8m0fnu"),
        DType("F8_E4M3FNUZ", 8, "float8_e4m3fnuz"),
        DType("F8_E5M2FNUZ", 8, "float8_e5m2fnuz"),
        DType("I16", 16, "int16"),
        DType("U16", 16, "uint16"),
        DType("F16", 16, "float16", option="fp16"),
        DType("BF16", 16, "bfloat16", option="bf16"),
        DType("I32", 32, "int32"),
        DType("U32", 32, "uint32"),
        DType("F32", 32, "float32", option="fp32"),
        DType("C64", 64, "complex64"),
        DType("F64", 64, "float64"),
        DType("I64", 64, "int64"),
        DType("U64", 64, "uint64"),
    )
}

MERGEABLE: frozenset[str] = frozenset(name for name, dtype in DTYPES.items() if dtype.mergeable)
"""safetensors names of the types that a merge reads and writes."""

OPTIONS: dict[str, str] = {dtype.option: name for name, dtype in DTYPES.items() if dtype.option is not None}
"""Command-line spelling -> safetensors name: {"fp16": "F16", "bf16": "BF16", "fp32": "F32"}."""


def bits_of(dtype: str, shape: Sequence[int]) -> int:
    """Bits that a tensor of safetensors type `dtype` and `shape` takes in a file."""
    return math.prod(shape) * DTYPES[dtype].bits
