"""New modules of every form, with the shapes that LyCORIS gives their factors; trained ones, and exact deltas."""

from __future__ import annotations

import numpy as np
import pytest
from reference import delta64

from lycoris.algorithms import LoConModule, LoHaModule, LoKrModule
from lycoris.buffers import DeviceArray
from lycoris.layout import to_flame
from plans.core import ElementKind
from plans.core.precision import round_to
from plans.weight import WeightLayout

BF16, F16, F32 = ElementKind.BF16, ElementKind.F16, ElementKind.F32
CHECKPOINT, FLAME = WeightLayout.CHECKPOINT, WeightLayout.FLAME

# Name: (constructor, the weight's shape, the factors' shapes as LyCORIS 4.1.3 makes them).
NEW = {
    "locon linear": (
        lambda **o: LoConModule.new_linear(7, 10, 4, 2.0, **o),
        (10, 7),
        {"lora_up.weight": (10, 4), "lora_down.weight": (4, 7)},
    ),
    "locon conv1d": (
        lambda **o: LoConModule.new_conv1d(6, 5, 3, 2, 2.0, **o),
        (5, 6, 3),
        {"lora_up.weight": (5, 2, 1), "lora_down.weight": (2, 6, 3)},
    ),
    "locon conv2d": (
        lambda **o: LoConModule.new_conv2d(6, 5, (3, 1), 2, 1.0, **o),
        (5, 6, 3, 1),
        {"lora_up.weight": (5, 2, 1, 1), "lora_down.weight": (2, 6, 3, 1)},
    ),
    "locon conv3d": (
        lambda **o: LoConModule.new_conv3d(3, 4, 2, 2, **o),
        (4, 3, 2, 2, 2),
        {"lora_up.weight": (4, 2, 1, 1, 1), "lora_down.weight": (2, 3, 2, 2, 2)},
    ),
    "locon tucker": (
        lambda **o: LoConModule.new_conv2d(6, 5, 3, 2, use_tucker=True, **o),
        (5, 6, 3, 3),
        {"lora_up.weight": (5, 2, 1, 1), "lora_down.weight": (2, 6, 1, 1), "lora_mid.weight": (2, 2, 3, 3)},
    ),
    "locon tucker 1x1": (
        lambda **o: LoConModule.new_conv2d(6, 5, 1, 2, use_tucker=True, **o),
        (5, 6, 1, 1),
        {"lora_up.weight": (5, 2, 1, 1), "lora_down.weight": (2, 6, 1, 1)},
    ),
    "loha linear": (
        lambda **o: LoHaModule.new_linear(7, 10, 4, 2.0, **o),
        (10, 7),
        {"hada_w1_a": (10, 4), "hada_w1_b": (4, 7), "hada_w2_a": (10, 4), "hada_w2_b": (4, 7)},
    ),
    "loha conv2d": (
        lambda **o: LoHaModule.new_conv2d(6, 5, 3, 2, **o),
        (5, 6, 3, 3),
        {"hada_w1_a": (5, 2), "hada_w1_b": (2, 54), "hada_w2_a": (5, 2), "hada_w2_b": (2, 54)},
    ),
    "loha tucker": (
        lambda **o: LoHaModule.new_conv2d(6, 5, 3, 2, 3.0, use_tucker=True, **o),
        (5, 6, 3, 3),
        {
            "hada_w1_a": (2, 5), "hada_w1_b": (2, 6), "hada_t1": (2, 2, 3, 3),
            "hada_w2_a": (2, 5), "hada_w2_b": (2, 6), "hada_t2": (2, 2, 3, 3),
        },
    ),
    "lokr linear": (
        lambda **o: LoKrModule.new_linear(48, 24, 2, 1.0, **o),
        (24, 48),
        {"lokr_w1": (4, 6), "lokr_w2_a": (6, 2), "lokr_w2_b": (2, 8)},
    ),
    "lokr factor 8": (
        lambda **o: LoKrModule.new_linear(48, 24, 2, factor=8, **o),
        (24, 48),
        {"lokr_w1": (3, 6), "lokr_w2_a": (8, 2), "lokr_w2_b": (2, 8)},
    ),
    "lokr decompose both": (
        lambda **o: LoKrModule.new_linear(48, 24, 2, 4.0, decompose_both=True, **o),
        (24, 48),
        {"lokr_w1_a": (4, 2), "lokr_w1_b": (2, 6), "lokr_w2_a": (6, 2), "lokr_w2_b": (2, 8)},
    ),
    "lokr w1 factored": (
        lambda **o: LoKrModule.new_linear(36, 36, 2, factor=6, decompose_both=True, use_tucker=True, **o),
        (36, 36),
        {"lokr_w1_a": (6, 2), "lokr_w1_b": (2, 6), "lokr_w2_a": (6, 2), "lokr_w2_b": (2, 6)},
    ),
    "lokr w1 at half its extent": (
        lambda **o: LoKrModule.new_linear(36, 36, 2, factor=4, decompose_both=True, **o),
        (36, 36),
        {"lokr_w1": (4, 4), "lokr_w2_a": (9, 2), "lokr_w2_b": (2, 9)},
    ),
    "lokr rank too large": (
        lambda **o: LoKrModule.new_linear(48, 24, 4, 1.0, decompose_both=True, **o),
        (24, 48),
        {"lokr_w1": (4, 6), "lokr_w2": (6, 8)},
    ),
    "lokr full matrix": (
        lambda **o: LoKrModule.new_conv2d(6, 8, 3, 1, full_matrix=True, decompose_both=True, **o),
        (8, 6, 3, 3),
        {"lokr_w1": (2, 2), "lokr_w2": (4, 3, 3, 3)},
    ),
    "lokr unbalanced": (
        lambda **o: LoKrModule.new_linear(6, 8, 1, unbalanced_factorization=True, **o),
        (8, 6),
        {"lokr_w1": (4, 2), "lokr_w2_a": (2, 1), "lokr_w2_b": (1, 3)},
    ),
    "lokr conv2d": (
        lambda **o: LoKrModule.new_conv2d(6, 8, 3, 1, **o),
        (8, 6, 3, 3),
        {"lokr_w1": (2, 2), "lokr_w2_a": (4, 1), "lokr_w2_b": (1, 27)},
    ),
    "lokr tucker": (
        lambda **o: LoKrModule.new_conv2d(6, 12, 3, 1, use_tucker=True, **o),
        (12, 6, 3, 3),
        {"lokr_w1": (3, 2), "lokr_w2_a": (1, 4), "lokr_w2_b": (1, 3), "lokr_t2": (1, 1, 3, 3)},
    ),
    "lokr prime": (
        lambda **o: LoKrModule.new_linear(13, 7, 2, **o),
        (7, 13),
        {"lokr_w1": (1, 1), "lokr_w2_a": (7, 2), "lokr_w2_b": (2, 13)},
    ),
}  # fmt: skip
NAMES = pytest.mark.parametrize("name", NEW)
KINDS = pytest.mark.parametrize("kind", [BF16, F16, F32], ids=lambda kind: kind.value)
LAYOUTS = pytest.mark.parametrize("layout", WeightLayout, ids=lambda layout: layout.name.lower())


def values(array):
    return array.numpy().astype(np.float64)


def trained(module, rng):
    """The module with every parameter drawn anew, dora_scale positive."""

    def draw(tensor, low, high):
        return DeviceArray.from_numpy(rng.uniform(low, high, tensor.shape), tensor.kind)

    module.factors = {name: draw(tensor, -1, 1) for name, tensor in module.factors.items()}
    for name, (low, high) in {"scalar": (0.5, 1), "dora_scale": (0.5, 4), "bias": (-1, 1)}.items():
        if getattr(module, name) is not None:
            setattr(module, name, draw(getattr(module, name), low, high))
    return module


def random_base(rng, shape, kind, layout=CHECKPOINT):
    base = DeviceArray.from_numpy(rng.standard_normal(shape), kind)
    return to_flame(base) if layout is FLAME else base


def exact_delta(module):
    """scale * scalar * delta of the stored factors, float64, [out, in, *kernel]; and the sum of its terms' sizes."""
    factors = {name: values(tensor) for name, tensor in module.factors.items()}
    scale = module.scale() * (1.0 if module.scalar is None else float(values(module.scalar)))
    sizes = delta64(module.algorithm, {name: np.abs(value) for name, value in factors.items()})
    return (scale * delta64(module.algorithm, factors)).reshape(module.shape), scale * sizes.reshape(module.shape)


def assert_rounded_once(found, exact, size):
    """Each value is the rounding of some x with |x - exact| <= 64 * 2^-24 * size: what fp32 arithmetic gives."""
    kind, slack = ElementKind.of(found.dtype), 64 * 2.0**-24 * size
    low, high = (round_to(exact + sign * slack, kind).astype(np.float64) for sign in (-1, 1))
    assert ((low <= found.astype(np.float64)) & (found.astype(np.float64) <= high)).all()


def in_layout(array, layout):
    return array.transpose(*range(2, array.ndim), 1, 0) if layout is FLAME else array


def from_layout(array, layout):
    """[*kernel, in, out] back to [out, in, *kernel]."""
    return array.transpose(array.ndim - 1, array.ndim - 2, *range(array.ndim - 2)) if layout is FLAME else array
