"""Products of many rows and few columns, whose rows are multiplied in parts, against float64 over poisoned memory."""

from __future__ import annotations

import pytest
from matmul_cases import BF16, F16, F32, assert_exact, assert_kept, gaussian, make, small_integers

from kernels.target import SIMULATOR
from plans.core import NoSku, PlanPreference, Workspace
from plans.matmul import Bias, MatmulDescriptor, SegmentedMatmulPlan
from plans.matmul.in_parts import in_parts, parts_of
from plans.matmul.mma import MMA
from plans.matmul.wgmma import WGMMA

SHAPES = [(8, 8, 48), (33, 20, 36), (1, 3, 25)]
LARGE = [] if SIMULATOR else [(64, 64, 196608), (384, 384, 32768), (112, 64, 4096), (16, 3072, 4096)]


def check(device, poisoned, rng, sku, descriptor, draw):
    problem = make(device, descriptor.segmented, draw, (-1.5,))
    assert not sku.refuses(problem.descriptor)
    plan, stream = SegmentedMatmulPlan(problem.descriptor, sku, device), device.stream()
    plan.run(stream, Workspace(poisoned(plan.workspace_size())), problem.args)
    device.synchronize(stream)
    assert_kept(problem, plan)
    return problem


@pytest.mark.parametrize("shape", SHAPES + LARGE, ids=str)
def test_awkward_extents(device, poisoned, rng, shape):
    check(device, poisoned, rng, in_parts(MMA), MatmulDescriptor(*shape, "TN", out=F32), gaussian(rng))


@pytest.mark.parametrize("sku", [MMA, WGMMA], ids=lambda sku: sku.name)
def test_kinds_and_strides(device, poisoned, rng, sku):
    for kind, out in ((BF16, BF16), (F16, F32)):
        descriptor = MatmulDescriptor(8, 16, 24, "TN", a=kind, b=kind, out=out, a_stride=16, b_stride=24)
        check(device, poisoned, rng, in_parts(sku), descriptor, gaussian(rng))


def test_sums_of_whole_numbers_are_exact(device, poisoned, rng):
    descriptor = MatmulDescriptor(24, 16, 64, "TN", out=F32)
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
