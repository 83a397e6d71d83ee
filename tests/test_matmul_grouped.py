"""Many products in few launches: each as its own plan would compute it, whatever the others' extents."""

from __future__ import annotations

import numpy as np
import pytest
from matmul_cases import BF16, F32, gaussian, make

from kernels.target import SIMULATOR
from plans.core import BackendKind, BufferTooSmall, InvalidProblem, NoSku, PlanPreference
from plans.matmul import (
    Bias,
    GroupedMatmulArgs,
    GroupedMatmulDescriptor,
    GroupedMatmulPlan,
    LowRankTerm,
    MatmulDescriptor,
    Residual,
    Segment,
    SegmentedMatmulDescriptor,
)

ROWS = (1, 5, 0, 40) if SIMULATOR else (1, 5, 0, 40, 300, 1000, 7)


def solve(device, poisoned, rng, descriptors, scales, preference=None):
    """The plan and each member's problem, computed."""
    plan = GroupedMatmulPlan.select(None, GroupedMatmulDescriptor(tuple(descriptors)), preference, device)
    problems = [make(device, d, gaussian(rng), s) for d, s in zip(descriptors, scales, strict=True)]
    args = GroupedMatmulArgs([problem.args for problem in problems], poisoned(plan.table_size()))
    stream = device.stream()
    plan.upload(stream, args)
    plan.run(stream, None, args)
    device.synchronize(stream)
    return plan, args, problems


def assert_all_kept(plan, problems):
    for i, problem in enumerate(problems):
        exact, magnitude = problem.reference()
        kept = plan.guarantee(i).accepts(problem.found(), exact, magnitude, problem.descriptor.out)
        assert kept.all(), f"member {i}: {(~kept).sum()} of {kept.size} elements"


@pytest.mark.parametrize("backend", [None, BackendKind.PORTABLE], ids=["mma", "portable"])
def test_rows_of_several_adapters_in_one_launch(device, poisoned, rng, backend):
    """The rows of each adapter are one product: base and low-rank segments, residual where there is one."""
    descriptors = [SegmentedMatmulDescriptor(rows, 40, (Segment(72), Segment(8)), epilogue=(Bias(),)) for rows in ROWS]
    scales = [(1.0, strength) for strength in np.linspace(-1, 2, len(ROWS))]
    plan, args, problems = solve(device, poisoned, rng, descriptors, scales, PlanPreference(prefer_backend=backend))
    assert_all_kept(plan, problems)
    assert len(plan.launches(args, None)) == 1


def test_products_of_whole_tiles_beside_ragged_ones(device, poisoned, rng):
    shapes = ((64, 64, 64), (5, 64, 64), (64, 64, 61), (7, 61, 64))
    descriptors = [MatmulDescriptor(*shape).segmented for shape in shapes]
    for order in (descriptors, descriptors[::-1]):
        plan, args, problems = solve(device, poisoned, rng, order, [None] * 4)
        assert_all_kept(plan, problems)
        assert len(plan.launches(args, None)) == 1


def test_different_families_take_a_launch_each(device, poisoned, rng):
    descriptors = [
        MatmulDescriptor(20, 24, 40).segmented,
        MatmulDescriptor(9, 13, 7, epilogue=(Residual(),)).segmented,
        MatmulDescriptor(18, 33, 5, "TN", F32, F32, F32).segmented,
        MatmulDescriptor(33, 16, 64).segmented,
        MatmulDescriptor(3, 0, 64).segmented,
    ]
    plan, args, problems = solve(device, poisoned, rng, descriptors, [None] * 5)
    assert_all_kept(plan, problems)
    assert len(plan.launches(args, None)) == 3


def test_an_empty_group_launches_nothing(device):
    plan = GroupedMatmulPlan.select(None, GroupedMatmulDescriptor(()), device=device)
    assert plan.table_size() == 0
    plan.run(device.stream(), None, GroupedMatmulArgs([]))


def test_what_does_not_fit_is_refused(device, poisoned, rng):
    member = MatmulDescriptor(4, 8, 16)
    descriptors = GroupedMatmulDescriptor((member, member))
    plan = GroupedMatmulPlan.select(None, descriptors, device=device)
    problems = [make(device, member.segmented, gaussian(rng)) for _ in range(2)]
    own = [problem.args for problem in problems]
    for members, table, error, message in (
        (own[:1], None, InvalidProblem, "1 members given, wanted 2"),
        (own, None, InvalidProblem, "no table given, wanted plan.table_size"),
        (own, poisoned(8), BufferTooSmall, "grouped matmul: table"),
        ([own[0], own[0]], poisoned(plan.table_size()), InvalidProblem, "operand member 1 out is written|member 0 out"),
    ):
        with pytest.raises(error, match=message):
            plan.can_implement(GroupedMatmulArgs(members, table))
    with pytest.raises(InvalidProblem, match="the table was not encoded for these arguments"):
        plan.run(device.stream(), None, GroupedMatmulArgs(own, poisoned(plan.table_size())))
    with pytest.raises(NoSku, match="wants A D\\^T of low-rank terms multiplied before"):
        low = SegmentedMatmulDescriptor(4, 8, (Segment(8),), BF16, low_rank=(LowRankTerm(8),))
        GroupedMatmulPlan.select(None, GroupedMatmulDescriptor((low,)), device=device)
