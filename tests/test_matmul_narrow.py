"""Products of few columns, as low-rank factors make them, against float64 over poisoned memory."""

from __future__ import annotations

import pytest
from matmul_cases import BF16, F16, F32, assert_exact, assert_kept, gaussian, make, run, small_integers

from kernels.target import SIMULATOR
from plans.core import NoSku, PlanPreference
from plans.matmul import Activation, Bias, ColumnScale, Gate, MatmulDescriptor, Residual, SegmentedMatmulPlan
from plans.matmul.narrow import NARROW
from plans.matmul.narrow_streamed import NARROW_STREAMED

EVERY_SKU = pytest.mark.parametrize("sku", [NARROW, NARROW_STREAMED], ids=lambda sku: sku.name)
SHAPES = [(1, 1, 8), (33, 16, 40), (31, 7, 264), (64, 64, 64), (17, 33, 520)]
LARGE = [] if SIMULATOR else [(4096, 16, 3072), (4099, 64, 4096), (1000, 48, 12288), (65, 3, 10248)]


def check(device, poisoned, rng, sku, descriptor, scale=1.0):
    for draw in (small_integers(rng), gaussian(rng)):
        problem = make(device, descriptor, draw, (scale,))
        plan = run(problem, poisoned, sku.backend)
        assert plan.chosen is sku
        assert_kept(problem, plan)
    problem = make(device, MatmulDescriptor(descriptor.m, descriptor.n, 64, out=F32).segmented, small_integers(rng))
    run(problem, poisoned, sku.backend)
    assert_exact(problem)


@EVERY_SKU
@pytest.mark.parametrize("shape", SHAPES + LARGE, ids=str)
def test_products_of_awkward_extents(device, poisoned, rng, sku, shape):
    check(device, poisoned, rng, sku, MatmulDescriptor(*shape).segmented)


@EVERY_SKU
@pytest.mark.parametrize("shape", [(1, 8, 8), (33, 16, 40), (31, 24, 264), (64, 64, 64), (17, 40, 520)], ids=str)
def test_a_right_factor_by_lines(device, poisoned, rng, sku, shape):
    check(device, poisoned, rng, sku, MatmulDescriptor(*shape, "NN").segmented)
    m, n, k = shape
    strided = MatmulDescriptor(m, n, k, "NN", a=F16, b=F16, out=F32, a_stride=k + 8, b_stride=n + 16)
    check(device, poisoned, rng, sku, strided.segmented, 0.5)


@EVERY_SKU
@pytest.mark.parametrize("out", [BF16, F16, F32], ids=lambda kind: kind.value)
def test_kinds_strides_and_scales(device, poisoned, rng, sku, out):
    kind = F16 if out is F16 else BF16
    descriptor = MatmulDescriptor(40, 20, 72, a=kind, b=kind, out=out, a_stride=80, b_stride=88, out_stride=23)
    check(device, poisoned, rng, sku, descriptor.segmented, -1.75)


@EVERY_SKU
@pytest.mark.parametrize("shared", [False, True], ids=["own B", "one B"])
def test_batches_and_epilogues(device, poisoned, rng, sku, shared):
    steps = (ColumnScale(F32), Bias(per_batch=True), Activation("silu"), Residual())
    check(device, poisoned, rng, sku, MatmulDescriptor(34, 24, 48, batch=3, b_shared=shared, epilogue=steps).segmented)


@EVERY_SKU
@pytest.mark.parametrize(("m", "n"), [(0, 8), (8, 0)], ids=str)
def test_empty_products(device, poisoned, rng, sku, m, n):
    check(device, poisoned, rng, sku, MatmulDescriptor(m, n, 16).segmented)


@EVERY_SKU
@pytest.mark.parametrize(
    ("reason", "descriptor"),
    [
        ("at most 64 columns, found 65", MatmulDescriptor(32, 65, 64)),
        ("K and the strides .* multiples of 8, found K 20", MatmulDescriptor(32, 16, 20)),
        ("layout NT or NN", MatmulDescriptor(32, 16, 16, "TN")),
        ("multiple of 8 columns .* found 20", MatmulDescriptor(32, 20, 16, "NN")),
        ("no gate", MatmulDescriptor(32, 16, 16, epilogue=(Gate("silu"),))),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refusals(device, reason, descriptor, sku):
    with pytest.raises(NoSku, match=reason):
        SegmentedMatmulPlan.select(None, descriptor.segmented, PlanPreference(prefer_backend=sku.backend), device)
