"""Batches whose results are groups of columns of one matrix: one product on Hopper, and still those products."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import pytest
from matmul_cases import F32, assert_exact, assert_kept, gaussian, make, small_integers

from kernels.matmul.wgmma_tile import WgmmaTile
from kernels.target import SIMULATOR
from plans.core import Device
from plans.matmul import (
    Activation,
    Bias,
    ColumnScale,
    Gate,
    Residual,
    RowScale,
    Segment,
    SegmentedMatmulDescriptor,
    SegmentedMatmulPlan,
)
from plans.matmul.column_groups import groups_of
from plans.matmul.wgmma import WGMMA, WgmmaProgram, candidate_tiles, stages_of

needs_hopper = pytest.mark.skipif(Device.open().arch < (9, 0), reason="wgmma is an instruction of sm_90a")

CASES = [("NT", 130, 48, 0, 2), ("NT", 60, 80, 8, 1), ("NN", 60, 80, 8, 1), ("NN", 130, 48, 0, 2)]
CASES += [] if SIMULATOR else [(layout, m, 176, 0, 1 + m % 2) for layout in ("NT", "NN") for m in (1000, 2177)]


def of_groups(m, columns, groups, k, depth, layout="NT", *, together=1, apart=0, **more):
    """A base's product and blocks with one factor for all groups, whose columns lie side by side."""
    lead = k + apart if layout[1] == "T" else groups * columns + apart
    base = Segment(
        k, layout, a_shared=True, b_stride=lead, b_batch_stride=columns * lead if layout[1] == "T" else columns
    )
    blocks = Segment(
        depth, layout, a_stride=groups * depth, a_batch_stride=depth, b_shared=True, diagonal=together, late=True
    )
    return SegmentedMatmulDescriptor(
        m, columns, (base, blocks), batch=groups, out_stride=groups * columns, out_batch_stride=columns, **more
    )


def check(device, rng, descriptor, columns, cluster, draw=None):
    """As one product in such tiles: small integers come out exactly, normal numbers within the guarantee."""
    (found,) = (t for t in candidate_tiles(descriptor) if (t.columns, t.cluster) == (columns, cluster))
    tile: WgmmaTile = dataclasses.replace(found, stages=2 if SIMULATOR else stages_of(found, 1 << 15))
    program = WgmmaProgram(descriptor, device, tile)
    assert (program.groups, program.results) == (descriptor.batch, 1)
    sku = dataclasses.replace(WGMMA, build=functools.partial(WgmmaProgram, tile=tile))
    plan, stream = SegmentedMatmulPlan(descriptor, sku, device), device.stream()
    for values, exact in ((small_integers(rng), True), (gaussian(rng), False)):
        problem = make(device, descriptor, functools.partial(draw, values) if draw else values, (1.0, -0.5))
        plan.run(stream, None, problem.args)
        device.synchronize(stream)
        assert_kept(problem, plan)
        if exact and descriptor.out is F32:
            assert_exact(problem)


@needs_hopper
@pytest.mark.parametrize(("layout", "m", "depth", "apart", "cluster"), CASES, ids=str)
def test_groups_are_one_product(device, rng, layout, m, depth, apart, cluster):
    """Two tiles a group; a depth that is no multiple of a stage's, whose last loads reach into the next group's."""
    check(device, rng, of_groups(m, 128, 3, 72, depth, layout, apart=apart, out=F32), 64, cluster)


@needs_hopper
@pytest.mark.parametrize("cluster", [1, 2])
def test_blocks_along_each_groups_diagonal(device, rng, cluster):
    """Blocks of 64 columns in each group's own factor, skipped where they are zero."""
    descriptor = of_groups(70 if cluster == 1 else 136, 128, 2, 24, 256, together=2, out=F32)
    mask = np.kron(np.eye(2), np.ones((64, 128)))

    def draw(values, shape):
        return values(shape) * mask if shape == mask.shape else values(shape)

    check(device, rng, descriptor, 128, cluster, draw)


@needs_hopper
def test_steps_of_columns(device, rng):
    steps = (Bias(F32, per_batch=True), ColumnScale(per_batch=True), Activation("relu"))
    check(device, rng, of_groups(70, 64, 4, 40, 32, epilogue=steps), 64, 1)


@needs_hopper
def test_what_is_not_finite_stays_in_its_group(device, rng):
    """A group's depth ends within a stage, whose other terms are the next group's."""
    descriptor = of_groups(130, 64, 3, 64, 48, out=F32)
    wild = (3, 130, 48)

    def draw(shape):
        values = rng.standard_normal(shape)
        if shape == wild:
            values[1] = np.nan
        return values

    problem, stream = make(device, descriptor, draw), device.stream()
    tile = dataclasses.replace(candidate_tiles(descriptor)[-1], stages=2)
    assert tile.columns == 64
    sku = dataclasses.replace(WGMMA, build=functools.partial(WgmmaProgram, tile=tile))
    SegmentedMatmulPlan(descriptor, sku, device).run(stream, None, problem.args)
    device.synchronize(stream)
    assert (np.isnan(problem.found()).all(axis=(1, 2)) == [False, True, False]).all()
    assert not np.isnan(problem.found()[[0, 2]]).any()


def test_which_batches_are_one_matrix():
    plain = of_groups(8, 128, 3, 72, 48)
    assert [groups_of(plain, columns) for columns in (64, 128, 96, 256)] == [3, 3, 1, 1]
    assert groups_of(dataclasses.replace(plain, out_stride=0, out_batch_stride=0), 64) == 1
    assert groups_of(dataclasses.replace(plain, batch=1), 64) == 1
    assert groups_of(dataclasses.replace(plain, batch=None, out_batch_stride=0), 64) == 1
    base, blocks = plain.segments
    for other in (
        dataclasses.replace(base, b_batch_stride=0, a_shared=False),
        dataclasses.replace(base, b_shared=True, b_batch_stride=0),
        dataclasses.replace(blocks, k=40, a_batch_stride=40),
        dataclasses.replace(blocks, a_batch_stride=56),
        dataclasses.replace(blocks, a_shared=True, a_batch_stride=0),
        dataclasses.replace(blocks, layout="TT", a_stride=0, a_batch_stride=0),
    ):
        assert groups_of(dataclasses.replace(plain, segments=(base, other)), 64) == 1, other
    for steps, groups in (
        ((Activation("silu"), Bias(per_batch=True)), 3),
        ((Bias(),), 1),
        ((RowScale(per_batch=True),), 1),
        ((Residual(),), 1),
        ((Gate("silu"),), 1),
    ):
        assert groups_of(dataclasses.replace(plain, m=128, epilogue=steps), 64) == groups, steps
