"""Kronecker products over the two channel axes of a weight: LoKr, arXiv:2212.10650."""

from __future__ import annotations

import math

from lycoris.buffers import DeviceArray
from lycoris.errors import RefusedInput
from lycoris.ops.checks import check_axes
from lycoris.ops.weight import delta
from plans.core import ElementKind
from plans.weight import Kronecker, WeightLayout


def factorization(dimension: int, factor: int = -1) -> tuple[int, int]:
    """(m, n) with m * n = dimension and m <= n, as LyCORIS splits a dimension for LoKr.

    A positive ``factor`` that divides the dimension is one of the two. Otherwise m is the largest divisor that is
    at most ``factor`` and at most the square root; any negative ``factor`` sets no limit, which gives the most
    square split. Raises RefusedInput for a dimension below 1.
    """
    if dimension < 1:
        raise RefusedInput(f"factorization: dimension {dimension}, wanted 1 or more; give the layer's")
    if factor > 0 and dimension % factor == 0:
        return min(factor, dimension // factor), max(factor, dimension // factor)
    root = math.isqrt(dimension)
    limit = root if factor < 0 else min(factor, root)
    m = next((d for d in range(limit, 0, -1) if dimension % d == 0), 1)
    return m, dimension // m


def make_kronecker(
    w1: DeviceArray, w2: DeviceArray, scale: float = 1.0, kind: ElementKind | None = None
) -> DeviceArray:
    """The weight scale * kron(w1, w2): w1 [a, b], w2 [c, d, *kernel] -> [a * c, b * d, *kernel].

    The result has ``kind``, or w1's. Raises RefusedInput where shapes do not fit.
    """
    return _kronecker("make_kronecker", w1, w2, scale, kind, WeightLayout.CHECKPOINT)


def make_kronecker_conv_kernel(
    w1: DeviceArray, w2: DeviceArray, scale: float = 1.0, kind: ElementKind | None = None
) -> DeviceArray:
    """The weight scale * kron(w1, w2) in FLAME's layout: w1 [OL, IM], w2 [OK, IN, KH, KW] -> [KH, KW, IM*IN, OL*OK].

    One kernel writes that layout; nothing is permuted before or after. The result has ``kind``, or w1's. Raises
    RefusedInput where shapes do not fit.
    """
    return _kronecker("make_kronecker_conv_kernel", w1, w2, scale, kind, WeightLayout.FLAME)


def _kronecker(
    operation: str,
    w1: DeviceArray,
    w2: DeviceArray,
    scale: float,
    kind: ElementKind | None,
    layout: WeightLayout,
) -> DeviceArray:
    check_axes(operation, "w1", w1, 2)
    check_axes(operation, "w2", w2, 2)
    (a, b), (c, d, *kernel) = w1.shape[:2], w2.shape
    source = Kronecker(a, b, c, d, w1.kind, w2.kind)
    return delta(source, (w1, w2), (a * c, b * d, *kernel), scale, kind or w1.kind, layout)
