"""Constructors of modules with a rank, for new adapters: initial factors, DoRA's norms, options."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np

from lycoris.algorithms.initialise import Initialiser
from lycoris.algorithms.module import LycorisModule
from lycoris.buffers import DeviceArray
from lycoris.errors import RefusedInput
from lycoris.formats.shapes import Shape
from lycoris.layout import to_checkpoint
from plans.core import Device, ElementKind
from plans.weight import WeightLayout


@dataclass(frozen=True, kw_only=True)
class ModuleOptions:
    """Keyword arguments of every constructor.

    ``device`` is the first there is where none is given. ``dtype`` stores the factors, ``layout`` says how the
    layer's weight lies. ``use_tucker`` puts a core between the factors of a convolution larger than 1x1.
    ``use_scalar`` starts the delta at zero by a trained scalar, and no factor at zero. ``rs_lora`` scales by
    alpha / sqrt(rank). ``weight_decompose`` is DoRA, over output rows with ``wd_on_out`` and input columns without;
    its norms start as those of ``base``, the layer's weight. ``seed`` makes the initial factors repeatable.
    """

    device: Device | None = None
    dtype: ElementKind = ElementKind.BF16
    layout: WeightLayout = WeightLayout.CHECKPOINT
    use_tucker: bool = False
    use_scalar: bool = False
    rs_lora: bool = False
    weight_decompose: bool = False
    wd_on_out: bool = True
    base: DeviceArray | None = None
    seed: int | None = None


class RankedModule(LycorisModule):
    """A module of low-rank factors."""

    options: ClassVar[type[ModuleOptions]] = ModuleOptions

    @classmethod
    def new_linear(
        cls, in_features: int, out_features: int, rank: int, alpha: float | None = None, **options: Any
    ) -> Self:
        """An untrained module for a weight [out, in]; its delta is zero.

        ``alpha`` counts as the rank where it is None or 0. ``options`` are the fields of `ModuleOptions`
        (`LoKrOptions` for LoKr). Raises RefusedInput for extents or a rank that are not possible.
        """
        return cls._new((out_features, in_features), rank, alpha, cls.options(**options))

    @classmethod
    def new_conv1d(
        cls,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int],
        rank: int,
        alpha: float | None = None,
        **options: Any,
    ) -> Self:
        """The same for a weight [out, in, k]; with groups ``in_channels`` counts those of one group."""
        return cls._new_conv(1, in_channels, out_channels, kernel_size, rank, alpha, options)

    @classmethod
    def new_conv2d(
        cls,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        rank: int,
        alpha: float | None = None,
        **options: Any,
    ) -> Self:
        """The same for a weight [out, in, kh, kw]; with groups ``in_channels`` counts those of one group."""
        return cls._new_conv(2, in_channels, out_channels, kernel_size, rank, alpha, options)

    @classmethod
    def new_conv3d(
        cls,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int, int],
        rank: int,
        alpha: float | None = None,
        **options: Any,
    ) -> Self:
        """The same for a weight [out, in, kd, kh, kw]; with groups ``in_channels`` counts those of one group."""
        return cls._new_conv(3, in_channels, out_channels, kernel_size, rank, alpha, options)

    @classmethod
    def initial_factors(cls, shape: Shape, rank: int, options: Any, fill: Initialiser) -> dict[str, np.ndarray]:
        """The untrained factors for a weight [out, in, *kernel], by name in the order of the formula."""
        raise NotImplementedError

    @classmethod
    def _new_conv(
        cls,
        axes: int,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        rank: int,
        alpha: float | None,
        options: dict[str, Any],
    ) -> Self:
        kernel = (kernel_size,) * axes if isinstance(kernel_size, int) else tuple(kernel_size)
        if len(kernel) != axes:
            raise RefusedInput(
                f"{cls.algorithm}: kernel_size {kernel}, wanted one number or {axes}; give one extent for each axis"
            )
        return cls._new((out_channels, in_channels, *kernel), rank, alpha, cls.options(**options))

    @classmethod
    def _new(cls, shape: Shape, rank: int, alpha: float | None, options: ModuleOptions) -> Self:
        if min(shape) < 1 or rank < 0:
            raise RefusedInput(
                f"{cls.algorithm}: a weight of {list(shape)} with rank {rank}, wanted extents of 1 or more and rank "
                "0 or more; give the layer's own extents"
            )
        device = options.device or Device.open("auto")
        initial = cls.initial_factors(shape, rank, options, Initialiser(options.seed))
        scalar = DeviceArray.from_numpy(np.zeros((), np.float32), device=device) if options.use_scalar else None
        return cls(
            shape,
            {name: DeviceArray.from_numpy(array, options.dtype, device) for name, array in initial.items()},
            alpha=alpha,
            rs_lora=options.rs_lora,
            scalar=scalar,
            dora_scale=_initial_norms(cls.algorithm, shape, options) if options.weight_decompose else None,
            wd_on_out=options.wd_on_out,
            layout=options.layout,
        )


def _initial_norms(algorithm: str, shape: Shape, options: ModuleOptions) -> DeviceArray:
    """DoRA's norms of the base in fp32: [out, 1...], or [1, in, 1...]."""
    if options.base is None:
        raise RefusedInput(f"{algorithm}: weight_decompose without base, wanted the layer's weight; pass base=")
    base = to_checkpoint(options.base) if options.layout is WeightLayout.FLAME else options.base
    if base.shape != tuple(shape):
        raise RefusedInput(
            f"{algorithm}: base has shape {base.shape}, wanted {tuple(shape)}; pass the weight of the layer itself"
        )
    weight = base.numpy().astype(np.float32).reshape(shape[0], shape[1], -1)
    norms = np.sqrt(np.einsum("oik,oik->o" if options.wd_on_out else "oik,oik->i", weight, weight, dtype=np.float64))
    kept = (-1, 1) if options.wd_on_out else (1, -1)
    return DeviceArray.from_numpy(norms.reshape(*kept, *(1 for _ in shape[2:])), ElementKind.F32, base.device)
