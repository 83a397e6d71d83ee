"""Philox against its published vectors, distributions, dropout; the same numbers for the same seed."""

from __future__ import annotations

import numpy as np
import pytest

from plans.core import ElementKind, InvalidProblem, NoSku
from plans.core.precision import round_to
from plans.random import (
    Distribution,
    DropoutArgs,
    DropoutDescriptor,
    DropoutPlan,
    RandomArgs,
    RandomDescriptor,
    RandomPlan,
    normal,
    philox,
    uniform,
)

BF16, F16, F32 = ElementKind.BF16, ElementKind.F16, ElementKind.F32
KINDS = pytest.mark.parametrize("kind", [BF16, F16, F32], ids=lambda k: k.value)
# Random123's known answer for a counter and a key of zeros.
ZEROS = [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


def draw(device, poisoned, descriptor, *rest):
    plan = RandomPlan.select(None, descriptor, device=device)
    out = poisoned(descriptor.operands()[0].nbytes)
    stream = device.stream()
    plan.run(stream, None, RandomArgs(out.tensor(descriptor.element, (descriptor.count,)), *rest))
    device.synchronize(stream)
    return plan, device.download(out, descriptor.element.values, (descriptor.count,))


def test_the_published_vector():
    assert philox(4, 0, 0).tolist() == ZEROS


@KINDS
@pytest.mark.parametrize("distribution", Distribution, ids=lambda d: d.value)
@pytest.mark.parametrize("count", [0, 1, 7, 8, 261])
def test_numbers(device, poisoned, count, distribution, kind):
    descriptor = RandomDescriptor(count, kind, distribution)
    rest = (-0.5, 2.0, 2**40 + 11, 2**33 + 5)
    plan, found = draw(device, poisoned, descriptor, *rest)
    exact, magnitude = descriptor.reference(*rest)
    assert plan.precision_guarantee.accepts(found, exact, magnitude, kind).all()


def test_streams_and_seeds_differ_and_repeat(device, poisoned):
    descriptor = RandomDescriptor(64, F32, Distribution.UNIFORM)
    draws = [draw(device, poisoned, descriptor, 0.0, 1.0, *key)[1] for key in ((1, 0), (1, 0), (1, 1), (2, 0))]
    np.testing.assert_array_equal(draws[0], draws[1])
    assert len({d.tobytes() for d in draws}) == 3


def test_the_distributions():
    words = philox(200_000, 3, 4)
    u, z = uniform(words), normal(words)
    assert 0 <= u.min() <= u.max() < 1
    assert abs(u.mean() - 0.5) < 0.003
    assert abs(u.std() - 12**-0.5) < 0.003
    assert abs(z.mean()) < 0.01
    assert abs(z.std() - 1) < 0.01
    assert abs((z**4).mean() - 3) < 0.1
    assert abs(np.corrcoef(z[0::2], z[1::2])[0, 1]) < 0.01


@KINDS
@pytest.mark.parametrize("count", [0, 1, 13, 261])
def test_dropout(device, poisoned, rng, count, kind):
    x = round_to(rng.standard_normal(count), kind)
    descriptor = DropoutDescriptor(count, kind, kind)
    plan = DropoutPlan.select(None, descriptor, device=device)
    out, stream = poisoned(x.nbytes), device.stream()
    args = DropoutArgs(out.tensor(kind, (count,)), device.upload(x).tensor(kind, (count,)), 0.3, 1 / 0.7, 9, 2)
    plan.run(stream, None, args)
    device.synchronize(stream)
    found = device.download(out, kind.values, (count,))
    exact, magnitude = descriptor.reference(x, 0.3, 1 / 0.7, 9, 2)
    assert plan.precision_guarantee.accepts(found, exact, magnitude, kind).all()
    if count > 200:
        assert 0.2 < (found == 0).mean() < 0.4


def test_what_is_refused(device, poisoned):
    with pytest.raises(InvalidProblem, match="random: -1 elements"):
        RandomDescriptor(-1, F32, Distribution.NORMAL)
    with pytest.raises(InvalidProblem, match="dropout: -1 elements"):
        DropoutDescriptor(-1, F32, F32)
    with pytest.raises(InvalidProblem, match="random: seed -1, wanted 0 to"):
        RandomArgs(None, 0.0, 1.0, -1, 0)
    with pytest.raises(NoSku, match="makes bf16, f16, f32, not i32"):
        RandomPlan.select(None, RandomDescriptor(4, ElementKind.I32, Distribution.NORMAL), device=device)
