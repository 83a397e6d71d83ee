"""Groups of weights: mixtures against float64 and against each member's own plan; tables; overlaps; refusals."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import weight_cases as wc
from hypothesis import given
from hypothesis import strategies as st
from weight_cases import BF16, F16, F32, Inputs, Placed, Shape, assert_promised, describe

from plans.core import (
    BackendKind,
    BufferTooSmall,
    Device,
    InvalidProblem,
    MisalignedOperand,
    NoSku,
    PlanPreference,
    Workspace,
    WorkspaceTooSmall,
)
from plans.weight import (
    GroupedWeightArgs,
    GroupedWeightDescriptor,
    GroupedWeightPlan,
    Sink,
    WeightArgs,
    WeightDescriptor,
    WeightLayout,
    WeightPlan,
)
from plans.weight.grouped import _grid_blocks
from plans.weight.kronecker import VECTOR
from plans.weight.tile import MMA

WHOLE, RAGGED, CONV = Shape(2, 4, 16, 8), Shape(2, 3, 9, 8), Shape(2, 2, 5, 8, (2, 2))
ODD, NO_ROWS = Shape(1, 1, 5, 7), Shape(1, 1, 0, 8)


def member(source: str, shape: Shape, kinds=(BF16,), out=BF16, **options) -> WeightDescriptor:
    return describe(shape, wc.SOURCES[source](shape, itertools.cycle(kinds)), out, **options)


MIXTURES: dict[str, tuple[WeightDescriptor, ...]] = {
    "one algorithm, one shape": (member("locon r17", WHOLE),) * 3,
    "one algorithm, many shapes": tuple(member("locon r1", s) for s in (WHOLE, RAGGED, CONV, Shape(1, 1, 40, 24))),
    "all algorithms": tuple(
        member(source, shape)
        for source in ("locon r17", "loha r4", "lokr full full", "lokr full factored", "dense", "ia3 in", "two locons")
        for shape in (WHOLE, RAGGED)
    ),
    "all kinds": (
        member("locon r1", RAGGED, (F16,), F16),
        member("locon r1", RAGGED, (F32,), F32),
        member("locon r1", RAGGED, (F32,), BF16),
        member("lokr full full", RAGGED, (F16, F32), F16, base=BF16),
        member("lokr full full", CONV, (BF16,), F32, sink=Sink.DELTA),
    ),
    "some empty, some on their own": (
        member("locon r1", WHOLE),
        member("locon r1", NO_ROWS),
        member("locon r1", ODD),
        member("locon tucker", RAGGED),
        member("locon r1", WHOLE, sink=Sink.DORA_ROW),
        member("lokr factored full", RAGGED),
        member("dense", Shape(1, 1, 8, 0)),
        member("locon r1", RAGGED, layout=WeightLayout.FLAME),
        member("lokr tucker", CONV),
        member("locon r1", RAGGED, check_finite=True),
    ),
    "none in a group": (member("locon r1", ODD), member("dense", ODD), member("ia3 out", NO_ROWS)),
    "one": (member("loha r4", RAGGED),),
    "none at all": (),
}


@dataclass
class Group:
    """A plan with arguments for random inputs."""

    plan: GroupedWeightPlan
    inputs: list[Inputs]
    placed: list[Placed]
    args: GroupedWeightArgs
    workspace: Workspace

    @property
    def device(self) -> Device:
        return self.plan.device

    def run(self) -> list[np.ndarray]:
        """Every member's result."""
        stream = self.device.stream()
        self.plan.upload(stream, self.args)
        self.plan.run(stream, self.workspace, self.args)
        self.device.synchronize(stream)
        return self.results()

    def results(self) -> list[np.ndarray]:
        return [p.outcome(m.precision_guarantee).values for p, m in zip(self.placed, self.plan.members, strict=True)]

    def with_members(self, **changes) -> GroupedWeightArgs:
        """The arguments with attributes of member 1's replaced."""
        names = ("out", "factors", "scales", "base", "magnitude", "strength", "not_finite")
        first, second, *others = self.args.members
        changed = WeightArgs(**{name: getattr(second, name) for name in names} | changes)
        return GroupedWeightArgs([first, changed, *others], self.args.table)


@pytest.fixture
def make(device: Device, rng: np.random.Generator, poisoned: Callable) -> Callable[..., Group]:
    """``make(members)``: a group over random inputs, in poisoned memory."""

    def group(members: Sequence[WeightDescriptor], in_place: bool = False) -> Group:
        plan = GroupedWeightPlan.select(None, GroupedWeightDescriptor(tuple(members)), device=device)
        inputs = [Inputs.random(descriptor, rng) for descriptor in members]
        placed = [Placed.of(d, values, device, in_place) for d, values in zip(members, inputs, strict=True)]
        args = GroupedWeightArgs([p.args for p in placed], poisoned(plan.table_size()))
        return Group(plan, inputs, placed, args, wc.poisoned_workspace(plan, device))

    return group


@pytest.mark.parametrize("members", MIXTURES.values(), ids=MIXTURES)
def test_every_member_is_right_and_as_its_own_plan_computes_it(device, make, members):
    group = make(members)
    for plan, inputs, found in zip(group.plan.members, group.inputs, group.run(), strict=True):
        exact, magnitude = inputs.reference(plan.descriptor)
        outcome = wc.Outcome(found, None, plan.precision_guarantee)
        assert_promised(outcome, exact, magnitude, plan.descriptor.out)
        alone = wc.run(plan.descriptor, plan.chosen, inputs, device)
        assert found.tobytes() == alone.values.tobytes(), plan.descriptor


def test_results_may_take_the_bases_places(make):
    members = MIXTURES["one algorithm, many shapes"] + (member("locon r1", ODD), member("lokr full full", RAGGED))
    group = make(members, in_place=True)
    for plan, inputs, found in zip(group.plan.members, group.inputs, group.run(), strict=True):
        exact, magnitude = inputs.reference(plan.descriptor)
        assert_promised(wc.Outcome(found, None, plan.precision_guarantee), exact, magnitude, plan.descriptor.out)


def launches(group: Group) -> list[tuple]:
    group.plan.encode(group.args)
    return group.plan.launches(group.args, group.workspace)


def test_members_of_one_kernel_take_one_launch(make):
    alike = [member("locon r1", Shape(1, 1, rows, 8)) for rows in (3, 5, 17)]
    kronecker = [member("lokr full full", RAGGED), member("lokr full full", Shape(4, 3, 9, 8))]
    assert len(launches(make(alike))) == 1
    assert len(launches(make([alike[0], kronecker[0], alike[1], kronecker[1], alike[2]]))) == 2
    assert len(launches(make([*alike, member("locon r1", NO_ROWS)]))) == 1
    assert launches(make([member("locon r1", NO_ROWS)])) == launches(make([])) == []


def test_large_launches_come_first(make):
    small, large = member("locon r1", ODD), member("locon r1", Shape(1, 1, 7, 9))
    group = make([small, member("locon r1", WHOLE), large])
    (_, whole), (_, second), (_, last) = launches(group)
    assert len(whole) == 2
    parts = [group.args.members[i].out.data for i in (0, 2)]
    assert any(argument is parts[1] for argument in second) and any(argument is parts[0] for argument in last)


@given(st.tuples(st.integers(1, 7), st.integers(1, 7), st.integers(1, 7)))
def test_a_grid_is_listed_once_and_x_first(grid):
    wanted = [(x, y, z) for z in range(grid[2]) for y in range(grid[1]) for x in range(grid[0])]
    assert [tuple(block) for block in _grid_blocks(grid)] == wanted


def test_other_arguments_need_the_rows_only(device, make):
    members = MIXTURES["one algorithm, many shapes"]
    first = make(members)
    first.run()
    second = make(members)
    assert second.plan is first.plan
    second.args.table = first.args.table
    lists = device.download(first.args.table, np.uint8, (first.plan.table_size(),))
    rows = second.plan.encode(second.args, blocks=False)
    assert 0 < rows.nbytes < first.plan.table_size()
    np.testing.assert_array_equal(second.plan.encode(second.args)[rows.nbytes :], lists[rows.nbytes :])
    stream = device.stream()
    second.plan.upload(stream, second.args, blocks=False)
    second.plan.run(stream, second.workspace, second.args)
    device.synchronize(stream)
    for plan, inputs, found in zip(second.plan.members, second.inputs, second.results(), strict=True):
        exact, magnitude = inputs.reference(plan.descriptor)
        assert_promised(wc.Outcome(found, None, plan.precision_guarantee), exact, magnitude, plan.descriptor.out)


def test_arguments_are_bound_once(make, monkeypatch):
    group = make([member("locon r1", RAGGED)] * 2)
    first = group.run()
    monkeypatch.setattr(GroupedWeightPlan, "can_implement", None)
    monkeypatch.setattr(GroupedWeightPlan, "launches", None)
    stream = group.device.stream()
    for placed in group.placed:
        group.device.fill(placed.out, 0xFF, stream)
    group.plan.run(stream, group.workspace, group.args)
    group.device.synchronize(stream)
    assert [a.tobytes() for a in group.results()] == [a.tobytes() for a in first]


def test_each_member_raises_its_own_flag(make):
    members = [member(source, RAGGED, check_finite=True) for source in ("locon r1", "locon r1", "lokr full full")]
    group = make([*members, member("locon r1", ODD, check_finite=True)])
    group.inputs[1].factors[0][0][2, 0] = np.inf
    group.inputs[1].factors[0][1][...] = 1
    group.placed[1] = Placed.of(members[1], group.inputs[1], group.device)
    group.args = GroupedWeightArgs([placed.args for placed in group.placed], group.args.table)
    group.run()
    assert [placed.outcome(None).not_finite for placed in group.placed] == [0, 1, 0, 0]


def test_members_may_share_factors_and_a_flag(make):
    group = make([member("locon r1", RAGGED, check_finite=True)] * 2)
    first, second = group.args.members
    shared = group.with_members(factors=first.factors, scales=first.scales, base=first.base)
    shared.members[1].not_finite = first.not_finite
    group.args = shared
    results = group.run()
    assert results[0].tobytes() == results[1].tobytes()
    assert second.not_finite is not first.not_finite


def test_workspaces_lie_apart(make):
    members = [member("locon tucker", RAGGED), member("locon tucker", CONV), member("locon r1", ODD)]
    group = make(members)
    sizes = [plan.workspace_size() for plan in group.plan.members]
    assert group.plan.workspace_size() >= sum(sizes) and min(sizes[:2]) > 0
    short = Workspace(group.device.allocate(group.plan.workspace_size() - 1))
    with pytest.raises(WorkspaceTooSmall, match="grouped weight: workspace of"):
        group.plan.run(group.device.stream(), short, group.args)
    together = GroupedWeightDescriptor(tuple(members))
    limit = PlanPreference(max_workspace_bytes=group.plan.workspace_size() - 1)
    with pytest.raises(NoSku, match=r"3 weights \(all together: needs \d+ bytes of workspace, preference allows \d+"):
        GroupedWeightPlan.select(None, together, limit, group.device)


@pytest.mark.parametrize(
    ("source", "shape", "alone", "in_group"),
    [
        ("lokr full full", Shape(8, 8, 160, 160), MMA, VECTOR),
        ("lokr full full", Shape(8, 8, 80, 80), MMA, MMA),
        ("lokr full full", Shape(8, 8, 320, 320), VECTOR, VECTOR),
        ("lokr full factored", Shape(8, 8, 160, 160), MMA, VECTOR),
        ("lokr full factored", Shape(8, 8, 168, 160), MMA, MMA),
        ("lokr tucker", Shape(8, 8, 80, 80, (3, 3)), MMA, MMA),
    ],
)
def test_kronecker_products_walk_from_smaller_sizes_on_in_groups(device, source, shape, alone, in_group):
    descriptor = member(source, shape)
    assert WeightPlan.choose(descriptor, PlanPreference(allow_sm90a=False), device) is alone
    assert WeightPlan.member(descriptor, PlanPreference(allow_sm90a=False), device).chosen is in_group
    only_mma = PlanPreference(prefer_backend=BackendKind.MMA)
    assert WeightPlan.member(member(source, shape), only_mma, device).chosen is MMA


def test_a_preference_holds_for_every_member(device):
    members = GroupedWeightDescriptor((member("locon r1", WHOLE), member("dense", WHOLE)))
    plan = GroupedWeightPlan.select(None, members, PlanPreference(prefer_backend=BackendKind.PORTABLE), device)
    assert {m.sku.backend for m in plan.members} == {BackendKind.PORTABLE}
    assert plan.table_size() == 0
    with pytest.raises(NoSku, match="multiple of 8"):
        both = GroupedWeightDescriptor((member("locon r1", WHOLE), member("locon r1", ODD)))
        GroupedWeightPlan.select(None, both, PlanPreference(prefer_backend=BackendKind.MMA), device)


def test_plans_are_cached(device):
    members = GroupedWeightDescriptor((member("locon r1", WHOLE),) * 2)
    plan = GroupedWeightPlan.select(None, members, device=device)
    assert GroupedWeightPlan.select(None, GroupedWeightDescriptor(members.members), device=device) is plan
    assert plan.members[0] is plan.members[1]
    assert plan.members[0].chosen is WeightPlan.select(None, members.members[0], device=device).chosen


def test_members_of_a_group_do_not_compile_a_kernel_of_their_own(device):
    (grouped,) = GroupedWeightPlan.select(
        None, GroupedWeightDescriptor((member("locon r17", WHOLE),)), device=device
    ).members
    assert grouped.program.group_kernel is not None
    assert "merge" not in vars(grouped.program)
    assert "merge" in vars(WeightPlan.select(None, member("locon r17", WHOLE), device=device).program)


def test_wrong_arguments_are_refused_with_their_member(device, make):
    group = make([member("locon r1", RAGGED, check_finite=True), member("lokr full full", RAGGED)])
    good = group.args.members[1]
    other = group.args.members[0]
    rows = [
        ({"base": dataclasses.replace(good.base, element=F16)}, "operand base holds f16, wanted bf16; cast it first"),
        ({"out": dataclasses.replace(good.out, shape=(24, 18))}, "operand out has shape (24, 18), wanted (18, 24)"),
        ({"factors": (good.factors[0][::-1],)}, "operand source0.w1 has shape (9, 8), wanted (2, 3)"),
        ({"factors": tuple((f,) for f in good.factors[0])}, "factors in groups of [1, 1], wanted them as source0.w1, "),
        ({"scales": (1.0, 2.0)}, "2 scales given, wanted 1: one for each source"),
        ({"not_finite": other.not_finite}, "5 operands given, wanted 4"),
    ]
    for changes, message in rows:
        for use in (group.plan.can_implement, group.plan.encode):
            with pytest.raises(InvalidProblem, match="^" + re.escape(f"grouped weight: member 1: {message}")):
                use(group.with_members(**changes))
    with pytest.raises(
        MisalignedOperand, match=r"member 1: operand base lies at address 0x\w+, wanted a multiple of 16"
    ):
        shifted = group.device.allocate(1 << 12).tensor(BF16, (18, 24), byte_offset=2)
        group.plan.can_implement(group.with_members(base=shifted))
    few = GroupedWeightArgs(group.args.members[:1], group.args.table)
    with pytest.raises(InvalidProblem, match="grouped weight: 1 members given, wanted 2"):
        group.plan.can_implement(few)


def test_members_that_write_what_others_use_are_refused(make):
    group = make([member("dense", WHOLE)] * 2)
    first, second = group.args.members
    rows = [
        ({"out": first.out}, "member 1 out", "member 0 out"),
        ({"out": first.base}, "member 1 out", "member 0 base"),
        ({"base": first.out}, "member 0 out", "member 1 base"),
        ({"factors": ((first.out,),)}, "member 0 out", "member 1 source0.diff"),
    ]
    for changes, written, used in rows:
        with pytest.raises(InvalidProblem, match=f"grouped weight: operand {written} is written .* but {used} lies at"):
            group.plan.can_implement(group.with_members(**changes))
    with pytest.raises(InvalidProblem, match=r"operand member 1 out is written .* but table lies at"):
        group.plan.can_implement(GroupedWeightArgs(group.args.members, second.out.owner))


def test_tables_are_checked(device, make):
    group = make([member("locon r1", RAGGED)] * 2)
    size = group.plan.table_size()
    buffer = device.allocate(size + 256)
    rows = [
        (None, InvalidProblem, f"no table given, wanted plan.table_size() bytes: {size}"),
        (buffer.part(0, size - 1), BufferTooSmall, f"table: the buffer holds {size - 1} bytes, wanted {size}"),
        (buffer.part(4, size), MisalignedOperand, "the table lies at 0x"),
    ]
    for table, error, message in rows:
        with pytest.raises(error, match=re.escape(f"grouped weight: {message}")):
            group.plan.upload(None, GroupedWeightArgs(group.args.members, table))
    with pytest.raises(InvalidProblem, match="the table was not encoded for these arguments"):
        group.plan.run(device.stream(), group.workspace, GroupedWeightArgs(group.args.members, buffer))
