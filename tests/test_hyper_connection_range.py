"""Hyper-connections over the whole range of sizes and logits that is promised, and all their plans from a graph.

The simulator takes the rows that it computes within seconds; a GPU takes all.
"""

from __future__ import annotations

import numpy as np
import pytest
from hyper_cases import arguments_of, assert_kept, problem, run, tensors_of, written

from kernels.target import SIMULATOR
from plans.core import BackendKind, ElementKind, PlanPreference, Workspace
from plans.hyper_connection import (
    DynamicHyperConnectionBackwardDescriptor,
    DynamicHyperConnectionBackwardPlan,
    DynamicHyperConnectionDescriptor,
    DynamicHyperConnectionPlan,
    HyperConnectionBackwardDescriptor,
    HyperConnectionBackwardPlan,
    HyperConnectionDescriptor,
    HyperConnectionPlan,
    HyperConnectionPostBackwardDescriptor,
    HyperConnectionPostBackwardPlan,
    HyperConnectionPostDescriptor,
    HyperConnectionPostPlan,
    HyperConnectionPreBackwardDescriptor,
    HyperConnectionPreBackwardPlan,
    HyperConnectionPreDescriptor,
    HyperConnectionPrePlan,
)
from plans.hyper_connection.common import weight_parts
from plans.sinkhorn import (
    SinkhornBackwardDescriptor,
    SinkhornBackwardPlan,
    SinkhornDescriptor,
    SinkhornMode,
    SinkhornPlan,
)

F32, BF16 = ElementKind.F32, ElementKind.BF16
KINDS = pytest.mark.parametrize("element", [F32, BF16], ids=lambda kind: kind.value)
MODES = pytest.mark.parametrize("mode", SinkhornMode, ids=lambda mode: mode.value)
EPS, ITERATIONS = 1e-5, 20
SIMULATED, OF_A_SAMPLE = 60_000, 1000
"""How many products the simulator gets for a row, and how many a sample counts for beside its own."""


def within_reach(rows, products):
    """All rows on a GPU; in the simulator those of few products."""
    return [row for row in rows if not SIMULATOR or products(*row[:3]) <= SIMULATED]


# batch, hidden_dim, n_streams, size of the logits
STATIC = within_reach(
    [
        (4096, 1, 1, 1.0), (1, 8192, 1, 20.0), (3, 8191, 2, 0.01), (4096, 13, 2, 20.0), (257, 1021, 3, 1.0),
        (64, 8192, 4, 5.0), (1031, 127, 4, 20.0), (4096, 64, 4, 0.01), (2, 7, 5, 20.0), (17, 4093, 8, 1.0),
        (509, 16, 8, 20.0), (3, 16, 16, 20.0), (37, 509, 16, 1.0), (1, 17, 17, 0.01), (19, 1009, 17, 20.0),
        (11, 251, 31, 1.0), (7, 2048, 32, 0.01), (3, 8191, 32, 20.0), (5, 1021, 64, 1.0), (67, 64, 64, 20.0),
    ],
    lambda batch, channels, n: batch * (channels * n * n + OF_A_SAMPLE),
)  # fmt: skip
DYNAMIC = within_reach(
    [
        (4096, 1, 1, 1.0), (3, 8191, 1, 20.0), (4096, 16, 2, 0.01), (131, 1021, 2, 20.0), (257, 509, 3, 1.0),
        (67, 8192, 4, 1.0), (1031, 120, 4, 20.0), (2, 8, 5, 20.0), (33, 1009, 8, 20.0), (9, 257, 16, 1.0),
        (9, 127, 17, 20.0), (5, 61, 31, 1.0), (5, 32, 32, 20.0), (2, 64, 64, 1.0),
    ],
    lambda batch, channels, n: batch * (channels * n * n * (n + 2) + OF_A_SAMPLE),
)  # fmt: skip


def iterations_for(n):
    """Steps of large matrices take long in the simulator."""
    return 2 if SIMULATOR and n > 8 else ITERATIONS


@KINDS
@pytest.mark.parametrize("row", STATIC, ids=str)
def test_static(device, poisoned, rng, row, element):
    *shape, scale = row
    settings = (*shape, iterations_for(shape[2]), EPS, element)
    for descriptor, plan_class in (
        (HyperConnectionDescriptor(*settings), HyperConnectionPlan),
        (HyperConnectionBackwardDescriptor(*settings), HyperConnectionBackwardPlan),
    ):
        arrays = problem(rng, descriptor, scale)
        plan, found = run(device, poisoned, plan_class, descriptor, arrays)
        assert_kept(plan, found, descriptor.reference(**arrays))


@MODES
@pytest.mark.parametrize("row", DYNAMIC, ids=str)
def test_dynamic(device, poisoned, rng, row, mode):
    *shape, scale = row
    element = BF16 if shape[1] % 8 == 0 else F32
    settings = (*shape, iterations_for(shape[2]), EPS, element, BF16, element, mode)
    forward, backward = DynamicHyperConnectionDescriptor(*settings), DynamicHyperConnectionBackwardDescriptor(*settings)
    arrays = problem(rng, forward, scale)
    plan, found = run(device, poisoned, DynamicHyperConnectionPlan, forward, arrays)
    kept = {name: found[name] for name in ("projected", "mixing")}
    assert_kept(plan, found, forward.reference(**arrays, **kept))
    if scale <= 1:  # larger logits make columns whose sum eps leaves below 1
        np.testing.assert_allclose(weight_parts(found["mixing"], shape[2])[2].sum(-2), 1, rtol=1e-4)
    arrays |= kept | {"d_out": problem(rng, backward)["d_out"]}
    plan, gradients = run(device, poisoned, DynamicHyperConnectionBackwardPlan, backward, arrays)
    assert_kept(plan, gradients, backward.reference(**arrays))


SMALL = (3, 16, 4, 5, EPS, BF16)
PLANS = {
    "sinkhorn": (SinkhornPlan, SinkhornDescriptor(5, 4, 6, EPS, SinkhornMode.EXP)),
    "sinkhorn backward": (SinkhornBackwardPlan, SinkhornBackwardDescriptor(5, 4, 6, EPS, SinkhornMode.SOFTMAX)),
    "static": (HyperConnectionPlan, HyperConnectionDescriptor(*SMALL)),
    "static backward": (HyperConnectionBackwardPlan, HyperConnectionBackwardDescriptor(*SMALL)),
    "dynamic": (DynamicHyperConnectionPlan, DynamicHyperConnectionDescriptor(*SMALL)),
    "dynamic backward": (DynamicHyperConnectionBackwardPlan, DynamicHyperConnectionBackwardDescriptor(*SMALL)),
    "pre": (HyperConnectionPrePlan, HyperConnectionPreDescriptor(*SMALL, BF16)),
    "pre dynamic": (HyperConnectionPrePlan, HyperConnectionPreDescriptor(*SMALL, None, BF16)),
    "pre backward": (HyperConnectionPreBackwardPlan, HyperConnectionPreBackwardDescriptor(*SMALL, BF16)),
    "pre dynamic backward": (
        HyperConnectionPreBackwardPlan,
        HyperConnectionPreBackwardDescriptor(*SMALL, None, BF16, SinkhornMode.SOFTMAX),
    ),
    "post": (HyperConnectionPostPlan, HyperConnectionPostDescriptor(3, 16, 4, BF16, True)),
    "post backward": (HyperConnectionPostBackwardPlan, HyperConnectionPostBackwardDescriptor(3, 16, 4, BF16, True)),
}


@pytest.mark.parametrize("backend", [None, BackendKind.PORTABLE], ids=["chosen", "portable"])
@pytest.mark.parametrize("which", PLANS)
def test_a_graph_repeats_the_bits_of_a_run(device, poisoned, rng, which, backend):
    """Captured over the caller's memory alone, and replayed over what holds NaN again."""
    plan_class, descriptor = PLANS[which]
    plan = plan_class.select(None, descriptor, PlanPreference(prefer_backend=backend), device=device)
    arrays = problem(rng, descriptor)
    for operand in descriptor.operands():
        if operand.name in ("mixing", "projected") and not operand.writes:
            arrays[operand.name] = np.abs(arrays[operand.name]) + np.float32(0.5)
    tensors, stream = tensors_of(device, poisoned, descriptor, arrays), device.stream()
    args, workspace = arguments_of(descriptor, tensors), Workspace(poisoned(plan.workspace_size()))
    plan.run(stream, workspace, args)
    device.synchronize(stream)
    first = {name: array.tobytes() for name, array in written(device, descriptor, tensors, stream).items()}
    captured = device.capture(lambda recorded: plan.run(recorded, workspace, args), stream)
    for _ in range(2):
        for operand in descriptor.operands():
            if operand.writes:
                device.fill(tensors[operand.name].owner, 0xFF, stream)
        captured.launch(stream)
        device.synchronize(stream)
        again = {name: array.tobytes() for name, array in written(device, descriptor, tensors, stream).items()}
        assert again == first
