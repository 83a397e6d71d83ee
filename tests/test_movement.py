"""Windows, choices by an index and their gradients: bits as they were, sums in order."""

from __future__ import annotations

import math

import numpy as np
import pytest

from kernels.take import RANGE
from plans.core import ElementKind, InvalidProblem, NoSku, TensorMut, TensorRef, Workspace
from plans.core.precision import round_to
from plans.core.tensor import contiguous_strides
from plans.movement import WindowArgs, WindowDescriptor, WindowPlan
from plans.take import TakeArgs, TakeBackwardDescriptor, TakeBackwardPlan, TakeDescriptor, TakePlan

BF16, F16, F32, I32, I64 = ElementKind.BF16, ElementKind.F16, ElementKind.F32, ElementKind.I32, ElementKind.I64
KINDS = (BF16, F16, F32, I32, I64)


def array_of(rng, shape, kind):
    return (
        round_to(rng.integers(-100, 100, shape), kind) if kind in (I32, I64) else round_to(rng.normal(size=shape), kind)
    )


def run(device, plan, args):
    stream = device.stream()
    plan.run(stream, None, args)
    device.synchronize(stream)


def window(device, poisoned, descriptor, source):
    plan = WindowPlan.select(None, descriptor, device=device)
    buffer, out = device.upload(source), poisoned(math.prod(descriptor.shape) * source.itemsize)
    stride = descriptor.stride or contiguous_strides(descriptor.source_shape)
    data = buffer.pointer(descriptor.element.storage)
    ref = TensorRef(data, descriptor.source_shape, stride, descriptor.element, source.size, device.ordinal, buffer)
    run(device, plan, WindowArgs(out.tensor(descriptor.element, descriptor.shape), ref))
    wide = math.prod(descriptor.shape[-1:]) * source.itemsize % 16 == 0 and descriptor.shape
    assert plan.chosen.name == ("lines" if wide else "portable")
    return device.download(out, source.dtype, descriptor.shape)


WINDOWS = [
    ("padding", (6, 9), (3, 5), (-2, -1), (1, 1), {"fill": 3}),
    ("reversal", (3, 5), (3, 5), (2, 4), (-1, -1), {}),
    ("cropping and one axis reversed", (2, 3), (3, 5), (1, 4), (1, -1), {}),
    ("upper triangle", (2, 4, 5), (2, 4, 5), (0, 0, 0), (1, 1, 1), {"diagonal": 1}),
    ("padding to whole accesses", (6, 24), (3, 17), (-2, -3), (1, 1), {"fill": 3}),
    ("whole lines reversed", (5, 16), (5, 16), (4, 15), (-1, -1), {}),
    ("lower part below a diagonal, three axes", (3, 8, 32), (3, 8, 30), (0, 0, 1), (1, 1, 1), {"diagonal": -2}),
    ("six axes", (2, 1, 3, 2, 2, 2), (2, 1, 3, 2, 2, 2), (0,) * 6, (1,) * 6, {}),
    ("a number", (), (), (), (), {}),
    ("nothing", (0, 3), (2, 3), (0, 0), (1, 1), {}),
    ("all outside", (37,), (5,), (5,), (1,), {"fill": -1}),
]


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.value)
@pytest.mark.parametrize(
    ("shape", "of", "shifts", "signs", "options"), [w[1:] for w in WINDOWS], ids=[w[0] for w in WINDOWS]
)
def test_windows(device, poisoned, rng, shape, of, shifts, signs, options, kind):
    source = array_of(rng, of, kind)
    descriptor = WindowDescriptor(shape, of, kind, shifts, signs, **options)
    np.testing.assert_array_equal(window(device, poisoned, descriptor, source), descriptor.reference(source))


def test_a_window_of_a_transposed_tensor(device, poisoned, rng):
    source = array_of(rng, (4, 3), I32)
    descriptor = WindowDescriptor((3, 4), (3, 4), I32, (0, 0), (1, 1), stride=(1, 3))
    np.testing.assert_array_equal(window(device, poisoned, descriptor, source), source.T)


def test_windows_that_contradict_themselves():
    with pytest.raises(InvalidProblem, match="wanted 2 numbers each"):
        WindowDescriptor((2, 3), (2, 3), F32, (0,), (1, 1))
    with pytest.raises(InvalidProblem, match="wanted 1 or -1"):
        WindowDescriptor((2,), (2,), F32, (0,), (2,))
    with pytest.raises(InvalidProblem, match="wanted two axes or more"):
        WindowDescriptor((2,), (2,), F32, (0,), (1,), diagonal=0)
    with pytest.raises(NoSku, match="takes up to 6 axes, not 7"):
        WindowPlan.select(None, WindowDescriptor((1,) * 7, (1,) * 7, F32, (0,) * 7, (1,) * 7))


TAKES = [
    (1, 7, 5, 3), (2, 3, 40, 1), (3, 11, 4, 37), (1, 1, 1, 1), (2, 5, 0, 3), (1, 0, 3, 2), (1, 9, 30, 24),
    (2, 6, 5, 64),
]  # fmt: skip


@pytest.mark.parametrize("elementwise", [False, True], ids=["rows", "elements"])
@pytest.mark.parametrize("extents", TAKES, ids=str)
def test_choices_and_their_gradients(device, poisoned, rng, extents, elementwise):
    outer, n, chosen, inner = extents
    kind, index_kind = KINDS[sum(extents) % 3], (I32, I64)[chosen % 2]
    descriptor = TakeDescriptor(*extents, kind, index_kind, elementwise)
    index = rng.integers(-1, n + 1, descriptor.index_operand.shape).astype(index_kind.values)
    source = array_of(rng, (outer, n, inner), kind)
    out = poisoned(descriptor.operands()[0].nbytes)
    place = device.upload(index).tensor(index_kind, index.shape)
    args = TakeArgs(out.tensor(kind, descriptor.out_shape), device.upload(source).tensor(kind, source.shape), place)
    run(device, TakePlan.select(None, descriptor, device=device), args)
    found = device.download(out, kind.values, descriptor.out_shape)
    np.testing.assert_array_equal(found.astype(np.float64), descriptor.reference(source, index).astype(np.float64))

    backward = TakeBackwardDescriptor(*extents, kind, index_kind, elementwise)
    check_added(device, backward, array_of(rng, descriptor.out_shape, kind), index, np.zeros((outer, n, inner)))


def check_added(device, descriptor, d_out, index, before):
    plan = TakeBackwardPlan.select(None, descriptor, device=device)
    d_source = device.upload(before.astype(np.float32))
    target, size = d_source.tensor(F32, before.shape), plan.workspace_size()
    tensors = [device.upload(d_out).tensor(descriptor.element, d_out.shape),
               device.upload(index).tensor(descriptor.index, index.shape)]  # fmt: skip
    stream = device.stream()
    plan.run(stream, Workspace(device.allocate(size, stream)) if size else None, TakeArgs(target, *tensors))
    device.synchronize(stream)
    found, (exact, magnitude) = (
        device.download(d_source, np.float32, before.shape), descriptor.backward_reference(d_out, index)
    )  # fmt: skip
    kept = plan.precision_guarantee.accepts(found, before + exact, magnitude + 2 * np.abs(before), F32)
    assert kept.all()
    untouched = magnitude == 0
    np.testing.assert_array_equal(found[untouched], before[untouched].astype(np.float32))


@pytest.mark.parametrize(
    ("extents", "aligned"),
    [((1, 3, 200, 8), True), ((2, 40, 150, 16), True), ((1, 2, 130, 5), True), ((1, 4, 64, 8), False),
     ((3, 5, 65, 400), True), ((1, 9, RANGE + 37, 8), True)],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("kind", [BF16, F32], ids=lambda k: k.value)
def test_gradients_of_rows_that_many_places_name_are_added_to_what_is_there(device, rng, extents, aligned, kind):
    """Several ranges of places, rows of several segments; rows that no place names keep their values."""
    outer, n, chosen, inner = extents
    index = np.minimum(rng.integers(-1, n + 1, chosen), rng.integers(0, n + 1, chosen)).astype(np.int32)
    index[index == n - 1] = n
    descriptor = TakeBackwardDescriptor(*extents, kind, I32, aligned=aligned)
    d_out = array_of(rng, (outer, chosen, inner), kind)
    before = array_of(rng, (outer, n, inner), F32).astype(np.float64)
    check_added(device, descriptor, d_out, index, before)


def test_integers_are_chosen_and_an_index_outside_shows(device, poisoned):
    descriptor = TakeDescriptor(1, 3, 4, 1, I64, I32)
    out = poisoned(32)
    source, index = np.array([5, 6, 7]).reshape(1, 3, 1), np.array([2, 0, 3, -1], np.int32)
    args = TakeArgs(
        out.tensor(I64, (1, 4, 1)), device.upload(source).tensor(I64, (1, 3, 1)), device.upload(index).tensor(I32, (4,))
    )
    run(device, TakePlan.select(None, descriptor, device=device), args)
    assert device.download(out, np.int64, (4,)).tolist() == [7, 5, -1, -1]


def test_choices_that_contradict_themselves(device):
    with pytest.raises(InvalidProblem, match="operand index holds f32, wanted i32 or i64"):
        TakeDescriptor(1, 2, 3, 4, F32, F32)
    with pytest.raises(NoSku, match="adds bf16, f16, f32, not i32"):
        TakeBackwardPlan.select(None, TakeBackwardDescriptor(1, 2, 3, 4, I32, I32), device=device)


def test_a_window_may_be_written_into_a_larger_tensor(device, poisoned, rng):
    source = array_of(rng, (2, 3), I32)
    descriptor = WindowDescriptor((2, 3), (2, 3), I32, (0, 0), (1, 1), out_stride=(5, 1))
    out = poisoned(40)
    target = TensorMut(out.pointer(np.int32), (2, 3), (5, 1), I32, 10, device.ordinal, out)
    run(
        device,
        WindowPlan.select(None, descriptor, device=device),
        WindowArgs(target, device.upload(source).tensor(I32, (2, 3))),
    )
    found = device.download(out, np.int32, (2, 5))
    np.testing.assert_array_equal(found[:, :3], source)
    assert (found[:, 3:] == -1).all()


def test_a_window_of_which_nothing_is_aligned(device, poisoned, rng):
    source = array_of(rng, (2, 9), BF16)
    descriptor = WindowDescriptor((2, 8), (2, 9), BF16, (0, 1), (1, 1), aligned=False)
    out = poisoned(34)
    target = TensorMut(out.pointer(np.uint16, 2), (2, 8), (8, 1), BF16, 16, device.ordinal, out)
    plan = WindowPlan.select(None, descriptor, device=device)
    run(device, plan, WindowArgs(target, device.upload(source).tensor(BF16, (2, 9))))
    assert plan.chosen.name == "portable"
    found = device.download(out, BF16.values, (17,))
    np.testing.assert_array_equal(found[1:].reshape(2, 8), source[:, 1:])
