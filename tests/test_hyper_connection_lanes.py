"""Mixing weights made by lanes: Sinkhorn and its gradient, two matrices a warp, and the plans at their limits."""

from __future__ import annotations

import numpy as np
import pytest
from hyper_cases import assert_kept, problem, run

from kernels import warp
from kernels.hyper_connection.lanes import (
    FEWER_WARPS,
    MOST_STREAMS,
    WARPS,
    along_lanes,
    gradient_by_lanes,
    kept_bytes,
    mixing_by_lanes,
    samples_of,
)
from kernels.sinkhorn_thread import inverse
from kernels.target import cuda
from plans.core import ElementKind
from plans.hyper_connection import (
    DynamicHyperConnectionBackwardDescriptor,
    DynamicHyperConnectionBackwardPlan,
    DynamicHyperConnectionDescriptor,
    HyperConnectionBackwardDescriptor,
    HyperConnectionBackwardPlan,
)
from plans.hyper_connection.common import fp32_guarantee
from plans.hyper_connection.dynamic_stream_backward import _lane_warps
from plans.sinkhorn import (
    SinkhornBackwardDescriptor,
    SinkhornDescriptor,
    SinkhornMode,
    gradient_units,
    gradient_units_by_thread,
    sinkhorn_units,
    units_by_thread,
)

BF16, F32 = ElementKind.BF16, ElementKind.F32
EPS = np.float32(1e-5)
MODES = pytest.mark.parametrize("mode", SinkhornMode, ids=lambda mode: mode.value)


def projected_by_lanes(mode, n, iterations):
    """A kernel: out = Sinkhorn(logits) of two matrices."""
    along, project = along_lanes(n), mixing_by_lanes(mode.value)
    place, cell = along.place, along.cell

    def kernel(logits, out):
        half, k = place()
        _, _, inside, e = cell(k)
        at = np.int64(half) * np.int64(n * n) + np.int64(e) - np.int64(2 * n)
        x = project(logits[at], inside, np.int64(iterations), EPS)
        if inside:
            out[at] = x

    return kernel


def unwound_by_lanes(mode, n, iterations):
    """A kernel: the gradient of the logits of two matrices."""
    along, back, length = along_lanes(n), gradient_by_lanes(mode.value), 2 * 2 * iterations * MOST_STREAMS
    place, cell = along.place, along.cell

    def kernel(logits, d_out, out):
        kept = cuda.shared.array(length, np.float32)
        half, k = place()
        i, j, inside, e = cell(k)
        at = np.int64(half) * np.int64(n * n) + np.int64(e) - np.int64(2 * n)
        own = np.int64(half) * np.int64(2 * iterations * MOST_STREAMS)
        found = back(logits[at], d_out[at], inside, kept, own, i, j, np.int64(iterations), EPS)
        if inside:
            out[at] = found

    return kernel


def check(run_kernel, rng, logits, iterations, mode):
    """Both within the guarantee of one thread a matrix."""
    n = logits.shape[-1]
    settings, shape = (2, n, iterations, float(EPS), mode), (np.float32, logits.shape)
    (found,) = run_kernel(projected_by_lanes(mode, n, iterations), [logits], [shape])
    descriptor = SinkhornDescriptor(*settings)
    exact, magnitude = descriptor.reference(logits)
    guarantee = fp32_guarantee(max(units_by_thread(descriptor), sinkhorn_units(descriptor)), "as by one thread")
    assert guarantee.accepts(found, exact, magnitude, F32).all(), np.abs(found - exact).max()

    d_out = rng.standard_normal(logits.shape).astype(np.float32)
    (gradient,) = run_kernel(unwound_by_lanes(mode, n, iterations), [logits, d_out], [shape])
    descriptor = SinkhornBackwardDescriptor(*settings)
    exact, magnitude = descriptor.reference(logits, d_out)
    guarantee = fp32_guarantee(max(gradient_units_by_thread(descriptor), gradient_units(descriptor)), "the same")
    assert guarantee.accepts(gradient, exact, magnitude, F32).all(), np.abs(gradient - exact).max()
    return found, gradient


@MODES
@pytest.mark.parametrize("scale", [0.01, 1.0, 20.0])
@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_two_matrices_a_warp(run_kernel, rng, n, scale, mode):
    check(run_kernel, rng, (scale * rng.uniform(-1, 1, (2, n, n))).astype(np.float32), 20, mode)


@MODES
def test_a_single_iteration(run_kernel, rng, mode):
    check(run_kernel, rng, rng.standard_normal((2, 3, 3)).astype(np.float32), 1, mode)


@MODES
def test_logits_that_saturate(run_kernel, rng, mode):
    logits = np.array([[[90, -90], [0, 25]], [[0, 1], [2, 3]]], np.float32)
    _, gradient = check(run_kernel, rng, logits, 5, mode)
    if mode is SinkhornMode.EXP:
        assert (gradient[logits > 20] == 0).all()


def test_a_row_below_the_guard_stays_as_it_is(run_kernel, rng):
    logits = np.array([[[-30, -31], [0, 1]], [[0, 1], [2, 3]]], np.float32)
    check(run_kernel, rng, logits, 1, SinkhornMode.EXP)


@MODES
def test_a_matrix_that_is_not_a_number_stays_alone(run_kernel, mode):
    logits = np.zeros((2, 4, 4), np.float32)
    logits[0, 1, 2] = np.nan
    (found,) = run_kernel(projected_by_lanes(mode, 4, 2), [logits], [(np.float32, logits.shape)])
    assert np.isnan(found[0]).any() and np.allclose(found[1], 0.25, atol=1e-4)


def test_reciprocals_without_a_branch(run_kernel, rng):
    values = np.exp(rng.uniform(-80, 80, 1024)).astype(np.float32)
    (found,) = run_kernel(_inverses, [values], [(np.float32, 1024)], threads=1024)
    assert (np.abs(found * values.astype(np.float64) - 1) <= 1.01 * 2.0**-24).all()


def _inverses(x, out):
    i = np.int64(warp.thread_index())
    out[i] = inverse(x[i])


@MODES
def test_divisors_of_many_iterations_take_smaller_blocks(device, poisoned, rng, mode):
    iterations = 400
    descriptor = DynamicHyperConnectionBackwardDescriptor(19, 8, 2, iterations, float(EPS), BF16, BF16, BF16, mode)
    assert _lane_warps(descriptor) == FEWER_WARPS < WARPS
    arrays = problem(rng, descriptor)
    forward = DynamicHyperConnectionDescriptor(19, 8, 2, iterations, float(EPS), BF16, BF16, BF16, mode)
    exact = forward.reference(**{k: v for k, v in arrays.items() if k not in ("d_out", "projected", "mixing")})
    arrays |= {name: exact[name][0].astype(np.float32) for name in ("projected", "mixing")}
    plan, found = run(device, poisoned, DynamicHyperConnectionBackwardPlan, descriptor, arrays)
    assert plan.chosen.name == "mma and stream"
    assert_kept(plan, found, descriptor.reference(**arrays))


def test_the_most_iterations_fit_in_shared_memory(device):
    most = 1000
    assert kept_bytes(FEWER_WARPS, most) <= 160 << 10 and kept_bytes(1, most) <= kept_bytes(FEWER_WARPS, most)
    assert samples_of(FEWER_WARPS) < samples_of(WARPS) <= 16
    for cls, plan in (
        (DynamicHyperConnectionBackwardDescriptor, DynamicHyperConnectionBackwardPlan),
        (HyperConnectionBackwardDescriptor, HyperConnectionBackwardPlan),
    ):
        assert plan.select(None, cls(3, 16, 4, most, float(EPS), BF16), device=device).chosen.name != "portable"
