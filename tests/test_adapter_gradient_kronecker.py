"""Gradients of both of a LoKr's factors in one pass, against float64, twice bit for bit."""

from __future__ import annotations

import pytest
from adapter_gradient_cases import check

from kernels.target import SIMULATOR
from plans.adapter_gradient import KroneckerGradientArgs, KroneckerGradientDescriptor, KroneckerGradientPlan
from plans.core import BackendKind, ElementKind, InvalidProblem, NoSku, PlanPreference

BF16, F16, F32 = ElementKind.BF16, ElementKind.F16, ElementKind.F32
PORTABLE, STREAMED = BackendKind.PORTABLE, BackendKind.STREAMED

CASES = [
    (1, 1, 8, 8, 8, {}),
    (7, 17, 24, 40, 24, {"out": BF16}),
    (5, 70, 8, 72, 64, {}),
    (11, 9, 8, 24, 16, {"beside": True, "spare": (1, 1.0)}),
    (9, 70, 16, 24, 16, {"beside": True, "spare": (1, 1e9)}),
]
if not SIMULATOR:
    CASES += [
        (4096, 48, 48, 64, 64, {}),
        (1031, 96, 48, 128, 64, {"out": BF16}),
        (4097, 112, 64, 128, 64, {}),
        (3000, 64, 64, 64, 64, {}),
        (300, 128, 40, 120, 40, {}),
        (4096, 48, 48, 64, 64, {"beside": True, "spare": (12, 60000.0)}),
    ]


def arguments(tensors, scale):
    return KroneckerGradientArgs(*tensors, scale)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_both_factors(device, poisoned, rng, case):
    if device.arch < (9, 0):
        pytest.skip("TMA is sm_90's")
    *extents, options = case
    descriptor = KroneckerGradientDescriptor(*extents, **options)
    check(device, poisoned, KroneckerGradientPlan, descriptor, arguments, rng.standard_normal, STREAMED)


@pytest.mark.parametrize(
    ("extents", "kinds"),
    [
        ((3, 2, 5, 7, 33), (F32, F16)),
        ((2, 1, 1, 3, 1), (BF16, F32)),
        ((0, 2, 3, 4, 5), (F32, F32)),
        ((4, 0, 2, 0, 3), (F32, F32)),
    ],
    ids=str,
)
def test_both_factors_of_any_kind_and_extent(device, poisoned, rng, extents, kinds):
    descriptor = KroneckerGradientDescriptor(*extents, *kinds)
    check(device, poisoned, KroneckerGradientPlan, descriptor, arguments, rng.standard_normal, PORTABLE)


@pytest.mark.parametrize(
    ("reason", "changes"),
    [
        ("wants rows and blocks", {"rows": 0}),
        ("multiples of 8, found 8 blocks of 12 and 8", {"out_width": 12}),
        ("multiples of 8, found 3 blocks of 8 and 8", {"in_blocks": 3}),
        ("at most 128 x 64 blocks of 128 x 64, found", {"in_width": 72}),
        ("of bf16, found f16", {"element": F16}),
    ],
)
def test_refusals(device, reason, changes):
    extents = {"rows": 8, "out_blocks": 4, "in_blocks": 8, "out_width": 8, "in_width": 8}
    if device.arch < (9, 0):
        pytest.skip("TMA is sm_90's")
    descriptor, preference = KroneckerGradientDescriptor(**(extents | changes)), PlanPreference(prefer_backend=STREAMED)
    with pytest.raises(NoSku, match=reason):
        KroneckerGradientPlan.select(None, descriptor, preference, device)


@pytest.mark.parametrize(
    ("reason", "changes"),
    [("none negative", {"in_blocks": -1}), ("gradients of i32", {"out": ElementKind.I32})],
)
def test_bad_problems(reason, changes):
    extents = {"rows": 8, "out_blocks": 4, "in_blocks": 8, "out_width": 8, "in_width": 8}
    with pytest.raises(InvalidProblem, match=reason):
        KroneckerGradientDescriptor(**(extents | changes))
