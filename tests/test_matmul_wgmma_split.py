"""Products by wgmma whose sum is split into parts of its depth: which are, and all of them against float64."""

from __future__ import annotations

import dataclasses
import functools

import pytest
from matmul_cases import BF16, F16, F32, assert_exact, assert_kept, gaussian, make, small_integers

from kernels.matmul.wgmma_tile import WgmmaTile
from kernels.target import SIMULATOR
from plans.core import Device, Workspace
from plans.matmul import Bias, Gate, MatmulDescriptor, Residual, Segment, SegmentedMatmulDescriptor, SegmentedMatmulPlan
from plans.matmul.second_stage import parts_bytes
from plans.matmul.wgmma import WGMMA
from plans.matmul.wgmma_split import MOST_PARTS, WGMMA_SPLIT, SplitProgram, split_of

pytestmark = pytest.mark.skipif(Device.open().arch < (9, 0), reason="wgmma is an instruction of sm_90a")
TILE = WgmmaTile(64, 2, 2)


def split(parts, tile=TILE):
    """The SKU with so many parts, whatever would be best."""
    return dataclasses.replace(
        WGMMA_SPLIT,
        build=functools.partial(SplitProgram, parts=parts, tile=tile),
        workspace=functools.partial(parts_bytes, parts=parts),
    )


def solve(device, poisoned, descriptor, draw, parts, scales=None, tile=TILE):
    """A run over poisoned memory, checked against the guarantee."""
    problem, stream = make(device, descriptor, draw, scales), device.stream()
    plan = SegmentedMatmulPlan(descriptor, split(parts, tile), device)
    workspace = Workspace(poisoned(plan.workspace_size()))
    plan.run(stream, workspace, problem.args)
    device.synchronize(stream)
    assert_kept(problem, plan)
    return problem


@pytest.mark.parametrize(("rows", "parts"), [(130, 2), (20, 5)])
def test_parts_of_one_product(device, poisoned, rng, rows, parts):
    """Depths that parts do not divide, and more parts than stages: the last are sums of nothing."""
    descriptor = MatmulDescriptor(rows, 72, 200, out=F32).segmented
    assert_exact(solve(device, poisoned, descriptor, small_integers(rng), parts))
    solve(device, poisoned, descriptor, gaussian(rng), parts)


@pytest.mark.parametrize(
    ("ks", "scales"),
    [
        ((136, 64, 16), None),
        ((64, 128, 72), (1.0, -0.5, 2.0)),
        ((72, 8, 200), (1e20, 0.0, 1.7)),
        ((64, 64), (0.0, 0.0)),
    ],
    ids=str,
)
def test_sums_of_segments_change_parts_between_and_inside_of_them(device, poisoned, rng, ks, scales):
    descriptor = SegmentedMatmulDescriptor(20, 40, tuple(Segment(k) for k in ks), epilogue=(Bias(),))
    solve(device, poisoned, descriptor, gaussian(rng), 3, scales)


@pytest.mark.parametrize("out", [BF16, F16, F32], ids=lambda kind: kind.value)
def test_epilogues_and_batches(device, poisoned, rng, out):
    segment = Segment(136, b_shared=True)
    steps = (Bias(per_batch=True), Residual())
    solve(device, poisoned, SegmentedMatmulDescriptor(10, 24, (segment,), out, 2, steps), gaussian(rng), 2)
    gated = MatmulDescriptor(10, 48, 136, out=out, epilogue=(Bias(F32), Gate("silu"))).segmented
    solve(device, poisoned, gated, gaussian(rng), 2)


@pytest.mark.parametrize("layout", ["NN", "TN", "TT"])
def test_layouts(device, poisoned, rng, layout):
    """A result whose rows TMA cannot address, and B read along its rows by two blocks of a cluster."""
    tile = WgmmaTile(128, 2, 2, layout[0] == "N", layout[1] == "T")
    descriptor = MatmulDescriptor(
        131, 75, 130, layout, a_stride=136, b_stride=80 if layout[1] == "N" else 136
    ).segmented  # fmt: skip
    solve(device, poisoned, descriptor, gaussian(rng), 2, tile=tile)


def test_few_tiles_of_great_depth_are_split():
    shapes = {(128, 4096, 14336): True, (256, 1280, 5120): True, (4096, 4096, 4096): False, (4096, 640, 640): False}
    for shape, wanted in shapes.items():
        descriptor = MatmulDescriptor(*shape).segmented
        assert (split_of(descriptor)[0] > 1) == wanted == (WGMMA_SPLIT.refuses(descriptor) == ""), shape
        assert split_of(descriptor)[0] <= MOST_PARTS


def test_refusals():
    assert "fill the chip" in WGMMA_SPLIT.refuses(MatmulDescriptor(8192, 8192, 8192).segmented)
    assert WGMMA_SPLIT.refuses(MatmulDescriptor(64, 64, 8192, a=F32).segmented) == WGMMA.refuses(
        MatmulDescriptor(64, 64, 8192, a=F32).segmented
    )


@pytest.mark.skipif(SIMULATOR, reason="384 threads for each of many tiles take minutes in the simulator")
@pytest.mark.parametrize("shape", [(128, 4096, 14336), (250, 1288, 5128)], ids=str)
def test_large(device, poisoned, rng, shape):
    descriptor = MatmulDescriptor(*shape, epilogue=(Bias(),)).segmented
    parts, tile = split_of(descriptor)
    solve(device, poisoned, descriptor, gaussian(rng), max(2, parts), tile=tile)


def test_a_split_sum_has_no_multiprocessors_to_spare(device):
    """As every program but that of whole sums by wgmma; live LoKrs ask whichever they get (test_adapted_random)."""
    descriptor = MatmulDescriptor(130, 72, 200, out=F32).segmented
    assert SegmentedMatmulPlan(descriptor, split(2), device).program.spare() == (0, 0.0)
