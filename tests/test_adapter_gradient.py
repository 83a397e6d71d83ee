"""Gradients of adapters' factors against float64, over poisoned results and workspace, twice bit for bit."""

from __future__ import annotations

import pytest
from adapter_gradient_cases import check

from kernels.target import SIMULATOR
from plans.adapter_gradient import (
    BlockMixGradientArgs,
    BlockMixGradientDescriptor,
    BlockMixGradientPlan,
    LowRankGradientArgs,
    LowRankGradientDescriptor,
    LowRankGradientPlan,
    low_rank_streamed,
)
from plans.core import BackendKind, ElementKind, InvalidProblem, NoSku, PlanPreference

BF16, F16, F32 = ElementKind.BF16, ElementKind.F16, ElementKind.F32
MMA, PORTABLE, STREAMED = BackendKind.MMA, BackendKind.PORTABLE, BackendKind.STREAMED

LOW_RANK = [
    (1, 8, 8, 8, {}),
    (67, 72, 136, 16, {}),
    (67, 72, 136, 16, {"beside": True}),
    (131, 64, 8, 5, {"parts": 2, "inner_stride": 24, "part_stride": 8}),
    (33, 8, 72, 33, {"inner_stride": 40, "out": BF16}),
    (17, 16, 8, 72, {"parts": 2, "g_stride": 24, "x_stride": 16}),
    (40, 24, 0, 4, {"inner_stride": 8, "out": F16, "element": F16}),
    (40, 0, 24, 12, {"inner_stride": 16, "element": F16}),
]
LARGE = (
    []
    if SIMULATOR
    else [
        (4096, 3072, 3072, 16, {"parts": 2}),
        (4099, 1288, 5128, 64, {"parts": 2, "out": BF16}),
        (1024, 12288, 3072, 20, {"inner_stride": 24}),
        (10000, 1280, 1280, 128, {}),
    ]
)


def low_rank_arguments(tensors, scale):
    return LowRankGradientArgs([tuple(tensors[i : i + 3]) for i in range(0, len(tensors), 3)], scale)


def streams(case):
    """Whether t is one part of at most 64 ranks."""
    return case[-1].get("parts", 1) == 1 and case[3] <= 64


@pytest.mark.parametrize(
    ("case", "backend"),
    [
        *((case, MMA) for case in LOW_RANK + LARGE),
        *((case, PORTABLE) for case in LOW_RANK[2:]),
        *((case, STREAMED) for case in [*LOW_RANK, *LARGE, (300, 200, 72, 16, {})] if streams(case)),
    ],
    ids=str,
)
def test_low_rank_factors(device, poisoned, rng, case, backend):
    if backend is STREAMED and device.arch < (9, 0):
        pytest.skip("TMA is sm_90's")
    *extents, options = case
    descriptor = LowRankGradientDescriptor(*extents, **options)
    check(device, poisoned, LowRankGradientPlan, descriptor, low_rank_arguments, rng.standard_normal, backend)


@pytest.mark.parametrize(
    ("layout", "rank"), list(zip(low_rank_streamed.LAYOUTS, (16, 40, 16, 40, 40), strict=True)), ids=str
)
def test_every_layout_of_streamed_low_rank_factors(device, poisoned, rng, monkeypatch, layout, rank):
    if device.arch < (9, 0):
        pytest.skip("TMA is sm_90's")
    rows = 131 + low_rank_streamed.LAYOUTS.index(layout)  # a plan of its own: plans are kept by their descriptors
    monkeypatch.setattr(low_rank_streamed, "LAYOUTS", (layout,))
    descriptor = LowRankGradientDescriptor(rows, 200, 64, rank, beside=rank > 16)
    plan = check(device, poisoned, LowRankGradientPlan, descriptor, low_rank_arguments, rng.standard_normal, STREAMED)
    assert (plan.program.tile.groups, plan.program.tile.parts) == layout


@pytest.mark.parametrize(
    ("columns", "layout"),
    [
        ((1024, 1024), (2, 4)),
        ((3072, 3072), (2, 2)),
        ((12288, 3072), (2, 1)),
        ((14336, 4096), (3, 1)),
        ((4096, 4096), (2, 2)),
        ((8,), (2, 4)),
    ],
)
def test_layout_of_so_many_columns(columns, layout):
    """One block a multiprocessor of 132 where there are few columns enough, and as many blocks as find a place."""
    assert low_rank_streamed._layout(4096, columns, 132) == layout


def test_low_rank_factors_of_any_extent_and_kind(device, poisoned, rng):
    descriptor = LowRankGradientDescriptor(13, 7, 5, 3, F32, BF16)
    plan = check(device, poisoned, LowRankGradientPlan, descriptor, low_rank_arguments, rng.standard_normal)
    assert plan.chosen.backend is PORTABLE
    with pytest.raises(NoSku, match="bf16 or fp16, found f32"):
        LowRankGradientPlan.select(None, descriptor, PlanPreference(prefer_backend=MMA), device)


@pytest.mark.parametrize("backend", [PORTABLE, MMA, STREAMED], ids=lambda backend: backend.value)
@pytest.mark.parametrize("extents", [(0, 8, 16, 8), (16, 8, 8, 0), (8, 0, 0, 8)], ids=str)
def test_no_low_rank_rows_ranks_or_sides(device, poisoned, rng, extents, backend):
    descriptor = LowRankGradientDescriptor(*extents)
    if backend is STREAMED and not descriptor.rows:
        with pytest.raises(NoSku, match="wants rows, found none"):
            LowRankGradientPlan.select(None, descriptor, PlanPreference(prefer_backend=backend), device)
        return
    check(device, poisoned, LowRankGradientPlan, descriptor, low_rank_arguments, rng.standard_normal, backend)


@pytest.mark.parametrize(
    ("reason", "options"),
    [
        ("1 or 2 parts", {"parts": 3}),
        ("none negative", {"rank": -1}),
        ("g has stride 7, wanted at least 8", {"g_stride": 7}),
        ("t has stride 15, wanted at least 16", {"inner_stride": 15, "parts": 2}),
        ("gradients of i32", {"out": ElementKind.I32}),
    ],
)
def test_bad_low_rank_problems(reason, options):
    with pytest.raises(InvalidProblem, match=reason):
        LowRankGradientDescriptor(**({"rows": 8, "out_features": 8, "in_features": 8, "rank": 8} | options))


BLOCKS = [
    (1, 1, 1, 8, {}),
    (3, 8, 8, 72, {}),
    (5, 17, 3, 40, {"out": BF16}),
    (5, 17, 9, 40, {"beside": True}),
    (7, 33, 9, 8, {"element": F16, "out": F16, "g_stride": 272, "x_stride": 80}),
    (2, 5, 70, 24, {}),
    (0, 3, 4, 8, {}),
    (3, 3, 4, 0, {}),
    (3, 0, 4, 8, {}),
]
LARGE_BLOCKS = (
    []
    if SIMULATOR
    else [(4096, 8, 8, 384, {}), (4099, 48, 48, 64, {}), (4096, 112, 64, 64, {"out": BF16}), (33, 8, 8, 1792, {})]
)


def block_arguments(tensors, scale):
    return BlockMixGradientArgs(*tensors, scale)


@pytest.mark.parametrize("backend", [PORTABLE, MMA], ids=lambda backend: backend.value)
@pytest.mark.parametrize("case", BLOCKS + LARGE_BLOCKS, ids=str)
def test_mixing_matrices(device, poisoned, rng, case, backend):
    *extents, options = case
    descriptor = BlockMixGradientDescriptor(*extents, **options)
    check(device, poisoned, BlockMixGradientPlan, descriptor, block_arguments, rng.standard_normal, backend)


def test_mixing_matrices_of_any_extent_and_kind(device, poisoned, rng):
    descriptor = BlockMixGradientDescriptor(5, 3, 2, 37, F32, BF16)
    plan = check(device, poisoned, BlockMixGradientPlan, descriptor, block_arguments, rng.standard_normal)
    assert plan.chosen.backend is PORTABLE


@pytest.mark.parametrize(
    ("reason", "options"),
    [
        ("none negative", {"rows": -1}),
        ("x has row stride 15, wanted at least its 16 elements", {"x_stride": 15}),
        ("d_w of i32", {"out": ElementKind.I32}),
    ],
)
def test_bad_mixing_problems(reason, options):
    with pytest.raises(InvalidProblem, match=reason):
        BlockMixGradientDescriptor(**({"rows": 2, "out_blocks": 2, "in_blocks": 2, "width": 8} | options))
