"""Products of a few rows: the skinny SKU, low-rank terms in a launch before, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
from matmul_cases import BF16, F16, F32, assert_exact, assert_kept, gaussian, make, run, small_integers

from kernels.target import SIMULATOR
from plans.core import BackendKind, InvalidProblem, NoSku, PlanPreference
from plans.core.workspace import NO_WORKSPACE
from plans.matmul import (
    Activation,
    Bias,
    Gate,
    LowRankTerm,
    MatmulDescriptor,
    Residual,
    RowScale,
    Segment,
    SegmentedMatmulDescriptor,
    SegmentedMatmulPlan,
    measure,
    skinny,
)
from plans.matmul.mma import TILES, MmaProgram
from plans.matmul.skinny import SkinnyProgram, likely_tiles

SKINNY, PORTABLE = BackendKind.SKINNY, BackendKind.PORTABLE
LARGE = [] if SIMULATOR else [(1, 4096, 4096), (4, 14336, 4096), (16, 4099, 5128), (9, 8192, 1016)]


def check(device, poisoned, rng, descriptor, scales=None, low_rank_scales=None, backend=SKINNY):
    """Normal numbers within the guarantee; where nothing but sums is computed, small integers exactly."""
    if not descriptor.epilogue:
        problem = make(device, descriptor, small_integers(rng), scales, low_rank_scales=low_rank_scales)
        run(problem, poisoned, backend)
        assert_exact(problem)
    problem = make(device, descriptor, gaussian(rng), scales, low_rank_scales=low_rank_scales)
    plan = run(problem, poisoned, backend)
    assert_kept(problem, plan)
    return plan


@pytest.mark.parametrize(
    "shape", [(1, 1, 8), (1, 16, 64), (2, 17, 72), (8, 40, 200), (9, 33, 264), (16, 48, 520), *LARGE], ids=str
)
def test_few_rows(device, poisoned, rng, shape):
    check(device, poisoned, rng, MatmulDescriptor(*shape).segmented)


@pytest.mark.parametrize(
    ("n", "out", "steps"),
    [
        (24, F32, (Bias(), Activation("gelu"), Residual())),
        (26, F16, (Gate("silu"), Bias(F32))),
        (80, BF16, (Gate("gelu", gate_first=False), RowScale(F32), Residual(F32))),
    ],
)
def test_epilogues(device, poisoned, rng, n, out, steps):
    for m in (3, 12):
        check(device, poisoned, rng, MatmulDescriptor(m, n, 40, out=out, epilogue=steps).segmented)


def test_segments_strides_and_batches(device, poisoned, rng):
    segments = (Segment(72), Segment(16, a_stride=24, b_stride=32), Segment(0))
    check(device, poisoned, rng, SegmentedMatmulDescriptor(5, 24, segments), (1.0, -0.5, 1.0))
    check(device, poisoned, rng, MatmulDescriptor(3, 18, 40, batch=3, b_shared=True).segmented)
    half = (Segment(40, a=F16, b=F16), Segment(8, a=F16, b=F16))
    check(device, poisoned, rng, SegmentedMatmulDescriptor(2, 8, half, F32), (0.0, 2.0))
    for empty in ((0, 8, 8), (4, 0, 8), (4, 8, 0)):
        check(device, poisoned, rng, MatmulDescriptor(*empty).segmented)


@pytest.mark.parametrize("backend", [SKINNY, PORTABLE], ids=lambda backend: backend.value)
@pytest.mark.parametrize(
    ("m", "ks", "terms", "scales"),
    [
        (1, (64,), (LowRankTerm(16),), (1.0,)),
        (4, (264,), (LowRankTerm(8), LowRankTerm(16), LowRankTerm(24)), (0.5, -1.0, 0.5)),
        (3, (40, 24), (LowRankTerm(8, of=1), LowRankTerm(16, of=0), LowRankTerm(8, of=1)), (1.0, 0.0, -0.5)),
        (16, (136,), (LowRankTerm(32),), (-1.0,)),
    ],
)
def test_low_rank_terms(device, poisoned, rng, m, ks, terms, scales, backend):
    segments = tuple(Segment(k) for k in ks)
    check(
        device, poisoned, rng, SegmentedMatmulDescriptor(m, 40, segments, F32, low_rank=terms),
        (1.0,) * len(ks), scales, backend,
    )  # fmt: skip
    gated = SegmentedMatmulDescriptor(m, 36, segments, epilogue=(Bias(), Gate("silu")), low_rank=terms)
    check(device, poisoned, rng, gated, (0.7,) * len(ks), scales, backend)


def test_a_term_counts_although_the_segment_whose_a_it_takes_is_left_out(device, poisoned, rng):
    for backend in (SKINNY, PORTABLE):
        for ks in ((40,), (264, 24)):
            terms = (LowRankTerm(8),)
            descriptor = SegmentedMatmulDescriptor(3, 24, tuple(map(Segment, ks)), F32, low_rank=terms)
            problem = make(device, descriptor, gaussian(rng), (0.0, 2.0)[: len(ks)], low_rank_scales=(0.5,))
            nan = make(device, descriptor, lambda shape: np.full(shape, np.nan))
            (a, _), *others = problem.args.segments
            problem.args.segments = ((a, nan.args.segments[0][1]), *others)
            assert_kept(problem, run(problem, poisoned, backend))


def test_low_rank_terms_of_batches(device, poisoned, rng):
    for backend in (SKINNY, PORTABLE):
        descriptor = SegmentedMatmulDescriptor(2, 24, (Segment(24),), batch=3, low_rank=(LowRankTerm(8),))
        check(device, poisoned, rng, descriptor, None, (0.5,), backend)


def test_a_term_of_scale_zero_is_left_out_whatever_it_holds(device, poisoned, rng):
    for backend in (SKINNY, PORTABLE):
        descriptor = SegmentedMatmulDescriptor(2, 24, (Segment(24),), low_rank=(LowRankTerm(8), LowRankTerm(8)))
        problem = make(device, descriptor, gaussian(rng), low_rank_scales=(0.0, 1.0))
        nan = make(device, descriptor, lambda shape: np.full(shape, np.nan))
        problem.args.low_rank = (nan.args.low_rank[0], problem.args.low_rank[1])
        assert_kept(problem, run(problem, poisoned, backend))


def test_every_tile_that_may_be_chosen(device, rng):
    for m, n, epilogue in ((5, 40, ()), (11, 96, (Gate("silu"),))):
        segments = (Segment(136), Segment(16, late=True), Segment(8))
        descriptor = SegmentedMatmulDescriptor(m, n, segments, F32, None, epilogue)
        tiles = likely_tiles(descriptor)
        assert len(tiles) > 2
        for tile in tiles:
            problem = make(device, descriptor, gaussian(rng), (1.0, -0.5, 2.0))
            ((launch, arguments),) = SkinnyProgram(descriptor, device, tile).bind(problem.args, NO_WORKSPACE)
            stream = device.stream()
            launch(stream, arguments)
            device.synchronize(stream)
            assert_kept(problem, SegmentedMatmulPlan.select(None, descriptor, device=device))


@pytest.mark.parametrize(
    ("m", "n", "late", "row_groups"),
    [(16, 14336, True, 4), (9, 12288, True, 4), (16, 4096, True, 2), (8, 14336, True, 2), (16, 14336, False, 2)],
)
def test_large_blocks_where_many_rows_wait_for_late_operands(monkeypatch, m, n, late, row_groups):
    monkeypatch.setattr(skinny, "BLOCKS", 128)
    segments = (Segment(4096), Segment(16, late=late))
    assert likely_tiles(SegmentedMatmulDescriptor(m, n, segments))[0].row_groups == row_groups


def test_a_measured_program_runs_over_operands_of_its_own(device, monkeypatch):
    launched = []

    def seconds(_device, launch):
        stream = device.stream()
        launch(stream)
        device.synchronize(stream)
        launched.append(launch)
        return 0.5

    monkeypatch.setattr(measure, "device_seconds", seconds)
    steps = (Bias(), Residual(F32))
    few = SegmentedMatmulDescriptor(3, 16, (Segment(8), Segment(16)), epilogue=steps)
    many = MatmulDescriptor(20, 16, 8, "TN", epilogue=steps).segmented
    for descriptor, program, tile in ((few, SkinnyProgram, likely_tiles(few)[0]), (many, MmaProgram, TILES[0])):
        assert measure.program_seconds(descriptor, device, program(descriptor, device, tile)) == 0.5
    assert len(launched) == 2


@pytest.mark.parametrize(
    ("descriptor", "message"),
    [
        (MatmulDescriptor(17, 8, 8), "wants at most 16 rows, found 17"),
        (MatmulDescriptor(1, 8, 8, "NN"), "wants layout NT, found NN"),
        (MatmulDescriptor(1, 8, 12), "wants k and strides in multiples of 8 elements, found 12"),
        (MatmulDescriptor(1, 8, 8, a=F32), "wants A and B of all segments bf16 or all fp16, found f32 and bf16"),
        (
            SegmentedMatmulDescriptor(1, 8, (Segment(8),), low_rank=(LowRankTerm(4),)),
            "wants k and strides in multiples of 8 elements, found 4",
        ),
    ],
)
def test_refusals(device, descriptor, message):
    descriptor = getattr(descriptor, "segmented", descriptor)
    with pytest.raises(NoSku, match=message):
        SegmentedMatmulPlan.select(None, descriptor, PlanPreference(prefer_backend=SKINNY), device)


def test_terms_that_name_no_segment_are_refused():
    for term, segment in (
        (LowRankTerm(0), Segment(8)),
        (LowRankTerm(8, of=1), Segment(8)),
        (LowRankTerm(8), Segment(8, "TN")),
    ):
        with pytest.raises(InvalidProblem, match="wanted a positive rank and a segment with A stored"):
            SegmentedMatmulDescriptor(1, 8, (segment,), low_rank=(term,))


def test_few_rows_select_the_skinny_kernel(device):
    assert SegmentedMatmulPlan.choose(MatmulDescriptor(16, 64, 64).segmented, PlanPreference(), device).name == "skinny"
    assert SegmentedMatmulPlan.choose(MatmulDescriptor(17, 64, 64).segmented, PlanPreference(), device).name != "skinny"
