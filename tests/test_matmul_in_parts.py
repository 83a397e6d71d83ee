"""Products of many rows and few columns, whose rows are multiplied in parts, against float64 over poisoned memory."""

from __future__ import annotations

import pytest
from matmul_cases import BF16, F16, F32, assert_exact, assert_kept, gaussian, make, small_integers

from kernels.target import SIMULATOR
from plans.core import NoSku, PlanPreference, Workspace
from plans.matmul import Bias, MatmulDescriptor, SegmentedMatmulPlan
from plans.matmul.in_parts import LEAST_DEPTH, in_parts, parts_of
from plans.matmul.mma import MMA
from plans.matmul.wgmma import WGMMA

LARGE = [] if SIMULATOR else [(64, 64, 256, 768), (384, 384, 16, 2048), (112, 64, 16, 256), (16, 3072, 8, 512)]
PARTS = [(8, 8, 12, LEAST_DEPTH), (33, 20, 9, LEAST_DEPTH), (1, 3, 5, LEAST_DEPTH + 1), *LARGE]
"""m, n, and k as so many parts of so many rows each."""


def check(device, poisoned, rng, sku, descriptor, draw):
    problem = make(device, descriptor.segmented, draw, (-1.5,))
    assert not sku.refuses(problem.descriptor)
    plan, stream = SegmentedMatmulPlan(problem.descriptor, sku, device), device.stream()
    plan.run(stream, Workspace(poisoned(plan.workspace_size())), problem.args)
    device.synchronize(stream)
    assert_kept(problem, plan)
    return problem


@pytest.mark.parametrize(("m", "n", "parts", "depth"), PARTS)
def test_awkward_extents(device, poisoned, rng, m, n, parts, depth):
    descriptor = MatmulDescriptor(m, n, parts * depth, "TN", out=F32)
    assert parts_of(descriptor.segmented) == parts
    check(device, poisoned, rng, in_parts(MMA), descriptor, gaussian(rng))


@pytest.mark.parametrize("sku", [MMA, WGMMA], ids=lambda sku: sku.name)
def test_kinds_and_strides(device, poisoned, rng, sku):
    for kind, out in ((BF16, BF16), (F16, F32)):
        k = 6 * LEAST_DEPTH
        descriptor = MatmulDescriptor(8, 16, k, "TN", a=kind, b=kind, out=out, a_stride=16, b_stride=24)
        check(device, poisoned, rng, in_parts(sku), descriptor, gaussian(rng))


def test_sums_of_whole_numbers_are_exact(device, poisoned, rng):
    descriptor = MatmulDescriptor(24, 16, 16 * LEAST_DEPTH, "TN", out=F32)
    assert parts_of(descriptor.segmented) > 1
    assert_exact(check(device, poisoned, rng, in_parts(MMA), descriptor, small_integers(rng)))


@pytest.mark.parametrize(
    ("reason", "descriptor"),
    [
        ("layout TN", MatmulDescriptor(8, 8, 64)),
        ("no epilogue", MatmulDescriptor(8, 8, 64, "TN", epilogue=(Bias(),))),
        ("no divisor", MatmulDescriptor(8, 8, 10007, "TN")),
        ("contiguous result", MatmulDescriptor(8, 8, 1024, "TN", out_stride=16)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refusals(device, reason, descriptor):
    assert reason in in_parts(MMA).refuses(descriptor.segmented)
    with pytest.raises(NoSku, match=reason):
        SegmentedMatmulPlan.select(
            None, descriptor.segmented, PlanPreference(prefer_backend=MMA.backend, max_workspace_bytes=-1), device
        )
