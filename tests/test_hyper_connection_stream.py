"""The fast SKUs of hyper-connections: blocks that walk over samples, several runs and stages, and what they refuse.

That they compute the right thing for every shape that they take is tested beside the portable ones.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hyper_cases import assert_kept, problem, run, tensors_of

from kernels.hyper_connection import stream as kernel
from kernels.hyper_connection.stream import SM80_BYTES
from plans.core import BackendKind, ElementKind, MisalignedOperand, NoSku, PlanPreference, Workspace
from plans.hyper_connection import dynamic_stream_backward
from plans.hyper_connection.common import NamedArguments
from plans.hyper_connection.dynamic import DynamicHyperConnectionDescriptor, DynamicHyperConnectionPlan
from plans.hyper_connection.dynamic_backward import (
    DynamicHyperConnectionBackwardDescriptor,
    DynamicHyperConnectionBackwardPlan,
)
from plans.hyper_connection.split import (
    HyperConnectionPostDescriptor,
    HyperConnectionPostPlan,
    HyperConnectionPreDescriptor,
    HyperConnectionPrePlan,
)
from plans.hyper_connection.split_backward import (
    HyperConnectionPostBackwardDescriptor,
    HyperConnectionPostBackwardPlan,
    HyperConnectionPreBackwardDescriptor,
    HyperConnectionPreBackwardPlan,
)
from plans.hyper_connection.split_stream_backward import pieces_of
from plans.hyper_connection.static import HyperConnectionArgs, HyperConnectionDescriptor, HyperConnectionPlan
from plans.hyper_connection.static_backward import (
    HyperConnectionBackwardArgs,
    HyperConnectionBackwardDescriptor,
    HyperConnectionBackwardPlan,
)
from plans.hyper_connection.stream import Stream
from plans.hyper_connection.stream_backward import StreamBackwardProgram
from plans.sinkhorn import SinkhornMode

F32, BF16, F16 = ElementKind.F32, ElementKind.BF16, ElementKind.F16
EPS = 1e-5
PORTABLE = PlanPreference(prefer_backend=BackendKind.PORTABLE)


@pytest.fixture
def few_threads(monkeypatch):
    """Blocks of one warp, so that a thread takes two runs already of 264 channels."""
    monkeypatch.setattr(kernel, "MOST_THREADS", 32)


@pytest.mark.parametrize("stages", [2, 3, 4])
@pytest.mark.parametrize("static", ["exp", "given", None])
@pytest.mark.parametrize("role", ["full", "pre", "post"])
def test_a_walk_gives_the_bits_of_a_block_a_sample(device, poisoned, rng, monkeypatch, role, static, stages):
    monkeypatch.setattr(kernel, "MOST_STAGES", stages)
    batch, n, channels = shape = (7, 3, 40)
    if role == "post" and static == "exp":
        static = "given"
    m = n * (n + 2)
    x, y = (rng.standard_normal(s).astype(np.float32) for s in (shape, (batch, channels)))
    weights = rng.uniform(0.1, 1, (batch, m)).astype(np.float32)
    gamma, *logits = (rng.standard_normal(s).astype(np.float32) for s in (channels, n, n, n * n))
    buffers = [device.upload(array) for array in (x, y, weights, gamma, *logits)]
    pointers = [buffer.pointer(np.float32) for buffer in buffers]
    written = (batch, channels) if role == "pre" else shape
    results, stream = [], device.stream()
    for blocks in (batch, 1, 3):
        streaming = Stream(role, F32, F32 if role != "post" else None, shape, static, device, blocks)
        out = poisoned(4 * int(np.prod(written)))
        x_pointer, y_pointer, weights_pointer, gamma_pointer, *logit_pointers = pointers
        launch, arguments = streaming.bind(
            x_pointer, weights_pointer, out.pointer(np.float32), EPS, gamma_pointer, y_pointer, tuple(logit_pointers), 5
        )
        launch(stream, arguments)
        device.synchronize(stream)
        results.append(device.download(out, np.float32, written, stream))
    assert np.isfinite(results[0]).all()
    for other in results[1:]:
        np.testing.assert_array_equal(results[0], other)


@pytest.mark.parametrize("element", [F32, BF16], ids=lambda kind: kind.value)
def test_two_runs_of_a_thread(device, poisoned, rng, few_threads, element):
    descriptor = HyperConnectionDescriptor(3, 264, 2, 5, EPS, element)
    assert kernel.shape_for(element.value, 2, 264, SM80_BYTES).runs == 2
    arrays, exact = problem(rng, descriptor), {}
    exact["out"] = descriptor.reference(**arrays)
    tensors, stream = tensors_of(device, poisoned, descriptor, arrays), device.stream()
    plan = HyperConnectionPlan.make(descriptor, PlanPreference(), device)
    plan.run(stream, None, HyperConnectionArgs(**tensors))
    device.synchronize(stream)
    raw = device.download(tensors["out"].owner, element.storage, descriptor.shape, stream)
    assert_kept(plan, {"out": raw.view(element.values)}, exact)


def run_backward(device, poisoned, descriptor, program, arrays, workspace_bytes):
    tensors, stream = tensors_of(device, poisoned, descriptor, arrays), device.stream()
    workspace = Workspace(poisoned(workspace_bytes))
    for launch, arguments in program.bind(HyperConnectionBackwardArgs(**tensors), workspace):
        launch(stream, arguments)
    device.synchronize(stream)
    return written(device, descriptor, tensors, stream)


def written(device, descriptor, tensors, stream):
    """What a plan wrote, by name."""
    found = {}
    for operand in descriptor.operands():
        if operand.writes:
            raw = device.download(tensors[operand.name].owner, operand.element.storage, operand.shape, stream)
            found[operand.name] = raw.view(operand.element.values)
    return found


@pytest.mark.parametrize("blocks", [1, 2, 3])
@pytest.mark.parametrize("shape", [(7, 16, 4), (5, 8, 1), (6, 264, 2)], ids=str)
def test_the_gradients_of_a_walk(device, poisoned, rng, few_threads, shape, blocks):
    descriptor = HyperConnectionBackwardDescriptor(*shape, 5, EPS, F32)
    plan = HyperConnectionBackwardPlan.make(descriptor, PlanPreference(), device)
    assert plan.chosen.name == "stream"
    arrays = problem(rng, descriptor)
    program = StreamBackwardProgram(descriptor, SM80_BYTES, blocks)
    found = run_backward(device, poisoned, descriptor, program, arrays, plan.workspace_size())
    assert_kept(plan, found, descriptor.reference(**arrays))


@pytest.mark.parametrize("shape", [(5, 16, 4), (64, 8, 2), (3, 40, 3)], ids=str)
def test_the_gradients_of_samples_in_tiles(device, poisoned, rng, few_threads, shape):
    """What is chosen where two samples do not fit in shared memory, at shapes where they do."""
    (tile,) = (sku for sku in HyperConnectionBackwardPlan.skus if sku.name == "tile")
    descriptor = HyperConnectionBackwardDescriptor(*shape, 5, EPS, BF16)
    plan = HyperConnectionBackwardPlan(descriptor, tile, device)
    arrays = problem(rng, descriptor)
    found = run_backward(device, poisoned, descriptor, plan.program, arrays, plan.workspace_size())
    assert_kept(plan, found, descriptor.reference(**arrays))


def test_large_samples_get_tiles(device):
    for cls, plan, shape, name in (
        (HyperConnectionBackwardDescriptor, HyperConnectionBackwardPlan, (8, 7168, 4), "tile"),
        (DynamicHyperConnectionBackwardDescriptor, DynamicHyperConnectionBackwardPlan, (8, 7168, 4), "mma and stream"),
        (HyperConnectionDescriptor, HyperConnectionPlan, (8, 7168, 4), "stream"),
        (HyperConnectionPreBackwardDescriptor, HyperConnectionPreBackwardPlan, (8, 7168, 4), "stream"),
        (DynamicHyperConnectionDescriptor, DynamicHyperConnectionPlan, (8, 8192, 4), "mma and stream"),
    ):
        descriptor = cls(*shape, 20, EPS, BF16)
        assert plan.choose(descriptor, PlanPreference(), device).name == name


@pytest.mark.parametrize("warps", [1, 2112])
@pytest.mark.parametrize("shape", [(2, 264, 3), (5, 520, 1)], ids=str)
def test_a_sample_in_pieces(device, poisoned, rng, monkeypatch, shape, warps):
    """Shares of a sample whose channels one warp takes one after the other, or several at once."""
    monkeypatch.setattr(dynamic_stream_backward, "_WARPS", warps)
    descriptor = DynamicHyperConnectionBackwardDescriptor(*shape, 3, EPS, BF16)
    crew, steps = dynamic_stream_backward.crew_of(descriptor)
    assert (crew.parts, steps)[warps == 1] > 1 == (crew.parts, steps)[warps > 1]
    arrays = problem(rng, descriptor)
    forward = DynamicHyperConnectionDescriptor(*shape, 3, EPS, BF16)
    exact = forward.reference(**{k: v for k, v in arrays.items() if k not in ("d_out", "projected", "mixing")})
    arrays |= {name: exact[name][0].astype(np.float32) for name in ("projected", "mixing")}
    plan = DynamicHyperConnectionBackwardPlan.make(descriptor, PlanPreference(), device)
    tensors, stream = tensors_of(device, poisoned, descriptor, arrays), device.stream()
    workspace = Workspace(poisoned(plan.workspace_size()))
    plan.run(stream, workspace, NamedArguments(descriptor, **tensors))
    device.synchronize(stream)
    assert_kept(plan, written(device, descriptor, tensors, stream), descriptor.reference(**arrays))


@pytest.mark.parametrize(
    ("plan_class", "descriptor"),
    [
        (HyperConnectionPostBackwardPlan, HyperConnectionPostBackwardDescriptor(5, 264, 4, F32)),
        (HyperConnectionPostBackwardPlan, HyperConnectionPostBackwardDescriptor(5, 264, 4, F32, per_sample=True)),
        (HyperConnectionPreBackwardPlan, HyperConnectionPreBackwardDescriptor(5, 520, 3, 2, EPS, BF16)),
    ],
    ids=["post", "post, per sample", "pre"],
)
def test_channels_in_several_launches(device, poisoned, rng, few_threads, plan_class, descriptor):
    assert pieces_of(descriptor) > 1
    plan, arrays = plan_class.make(descriptor, PlanPreference(), device), problem(rng, descriptor)
    assert plan.chosen.name == "stream"
    tensors, stream = tensors_of(device, poisoned, descriptor, arrays), device.stream()
    workspace = Workspace(poisoned(plan.workspace_size()))
    plan.run(stream, workspace, NamedArguments(descriptor, **tensors))
    device.synchronize(stream)
    assert_kept(plan, written(device, descriptor, tensors, stream), descriptor.reference(**arrays))


STATIC = (3, 16, 4, 5, EPS, BF16)
CASES = {
    "static": (HyperConnectionPlan, HyperConnectionDescriptor(*STATIC), "stream"),
    "static backward": (HyperConnectionBackwardPlan, HyperConnectionBackwardDescriptor(*STATIC), "stream"),
    "dynamic": (DynamicHyperConnectionPlan, DynamicHyperConnectionDescriptor(*STATIC), "mma and stream"),
    "dynamic backward": (
        DynamicHyperConnectionBackwardPlan,
        DynamicHyperConnectionBackwardDescriptor(*STATIC),
        "mma and stream",
    ),
    "pre": (HyperConnectionPrePlan, HyperConnectionPreDescriptor(*STATIC), "stream"),
    "pre dynamic": (HyperConnectionPrePlan, HyperConnectionPreDescriptor(*STATIC, F32, BF16), "mma and stream"),
    "pre backward": (HyperConnectionPreBackwardPlan, HyperConnectionPreBackwardDescriptor(*STATIC, BF16), "stream"),
    "pre dynamic backward": (
        HyperConnectionPreBackwardPlan,
        HyperConnectionPreBackwardDescriptor(*STATIC, None, F32, SinkhornMode.SOFTMAX),
        "mma and stream",
    ),
    "post": (HyperConnectionPostPlan, HyperConnectionPostDescriptor(3, 16, 4, BF16), "stream"),
    "post backward": (
        HyperConnectionPostBackwardPlan,
        HyperConnectionPostBackwardDescriptor(3, 16, 4, F32, per_sample=True),
        "stream",
    ),
}


UNBOUNDED = ("static backward", "dynamic backward", "pre dynamic backward", "post backward")
"""Whose samples come in pieces."""


@pytest.mark.parametrize("which", CASES)
def test_which_sku_is_chosen_and_what_it_refuses(device, which):
    plan_class, descriptor, name = CASES[which]
    assert plan_class.choose(descriptor, PlanPreference(), device).name == name
    fast = PlanPreference(prefer_backend=plan_class.choose(descriptor, PlanPreference(), device).backend)
    large = 9 if which in ("static", "dynamic", "pre", "pre dynamic", "post") else 5
    for changed, reason in (
        ({"hidden_dim": 20}, "takes a multiple of 8 channels, not 20"),
        ({"n_streams": large, "hidden_dim": 64}, "streams"),
        *([] if which in UNBOUNDED else [({"hidden_dim": 1 << 16}, "holds two samples in a block, and .*")]),
        ({"batch": 2**31}, r"takes fewer than 2\*\*31 samples"),
    ):
        other = dataclasses.replace(descriptor, **changed)
        with pytest.raises(NoSku, match=reason):
            plan_class.choose(other, fast, device)
        if "batch" not in changed:
            assert plan_class.choose(other, PlanPreference(), device).name == "portable"


@pytest.mark.parametrize("which", [name for name in CASES if not name.startswith("static")])
def test_the_portable_sku_computes_the_same(device, poisoned, rng, which):
    plan_class, descriptor, _ = CASES[which]
    arrays = problem(rng, descriptor)
    for operand in descriptor.operands():
        if operand.name in ("mixing", "projected") and not operand.writes:
            arrays[operand.name] = np.abs(arrays[operand.name]) + np.float32(0.5)
    for preference in (None, PORTABLE):
        plan, found = run(device, poisoned, plan_class, descriptor, arrays, preference)
        kept = {name: found[name] for name in ("projected", "mixing") if name in found}
        assert_kept(plan, found, descriptor.reference(**arrays, **kept))


@pytest.mark.parametrize("which", ["dynamic", "pre", "post backward"])
def test_operands_are_aligned_to_16_bytes(device, poisoned, rng, which):
    plan_class, descriptor, _ = CASES[which]
    tensors = tensors_of(device, poisoned, descriptor, problem(rng, descriptor))
    plan, x = plan_class.select(None, descriptor, device=device), tensors["x_expanded"]
    shifted = poisoned(x.owner.nbytes + 8).tensor(x.element, x.shape, 8)
    with pytest.raises(
        MisalignedOperand, match=r"operand x_expanded lies at address .*, wanted a multiple of 16 bytes"
    ):
        plan.can_implement(NamedArguments(descriptor, **tensors | {"x_expanded": shifted}))


def test_a_sample_that_is_not_a_number_stays_alone(device, poisoned, rng):
    """What is read for samples beyond the last, or by the tensor core beside others, reaches no other sample."""
    descriptor = DynamicHyperConnectionDescriptor(5, 16, 4, 3, EPS, BF16)
    arrays = problem(rng, descriptor)
    arrays["x_expanded"][2, 1, 3] = np.nan
    _, found = run(device, poisoned, DynamicHyperConnectionPlan, descriptor, arrays)
    for value in found.values():
        bad = np.isnan(value.astype(np.float32)).reshape(5, -1)
        assert bad[2].any() and not bad[[0, 1, 3, 4]].any()
