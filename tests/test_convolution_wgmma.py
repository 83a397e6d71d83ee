"""Convolutions on Hopper: by the twins of TMA and wgmma in the simulator, by the real ones on a GPU of sm_90."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import pytest
from matmul_cases import BF16, F16, F32, gaussian
from test_convolution import FORWARD, INPUT, WEIGHT, check, solve

from kernels.matmul.wgmma_tile import WgmmaTile
from kernels.target import SIMULATOR
from plans.convolution import (
    Conv2dDescriptor,
    Conv2dInputGradientDescriptor,
    Conv2dWeightGradientDescriptor,
    Convolution,
)
from plans.convolution.weight_sums import sums_bytes
from plans.convolution.wgmma import WGMMA, WgmmaProgram, box_width_of, likely_tiles, tile_seconds, tiling_of
from plans.convolution.wgmma_weight import WEIGHT_GRADIENT_WGMMA, WeightGradientProgram, split_of
from plans.core import BackendKind, Device, NoSku
from plans.matmul import Activation, Bias, ColumnScale, Residual, RowScale, measure
from plans.matmul.wgmma import MEASURED

BACKEND = BackendKind.WGMMA
pytestmark = pytest.mark.skipif(Device.open().arch < (9, 0), reason="wgmma is an instruction of sm_90a")
EVERY_PROBLEM = pytest.mark.parametrize("problem", [FORWARD, INPUT, WEIGHT], ids=["forward", "input", "weight"])
PIXELS = pytest.mark.parametrize("problem", [FORWARD, INPUT], ids=["forward", "input"])
GEOMETRIES = {
    "3x3": Convolution(2, (9, 17), 8, 40, (3, 3), padding=(1, 1)),
    "1x1 of many channels": Convolution(1, (3, 7), 136, 16, (1, 1)),
    "dilation, uneven": Convolution(1, (7, 20), 16, 8, (3, 2), (1, 1), (2, 0), (2, 3)),
    "one axis": Convolution(3, (150,), 8, 24, (5,), padding=(2,)),
    "filter larger than the image": Convolution(1, (2, 2), 8, 8, (3, 3), padding=(1, 1)),
    "three groups": Convolution(2, (5, 9), 24, 48, (2, 2), padding=(1, 0), groups=3),
}
STRIDED = {
    "stride 2": Convolution(1, (19, 34), 8, 16, (3, 3), (2, 2), (1, 1)),
    "stride 2 along x": Convolution(2, (5, 18), 72, 8, (2, 3), (1, 2), (0, 1)),
}
LARGE = (
    {}
    if SIMULATOR
    else {
        "320 at 128x128": Convolution(2, (128, 128), 320, 320, (3, 3), padding=(1, 1)),
        "640 at 63x65": Convolution(1, (63, 65), 640, 328, (3, 3), padding=(1, 1)),
    }
)


@EVERY_PROBLEM
@pytest.mark.parametrize("geometry", (GEOMETRIES | LARGE).values(), ids=(GEOMETRIES | LARGE).keys())
def test_geometries(device, poisoned, rng, problem, geometry):
    both = not SIMULATOR or problem is not WEIGHT
    plan = check(device, poisoned, rng, problem, problem[1](geometry), BACKEND, both=both)
    assert plan.chosen.backend is BACKEND


@pytest.mark.parametrize("geometry", STRIDED.values(), ids=STRIDED.keys())
def test_strides(device, poisoned, rng, geometry):
    check(device, poisoned, rng, FORWARD, Conv2dDescriptor(geometry), BACKEND, both=True)
    check(device, poisoned, rng, WEIGHT, Conv2dWeightGradientDescriptor(geometry, out=F32), BACKEND, both=True)
    with pytest.raises(NoSku, match="and 1 for the gradient of the input"):
        solve(device, poisoned, INPUT, Conv2dInputGradientDescriptor(geometry), gaussian(rng), BACKEND)


@PIXELS
@pytest.mark.parametrize("kinds", [(BF16, BF16, F32), (F16, F16, F16), (F16, F16, BF16)], ids=str)
def test_kinds_and_epilogues(device, poisoned, rng, problem, kinds):
    geometry = Convolution(2, (6, 11), 16, 24, (3, 3), padding=(1, 1))
    steps = {BF16: (Bias(F32), Residual(), Activation("silu")), F16: (RowScale(F32), ColumnScale(F16), Residual(F32))}
    check(device, poisoned, rng, problem, problem[1](geometry, *kinds, steps[kinds[0]]), BACKEND)


@PIXELS
def test_tiles(device, poisoned, rng, problem):
    """Several tiles a block, a tile beyond the last image in a cluster, boxes of every width."""
    family, descriptor = problem[0], problem[1](Convolution(3, (5, 10), 72, 72, (1, 2), padding=(0, 1)))
    for columns, cluster in ((128, 2), (64, 1)) if SIMULATOR else ((256, 1), (128, 2), (128, 1), (64, 1)):
        tile = WgmmaTile(columns, 2, cluster, True, problem is FORWARD)
        sku = dataclasses.replace(WGMMA, build=functools.partial(WgmmaProgram, tile=tile))
        patched = type(family.__name__, (family,), {"skus": (sku,), "name": f"{family.name} {tile}"})
        plan, found, (exact, magnitude) = solve(
            device, poisoned, (patched, problem[1]), descriptor, gaussian(rng), BACKEND
        )
        assert plan.precision_guarantee.accepts(found, exact, magnitude, BF16).all(), tile


@pytest.mark.parametrize(
    ("groups", "channels", "tile", "parts", "steps"),
    [
        (1, (72, 16), WgmmaTile(64, 2, 1, False, False), 1, ()),
        (1, (8, 16), WgmmaTile(64, 2, 1, False, False), 5, (Residual(F32), Residual(F16))),
        (1, (72, 136), WgmmaTile(128, 2, 2, False, False), 1, (Residual(F32),)),
        (2, (40, 24), WgmmaTile(64, 2, 1, False, False), 2, (Residual(F16),)),
        (3, (16, 8), WgmmaTile(64, 2, 1, False, False), 1, ()),
    ],
    ids=["tiles", "more parts than boxes", "a cluster", "groups in parts", "groups"],
)
def test_weight_gradients_in_parts(device, poisoned, rng, groups, channels, tile, parts, steps):
    """Boxes that parts do not divide, several tiles a tap, blocks that share x."""
    extents = (9, 5) if SIMULATOR else (19, 21)
    geometry = Convolution(2, extents, *(n * groups for n in channels), (1, 2), padding=(0, 1), groups=groups)
    sku = dataclasses.replace(
        WEIGHT_GRADIENT_WGMMA,
        build=functools.partial(WeightGradientProgram, parts=parts, tile=tile),
        workspace=lambda d: sums_bytes(d.geometry, parts) if parts > 1 or d.epilogue else 0,
    )
    patched = type("Patched", (WEIGHT[0],), {"skus": (sku,), "name": f"{channels} {tile} {parts} {groups}"})
    out = F32 if steps else BF16
    check(device, poisoned, rng, (patched, None), WEIGHT[1](geometry, out=out, epilogue=steps), BACKEND)


def test_weight_gradients_of_few_taps_and_many_pixels_are_split():
    for geometry, parts in (
        (Convolution(2, (128, 128), 320, 320, (3, 3), padding=(1, 1)), 2),
        (Convolution(1, (256, 256), 64, 64, (1, 1)), 16),
    ):
        assert split_of(Conv2dWeightGradientDescriptor(geometry))[0] >= parts
    assert split_of(Conv2dWeightGradientDescriptor(Convolution(1, (4, 4), 2048, 2048, (3, 3))))[0] == 1


@pytest.mark.parametrize(
    ("geometry", "columns"),
    [
        (Convolution(2, (128, 128), 320, 320, (3, 3), padding=(1, 1)), 160),
        (Convolution(2, (32, 32), 1280, 1280, (3, 3), padding=(1, 1)), 160),
        (Convolution(4, (128, 128), 512, 1024, (3, 3), padding=(1, 1)), 256),
    ],
    ids=["320", "1280", "512 to 1024"],
)
def test_the_estimate_of_tiles(geometry, columns):
    """132 multiprocessors: whole waves of narrower tiles beat half-empty ones of wide tiles."""
    likely = likely_tiles(tiling_of(Conv2dDescriptor(geometry)), 132)
    assert len(likely) == MEASURED and columns in {tile.columns for tile in likely[:2]}


def test_a_measured_tile_runs_over_operands_of_its_own(device, monkeypatch):
    launched = []

    def seconds(_device, launch):
        stream = device.stream()
        launch(stream)
        device.synchronize(stream)
        launched.append(launch)
        return 0.5

    monkeypatch.setattr(measure, "device_seconds", seconds)
    geometry = Convolution(1, (3, 4), 8, 8, (1, 2))
    for descriptor, k_major in ((Conv2dDescriptor(geometry, epilogue=(Bias(), Residual())), True),
                                (Conv2dInputGradientDescriptor(geometry), False)):  # fmt: skip
        assert tile_seconds(descriptor, device, WgmmaTile(64, 2, 1, True, k_major)) == 0.5
    assert len(launched) == 2


def test_boxes_cover_images_with_few_of_them():
    images = ((128, 128), (32, 32), (1, 500), (9, 100), (100, 7))
    assert [box_width_of(*image) for image in images] == [16, 16, 128, 128, 8]


@pytest.mark.parametrize(
    ("reason", "geometry"),
    [
        ("channels in multiples of 8, found 12 and 8", Convolution(1, (4, 4), 12, 8, (1, 1))),
        ("channels in multiples of 8, found 4 and 8", Convolution(1, (4, 4), 8, 16, (1, 1), groups=2)),
        ("one or two axes", Convolution(1, (4, 4, 4), 8, 8, (1, 1, 1))),
        ("a pixel or more", Convolution(1, (0, 4), 8, 8, (1, 1), padding=(1, 0))),
        ("strides up to 2", Convolution(1, (9, 9), 8, 8, (1, 1), (3, 3))),
        ("the weight as OHWI", Convolution(1, (4, 4), 8, 8, (1, 1), weight_layout="OIHW")),
    ],
    ids=str,
)
def test_refusals(device, poisoned, rng, reason, geometry):
    with pytest.raises(NoSku, match=reason):
        solve(device, poisoned, FORWARD, Conv2dDescriptor(geometry), gaussian(rng), BACKEND)


def test_empty(device, poisoned, rng):
    _, found, (exact, _) = solve(
        device, poisoned, FORWARD, Conv2dDescriptor(Convolution(0, (4, 4), 8, 8, (1, 1))), gaussian(rng), BACKEND
    )
    np.testing.assert_array_equal(found.astype(np.float64), exact)
