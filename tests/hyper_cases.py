"""Running the plans of hyper-connections over arrays by name, and holding their results against their guarantees.

And the gradient of Sinkhorn as it was published, which is wrong.
"""

from __future__ import annotations

import numpy as np

from plans.core import ElementKind, Workspace
from plans.core.precision import round_to
from plans.hyper_connection.common import NamedArguments
from plans.hyper_connection.static import HyperConnectionArgs, HyperConnectionDescriptor
from plans.hyper_connection.static_backward import HyperConnectionBackwardArgs, HyperConnectionBackwardDescriptor
from plans.sinkhorn import SinkhornArgs, SinkhornBackwardArgs, SinkhornBackwardDescriptor, SinkhornDescriptor

SCALED = ("h_", "alpha", "bias")


def problem(rng, descriptor, scale=1.0):
    """What a descriptor's plan reads, by name: normal values, the mixing parameters ``scale`` times as large."""
    arrays = {}
    for operand in descriptor.operands():
        if not operand.writes:
            factor = scale if operand.name.startswith(SCALED) else 1.0
            if operand.name == "projection":
                factor = operand.shape[1] ** -0.5
            arrays[operand.name] = round_to(factor * rng.standard_normal(operand.shape), operand.element)
    return arrays


def tensors_of(device, poisoned, descriptor, arrays):
    """Tensors for every operand; those that are written hold NaN."""
    tensors = {}
    for operand in descriptor.operands():
        buffer = poisoned(operand.nbytes) if operand.writes else device.upload(arrays[operand.name])
        tensors[operand.name] = buffer.tensor(operand.element, operand.shape)
    return tensors


def arguments_of(descriptor, tensors):
    """The arguments object of the descriptor's plan."""
    made = {
        HyperConnectionDescriptor: HyperConnectionArgs,
        HyperConnectionBackwardDescriptor: HyperConnectionBackwardArgs,
        SinkhornDescriptor: SinkhornArgs,
        SinkhornBackwardDescriptor: SinkhornBackwardArgs,
    }.get(type(descriptor))
    return made(**tensors) if made else NamedArguments(descriptor, **tensors)


def written(device, descriptor, tensors, stream):
    """Everything that a plan writes, by name."""
    found = {}
    for operand in descriptor.operands():
        if operand.writes:
            kind = operand.element
            raw = device.download(tensors[operand.name].owner, kind.storage, operand.shape, stream)
            found[operand.name] = raw.view(kind.values)
    return found


def run(device, poisoned, plan_class, descriptor, arrays, preference=None):
    """The plan and everything that it wrote, by name."""
    plan = plan_class.select(None, descriptor, preference, device=device)
    tensors, stream = tensors_of(device, poisoned, descriptor, arrays), device.stream()
    workspace = Workspace(poisoned(plan.workspace_size()))
    plan.run(stream, workspace, arguments_of(descriptor, tensors))
    device.synchronize(stream)
    return plan, written(device, descriptor, tensors, stream)


def assert_kept(plan, found, expected):
    """Every result keeps the plan's guarantee; a reference of one result may be that alone."""
    if not isinstance(expected, dict):
        expected = {"out": expected}
    kinds = {operand.name: operand.element for operand in plan.operands if operand.writes}
    assert found.keys() == expected.keys() == kinds.keys()
    for name, (exact, magnitude) in expected.items():
        assert np.isfinite(exact).all() and found[name].shape == exact.shape, name
        kept = plan.precision_guarantee.accepts(found[name], exact, magnitude, kinds[name])
        worst = np.abs(found[name].astype(np.float64) - exact).max()
        assert kept.all(), f"{name}: {worst} off, {(~kept).sum()} of {kept.size} elements"


def refusals(device, poisoned, good):
    """Tensors that do not fit in the place of ``good``, with what is said of them."""
    from plans.core import BufferTooSmall, InvalidProblem

    kind, shape, nbytes = good.element, good.shape, good.count * good.element.itemsize
    other = ElementKind.F16
    strides = tuple(2 * s for s in good.stride)
    yield None, InvalidProblem, "is missing"
    yield poisoned(nbytes).tensor(kind, (1, *shape)), InvalidProblem, r"has shape \(.*\), wanted \(.*\)"
    yield poisoned(nbytes).tensor(other, shape), InvalidProblem, f"holds f16, wanted {kind.value}; cast it first"
    yield poisoned(nbytes - 1).tensor(kind, shape), BufferTooSmall, f"the buffer holds {good.count - 1} elements"
    if good.count > 1:
        strided = type(good)(good.data, shape, strides, kind, good.available, device.ordinal, good.owner)
        yield strided, InvalidProblem, "wanted it contiguous, copy it first"


def faulty_gradient(logits, d_out, iterations):
    """What mHC.cu computes for logits [..., n, n]: the matrix after the row step in both steps back, no division."""
    x = np.exp(logits.astype(np.float64))
    after_rows = []
    for _ in range(iterations):
        x = x / x.sum(-1, keepdims=True)
        after_rows.append(x)
        x = x / x.sum(-2, keepdims=True)
    d = d_out.astype(np.float64)
    for a in reversed(after_rows):
        d = d - (d * a).sum(-2, keepdims=True)
        d = d - (d * a).sum(-1, keepdims=True)
    return d * np.exp(logits.astype(np.float64))
