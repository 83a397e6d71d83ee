"""Attention's gradients against float64, over poisoned results and workspace, twice bit for bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
from attention_cases import check_backward, interleaved
from test_attention import BF16, EMPTY, F16, F32, I32, MMA, PORTABLE, SIMULATOR, described

from plans.attention import AttentionBackwardDescriptor, AttentionDescriptor, Mask
from plans.core import BackendKind, InvalidProblem

SMALL = [
    (1, 1, 1, 1, 8, {}),
    (1, 1, 33, 17, 24, {}),
    (1, 1, 17, 35, 16, {"element": F16, "causal": True}),
    (1, 1, 37, 33, 8, {"causal": True, "diagonal": -5}),
    (1, 2, 18, 16, 40, {"key_heads": 1, "causal": True, "diagonal": 2}),
]
LARGE = (
    []
    if SIMULATOR
    else [
        (2, 3, 257, 129, 64, {}),
        (1, 2, 500, 517, 128, {"causal": True}),
        (1, 4, 127, 640, 96, {"causal": True, "diagonal": 513, "key_heads": 2}),
        (1, 2, 130, 200, 80, {"element": F16}),
        (1, 2, 300, 300, 112, {"causal": True}),
        (1, 1, 300, 64, 32, {"causal": True, "diagonal": -130}),
    ]
)


@pytest.mark.parametrize(
    ("case", "backend"),
    [*((case, MMA) for case in SMALL + EMPTY + LARGE), *((case, PORTABLE) for case in SMALL[3:] + EMPTY + LARGE)],
    ids=lambda value: value.value if isinstance(value, BackendKind) else str(value),
)
def test_gradients(device, poisoned, rng, case, backend):
    check_backward(device, poisoned, rng, AttentionBackwardDescriptor(described(case)), backend)


@pytest.mark.parametrize("backend", [MMA, PORTABLE], ids=lambda backend: backend.value)
def test_packed_gradients(device, poisoned, rng, backend):
    """Side by side, as one product's gradient reads them."""
    batch, heads, tokens, width = (2, 2, 17, 8) if SIMULATOR else (2, 6, 300, 64)
    strides, out = (interleaved(batch, heads, tokens, width, parts) for parts in (3, 1))
    forward = AttentionDescriptor(
        batch, heads, tokens, tokens, width, out_strides=out, q_strides=strides, k_strides=strides, v_strides=strides
    )
    packed = (heads * width, *strides)
    check_backward(
        device, poisoned, rng, AttentionBackwardDescriptor(forward, d_out_strides=out, packed=packed), backend
    )


@pytest.mark.parametrize("options", [{"query": False}, {"key_value": False}], ids=str)
def test_gradients_of_one_side_alone(device, poisoned, rng, options):
    descriptor = AttentionBackwardDescriptor(described(SMALL[1]), **options)
    check_backward(device, poisoned, rng, descriptor, MMA)


@pytest.mark.parametrize(
    ("kind", "mask"),
    [(F32, Mask(F32, (70, 35, 5, 1))), (BF16, Mask(I32, (5, 0, 0, 1))), (F32, None)],
    ids=["added", "chosen", "none"],
)
def test_masks_and_fp32(device, poisoned, rng, kind, mask):
    forward = AttentionDescriptor(2, 2, 7, 5, 9, kind, mask=mask)
    plan = check_backward(device, poisoned, rng, AttentionBackwardDescriptor(forward), None)
    assert plan.chosen.backend is PORTABLE


def test_packed_gradients_of_unlike_shapes_are_refused():
    forward = described(SMALL[1])
    with pytest.raises(InvalidProblem, match="packed gradients of q"):
        AttentionBackwardDescriptor(forward, packed=(8, 8, 8, 8))
    with pytest.raises(InvalidProblem, match="wanted all three"):
        AttentionBackwardDescriptor(replace(forward, keys=forward.queries), query=False, packed=(8, 8, 8, 8))
