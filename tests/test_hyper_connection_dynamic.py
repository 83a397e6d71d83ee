"""Dynamic hyper-connections, forward and backward, against float64, which is held against finite differences."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hyper_cases import assert_kept, problem, refusals, run, tensors_of

from kernels.hyper_connection.dynamic import sample_weights
from kernels.hyper_connection.dynamic_backward import sample_weights_backward
from kernels.sinkhorn import extent_for
from plans.core import ElementKind, InvalidProblem, NoSku, Workspace, WorkspaceTooSmall
from plans.hyper_connection.common import NamedArguments, fp32_guarantee
from plans.hyper_connection.dynamic import DynamicHyperConnectionDescriptor, DynamicHyperConnectionPlan
from plans.hyper_connection.dynamic_backward import (
    DynamicHyperConnectionBackwardDescriptor,
    DynamicHyperConnectionBackwardPlan,
)
from plans.hyper_connection.math import Projection, groups, logit_gradients, logits_of, weights_of
from plans.sinkhorn import SinkhornMode

F32, BF16, F16 = ElementKind.F32, ElementKind.BF16, ElementKind.F16
EPS = 1e-5
GRADIENT_OF = {
    "d_x": "x_expanded",
    "d_gamma": "rmsnorm_weight",
    "d_projection": "projection",
    "d_alpha": "alpha",
    "d_bias": "bias",
}
MODES = pytest.mark.parametrize("mode", SinkhornMode, ids=lambda mode: mode.value)
# batch, hidden_dim, n_streams
SHAPES = [(1, 1, 1), (5, 2, 2), (2, 3, 3), (7, 5, 1), (1, 33, 4), (3, 16, 4)]
MANY_STREAMS = [(2, 8, 8), (1, 17, 17)]


def both(*settings):
    return DynamicHyperConnectionDescriptor(*settings), DynamicHyperConnectionBackwardDescriptor(*settings)


def check_both(device, poisoned, rng, settings, scale=1.0):
    """Forward for random operands, then backward from what it left; gives both results."""
    forward, backward = both(*settings)
    arrays = problem(rng, forward, scale)
    plan, found = run(device, poisoned, DynamicHyperConnectionPlan, forward, arrays)
    kept = {name: found[name] for name in ("projected", "mixing")}
    assert_kept(plan, found, forward.reference(**arrays, **kept))
    arrays |= kept | {"d_out": problem(rng, backward)["d_out"]}
    plan, gradients = run(device, poisoned, DynamicHyperConnectionBackwardPlan, backward, arrays)
    assert_kept(plan, gradients, backward.reference(**arrays))
    return found, gradients


@pytest.mark.parametrize(
    ("element", "projection"), list(itertools.product((F32, BF16), repeat=2)), ids=lambda k: k.value
)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes_and_kinds(device, poisoned, rng, shape, element, projection):
    check_both(device, poisoned, rng, (*shape, 20 if shape[2] < 4 else 4, EPS, element, BF16, projection))


@pytest.mark.parametrize("shape", [(1, 1009, 2), (1, 2048, 1), (129, 8, 1), (67, 3, 2)], ids=str)
def test_large_sizes(device, poisoned, rng, shape):
    check_both(device, poisoned, rng, (*shape, 3, EPS, BF16))


@MODES
@pytest.mark.parametrize("shape", MANY_STREAMS, ids=str)
def test_many_streams(device, poisoned, rng, shape, mode):
    check_both(device, poisoned, rng, (*shape, 2, EPS, F32, F32, F32, mode))


@MODES
@pytest.mark.parametrize("scale", [0.01, 5.0, 20.0])
def test_mixing_parameters_of_every_size(device, poisoned, rng, scale, mode):
    check_both(device, poisoned, rng, (2, 13, 4, 20, EPS, F32, F32, F32, mode), scale)


@MODES
@pytest.mark.parametrize("n", [32, 33, 64])
def test_weights_of_many_streams_and_back(device, poisoned, rng, n, mode):
    """The two kernels of one block a sample, without the projection, which takes long in the simulator."""
    m, iterations, flat = n * (n + 2), 1, 4096
    projected = np.abs(rng.standard_normal((1, m + 1))).astype(np.float32)
    alpha, bias, d = (rng.standard_normal(count).astype(np.float32) for count in (3, m, m))
    uploaded = [device.upload(array) for array in (projected, alpha, bias, d)]
    read = [buffer.pointer(np.float32) for buffer in uploaded]
    weights, d_logits, lifts, logits, entered = (poisoned(4 * k) for k in (m, m, m + 1, n * n, n * n))
    pointers = [buffer.pointer(np.float32) for buffer in (weights, d_logits, lifts, logits, entered)]
    stream, eps = device.stream(), np.float32(EPS)
    extent = extent_for(n)
    forward = sample_weights(mode.value, extent).launcher((1, 1, 1))
    forward(stream, (*read[:3], pointers[0], pointers[3], n, iterations, eps))
    backward = sample_weights_backward(mode.value, extent).launcher((1, 1, 1))
    backward(stream, (*read, read[3], *pointers[1:], m, n, iterations, eps, flat))
    device.synchronize(stream)

    # The magnitudes count a logit's error as often as Sinkhorn hands it on; its own error is some hundred units here.
    projection, guarantee = Projection(iterations, float(eps), mode), fp32_guarantee(1000.0, "of one iteration")
    logits = logits_of(projected.astype(np.float64), alpha.astype(np.float64), bias.astype(np.float64), n)
    exact, magnitude = weights_of(logits, n, projection)
    assert guarantee.accepts(device.download(weights, np.float32, (1, m)), exact, magnitude, F32).all()
    given = d[None].astype(np.float64)
    exact, magnitude = logit_gradients(logits, (given, np.abs(given)), n, projection)
    assert guarantee.accepts(device.download(d_logits, np.float32, (1, m)), exact, magnitude, F32).all()
    root, scale = projected[0, -1], np.abs(alpha[groups(n)])
    found, lift, of_lift = (
        device.download(lifts, np.float32, (m + 1,)),
        exact[0] * alpha[groups(n)],
        magnitude[0] * scale,
    )
    assert guarantee.accepts(found[:-1], lift / root, of_lift / root, F32).all()
    ratio = projected[0, :-1].astype(np.float64) / root**3 / flat
    assert guarantee.accepts(found[-1:], -(lift * ratio).sum()[None], (of_lift * ratio).sum()[None], F32).all()


def test_samples_do_not_mix(device, poisoned, rng):
    """A sample's result is that of the sample alone, whatever the batch."""
    settings = (4, EPS, BF16)
    whole = DynamicHyperConnectionDescriptor(6, 24, 2, *settings)
    arrays = problem(rng, whole)
    _, together = run(device, poisoned, DynamicHyperConnectionPlan, whole, arrays)
    alone = DynamicHyperConnectionDescriptor(1, 24, 2, *settings)
    for b in range(6):
        one = arrays | {"x_expanded": arrays["x_expanded"][b : b + 1]}
        _, found = run(device, poisoned, DynamicHyperConnectionPlan, alone, one)
        for name, value in found.items():
            assert value.tobytes() == together[name][b : b + 1].tobytes(), name


@MODES
def test_without_alpha_the_bias_is_a_static_h(device, poisoned, rng, mode):
    settings = (3, 9, 3, 5, EPS, F32, F32, F32, mode)
    descriptor = DynamicHyperConnectionDescriptor(*settings)
    arrays = problem(rng, descriptor)
    arrays["alpha"][:] = 0
    _, found = run(device, poisoned, DynamicHyperConnectionPlan, descriptor, arrays)
    assert (found["mixing"] == found["mixing"][0]).all()
    np.testing.assert_allclose(found["mixing"][0, 6:].reshape(3, 3).sum(0), 1, rtol=1e-4)


@MODES
@pytest.mark.parametrize("name", GRADIENT_OF)
@pytest.mark.parametrize("n", [1, 2, 3, 4, 8, 16, 17, 31, 32])
def test_the_reference_gradients_are_those_of_finite_differences(rng, n, name, mode):
    forward, backward = both(2, max(n, 5), n, 20 if n <= 8 else 3, EPS, F32, F32, F32, mode)
    arrays = {key: value.astype(np.float64) for key, value in problem(rng, forward).items()}
    d_out = rng.standard_normal(forward.shape)
    exact = {key: pair[0] for key, pair in forward.reference(**arrays).items() if key != "out"}
    gradient = backward.reference(d_out=d_out, **arrays, **exact)[name][0]
    operand, step = GRADIENT_OF[name], 1e-5
    for direction in rng.standard_normal((3, *gradient.shape)):
        moved = [arrays | {operand: arrays[operand] + sign * step * direction} for sign in (1, -1)]
        ends = [forward.reference(**m)["out"][0] for m in moved]
        slope = ((ends[0] - ends[1]) * d_out).sum() / (2 * step)
        assert (gradient * direction).sum() == pytest.approx(slope, rel=1e-5, abs=1e-6 * n)


@MODES
def test_the_reference_gradients_of_64_streams(rng, mode):
    """All operands are moved at once: the projection alone has 17 million elements."""
    forward, backward = both(1, 64, 64, 2, EPS, F32, F32, F32, mode)
    arrays = {key: value.astype(np.float64) for key, value in problem(rng, forward).items()}
    d_out, step = rng.standard_normal(forward.shape), 1e-5
    exact = {key: pair[0] for key, pair in forward.reference(**arrays).items() if key != "out"}
    gradients = backward.reference(d_out=d_out, **arrays, **exact)
    directions = {operand: rng.standard_normal(arrays[operand].shape) for operand in GRADIENT_OF.values()}
    moved = [{name: arrays[name] + s * directions[name] for name in arrays} for s in (step, -step)]
    ends = [forward.reference(**m)["out"][0] for m in moved]
    slope = ((ends[0] - ends[1]) * d_out).sum() / (2 * step)
    found = sum((gradients[name][0] * directions[operand]).sum() for name, operand in GRADIENT_OF.items())
    assert found == pytest.approx(slope, rel=1e-5, abs=1e-4)


def test_two_runs_have_the_same_bits(device, poisoned, rng):
    settings = (3, 21, 4, 7, EPS, BF16)
    results = []
    for _ in range(2):
        results.append(check_both(device, poisoned, np.random.default_rng(7), settings))
    for first, second in zip(*results, strict=True):
        for name in first:
            assert first[name].tobytes() == second[name].tobytes(), name


FORWARD, BACKWARD = both(2, 5, 3, 4, EPS, F32)
PLANS = {"forward": (DynamicHyperConnectionPlan, FORWARD), "backward": (DynamicHyperConnectionBackwardPlan, BACKWARD)}
OPERANDS = [(which, operand.name) for which, (_, d) in PLANS.items() for operand in d.operands()]


@pytest.mark.parametrize(("which", "name"), OPERANDS)
def test_every_operand_is_checked(device, poisoned, rng, which, name):
    plan_class, descriptor = PLANS[which]
    tensors = tensors_of(device, poisoned, descriptor, problem(rng, descriptor))
    plan = plan_class.select(None, descriptor, device=device)
    plan.can_implement(NamedArguments(descriptor, **tensors))
    for tensor, error, message in refusals(device, poisoned, tensors[name]):
        with pytest.raises(error, match=message) as refused:
            plan.can_implement(NamedArguments(descriptor, **tensors | {name: tensor}))
        assert name in str(refused.value)


def test_names_that_are_no_operands_are_refused(device, poisoned, rng):
    tensors = tensors_of(device, poisoned, FORWARD, problem(rng, FORWARD))
    with pytest.raises(InvalidProblem, match="no operand is named h_pre; the operands are out, projected, mixing"):
        NamedArguments(FORWARD, h_pre=tensors["bias"], **tensors)


@pytest.mark.parametrize("which", PLANS)
def test_the_workspace_and_the_problem_are_checked(device, poisoned, rng, which):
    plan_class, descriptor = PLANS[which]
    tensors = tensors_of(device, poisoned, descriptor, problem(rng, descriptor))
    plan = plan_class.select(None, descriptor, device=device)
    short = Workspace(poisoned(plan.workspace_size() - 1))
    with pytest.raises(WorkspaceTooSmall, match=f"wanted {plan.workspace_size()}"):
        plan.run(device.stream(), short, NamedArguments(descriptor, **tensors))
    cls = type(descriptor)
    with pytest.raises(InvalidProblem, match="hidden_dim 3 < n_streams 4"):
        cls(1, 3, 4, 20, EPS, F32)
    with pytest.raises(InvalidProblem, match="sinkhorn iterations 0, wanted 1 to 1000"):
        cls(1, 4, 4, 0, EPS, F32)
    with pytest.raises(NoSku, match="takes 1 to 64 streams, not 65"):
        plan_class.select(None, cls(1, 65, 65, 20, EPS, F32), device=device)
    with pytest.raises(NoSku, match="takes projection f32 or bf16, not f16"):
        plan_class.select(None, cls(1, 8, 4, 20, EPS, F32, F32, F16), device=device)
