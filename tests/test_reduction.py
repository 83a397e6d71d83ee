"""Reductions over rows, columns and everything, of expressions, against float64."""

from __future__ import annotations

import numpy as np
import pytest

from plans.core import ElementKind, InvalidProblem, NoSku, Workspace
from plans.core.precision import round_to
from plans.reduction import Reduction, ReductionArgs, ReductionDescriptor, ReductionPlan, elements, split_axes

BF16, F16, F32, I32 = ElementKind.BF16, ElementKind.F16, ElementKind.F32, ElementKind.I32
X = elements(1).full[0]


def run(device, poisoned, descriptor, arrays):
    plan = ReductionPlan.select(None, descriptor, device=device)
    out = poisoned(descriptor.operands()[0].nbytes)
    operands = descriptor.operands()[1:]
    sources = [device.upload(a).tensor(o.element, o.shape) for a, o in zip(arrays, operands, strict=True)]
    stream = device.stream()
    workspace = Workspace(poisoned(plan.workspace_size()))
    plan.run(
        stream, workspace, ReductionArgs(out.tensor(descriptor.out, (descriptor.outer, descriptor.inner)), sources)
    )
    device.synchronize(stream)
    return plan, device.download(out, descriptor.out.values, (descriptor.outer, descriptor.inner))


def check(device, poisoned, descriptor, arrays):
    plan, found = run(device, poisoned, descriptor, arrays)
    exact, magnitude = descriptor.reference(*arrays)
    kept = plan.precision_guarantee.accepts(found, exact, magnitude, descriptor.out)
    assert kept.all(), f"{found[~kept][:4]} for {exact[~kept][:4]}"


SHAPES = [
    (1, 1, 1), (3, 7, 1), (5, 24, 1), (2, 2051, 1), (1, 20011, 1), (1, 16384, 1), (9, 1, 1),
    (1, 5, 3), (1, 13, 40), (2, 9, 521), (3, 4, 8), (1, 1031, 5), (2, 3000, 16), (7, 1, 2),
]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("reduction", Reduction, ids=lambda r: r.value)
def test_reductions_keep_their_bounds(device, poisoned, rng, reduction, shape):
    kind = (BF16, F16, F32)[shape[1] % 3]
    x = round_to(rng.standard_normal(shape), kind)
    check(device, poisoned, ReductionDescriptor(reduction, X, *shape, (kind,), F32, scale=0.3), [x])


@pytest.mark.parametrize("shape", [(3, 0, 1), (2, 0, 5), (0, 4, 1), (0, 4, 3), (2, 3, 0)], ids=str)
def test_nothing_to_reduce(device, poisoned, shape):
    outer, _, inner = shape
    for reduction, value in ((Reduction.SUM, 0), (Reduction.MAX, -np.inf), (Reduction.MIN, np.inf)):
        descriptor = ReductionDescriptor(reduction, X, *shape, (F32,), F32)
        _, found = run(device, poisoned, descriptor, [np.zeros(shape, np.float32)])
        np.testing.assert_array_equal(found, np.full((outer, inner), value))


@pytest.mark.parametrize("shape", [(2, 300, 1), (1, 9000, 1), (2, 70, 16), (1, 600, 5)], ids=str)
def test_expressions_with_operands_by_line(device, poisoned, rng, shape):
    s = elements(2, lines=2)
    (x, y), (a, b) = s.full, s.row
    value = (x - a) * b * y.tanh() + s.position * s.inverse_n
    descriptor = ReductionDescriptor(Reduction.SUM, value, *shape, (BF16, F32), F32, lines=(F32, F32))
    arrays = [round_to(rng.standard_normal(shape), BF16), rng.standard_normal(shape).astype(np.float32)]
    arrays += list(rng.standard_normal((2, *shape[:2])).astype(np.float32))
    check(device, poisoned, descriptor, arrays)


def test_a_source_that_is_not_aligned_and_a_narrow_result(device, poisoned, rng):
    x = rng.standard_normal((2, 16, 1)).astype(np.float32)
    descriptor = ReductionDescriptor(Reduction.SUM, X, 2, 16, 1, (F32,), BF16, aligned=False)
    assert descriptor.width == 1
    check(device, poisoned, descriptor, [x])


def test_nan_is_not_hidden(device, poisoned):
    x = np.zeros((1, 3000, 1), np.float32)
    x[0, 77] = np.nan
    for reduction in Reduction:
        _, found = run(device, poisoned, ReductionDescriptor(reduction, X, 1, 3000, 1, (F32,), F32), [x])
        assert np.isnan(found).all()


def test_two_runs_have_the_same_bits(device, poisoned, rng):
    for shape in ((1, 20011, 1), (1, 1031, 5)):
        x = rng.standard_normal(shape).astype(np.float32)
        descriptor = ReductionDescriptor(Reduction.SUM, X, *shape, (F32,), F32)
        assert descriptor.parts > 1
        first, second = (run(device, poisoned, descriptor, [x])[1] for _ in range(2))
        np.testing.assert_array_equal(first.view(np.uint32), second.view(np.uint32))


@pytest.mark.parametrize(
    ("shape", "axes", "found"),
    [
        ((2, 3, 4), (2,), [(6, 4, 1)]),
        ((2, 3, 4), (0, 1), [(1, 6, 4)]),
        ((2, 3, 4), (0, 1, 2), [(1, 24, 1)]),
        ((2, 3, 4), (0, 2), [(6, 4, 1), (1, 2, 3)]),
        ((2, 1, 4), (1,), []),
        ((5,), (), []),
        ((2, 3, 4, 5), (1,), [(2, 3, 20)]),
        ((1, 3), (0,), [(1, 1, 3)]),
    ],
)
def test_axes_as_reductions(shape, axes, found, rng):
    assert split_axes(shape, axes) == found
    x = rng.standard_normal(shape)
    result = x
    for outer, n, inner in found:
        result = result.reshape(outer, n, inner).sum(1)
    np.testing.assert_allclose(result.ravel(), x.sum(axes).ravel())


def test_descriptors_that_contradict_themselves(device):
    with pytest.raises(InvalidProblem, match="wanted none of them negative"):
        ReductionDescriptor(Reduction.SUM, X, 1, -1, 1, (F32,), F32)
    with pytest.raises(InvalidProblem, match="reads others, or there are none"):
        ReductionDescriptor(Reduction.SUM, X, 1, 1, 1, (), F32)
    with pytest.raises(NoSku, match="computes on bf16, f16, f32, not i32"):
        ReductionPlan.select(None, ReductionDescriptor(Reduction.SUM, X, 1, 4, 1, (I32,), F32), device=device)
