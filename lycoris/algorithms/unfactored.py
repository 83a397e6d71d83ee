"""Adapters without factors: whole differences, differences of norms, and (IA)^3's channel scales."""

from __future__ import annotations

from typing import Self

from lycoris.algorithms.module import LycorisModule
from lycoris.buffers import DeviceArray
from lycoris.formats.shapes import Shape
from plans.core import Device, ElementKind
from plans.weight import WeightLayout


class FullModule(LycorisModule):
    """delta = diff [out, in, *kernel], and diff_b [out] for the bias."""

    algorithm = "full"

    @classmethod
    def new(
        cls,
        shape: Shape,
        *,
        bias: bool = False,
        device: Device | None = None,
        dtype: ElementKind = ElementKind.BF16,
        layout: WeightLayout = WeightLayout.CHECKPOINT,
    ) -> Self:
        """An untrained difference, zero, for a weight [out, in, *kernel] and its bias."""
        difference = DeviceArray.zeros(shape, dtype, device)
        return cls(
            shape,
            {"diff": difference},
            bias=DeviceArray.zeros(shape[:1], dtype, device) if bias else None,
            layout=layout,
        )


class NormModule(LycorisModule):
    """delta = w_norm [n] on a norm's weight, and b_norm [n] on its bias."""

    algorithm = "norm"
    bias_name = "b_norm"

    @classmethod
    def new(
        cls,
        features: int,
        *,
        bias: bool = True,
        device: Device | None = None,
        dtype: ElementKind = ElementKind.BF16,
    ) -> Self:
        """An untrained difference, zero."""
        difference = DeviceArray.zeros((features,), dtype, device)
        return cls(
            (features,), {"w_norm": difference}, bias=DeviceArray.zeros((features,), dtype, device) if bias else None
        )


class IA3Module(LycorisModule):
    """W' = W * (1 + strength * weight) along the output axis, or the input axis with on_input; arXiv:2205.05638."""

    algorithm = "ia3"

    @classmethod
    def new(
        cls,
        shape: Shape,
        *,
        on_input: bool = False,
        device: Device | None = None,
        dtype: ElementKind = ElementKind.BF16,
        layout: WeightLayout = WeightLayout.CHECKPOINT,
    ) -> Self:
        """Untrained multipliers, zero, for a weight [out, in, *kernel]: [n], or [1, n, 1...] with filter axes."""
        count = shape[1 if on_input else 0]
        stored = (1, count, *(1 for _ in shape[2:])) if len(shape) > 2 else (count,)
        return cls(shape, {"weight": DeviceArray.zeros(stored, dtype, device)}, on_input=on_input, layout=layout)
