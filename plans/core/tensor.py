"""Views of device memory as plans take them: an address, a shape, strides and an element kind."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from plans.core.precision import ElementKind


def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Row-major strides in elements."""
    strides, step = [], 1
    for extent in reversed(shape):
        strides.append(step)
        step *= extent
    return tuple(reversed(strides))


@dataclass(frozen=True, slots=True, eq=False)
class TensorRef:
    """A tensor that a plan reads.

    ``data`` is a device address on a GPU and a flat array of the kind's storage dtype in the simulator, where
    element (0, ..., 0) is the first. ``stride`` counts elements; ``available`` is how many elements the buffer
    holds from there on. ``owner`` is kept alive as long as the view.
    """

    data: Any
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    element: ElementKind
    available: int
    device: int
    owner: Any = None

    @property
    def address(self) -> int:
        """The address of the first element."""
        return self.data if isinstance(self.data, int) else self.data.ctypes.data

    @property
    def count(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def contiguous(self) -> bool:
        """Whether the elements lie in row-major order without gaps."""
        wanted = contiguous_strides(self.shape)
        return all(s == w or extent == 1 for s, w, extent in zip(self.stride, wanted, self.shape, strict=True))


@dataclass(frozen=True, slots=True, eq=False)
class TensorMut(TensorRef):
    """A tensor that a plan writes."""
