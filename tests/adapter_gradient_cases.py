"""Plans of adapters' gradients to test: random operands, runs over poisoned memory, the guarantee's verdict."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from matmul_cases import gather, scatter

from plans.core import BackendKind, PlanPreference, Workspace


def check(
    device,
    poisoned,
    plan_type,
    descriptor,
    arguments: Callable,
    draw: Callable,
    backend: BackendKind | None = None,
    scale: float = -0.75,
):
    """Two runs, whose bits are equal and keep the guarantee; the plan.

    ``arguments(tensors, scale)`` makes the plan's arguments of all operands' tensors, in order; ``draw(shape)`` gives
    the operands' values; the descriptor's ``reference`` takes those that are read.
    """
    plan = plan_type.select(None, descriptor, PlanPreference(prefer_backend=backend), device)
    operands = descriptor.operands()
    values = [np.asarray(draw(o.shape)).astype(o.element.values) for o in operands]
    runs = []
    for _ in range(2):
        tensors = [
            scatter(device, o, np.full(o.shape, np.nan) if o.writes else value)
            for o, value in zip(operands, values, strict=True)
        ]
        stream, size = device.stream(), plan.workspace_size()
        workspace = Workspace(poisoned(size)) if size else None
        plan.run(stream, workspace, arguments(tensors, scale))
        device.synchronize(stream)
        runs.append([gather(device, t, o) for t, o in zip(tensors, operands, strict=True) if o.writes])
    expected = descriptor.reference([v for v, o in zip(values, operands, strict=True) if not o.writes], scale)
    written = [o for o in operands if o.writes]
    for first, second, operand, (exact, magnitude) in zip(*runs, written, expected, strict=True):
        np.testing.assert_array_equal(first, second)
        kept = plan.precision_guarantee.accepts(first, exact, magnitude, operand.element)
        assert kept.all(), f"{operand.name}: {(~kept).sum()} of {kept.size} elements beyond the guarantee"
    return plan
