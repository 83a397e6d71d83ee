"""Sinkhorn-Knopp: both modes and their gradients against float64, which is itself held against finite differences."""

from __future__ import annotations

import numpy as np
import pytest
from hyper_cases import faulty_gradient

from kernels.sinkhorn_thread import MAX_N
from plans.core import (
    BackendKind,
    BufferTooSmall,
    ElementKind,
    InvalidProblem,
    NoSku,
    PlanPreference,
    TensorRef,
    Workspace,
    WorkspaceTooSmall,
)
from plans.sinkhorn import (
    SinkhornArgs,
    SinkhornBackwardArgs,
    SinkhornBackwardDescriptor,
    SinkhornBackwardPlan,
    SinkhornDescriptor,
    SinkhornMode,
    SinkhornPlan,
    sinkhorn_backward_reference,
    sinkhorn_reference,
)

F32 = ElementKind.F32
SIZES = (1, 2, 3, 4, 8, 16, 17, 31, 32, 64)
EVERY_SKU = [(n, BackendKind.PORTABLE) for n in SIZES] + [(n, BackendKind.VECTOR) for n in range(1, MAX_N + 1)]
BACKENDS = pytest.mark.parametrize("backend", [BackendKind.PORTABLE, BackendKind.VECTOR], ids=lambda b: b.value)
SCALES = (0.01, 1.0, 20.0)
EPS = 1e-5
MODES = pytest.mark.parametrize("mode", SinkhornMode, ids=lambda mode: mode.value)


def logits_of(rng, shape, scale):
    return (scale * rng.uniform(-1, 1, shape)).astype(np.float32)


def iterations_for(n):
    return 20 if n <= 8 else 3


def forward(device, poisoned, descriptor, logits, backend=None):
    plan = SinkhornPlan.select(None, descriptor, PlanPreference(prefer_backend=backend), device=device)
    out, stream = poisoned(logits.nbytes), device.stream()
    args = SinkhornArgs(out.tensor(F32, logits.shape), device.upload(logits).tensor(F32, logits.shape))
    plan.run(stream, None, args)
    device.synchronize(stream)
    return plan, device.download(out, np.float32, logits.shape, stream)


def backward(device, poisoned, descriptor, logits, d_out, backend=None):
    plan = SinkhornBackwardPlan.select(None, descriptor, PlanPreference(prefer_backend=backend), device=device)
    result = poisoned(logits.nbytes)
    tensors = [b.tensor(F32, logits.shape) for b in (result, device.upload(logits), device.upload(d_out))]
    stream = device.stream()
    workspace = Workspace(poisoned(plan.workspace_size()))
    plan.run(stream, workspace, SinkhornBackwardArgs(*tensors))
    device.synchronize(stream)
    return plan, device.download(result, np.float32, logits.shape, stream)


def assert_kept(plan, found, reference):
    exact, magnitude = reference
    kept = plan.precision_guarantee.accepts(found, exact, magnitude, F32)
    assert kept.all(), f"{np.abs(found - exact).max()} off, {(~kept).sum()} of {kept.size} elements"


@MODES
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize(("n", "backend"), EVERY_SKU, ids=str)
def test_matrix_and_gradient_keep_their_guarantee(device, poisoned, rng, n, scale, mode, backend):
    batch = 35 if backend is BackendKind.VECTOR else 3 if n < 32 else 1
    settings = (batch, n, iterations_for(n), EPS, mode)
    logits = logits_of(rng, (batch, n, n), scale)
    descriptor = SinkhornDescriptor(*settings)
    assert_kept(*forward(device, poisoned, descriptor, logits, backend), descriptor.reference(logits))

    d_out = rng.standard_normal(logits.shape).astype(np.float32)
    descriptor = SinkhornBackwardDescriptor(*settings)
    found = backward(device, poisoned, descriptor, logits, d_out, backend)
    assert_kept(*found, descriptor.reference(logits, d_out))


@MODES
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("n", SIZES)
def test_the_reference_gradient_is_that_of_finite_differences(rng, n, scale, mode):
    iterations, step = iterations_for(n), 1e-5
    logits, d_out, *directions = rng.standard_normal((6, n, n))
    logits = scale * np.tanh(logits)
    gradient, _ = sinkhorn_backward_reference(logits, d_out, iterations, EPS, mode)
    for direction in directions:
        ends = [sinkhorn_reference(logits + sign * step * direction, iterations, EPS, mode) for sign in (1, -1)]
        slope = ((ends[0] - ends[1]) * d_out).sum() / (2 * step)
        assert (gradient * direction).sum() == pytest.approx(slope, rel=1e-5, abs=1e-7 * n)


@pytest.mark.parametrize("scale", [0.01, 1.0])
def test_the_guarantee_refuses_the_published_faulty_gradient(device, rng, scale):
    descriptor = SinkhornBackwardDescriptor(2, 4, 20, EPS, SinkhornMode.EXP)
    logits = logits_of(rng, (2, 4, 4), scale)
    d_out = rng.standard_normal(logits.shape).astype(np.float32)
    guarantee = SinkhornBackwardPlan.select(None, descriptor, device=device).precision_guarantee
    exact, magnitude = descriptor.reference(logits, d_out)
    assert not guarantee.accepts(faulty_gradient(logits, d_out, 20), exact, magnitude, F32).any()


@MODES
@pytest.mark.parametrize("n", SIZES)
def test_columns_sum_to_one_and_rows_once_converged(device, poisoned, rng, n, mode):
    logits = logits_of(rng, (1, n, n), 1.0)
    _, found = forward(device, poisoned, SinkhornDescriptor(1, n, 20, 1e-6, mode), logits)
    assert found.min() > 0
    np.testing.assert_allclose(found.sum(-2), 1, rtol=1e-5)
    np.testing.assert_allclose(found.sum(-1), 1, rtol=1e-4)


@MODES
@BACKENDS
def test_one_iteration_says_the_order_of_rows_and_columns(device, poisoned, mode, backend):
    logits = np.log(np.array([[[1, 3], [1, 1]]], np.float32))
    _, found = forward(device, poisoned, SinkhornDescriptor(1, 2, 1, 1e-7, mode), logits, backend=backend)
    np.testing.assert_allclose(found, [[[1 / 3, 3 / 5], [2 / 3, 2 / 5]]], rtol=1e-5)


@MODES
@BACKENDS
def test_logits_of_any_finite_size_saturate(device, poisoned, rng, mode, backend):
    logits = np.array([[[1e30, 21.0], [20.0, -1e30]], [[-300, -300], [500, 400]]], np.float32)
    settings = (2, 2, 3, EPS, mode)
    descriptor = SinkhornDescriptor(*settings)
    plan, found = forward(device, poisoned, descriptor, logits, backend=backend)
    assert np.isfinite(found).all()
    assert_kept(plan, found, descriptor.reference(logits))
    d_out = rng.standard_normal(logits.shape).astype(np.float32)
    descriptor = SinkhornBackwardDescriptor(*settings)
    plan, gradient = backward(device, poisoned, descriptor, logits, d_out, backend=backend)
    assert_kept(plan, gradient, descriptor.reference(logits, d_out))
    if mode is SinkhornMode.EXP:
        assert (gradient[logits > 20] == 0).all()


@BACKENDS
def test_a_row_below_the_guard_stays_as_it_is(device, poisoned, rng, backend):
    logits = np.array([[[-30, -31], [0, 1]]], np.float32)
    settings = (1, 2, 1, EPS, SinkhornMode.EXP)
    _, found = forward(device, poisoned, SinkhornDescriptor(*settings), logits, backend=backend)
    rows = np.exp(logits[0].astype(np.float64))
    rows[1] /= rows[1].sum()
    np.testing.assert_allclose(found[0], rows / rows.sum(0), rtol=1e-5)
    d_out = rng.standard_normal(logits.shape).astype(np.float32)
    descriptor = SinkhornBackwardDescriptor(*settings)
    assert_kept(
        *backward(device, poisoned, descriptor, logits, d_out, backend=backend), descriptor.reference(logits, d_out)
    )


@MODES
@BACKENDS
def test_nan_is_not_hidden(device, poisoned, mode, backend):
    logits = np.zeros((1, 3, 3), np.float32)
    logits[0, 1, 2] = np.nan
    _, found = forward(device, poisoned, SinkhornDescriptor(1, 3, 2, EPS, mode), logits, backend=backend)
    assert np.isnan(found).any()


@MODES
def test_two_runs_have_the_same_bits(device, poisoned, rng, mode):
    for n in (4, 17):
        logits = logits_of(rng, (2, n, n), 5.0)
        d_out = rng.standard_normal(logits.shape).astype(np.float32)
        descriptor = SinkhornBackwardDescriptor(2, n, 2, EPS, mode)
        first, second = (backward(device, poisoned, descriptor, logits, d_out)[1] for _ in range(2))
        np.testing.assert_array_equal(first.view(np.uint32), second.view(np.uint32))


def test_what_a_thread_takes(device):
    vector = PlanPreference(prefer_backend=BackendKind.VECTOR)
    for n, eps, reason in ((9, EPS, "takes matrices of up to 8 rows, not 9"), (4, 1e-40, "takes eps from 1.17549")):
        descriptor = SinkhornDescriptor(1, n, 20, eps, SinkhornMode.EXP)
        assert SinkhornPlan.select(None, descriptor, device=device).chosen.name == "portable"
        with pytest.raises(NoSku, match=reason):
            SinkhornPlan.select(None, descriptor, vector, device=device)
    descriptor = SinkhornDescriptor(1, 8, 20, EPS, SinkhornMode.EXP)
    assert SinkhornPlan.select(None, descriptor, device=device).chosen.name == "thread"


@MODES
@BACKENDS
def test_a_thousand_iterations(device, poisoned, rng, mode, backend):
    logits = logits_of(rng, (1, 3, 3), 3.0)
    descriptor = SinkhornDescriptor(1, 3, 1000, EPS, mode)
    assert_kept(*forward(device, poisoned, descriptor, logits, backend=backend), descriptor.reference(logits))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"batch": 0}, "sinkhorn: batch 0 and n 4, wanted both positive"),
        ({"n": -1}, "sinkhorn: batch 2 and n -1, wanted both positive"),
        ({"iterations": 0}, "sinkhorn: sinkhorn iterations 0, wanted 1 to 1000"),
        ({"iterations": 1001}, "sinkhorn: sinkhorn iterations 1001, wanted 1 to 1000"),
        *(
            ({"eps": e}, "sinkhorn: eps .*, wanted a finite number in")
            for e in (0.0, -1e-5, 1.0, np.inf, np.nan, 1e-60)
        ),
    ],
)
def test_descriptors_that_contradict_themselves(changed, message):
    settings = {"batch": 2, "n": 4, "iterations": 20, "eps": EPS, "mode": SinkhornMode.EXP}
    with pytest.raises(InvalidProblem, match=message):
        SinkhornDescriptor(**settings | changed)


def test_matrices_beyond_64_rows_are_refused(device):
    for plan, descriptor in ((SinkhornPlan, SinkhornDescriptor), (SinkhornBackwardPlan, SinkhornBackwardDescriptor)):
        with pytest.raises(NoSku, match="takes matrices of up to 64 rows, not 65"):
            plan.select(None, descriptor(1, 65, 20, EPS, SinkhornMode.SOFTMAX), device=device)


def test_arguments_that_do_not_fit_are_refused(device, poisoned):
    shape = (2, 3, 3)
    plan = SinkhornPlan.select(None, SinkhornDescriptor(*shape[:2], 4, EPS, SinkhornMode.EXP), device=device)
    good = [poisoned(72).tensor(F32, shape) for _ in range(2)]
    strided = TensorRef(good[1].data, shape, (9, 1, 3), F32, 18, device.ordinal, good[1].owner)
    for tensor, error, message in (
        (poisoned(72).tensor(F32, (3, 3, 2)), InvalidProblem, r"has shape \(3, 3, 2\), wanted \(2, 3, 3\)"),
        (poisoned(72).tensor(ElementKind.BF16, shape), InvalidProblem, "holds bf16, wanted f32; cast it first"),
        (poisoned(68).tensor(F32, shape), BufferTooSmall, "the buffer holds 17 elements, wanted 18"),
        (strided, InvalidProblem, "wanted it contiguous, copy it first"),
        (good[0], InvalidProblem, "operand out is written to"),
        (None, InvalidProblem, "operand logits is missing"),
    ):
        with pytest.raises(error, match=message):
            plan.can_implement(SinkhornArgs(good[0], tensor))


def test_the_backward_wants_its_workspace(device, poisoned):
    descriptor = SinkhornBackwardDescriptor(2, 3, 4, EPS, SinkhornMode.EXP)
    plan = SinkhornBackwardPlan.select(None, descriptor, device=device)
    assert plan.workspace_size() == 4 * 2 * (2 * 4) * 3
    args = SinkhornBackwardArgs(*(poisoned(72).tensor(F32, (2, 3, 3)) for _ in range(3)))
    with pytest.raises(WorkspaceTooSmall, match="workspace of 191 bytes, wanted 192"):
        plan.run(device.stream(), Workspace(poisoned(191)), args)
