"""A^T B over many rows, alone and beside another launch, against float64, twice bit for bit."""

from __future__ import annotations

import pytest
from adapter_gradient_cases import check

from kernels.target import SIMULATOR
from plans.adapter_gradient import LongSumArgs, LongSumDescriptor, LongSumPlan
from plans.core import BackendKind, ElementKind, InvalidProblem, NoSku

BF16, F16, F32 = ElementKind.BF16, ElementKind.F16, ElementKind.F32

CASES = [
    (1, 8, 8, {}),
    (130, 200, 8, {"element": F16, "out": BF16}),
    (330, 8, 16, {"beside": True, "spare": (2, 1400.0)}),
]
if not SIMULATOR:
    CASES += [
        (32768, 384, 384, {"out": BF16}),
        (4100, 392, 376, {}),
        (32768, 384, 384, {"beside": True, "spare": (12, 49152.0)}),
        (9000, 1536, 384, {"beside": True, "spare": (60, 1e9)}),
    ]


def arguments(tensors, scale):
    return LongSumArgs(*tensors, scale)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_products(device, poisoned, rng, case):
    if device.arch < (9, 0):
        pytest.skip("TMA is sm_90's")
    *extents, options = case
    descriptor = LongSumDescriptor(*extents, **options)
    check(device, poisoned, LongSumPlan, descriptor, arguments, rng.standard_normal, BackendKind.STREAMED)


@pytest.mark.parametrize(
    ("reason", "changes"),
    [
        ("wants rows", {"rows": 0}),
        ("multiples of 8, found 12 and 8", {"left": 12}),
        ("1 to 2\\*\\*20 elements", {"left": 2048, "right": 1024}),
        ("of bf16 or fp16, found f32", {"element": F32}),
    ],
)
def test_refusals(device, reason, changes):
    if device.arch < (9, 0):
        pytest.skip("TMA is sm_90's")
    with pytest.raises(NoSku, match=reason):
        LongSumPlan.select(None, LongSumDescriptor(**({"rows": 8, "left": 8, "right": 8} | changes)), device=device)


@pytest.mark.parametrize(
    ("reason", "changes"), [("none negative", {"rows": -1}), ("result of i32", {"out": ElementKind.I32})]
)
def test_bad_problems(reason, changes):
    with pytest.raises(InvalidProblem, match=reason):
        LongSumDescriptor(**({"rows": 8, "left": 8, "right": 8} | changes))
