"""Division by a number that the host knows: a multiplication and a shift of 31-bit integers.

For 0 <= n < 2**31, 0 < d < 2**31 and s = ceil(log2 d): n // d = (2 n * M) >> (32 + s) with M = ceil(2**(31 + s) / d),
which is below 2**32 (Granlund and Montgomery, Division by invariant integers using multiplication, 1994).
"""

from __future__ import annotations

import numpy as np

from kernels.bits import multiply_high
from kernels.target import device


def reciprocal_of(divisor: int) -> int:
    """``divisor``'s M and s as one kernel parameter: M + s * 2**32."""
    shift = (divisor - 1).bit_length()
    return -(-(1 << (31 + shift)) // divisor) | shift << 32


@device
def divide(n, reciprocal):
    """The quotient n // d as uint32, for ``reciprocal_of(d)``; n is below 2**31."""
    factor = np.uint32(reciprocal & np.int64(0xFFFFFFFF))
    shift = np.uint32(reciprocal >> np.int64(32))
    return np.uint32(multiply_high(np.uint32(np.uint32(n) << np.uint32(1)), factor) >> shift)


@device
def remainder(n, divisor, reciprocal):
    """The remainder n % divisor as uint32; n is below 2**31."""
    return np.uint32(np.uint32(n) - np.uint32(divide(n, reciprocal) * np.uint32(divisor)))
