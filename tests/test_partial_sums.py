"""The second launch of long sums: parts in any number, several results at once, turned, by one thread or by warps."""

from __future__ import annotations

import numpy as np
import pytest

from kernels import partial_sums as kernel
from plans.core import ElementKind, Workspace
from plans.core.precision import round_to
from plans.partial_sums import Partial, Sums, partial_bytes

BF16, F16, F32 = ElementKind.BF16, ElementKind.F16, ElementKind.F32


def summed(device, poisoned, rng, partials, out, scale=1.0, early=False):
    """What the launch gives, and the parts."""
    sums, stream = Sums(partials, out, early), device.stream()
    workspace = poisoned(partial_bytes(partials))
    parts = [rng.standard_normal((p.number, p.rows, p.columns)).astype(np.float32) for p in partials]
    starts = [partial_bytes(partials[:i]) for i in range(len(partials))]
    for start, values in zip(starts, parts, strict=True):
        device.copy_in(workspace, start, values.view(np.uint8).reshape(-1), stream)
    shapes = [(p.columns, p.rows) if p.transposed else (p.rows, p.columns) for p in partials]
    buffers = [poisoned(out.itemsize * p.count) for p in partials]
    results = [b.tensor(out, shape) for b, shape in zip(buffers, shapes, strict=True)]
    sums.launch(stream, sums.arguments(results, Workspace(workspace), scale))
    device.synchronize(stream)
    return [device.download(b, out.values, shape) for b, shape in zip(buffers, shapes, strict=True)], parts


def check(device, poisoned, rng, partials, out, scale=1.0, early=False):
    found, parts = summed(device, poisoned, rng, partials, out, scale, early)
    for values, given, partial in zip(found, parts, partials, strict=True):
        exact, magnitude = (scale * np.float64(x).sum(0) for x in (given, np.abs(given)))
        exact, magnitude = (x.T if partial.transposed else x for x in (exact, magnitude))
        ulp = np.abs(np.float64(round_to(exact, out)) - exact) if out is not F32 else 0
        bound = (partial.number + 1) * 2.0**-24 * abs(magnitude) + 1.01 * ulp
        assert (np.abs(values.astype(np.float64) - exact) <= bound).all()
    return found


@pytest.mark.parametrize("number", [1, 16, 17, 63, 64, 65, 300])
@pytest.mark.parametrize("transposed", [False, True])
def test_parts_in_any_number(device, poisoned, rng, number, transposed):
    check(device, poisoned, rng, (Partial(number, 5, 13, transposed),), F32)


@pytest.mark.parametrize("out", [BF16, F16, F32], ids=lambda kind: kind.value)
def test_several_results(device, poisoned, rng, out):
    partials = (Partial(70, 3, 32), Partial(2, 1, 1), Partial(66, 1, 65, True), Partial(1, 7, 9))
    check(device, poisoned, rng, partials, out, scale=-0.375)


def test_an_early_launch_gives_the_same_bits(device, poisoned, rng):
    partials, seed = (Partial(99, 2, 40), Partial(99, 1, 31)), int(rng.integers(1 << 30))
    first, second = (
        check(device, poisoned, np.random.default_rng(seed), partials, F32, early=early) for early in (False, True)
    )
    assert [x.tobytes() for x in first] == [x.tobytes() for x in second]


def test_how_many_share_the_parts():
    assert kernel.warps_of(100, kernel.FEW) == kernel.ALONE == kernel.warps_of(kernel.MANY, 1000)
    assert kernel.warps_of(100, kernel.FEW + 1) == kernel.SOME == kernel.warps_of(100, kernel.MANY_PARTS - 1)
    assert kernel.warps_of(kernel.MANY - 1, kernel.MANY_PARTS) == kernel.ALL
