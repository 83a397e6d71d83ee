"""Declared operands: what overlaps what, and which memory a result may share."""

from __future__ import annotations

import re

import pytest
import weight_cases as wc
from hypothesis import given
from hypothesis import strategies as st
from weight_cases import BF16, F32, Placed, Shape, describe

from plans.cast import CastArgs, CastDescriptor, CastPlan
from plans.core import InvalidProblem, Operand, TensorMut
from plans.core.operand import Extent, check_overlaps, extents
from plans.weight import LowRank, WeightArgs, WeightPlan

SMALL = Shape(1, 1, 4, 8)
extent = st.builds(
    lambda start, size, writes: (start, start + size, writes), st.integers(0, 30), st.integers(1, 8), st.booleans()
)


@given(st.lists(extent, max_size=8))
def test_overlaps_are_those_of_every_pair(found):
    named = [Extent(*one, name=f"operand{i}") for i, one in enumerate(found)]
    pairs = [
        {a.name, b.name}
        for i, a in enumerate(named)
        for b in named[:i]
        if (a.writes or b.writes) and a.start < b.end and b.start < a.end
    ]
    try:
        check_overlaps("plan", named)
    except InvalidProblem as error:
        assert set(re.findall(r"operand\d+", str(error))) in pairs
    else:
        assert not pairs


def test_what_is_written_is_named():
    message = "plan: operand b is written to addresses 0x9 to 0xc, but a lies at 0x0 to 0xa; give each its own memory"
    with pytest.raises(InvalidProblem, match=f"^{message}$"):
        check_overlaps("plan", [Extent(0, 10, False, "a"), Extent(9, 12, True, "b")])
    with pytest.raises(InvalidProblem, match=r"operand a is written .* but b lies"):
        check_overlaps("plan", [Extent(0, 10, True, "a"), Extent(9, 12, False, "b")])
    check_overlaps("plan", [Extent(0, 10, True, "a"), Extent(10, 12, False, "b"), Extent(10, 12, False, "c")])


def test_empty_operands_lie_nowhere():
    empty = Operand("empty", BF16, (0, 8), writes=True)
    assert extents([empty], [TensorMut(1 << 20, (0, 8), (8, 1), BF16, 0, 0)]) == []


def test_a_result_may_be_its_base_and_nothing_else(device, rng):
    descriptor = describe(SMALL, (LowRank(4, BF16, BF16),), BF16)
    plan = WeightPlan.select(None, descriptor, device=device)
    args = Placed.of(descriptor, wc.Inputs.random(descriptor, rng), device).args

    def check(**changes) -> None:
        given_ = {"out": args.out, "factors": args.factors, "scales": args.scales, "base": args.base} | changes
        plan.can_implement(WeightArgs(**given_))

    check()
    check(out=args.base)
    buffer = device.allocate(4096)
    whole = buffer.tensor(BF16, (4, 8))
    check(out=whole, base=whole)
    check(out=whole, base=buffer.tensor(BF16, (4, 8), byte_offset=64))
    for offset in (16, 32, 48):
        with pytest.raises(InvalidProblem, match=r"weight: operand out is written .* but base lies"):
            check(out=whole, base=buffer.tensor(BF16, (4, 8), byte_offset=offset))
    left_on_result = ((buffer.tensor(BF16, (4, 4)), args.factors[0][1]),)
    for base in (args.base, whole):
        with pytest.raises(InvalidProblem, match=r"weight: operand out is written .* but source0\.left lies"):
            check(out=buffer.tensor(BF16, (4, 8)), base=base, factors=left_on_result)


def test_a_wider_result_does_not_fit_its_bases_place(device, rng):
    descriptor = describe(SMALL, (LowRank(4, BF16, BF16),), F32, base=BF16)
    plan = WeightPlan.select(None, descriptor, device=device)
    args = Placed.of(descriptor, wc.Inputs.random(descriptor, rng), device).args
    buffer = device.allocate(4096)
    shared = WeightArgs(buffer.tensor(F32, (4, 8)), args.factors, args.scales, buffer.tensor(BF16, (4, 8)))
    with pytest.raises(InvalidProblem, match=r"weight: operand out is written .* but base lies"):
        plan.can_implement(shared)


def test_other_plans_share_no_memory(device):
    buffer = device.allocate(256)
    plan = CastPlan.select(None, CastDescriptor(8, F32, BF16), device=device)
    with pytest.raises(InvalidProblem, match=r"cast: operand out is written .* but source lies"):
        plan.run(device.stream(), None, CastArgs(buffer.tensor(BF16, (8,)), buffer.tensor(F32, (8,))))
