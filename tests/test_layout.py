"""Layout conversions and casts: plans against NumPy, bit for bit, and the library's functions over them."""

from __future__ import annotations

import itertools

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lycoris.buffers import DeviceArray
from lycoris.layout import nchw_to_nhwc, nhwc_to_nchw, to_checkpoint, to_flame
from lycoris.ops import cast
from plans.cast import CastArgs, CastDescriptor, CastPlan
from plans.core import BackendKind, ElementKind, InvalidProblem, MisalignedOperand, NoSku, PlanPreference
from plans.core.precision import round_to
from plans.layout import Conversion, LayoutArgs, LayoutDescriptor, LayoutPlan

MOVED = (ElementKind.BF16, ElementKind.F16, ElementKind.F32, ElementKind.I32)
FLOATS = (ElementKind.BF16, ElementKind.F16, ElementKind.F32)
SHAPES = [
    (1, 1),
    (1, 37),
    (31, 33),
    (64, 32),
    (0, 5),
    (5, 0),
    (2, 7, 13),
    (3, 1, 5),
    (2, 33, 2, 3),
    (5, 7, 3, 3),
    (1, 34, 5, 7),
    (3, 0, 3, 3),
    (2, 3, 2, 5, 3),
]
INVERSE = {
    Conversion.TO_NCHW: Conversion.TO_NHWC,
    Conversion.TO_FLAME: Conversion.TO_CHECKPOINT,
}


def patterns(rng, shape, kind):
    """Every bit at random, NaNs with their payloads among them."""
    return rng.integers(0, 256, (*shape, kind.itemsize), np.uint8).view(kind.storage).reshape(shape)


def run_plan(device, plan, args, out, kind, shape):
    stream = device.stream()
    plan.run(stream, None, args)
    device.synchronize(stream)
    return device.download(out, kind.storage, shape, stream)


def bits(array):
    return array.view(f"u{array.dtype.itemsize}")


@pytest.mark.parametrize("kind", MOVED, ids=lambda kind: kind.value)
@pytest.mark.parametrize("conversion", Conversion, ids=lambda conversion: conversion.name.lower())
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_conversion_moves_every_bit(device, poisoned, rng, conversion, shape, kind):
    descriptor = LayoutDescriptor(shape, kind, conversion)
    source = patterns(rng, shape, kind)
    out = poisoned(source.nbytes)
    plan = LayoutPlan.select(None, descriptor, device=device)
    args = LayoutArgs(out.tensor(kind, descriptor.out_shape), device.upload(source).tensor(kind, shape))
    found = run_plan(device, plan, args, out, kind, descriptor.out_shape)
    np.testing.assert_array_equal(bits(found), bits(descriptor.reference(source)))


def test_the_reference_says_what_the_names_say():
    x = np.arange(2 * 3 * 5 * 7).reshape(2, 3, 5, 7)
    for conversion, expected in {
        Conversion.TO_NCHW: np.einsum("nhwc->nchw", x),
        Conversion.TO_NHWC: np.einsum("nchw->nhwc", x),
        Conversion.TO_FLAME: np.einsum("oihw->hwio", x),
        Conversion.TO_CHECKPOINT: np.einsum("hwio->oihw", x),
    }.items():
        descriptor = LayoutDescriptor(x.shape, ElementKind.I32, conversion)
        np.testing.assert_array_equal(descriptor.reference(x), expected)
        assert descriptor.out_shape == expected.shape


@settings(max_examples=20)
@given(
    shape=st.lists(st.integers(1, 9), min_size=2, max_size=5).map(tuple),
    pair=st.sampled_from(list(INVERSE.items())),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_conversion_and_its_inverse_change_nothing(shape, pair, seed):
    source = np.random.default_rng(seed).standard_normal(shape, np.float32)
    there, back = (nhwc_to_nchw, nchw_to_nhwc) if pair[0] is Conversion.TO_NCHW else (to_flame, to_checkpoint)
    array = DeviceArray.from_numpy(source)
    np.testing.assert_array_equal(back(there(array)).numpy(), source)
    np.testing.assert_array_equal(there(back(array)).numpy(), source)


def test_functions_convert_as_their_names_say(rng):
    x = rng.standard_normal((2, 5, 7, 3), np.float32).astype(ml_dtypes.bfloat16)
    array = DeviceArray.from_numpy(x)
    for function, axes in {
        nhwc_to_nchw: (0, 3, 1, 2),
        nchw_to_nhwc: (0, 2, 3, 1),
        to_flame: (2, 3, 1, 0),
        to_checkpoint: (3, 2, 0, 1),
    }.items():
        converted = function(array)
        assert converted.kind is ElementKind.BF16
        np.testing.assert_array_equal(converted.numpy(), x.transpose(axes))
    linear = DeviceArray.from_numpy(x.reshape(10, 21))
    np.testing.assert_array_equal(to_flame(linear).numpy(), x.reshape(10, 21).T)


@pytest.mark.parametrize("shape", [(), (5,), (3, -1)])
def test_shapes_that_have_no_layout_are_refused(shape):
    with pytest.raises(InvalidProblem, match=r"layout: shape .*, wanted two or more axes, none of them negative"):
        LayoutDescriptor(shape, ElementKind.F32, Conversion.TO_FLAME)


@pytest.mark.parametrize(
    ("descriptor", "reason"),
    [
        (LayoutDescriptor((2, 3), ElementKind.I64, Conversion.TO_FLAME), "moves bf16, f16, f32, i32, not i64"),
        (LayoutDescriptor((1, 2**31), ElementKind.F32, Conversion.TO_FLAME), "takes fewer than 2**31 rows"),
    ],
)
def test_what_no_layout_kernel_moves_is_refused(device, descriptor, reason):
    with pytest.raises(NoSku) as refused:
        LayoutPlan.select(None, descriptor, device=device)
    assert reason in str(refused.value)


COUNTS = (0, 1, 7, 8, 9, 255, 257)


def special_values(rng, count, kind):
    """Values of every magnitude, ties, subnormals and overflows of the narrower kinds, infinities."""
    values = rng.standard_normal(count) * 2.0 ** rng.integers(-40, 40, count)
    ties = (1 + rng.integers(0, 512, count) / 512) * 2.0 ** rng.integers(-20, 17, count)
    edges = np.resize([0.0, -0.0, 65519.996, 65520.0, 2.0**-25, 1e-40, np.inf, -np.inf, 3.4e38], count)
    choice = rng.integers(0, 3, count)
    return round_to(np.select([choice == 0, choice == 1], [values, ties], edges), kind)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize(("source", "out"), list(itertools.product(FLOATS, repeat=2)), ids=lambda kind: kind.value)
def test_casts_round_once(device, poisoned, rng, source, out, count):
    values = special_values(rng, count, source)
    plan = CastPlan.select(None, CastDescriptor(count, source, out), device=device)
    target = poisoned(count * out.itemsize)
    args = CastArgs(target.tensor(out, (count,)), device.upload(values).tensor(source, (count,)))
    found = run_plan(device, plan, args, target, out, (count,)).view(out.values)
    exact, _ = plan.descriptor.reference(values)
    assert plan.precision_guarantee.rounding_units == 0
    np.testing.assert_array_equal(bits(found), bits(round_to(exact, out)))


@pytest.mark.parametrize("out", FLOATS, ids=lambda kind: kind.value)
def test_casts_keep_nan(out):
    source = DeviceArray.from_numpy(np.array([np.nan, 1.0] * 8 + [np.nan], np.float32))
    found = cast(source, out).numpy().astype(np.float32)
    np.testing.assert_array_equal(np.isnan(found), np.isnan(source.numpy()))


@pytest.mark.parametrize("kind", FLOATS, ids=lambda kind: kind.value)
def test_a_cast_to_the_same_kind_copies_bits(rng, kind):
    source = patterns(rng, (3, 7), kind).view(kind.values)
    copy = cast(DeviceArray.from_numpy(source), kind)
    assert copy.shape == (3, 7)
    np.testing.assert_array_equal(bits(copy.numpy()), bits(source))


def test_what_is_not_cast_is_refused(device):
    with pytest.raises(NoSku, match="converts between bf16, f16, f32, not i32"):
        CastPlan.select(None, CastDescriptor(3, ElementKind.F32, ElementKind.I32), device=device)
    with pytest.raises(NoSku, match="preference asks for mma"):
        CastPlan.select(
            None,
            CastDescriptor(3, ElementKind.F32, ElementKind.F32),
            PlanPreference(prefer_backend=BackendKind.MMA),
            device,
        )
    with pytest.raises(InvalidProblem, match="cast: -1 elements, wanted 0 or more"):
        CastDescriptor(-1, ElementKind.F32, ElementKind.F32)


def test_a_cast_wants_16_byte_alignment(device, poisoned):
    plan = CastPlan.select(None, CastDescriptor(4, ElementKind.BF16, ElementKind.F32), device=device)
    args = CastArgs(
        poisoned(64).tensor(ElementKind.F32, (4,)), poisoned(64).tensor(ElementKind.BF16, (4,), byte_offset=2)
    )
    with pytest.raises(MisalignedOperand, match=r"cast: operand source lies at .*, wanted a multiple of 16 bytes"):
        plan.can_implement(args)
