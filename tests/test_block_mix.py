"""Blocks mixed by a small matrix, against float64 over poisoned memory."""

from __future__ import annotations

import numpy as np
import pytest
from matmul_cases import gather, scatter

from kernels.target import SIMULATOR
from plans.block_mix import BYTES_A_CYCLE, BlockMixArgs, BlockMixDescriptor, BlockMixPlan, shares
from plans.block_mix_streamed import BYTES_A_CYCLE as STREAMED_BYTES_A_CYCLE
from plans.core import BackendKind, ElementKind, InvalidProblem, NoSku, PlanPreference

BF16, F16, F32 = ElementKind.BF16, ElementKind.F16, ElementKind.F32
SHAPES = [(1, 1, 1, 8), (3, 8, 8, 72), (5, 17, 3, 64), (2, 33, 48, 40), (7, 16, 20, 136), (2, 5, 128, 16)]
LARGE = [] if SIMULATOR else [(4096, 8, 8, 384), (4099, 48, 48, 64), (1000, 112, 64, 64), (33, 8, 8, 1792)]


def run(device, rng, descriptor, backend, scale=-0.75):
    out, *operands = descriptor.operands()
    values = [rng.standard_normal(o.shape).astype(o.element.values) for o in operands]
    result = scatter(device, out, np.full(out.shape, np.nan))
    args = BlockMixArgs(result, *(scatter(device, o, v) for o, v in zip(operands, values, strict=True)), scale)
    plan = BlockMixPlan.select(None, descriptor, PlanPreference(prefer_backend=backend), device)
    stream = device.stream()
    plan.run(stream, None, args)
    device.synchronize(stream)
    exact, magnitude = descriptor.reference(*values, scale)
    kept = plan.precision_guarantee.accepts(gather(device, result, out), exact, magnitude, descriptor.out)
    assert kept.all(), f"{(~kept).sum()} of {kept.size} beyond the guarantee"


@pytest.mark.parametrize("transposed", [False, True], ids=["w", "w transposed"])
@pytest.mark.parametrize("backend", [BackendKind.PORTABLE, BackendKind.MMA], ids=lambda backend: backend.value)
@pytest.mark.parametrize("shape", SHAPES + LARGE, ids=str)
def test_awkward_extents(device, rng, shape, backend, transposed):
    run(device, rng, BlockMixDescriptor(*shape, transposed=transposed), backend)


STREAMED = [(1, 8, 8, 8), (3, 16, 8, 72), (5, 72, 40, 64), (9, 8, 64, 136), (40, 24, 16, 64)]
LARGE_STREAMED = [] if SIMULATOR else [(4099, 48, 48, 64), (1000, 112, 64, 64), (4096, 96, 48, 64)]


@pytest.mark.parametrize("transposed", [False, True], ids=["w", "w transposed"])
@pytest.mark.parametrize("spare", [0, 4])
@pytest.mark.parametrize("shape", STREAMED + LARGE_STREAMED, ids=str)
def test_streams(device, rng, shape, spare, transposed):
    """By TMA, on all multiprocessors or on a few."""
    if device.arch < (9, 0):
        pytest.skip("TMA is sm_90's")
    options = {"x_stride": shape[2] * shape[3] + 8, "early": True, "spare": (spare, 1.0)}
    run(device, rng, BlockMixDescriptor(*shape, transposed=transposed, **options), BackendKind.STREAMED)


def test_spare_multiprocessors_take_all_of_it_where_they_can(device):
    """Else all take part, those with time to spare more of it; items of few blocks are not for warpgroups."""
    hopper = device.arch >= (9, 0) and not SIMULATOR
    for blocks, cycles, wanted in ((48, 51200.0, 48), (48, 30000.0, device.multiprocessors), (8, 51200.0, 0)):
        descriptor = BlockMixDescriptor(4096, 2 * blocks, blocks, 64, early=True, spare=(48, cycles))
        streamed = hopper and wanted > 0
        assert BlockMixPlan.choose(descriptor, PlanPreference(), device).name == ("streamed" if streamed else "mma")
        if streamed:
            program = BlockMixPlan.select(None, descriptor, device=device).program
            assert (program.blocks, program.quick[1]) == (wanted, wanted - 48)


@pytest.mark.parametrize("shape", [(40, 24, 16, 64), (20, 8, 8, 72), *LARGE_STREAMED], ids=str)
@pytest.mark.parametrize("part", [0.05, 0.4, 0.9])
def test_streams_in_shares(device, rng, shape, part):
    """Those with time to spare take more, the others the rest, down to nothing."""
    if device.arch < (9, 0):
        pytest.skip("TMA is sm_90's")
    few = max(2, device.multiprocessors // 3 // 2 * 2)
    nbytes = 2 * shape[0] * (shape[1] + shape[2]) * shape[3]
    spare = (few, part * nbytes / few / STREAMED_BYTES_A_CYCLE)
    run(device, rng, BlockMixDescriptor(*shape, early=True, spare=spare), BackendKind.STREAMED)


def test_many_blocks_stream_by_a_transposed_matrix_only(device, rng):
    if device.arch < (9, 0):
        pytest.skip("TMA is sm_90's")
    run(device, rng, BlockMixDescriptor(3, 16, 112, 16, F16, F16, F16, transposed=True), BackendKind.STREAMED)
    with pytest.raises(NoSku, match="wants at most 64 blocks of x and 128 of out, found 112, 16"):
        preference = PlanPreference(prefer_backend=BackendKind.STREAMED)
        BlockMixPlan.select(None, BlockMixDescriptor(3, 16, 112, 16), preference, device)


@pytest.mark.parametrize("backend", [BackendKind.PORTABLE, BackendKind.MMA], ids=lambda backend: backend.value)
def test_kinds_and_strides(device, rng, backend):
    run(device, rng, BlockMixDescriptor(9, 4, 6, 24, F16, F16, F16, x_stride=152), backend)


def test_a_pass_that_lets_the_next_launch_begin(device, rng):
    run(device, rng, BlockMixDescriptor(9, 4, 6, 24, early=True), BackendKind.MMA)


@pytest.mark.parametrize("shape", [(9, 4, 6, 24), (300, 4, 6, 24), *LARGE], ids=str)
@pytest.mark.parametrize("part", [0.05, 0.4, 1.0])
def test_multiprocessors_with_time_to_spare(device, rng, shape, part):
    """They take what they can in that time, if it is more than the share that all would have."""
    everything, items = device.multiprocessors, shape[0]
    few = max(1, everything // 3)
    nbytes = 2 * shape[0] * (shape[1] + shape[2]) * shape[3]
    descriptor = BlockMixDescriptor(*shape, early=True, spare=(few, part * nbytes / few / BYTES_A_CYCLE))
    if few < everything:
        wanted = (0, 0) if part == 0.05 else (items - round(part * items), everything - few)
        assert shares(descriptor, items, device) == wanted
    run(device, rng, descriptor, BackendKind.MMA)


def test_mixed_kinds_are_for_the_portable_sku(device, rng):
    descriptor = BlockMixDescriptor(4, 3, 5, 7, BF16, F32, F32)
    run(device, rng, descriptor, None)
    with pytest.raises(NoSku, match="all bf16 or all fp16, found bf16, f32"):
        BlockMixPlan.select(None, descriptor, PlanPreference(prefer_backend=BackendKind.MMA), device)


@pytest.mark.parametrize("shape", [(0, 2, 2, 8), (2, 0, 2, 8), (2, 2, 2, 0), (2, 2, 0, 8)], ids=str)
def test_empty(device, rng, shape):
    run(device, rng, BlockMixDescriptor(*shape), None)


@pytest.mark.parametrize(
    ("reason", "make"),
    [
        ("none negative", lambda: BlockMixDescriptor(-1, 1, 1, 1)),
        ("spare .-4, 0.0.: wanted none negative", lambda: BlockMixDescriptor(1, 1, 1, 8, spare=(-4, 0.0))),
        ("row stride 8, wanted at least its 16 elements", lambda: BlockMixDescriptor(1, 1, 2, 8, x_stride=8)),
        ("w of i32", lambda: BlockMixDescriptor(1, 1, 2, 8, weight=ElementKind.I32)),
    ],
)
def test_bad_problems(reason, make):
    with pytest.raises(InvalidProblem, match=reason):
        make()
