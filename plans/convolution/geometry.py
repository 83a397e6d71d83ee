"""The geometry of a convolution in one to three axes, channels last, and its windows for references.

X is [batch, *axes, in_channels], Y [batch, *output axes, out_channels]. A weight is [out, *kernel, in / groups]
("OHWI", channels last, as the tensor-core kernels want it) or [out, in / groups, *kernel] ("OIHW", as checkpoints store
it). Output extent: (extent + 2 padding - dilation (kernel - 1) - 1) // stride + 1, as in every framework.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from plans.core.errors import InvalidProblem

WEIGHT_LAYOUTS = ("OHWI", "OIHW")


@dataclass(frozen=True)
class Convolution:
    """The geometry of a convolution; tuples have an entry for each of one to three axes.

    Attributes:
        batch: Images.
        extents: Extents of X's axes.
        in_channels: X's channels.
        out_channels: Y's channels.
        kernel: Extents of the filter.
        stride: Steps; 1 where left out.
        padding: Zeros on either side; 0 where left out.
        dilation: Steps between taps; 1 where left out.
        groups: Groups of channels that do not mix.
        weight_layout: "OHWI" or "OIHW"; see the module.
    """

    batch: int
    extents: tuple[int, ...]
    in_channels: int
    out_channels: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    weight_layout: str = "OHWI"

    def __post_init__(self) -> None:
        axes = len(self.extents)
        if not 1 <= axes <= 3:
            raise InvalidProblem(
                f"convolution: {axes} axes, wanted one to three; give extents of the spatial axes alone"
            )
        for name, default in (("stride", 1), ("padding", 0), ("dilation", 1)):
            object.__setattr__(self, name, getattr(self, name) or (default,) * axes)
        for name, least in (("kernel", 1), ("stride", 1), ("padding", 0), ("dilation", 1)):
            found = getattr(self, name)
            if len(found) != axes or min(found) < least:
                raise InvalidProblem(
                    f"convolution: {name} {found}, wanted {axes} numbers of at least {least}; give one an axis"
                )
        if min(self.batch, *self.extents, self.in_channels, self.out_channels) < 0 or self.groups < 1:
            found = f"batch {self.batch}, extents {self.extents}, channels {self.in_channels} and {self.out_channels}"
            raise InvalidProblem(
                f"convolution: {found}, {self.groups} groups, wanted none negative and a group or more; "
                "give the tensors' own extents"
            )
        if self.in_channels % self.groups or self.out_channels % self.groups:
            channels = f"{self.in_channels} and {self.out_channels}"
            raise InvalidProblem(
                f"convolution: {channels} channels, wanted multiples of the {self.groups} groups; "
                "give as many as divide both"
            )
        if self.weight_layout not in WEIGHT_LAYOUTS:
            raise InvalidProblem(
                f"convolution: weight layout {self.weight_layout!r}, wanted one of {', '.join(WEIGHT_LAYOUTS)}; "
                "convert the weight to one"
            )

    @functools.cached_property
    def out_extents(self) -> tuple[int, ...]:
        """Extents of Y's axes; 0 where the filter does not fit."""
        given = zip(self.extents, self.kernel, self.stride, self.padding, self.dilation, strict=True)
        return tuple(max(0, (e + 2 * p - d * (k - 1) - 1) // s + 1) for e, k, s, p, d in given)

    @property
    def taps(self) -> int:
        """Taps of the filter."""
        return math.prod(self.kernel)

    @property
    def in_pixels(self) -> int:
        """Pixels of X, over the batch."""
        return self.batch * math.prod(self.extents)

    @property
    def out_pixels(self) -> int:
        """Pixels of Y, over the batch."""
        return self.batch * math.prod(self.out_extents)

    @property
    def group_in(self) -> int:
        """X's channels of a group."""
        return self.in_channels // self.groups

    @property
    def group_out(self) -> int:
        """Y's channels of a group."""
        return self.out_channels // self.groups

    @property
    def x_shape(self) -> tuple[int, ...]:
        """[batch, *axes, in_channels]."""
        return (self.batch, *self.extents, self.in_channels)

    @property
    def y_shape(self) -> tuple[int, ...]:
        """[batch, *output axes, out_channels]."""
        return (self.batch, *self.out_extents, self.out_channels)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """The weight as it is stored."""
        inner = (*self.kernel, self.group_in) if self.weight_layout == "OHWI" else (self.group_in, *self.kernel)
        return (self.out_channels, *inner)

    @functools.cached_property
    def weight_strides(self) -> tuple[int, int, int]:
        """Strides of the stored weight: of output channels, taps, input channels."""
        row = self.taps * self.group_in
        return (row, self.group_in, 1) if self.weight_layout == "OHWI" else (row, 1, self.taps)

    @functools.cached_property
    def kernel_geometry(self) -> tuple[int, ...]:
        """The 18 integers of ``kernels.convolution.geometry``: missing axes come first."""
        one, zero = (1,) * (3 - len(self.extents)), (0,) * (3 - len(self.extents))
        extents = (*one, *self.extents, *one, *self.out_extents)
        return (*extents, *one, *self.stride, *zero, *self.padding, *one, *self.dilation, *one, *self.kernel)

    def weight_by_tap(self, weight: np.ndarray) -> np.ndarray:
        """A stored weight as float64 [taps, groups, out, in]."""
        weight = np.asarray(weight, np.float64).reshape(self.weight_shape)
        if self.weight_layout == "OIHW":
            weight = np.moveaxis(weight, 1, -1)
        return np.moveaxis(weight.reshape(self.groups, self.group_out, self.taps, self.group_in), 2, 0)

    def weight_as_stored(self, by_tap: np.ndarray) -> np.ndarray:
        """The reverse of ``weight_by_tap``."""
        weight = np.moveaxis(by_tap, 0, 2).reshape(self.out_channels, *self.kernel, self.group_in)
        return np.moveaxis(weight, -1, 1) if self.weight_layout == "OIHW" else weight

    def windows(self) -> Iterator[tuple[int, tuple[slice, ...]]]:
        """Every tap with the padded pixels that it meets, in the order of output pixels."""
        for tap, place in enumerate(itertools.product(*map(range, self.kernel))):
            starts = [k * d for k, d in zip(place, self.dilation, strict=True)]
            steps = zip(starts, self.stride, self.out_extents, strict=True)
            yield tap, (slice(None), *(slice(a, a + s * n, s) for a, s, n in steps))

    def padded(self, x: np.ndarray) -> np.ndarray:
        """X in float64 with zeros around it, channels split by groups."""
        x = np.asarray(x, np.float64).reshape(*self.x_shape[:-1], self.groups, self.group_in)
        return np.pad(
            x, [(0, 0), *((p, p + s) for p, s in zip(self.padding, self.stride, strict=True)), (0, 0), (0, 0)]
        )
