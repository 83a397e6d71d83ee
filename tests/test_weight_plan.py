"""The weight plan: every SKU, source, sink, layout and mixture of kinds against float64; identities; refusals."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections import Counter

import numpy as np
import pytest
import weight_cases as wc
from hypothesis import given, settings
from hypothesis import strategies as st
from weight_cases import BF16, F16, F32, Inputs, Shape, assert_promised, describe, run

from plans.core import (
    BackendKind,
    BufferTooSmall,
    ElementKind,
    InvalidProblem,
    MisalignedOperand,
    NoSku,
    PlanPreference,
    TensorMut,
    TensorRef,
    Workspace,
    WorkspaceTooSmall,
)
from plans.weight import (
    ChannelScale,
    Dense,
    Hadamard,
    Kronecker,
    LowRank,
    Sink,
    WeightArgs,
    WeightDescriptor,
    WeightLayout,
    WeightPlan,
)
from plans.weight.tile import MAX_ROWS, MMA, blocks_ahead

CASES = wc.cases()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_sku_keeps_its_promise(device, rng, case):
    inputs = Inputs.random(case.descriptor, rng)
    exact, magnitude = inputs.reference(case.descriptor)
    assert_promised(run(case.descriptor, case.sku, inputs, device), exact, magnitude, case.descriptor.out)


def test_no_sku_refuses_what_it_is_for():
    found = Counter((case.sku.backend, type(case.descriptor.sources[0]), case.descriptor.sink) for case in CASES)
    for source, sink in itertools.product((LowRank, Hadamard, Kronecker, Dense, ChannelScale), Sink):
        wanted = not (source is ChannelScale and sink is Sink.DELTA)
        assert (found[BackendKind.PORTABLE, source, sink] > 0) == wanted
        assert (found[BackendKind.MMA, source, sink] > 0) == (wanted and sink is not Sink.DORA_COLUMN)
    for sink in (Sink.DELTA, Sink.MERGE):
        assert found[BackendKind.VECTOR, Kronecker, sink] > 0
    for source in (LowRank, Hadamard):
        assert found[BackendKind.CLUSTER, source, Sink.DORA_ROW] > 0


# One merge that every SKU takes, but for those of DoRA.
EVEN = Shape(2, 2, 5, 8)
KRONECKER = (Kronecker(EVEN.a, EVEN.b, EVEN.c, EVEN.d, BF16, BF16),)
SKUS = pytest.mark.parametrize(
    "sku",
    [sku for sku in WeightPlan.skus if not sku.refuses(describe(EVEN, KRONECKER, BF16))],
    ids=lambda sku: sku.name,
)


@SKUS
@pytest.mark.parametrize("kind", (BF16, F16, F32), ids=lambda kind: kind.value)
def test_a_result_that_is_not_finite_raises_the_flag(device, rng, sku, kind):
    descriptor = describe(EVEN, KRONECKER, kind, check_finite=True)
    inputs = Inputs.random(descriptor, rng)
    assert run(descriptor, sku, inputs, device).not_finite == 0
    for bad in (np.inf, np.nan):
        broken = [[factor.copy() for factor in group] for group in inputs.factors]
        broken[0][1].reshape(-1)[3] = bad
        broken[0][0][...] = 1
        assert run(descriptor, sku, dataclasses.replace(inputs, factors=broken), device).not_finite == 1
    large = [[np.full_like(factor, 300 if kind is F16 else 2e19) for factor in group] for group in inputs.factors]
    overflowing = dataclasses.replace(inputs, factors=large, scales=[2.0])
    assert run(descriptor, sku, overflowing, device).not_finite == 1


@SKUS
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_what_is_not_finite_in_the_base_stays_so_and_raises_the_flag(device, rng, sku, bad):
    descriptor = describe(EVEN, KRONECKER, BF16, check_finite=True)
    inputs = Inputs.random(descriptor, rng)
    inputs.base.reshape(-1)[5] = bad
    outcome = run(descriptor, sku, inputs, device)
    assert outcome.not_finite == 1
    np.testing.assert_array_equal(float(outcome.values.reshape(-1)[5]), bad)


@SKUS
def test_results_repeat_bit_for_bit(device, rng, sku):
    descriptor = describe(EVEN, KRONECKER, BF16)
    inputs = Inputs.random(descriptor, rng)
    first, second = (run(descriptor, sku, inputs, device).values for _ in range(2))
    np.testing.assert_array_equal(first.view(np.uint16), second.view(np.uint16))


def test_short_launches_ask_for_bases_ahead_and_long_ones_do_not():
    assert [blocks_ahead(blocks, at_once=264) for blocks in (264, 265, 4 * 264, 4 * 264 + 1)] == [0, 396, 396, 0]


small_shapes = st.builds(
    Shape,
    *(st.integers(1, 3) for _ in range(3)),
    st.sampled_from([1, 3, 8]),
    st.sampled_from([(), (), (1,), (3,), (2, 2)]),
)
kinds = st.sampled_from([BF16, F16, F32])
seeds = st.integers(0, 2**32 - 1)
properties = settings(max_examples=15)


def accepting(descriptor):
    return [sku for sku in WeightPlan.skus if not sku.refuses(descriptor)]


@properties
@given(small_shapes, st.sampled_from(sorted(wc.SOURCES)), kinds, st.sampled_from(WeightLayout), seeds)
def test_strength_0_is_the_base_bit_for_bit(device, shape, source, kind, layout, seed):
    descriptor = describe(shape, wc.SOURCES[source](shape, itertools.cycle([BF16, F32])), kind, layout=layout)
    inputs = Inputs.random(descriptor, np.random.default_rng(seed))
    inputs = dataclasses.replace(
        inputs, base=inputs.base + np.zeros((), kind.values), scales=[0.0] * len(inputs.scales)
    )
    for sku in accepting(descriptor):
        found = run(descriptor, sku, inputs, device).values
        assert found.tobytes() == inputs.base.tobytes(), sku.name


@properties
@given(small_shapes, kinds, kinds, seeds)
def test_a_kronecker_product_with_1_is_the_other_half(device, shape, kind, factor, seed):
    whole = Shape(1, 1, shape.out, shape.channels, shape.kernel)
    kron = describe(whole, (Kronecker(1, 1, whole.out, whole.channels, factor, factor),), kind)
    dense = describe(whole, (Dense(factor),), kind)
    inputs = Inputs.random(dense, np.random.default_rng(seed))
    with_one = dataclasses.replace(inputs, factors=[[np.ones((1, 1), factor.values), *inputs.factors[0]]])
    exact, magnitude = inputs.reference(dense)
    np.testing.assert_array_equal(with_one.reference(kron)[0], exact)
    for sku in accepting(kron):
        assert_promised(run(kron, sku, with_one, device), exact, magnitude, kind)


@properties
@given(small_shapes, st.integers(1, 5), kinds, kinds, seeds)
def test_a_tucker_product_with_an_identity_core_is_the_plain_one(device, shape, rank, kind, factor, seed):
    flat = Shape(1, 1, shape.out, shape.channels)
    tucker = describe(flat, (LowRank(rank, factor, factor, left_transposed=True, core=factor, core_rank=rank),), kind)
    plain = describe(flat, (LowRank(rank, factor, factor),), kind)
    inputs = Inputs.random(plain, np.random.default_rng(seed))
    left, right = inputs.factors[0]
    core = np.eye(rank).astype(factor.values)[..., None]
    with_core = dataclasses.replace(inputs, factors=[[np.ascontiguousarray(left.T), right, core]])
    exact, magnitude = inputs.reference(plain)
    for sku in accepting(tucker):
        assert_promised(run(tucker, sku, with_core, device), exact, magnitude, kind)


@properties
@given(small_shapes, st.permutations(range(3)), kinds, seeds)
def test_adapters_commute(device, shape, order, kind, seed):
    sources = wc.SOURCES["locon, lokr, dense"](shape, itertools.cycle([BF16, F32, F16]))
    first, second = (describe(shape, picked, kind) for picked in (sources, tuple(sources[i] for i in order)))
    inputs = Inputs.random(first, np.random.default_rng(seed))
    factors, scales = ([values[i] for i in order] for values in (inputs.factors, inputs.scales))
    permuted = dataclasses.replace(inputs, factors=factors, scales=scales)
    exact, magnitude = inputs.reference(first)
    for sku in accepting(second):
        assert_promised(run(second, sku, permuted, device), exact, magnitude, kind)


@properties
@given(small_shapes, st.sampled_from(sorted(set(wc.SOURCES) - {"ia3 out", "ia3 in"})), kinds, seeds)
def test_layouts_hold_the_same_values(device, shape, source, kind, seed):
    rng, results = np.random.default_rng(seed), []
    sources = wc.SOURCES[source](shape, itertools.cycle([BF16]))
    inputs = None
    for layout in WeightLayout:
        descriptor = describe(shape, sources, kind, Sink.DELTA, layout)
        inputs = inputs or Inputs.random(descriptor, rng)
        results.append(run(descriptor, WeightPlan.skus[-1], inputs, device).values)
    axes = (*range(2, results[0].ndim), 1, 0)
    assert results[0].transpose(axes).tobytes() == results[1].tobytes()


def operands(device, descriptor):
    """Arguments that fit, and the buffers behind them."""
    made = {o.name: device.upload(np.zeros(o.shape, o.element.storage)).tensor(o.element, o.shape)
            for o in descriptor.operands()}  # fmt: skip
    return made


def arguments(made, **changes):
    made = {**made, **changes}
    factors = [value for name, value in made.items() if name.startswith("source0")]
    return WeightArgs(made["out"], [factors], [1.0], made["base"])


def as_read_only(tensor):
    return TensorRef(tensor.data, tensor.shape, tensor.stride, tensor.element, tensor.available, tensor.device)


def test_wrong_operands_are_refused_by_name(device, poisoned):
    descriptor = describe(EVEN, KRONECKER, BF16)
    plan = WeightPlan.select(None, descriptor, device=device)
    good = operands(device, descriptor)
    plan.can_implement(arguments(good))
    out, base = good["out"], good["base"]
    small = poisoned(6)
    rows = [
        ({"base": poisoned(400).tensor(BF16, (10, 20))}, InvalidProblem,
         "weight: operand base has shape (10, 20), wanted (10, 16)"),
        ({"base": poisoned(640).tensor(F32, (10, 16))}, InvalidProblem,
         "weight: operand base holds f32, wanted bf16; cast it first"),
        ({"source0.w1": poisoned(8).tensor(F16, (2, 2))}, InvalidProblem,
         "weight: operand source0.w1 holds f16, wanted bf16; cast it first"),
        ({"out": as_read_only(out)}, InvalidProblem,
         "weight: operand out is written, but a read-only TensorRef was given; wanted a TensorMut"),
        ({"base": dataclasses.replace(base, device=base.device + 1)}, InvalidProblem,
         f"weight: operand base is on device {base.device + 1}, the plan is for device {base.device}"),
        ({"base": dataclasses.replace(base, stride=(1, 10))}, InvalidProblem,
         "weight: operand base has strides (1, 10); wanted it contiguous, copy it first"),
        ({"base": np.zeros((10, 16), np.uint16)}, InvalidProblem,
         "weight: operand base is a ndarray; wanted a TensorRef"),
        ({"base": None}, InvalidProblem, "weight: 3 operands given, wanted 4: out, base, source0.w1, source0.w2"),
        ({"source0.w1": TensorMut(small.pointer(np.uint16), (2, 2), (2, 1), BF16, 3, device.ordinal)},
         BufferTooSmall, "weight: source0.w1: the buffer holds 3 elements, wanted 4; pass the whole tensor"),
    ]  # fmt: skip
    for changes, error, message in rows:
        with pytest.raises(error, match="^" + re.escape(message)):
            plan.can_implement(arguments(good, **changes))


@SKUS
def test_misaligned_operands_are_refused(device, poisoned, sku):
    descriptor = describe(EVEN, KRONECKER, BF16)
    plan = wc.select(descriptor, sku, device)
    good = operands(device, descriptor)
    wanted, offset = (sku.alignment, 2) if sku.alignment else (2, 1)
    shifted = poisoned(400).tensor(BF16, (10, 16), byte_offset=offset)
    with pytest.raises(
        MisalignedOperand, match=rf"weight: operand base lies at address 0x\w+, wanted a multiple of {wanted} bytes"
    ):
        plan.can_implement(arguments(good, base=shifted))


def test_a_small_workspace_is_refused(device):
    descriptor = describe(EVEN, (LowRank(3, BF16, BF16, core=BF16, core_rank=2),), BF16)
    plan = WeightPlan.select(None, descriptor, device=device)
    needed = plan.workspace_size()
    assert needed > 0
    args = arguments(operands(device, descriptor))
    for workspace, size in ((None, 0), (Workspace(device.allocate(needed - 1)), needed - 1)):
        with pytest.raises(WorkspaceTooSmall) as refused:
            plan.run(device.stream(), workspace, args)
        assert str(refused.value) == (
            f"weight: workspace of {size} bytes, wanted {needed}; allocate plan.workspace_size() bytes"
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"out_features": -1}, "weight: extents must not be negative"),
        ({"sources": ()}, "weight: no sources given, wanted at least one"),
        ({"base": None}, "weight: sink merge with base None: only a delta has no base"),
        ({"sink": Sink.DELTA}, "weight: sink delta with base"),
        ({"sink": Sink.DORA_ROW}, "weight: sink dora by output row with magnitude None: DoRA alone has one"),
        ({"magnitude": F32}, "DoRA alone has one"),
        (
            {"base": None, "sink": Sink.DELTA, "sources": (ChannelScale(BF16, "in"),)},
            "weight: a channel scale multiplies the base, so it has no delta of its own",
        ),
        ({"out": ElementKind.I32}, "weight: out holds i32, wanted one of bf16, f16, f32"),
        ({"sources": (Dense(ElementKind.I64),)}, "weight: source0.diff holds i64, wanted one of bf16, f16, f32"),
        ({"out_features": 9}, "source0: kron of (2, 2) and (5, 8) makes (10, 16), wanted (9, 16)"),
    ],
)
def test_descriptors_that_contradict_themselves_are_refused(changes, message):
    good = {"out_features": 10, "in_features": 16, "sources": KRONECKER, "out": BF16, "base": BF16}
    WeightDescriptor(**good)
    with pytest.raises(InvalidProblem, match=re.escape(message)):
        WeightDescriptor(**{**good, **changes})


@pytest.mark.parametrize("numbers", [{"scales": [1e39]}, {"scales": [math.nan]}, {"strength": -math.inf}])
def test_scales_beyond_fp32_are_refused(numbers, device):
    descriptor = describe(EVEN, KRONECKER, BF16)
    plan = WeightPlan.select(None, descriptor, device=device)
    args = arguments(operands(device, descriptor))
    for name, value in numbers.items():
        setattr(args, name, value)
    with pytest.raises(InvalidProblem, match=r"^weight: scale or strength .*, wanted a finite fp32 value"):
        plan.can_implement(args)


def test_every_refusal_is_listed(device):
    ragged = describe(Shape(1, 1, 3, 5), (LowRank(2, BF16, BF16),), BF16)
    with pytest.raises(NoSku) as refused:
        WeightPlan.select(None, ragged, PlanPreference(prefer_backend=BackendKind.MMA), device)
    assert refused.value.refusals.keys() == {sku.name for sku in WeightPlan.skus}
    assert "multiple of 8 (16-byte accesses), found 5" in str(refused.value)
    assert "portable: preference asks for mma" in str(refused.value)


def test_more_rows_than_a_grid_has_tiles_for_are_left_to_others(device):
    descriptor = describe(Shape(1, 1, MAX_ROWS + 1, 8), (LowRank(1, BF16, BF16),), BF16)
    assert MMA.refuses(descriptor) == f"wants at most {MAX_ROWS} rows, found {MAX_ROWS + 1}"
    assert WeightPlan.choose(descriptor, PlanPreference(), device).backend is BackendKind.PORTABLE


def test_a_limit_on_workspace_is_obeyed(device):
    tucker = describe(EVEN, (LowRank(3, BF16, BF16, core=BF16, core_rank=2),), BF16)
    with pytest.raises(NoSku, match=r"portable: needs [0-9]+ bytes of workspace, preference allows 8"):
        WeightPlan.select(None, tucker, PlanPreference(max_workspace_bytes=8), device)


def test_plans_are_cached_by_descriptor_and_preference(device):
    descriptor = describe(EVEN, KRONECKER, BF16)
    plan = WeightPlan.select(None, descriptor, device=device)
    assert WeightPlan.select(None, describe(EVEN, KRONECKER, BF16), PlanPreference(), device) is plan
    portable = WeightPlan.select(None, descriptor, PlanPreference(prefer_backend=BackendKind.PORTABLE), device)
    assert portable is not plan and portable.sku.backend is BackendKind.PORTABLE
