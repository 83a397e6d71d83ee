"""Gradients of LoHa's factors against float64, over poisoned results and workspace, twice bit for bit."""

from __future__ import annotations

import pytest
from adapter_gradient_cases import check

from kernels.target import SIMULATOR
from plans.adapter_gradient import HadamardGradientArgs, HadamardGradientDescriptor, HadamardGradientPlan
from plans.core import BackendKind, ElementKind, InvalidProblem

BF16, F16, F32 = ElementKind.BF16, ElementKind.F16, ElementKind.F32
MMA, PORTABLE, WGMMA = BackendKind.MMA, BackendKind.PORTABLE, BackendKind.WGMMA
TILED = [(33, 40, 35, 16, {"out": BF16}), (16, 32, 64, 8, {}), (17, 16, 40, 21, {"g_stride": 24, "x_stride": 48})]
SMALL = [
    (1, 8, 8, 4, {}),
    (13, 7, 5, 3, {"g_stride": 9, "x_stride": 6, "out": BF16}),
    (0, 5, 3, 2, {}),
    (4, 0, 8, 4, {}),
    (4, 8, 0, 4, {}),
    (4, 8, 8, 0, {}),
]
LARGE = (
    [] if SIMULATOR else [(4096, 3072, 3072, 16, {}), (1000, 1288, 5128, 64, {"out": BF16}), (4099, 640, 1280, 20, {})]
)


def arguments(tensors, scale):
    return HadamardGradientArgs(tensors[:4], *tensors[4:6], tensors[6:], scale)


@pytest.mark.parametrize(
    ("case", "backend"),
    [*((case, PORTABLE) for case in SMALL), *((case, MMA) for case in SMALL + TILED + LARGE)],
    ids=lambda value: value.value if isinstance(value, BackendKind) else str(value),
)
def test_factors(device, poisoned, rng, case, backend):
    *extents, options = case
    descriptor = HadamardGradientDescriptor(*extents, **options)
    check(device, poisoned, HadamardGradientPlan, descriptor, arguments, rng.standard_normal, backend)


DENSE = [
    (16, 16, 64, 4, {}),
    (9, 36, 68, 16, {"out": BF16, "g_stride": 40, "x_stride": 72}),
    (8, 17, 12, 21, {"g_stride": 24, "x_stride": 16}),
    (4, 0, 8, 4, {}),
    (4, 8, 0, 4, {}),
    *(
        []
        if SIMULATOR
        else [
            (4096, 3072, 3072, 16, {}),
            (4096, 3072, 1288, 24, {}),
            (999, 1288, 5128, 64, {"out": BF16}),
            (72, 8, 8, 1, {}),
        ]
    ),
]


@pytest.mark.parametrize("case", DENSE, ids=str)
def test_factors_by_a_dense_gradient_of_the_weight(device, poisoned, rng, case):
    *extents, options = case
    descriptor = HadamardGradientDescriptor(*extents, **options)
    check(device, poisoned, HadamardGradientPlan, descriptor, arguments, rng.standard_normal, WGMMA)


@pytest.mark.parametrize("kind", [F32, F16], ids=lambda kind: kind.value)
def test_other_kinds_are_for_the_portable_sku(device, poisoned, rng, kind):
    descriptor = HadamardGradientDescriptor(6, 5, 7, 3, kind, F32)
    plan = check(device, poisoned, HadamardGradientPlan, descriptor, arguments, rng.standard_normal)
    assert plan.chosen.backend is PORTABLE


@pytest.mark.parametrize(
    ("reason", "options"),
    [
        ("none negative", {"rank": -1}),
        ("g has stride 7, wanted at least 8", {"g_stride": 7}),
        ("factors of i32", {"element": ElementKind.I32}),
    ],
)
def test_bad_problems(reason, options):
    with pytest.raises(InvalidProblem, match=reason):
        HadamardGradientDescriptor(**({"rows": 8, "out_features": 8, "in_features": 8, "rank": 8} | options))
