"""Attention against float64, over poisoned results, twice bit for bit."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from attention_cases import check_forward, interleaved

from kernels.target import SIMULATOR
from plans.attention import AttentionArgs, AttentionDescriptor, AttentionPlan, Mask
from plans.core import BackendKind, ElementKind, InvalidProblem, NoSku, PlanPreference

BF16, F16, F32, I32 = ElementKind.BF16, ElementKind.F16, ElementKind.F32, ElementKind.I32
MMA, PORTABLE = BackendKind.MMA, BackendKind.PORTABLE

# Batch, heads, queries, keys, width.
SMALL = [
    (1, 1, 1, 1, 8, {}),
    (1, 2, 33, 17, 32, {}),
    (2, 1, 16, 31, 24, {"element": F16}),
    (1, 2, 32, 47, 16, {"causal": True}),
    (1, 1, 37, 13, 40, {"causal": True, "diagonal": 3}),
    (1, 1, 21, 16, 8, {"causal": True, "diagonal": -9}),
    (1, 4, 5, 18, 8, {"key_heads": 2}),
]
EMPTY = [(0, 2, 3, 4, 8, {}), (1, 2, 0, 4, 8, {}), (1, 0, 3, 4, 8, {}), (1, 1, 3, 0, 8, {})]
LARGE = (
    []
    if SIMULATOR
    else [
        (2, 3, 257, 129, 64, {}),
        (1, 2, 1000, 1031, 128, {"causal": True}),
        (1, 4, 127, 640, 96, {"causal": True, "diagonal": 513, "key_heads": 2}),
        (1, 2, 130, 200, 80, {"element": F16}),
        (1, 2, 300, 300, 112, {"causal": True}),
        (1, 1, 1, 4099, 128, {}),
        (1, 1, 300, 64, 32, {"causal": True, "diagonal": -130}),
        (3, 2, 65, 63, 48, {"causal": True}),
    ]
)


def described(case) -> AttentionDescriptor:
    *extents, options = case
    return AttentionDescriptor(*extents, **options)


@pytest.mark.parametrize(
    ("case", "backend"),
    [*((case, MMA) for case in SMALL + EMPTY + LARGE), *((case, PORTABLE) for case in SMALL[3:] + EMPTY + LARGE)],
    ids=lambda value: value.value if isinstance(value, BackendKind) else str(value),
)
def test_results(device, poisoned, rng, case, backend):
    check_forward(device, poisoned, rng, described(case), backend)


@pytest.mark.parametrize("backend", [MMA, PORTABLE], ids=lambda backend: backend.value)
def test_heads_that_lie_side_by_side(device, poisoned, rng, backend):
    """q, k and v as one product made them, the result as the next one reads it."""
    batch, heads, tokens, width = (2, 2, 18, 16) if SIMULATOR else (2, 6, 300, 64)
    strides = interleaved(batch, heads, tokens, width)
    out = interleaved(batch, heads, tokens, width, 1)
    descriptor = AttentionDescriptor(
        batch, heads, tokens, tokens, width, out_strides=out, q_strides=strides, k_strides=strides, v_strides=strides
    )
    check_forward(device, poisoned, rng, descriptor, backend)


@pytest.mark.parametrize("backend", [MMA, PORTABLE], ids=lambda backend: backend.value)
def test_queries_that_see_no_key(device, poisoned, rng, backend):
    descriptor = AttentionDescriptor(1, 2, 40, 24, 16, causal=True, diagonal=-20)
    _, _, (out, lse) = check_forward(device, poisoned, rng, descriptor, backend)
    assert (out[:, :, :20] == 0).all()
    assert np.isneginf(lse[:, :, :20]).all()
    assert np.isfinite(lse[:, :, 20:]).all()


def test_large_scores_do_not_overflow(device, poisoned, rng):
    descriptor = AttentionDescriptor(1, 1, 16, 35, 16)
    for backend in (MMA, PORTABLE):
        _, _, (out, _) = check_forward(device, poisoned, rng, descriptor, backend, scale=200.0)
        assert np.isfinite(out.astype(np.float32)).all()


@pytest.mark.parametrize(
    ("kind", "strides"),
    [(F32, (70, 35, 5, 1)), (BF16, (0, 35, 5, 1)), (I32, (5, 0, 0, 1)), (F16, (0, 0, 1, 7))],
    ids=str,
)
def test_masks(device, poisoned, rng, kind, strides):
    """Added or chosen, of any strides: by batch and head, by head, for the keys alone, transposed."""
    descriptor = AttentionDescriptor(2, 2, 7, 5, 8, causal=kind is F32, mask=Mask(kind, strides))
    plan, _, _ = check_forward(device, poisoned, rng, descriptor, None)
    assert plan.chosen.backend is PORTABLE


@pytest.mark.parametrize(
    "options", [{"element": F32}, {"width": 7}, {"width": 200}, {"q_strides": (25, 9, 9)}], ids=str
)
def test_other_kinds_widths_and_strides_are_for_the_portable_sku(device, poisoned, rng, options):
    descriptor = replace(AttentionDescriptor(1, 1, 3, 5, 8), **options)
    plan, _, _ = check_forward(device, poisoned, rng, descriptor, None)
    assert plan.chosen.backend is PORTABLE
    with pytest.raises(NoSku, match="mma"):
        AttentionPlan.select(None, descriptor, PlanPreference(prefer_backend=MMA), device)


def test_too_wide_heads_are_refused(device):
    with pytest.raises(NoSku, match="width of at most 256, found 264"):
        AttentionPlan.select(None, AttentionDescriptor(1, 1, 2, 2, 264), device=device)


@pytest.mark.parametrize(
    ("reason", "options"),
    [
        ("none negative", {"queries": -1}),
        ("of i32, wanted bf16", {"element": I32}),
        ("4 heads over 3 key heads", {"heads": 4, "key_heads": 3}),
        ("diagonal 2 without causal", {"diagonal": 2}),
        ("a mask of i64", {"mask": Mask(ElementKind.I64, (0, 0, 0, 1))}),
    ],
)
def test_bad_problems(reason, options):
    with pytest.raises(InvalidProblem, match=reason):
        AttentionDescriptor(**({"batch": 1, "heads": 2, "queries": 3, "keys": 3, "width": 8} | options))


@pytest.mark.parametrize("scale", [0.0, -1.0, float("inf"), float("nan")])
def test_scales_that_are_not_positive_are_refused(device, scale):
    tensor = device.allocate(64).tensor(BF16, (1, 1, 2, 8))
    with pytest.raises(InvalidProblem, match="wanted a positive finite number"):
        AttentionArgs(tensor, tensor, tensor, tensor, tensor, scale=scale)
