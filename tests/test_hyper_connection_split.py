"""Hyper-connections around a sublayer: before and after it, forward and backward, against float64.

The references are held against finite differences, and against the whole connection that they are parts of.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hyper_cases import assert_kept, problem, refusals, run, tensors_of

from plans.core import ElementKind, InvalidProblem, NoSku, Workspace, WorkspaceTooSmall
from plans.hyper_connection.common import NamedArguments
from plans.hyper_connection.split import (
    HyperConnectionPostDescriptor,
    HyperConnectionPostPlan,
    HyperConnectionPreDescriptor,
    HyperConnectionPrePlan,
)
from plans.hyper_connection.split_backward import (
    HyperConnectionPostBackwardDescriptor,
    HyperConnectionPostBackwardPlan,
    HyperConnectionPreBackwardDescriptor,
    HyperConnectionPreBackwardPlan,
)
from plans.hyper_connection.static import HyperConnectionDescriptor
from plans.hyper_connection.static_backward import HyperConnectionBackwardDescriptor
from plans.sinkhorn import SinkhornMode

F32, BF16, F16 = ElementKind.F32, ElementKind.BF16, ElementKind.F16
EPS = 1e-5
MODES = pytest.mark.parametrize("mode", SinkhornMode, ids=lambda mode: mode.value)
# batch, hidden_dim, n_streams
SHAPES = [(1, 1, 1), (37, 5, 2), (2, 3, 3), (1, 33, 4), (3, 19, 4), (2, 8, 8)]
# kinds of gamma and projection
FORMS = [(None, None), (F32, None), (None, BF16), (BF16, F32)]
PARTS = {"gamma": "rmsnorm_weight", "x": "x_expanded"}


def operand_of(gradient):
    """The operand that a gradient is of."""
    name = gradient.removeprefix("d_")
    return PARTS.get(name, name)


def check_pre(device, poisoned, rng, settings, scale=1.0):
    forward, backward = HyperConnectionPreDescriptor(*settings), HyperConnectionPreBackwardDescriptor(*settings)
    arrays = problem(rng, forward, scale)
    plan, found = run(device, poisoned, HyperConnectionPrePlan, forward, arrays)
    kept = {operand.name: found[operand.name] for operand in forward.kept}
    assert_kept(plan, found, forward.reference(**arrays, **kept))
    arrays |= kept | {name: v for name, v in problem(rng, backward).items() if name.startswith("d_")}
    plan, gradients = run(device, poisoned, HyperConnectionPreBackwardPlan, backward, arrays)
    assert_kept(plan, gradients, backward.reference(**arrays))
    return found, gradients


@pytest.mark.parametrize(("gamma", "projection"), FORMS, ids=lambda kind: getattr(kind, "value", "none"))
@pytest.mark.parametrize("element", [F32, BF16], ids=lambda kind: kind.value)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_what_comes_before_the_sublayer(device, poisoned, rng, shape, element, gamma, projection):
    if projection is not None and shape[0] > 3:
        shape = (5, *shape[1:])
    check_pre(device, poisoned, rng, (*shape, 4, EPS, element, gamma, projection))


@MODES
@pytest.mark.parametrize("scale", [0.01, 20.0])
@pytest.mark.parametrize("projection", [None, F32], ids=["static", "dynamic"])
def test_mixing_parameters_of_every_size(device, poisoned, rng, projection, scale, mode):
    check_pre(device, poisoned, rng, (2, 7, 4, 20, EPS, F32, F32, projection, mode), scale)


@MODES
@pytest.mark.parametrize("shape", [(1, 17, 17), (1, 33, 33)], ids=str)
def test_many_streams(device, poisoned, rng, shape, mode):
    check_pre(device, poisoned, rng, (*shape, 1, EPS, F32, F32, None, mode))


@pytest.mark.parametrize("per_sample", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("element", [F32, BF16], ids=lambda kind: kind.value)
@pytest.mark.parametrize("shape", [*SHAPES, (2, 17, 17), (1, 33, 33)], ids=str)
def test_what_comes_after_the_sublayer(device, poisoned, rng, shape, element, per_sample):
    forward = HyperConnectionPostDescriptor(*shape, element, per_sample)
    arrays = problem(rng, forward)
    plan, found = run(device, poisoned, HyperConnectionPostPlan, forward, arrays)
    assert_kept(plan, found, forward.reference(**arrays))
    backward = HyperConnectionPostBackwardDescriptor(*shape, element, per_sample)
    arrays |= {"d_out": problem(rng, backward)["d_out"]}
    plan, gradients = run(device, poisoned, HyperConnectionPostBackwardPlan, backward, arrays)
    assert_kept(plan, gradients, backward.reference(**arrays))
    assert (gradients["d_mixing"][:, : shape[2]] == 0).all()


def float64_problem(rng, descriptor):
    return {name: array.astype(np.float64) for name, array in problem(rng, descriptor).items()}


@MODES
@pytest.mark.parametrize(("gamma", "projection"), FORMS, ids=lambda kind: getattr(kind, "value", "none"))
@pytest.mark.parametrize("n", [1, 2, 3, 4, 8, 16, 17, 31])
def test_the_reference_gradients_before_are_those_of_finite_differences(rng, n, gamma, projection, mode):
    settings = (2, max(n, 5), n, 20 if n <= 8 else 3, EPS, F32, gamma, projection, mode)
    forward, backward = HyperConnectionPreDescriptor(*settings), HyperConnectionPreBackwardDescriptor(*settings)
    arrays, incoming = float64_problem(rng, forward), float64_problem(rng, backward)
    incoming = {name: value for name, value in incoming.items() if name.startswith("d_")}
    kept = {operand.name: forward.reference(**arrays)[operand.name][0] for operand in forward.kept}
    gradients = backward.reference(**arrays, **kept, **incoming)

    def loss(moved):
        found = forward.reference(**moved)
        streams = (moved["x_expanded"] * incoming["d_streams"]).sum()
        return streams + sum((found[name][0] * incoming[f"d_{name}"]).sum() for name in ("aggregate", "mixing"))

    for name, (gradient, _) in gradients.items():
        operand, step = operand_of(name), 1e-5
        direction = rng.standard_normal(gradient.shape)
        ends = [loss(arrays | {operand: arrays[operand] + sign * step * direction}) for sign in (1, -1)]
        slope = (ends[0] - ends[1]) / (2 * step)
        assert (gradient * direction).sum() == pytest.approx(slope, rel=1e-5, abs=1e-6 * n), name


@pytest.mark.parametrize("per_sample", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("n", [1, 2, 3, 4, 8, 16, 17, 31, 32, 64])
def test_the_reference_gradients_after_are_those_of_finite_differences(rng, n, per_sample):
    settings = (3, max(n, 9), n, F32, per_sample)
    forward, backward = HyperConnectionPostDescriptor(*settings), HyperConnectionPostBackwardDescriptor(*settings)
    arrays, d_out = float64_problem(rng, forward), rng.standard_normal(forward.shape)
    gradients = backward.reference(d_out=d_out, **arrays)
    for name, operand in (("d_streams", "x_expanded"), ("d_update", "update"), ("d_mixing", "mixing")):
        direction = rng.standard_normal(arrays[operand].shape)
        ends = [forward.reference(**arrays | {operand: arrays[operand] + s * direction})["out"][0] for s in (1, -1)]
        slope = ((ends[0] - ends[1]) * d_out).sum() / 2  # out is linear in each operand
        assert (gradients[name][0] * direction).sum() == pytest.approx(slope, rel=1e-9, abs=1e-9), name


def test_the_parts_make_the_whole(device, poisoned, rng):
    """With the norm's result as the update, before and after are the static connection, and so are their gradients."""
    sizes = (3, 11, 4)
    whole = HyperConnectionDescriptor(*sizes, 20, EPS, F32, F32)
    arrays = float64_problem(rng, whole)
    before = HyperConnectionPreDescriptor(*sizes, 20, EPS, F32, F32)
    made = {name: pair[0] for name, pair in before.reference(**arrays).items()}
    after = {"x_expanded": arrays["x_expanded"], "update": made["aggregate"], "mixing": made["mixing"]}
    found = HyperConnectionPostDescriptor(*sizes, F32).reference(**after)["out"][0]
    np.testing.assert_allclose(found, whole.reference(**arrays)[0], rtol=1e-12)

    d_out = rng.standard_normal(whole.shape)
    expected = HyperConnectionBackwardDescriptor(*sizes, 20, EPS, F32, F32).reference(d_out=d_out, **arrays)
    back = HyperConnectionPostBackwardDescriptor(*sizes, F32).reference(d_out=d_out, **after)
    incoming = {"d_streams": back["d_streams"][0], "d_aggregate": back["d_update"][0], "d_mixing": back["d_mixing"][0]}
    backward = HyperConnectionPreBackwardDescriptor(*sizes, 20, EPS, F32, F32)
    gradients = backward.reference(mixing=made["mixing"], **arrays, **incoming)
    for name, (gradient, _) in gradients.items():
        np.testing.assert_allclose(gradient, expected[name][0], rtol=1e-9, atol=1e-12, err_msg=name)


def test_the_gradient_of_x_may_be_added_in_place(device, poisoned, rng):
    settings = (2, 16, 4, 3, EPS, F32)
    descriptor = HyperConnectionPreBackwardDescriptor(*settings)
    arrays = problem(rng, descriptor)
    arrays["mixing"] = HyperConnectionPreDescriptor(*settings).reference(
        **{k: v for k, v in arrays.items() if not k.startswith("d_") and k != "mixing"}
    )["mixing"][0].astype(np.float32)  # fmt: skip
    plan, apart = run(device, poisoned, HyperConnectionPreBackwardPlan, descriptor, arrays)
    tensors, stream = tensors_of(device, poisoned, descriptor, arrays), device.stream()
    streams = device.upload(arrays["d_streams"]).tensor(F32, descriptor.shape)
    tensors |= {"d_x": streams, "d_streams": streams}
    workspace = Workspace(poisoned(plan.workspace_size()))
    plan.run(stream, workspace, NamedArguments(descriptor, **tensors))
    device.synchronize(stream)
    np.testing.assert_array_equal(device.download(streams.owner, np.float32, descriptor.shape), apart["d_x"])


def test_two_runs_have_the_same_bits(device, poisoned):
    for settings in ((3, 21, 4, 7, EPS, BF16, BF16), (3, 21, 4, 7, EPS, BF16, BF16, BF16)):
        first, second = (check_pre(device, poisoned, np.random.default_rng(3), settings) for _ in range(2))
        for one, other in zip(first, second, strict=True):
            assert all(one[name].tobytes() == other[name].tobytes() for name in one)


PLANS = {
    "pre": (HyperConnectionPrePlan, HyperConnectionPreDescriptor(2, 5, 3, 4, EPS, F32, BF16)),
    "pre dynamic": (HyperConnectionPrePlan, HyperConnectionPreDescriptor(2, 5, 3, 4, EPS, F32, None, BF16)),
    "pre backward": (HyperConnectionPreBackwardPlan, HyperConnectionPreBackwardDescriptor(2, 5, 3, 4, EPS, F32, BF16)),
    "post": (HyperConnectionPostPlan, HyperConnectionPostDescriptor(2, 5, 3, BF16)),
    "post backward": (HyperConnectionPostBackwardPlan, HyperConnectionPostBackwardDescriptor(2, 5, 3, F32)),
}
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


@pytest.mark.parametrize("which", ["pre dynamic", "pre backward", "post backward"])
def test_the_workspace_is_the_callers(device, poisoned, rng, which):
    plan_class, descriptor = PLANS[which]
    plan = plan_class.select(None, descriptor, device=device)
    tensors = tensors_of(device, poisoned, descriptor, problem(rng, descriptor))
    with pytest.raises(WorkspaceTooSmall, match=f"workspace of 0 bytes, wanted {plan.workspace_size()}"):
        plan.run(device.stream(), None, NamedArguments(descriptor, **tensors))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        *(({name: 0}, "wanted all positive") for name in ("batch", "hidden_dim", "n_streams")),
        ({"hidden_dim": 3}, "hidden_dim 3 < n_streams 4, wanted at least one channel a stream"),
        *(({"sinkhorn_iters": t}, f"sinkhorn iterations {t}, wanted 1 to 1000") for t in (0, 1001)),
        *(({"eps": eps}, "eps .*, wanted a finite number in") for eps in (0.0, 1.0, -1e-5, np.inf, np.nan)),
    ],
)
def test_descriptors_that_contradict_themselves(changed, message):
    settings = {"batch": 2, "hidden_dim": 8, "n_streams": 4, "sinkhorn_iters": 20, "eps": EPS, "element": F32}
    with pytest.raises(InvalidProblem, match=f"hyper-connection pre: .*{message}"):
        HyperConnectionPreDescriptor(**settings | changed)
    after = {k: v for k, v in (settings | changed).items() if k not in ("sinkhorn_iters", "eps")}
    if changed.keys() <= after.keys():
        with pytest.raises(InvalidProblem, match=f"hyper-connection post: .*{message}"):
            HyperConnectionPostDescriptor(**after)


def test_what_no_kernel_computes_is_refused(device):
    for plan_class, descriptor, reason in (
        (HyperConnectionPrePlan, HyperConnectionPreDescriptor(1, 65, 65, 2, EPS, F32), "takes 1 to 64 streams, not 65"),
        (HyperConnectionPrePlan, HyperConnectionPreDescriptor(1, 8, 4, 2, EPS, F16), "takes element f32 or bf16"),
        (HyperConnectionPrePlan, HyperConnectionPreDescriptor(1, 8, 4, 2, EPS, F32, F16), "takes gamma f32 or bf16"),
        (HyperConnectionPostPlan, HyperConnectionPostDescriptor(1, 8, 4, F16), "takes element f32 or bf16, not f16"),
        (HyperConnectionPostPlan, HyperConnectionPostDescriptor(2**31, 8, 4, F32), r"takes fewer than 2\*\*31 samples"),
    ):
        with pytest.raises(NoSku, match=reason):
            plan_class.select(None, descriptor, device=device)


@pytest.mark.parametrize(("element", "gamma"), list(itertools.product((F32, BF16), repeat=2)), ids=lambda k: k.value)
def test_a_batch_larger_than_a_block_is_summed_whole(device, poisoned, rng, element, gamma):
    check_pre(device, poisoned, rng, (67, 4, 2, 3, EPS, element, gamma))
