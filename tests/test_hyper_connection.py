"""Hyper-connections: the forward plan against its float64 reference, which is held against the formula's parts."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from plans.core import (
    BufferTooSmall,
    ElementKind,
    InvalidProblem,
    NoSku,
    OpCategory,
    TensorRef,
    Workspace,
    WorkspaceTooSmall,
)
from plans.core.precision import round_to
from plans.hyper_connection.static import HyperConnectionArgs, HyperConnectionDescriptor, HyperConnectionPlan

F32, BF16, F16 = ElementKind.F32, ElementKind.BF16, ElementKind.F16
EPS = 1e-5
# batch, hidden_dim, n_streams
SHAPES = [
    (1, 1, 1),
    (5, 2, 2),
    (2, 3, 3),
    (3, 31, 1),
    (1, 33, 4),
    (2, 64, 4),
    (2, 127, 2),
    (4, 8, 8),
]
MANY_STREAMS = [(1, 37, 16), (2, 17, 17), (1, 31, 31), (2, 32, 32), (1, 67, 33), (1, 64, 64)]


def problem(rng, descriptor, scale=1.0):
    """Operands by name, as arrays of their kinds."""
    arrays = {}
    for operand in descriptor.operands():
        if operand.name != "out":
            factor = scale if operand.name.startswith("h_") else 1.0
            arrays[operand.name] = round_to(factor * rng.standard_normal(operand.shape), operand.element)
    return arrays


def plan_of(device, descriptor):
    return HyperConnectionPlan.select(None, descriptor, device=device)


def tensors_of(device, poisoned, descriptor, arrays):
    operands = {operand.name: operand for operand in descriptor.operands()}
    tensors = {name: device.upload(a).tensor(operands[name].element, a.shape) for name, a in arrays.items()}
    out = operands["out"]
    tensors["out"] = poisoned(out.nbytes).tensor(out.element, out.shape)
    return tensors


def run(device, poisoned, descriptor, arrays):
    plan, tensors = plan_of(device, descriptor), tensors_of(device, poisoned, descriptor, arrays)
    stream = device.stream()
    workspace = Workspace(poisoned(plan.workspace_size()))
    plan.run(stream, workspace, HyperConnectionArgs(**tensors))
    device.synchronize(stream)
    kind = descriptor.element
    return device.download(tensors["out"].owner, kind.storage, descriptor.shape, stream).view(kind.values)


def assert_kept(device, descriptor, arrays, found):
    exact, magnitude = descriptor.reference(**arrays)
    kept = plan_of(device, descriptor).precision_guarantee.accepts(found, exact, magnitude, descriptor.element)
    assert kept.all(), f"{np.abs(found - exact).max()} off, {(~kept).sum()} of {kept.size} elements"


@pytest.mark.parametrize(("element", "gamma"), list(itertools.product((F32, BF16), repeat=2)), ids=lambda k: k.value)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes_and_kinds(device, poisoned, rng, shape, element, gamma):
    descriptor = HyperConnectionDescriptor(*shape, 20, EPS, element, gamma)
    arrays = problem(rng, descriptor)
    assert_kept(device, descriptor, arrays, run(device, poisoned, descriptor, arrays))


@pytest.mark.parametrize("shape", [(1, 4099, 2), (1, 8192, 1), (3, 2048, 2), (4096, 8, 1), (509, 3, 2)], ids=str)
def test_large_sizes(device, poisoned, rng, shape):
    descriptor = HyperConnectionDescriptor(*shape, 3, EPS, BF16)
    arrays = problem(rng, descriptor)
    assert_kept(device, descriptor, arrays, run(device, poisoned, descriptor, arrays))


@pytest.mark.parametrize("shape", MANY_STREAMS, ids=str)
def test_many_streams(device, poisoned, rng, shape):
    descriptor = HyperConnectionDescriptor(*shape, 3, EPS, F32)
    arrays = problem(rng, descriptor)
    assert_kept(device, descriptor, arrays, run(device, poisoned, descriptor, arrays))


@pytest.mark.parametrize("scale", [0.01, 5.0, 20.0, 500.0])
def test_mixing_parameters_of_every_size(device, poisoned, rng, scale):
    descriptor = HyperConnectionDescriptor(2, 13, 4, 20, EPS, F32)
    arrays = problem(rng, descriptor, scale)
    assert_kept(device, descriptor, arrays, run(device, poisoned, descriptor, arrays))


@pytest.mark.parametrize("eps", [1e-12, 0.5])
@pytest.mark.parametrize("size", [1e-6, 1e3])
def test_streams_of_every_size(device, poisoned, rng, size, eps):
    descriptor = HyperConnectionDescriptor(2, 29, 3, 5, eps, F32)
    arrays = problem(rng, descriptor)
    arrays["x_expanded"] *= np.float32(size)
    assert_kept(device, descriptor, arrays, run(device, poisoned, descriptor, arrays))


def test_streams_that_cancel_in_the_aggregate(device, poisoned, rng):
    descriptor = HyperConnectionDescriptor(2, 19, 2, 5, EPS, F32)
    arrays = problem(rng, descriptor)
    arrays["h_pre"][:] = 0.7
    arrays["x_expanded"][:, 1] = -arrays["x_expanded"][:, 0] + np.float32(1e-4)
    assert_kept(device, descriptor, arrays, run(device, poisoned, descriptor, arrays))


def test_zero_streams_give_zero(device, poisoned, rng):
    descriptor = HyperConnectionDescriptor(3, 7, 4, 20, EPS, F32)
    arrays = problem(rng, descriptor)
    arrays["x_expanded"][:] = 0
    np.testing.assert_array_equal(run(device, poisoned, descriptor, arrays), 0)


def test_equal_streams_pass_through_and_the_norm_is_added(device, poisoned):
    """Rows of M sum to 1, so equal streams mix to themselves; sigmoids at 0 are 1/2 and 2 * 1/2."""
    descriptor = HyperConnectionDescriptor(1, 4, 2, 50, 1e-7, F32, F32)
    x = np.array([3, -1, 2, 5], np.float32)
    arrays = {
        "x_expanded": np.tile(x, (1, 2, 1)),
        "h_pre": np.zeros(2, np.float32),
        "h_post": np.array([0, 40], np.float32),
        "h_res": np.array([[0.3, -1], [2, 0.1]], np.float32),
        "rmsnorm_weight": np.array([1, 2, 0, -1], np.float32),
    }
    y = arrays["rmsnorm_weight"] * x / np.sqrt((x * x).mean())
    found = run(device, poisoned, descriptor, arrays)
    np.testing.assert_allclose(found, [[x + y, x + 2 * y]], rtol=1e-5)
    assert_kept(device, descriptor, arrays, found)


def test_two_runs_have_the_same_bits(device, poisoned, rng):
    descriptor = HyperConnectionDescriptor(2, 71, 5, 7, EPS, BF16)
    arrays = problem(rng, descriptor)
    first, second = (run(device, poisoned, descriptor, arrays).view(np.uint16) for _ in range(2))
    np.testing.assert_array_equal(first, second)


def test_the_sku_says_what_was_selected(device):
    plan = plan_of(device, HyperConnectionDescriptor(2, 9, 4, 20, EPS, F32))
    assert (plan.sku.category, plan.sku.element, plan.sku.aux_element) == (OpCategory.HYPER_CONNECTION, F32, BF16)
    assert plan.precision_guarantee.deterministic
    assert plan.precision_guarantee.bit_stable_on_same_hardware
    assert plan.workspace_size() == 4 * (4 * 4 + 4 + 4)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        *(({name: 0}, f".*{name} 0.* wanted all positive") for name in ("batch", "hidden_dim", "n_streams")),
        ({"batch": -3}, "batch -3, hidden_dim 8 and n_streams 4, wanted all positive"),
        ({"hidden_dim": 3}, "hidden_dim 3 < n_streams 4, wanted at least one channel a stream"),
        ({"sinkhorn_iters": 0}, "sinkhorn iterations 0, wanted 1 to 1000"),
        ({"sinkhorn_iters": 1001}, "sinkhorn iterations 1001, wanted 1 to 1000"),
        *(({"eps": eps}, "eps .*, wanted a finite number in") for eps in (0.0, 1.0, -1e-5, np.inf, -np.inf, np.nan)),
    ],
)
def test_descriptors_that_contradict_themselves(changed, message):
    settings = {"batch": 2, "hidden_dim": 8, "n_streams": 4, "sinkhorn_iters": 20, "eps": EPS, "element": F32}
    with pytest.raises(InvalidProblem, match=f"hyper-connection: {message}"):
        HyperConnectionDescriptor(**settings | changed)


@pytest.mark.parametrize(
    ("descriptor", "reason"),
    [
        (HyperConnectionDescriptor(1, 65, 65, 20, EPS, F32), "takes 1 to 64 streams, not 65"),
        (HyperConnectionDescriptor(1, 8, 4, 20, EPS, F16), "takes element f32 or bf16, not f16"),
        (HyperConnectionDescriptor(1, 8, 4, 20, EPS, F32, F16), "takes gamma f32 or bf16, not f16"),
        (HyperConnectionDescriptor(2**31, 8, 4, 20, EPS, F32), r"takes fewer than 2\*\*31 samples"),
    ],
)
def test_what_no_kernel_computes_is_refused(device, descriptor, reason):
    with pytest.raises(NoSku, match=reason):
        plan_of(device, descriptor)


DESCRIPTOR = HyperConnectionDescriptor(2, 5, 3, 4, EPS, F32)
NAMES = tuple(operand.name for operand in DESCRIPTOR.operands())


@pytest.fixture
def tensors(device, poisoned, rng):
    return tensors_of(device, poisoned, DESCRIPTOR, problem(rng, DESCRIPTOR))


@pytest.mark.parametrize("name", NAMES)
def test_every_operand_is_checked(device, poisoned, tensors, name):
    plan, good = plan_of(device, DESCRIPTOR), tensors[name]
    plan.can_implement(HyperConnectionArgs(**tensors))
    kind, shape = good.element, good.shape
    nbytes = good.count * kind.itemsize
    reshaped = poisoned(nbytes + 64).tensor(kind, (*shape[:-1], shape[-1] + 1))
    other_kind = poisoned(nbytes).tensor(F16, shape)
    short = poisoned(nbytes - kind.itemsize).tensor(kind, shape)
    strides = tuple(2 * s for s in good.stride)
    strided = type(good)(good.data, shape, strides, kind, good.available, device.ordinal, good.owner)
    for tensor, error, message in (
        (None, InvalidProblem, "is missing"),
        (reshaped, InvalidProblem, r"has shape \(.*\), wanted \(.*\)"),
        (other_kind, InvalidProblem, f"holds f16, wanted {kind.value}; cast it first"),
        (strided, InvalidProblem, "wanted it contiguous, copy it first"),
        (short, BufferTooSmall, f"the buffer holds {good.count - 1} elements, wanted {good.count}"),
    ):
        with pytest.raises(error, match=message) as refused:
            plan.can_implement(HyperConnectionArgs(**tensors | {name: tensor}))
        assert name in str(refused.value)


def test_the_result_is_written_to_memory_of_its_own(device, tensors):
    plan, out, x = plan_of(device, DESCRIPTOR), tensors["out"], tensors["x_expanded"]
    with pytest.raises(InvalidProblem, match=r"operand out is written to addresses .* but x_expanded lies at"):
        plan.can_implement(HyperConnectionArgs(**tensors | {"out": x}))
    read_only = TensorRef(out.data, out.shape, out.stride, out.element, out.available, out.device, out.owner)
    with pytest.raises(InvalidProblem, match="a read-only TensorRef was given; wanted a TensorMut"):
        plan.can_implement(HyperConnectionArgs(**tensors | {"out": read_only}))


@pytest.mark.parametrize("nbytes", [None, 59])
def test_the_workspace_is_the_callers(device, poisoned, tensors, nbytes):
    workspace = None if nbytes is None else Workspace(poisoned(nbytes))
    with pytest.raises(WorkspaceTooSmall, match=f"workspace of {nbytes or 0} bytes, wanted 60"):
        plan_of(device, DESCRIPTOR).run(device.stream(), workspace, HyperConnectionArgs(**tensors))
