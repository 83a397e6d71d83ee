"""Elements moved: windows of a tensor, as of copies, padding, reversal and triangles.

For example, a matrix with a border of zeros:

    d = WindowDescriptor((34, 34), (32, 32), ElementKind.BF16, shifts=(-1, -1), signs=(1, 1))
    WindowPlan.select(stream, d).run(stream, None, WindowArgs(out, x))
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from kernels import movement as kernel
from plans.core import (
    ArchSku,
    BackendKind,
    Device,
    ElementKind,
    InvalidProblem,
    OpCategory,
    Operand,
    Plan,
    PrecisionGuarantee,
    Sku,
    Workspace,
)
from plans.core.plan import UnaryArguments
from plans.core.sku import begins_early

MAX_AXES = 6
_VECTOR_BYTES = 16
_INTEGERS = (ElementKind.I32, ElementKind.I64)
_COUNT = 2**31
_NO_DIAGONAL = -(2**40)


@dataclass(frozen=True)
class WindowDescriptor:
    """out[c] = source[shift + sign * c] where that lies inside and c[-1] - c[-2] >= diagonal, else ``fill``.

    ``shape`` is out's; ``shifts`` and ``signs`` (1 or -1) have one number an axis. Strides are in elements, None where
    a tensor is contiguous. ``aligned``: out lies at a multiple of 16 bytes.
    """

    shape: tuple[int, ...]
    source_shape: tuple[int, ...]
    element: ElementKind
    shifts: tuple[int, ...]
    signs: tuple[int, ...]
    fill: float = 0
    diagonal: int | None = None
    stride: tuple[int, ...] | None = None
    out_stride: tuple[int, ...] | None = None
    aligned: bool = True

    category = OpCategory.SHAPE_LAYOUT

    def __post_init__(self) -> None:
        axes = len(self.shape)
        if any(len(part) != axes for part in (self.source_shape, self.shifts, self.signs)):
            raise InvalidProblem(
                f"window: source_shape {self.source_shape}, shifts {self.shifts}, signs {self.signs}, wanted {axes} "
                "numbers each; give one for each axis of shape"
            )
        if not set(self.signs) <= {1, -1} or min((*self.shape, *self.source_shape), default=0) < 0:
            raise InvalidProblem(
                f"window: signs {self.signs}, shape {self.shape} of {self.source_shape}, wanted 1 or -1, and no "
                "negative extent; give the tensors' own"
            )
        if self.diagonal is not None and axes < 2:
            raise InvalidProblem(
                f"window: a diagonal of shape {self.shape}, wanted two axes or more; leave diagonal out"
            )

    def operands(self) -> tuple[Operand, ...]:
        """``out`` and ``source``."""
        return (
            Operand(
                "out",
                self.element,
                self.shape,
                writes=True,
                layout=self.out_stride,
                alignment=_VECTOR_BYTES if self.aligned else 0,
            ),
            Operand("source", self.element, self.source_shape, layout=self.stride),
        )

    def reference(self, source: np.ndarray) -> np.ndarray:
        """The result, exactly."""
        places = np.indices(self.shape)
        out = np.full(self.shape, self.fill, source.dtype)
        wanted = [shift + sign * c for shift, sign, c in zip(self.shifts, self.signs, places, strict=True)]
        ok = np.logical_and.reduce(
            [(w >= 0) & (w < e) for w, e in zip(wanted, self.source_shape, strict=True)], initial=True
        )
        ok = np.broadcast_to(ok, self.shape).copy()
        if self.diagonal is not None:
            ok &= places[-1] - places[-2] >= self.diagonal
        out[ok] = source[tuple(w[ok] for w in wanted)]
        return out


class WindowArgs(UnaryArguments):
    """The tensors of one window."""


def _refuses_window(d: WindowDescriptor) -> str:
    if len(d.shape) > MAX_AXES:
        return f"takes up to {MAX_AXES} axes, not {len(d.shape)}"
    return "" if math.prod(d.shape) < _COUNT else "takes fewer than 2**31 elements"


def _refuses_lines(d: WindowDescriptor) -> str:
    if reason := _refuses_window(d):
        return reason
    strides, run = d.operands()[0].strides, _VECTOR_BYTES // d.element.itemsize
    if not d.shape or not d.aligned or strides[-1] != 1 or any(n % run for n in (d.shape[-1], *strides[:-1])):
        return "wants a result that begins and goes on in whole 16-byte accesses along its last axis"
    return ""


def _fill_value(kind: ElementKind, fill: float) -> np.float32 | int:
    return int(fill) if kind in _INTEGERS else np.float32(fill)


class _WindowProgram:
    """One launch, 16 bytes a thread, or one element."""

    def __init__(self, d: WindowDescriptor, device: Device, wide: bool) -> None:
        out, source = d.operands()
        count, axes = out.count, max(1, len(d.shape))
        self.launch = None
        if not count:
            return
        run = _VECTOR_BYTES // d.element.itemsize if wide else 1
        shape = (*d.shape[:-1], d.shape[-1] // run) if d.shape else ()
        groups = (shape, d.shifts, d.signs, d.source_shape, source.strides, out.strides)
        if not d.shape:  # a single number is a window of one axis
            groups = ((1,), (0,), (1,), (1,), (1,), (1,))
        made = kernel.window(d.element.value, axes, run, begins_early(device))
        self.launch = made.launcher((-(-count // (run * kernel.THREADS)), 1, 1))
        self.fill = _fill_value(d.element, d.fill)
        diagonal = _NO_DIAGONAL if d.diagonal is None else d.diagonal
        self.rest = (*(number for group in groups for number in group), diagonal, count // run)

    def bind(self, args: WindowArgs, workspace: Workspace) -> list[tuple[Callable, tuple]]:
        """The launch; none where there is nothing to write."""
        return [] if self.launch is None else [(self.launch, (args.source.data, args.out.data, self.fill, *self.rest))]


_EXACT = PrecisionGuarantee.exact("elements are moved, not computed")


def _sku(name: str, backend: BackendKind, refuses: Callable[[WindowDescriptor], str], wide: bool) -> Sku:
    return Sku(name, backend, ArchSku.ANY, refuses, lambda descriptor: _EXACT, partial(_WindowProgram, wide=wide))


class WindowPlan(Plan):
    """A window of a tensor; see :class:`WindowDescriptor`."""

    name = "window"
    skus = (
        _sku("lines", BackendKind.VECTOR, _refuses_lines, True),
        _sku("portable", BackendKind.PORTABLE, _refuses_window, False),
    )
