"""Low-rank terms by two launches: every second SKU against float64 over poisoned memory and workspace."""

from __future__ import annotations

import numpy as np
import pytest
from matmul_cases import BF16, F16, F32, assert_kept, gaussian, make, run

from kernels.target import SIMULATOR
from plans.core import BackendKind, InvalidProblem, NoSku, PlanPreference, Workspace
from plans.matmul import Bias, Gate, LowRankTerm, Segment, SegmentedMatmulDescriptor, SegmentedMatmulPlan
from plans.matmul.low_rank import inner_products, with_low_rank
from plans.matmul.wgmma import WGMMA, WgmmaProgram

BACKENDS = [BackendKind.MMA, BackendKind.WGMMA]
EVERY_SKU = pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.value)


def check(device, poisoned, rng, descriptor, backend, scales=None, low_rank_scales=None):
    problem = make(device, descriptor, gaussian(rng), scales, low_rank_scales=low_rank_scales)
    plan = run(problem, poisoned, backend)
    assert plan.chosen.name.endswith("low rank first")
    assert_kept(problem, plan)
    return problem


@EVERY_SKU
@pytest.mark.parametrize(
    ("ranks", "scales"),
    [
        ((16,), None),
        ((8,), (0.5,)),
        ((136,), (1.5,)),
        ((24, 16), (1.0, -2.0)),
        ((64, 64), None),
        ((8, 40, 8, 16), (1.0, 0.0, 1e-3, 3.0)),
    ],
    ids=str,
)
def test_terms_of_one_operand(device, poisoned, rng, ranks, scales, backend):
    terms = tuple(LowRankTerm(rank) for rank in ranks)
    m, n, k = (70, 72, 56) if SIMULATOR else (1000, 1288, 3072)
    descriptor = SegmentedMatmulDescriptor(m, n, (Segment(k),), epilogue=(Bias(),), low_rank=terms)
    check(device, poisoned, rng, descriptor, backend, (1.0,), scales or (1.0,) * len(ranks))


@pytest.mark.parametrize("idle", [0, 2, 7])
def test_first_launches_with_few_blocks_and_with_many(device, poisoned, rng, idle, monkeypatch):
    """However many multiprocessors a product leaves idle: pairs of blocks walk over all rows, or each takes a tile."""
    monkeypatch.setattr(WgmmaProgram, "idle_multiprocessors", lambda program: (idle, 1e12))
    m, n, k = (130, 40 + 8 * idle, 72) if SIMULATOR else (1010, 264 + 8 * idle, 1096)
    descriptor = SegmentedMatmulDescriptor(m, n, (Segment(k),), low_rank=(LowRankTerm(16), LowRankTerm(8)))
    problem = make(device, descriptor, gaussian(rng), (1.0,), low_rank_scales=(0.5, -2.0))
    plan, stream = SegmentedMatmulPlan(descriptor, with_low_rank(WGMMA), device), device.stream()
    plan.run(stream, Workspace(poisoned(plan.workspace_size())), problem.args)
    device.synchronize(stream)
    assert_kept(problem, plan)


@EVERY_SKU
def test_terms_of_several_operands_and_a_gate(device, poisoned, rng, backend):
    segments, terms = (Segment(40), Segment(24)), (LowRankTerm(8, of=1), LowRankTerm(16), LowRankTerm(8, of=1))
    descriptor = SegmentedMatmulDescriptor(33, 80, segments, F32, epilogue=(Gate("silu"),), low_rank=terms)
    check(device, poisoned, rng, descriptor, backend, (1.0, 0.5), (1.0, -1.0, 0.25))


@EVERY_SKU
@pytest.mark.parametrize("shared", [False, True], ids=["own A", "one A"])
def test_batches(device, poisoned, rng, shared, backend):
    segment = Segment(24, a=F16, b=F16, a_shared=shared)
    terms = (LowRankTerm(8, element=F16),)
    descriptor = SegmentedMatmulDescriptor(20, 40, (segment,), F16, batch=3, low_rank=terms)
    check(device, poisoned, rng, descriptor, backend, (1.0,), (0.75,))


@EVERY_SKU
def test_a_term_of_scale_zero_is_left_out_whatever_it_holds(device, poisoned, rng, backend):
    descriptor = SegmentedMatmulDescriptor(40, 24, (Segment(16),), low_rank=(LowRankTerm(8), LowRankTerm(8)))
    problem = make(device, descriptor, gaussian(rng), (1.0,), low_rank_scales=(0.0, 1.0))
    nan = make(device, descriptor, lambda shape: np.full(shape, np.nan))
    problem.args.low_rank = (nan.args.low_rank[0], problem.args.low_rank[1])
    assert_kept(problem, run(problem, poisoned, backend))


@EVERY_SKU
def test_a_term_of_no_depth_adds_nothing(device, poisoned, rng, backend):
    segments, terms = (Segment(0), Segment(16)), (LowRankTerm(8), LowRankTerm(8, of=1))
    descriptor = SegmentedMatmulDescriptor(20, 24, segments, low_rank=terms)
    check(device, poisoned, rng, descriptor, backend, (1.0, 1.0), (1.0, 1.0))


def test_terms_share_launches_up_to_64_columns():
    terms = tuple(LowRankTerm(rank) for rank in (16, 20, 16, 136, 8))
    found = inner_products(SegmentedMatmulDescriptor(8, 8, (Segment(8),), low_rank=terms))
    assert [inner.tiles for inner in found] == [(2, 3, 2), (8,), (8,), (1, 1)]
    assert [piece for inner in found for piece in inner.pieces][3:5] == [(3, 0, 64), (3, 64, 64)]


@pytest.mark.parametrize(
    ("reason", "segment", "term"),
    [
        ("of A's kind, bf16 or fp16, found f16 and bf16", Segment(16), LowRankTerm(8, element=F16)),
        ("multiples of 8, found K 12", Segment(12), LowRankTerm(8)),
    ],
    ids=["kind", "depth"],
)
def test_refusals(device, reason, segment, term):
    descriptor = SegmentedMatmulDescriptor(32, 32, (segment,), BF16, low_rank=(term,))
    with pytest.raises(NoSku, match=reason):
        SegmentedMatmulPlan.select(None, descriptor, PlanPreference(prefer_backend=BackendKind.MMA), device)


def test_a_term_without_rank_is_no_term():
    with pytest.raises(InvalidProblem, match="positive rank"):
        SegmentedMatmulDescriptor(8, 8, (Segment(8),), low_rank=(LowRankTerm(0),))
