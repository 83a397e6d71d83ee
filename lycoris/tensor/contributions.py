"""What comes together as one gradient: contributions, slices among them, and their sum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lycoris.tensor.launch import F32, zeros_like_layout
from plans.core import ElementKind

if TYPE_CHECKING:
    from lycoris.tensor.tensor import Storage, Tensor


@dataclass(frozen=True)
class Part:
    """A gradient of ``shape`` that is zero but for elements start, start + step, ... of one axis.

    ``strides`` are those of the tensor that was sliced: its gradient is laid out alike, so that what made it, a
    permutation, needs no copy of the gradient.
    """

    gradient: Tensor
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    axis: int
    start: int
    step: int

    @property
    def storage(self) -> Storage:
        """Whose memory it is."""
        return self.gradient.storage

    @property
    def covered(self) -> tuple[int, int, int]:
        """The axis, and from where to where on it."""
        length = self.gradient.shape[self.axis]
        return self.axis, self.start, self.start + (length - 1) * self.step + 1

    def place(self, wide: Tensor) -> Tensor:
        """Where in a tensor of ``shape`` it goes."""
        strides = list(wide.strides)
        strides[self.axis] *= self.step
        offset = wide.offset + self.start * wide.strides[self.axis]
        return wide.viewed(self.gradient.shape, tuple(strides), offset)


class Sum:
    """Contributions to one gradient, added in fp32; the last one is added when the sum is asked for, and rounded then.

    Slices that do not overlap are put together without a sum. ``own``: nothing else refers to the value, which may
    then be changed in place. ``received`` counts the operations that contributed.
    """

    __slots__ = ("_covered", "_last", "_made", "_value", "own", "received")

    def __init__(self, value: Tensor | None = None, own: bool = False) -> None:
        self._value, self.own = value, own
        self._last: Tensor | None = None
        self._covered: list[tuple[int, int, int]] | None = None  # the slices that there are, while there is no more
        self._made = False  # made here: others may refer to a contribution that is the only one
        self.received = 0

    def add(self, part: Tensor | Part, own: bool, kind: ElementKind) -> None:
        """One more; ``kind`` is that of the gradient."""
        if isinstance(part, Part):
            self._add_slice(part, kind)
        elif self._value is None:
            self._value, self.own = part, own
        else:
            self._settle(F32)
            self._last = part

    def total(self, kind: ElementKind) -> Tensor:
        """The sum in a kind."""
        if self._last is not None:
            self._settle(kind)
        if self._value.kind is not kind:
            self._become(self._value.to(kind))
        return self._value

    def take(self, uses: int) -> Tensor | None:
        """What all of ``uses`` operations but one contributed, for that one to add; None if more are to come."""
        if self.received != uses - 1 or self._covered is not None:
            return None
        self._settle(F32)
        taken, self._value = self._value, None
        return taken

    def _become(self, value: Tensor) -> None:
        self._value, self._made, self.own = value, True, True

    def _settle(self, kind: ElementKind) -> None:
        """Add the last contribution, rounded to a kind."""
        if self._last is None:
            return
        if self._made and self._value.kind is kind is F32:
            self._value.add_(self._last)
        else:
            self._become(self._value.add(self._last, kind=kind))
        self._last = self._covered = None

    def _add_slice(self, part: Part, kind: ElementKind) -> None:
        self._settle(F32)
        if self._value is None:
            self._become(zeros_like_layout(part.shape, part.strides, kind, part.gradient.device))
            self._covered = []
        axis, start, stop = part.covered
        apart = self._covered is not None and all(a == axis and (stop <= s or e <= start) for a, s, e in self._covered)
        if apart:
            part.place(self._value).copy_(part.gradient)
            self._covered.append((axis, start, stop))
            return
        if self._value.kind is not F32:
            self._become(self._value.to(F32))
        elif not self._made:
            self._become(self._value.clone())
        self._covered = None
        part.place(self._value).add_(part.gradient)
