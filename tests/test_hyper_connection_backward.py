"""The gradient of hyper-connections against float64, which is itself held against finite differences."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from plans.core import BufferTooSmall, ElementKind, InvalidProblem, NoSku, Workspace, WorkspaceTooSmall
from plans.core.precision import round_to
from plans.hyper_connection.static import HyperConnectionDescriptor
from plans.hyper_connection.static_backward import (
    HyperConnectionBackwardArgs,
    HyperConnectionBackwardDescriptor,
    HyperConnectionBackwardPlan,
)

F32, BF16, F16 = ElementKind.F32, ElementKind.BF16, ElementKind.F16
EPS = 1e-5
GRADIENT_OF = {
    "d_x": "x_expanded",
    "d_gamma": "rmsnorm_weight",
    "d_h_pre": "h_pre",
    "d_h_post": "h_post",
    "d_h_res": "h_res",
}
# batch, hidden_dim, n_streams
SHAPES = [(1, 1, 1), (5, 2, 2), (2, 3, 3), (37, 5, 1), (1, 33, 4), (3, 61, 4), (2, 8, 8)]
MANY_STREAMS = [(2, 17, 17), (1, 31, 31), (1, 32, 32), (1, 33, 33), (1, 64, 64)]


def problem(rng, descriptor, scale=1.0):
    """The operands that are read, by name, as arrays of their kinds."""
    arrays = {}
    for operand in descriptor.operands():
        if not operand.writes:
            factor = scale if operand.name.startswith("h_") else 1.0
            arrays[operand.name] = round_to(factor * rng.standard_normal(operand.shape), operand.element)
    return arrays


def plan_of(device, descriptor):
    return HyperConnectionBackwardPlan.select(None, descriptor, device=device)


def tensors_of(device, poisoned, descriptor, arrays):
    tensors = {}
    for operand in descriptor.operands():
        buffer = poisoned(operand.nbytes) if operand.writes else device.upload(arrays[operand.name])
        tensors[operand.name] = buffer.tensor(operand.element, operand.shape)
    return tensors


def run(device, poisoned, descriptor, arrays):
    """Every gradient by name."""
    plan, tensors = plan_of(device, descriptor), tensors_of(device, poisoned, descriptor, arrays)
    stream = device.stream()
    workspace = Workspace(poisoned(plan.workspace_size()))
    plan.run(stream, workspace, HyperConnectionBackwardArgs(**tensors))
    device.synchronize(stream)
    found = {}
    for operand in descriptor.operands()[: len(GRADIENT_OF)]:
        kind = operand.element
        raw = device.download(tensors[operand.name].owner, kind.storage, operand.shape, stream)
        found[operand.name] = raw.view(kind.values)
    return found


def assert_kept(device, descriptor, arrays, found):
    guarantee, kinds = plan_of(device, descriptor).precision_guarantee, {"d_x": descriptor.element}
    expected = descriptor.reference(**arrays)
    assert found.keys() == expected.keys() == GRADIENT_OF.keys()
    for name, (exact, magnitude) in expected.items():
        kept = guarantee.accepts(found[name], exact, magnitude, kinds.get(name, F32))
        assert kept.all(), f"{name}: {np.abs(found[name] - exact).max()} off, {(~kept).sum()} of {kept.size} elements"


@pytest.mark.parametrize(("element", "gamma"), list(itertools.product((F32, BF16), repeat=2)), ids=lambda k: k.value)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes_and_kinds(device, poisoned, rng, shape, element, gamma):
    descriptor = HyperConnectionBackwardDescriptor(*shape, 20, EPS, element, gamma)
    arrays = problem(rng, descriptor)
    assert_kept(device, descriptor, arrays, run(device, poisoned, descriptor, arrays))


@pytest.mark.parametrize("shape", [(1, 4099, 1), (1, 8192, 1), (2, 2048, 2), (1031, 8, 1), (251, 3, 2)], ids=str)
def test_large_sizes(device, poisoned, rng, shape):
    descriptor = HyperConnectionBackwardDescriptor(*shape, 3, EPS, BF16)
    arrays = problem(rng, descriptor)
    assert_kept(device, descriptor, arrays, run(device, poisoned, descriptor, arrays))


@pytest.mark.parametrize("shape", MANY_STREAMS, ids=str)
def test_many_streams(device, poisoned, rng, shape):
    descriptor = HyperConnectionBackwardDescriptor(*shape, 2, EPS, F32)
    arrays = problem(rng, descriptor)
    assert_kept(device, descriptor, arrays, run(device, poisoned, descriptor, arrays))


@pytest.mark.parametrize("scale", [0.01, 5.0, 20.0, 500.0])
def test_mixing_parameters_of_every_size(device, poisoned, rng, scale):
    descriptor = HyperConnectionBackwardDescriptor(2, 13, 4, 20, EPS, F32)
    arrays = problem(rng, descriptor, scale)
    assert_kept(device, descriptor, arrays, run(device, poisoned, descriptor, arrays))


def test_streams_that_cancel_in_the_aggregate(device, poisoned, rng):
    descriptor = HyperConnectionBackwardDescriptor(2, 19, 2, 5, EPS, F32)
    arrays = problem(rng, descriptor)
    arrays["h_pre"][:] = 0.7
    arrays["x_expanded"][:, 1] = -arrays["x_expanded"][:, 0] + np.float32(1e-4)
    assert_kept(device, descriptor, arrays, run(device, poisoned, descriptor, arrays))


@pytest.mark.parametrize("name", GRADIENT_OF)
@pytest.mark.parametrize("n", [1, 2, 3, 4, 8, 16, 17, 31, 32, 64])
def test_the_reference_gradients_are_those_of_finite_differences(rng, n, name):
    settings = (2, max(n, 11), n, 20 if n <= 8 else 3, EPS, F32, F32)
    backward, forward = HyperConnectionBackwardDescriptor(*settings), HyperConnectionDescriptor(*settings)
    arrays = {key: value.astype(np.float64) for key, value in problem(rng, backward).items()}
    gradient = backward.reference(**arrays)[name][0]
    d_out, operand, step = arrays.pop("d_out"), GRADIENT_OF[name], 1e-5
    for direction in rng.standard_normal((3, *gradient.shape)):
        ends = [forward.reference(**arrays | {operand: arrays[operand] + s * direction})[0] for s in (step, -step)]
        slope = ((ends[0] - ends[1]) * d_out).sum() / (2 * step)
        assert (gradient * direction).sum() == pytest.approx(slope, rel=1e-5, abs=1e-6 * n)


def test_two_runs_have_the_same_bits(device, poisoned, rng):
    descriptor = HyperConnectionBackwardDescriptor(3, 41, 5, 7, EPS, BF16)
    arrays = problem(rng, descriptor)
    first, second = (run(device, poisoned, descriptor, arrays) for _ in range(2))
    for name in GRADIENT_OF:
        assert first[name].tobytes() == second[name].tobytes()


DESCRIPTOR = HyperConnectionBackwardDescriptor(2, 5, 3, 4, EPS, F32)


@pytest.fixture
def tensors(device, poisoned, rng):
    return tensors_of(device, poisoned, DESCRIPTOR, problem(rng, DESCRIPTOR))


@pytest.mark.parametrize("name", [operand.name for operand in DESCRIPTOR.operands()])
def test_every_operand_is_checked(device, poisoned, tensors, name):
    plan, good = plan_of(device, DESCRIPTOR), tensors[name]
    plan.can_implement(HyperConnectionBackwardArgs(**tensors))
    kind, shape, nbytes = good.element, good.shape, good.count * good.element.itemsize
    strides = tuple(2 * s for s in good.stride)
    for tensor, error, message in (
        (None, InvalidProblem, "is missing"),
        (poisoned(nbytes).tensor(kind, (1, *shape)), InvalidProblem, r"has shape \(.*\), wanted \(.*\)"),
        (poisoned(nbytes).tensor(F16, shape), InvalidProblem, f"holds f16, wanted {kind.value}; cast it first"),
        (poisoned(nbytes - 1).tensor(kind, shape), BufferTooSmall, f"the buffer holds {good.count - 1} elements"),
        (
            type(good)(good.data, shape, strides, kind, good.available, device.ordinal, good.owner),
            InvalidProblem,
            "wanted it contiguous, copy it first",
        ),
    ):
        with pytest.raises(error, match=message) as refused:
            plan.can_implement(HyperConnectionBackwardArgs(**tensors | {name: tensor}))
        assert name in str(refused.value)


def test_gradients_are_written_to_memory_of_their_own(device, tensors):
    with pytest.raises(InvalidProblem, match=r"operand d_x is written to addresses .* but d_out lies at"):
        plan_of(device, DESCRIPTOR).can_implement(
            HyperConnectionBackwardArgs(**tensors | {"d_out": tensors["d_x"]}),
        )


def test_the_workspace_and_the_problem_are_checked_as_in_the_forward(device, tensors):
    plan = plan_of(device, DESCRIPTOR)
    with pytest.raises(WorkspaceTooSmall, match=f"workspace of 0 bytes, wanted {plan.workspace_size()}"):
        plan.run(device.stream(), None, HyperConnectionBackwardArgs(**tensors))
    with pytest.raises(InvalidProblem, match="hyper-connection: hidden_dim 3 < n_streams 4"):
        HyperConnectionBackwardDescriptor(1, 3, 4, 20, EPS, F32)
    with pytest.raises(NoSku, match="takes 1 to 64 streams, not 65"):
        plan_of(device, HyperConnectionBackwardDescriptor(1, 65, 65, 20, EPS, F32))
