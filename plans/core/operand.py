"""Operands: the tensors of a plan declared as data, and every check that follows from the declaration.

Shape, kind, contiguity, device, size, alignment and overlaps are compared here, for all plans alike.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from plans.core.device import Device
from plans.core.errors import BufferTooSmall, InvalidProblem, MisalignedOperand
from plans.core.precision import ElementKind
from plans.core.tensor import TensorMut, TensorRef, contiguous_strides


@dataclass(frozen=True)
class Operand:
    """One tensor of a plan: its name, kind, shape, whether it is written, and its alignment in bytes.

    ``may_alias`` names another operand whose bytes it may be: exactly those, not some of them. One that is ``shared``
    may be the same in all members of a group, although they write it. ``layout`` are the strides, in elements, of a
    tensor that is not contiguous; its last axis still is.
    """

    name: str
    element: ElementKind
    shape: tuple[int, ...]
    writes: bool = False
    alignment: int = 0
    may_alias: str = ""
    shared: bool = False
    layout: tuple[int, ...] | None = None

    @functools.cached_property
    def strides(self) -> tuple[int, ...]:
        """Strides of the tensor, in elements."""
        return contiguous_strides(self.shape) if self.layout is None else self.layout

    @functools.cached_property
    def count(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @functools.cached_property
    def span(self) -> int:
        """Elements from the first to the last, with what lies between."""
        if not self.count:
            return 0
        return 1 + sum((extent - 1) * stride for extent, stride in zip(self.shape, self.strides, strict=True))

    @functools.cached_property
    def nbytes(self) -> int:
        """Bytes of the whole tensor, with what lies between its elements."""
        return self.span * self.element.itemsize

    def fits(self, tensor: TensorRef) -> bool:
        """Whether a tensor of the same shape has these strides, where they matter."""
        if tensor.stride == self.strides:
            return True
        pairs = zip(tensor.stride, self.strides, self.shape, strict=True)
        return not self.count or all(s == w or extent == 1 for s, w, extent in pairs)


class Extent(NamedTuple):
    """Bytes [start, end) of device memory, the operand that lies there, and whether it is written."""

    start: int
    end: int
    writes: bool
    name: str


def check_operands(
    plan: str,
    operands: Sequence[Operand],
    tensors: Sequence[TensorRef | None],
    device: Device,
    alignment: int,
) -> None:
    """Compare tensors with their declaration, one by one; raises naming operand, found and wanted."""
    if len(tensors) != len(operands):
        names = ", ".join(o.name for o in operands)
        raise InvalidProblem(
            f"{plan}: {len(tensors)} operands given, wanted {len(operands)}: {names}; give one for each"
        )
    for operand, tensor in zip(operands, tensors, strict=True):
        if not isinstance(tensor, TensorRef) or tensor.element is not operand.element or tensor.shape != operand.shape:
            _refuse_kind(f"{plan}: operand {operand.name}", operand, tensor)
        _check_memory(plan, operand, tensor, device, alignment)


def _refuse_kind(where: str, operand: Operand, tensor: TensorRef | None) -> None:
    if tensor is None:
        raise InvalidProblem(f"{where} is missing; wanted {operand.element.value} of shape {operand.shape}")
    if not isinstance(tensor, TensorRef):
        raise InvalidProblem(f"{where} is a {type(tensor).__name__}; wanted a TensorRef")
    if tensor.element is not operand.element:
        raise InvalidProblem(f"{where} holds {tensor.element.value}, wanted {operand.element.value}; cast it first")
    raise InvalidProblem(
        f"{where} has shape {tensor.shape}, wanted {operand.shape}; reshape it, or select a plan for it"
    )


def _check_memory(plan: str, operand: Operand, tensor: TensorRef, device: Device, alignment: int) -> None:
    if not operand.fits(tensor):
        wanted = "it contiguous, copy it first" if operand.layout is None else f"{operand.strides} as the plan was made"
        raise InvalidProblem(f"{plan}: operand {operand.name} has strides {tensor.stride}; wanted {wanted}")
    if tensor.device != device.ordinal:
        raise InvalidProblem(
            f"{plan}: operand {operand.name} is on device {tensor.device}, the plan is for device {device.ordinal}; "
            "copy it there"
        )
    if tensor.available < operand.span:
        raise BufferTooSmall(f"{plan}: {operand.name}", operand.span, tensor.available)
    if operand.writes and not isinstance(tensor, TensorMut):
        raise InvalidProblem(
            f"{plan}: operand {operand.name} is written, but a read-only TensorRef was given; wanted a TensorMut"
        )
    wanted = max(operand.alignment, alignment, operand.element.itemsize)
    if operand.count and tensor.address % wanted:
        raise MisalignedOperand(
            f"{plan}: operand {operand.name} lies at address {tensor.address:#x}, wanted a multiple of {wanted} bytes; "
            "copy it to memory of its own"
        )


def extents(operands: Sequence[Operand], tensors: Sequence[TensorRef], prefix: str = "") -> list[Extent]:
    """Where checked operands lie; empty ones and those that another one rightly aliases are left out.

    ``prefix`` goes before the operands' names, except those of shared ones, which then are the same for all members.
    """
    found: dict[str, Extent] = {}
    for operand, tensor in zip(operands, tensors, strict=True):
        if operand.count:
            start, name = tensor.address, operand.name
            label = name if operand.shared else prefix + name
            found[name] = Extent(start, start + operand.nbytes, operand.writes, label)
    for operand in operands:
        if operand.may_alias:
            own, other = found.get(operand.name), found.get(operand.may_alias)
            if own is not None and other is not None and own[:2] == other[:2]:
                del found[operand.may_alias]
    return list(found.values())


def check_overlaps(plan: str, found: Iterable[Extent]) -> None:
    """Refuse memory that is written and also read, or written twice; raises InvalidProblem naming both operands."""
    last: Extent | None = None
    last_written: Extent | None = None
    for extent in sorted(found):
        other = last if extent.writes else last_written
        if other is not None and extent.start < other.end:
            written, used = (extent, other) if extent.writes else (other, extent)
            raise InvalidProblem(
                f"{plan}: operand {written.name} is written to addresses {written.start:#x} to {written.end:#x}, but "
                f"{used.name} lies at {used.start:#x} to {used.end:#x}; give each its own memory"
            )
        if last is None or extent.end > last.end:
            last = extent
        if extent.writes and (last_written is None or extent.end > last_written.end):
            last_written = extent
