"""A tensor core that is as inexact as they come: sm_80's, for the simulator's twin.

Products are exact. Eight at a time are added to what is there: each of the nine is cut at one bit below the last of an
fp32 number as large as the largest of them, and the sum is cut to fp32 (Fasi, Higham, Mikaitis and Pranesh, Numerical
behavior of NVIDIA tensor cores, 2021; Khattak and Mikaitis, arXiv:2512.07004: sm_90 adds sixteen and keeps two bits).
"""

from __future__ import annotations

import numpy as np

PRODUCTS, KEPT_BITS = 8, 24


def _powers(x: np.ndarray) -> np.ndarray:
    """The largest powers of two below or at positive numbers; something tiny for zeros."""
    return np.ldexp(1.0, np.frexp(np.maximum(np.abs(x), 2.0**-149))[1] - 1)


def _cut(x: np.ndarray, last: np.ndarray) -> np.ndarray:
    return np.trunc(x / last) * last


def accumulate(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """c + a @ b, float32 [m, n], for a [m, k] and b [k, n]."""
    terms = a.astype(np.float64)[:, None, :] * b.astype(np.float64).T[None]
    total = c.astype(np.float64)
    for first in range(0, terms.shape[2], PRODUCTS):
        block = np.concatenate([total[..., None], terms[..., first : first + PRODUCTS]], 2)
        last = _powers(np.abs(block).max(2)) * 2.0**-KEPT_BITS
        total = _cut(block, last[..., None]).sum(2)
        total = _cut(total, _powers(total) * 2.0**-23)
    return total.astype(np.float32)
