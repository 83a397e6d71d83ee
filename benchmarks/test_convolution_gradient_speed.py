"""Gradients of convolutions, of input and weight, against cuDNN through torch in the same run: device time, by replay.

``LYCORIS_BENCH_BACKEND`` (mma, wgmma, portable) forces a technique.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from cases import Limit
from measure import Result, record, side_by_side
from operand_buffers import Rotated
from right import assert_within, assert_written, values_of
from timing import Replay
from torch_limit import TorchReplay

from plans.convolution import (
    Conv2dArgs,
    Conv2dInputGradientDescriptor,
    Conv2dInputGradientPlan,
    Conv2dWeightGradientDescriptor,
    Conv2dWeightGradientPlan,
    Convolution,
)
from plans.core import BackendKind, Device, PlanPreference

FORCED = os.environ.get("LYCORIS_BENCH_BACKEND", "")
PREFERENCE = PlanPreference(prefer_backend=BackendKind(FORCED) if FORCED else None)
CROP = 8
"""Channels of the result that are computed again."""

GEOMETRIES = {
    "320 at 128x128": Convolution(2, (128, 128), 320, 320, (3, 3), padding=(1, 1)),
    "640 at 64x64": Convolution(2, (64, 64), 640, 640, (3, 3), padding=(1, 1)),
    "1280 at 32x32": Convolution(2, (32, 32), 1280, 1280, (3, 3), padding=(1, 1)),
}


@dataclass(frozen=True)
class Problem:
    """A gradient: its plan and descriptor, which of cuDNN's outputs it is, and which channels a sample of it has."""

    plan: type
    descriptor: type
    mask: tuple[bool, bool, bool]
    cropped: str


PROBLEMS = {
    "input": Problem(Conv2dInputGradientPlan, Conv2dInputGradientDescriptor, (True, False, False), "in_channels"),
    "weight": Problem(Conv2dWeightGradientPlan, Conv2dWeightGradientDescriptor, (False, True, False), "out_channels"),
}


def assert_sample(runs: Rotated, problem: Problem) -> None:
    """Some channels of the last result: of the input's gradient its last axis, of the weight's its first."""
    geometry, (out, *operands) = runs.descriptor.geometry, runs.operands
    args = runs.arguments[-1].tensors()
    found, first, second = (values_of(runs.device, tensor, o) for tensor, o in zip(args, (out, *operands), strict=True))
    small = replace(runs.descriptor, geometry=replace(geometry, **{problem.cropped: CROP}))
    if problem.cropped == "in_channels":
        found, second = found[..., :CROP], second[..., :CROP]
    else:
        found, first = found[:CROP], first[..., :CROP]
    assert_within(runs.plan.precision_guarantee, found, small.reference(first, second), out)


@pytest.mark.benchmark(group="gradients of convolutions")
@pytest.mark.parametrize("name", GEOMETRIES)
@pytest.mark.parametrize("kind", PROBLEMS)
def test_gradient_speed(kind: str, name: str, device: Device, rng: np.random.Generator, benchmark: Any):
    torch = pytest.importorskip("torch", reason="the limit is measured through torch")
    geometry, problem = GEOMETRIES[name], PROBLEMS[kind]
    shapes = [
        (geometry.batch, geometry.out_channels, *geometry.out_extents),
        (geometry.batch, geometry.in_channels, *geometry.extents),
        (geometry.out_channels, geometry.in_channels, *geometry.kernel),
    ]
    rest = (None, geometry.stride, geometry.padding, geometry.dilation, False, (0, 0), 1, problem.mask)
    backward = torch.ops.aten.convolution_backward
    limit = TorchReplay(lambda g, x, w: backward(g, x, w, *rest), shapes, channels_last=True)
    descriptor = problem.descriptor(geometry)
    with Rotated(device, problem.plan, descriptor, lambda t: Conv2dArgs(*t), rng, preference=PREFERENCE) as runs:
        seconds, limit_seconds = side_by_side(benchmark, Replay(device, runs.calls), limit)
        assert_written(runs)
        assert_sample(runs, problem)
        kernel = runs.plan.chosen.name
    result = Result(f"conv 3x3, gradient of the {kind}", name, "", kernel, seconds, Limit.CUDNN, limit_seconds, None)
    operations = 2 * geometry.out_pixels * geometry.out_channels * geometry.taps * geometry.group_in
    record(benchmark, result, tflops=operations / seconds * 1e-12, limit_tflops=operations / limit_seconds * 1e-12)
