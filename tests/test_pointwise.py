"""Every scalar function and its derivative against float64, and every way in which operands lie."""

from __future__ import annotations

import math

import numpy as np
import pytest

from plans.core import ElementKind, InvalidProblem, NoSku, TensorMut, TensorRef
from plans.core.precision import round_to
from plans.core.tensor import contiguous_strides
from plans.expression import ARITY, COMPOSED, FUNCTIONS, ONE, Expr, call, evaluate, gradients, leaf, lower
from plans.pointwise import PointwiseArgs, PointwiseDescriptor, PointwisePlan, View

BF16, F16, F32 = ElementKind.BF16, ElementKind.F16, ElementKind.F32

POSITIVE = {"sqrt", "root", "rsqrt", "log", "reciprocal"}
EXTRA = {"clamp": (-0.75, 1.25), "leaky_relu": (0.1,)}
CASES = {
    name: call(name, *map(leaf, range(ARITY.get(name, 2 if name in ("lt", "le") else 1))), *EXTRA.get(name, ()))
    for name in (*FUNCTIONS, *COMPOSED)
}


def samples(rng, name, count, size):
    """Arguments in the function's domain, some of them equal, some large."""
    x = [rng.uniform(-4, 4, size) for _ in range(count)]
    if name in POSITIVE:
        x[0] = np.exp(rng.uniform(-20, 20, size))
    if name == "pow":
        x[0] = np.exp(rng.uniform(-3, 3, size))
    if name in ("gt", "ge", "eq", "ne", "lt", "le", "maximum", "minimum", "where"):
        x[0], x[1] = np.round(x[0]), np.round(x[1])
    if name in ("sin", "cos"):
        x[0][::3] *= 1e4
    return x


class Memory:
    """Operands in device memory: made from arrays or poisoned, contiguous or with strides of the caller's."""

    def __init__(self, device, poisoned):
        self.device, self.poisoned = device, poisoned

    def source(self, array, stride=None, shape=None, skip=0):
        buffer = self.device.upload(array)
        kind = ElementKind.of(array.dtype)
        shape = array.shape if shape is None else shape
        data = buffer.pointer(kind.storage, skip * kind.itemsize)
        stride = contiguous_strides(shape) if stride is None else stride
        return TensorRef(data, shape, stride, kind, array.size - skip, self.device.ordinal, buffer)

    def target(self, shape, kind, stride=None, size=None):
        size = math.prod(shape) if size is None else size
        buffer = self.poisoned(size * kind.itemsize)
        stride = contiguous_strides(shape) if stride is None else stride
        return TensorMut(buffer.pointer(kind.storage), shape, stride, kind, size, self.device.ordinal, buffer)

    def read(self, tensor, size=None):
        size = tensor.count if size is None else size
        return self.device.download(tensor.owner, tensor.element.values, (size,))


@pytest.fixture
def memory(device, poisoned):
    return Memory(device, poisoned)


def run(device, descriptor, targets, sources, scalars=()):
    plan = PointwisePlan.select(None, descriptor, device=device)
    stream = device.stream()
    plan.run(stream, None, PointwiseArgs(targets, sources, scalars))
    device.synchronize(stream)
    return plan


def assert_kept(plan, found, reference, kind):
    exact, magnitude = reference
    kept = plan.precision_guarantee.accepts(found.reshape(exact.shape), exact, magnitude, kind)
    assert kept.all(), f"{found.reshape(exact.shape)[~kept][:4]} for {exact[~kept][:4]}"


@pytest.mark.parametrize("name", CASES)
def test_functions_and_derivatives_keep_their_bounds(device, memory, rng, name):
    expr = CASES[name]
    count = ARITY.get(name, 2 if name in ("lt", "le") else 1)
    inputs = [leaf(i) for i in range(count)]
    outputs = (expr, *gradients([expr], [leaf(count)], inputs))
    arrays = [x.astype(np.float32) for x in (*samples(rng, name, count, 37), rng.standard_normal(37))]
    views = (View(F32),) * (count + 1)
    descriptor = PointwiseDescriptor(outputs, (37,), views, (View(F32),) * len(outputs))
    targets = [memory.target((37,), F32) for _ in outputs]
    plan = run(device, descriptor, targets, [memory.source(x) for x in arrays])
    for target, reference in zip(targets, descriptor.reference(arrays), strict=True):
        assert_kept(plan, memory.read(target), reference, F32)


@pytest.mark.parametrize("name", CASES)
def test_derivatives_are_those_of_finite_differences(rng, name):
    expr = CASES[name]
    count = ARITY.get(name, 2 if name in ("lt", "le") else 1)
    inputs = [leaf(i) for i in range(count)]
    slopes = gradients([expr], [ONE], inputs)
    x = [rng.uniform(0.3, 3, 20) * rng.choice([1, 1 if name in (*POSITIVE, "pow") else -1], 20) for _ in range(count)]
    far = [np.abs(np.subtract.outer([0, -0.75, 1.25, *range(-3, 4)], v)).min(0) > 1e-3 for v in x]
    ok = np.logical_and.reduce(far) & (np.abs(x[0] - x[-1]) > 1e-3 if count > 1 else True)
    for i, slope in enumerate(slopes):
        step = [1e-6 * (k == i) for k in range(count)]
        high, low = (evaluate([expr], [v + s * h for v, h in zip(x, step, strict=True)])[0][0] for s in (1, -1))
        found = np.broadcast_to(evaluate([slope], x)[0][0], (20,))
        np.testing.assert_allclose(found[ok], ((high - low) / 2e-6)[ok], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 257, 1031])
@pytest.mark.parametrize("kind", [BF16, F16, F32])
def test_contiguous_operands_of_every_kind_and_size(device, memory, rng, kind, size):
    x, y, s = leaf(0), leaf(1), leaf(2)
    arrays = [round_to(rng.standard_normal(size), k) for k in (kind, F32)]
    descriptor = PointwiseDescriptor(
        (x.silu() * y + s, x - y), (size,), (View(kind), View(F32)), (View(kind), View(F16)), 1
    )
    targets = [memory.target((size,), kind), memory.target((size,), F16)]
    plan = run(device, descriptor, targets, [memory.source(a) for a in arrays], [0.3])
    assert plan.chosen.name == "flat"
    for target, reference in zip(targets, descriptor.reference(arrays, [0.3]), strict=True):
        assert_kept(plan, memory.read(target), reference, target.element)


STRIDED = [
    ("row and column that repeat", (5, 16), [(16, 1), (0, 1), (1, 0)], "rows"),
    ("three axes, the middle one repeats", (3, 4, 8), [(32, 8, 1), (8, 0, 1), (0, 0, 0)], "rows"),
    ("ragged rows", (5, 7), [(7, 1), (0, 1), (1, 0)], "strided"),
    ("a transposed matrix", (6, 8), [(8, 1), (1, 6), (8, 1)], "strided"),
    ("six axes", (2, 3, 2, 3, 2, 3), [(108, 36, 18, 6, 3, 1), (1, 2, 6, 12, 36, 72), (0, 1, 0, 3, 0, 9)], "strided"),
    ("one number", (1, 1), [(1, 1), (1, 1), (0, 0)], "flat"),
    ("a transposed matrix in eights", (8, 16), [(16, 1), (1, 8), (16, 1)], "turned"),
    ("all of them transposed, of several tiles", (72, 136), [(1, 72), (1, 80), (1, 72)], "turned"),
    ("a part of a transposed matrix beside a row", (136, 8), [(1, 160), (1, 136), (0, 1)], "turned"),
    (
        "a batch of transposed matrices beside a column",
        (3, 16, 72),
        [(1152, 1, 16), (1, 0, 0), (0, 1, 3200)],
        "turned",
    ),
    ("a batch of transposed matrices", (3, 16, 72), [(1152, 1, 16), (8, 1, 0), (1152, 72, 1)], "turned"),
    ("three axes, the first walked fastest", (16, 3, 8), [(1, 128, 16), (0, 0, 0), (1, 16, 48)], "turned"),
    ("across along two axes", (16, 8, 24), [(1, 16, 128), (8, 1, 128), (0, 0, 1)], "strided"),
    ("three axes, a column beside", (3, 24, 8), [(192, 1, 24), (8, 0, 0), (192, 1, 24)], "turned"),
    ("all of one number", (40,), [(0,), (0,), (0,)], "rows"),
]


@pytest.mark.parametrize(("shape", "strides", "sku"), [row[1:] for row in STRIDED], ids=[row[0] for row in STRIDED])
def test_operands_that_do_not_lie_alike(device, memory, rng, shape, strides, sku):
    outputs = (leaf(0) * leaf(1) + leaf(2),)
    views = tuple(View(kind, stride) for kind, stride in zip((F32, BF16, F32), strides, strict=True))
    sources, arrays = [], []
    for view in views:
        span = 1 + sum((e - 1) * s for e, s in zip(shape, view.stride, strict=True))
        flat = round_to(rng.standard_normal(span), view.element)
        steps = [s * flat.itemsize for s in view.stride]
        arrays.append(np.lib.stride_tricks.as_strided(flat, shape, steps))
        sources.append(memory.source(flat, view.stride, shape))
    descriptor = PointwiseDescriptor(outputs, shape, views, (View(F32),))
    target = memory.target(shape, F32)
    plan = run(device, descriptor, [target], sources)
    assert plan.chosen.name == sku
    assert_kept(plan, memory.read(target), descriptor.reference(arrays)[0], F32)


@pytest.mark.parametrize("kind", [BF16, F16, F32], ids=lambda k: k.value)
def test_a_turned_copy_is_the_same_bits(device, memory, rng, kind):
    """A result that lies across the source, and the other way round: two axes of which one is half a tile."""
    array = round_to(rng.standard_normal((96, 200)), kind)
    for stride, source in (((96, 1), (1, 200)), ((1, 96), (200, 1))):
        shape = (200, 96) if stride == (96, 1) else (96, 200)
        descriptor = PointwiseDescriptor((leaf(0),), shape, (View(kind, source),), (View(kind, stride),))
        target = memory.target(shape, kind, stride, array.size)
        plan = run(device, descriptor, [target], [memory.source(array, source, shape)])
        assert plan.chosen.name == "turned"
        np.testing.assert_array_equal(memory.read(target, array.size).reshape(-1), array.T.reshape(-1))


def test_a_target_with_strides_leaves_what_lies_between(device, memory, rng):
    array = rng.standard_normal((3, 5)).astype(np.float32)
    descriptor = PointwiseDescriptor((-leaf(0),), (3, 5), (View(F32),), (View(F32, (14, 2)),))
    target = memory.target((3, 5), F32, (14, 2), 42)
    run(device, descriptor, [target], [memory.source(array)])
    found = memory.read(target, 42).reshape(3, 14)
    np.testing.assert_array_equal(found[:, :9:2], -array)
    assert np.isnan(np.delete(found, range(0, 10, 2), 1)).all()


def test_operands_that_are_not_aligned(device, memory, rng):
    array = rng.standard_normal(33).astype(np.float32)
    descriptor = PointwiseDescriptor((leaf(0) + 1.0,), (32,), (View(F32),), (View(F32),), aligned=False)
    target = memory.target((32,), F32)
    plan = run(device, descriptor, [target], [memory.source(array, shape=(32,), skip=1)])
    assert plan.chosen.name == "strided"
    np.testing.assert_array_equal(memory.read(target), array[1:] + np.float32(1))


@pytest.mark.parametrize("size", [8, 13])
def test_in_place(device, memory, rng, size):
    array = rng.standard_normal(size).astype(np.float32)
    x = memory.source(array)
    out = TensorMut(x.data, x.shape, x.stride, x.element, x.available, x.device, x.owner)
    run(device, PointwiseDescriptor((leaf(0) * leaf(0),), (size,), (View(F32),), (View(F32),)), [out], [x])
    np.testing.assert_array_equal(memory.read(out), array * array)


def test_nan_is_not_hidden(device, memory):
    array = np.array([np.nan, 1, -np.inf, np.inf], np.float32)
    names = ("maximum", "minimum", "relu", "sign", "abs", "gelu", "silu", "clamp")
    outputs = tuple(call(n, leaf(0), *(0.5,) * (n in ("maximum", "minimum")), *EXTRA.get(n, ())) for n in names)
    targets = [memory.target((4,), F32) for _ in names]
    descriptor = PointwiseDescriptor(outputs, (4,), (View(F32),), (View(F32),) * len(names))
    run(device, descriptor, targets, [memory.source(array)])
    assert [name for name, t in zip(names, targets, strict=True) if not np.isnan(memory.read(t)[0])] == []


def test_a_shared_part_is_computed_once():
    x, y = leaf(0), leaf(1)
    expr = (x.exp() * y) + (x.exp() * y).tanh()
    assert expr is (x.exp() * y) + (x.exp() * y).tanh()
    assert [step[0] for step in lower([expr], [x, y])[1]] == ["exp", "mul", "tanh", "add"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((leaf(1),), (4,), (View(F32),), (View(F32),)), "reads beyond its 1 arguments"),
        (((leaf(0),), (4,), (View(F32),), ()), "0 targets, wanted 1"),
        (((leaf(0),), (4,), (View(F32, (1, 1)),), (View(F32),)), r"strides \(1, 1\), wanted one"),
        (((leaf(0),), (4,), (View(F32, (-1,)),), (View(F32),)), r"strides \(-1,\), wanted one, not negative"),
        (
            ((leaf(0),), (4,), (View(F32),), (View(F32, (0,)),)),
            r"a target has strides \(0,\), wanted each element once",
        ),
    ],
)
def test_descriptors_that_contradict_themselves(arguments, message):
    with pytest.raises(InvalidProblem, match=message):
        PointwiseDescriptor(*arguments)


def test_integers_are_refused(device):
    descriptor = PointwiseDescriptor((leaf(0),), (4,), (View(ElementKind.I32),), (View(F32),))
    with pytest.raises(NoSku, match="computes on bf16, f16, f32, not i32"):
        PointwisePlan.select(None, descriptor, device=device)


def test_tensors_that_overlap_or_lie_otherwise_are_refused(device, memory):
    descriptor = PointwiseDescriptor((leaf(0),), (4, 2), (View(F32, (1, 4)),), (View(F32),))
    x = memory.source(np.zeros((4, 2), np.float32))
    plan = PointwisePlan.select(None, descriptor, device=device)
    with pytest.raises(InvalidProblem, match=r"operand x0 has strides \(2, 1\); wanted \(1, 4\)"):
        plan.can_implement(PointwiseArgs([memory.target((4, 2), F32)], [x]))
    turned = TensorRef(x.data, x.shape, (1, 4), F32, 8, x.device, x.owner)
    same = TensorMut(x.data, x.shape, x.stride, F32, 8, x.device, x.owner)
    with pytest.raises(InvalidProblem, match="operand out0 is written"):
        plan.can_implement(PointwiseArgs([same], [turned]))


def test_expressions_are_read_back():
    assert repr(leaf(0) * 2.0 + leaf(1)) == "add(mul(x0, 2), x1)"
    assert isinstance(leaf(0).gelu(), Expr)
