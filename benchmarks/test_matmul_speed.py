"""Products against cuBLAS, convolutions against cuDNN, through torch in the same run: device time, by graph replay.

``LYCORIS_BENCH_BACKEND`` (mma, skinny, wgmma, portable) forces a technique; its numbers are shown and held to no gate.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from cases import Limit
from measure import Result, record, side_by_side
from operand_buffers import Rotated
from right import assert_convolution, assert_product, assert_written
from timing import Replay
from torch_limit import TorchReplay

from plans.convolution import Conv2dArgs, Conv2dDescriptor, Conv2dPlan, Convolution
from plans.core import BackendKind, Device, PlanPreference, TensorMut
from plans.matmul import (
    LowRankTerm,
    MatmulDescriptor,
    MatmulPlan,
    Segment,
    SegmentedMatmulArgs,
    SegmentedMatmulDescriptor,
    SegmentedMatmulPlan,
)

FORCED = os.environ.get("LYCORIS_BENCH_BACKEND", "")
PREFERENCE = PlanPreference(prefer_backend=BackendKind(FORCED) if FORCED else None)
TOKENS, RANK = 4096, 16


@dataclass(frozen=True)
class Row:
    """A product of so many tokens, with so many adapters; ``gate`` is the largest ratio to the bare product, if any."""

    tokens: int
    out: int
    channels: int
    gate: float | None
    adapters: int = 0

    def __str__(self) -> str:
        return f"{self.tokens}x{self.out}x{self.channels}-{self.adapters}"

    @property
    def shape(self) -> str:
        """Tokens x out x in."""
        return f"{self.tokens} x {self.out}x{self.channels}"

    def descriptor(self) -> MatmulDescriptor | SegmentedMatmulDescriptor:
        """The bare product, or one with low-rank terms."""
        if not self.adapters:
            return MatmulDescriptor(self.tokens, self.out, self.channels)
        terms = (LowRankTerm(RANK),) * self.adapters
        return SegmentedMatmulDescriptor(self.tokens, self.out, (Segment(self.channels),), low_rank=terms)


ROWS = [
    *(Row(TOKENS, out, channels, 1.03) for out, channels in ((3072, 3072), (12288, 3072), (4096, 4096), (14336, 4096))),
    Row(8192, 8192, 8192, 1.03),
    *(Row(TOKENS, out, channels, 1.10) for out, channels in ((1280, 1280), (10240, 1280), (1280, 5120), (640, 640))),
    *(Row(TOKENS, out, channels, 1.05, 1) for out, channels in ((12288, 3072), (14336, 4096))),
    *(Row(TOKENS, out, channels, 1.10, 1) for out, channels in ((3072, 3072), (4096, 4096))),
    *(Row(TOKENS, out, channels, 1.08, 3) for out, channels in ((12288, 3072), (14336, 4096))),
    *(Row(t, out, channels, None) for t, out, channels in ((128, 4096, 14336), (256, 3072, 12288))),
    *(Row(t, out, 4096, 1.15, a) for t in (1, 4, 16) for out in (4096, 14336) for a in (0, 1)),
]


def gate_of(gate: float | None) -> float | None:
    """The gate, none where a technique is forced."""
    return None if FORCED else gate


def arguments_of(descriptor: MatmulDescriptor | SegmentedMatmulDescriptor) -> Any:
    """What makes arguments of tensors in the descriptor's order."""
    descriptor = getattr(descriptor, "segmented", descriptor)
    count = 1 + 2 * len(descriptor.segments)

    def make(tensors: list[TensorMut]) -> SegmentedMatmulArgs:
        out, pairs, low_rank = tensors[0], tensors[1:count], tensors[count:]
        return SegmentedMatmulArgs(
            out,
            list(zip(pairs[::2], pairs[1::2], strict=True)),
            low_rank=list(zip(low_rank[::2], low_rank[1::2], strict=True)),
        )

    return make


@pytest.mark.benchmark(group="products")
@pytest.mark.parametrize("row", ROWS, ids=str)
def test_product_speed(row: Row, device: Device, rng: np.random.Generator, benchmark: Any):
    torch = pytest.importorskip("torch", reason="the limit is measured through torch")
    descriptor = row.descriptor()
    family = MatmulPlan if isinstance(descriptor, MatmulDescriptor) else SegmentedMatmulPlan
    shapes = [(row.tokens, row.out), (row.tokens, row.channels), (row.out, row.channels)]
    limit = TorchReplay(lambda out, x, w: torch.matmul(x, w.t(), out=out), shapes)
    with Rotated(device, family, descriptor, arguments_of(descriptor), rng, preference=PREFERENCE) as runs:
        seconds, limit_seconds = side_by_side(benchmark, Replay(device, runs.calls), limit)
        assert_written(runs)
        assert_product(runs, rng)
        kernel = runs.plan.chosen.name
    work = "linear" if not row.adapters else f"linear, {row.adapters} LoCon r={RANK}"
    operations = 2 * row.tokens * row.out * row.channels
    result = Result(work, row.shape, "", kernel, seconds, Limit.CUBLAS, limit_seconds, gate_of(row.gate))
    record(benchmark, result, tflops=operations / seconds * 1e-12, limit_tflops=operations / limit_seconds * 1e-12)


CONVOLUTIONS = {
    "320 at 128x128": Convolution(2, (128, 128), 320, 320, (3, 3), padding=(1, 1)),
    "640 at 64x64": Convolution(2, (64, 64), 640, 640, (3, 3), padding=(1, 1)),
    "1280 at 32x32": Convolution(2, (32, 32), 1280, 1280, (3, 3), padding=(1, 1)),
    "320 to 640 at 128x128, stride 2": Convolution(2, (128, 128), 320, 640, (3, 3), (2, 2), (1, 1)),
}


@pytest.mark.benchmark(group="convolutions")
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolution_speed(name: str, device: Device, rng: np.random.Generator, benchmark: Any):
    torch = pytest.importorskip("torch", reason="the limit is measured through torch")
    geometry = CONVOLUTIONS[name]
    shapes = [(geometry.batch, geometry.in_channels, *geometry.extents)]
    shapes.append((geometry.out_channels, geometry.in_channels, *geometry.kernel))
    convolve = torch.nn.functional.conv2d
    limit = TorchReplay(
        lambda x, w: convolve(x, w, stride=geometry.stride, padding=geometry.padding), shapes, channels_last=True
    )
    descriptor = Conv2dDescriptor(geometry)
    with Rotated(device, Conv2dPlan, descriptor, lambda t: Conv2dArgs(*t), rng, preference=PREFERENCE) as runs:
        seconds, limit_seconds = side_by_side(benchmark, Replay(device, runs.calls), limit)
        assert_written(runs)
        assert_convolution(runs)
        kernel = runs.plan.chosen.name
    result = Result("conv 3x3", name, "", kernel, seconds, Limit.CUDNN, limit_seconds, gate_of(1.1))
    operations = 2 * geometry.out_pixels * geometry.out_channels * geometry.taps * geometry.group_in
    record(benchmark, result, tflops=operations / seconds * 1e-12, limit_tflops=operations / limit_seconds * 1e-12)
