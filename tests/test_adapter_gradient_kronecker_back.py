"""What a LoKr of few, wide blocks adds to x's gradient, and w1's, in one pass, against float64, twice bit for bit."""

from __future__ import annotations

import pytest
from adapter_gradient_cases import check

from kernels.target import SIMULATOR
from plans.adapter_gradient import KroneckerBackArgs, KroneckerBackDescriptor, KroneckerBackPlan
from plans.core import BackendKind, ElementKind, InvalidProblem, NoSku

BF16, F16, F32 = ElementKind.BF16, ElementKind.F16, ElementKind.F32

CASES = [
    (1, 1, 1, 8, 8, {}),
    (19, 8, 8, 72, 64, {}),
    (37, 7, 3, 40, 200, {"element": F16, "out": BF16}),
]
if not SIMULATOR:
    CASES += [
        (4096, 8, 8, 384, 384, {}),
        (4099, 8, 8, 512, 512, {"out": BF16}),
        (1031, 6, 8, 320, 384, {"element": F16}),
        (700, 8, 5, 1024, 136, {}),
    ]


def arguments(tensors, scale):
    return KroneckerBackArgs(*tensors, scale)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_both_results(device, poisoned, rng, case):
    if device.arch < (9, 0):
        pytest.skip("TMA is sm_90's")
    *extents, options = case
    descriptor = KroneckerBackDescriptor(*extents, **options)
    check(device, poisoned, KroneckerBackPlan, descriptor, arguments, rng.standard_normal, BackendKind.STREAMED)


@pytest.mark.parametrize(
    ("reason", "changes"),
    [
        ("wants rows and blocks", {"rows": 0}),
        ("multiples of 8, found 12 and 8", {"out_width": 12}),
        ("at most 8 x 8 blocks, found 4 x 9", {"in_blocks": 9}),
        ("64 columns of w2 to fit shared memory", {"out_width": 1536}),
        ("of bf16 or fp16, found f32", {"element": F32}),
    ],
)
def test_refusals(device, reason, changes):
    if device.arch < (9, 0):
        pytest.skip("TMA is sm_90's")
    extents = {"rows": 8, "out_blocks": 4, "in_blocks": 8, "out_width": 8, "in_width": 8}
    with pytest.raises(NoSku, match=reason):
        KroneckerBackPlan.select(None, KroneckerBackDescriptor(**(extents | changes)), device=device)


@pytest.mark.parametrize(("reason", "changes"), [("none negative", {"in_blocks": -1}), ("d_w1 of i32", {"out": "i32"})])
def test_bad_problems(reason, changes):
    extents = {"rows": 8, "out_blocks": 4, "in_blocks": 8, "out_width": 8, "in_width": 8}
    changes = {name: ElementKind.I32 if value == "i32" else value for name, value in changes.items()}
    with pytest.raises(InvalidProblem, match=reason):
        KroneckerBackDescriptor(**(extents | changes))
