"""Convolutions and their gradients: every SKU and geometry against float64, over poisoned memory."""

from __future__ import annotations

import numpy as np
import pytest
from matmul_cases import BF16, F16, F32, gather, gaussian, scatter, small_integers

from kernels.target import SIMULATOR
from plans.convolution import (
    Conv2dArgs,
    Conv2dDescriptor,
    Conv2dInputGradientDescriptor,
    Conv2dInputGradientPlan,
    Conv2dPlan,
    Conv2dWeightGradientDescriptor,
    Conv2dWeightGradientPlan,
    Convolution,
)
from plans.core import BackendKind, InvalidProblem, NoSku, PlanPreference, Workspace
from plans.matmul import Activation, Bias, ColumnScale, Gate, Residual, RowScale

PORTABLE, MMA = BackendKind.PORTABLE, BackendKind.MMA
FORWARD = (Conv2dPlan, Conv2dDescriptor)
INPUT = (Conv2dInputGradientPlan, Conv2dInputGradientDescriptor)
WEIGHT = (Conv2dWeightGradientPlan, Conv2dWeightGradientDescriptor)
EVERY_PROBLEM = pytest.mark.parametrize("problem", [FORWARD, INPUT, WEIGHT], ids=["forward", "input", "weight"])
EVERY_SKU = pytest.mark.parametrize("backend", [PORTABLE, MMA], ids=lambda backend: backend.value)

GEOMETRIES = {
    "3x3": Convolution(2, (4, 3), 8, 16, (3, 3), padding=(1, 1)),
    "1x1": Convolution(1, (3, 7), 8, 8, (1, 1)),
    "stride 2, one-sided reach": Convolution(1, (7, 6), 8, 4, (3, 3), (2, 2), (1, 1)),
    "dilation, uneven": Convolution(1, (7, 6), 8, 4, (3, 2), (1, 2), (2, 0), (2, 3)),
    "odd channels": Convolution(1, (4, 5), 3, 5, (3, 3), padding=(1, 1)),
    "two groups": Convolution(1, (3, 4), 16, 8, (3, 3), padding=(1, 1), groups=2),
    "depthwise": Convolution(1, (4, 5), 3, 6, (3, 3), padding=(1, 1), groups=3),
    "one axis": Convolution(2, (19,), 8, 12, (5,), (3,), (2,)),
    "three axes": Convolution(1, (3, 4, 3), 4, 6, (2, 3, 2), (1, 2, 1), (1, 1, 0), (1, 1, 2)),
    "filter larger than the image": Convolution(1, (2, 2), 8, 4, (5, 5), padding=(2, 2)),
    "many channels": Convolution(1, (2, 2), 40, 72, (2, 1), padding=(1, 0)),
}
if not SIMULATOR:
    GEOMETRIES |= {
        "320 at 32x32": Convolution(2, (32, 32), 320, 320, (3, 3), padding=(1, 1)),
        "320 to 640, stride 2": Convolution(1, (64, 64), 320, 640, (3, 3), (2, 2), (1, 1)),
        "first layer": Convolution(2, (64, 64), 4, 320, (3, 3), padding=(1, 1)),
    }


def solve(device, poisoned, problem, descriptor, draw, backend=None, beta=0.5):
    """The plan, what it found, and the reference."""
    family, _ = problem
    plan = family.select(None, descriptor, PlanPreference(prefer_backend=backend), device)
    out, *operands = plan.operands
    values = [np.asarray(draw(o.shape)).astype(o.element.values) for o in operands]
    tensors = [scatter(device, o, v) for o, v in zip(operands, values, strict=True)]
    result = scatter(device, out, np.full(out.shape, np.nan))
    given = [(t, beta) if o.name.startswith("residual") else t for o, t in zip(operands[2:], tensors[2:], strict=True)]
    size, stream = plan.workspace_size(), device.stream()
    workspace = Workspace(poisoned(size)) if size else None
    plan.run(stream, workspace, Conv2dArgs(result, *tensors[:2], given))
    device.synchronize(stream)
    rest = iter(values[2:])
    arrays = [None if operand is None else next(rest) for operand in descriptor.step_operands]
    numbers = [beta if isinstance(step, Residual) else 1.0 for step in descriptor.epilogue]
    return plan, gather(device, result, out), descriptor.reference(*values[:2], arrays, numbers)


def check(device, poisoned, rng, problem, descriptor, backend=None, both=False):
    """Where nothing but sums is computed, small integers come out exactly; else normal numbers within the guarantee."""
    sums = all(isinstance(step, Bias | Residual) for step in descriptor.epilogue)
    if sums:
        plan, found, (exact, _) = solve(device, poisoned, problem, descriptor, small_integers(rng), backend)
        np.testing.assert_array_equal(found, exact.astype(np.float32).astype(found.dtype))
    if both or not sums:
        plan, found, (exact, magnitude) = solve(device, poisoned, problem, descriptor, gaussian(rng), backend)
        kept = plan.precision_guarantee.accepts(found, exact, magnitude, descriptor.out)
        assert kept.all(), f"{(~kept).sum()} of {kept.size} elements, {np.abs(found.astype(float) - exact).max()} off"
    return plan


@EVERY_SKU
@EVERY_PROBLEM
def test_normal_numbers_keep_the_guarantee(device, poisoned, rng, problem, backend):
    geometry = Convolution(1, (3, 4), 9, 6, (3, 2), padding=(1, 1), groups=3)
    for kinds in ((BF16, BF16, F32), (F16, F16, BF16)):
        check(device, poisoned, rng, problem, problem[1](geometry, *kinds), backend, both=True)


@EVERY_SKU
@EVERY_PROBLEM
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES.keys())
def test_geometries(device, poisoned, rng, problem, geometry, backend):
    check(device, poisoned, rng, problem, problem[1](geometry), backend)


@EVERY_PROBLEM
def test_weights_as_checkpoints_store_them(device, poisoned, rng, problem):
    geometry = Convolution(1, (4, 3), 6, 8, (3, 2), padding=(1, 1), groups=2, weight_layout="OIHW")
    plan = check(device, poisoned, rng, problem, problem[1](geometry, F32, F16, F32))
    assert plan.chosen.name == "portable"
    with pytest.raises(NoSku, match="wants the weight as OHWI: convert it once with the layout plan"):
        problem[0].select(None, problem[1](geometry), PlanPreference(prefer_backend=MMA), device)


@EVERY_SKU
@pytest.mark.parametrize(
    ("groups", "out", "steps"),
    [
        (1, BF16, (Bias(), Activation("silu"))),
        (2, F32, (Bias(F32), Residual(F16), Activation("relu"))),
        (2, F16, (RowScale(F32), ColumnScale(), Residual(F16))),
    ],
)
def test_epilogues(device, poisoned, rng, groups, out, steps, backend):
    for channels in (16, 10):
        geometry = Convolution(2, (3, 5), channels, channels, (3, 3), padding=(1, 1), groups=groups)
        check(device, poisoned, rng, FORWARD, Conv2dDescriptor(geometry, out=out, epilogue=steps), backend)


@EVERY_SKU
def test_a_residual_adds_to_gradients(device, poisoned, rng, backend):
    geometry = Convolution(1, (4, 5), 16, 8, (3, 3), padding=(1, 1), groups=2)
    for problem in (INPUT, WEIGHT):
        check(device, poisoned, rng, problem, problem[1](geometry, out=F32, epilogue=(Residual(F32),)), backend)


def test_a_weight_gradient_over_many_pixels_is_split(device, poisoned, rng):
    extent = 12 if SIMULATOR else 96
    geometry = Convolution(1, (extent, extent), 8, 16, (1, 1))
    descriptor = Conv2dWeightGradientDescriptor(geometry, out=F32, epilogue=(Residual(F32),))
    plan = check(device, poisoned, rng, WEIGHT, descriptor, MMA)
    assert plan.workspace_size() > 0


@EVERY_SKU
@EVERY_PROBLEM
def test_empty_convolutions(device, poisoned, rng, problem, backend):
    for geometry in (
        Convolution(0, (4, 4), 8, 8, (3, 3)),
        Convolution(1, (2, 2), 8, 8, (3, 3)),
        Convolution(1, (4, 4), 0, 8, (3, 3)),
        Convolution(1, (4, 4), 8, 0, (3, 3)),
    ):
        check(device, poisoned, rng, problem, problem[1](geometry), backend)


def test_the_technique_follows_the_channels(device):
    for channels, groups, name in ((32, 1, "mma"), (32, 4, "mma"), (32, 32, "portable"), (4, 1, "mma")):
        descriptor = Conv2dDescriptor(Convolution(1, (8, 8), channels, 32, (3, 3), groups=groups))
        assert Conv2dPlan.choose(descriptor, PlanPreference(), device).name == name


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"extents": (4, 4, 4, 4)}, "4 axes, wanted one to three"),
        ({"kernel": (3,)}, r"kernel \(3,\), wanted 2 numbers of at least 1"),
        ({"stride": (0, 1)}, r"stride \(0, 1\), wanted 2 numbers of at least 1"),
        ({"padding": (-1, 1)}, r"padding \(-1, 1\), wanted 2 numbers of at least 0"),
        ({"groups": 3}, "8 and 8 channels, wanted multiples of the 3 groups"),
        ({"batch": -1}, "batch -1, .* wanted none negative and a group or more"),
        ({"weight_layout": "HWIO"}, "weight layout 'HWIO', wanted one of OHWI, OIHW"),
    ],
)
def test_geometries_that_contradict_themselves(fields, message):
    given = {"batch": 1, "extents": (4, 4), "in_channels": 8, "out_channels": 8, "kernel": (3, 3)} | fields
    with pytest.raises(InvalidProblem, match=message):
        Convolution(**given)


def test_epilogues_that_do_not_fit_are_refused(device):
    geometry = Convolution(1, (4, 4), 8, 8, (3, 3))
    with pytest.raises(InvalidProblem, match="a gate in the epilogue, wanted none"):
        Conv2dDescriptor(geometry, epilogue=(Gate("silu"),))
    with pytest.raises(InvalidProblem, match="a weight's gradient takes residuals only"):
        Conv2dWeightGradientDescriptor(geometry, epilogue=(Bias(),))
