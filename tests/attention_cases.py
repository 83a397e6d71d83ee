"""Attention to test: random operands of any strides, two runs over poisoned memory, the guarantee's verdict."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matmul_cases import gather, scatter

from plans.attention import (
    AttentionArgs,
    AttentionBackwardArgs,
    AttentionBackwardDescriptor,
    AttentionBackwardPlan,
    AttentionDescriptor,
    AttentionPlan,
)
from plans.core import BackendKind, ElementKind, Operand, Plan, PlanPreference, Workspace
from plans.core.plan import Arguments


def interleaved(batch: int, heads: int, tokens: int, width: int, parts: int = 3) -> tuple[int, int, int]:
    """Strides of one of several tensors that a product made side by side, [batch, token, part, head, width]."""
    return (tokens * parts * heads * width, width, parts * heads * width)


def draw(rng: np.random.Generator, operand: Operand) -> np.ndarray:
    """Values of an operand that is read; where a stride is 0 they repeat."""
    shape = tuple(1 if not stride else extent for extent, stride in zip(operand.shape, operand.strides, strict=True))
    if operand.element is ElementKind.I32:
        values = rng.integers(0, 3, shape)
    else:
        values = rng.standard_normal(shape)
        if operand.name == "mask":
            values = np.where(rng.random(shape) < 0.3, -np.inf, values)
    return np.broadcast_to(values.astype(operand.element.values), operand.shape)


def _run(device, poisoned, plan: Plan, arguments, operands: Sequence[Operand], values: list) -> list[np.ndarray]:
    tensors = [
        scatter(device, o, np.full(o.shape, np.nan) if o.writes else value)
        for o, value in zip(operands, values, strict=True)
    ]
    stream, size = device.stream(), plan.workspace_size()
    workspace = Workspace(poisoned(size)) if size else None
    plan.run(stream, workspace, arguments(tensors))
    device.synchronize(stream)
    return [gather(device, tensor, o) for tensor, o in zip(tensors, operands, strict=True) if o.writes]


def _twice(device, poisoned, plan: Plan, arguments, values: list, expected: list) -> list[np.ndarray]:
    """What is written, the same bits in two runs, within the guarantee of what is expected."""
    operands = plan.descriptor.operands()
    runs = [_run(device, poisoned, plan, arguments, operands, values) for _ in range(2)]
    written = [o for o in operands if o.writes]
    for first, second, operand, (exact, magnitude) in zip(*runs, written, expected, strict=True):
        np.testing.assert_array_equal(first, second)
        kept = plan.precision_guarantee.accepts(first, exact, magnitude, operand.element)
        assert kept.all(), f"{operand.name}: {(~kept).sum()} of {kept.size} elements beyond the guarantee"
    return runs[0]


def check_forward(device, poisoned, rng, descriptor: AttentionDescriptor, backend: BackendKind | None, scale=None):
    """The plan, what was read, and the result and log-sum-exps, which keep the guarantee."""
    plan = AttentionPlan.select(None, descriptor, PlanPreference(prefer_backend=backend), device)
    values = [None if o.writes else draw(rng, o) for o in descriptor.operands()]
    exact = descriptor.reference(values[2:], scale)

    def arguments(tensors: list) -> Arguments:
        return AttentionArgs(*tensors[:5], *(tensors[5:] or [None]), scale)

    found = _twice(device, poisoned, plan, arguments, values, [exact.out(), exact.log_sum_exp()])
    return plan, values[2:], found


def check_backward(device, poisoned, rng, descriptor: AttentionBackwardDescriptor, backend: BackendKind | None):
    """Gradients of what the same technique's forward gives keep the guarantee; the plan."""
    _, inputs, (out, lse) = check_forward(device, poisoned, rng, descriptor.forward, backend)
    plan = AttentionBackwardPlan.select(None, descriptor, PlanPreference(prefer_backend=backend), device)
    operands = descriptor.operands()
    count = len(descriptor.results())
    reads = [draw(rng, operands[count]), out, lse, *inputs]

    def arguments(tensors: list) -> Arguments:
        return AttentionBackwardArgs(tensors[:count], tensors[count:])

    _twice(device, poisoned, plan, arguments, [None] * count + reads, descriptor.reference(reads))
    return plan
