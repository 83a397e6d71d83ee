"""Attention by warpgroup products and its gradients against float64, over poisoned memory, twice bit for bit."""

from __future__ import annotations

import pytest
from attention_cases import check_backward, check_forward, interleaved
from test_attention import F16, SIMULATOR, described

from plans.attention import AttentionBackwardDescriptor, AttentionBackwardPlan, AttentionDescriptor, AttentionPlan
from plans.core import BackendKind, NoSku, PlanPreference

WGMMA = BackendKind.WGMMA

# Batch, heads, queries, keys, width.
SMALL = [
    (1, 1, 1, 1, 64, {}),
    (1, 2, 129, 65, 64, {}),
    (1, 1, 67, 131, 56, {"causal": True, "diagonal": 64, "element": F16}),
    (1, 1, 130, 63, 8, {"causal": True, "diagonal": -66}),
    (1, 2, 64, 64, 64, {"causal": True, "key_heads": 1}),
]
LARGE = (
    []
    if SIMULATOR
    else [
        (2, 3, 257, 129, 64, {}),
        (1, 2, 1000, 1031, 64, {"causal": True}),
        (1, 4, 127, 640, 64, {"causal": True, "diagonal": 513, "key_heads": 2}),
        (1, 2, 130, 200, 48, {"element": F16}),
        (1, 2, 300, 300, 64, {"causal": True}),
        (1, 1, 1, 4099, 64, {}),
        (1, 1, 300, 64, 32, {"causal": True, "diagonal": -130}),
        (3, 50, 383, 511, 64, {}),
        (2, 40, 1024, 1024, 64, {"causal": True}),
    ]
)


@pytest.mark.parametrize("case", [*SMALL, *LARGE], ids=str)
def test_results(device, poisoned, rng, case):
    check_forward(device, poisoned, rng, described(case), WGMMA)


@pytest.mark.parametrize("case", [*SMALL, *LARGE], ids=str)
def test_gradients(device, poisoned, rng, case):
    check_backward(device, poisoned, rng, AttentionBackwardDescriptor(described(case)), WGMMA)


def test_blocks_that_take_tiles_in_turn(device, poisoned, rng):
    """More tiles than multiprocessors, by a third turn."""
    count = 2 * device.multiprocessors + 1
    descriptor = AttentionDescriptor(1, count, 5, 70, 64)
    check_backward(device, poisoned, rng, AttentionBackwardDescriptor(descriptor), WGMMA)


def test_packed_gradients(device, poisoned, rng):
    """q, k, v and their gradients side by side."""
    batch, heads, tokens, width = (2, 1, 66, 64) if SIMULATOR else (2, 6, 300, 64)
    strides, out = (interleaved(batch, heads, tokens, width, parts) for parts in (3, 1))
    forward = AttentionDescriptor(
        batch, heads, tokens, tokens, width, out_strides=out, q_strides=strides, k_strides=strides, v_strides=strides
    )
    descriptor = AttentionBackwardDescriptor(forward, d_out_strides=out, packed=(heads * width, *strides))
    check_backward(device, poisoned, rng, descriptor, WGMMA)


@pytest.mark.parametrize("options", [{"query": False}, {"key_value": False}], ids=str)
def test_gradients_of_one_side_alone(device, poisoned, rng, options):
    check_backward(device, poisoned, rng, AttentionBackwardDescriptor(described(SMALL[1]), **options), WGMMA)


def test_queries_that_see_no_key(device, poisoned, rng):
    descriptor = AttentionDescriptor(1, 1, 140, 24, 64, causal=True, diagonal=-132)
    _, _, (out, lse) = check_forward(device, poisoned, rng, descriptor, WGMMA)
    assert (out[:, :, :132] == 0).all()
    assert (lse[:, :, :132] < 0).all()


@pytest.mark.parametrize(
    ("reason", "options"),
    [
        ("width of at most 64, found 72", {"width": 72}),
        ("wants queries and keys", {"keys": 0}),
        ("no axis that repeats, found k", {"k_strides": (0, 0, 64)}),
    ],
)
def test_what_is_refused(device, reason, options):
    descriptor = AttentionDescriptor(**({"batch": 2, "heads": 2, "queries": 3, "keys": 3, "width": 64} | options))
    for plan, wanted in ((AttentionPlan, descriptor), (AttentionBackwardPlan, AttentionBackwardDescriptor(descriptor))):
        with pytest.raises(NoSku, match=reason):
            plan.select(None, wanted, PlanPreference(prefer_backend=WGMMA), device)


def test_which_problems_it_suits(device):
    """Narrow heads are for mma.sync, which multiplies 16 columns at a time."""
    chosen = [
        AttentionPlan.choose(AttentionDescriptor(1, 1, 8, 8, width), PlanPreference(), device) for width in (32, 64)
    ]
    assert [sku.backend for sku in chosen] == [BackendKind.MMA, WGMMA]
