"""Products of two low-rank products, element by element: LoHa's weight, arXiv:2108.06098."""

from __future__ import annotations

from lycoris.buffers import DeviceArray
from lycoris.ops.checks import check_axes
from lycoris.ops.tucker import tucker_source
from lycoris.ops.weight import delta
from plans.core import ElementKind
from plans.weight import Hadamard, LowRank


def make_hadamard_weight(
    w1_a: DeviceArray,
    w1_b: DeviceArray,
    w2_a: DeviceArray,
    w2_b: DeviceArray,
    scale: float = 1.0,
    kind: ElementKind | None = None,
) -> DeviceArray:
    """The weight scale * (w1_a @ w1_b) * (w2_a @ w2_b), elementwise: [O, r] and [r, I, *kernel] make [O, I, *kernel].

    The result has ``kind``, or w1_a's. Raises RefusedInput where shapes do not fit.
    """
    for name, tensor in (("w1_a", w1_a), ("w1_b", w1_b), ("w2_a", w2_a), ("w2_b", w2_b)):
        check_axes("make_hadamard_weight", name, tensor, 2)
    first, second = (LowRank(b.shape[0], a.kind, b.kind) for a, b in ((w1_a, w1_b), (w2_a, w2_b)))
    factors = (w1_a, w1_b, w2_a, w2_b)
    return delta(Hadamard(first, second), factors, (w1_a.shape[0], *w1_b.shape[1:]), scale, kind)


def make_hadamard_weight_tucker(
    t1: DeviceArray,
    w1_a: DeviceArray,
    w1_b: DeviceArray,
    t2: DeviceArray,
    w2_a: DeviceArray,
    w2_b: DeviceArray,
    scale: float = 1.0,
    kind: ElementKind | None = None,
) -> DeviceArray:
    """The weight scale * T1 * T2, elementwise, T = sum_ij t[i, j, ...] w_a[i, o] w_b[j, q]; shapes: `rebuild_tucker`.

    The result [O, I, *kernel] has ``kind``, or w1_a's. Raises RefusedInput where shapes do not fit.
    """
    first = tucker_source("make_hadamard_weight_tucker", t1, w1_a, w1_b)
    second = tucker_source("make_hadamard_weight_tucker", t2, w2_a, w2_b)
    shape = (w1_a.shape[1], w1_b.shape[1], *t1.shape[2:])
    return delta(Hadamard(first, second), (w1_a, w1_b, t1, w2_a, w2_b, t2), shape, scale, kind)
