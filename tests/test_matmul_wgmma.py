"""The Hopper products: TMA, mbarriers and wgmma by their twins in the simulator, the real ones on a GPU of sm_90."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import pytest
from matmul_cases import BF16, F16, F32, assert_exact, assert_kept, gaussian, make, run, small_integers

from kernels.target import SIMULATOR
from plans.core import BackendKind, Device, InvalidProblem, NoSku, PlanPreference
from plans.matmul import (
    Activation,
    Bias,
    ColumnScale,
    Gate,
    MatmulDescriptor,
    Residual,
    RowScale,
    Segment,
    SegmentedMatmulDescriptor,
    SegmentedMatmulPlan,
)
from plans.matmul.descriptor import LAYOUTS
from plans.matmul.wgmma import WGMMA, WgmmaProgram, candidate_tiles, stages_of

WGMMA_BACKEND = BackendKind.WGMMA
pytestmark = pytest.mark.skipif(Device.open().arch < (9, 0), reason="wgmma is an instruction of sm_90a")
SHAPES = [(1, 1, 1), (7, 3, 24), (128, 64, 64), (129, 72, 200), (300, 136, 72)]
LARGE = (
    [] if SIMULATOR else [(257, 512, 1024), (640, 1280, 2048), (1000, 3072, 768), (4096, 1288, 72), (333, 4096, 4096)]
)


def check(device, poisoned, rng, descriptor, scales=None):
    """Small integers have to come out exactly, normal numbers within the guarantee."""
    if all(isinstance(step, Bias | Residual) for step in descriptor.epilogue):
        problem = make(device, descriptor, small_integers(rng), scales)
        run(problem, poisoned, WGMMA_BACKEND, workspace=False)
        if all(abs(scale) in (1.0, 0.5, 0.0) for scale in scales or (1.0,)):
            assert_exact(problem)
    problem = make(device, descriptor, gaussian(rng), scales)
    plan = run(problem, poisoned, WGMMA_BACKEND, workspace=False)
    assert plan.chosen is WGMMA
    assert_kept(problem, plan)


def of_shape(m, n, k, layout="NT", **more):
    """A product whose operands' rows begin at multiples of 16 bytes."""
    a, b = (-(-extent // 8) * 8 for extent in (m if layout[0] == "T" else k, n if layout[1] == "N" else k))
    return MatmulDescriptor(m, n, k, layout, a_stride=a, b_stride=b, **more).segmented


@pytest.mark.parametrize("shape", SHAPES + LARGE, ids=str)
def test_products_of_awkward_extents(device, poisoned, rng, shape):
    check(device, poisoned, rng, of_shape(*shape))


@pytest.mark.parametrize("kind", [BF16, F16, F32], ids=lambda kind: kind.value)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_and_kinds_of_results(device, poisoned, rng, layout, kind):
    factors = F16 if kind is F16 else BF16
    check(device, poisoned, rng, of_shape(136, 200, 88, layout, out=kind, a=factors, b=factors))


@pytest.mark.parametrize("out", [BF16, F32], ids=lambda kind: kind.value)
def test_rows_of_the_result_that_tma_cannot_address(device, poisoned, rng, out):
    check(device, poisoned, rng, of_shape(131, 77, 40, out=out, out_stride=79))


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("layout", ["NT", "TN"])
def test_every_tile(device, poisoned, rng, layout, gated):
    """Several tiles a block, more stages of K than are kept, results of one tile stored while the next is summed."""
    steps = (Gate("silu"),) if gated else ()
    descriptor = of_shape(264, 144 if SIMULATOR else 1296, 136, layout, epilogue=steps)
    problem, stream = make(device, descriptor, gaussian(rng)), device.stream()
    tiles = candidate_tiles(descriptor)
    assert len(tiles) >= 4
    for tile in tiles[::3] if SIMULATOR else tiles:
        for stages in {2, stages_of(tile, 1 << 15)} if not SIMULATOR else {2}:
            chosen = dataclasses.replace(tile, stages=stages)
            sku = dataclasses.replace(WGMMA, build=functools.partial(WgmmaProgram, tile=chosen))
            plan = SegmentedMatmulPlan(descriptor, sku, device)
            problem.args.bound.clear()
            plan.run(stream, None, problem.args)
            device.synchronize(stream)
            assert_kept(problem, plan)


@pytest.mark.parametrize(("block", "depth"), [(64, 64), (64, 128), (32, 64), (64, 40)], ids=str)
def test_blocks_along_a_diagonal(device, poisoned, rng, block, depth):
    """Beside another segment, in tiles of one block or several: skipped where tiles can, multiplied by zeros else."""
    n, count = 2 * max(block, 64) + block, (2 * max(block, 64) + block) // block
    segments = (Segment(72), Segment(count * depth, diagonal=count, late=True), Segment(8))
    descriptor = SegmentedMatmulDescriptor(130, n, segments, F32, epilogue=(Bias(),))
    mask = np.kron(np.eye(count), np.ones((block, depth)))

    def draw(shape):
        values = small_integers(rng)(shape)
        return values * mask if shape == mask.shape else values

    tiles = [tile for tile in candidate_tiles(descriptor) if tile.columns in (64, 128) and n >= tile.columns]
    assert {tile.diagonal for tile in tiles} == {block if (block, depth % 64) == (64, 0) else 0}
    for tile in tiles[:: 3 if SIMULATOR else 1]:
        problem, stream = make(device, descriptor, draw, (0.5, 1.0, -1.0)), device.stream()
        sku = dataclasses.replace(
            WGMMA, build=functools.partial(WgmmaProgram, tile=dataclasses.replace(tile, stages=2))
        )
        SegmentedMatmulPlan(descriptor, sku, device).run(stream, None, problem.args)
        device.synchronize(stream)
        assert_exact(problem)


EPILOGUES = {
    "bias": (Bias(),),
    "bias f32, residual": (Bias(F32), Residual()),
    "residual": (Residual(),),
    "scales": (RowScale(F32), ColumnScale(F16)),
    "gelu": (Bias(), Activation("gelu")),
    "swiglu": (Gate("silu"),),
    "geglu, value first": (Bias(), Gate("gelu", gate_first=False), Bias(F32), Residual(F16)),
}


@pytest.mark.parametrize("aligned", [True, False], ids=["tma", "direct"])
@pytest.mark.parametrize("steps", EPILOGUES.values(), ids=EPILOGUES.keys())
def test_epilogues(device, poisoned, rng, steps, aligned):
    m, n, k = (130, 144, 32) if aligned else (11, 138, 24)
    check(device, poisoned, rng, of_shape(m, n, k, epilogue=steps))


@pytest.mark.parametrize(
    ("ks", "scales"),
    [
        ((72, 16), None),
        ((64, 16, 16, 8), (1.0, 0.5, -0.5, 1.0)),
        ((8, 0, 40), (1e20, 2.0, -1.7)),
        ((24, 16), (0.0, 1.0)),
        ((24, 16), (0.0, 0.0)),
    ],
    ids=str,
)
def test_sums_of_segments(device, poisoned, rng, ks, scales):
    segments = tuple(Segment(k) for k in ks)
    check(device, poisoned, rng, SegmentedMatmulDescriptor(135, 40, segments, epilogue=(Bias(),)), scales)


@pytest.mark.parametrize("shared", [False, True], ids=["own B", "one B"])
def test_batches(device, poisoned, rng, shared):
    segment = Segment(40, b_shared=shared, a_batch_stride=40 * 72)
    steps = (Bias(per_batch=True), Residual())
    check(device, poisoned, rng, SegmentedMatmulDescriptor(70, 48, (segment, segment), batch=3, epilogue=steps))


@pytest.mark.parametrize(("m", "n", "k"), [(0, 8, 8), (8, 0, 8), (8, 16, 0)], ids=str)
def test_empty_products(device, poisoned, rng, m, n, k):
    check(device, poisoned, rng, MatmulDescriptor(m, n, k, epilogue=(Bias(F32),)).segmented)


REFUSED = {
    "wants all factors bf16 or all fp16, found bf16, f32": Segment(16, b=F32),
    "rows of a0 a multiple of 16 bytes apart": Segment(16, a_stride=20),
    "one layout for all segments, found NN, NT": Segment(16, "NN"),
}


def test_contradictory_blocks_are_refused():
    with pytest.raises(InvalidProblem, match="k 17 in 2 blocks, wanted equal ones"):
        Segment(17, diagonal=2)
    with pytest.raises(InvalidProblem, match="n 9, wanted a multiple of every segment's diagonal blocks"):
        SegmentedMatmulDescriptor(8, 9, (Segment(16, diagonal=2),))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gates_whose_second_half_tma_cannot_begin_at_are_left_to_other_skus(device, poisoned, rng, layout):
    """Where B is stored [k, n] its half at n / 2 is a coordinate along its rows."""
    descriptor, whole = (of_shape(40, n, 24, layout, epilogue=(Gate("silu"),)) for n in (2 * 68, 2 * 72))
    reason = "a gate's halves of B's rows a multiple of 16 bytes apart, found 68 values"
    assert not WGMMA.refuses(whole)
    assert (reason in WGMMA.refuses(descriptor)) == (layout[1] == "N")
    problem = make(device, descriptor, gaussian(rng))
    assert_kept(problem, run(problem, poisoned, WGMMA_BACKEND if layout[1] == "T" else None, workspace=False))


@pytest.mark.parametrize(("reason", "segment"), REFUSED.items(), ids=REFUSED.keys())
def test_refusals(device, reason, segment):
    descriptor = SegmentedMatmulDescriptor(16, 16, (segment, Segment(16)))
    with pytest.raises(NoSku, match=reason):
        SegmentedMatmulPlan.select(None, descriptor, PlanPreference(prefer_backend=WGMMA_BACKEND), device)


def test_small_products_are_left_to_other_skus(device):
    chosen = SegmentedMatmulPlan.choose(of_shape(16, 256, 256), PlanPreference(), device)
    assert chosen.backend is not WGMMA_BACKEND


def test_equal_runs_are_equal_bit_for_bit(device, poisoned, rng):
    problem = make(device, of_shape(150, 96, 264, out=F32), gaussian(rng))
    run(problem, poisoned, WGMMA_BACKEND, workspace=False)
    first = problem.found()
    run(problem, poisoned, WGMMA_BACKEND, workspace=False)
    np.testing.assert_array_equal(first, problem.found())
