"""How Hopper's narrow products are shared out: beside a product, on the whole chip, in one round and in several."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from matmul_cases import assert_exact, assert_kept, gaussian, make, run, small_integers

from kernels.target import SIMULATOR
from plans.matmul import MatmulDescriptor, Segment, SegmentedMatmulDescriptor, SegmentedMatmulPlan, blocks_beside
from plans.matmul.narrow_streamed import NARROW_STREAMED
from plans.matmul.streamed import stream_of
from plans.matmul.wgmma import WGMMA

H200 = SimpleNamespace(multiprocessors=132)


@pytest.mark.parametrize("columns", [8, 16, 64])
@pytest.mark.parametrize("beside", [0, 2, 12, 56])
@pytest.mark.parametrize("results", [1, 3, 40])
@pytest.mark.parametrize("rows", [1, 7, 64, 1000, 4096, 8448, 8449, 100_003])
def test_tiles_cover_all_rows_and_no_block_has_more_than_it_must(rows, results, beside, columns):
    stream = stream_of(rows, results, columns, 132, beside, by_lines=columns == 64)
    most = 128 if stream.tile.parts == 2 else 256
    assert stream.height % 8 == 0 and stream.height <= 64 * stream.tile.groups <= most
    assert stream.tile.stages >= 4 and stream.tile.shared_bytes <= 227 * 1024
    assert (stream.tiles - 1) * stream.height < rows <= stream.tiles * stream.height
    assert stream.blocks % stream.tile.cluster == 0
    workers = beside or (66 if stream.tile.parts == 2 else 132)
    least = -(-results * -(-rows // most) // workers)
    assert -(-stream.all_tiles // workers) <= least + (results > 1)
    assert stream.tile.parts == 1 or stream.blocks == 2 * stream.all_tiles


def second(idle: int, cycles: float) -> SimpleNamespace:
    """A product that leaves so many multiprocessors idle for so long."""
    return SimpleNamespace(spare=lambda: (idle, cycles))


@pytest.mark.parametrize(
    ("idle", "k", "wanted"), [(12, 3072, 12), (16, 4096, 16), (12, 1024, 12), (4, 1024, 0), (4, 4096, 0), (0, 64, 0)]
)
def test_products_that_leave_room_have_it_beside(idle, k, wanted):
    assert blocks_beside(second(idle, 16.0 * k), H200, 4096, 1, 16, k) == wanted


@pytest.mark.parametrize("layout", ["NT", "NN"])
@pytest.mark.parametrize("beside", [0, 2, 6])
@pytest.mark.parametrize("m", [1, 130, 300] if SIMULATOR else [1, 130, 4096, 40_001])
def test_blocks_that_walk_and_pairs_that_share_a_depth(device, poisoned, rng, m, beside, layout):
    descriptor = replace(MatmulDescriptor(m, 8, 136, layout).segmented, beside=beside, early=True)
    problem = make(device, descriptor, small_integers(rng), (0.5,))
    assert run(problem, poisoned, NARROW_STREAMED.backend).chosen is NARROW_STREAMED
    assert_exact(problem)


def test_a_batch_that_shares_its_left_factor(device, poisoned, rng):
    problem = make(device, MatmulDescriptor(20, 16, 72, batch=3, a_shared=True).segmented, gaussian(rng))
    assert_kept(problem, run(problem, poisoned, NARROW_STREAMED.backend))


@pytest.mark.parametrize("beside", [0, 3])
def test_a_scale_of_zero_leaves_out_what_the_operands_hold(device, poisoned, beside):
    descriptor = replace(MatmulDescriptor(20, 16, 72).segmented, beside=beside)
    problem = make(device, descriptor, lambda shape: np.full(shape, np.nan), (0.0,))
    run(problem, poisoned, NARROW_STREAMED.backend)
    assert (problem.found() == 0).all()


def test_a_product_that_takes_it_late(device, rng):
    """Narrow, and beside it the product that needs it in the end: launches right after each other."""
    m, n, k = (130, 72, 136) if SIMULATOR else (4096, 3072, 3072)
    large = SegmentedMatmulDescriptor(m, n, (Segment(k), Segment(16, late=True)))
    plan = SegmentedMatmulPlan(large, WGMMA, device)
    problem = make(device, large, gaussian(rng))
    (a, _), (t, _) = problem.args.segments
    beside = 2 if SIMULATOR else blocks_beside(plan.program, device, m, 1, 16, k)
    small = SegmentedMatmulDescriptor(m, 16, (Segment(k),), early=True, beside=beside)
    first, inner = SegmentedMatmulPlan(small, NARROW_STREAMED, device), make(device, small, gaussian(rng))
    inner.args.segments, inner.args.out = ((a, inner.args.segments[0][1]),), t
    inner.segments = [(problem.segments[0][0], inner.segments[0][1])]
    stream = device.stream()
    first.run(stream, None, inner.args)
    plan.run(stream, None, problem.args)
    device.synchronize(stream)
    assert_kept(inner, first)
    problem.segments[1] = (inner.found(), problem.segments[1][1])
    assert_kept(problem, plan)
