"""Changes of layout: activations NHWC <-> NCHW, weights between checkpoint files' layout and FLAME's. Bit-exact.

For example:

    descriptor = LayoutDescriptor((8, 320, 64, 64), ElementKind.BF16, Conversion.TO_NHWC)
    plan = LayoutPlan.select(stream, descriptor)
    plan.run(stream, None, LayoutArgs(out, source))           # out [8, 64, 64, 320]
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from kernels import layout as kernel
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

_EXTENTS = 2**31
_WORDS = {ElementKind.BF16: "u16", ElementKind.F16: "u16", ElementKind.F32: "f32", ElementKind.I32: "i32"}


class Conversion(enum.Enum):
    """What is converted to what; any number of spatial or filter axes, none included.

    TO_NCHW: [N, *spatial, C] -> [N, C, *spatial].      TO_NHWC: the inverse.
    TO_FLAME: [O, I, *kernel] -> [*kernel, I, O].       TO_CHECKPOINT: the inverse.
    """

    TO_NCHW = "nhwc to nchw"
    TO_NHWC = "nchw to nhwc"
    TO_FLAME = "checkpoint to flame"
    TO_CHECKPOINT = "flame to checkpoint"

    def axes(self, ndim: int) -> tuple[int, ...]:
        """The source's axes in the order of the result's, as `numpy.transpose` takes them."""
        first, *between, last = range(ndim)
        match self:
            case Conversion.TO_NCHW:
                return (first, last, *between)
            case Conversion.TO_NHWC:
                return (first, *range(2, ndim), 1)
            case Conversion.TO_FLAME:
                return (*range(2, ndim), 1, 0)
            case Conversion.TO_CHECKPOINT:
                return (last, ndim - 2, *range(ndim - 2))


@dataclass(frozen=True)
class LayoutDescriptor:
    """``out = source`` with its axes in another order; ``shape`` is the source's, of at least two axes."""

    shape: tuple[int, ...]
    element: ElementKind
    conversion: Conversion

    category = OpCategory.SHAPE_LAYOUT

    def __post_init__(self) -> None:
        if len(self.shape) < 2 or min(self.shape) < 0:
            raise InvalidProblem(
                f"layout: shape {self.shape}, wanted two or more axes, none of them negative; "
                "give the tensor's own shape"
            )

    @property
    def axes(self) -> tuple[int, ...]:
        """The source's axes in the order of the result's."""
        return self.conversion.axes(len(self.shape))

    @property
    def out_shape(self) -> tuple[int, ...]:
        """The result's shape."""
        return tuple(self.shape[axis] for axis in self.axes)

    @property
    def layout_name(self) -> str:
        """The conversion, for the SKU."""
        return self.conversion.value

    def operands(self) -> tuple[Operand, ...]:
        """``out`` and ``source``."""
        return (
            Operand("out", self.element, self.out_shape, writes=True),
            Operand("source", self.element, self.shape),
        )

    def reference(self, source: np.ndarray) -> np.ndarray:
        """The result, exactly."""
        return np.ascontiguousarray(source.reshape(self.shape).transpose(self.axes))


class LayoutArgs(UnaryArguments):
    """The tensors of one conversion."""


@dataclass(frozen=True)
class _Transpose:
    """The conversion as [batch, rows, columns] -> [batch, columns, rows]; ``mapped``: whose rows swap axes."""

    batch: int
    rows: int
    columns: int
    channels: int = 1
    taps: int = 1
    mapped: str = "none"

    @classmethod
    def of(cls, descriptor: LayoutDescriptor) -> _Transpose:
        shape = descriptor.shape
        match descriptor.conversion:
            case Conversion.TO_NCHW:
                return cls(shape[0], math.prod(shape[1:-1]), shape[-1])
            case Conversion.TO_NHWC:
                return cls(shape[0], shape[1], math.prod(shape[2:]))
            case Conversion.TO_FLAME:
                taps = math.prod(shape[2:])
                return cls(1, shape[0], shape[1] * taps, shape[1], taps, "none" if taps == 1 else "write")
            case Conversion.TO_CHECKPOINT:
                taps, channels = math.prod(shape[:-2]), shape[-2]
                return cls(1, channels * taps, shape[-1], channels, taps, "none" if taps == 1 else "read")

    @property
    def tiles(self) -> tuple[int, int]:
        """Tiles down and across one matrix."""
        return -(-self.rows // kernel.TILE), -(-self.columns // kernel.TILE)


def _refuses(descriptor: LayoutDescriptor) -> str:
    if descriptor.element not in _WORDS:
        return f"moves {', '.join(kind.value for kind in _WORDS)}, not {descriptor.element.value}"
    problem = _Transpose.of(descriptor)
    if max(problem.rows, problem.columns, problem.batch * math.prod(problem.tiles)) >= _EXTENTS:
        return "takes fewer than 2**31 rows, columns and tiles"
    return ""


class _PortableProgram:
    """One launch, one block a tile of 32 x 32."""

    def __init__(self, descriptor: LayoutDescriptor, device: Device) -> None:
        self.problem = problem = _Transpose.of(descriptor)
        blocks = problem.batch * math.prod(problem.tiles)
        self.launch = None
        if blocks:
            self.launch = kernel.transpose(_WORDS[descriptor.element], problem.mapped).launcher((blocks, 1, 1))

    def bind(self, args: LayoutArgs, workspace: Workspace) -> list[tuple[Callable, tuple]]:
        """The launch; none where there is nothing to move."""
        if self.launch is None:
            return []
        p = self.problem
        return [(self.launch, (args.source.data, args.out.data, p.rows, p.columns, *p.tiles, p.channels, p.taps))]


_EXACT = PrecisionGuarantee.exact(
    "elements are moved, not computed",
)


class LayoutPlan(Plan):
    """The axes of a tensor in another order; see :class:`LayoutDescriptor`."""

    name = "layout"
    skus = (
        Sku(
            name="portable",
            backend=BackendKind.PORTABLE,
            arch=ArchSku.ANY,
            refuses=_refuses,
            guarantee=lambda descriptor: _EXACT,
            build=_PortableProgram,
        ),
    )
