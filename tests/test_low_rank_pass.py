"""u and parts of d_up from one pass over g, d_up of such parts, and a trained layer that takes both."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
from adapter_gradient_cases import check

from lycoris import tensor
from lycoris.tensor import low_rank
from plans.adapter_gradient import (
    LowRankGradientArgs,
    LowRankGradientDescriptor,
    LowRankGradientPlan,
    LowRankPassArgs,
    LowRankPassDescriptor,
    LowRankPassPlan,
    pass_beside,
)
from plans.core import BackendKind, ElementKind, InvalidProblem, NoSku, PlanPreference

BF16, F16, F32 = ElementKind.BF16, ElementKind.F16, ElementKind.F32
CASES = [
    (64, 64, 16, 2, {}),
    (45, 72, 8, 2, {"g_stride": 80}),
    (1, 8, 8, 1, {}),
    (130, 200, 16, 4, {"element": F16}),
    (700, 136, 16, 1, {}),
    (67, 24, 16, 3, {}),
]


@pytest.fixture
def hopper(device):
    if device.arch < (9, 0):
        pytest.skip("TMA is sm_90's")
    return device


@pytest.mark.parametrize("case", CASES, ids=str)
def test_one_pass(hopper, poisoned, rng, case):
    *extents, options = case
    descriptor = LowRankPassDescriptor(*extents, **options)

    def arguments(tensors, scale):
        return LowRankPassArgs(*tensors, scale)

    plan = check(hopper, poisoned, LowRankPassPlan, descriptor, arguments, rng.standard_normal)
    assert plan.chosen.backend is BackendKind.STREAMED


@pytest.mark.parametrize(
    ("rows", "blocks", "tile_rows", "parts"),
    [(4096, 12, 352, 12), (4096, 16, 256, 16), (8192, 12, 352, 24), (16, 16, 16, 1), (4096, 1, 384, 11)],
)
def test_tiles_of_so_many_rows(rows, blocks, tile_rows, parts):
    """Equal tiles, at most 384 rows each, in as many rounds as that takes."""
    descriptor = LowRankPassDescriptor(rows, 64, 16, blocks)
    assert (descriptor.tile_rows, descriptor.parts) == (tile_rows, parts)


@pytest.mark.parametrize(
    ("extents", "options", "reason"),
    [
        ((64, 64, 16, 2), {"element": F32}, "bf16 or fp16, found f32"),
        ((64, 60, 16, 2), {}, "in multiples of 8"),
        ((64, 64, 24, 2), {}, "at most 16 ranks"),
        ((64, 64, 12, 2), {}, "in multiples of 8"),
        ((33 * 384, 64, 16, 33), {}, "at most 32 parts, found 33"),
    ],
    ids=str,
)
def test_refused_passes(device, extents, options, reason):
    with pytest.raises(NoSku, match=reason):
        LowRankPassPlan.select(None, LowRankPassDescriptor(*extents, **options), device=device)


@pytest.mark.parametrize(
    ("extents", "options", "reason"),
    [((0, 8, 8, 1), {}, "at least 1 of each"), ((8, 16, 8, 1), {"g_stride": 8}, "stride 8, wanted at least 16")],
    ids=str,
)
def test_bad_passes(extents, options, reason):
    with pytest.raises(InvalidProblem, match=reason):
        LowRankPassDescriptor(*extents, **options)


class Second(NamedTuple):
    """A product that leaves multiprocessors idle."""

    blocks: int
    cycles: float

    def spare(self):
        return self.blocks, self.cycles


@pytest.mark.parametrize(
    ("g", "spare", "pays"),
    [
        ((4096, 3072), (12, 49408.0), True),
        ((4096, 12288), (12, 197000.0), True),
        ((4096, 3072), (0, 0.0), False),
        ((4096, 3072), (4, 49408.0), False),
        ((1024, 1280), (68, 20000.0), False),
        ((4096, 3072), (12, 20000.0), False),
    ],
)
def test_a_pass_where_a_product_leaves_time_for_it(hopper, monkeypatch, g, spare, pays):
    monkeypatch.setattr(type(hopper), "multiprocessors", 132, raising=False)
    assert (pass_beside(Second(*spare), hopper, g, 16, BF16) is not None) == pays


@pytest.mark.parametrize(
    ("extents", "options"),
    [
        ((67, 72, 136, 16), {"up_parts": 3}),
        ((67, 8, 72, 8), {"up_parts": 5, "beside": True, "out": BF16}),
        ((200, 4000, 64, 32), {"up_parts": 1}),
    ],
    ids=str,
)
def test_d_up_of_parts(hopper, poisoned, rng, extents, options):
    descriptor = LowRankGradientDescriptor(*extents, **options)

    def arguments(tensors, scale):
        return LowRankGradientArgs([tuple(tensors[:3])], scale, tuple(tensors[3:]))

    check(hopper, poisoned, LowRankGradientPlan, descriptor, arguments, rng.standard_normal)


@pytest.mark.parametrize("backend", [BackendKind.MMA, BackendKind.PORTABLE], ids=lambda backend: backend.value)
def test_parts_are_added_up_by_the_streamed_alone(device, backend):
    descriptor = LowRankGradientDescriptor(64, 64, 64, 16, up_parts=2)
    with pytest.raises(NoSku, match="wants g and t for d_up, found 2 parts"):
        LowRankGradientPlan.select(None, descriptor, PlanPreference(prefer_backend=backend), device)


def test_parts_of_nothing():
    with pytest.raises(InvalidProblem, match="d_up of 2 parts and rows, out, in, rank"):
        LowRankGradientDescriptor(64, 64, 0, 16, up_parts=2)


@pytest.mark.parametrize("rows", [45, 130])
def test_a_layer_whose_gradients_come_of_one_pass(hopper, rng, monkeypatch, rows):
    """Against float64, and against the layer whose d_up reads g again."""
    shapes = {"x": (rows, 48), "w": (72, 48), "down": (8, 48), "up": (72, 8), "g": (rows, 72)}
    values = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    given = {name: tensor.from_numpy(value, kind=BF16) for name, value in values.items()}
    passes = []

    def gradients():
        x, down, up = (given[name].detach().requires_grad_() for name in ("x", "down", "up"))
        y = tensor.low_rank_linear(x, given["w"], down, up, 0.5)
        return [found.numpy().astype(np.float64) for found in tensor.grad([y], [x, down, up], [given["g"]])]

    def always(program, device, g, rank, element, g_stride=0):
        passes.append(LowRankPassDescriptor(*g, rank, 2, element, g_stride))
        return passes[-1]

    expected = gradients()
    low_rank._both_kept.clear()
    monkeypatch.setattr(low_rank, "pass_beside", always)
    found = gradients()
    low_rank._both_kept.clear()
    assert len(passes) == 1
    x, w, down, up, g = (given[name].numpy().astype(np.float64) for name in shapes)
    u, t = 0.5 * g @ up, 0.5 * x @ down.T
    sums = [((g, w), (u, down)), ((u.T, x),), ((g.T, t),)]
    for got, other, products in zip(found, expected, sums, strict=True):
        bound = 2.0**-7 * sum(np.abs(left) @ np.abs(right) for left, right in products)
        assert (np.abs(got - sum(left @ right for left, right in products)) <= bound).all()
        assert (np.abs(got - other) <= 2 * bound).all()
