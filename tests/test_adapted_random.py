"""Layers of random shapes with random adapters, strengths and modes against float64; the seed repeats a failure."""

from __future__ import annotations

import numpy as np
import pytest
from test_terms import exact_delta, trained

from kernels.target import SIMULATOR
from lycoris import tensor
from lycoris.algorithms import LoConModule, LoHaModule, LoKrModule
from lycoris.nn import AdaptedLinear
from plans.core import ElementKind

CASES = 12 if SIMULATOR else 500
KINDS = (ElementKind.BF16, ElementKind.F16)
ROUNDING = {ElementKind.BF16: 2.0**-8, ElementKind.F16: 2.0**-11}
_EXTENTS = (8, 16, 24, 40, 64, 72, 96) if SIMULATOR else (8, 40, 64, 200, 640, 1288, 3072)


def draw_module(rng, channels, out, kind, device):
    """An adapter of any algorithm and form that the layer's extents allow."""
    rank = int(rng.choice((1, 3, 8, 16)))
    options = {"dtype": kind, "device": device, "rs_lora": bool(rng.integers(2))}
    match rng.integers(4):
        case 0:
            return LoConModule.new_linear(channels, out, rank, float(rng.uniform(0.5, 4)), **options)
        case 1:
            return LoHaModule.new_linear(channels, out, rank, 1.0, **options)
        case 2:
            return LoKrModule.new_linear(channels, out, 1 << 16, factor=int(rng.choice((-1, 2, 4, 8))), **options)
        case _:
            both = bool(rng.integers(2))
            return LoKrModule.new_linear(channels, out, rank, factor=8, decompose_both=both, **options)


@pytest.mark.parametrize("case", range(CASES))
def test_random_layers(device, rng, case):
    kind = KINDS[rng.integers(2)]
    out, channels = (int(rng.choice(_EXTENTS)) for _ in range(2))
    rows = int(rng.integers(1, 40 if SIMULATOR else 700))
    weight = tensor.from_numpy(rng.standard_normal((out, channels)), device, kind)
    bias = tensor.from_numpy(rng.standard_normal(out), device, kind) if rng.integers(2) else None
    mode = str(rng.choice(("merged", "separate")))
    layer = AdaptedLinear(weight, bias, mode=mode)
    values = weight.numpy().astype(np.float64)
    size, count = np.abs(values), int(rng.integers(1, 4))
    for number in range(count):
        module, strength = trained(rng, draw_module(rng, channels, out, kind, device)), float(rng.uniform(-2, 2))
        layer.add(str(number), module, strength)
        delta = strength * module.scale() * exact_delta(module).reshape(out, channels)
        values, size = values + delta, size + np.abs(delta)
    x = tensor.from_numpy(rng.standard_normal((rows, channels)), device, kind)
    given = x.numpy().astype(np.float64)
    offset = 0 if bias is None else bias.numpy().astype(np.float64)
    exact, magnitude = given @ values.T + offset, np.abs(given) @ size.T + np.abs(offset)
    error = np.abs(layer(x).numpy().astype(np.float64) - exact) / magnitude / ROUNDING[kind]
    # The result's rounding and W's; or those of a prepared factor, an intermediate result and each adapter's term.
    allowed = 3 + count
    assert error.max() <= allowed, f"{mode}, {kind.value}, {rows} x {out}x{channels}: {error.max():.2f} roundings"
