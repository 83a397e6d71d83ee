"""Products: every SKU, layout, epilogue and awkward extent against float64, over poisoned memory."""

from __future__ import annotations

import numpy as np
import pytest
from matmul_cases import BF16, F16, F32, assert_exact, assert_kept, gaussian, make, run, small_integers

from kernels.target import SIMULATOR
from plans.core import BackendKind, InvalidProblem, MisalignedOperand, NoSku, PlanPreference, TensorRef
from plans.matmul import (
    Activation,
    Bias,
    ColumnScale,
    Gate,
    MatmulArgs,
    MatmulDescriptor,
    MatmulPlan,
    Residual,
    RowScale,
    Segment,
    SegmentedMatmulArgs,
    SegmentedMatmulDescriptor,
    SegmentedMatmulPlan,
)
from plans.matmul.descriptor import LAYOUTS

PORTABLE, MMA, SKINNY = BackendKind.PORTABLE, BackendKind.MMA, BackendKind.SKINNY
# The simulator's tiles are 16 and 32 wide, a GPU's 64 and 128; one size of each kind around them.
TILE = 32 if SIMULATOR else 128
EVERY_SKU = pytest.mark.parametrize("backend", [PORTABLE, MMA], ids=lambda backend: backend.value)
SHAPES = [(1, 1, 1), (2, 3, 5), (17, 13, 7), (TILE - 1, TILE + 1, 19), (TILE, TILE, TILE), (TILE + 1, 24, TILE + 2)]
LARGE = [] if SIMULATOR else [(257, 509, 1021), (640, 1280, 2048), (1000, 3072, 768), (4096, 64, 72)]


def check(device, poisoned, rng, descriptor, backend, scales=None, workspace=True, both=False):
    """Where nothing but sums is computed, small integers come out exactly; else normal numbers within the guarantee."""
    linear = all(isinstance(step, Bias | Residual) for step in descriptor.epilogue)
    exact = linear and all(abs(scale) in (1.0, 0.5, 0.0) for scale in scales or ())
    if exact:
        problem = make(device, descriptor, small_integers(rng), scales)
        plan = run(problem, poisoned, backend, workspace)
        assert_exact(problem)
    if both or not exact:
        problem = make(device, descriptor, gaussian(rng), scales)
        plan = run(problem, poisoned, backend, workspace)
        assert_kept(problem, plan)
    return plan


@EVERY_SKU
@pytest.mark.parametrize("shape", SHAPES + LARGE, ids=str)
def test_products_of_awkward_extents(device, poisoned, rng, shape, backend):
    check(device, poisoned, rng, MatmulDescriptor(*shape).segmented, backend, both=True)


@EVERY_SKU
@pytest.mark.parametrize("out", [BF16, F32], ids=lambda kind: kind.value)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(device, poisoned, rng, layout, out, backend):
    shape = (TILE + 8, TILE - 8, 40) if out is BF16 else (21, 35, 18)
    check(device, poisoned, rng, MatmulDescriptor(*shape, layout, out=out).segmented, backend)


@EVERY_SKU
@pytest.mark.parametrize("layout", LAYOUTS)
def test_lines_of_any_alignment(device, poisoned, rng, layout, backend):
    for stride in (64, 60, 58, 57):
        descriptor = MatmulDescriptor(20, 24, 30, layout, a_stride=stride, b_stride=stride, out_stride=26, out=F16)
        check(device, poisoned, rng, descriptor.segmented, backend)


@EVERY_SKU
@pytest.mark.parametrize(("m", "n", "k"), [(0, 5, 3), (5, 0, 3), (5, 7, 0), (0, 0, 0)], ids=lambda extent: str(extent))
def test_empty_products(device, poisoned, rng, m, n, k, backend):
    check(device, poisoned, rng, MatmulDescriptor(m, n, k, epilogue=(Bias(F32),)).segmented, backend)


EPILOGUES = {
    "bias": (Bias(),),
    "bias f32, residual": (Bias(F32), Residual()),
    "scales": (RowScale(F32), ColumnScale(F16)),
    "relu": (Activation("relu"),),
    "gelu": (Bias(), Activation("gelu")),
    "gelu_tanh": (Bias(F16), Activation("gelu_tanh"), Residual(F32)),
    "silu": (Activation("silu"), ColumnScale()),
    "swiglu": (Gate("silu"),),
    "geglu, value first": (Bias(), Gate("gelu", gate_first=False), Bias(F32), Residual(F16)),
    "reglu of scales": (RowScale(), Gate("relu"), RowScale(F32)),
}


@EVERY_SKU
@pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "ragged"])
@pytest.mark.parametrize("steps", EPILOGUES.values(), ids=EPILOGUES.keys())
def test_epilogues(device, poisoned, rng, steps, aligned, backend):
    m, n, k = (24, 2 * TILE, 32) if aligned else (11, 2 * TILE - 6, 19)
    check(device, poisoned, rng, MatmulDescriptor(m, n, k, epilogue=steps).segmented, backend)


@EVERY_SKU
@pytest.mark.parametrize("function", ["relu", "gelu", "gelu_tanh", "silu"])
def test_activations_of_any_size(device, poisoned, function, backend):
    """x itself comes out of a product with ones; nothing overflows on the way, and NaN is not hidden."""
    sizes = np.array([1e-30, 1e-3, 0.5, 1, 2, 3, 5, 8, 13, 20, 60, 87, 90, 200, 1e4, 1e10, 1e30])
    x = np.concatenate([[np.nan, 0], sizes, -sizes])[:, None]
    descriptor = MatmulDescriptor(len(x), 8, 1, out=F32, epilogue=(Activation(function),)).segmented
    problem = make(device, descriptor, lambda shape: x if shape == x.shape else np.ones(shape))
    plan = run(problem, poisoned, backend)
    found, (exact, magnitude) = problem.found(), problem.reference()
    assert np.isnan(found[0]).all()
    assert plan.precision_guarantee.accepts(found[1:], exact[1:], magnitude[1:], F32).all()


@EVERY_SKU
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gates_in_every_layout(device, poisoned, rng, layout, backend):
    descriptor = MatmulDescriptor(18, 2 * TILE + 16, 24, layout, epilogue=(Bias(), Gate("silu")))
    check(device, poisoned, rng, descriptor.segmented, backend)


@EVERY_SKU
@pytest.mark.parametrize(
    ("ks", "scales"),
    [
        ((40, 16), None),
        ((32, 16, 16, 8), (1.0, 0.5, -0.5, 1.0)),
        ((33, 5), (0.3, 1e-20)),
        ((8, 0, 40), (1e20, 2.0, -1.7)),
        ((24, 9), (0.0, 1.0)),
        ((24, 9), (1.0, 0.0)),
        ((24, 9), (0.0, 0.0)),
    ],
    ids=str,
)
def test_sums_of_segments(device, poisoned, rng, ks, scales, backend):
    segments = tuple(Segment(k) for k in ks)
    check(device, poisoned, rng, SegmentedMatmulDescriptor(19, 24, segments, epilogue=(Bias(),)), backend, scales)


def test_segments_of_different_layouts_and_kinds(device, poisoned, rng):
    segments = (Segment(20), Segment(7, "TN", F32, F16), Segment(9, "NN", a_stride=12, b=F32))
    descriptor = SegmentedMatmulDescriptor(18, 21, segments, F32)
    assert check(device, poisoned, rng, descriptor, None, (1.0, 0.5, -1.0)).chosen.name == "portable"
    with pytest.raises(NoSku, match="wants A and B both bf16 or both fp16, found f32 and f16"):
        SegmentedMatmulPlan.select(None, descriptor, PlanPreference(prefer_backend=MMA), device)


def test_a_segment_of_scale_zero_is_left_out_whatever_it_holds(device, poisoned, rng):
    for backend in (PORTABLE, MMA):
        problem = make(device, SegmentedMatmulDescriptor(9, 16, (Segment(8), Segment(24))), gaussian(rng), (0.0, 2.0))
        nan = make(device, problem.descriptor, lambda shape: np.full(shape, np.nan))
        problem.args.segments = (nan.args.segments[0], problem.args.segments[1])
        assert_kept(problem, run(problem, poisoned, backend))


@EVERY_SKU
def test_batches(device, poisoned, rng, backend):
    for options in (
        {},
        {"b_shared": True, "layout": "NN"},
        {"a_shared": True, "layout": "TT", "epilogue": (Bias(F32, per_batch=True), Residual())},
        {"a_stride": 3 * 16, "a_batch_stride": 16, "out_stride": 3 * 24, "out_batch_stride": 24},
    ):
        check(device, poisoned, rng, MatmulDescriptor(18, 24, 16, batch=3, **options).segmented, backend)
    check(device, poisoned, rng, MatmulDescriptor(5, 7, 3, batch=0).segmented, backend)


def test_a_long_sum_is_split_in_two_stages(device, poisoned, rng):
    k = 72 if SIMULATOR else 5000
    for steps, n, options in (
        ((), 40, {}),
        ((Bias(), Gate("gelu"), Residual()), 48, {}),
        ((Gate("silu"), Bias(F32, per_batch=True)), 42, {"batch": 2}),
    ):
        segments = (Segment(k), Segment(24), Segment(k // 2))
        descriptor = SegmentedMatmulDescriptor(19, n, segments, epilogue=steps, **options)
        for workspace, name in ((True, "mma, split sum"), (False, "mma")):
            plan = check(device, poisoned, rng, descriptor, MMA, (1.0, 0.5, -0.5), workspace)
            assert plan.chosen.name == name


@EVERY_SKU
def test_the_residual_may_be_the_result(device, poisoned, rng, backend):
    problem = make(device, MatmulDescriptor(19, 24, 16, epilogue=(Residual(),)).segmented, gaussian(rng))
    residual = problem.args.epilogue[0]
    problem.args = MatmulArgs(residual, *problem.args.segments[0], epilogue=[(residual, -0.75)])
    assert_kept(problem, run(problem, poisoned, backend))


@EVERY_SKU
def test_two_runs_have_the_same_bits(device, poisoned, rng, backend):
    problem = make(device, MatmulDescriptor(33, 24, 40, out=F32).segmented, gaussian(rng))
    found = []
    for _ in range(2):
        run(problem, poisoned, backend)
        found.append(problem.found().view(np.uint32))
    np.testing.assert_array_equal(*found)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"m": -1}, r"matmul: m -1, n 4, batch None, strides \(0, 0\) of out, wanted none negative"),
        ({"k": -3}, "matmul: k -3 and strides .*, wanted none negative"),
        ({"layout": "XT"}, "matmul: layout 'XT', wanted one of NT, NN, TN, TT"),
        ({"a_stride": 4}, "matmul: a has row stride 4, wanted at least its 5 columns"),
        ({"out": "i32"}, "matmul: out of i32, wanted one of bf16, f16, f32"),
        ({"n": 5, "epilogue": (Gate("silu"),)}, "matmul: a gate of 5 columns, wanted an even number"),
        ({"epilogue": (Gate("silu"), Gate("silu"))}, "matmul: 2 gates in the epilogue, wanted at most one"),
        ({"epilogue": ("relu",)}, "matmul: epilogue step 'relu', wanted steps of plans.matmul"),
        ({"batch": 2, "out_batch_stride": 2}, r"matmul: out with strides \(2, 4, 1\) writes some elements twice"),
    ],
)
def test_descriptors_that_contradict_themselves(fields, message):
    from plans.core import ElementKind

    given = {"m": 3, "n": 4, "k": 5} | fields
    if "out" in given:
        given["out"] = ElementKind(given["out"])
    with pytest.raises(InvalidProblem, match=message):
        MatmulDescriptor(**given)


def test_unknown_activations_are_refused():
    with pytest.raises(InvalidProblem, match="activation 'mish', wanted one of relu, gelu, gelu_tanh, silu"):
        Activation("mish")


def test_arguments_that_do_not_fit_are_refused(device, poisoned, rng):
    problem = make(device, MatmulDescriptor(4, 8, 16, epilogue=(Residual(),)).segmented, gaussian(rng))
    plan = SegmentedMatmulPlan.select(None, problem.descriptor, PlanPreference(prefer_backend=MMA), device)
    (a, b), (c,) = problem.args.segments[0], problem.args.epilogue
    out = problem.args.out
    strided = TensorRef(a.data, (4, 16), (32, 1), BF16, 64, device.ordinal, a.owner)
    shifted = TensorRef(b.owner.pointer(np.uint16, 2), b.shape, b.stride, BF16, 128, device.ordinal, b.owner)
    for pair, residual, error, message in (
        ((b, a), c, InvalidProblem, r"operand a has shape \(8, 16\), wanted \(4, 16\)"),
        ((strided, b), c, InvalidProblem, r"operand a has strides \(32, 1\); wanted \(16, 1\) as the plan was made"),
        ((a, shifted), c, MisalignedOperand, "operand b lies at address .*, wanted a multiple of 16 bytes"),
        ((a, b), (c, np.inf), InvalidProblem, "scale or beta inf, wanted a finite fp32 value"),
        ((a, b), a, InvalidProblem, r"operand residual has shape \(4, 16\), wanted \(4, 8\)"),
    ):
        with pytest.raises(error, match=message):
            plan.can_implement(SegmentedMatmulArgs(out, [pair], None, [residual]))
    with pytest.raises(InvalidProblem, match="1 segments and 2 scales given, wanted 1 of each"):
        plan.can_implement(SegmentedMatmulArgs(out, [(a, b)], [1.0, 1.0], [c]))


def test_the_single_product_is_the_sum_of_one(device):
    descriptor = MatmulDescriptor(4, 8, 16)
    plan = MatmulPlan.select(None, descriptor, device=device)
    assert plan.descriptor == descriptor.segmented
    assert plan.sku.layout == "nt"
