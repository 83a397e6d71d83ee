"""What was measured has to be right: rows of the last results against float64, within what the plan guarantees.

Outputs are NaN before the first run, so that an element which nothing wrote shows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from operand_buffers import Rotated
from test_terms import exact_delta

from lycoris.nn import AdaptedLinear
from lycoris.tensor import Tensor
from plans.convolution import Conv2dDescriptor
from plans.core import Device, Operand, PrecisionGuarantee, TensorRef

SAMPLE = 12
"""Rows that are compared: the first, the last, and some between."""

CROP = 12
"""Rows of pixels of which a convolution is computed again."""


def sample(rng: np.random.Generator, rows: int) -> np.ndarray:
    """Which of so many rows are compared."""
    return np.unique([0, rows - 1, *rng.integers(0, rows, SAMPLE - 2)])


def values_of(device: Device, tensor: TensorRef, operand: Operand) -> np.ndarray:
    """A contiguous operand as it is stored."""
    return device.download(tensor.owner, operand.element.values, operand.shape)


def assert_within(guarantee: PrecisionGuarantee, found: np.ndarray, wanted: Sequence[np.ndarray], out: Operand) -> None:
    """Every element keeps the guarantee; ``wanted`` is exact, and the magnitude that the guarantee is relative to."""
    kept = guarantee.accepts(found, *wanted, out.element)
    assert kept.all(), f"{out.name}: {(~kept).sum()} of {kept.size} compared values are beyond the guarantee"


def assert_written(runs: Rotated) -> None:
    """No float of a result is NaN, in any set of operands."""
    for args in runs.arguments:
        for tensor, operand in zip(args.tensors(), runs.operands, strict=True):
            if operand.writes and np.issubdtype(operand.element.values, np.inexact):
                found = values_of(runs.device, tensor, operand)
                assert not np.isnan(found.astype(np.float32)).any(), f"{operand.name}: NaN, or never written"


def assert_product(runs: Rotated, rng: np.random.Generator) -> None:
    """Rows of a product without epilogue."""
    descriptor = getattr(runs.descriptor, "segmented", runs.descriptor)
    assert not descriptor.epilogue and descriptor.batch is None
    args, (out, *operands) = runs.arguments[-1], runs.operands
    arrays = [values_of(runs.device, tensor, o) for tensor, o in zip(args.tensors()[1:], operands, strict=True)]
    rows, firsts = sample(rng, descriptor.m), 2 * len(descriptor.segments)
    segments = [
        (a[:, rows] if segment.a_transposed else a[rows], b)
        for segment, a, b in zip(descriptor.segments, arrays[0:firsts:2], arrays[1:firsts:2], strict=True)
    ]
    low_rank = list(zip(arrays[firsts::2], arrays[firsts + 1 :: 2], strict=True))
    wanted = replace(descriptor, m=len(rows), segments=tuple(replace(s, a_stride=0) for s in descriptor.segments))
    exact = wanted.reference(segments, args.scales, low_rank=low_rank, low_rank_scales=args.low_rank_scales)
    found = values_of(runs.device, args.out, out)[rows]
    assert_within(runs.plan.precision_guarantee, found, exact, out)


def assert_convolution(runs: Rotated) -> None:
    """The first rows of pixels of the first image, from as many rows of the input as they need."""
    descriptor: Conv2dDescriptor = runs.descriptor
    whole, (out, x, weight) = descriptor.geometry, runs.operands
    geometry = replace(whole, batch=1, extents=(min(CROP, whole.extents[0]), *whole.extents[1:]))
    args = runs.arguments[-1].tensors()
    pixels = values_of(runs.device, args[1], x)[:1, : geometry.extents[0]]
    exact = replace(descriptor, geometry=geometry).reference(pixels, values_of(runs.device, args[2], weight))
    rows = exact[0].shape[1] - whole.kernel[0]  # the last ones reach below what was cut off
    assert rows > 0
    found = values_of(runs.device, args[0], out)[:1, :rows]
    assert_within(runs.plan.precision_guarantee, found, [array[:, :rows] for array in exact], out)


def assert_gradients(runs: Rotated) -> None:
    """All gradients of a plan whose reference takes what it reads and gives every gradient in order."""
    args = runs.arguments[-1].tensors()
    arrays = [values_of(runs.device, tensor, o) for tensor, o in zip(args, runs.operands, strict=True)]
    read = [array for array, operand in zip(arrays, runs.operands, strict=True) if not operand.writes]
    written = [(array, operand) for array, operand in zip(arrays, runs.operands, strict=True) if operand.writes]
    for (found, operand), wanted in zip(written, runs.descriptor.reference(read), strict=True):
        assert_within(runs.plan.precision_guarantee, found, wanted, operand)


def assert_layer(layer: AdaptedLinear, x: Tensor, y: Tensor, rng: np.random.Generator) -> None:
    """Rows of a layer's output: within three roundings to bf16 of its terms, as the layers' tests have it."""
    rows = sample(rng, x.shape[0])
    weight = layer.weight.numpy().astype(np.float64)
    for adapter in layer.adapters.values():
        weight += adapter.strength * adapter.module.scale() * exact_delta(adapter.module).reshape(weight.shape)
    values, found = (array.numpy()[rows].astype(np.float64) for array in (x, y))
    error = np.abs(found - values @ weight.T) / (np.abs(values) @ np.abs(weight).T)
    assert error.max() * 2**8 <= 3, f"a layer's output is {error.max() * 2**8:.3g} roundings off, wanted at most 3"
