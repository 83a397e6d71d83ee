"""Rows or elements chosen by an index, and gradients of what was chosen from.

For example, the rows of an embedding, and the gradient of the table:

    plan = TakePlan.select(stream, TakeDescriptor(1, 32000, 4096, 3072, ElementKind.BF16, ElementKind.I32))
    plan.run(stream, None, TakeArgs(out, table, index))
    plan = TakeBackwardPlan.select(stream, TakeBackwardDescriptor(1, 32000, 4096, 3072, BF16, ElementKind.I32))
    plan.run(stream, workspace, TakeArgs(d_table, d_out, index))          # adds to what d_table holds
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from kernels import take as kernel
from kernels.movement import THREADS
from plans.core import (
    ArchSku,
    BackendKind,
    Device,
    ElementKind,
    InvalidProblem,
    MathPrecision,
    OpCategory,
    Operand,
    Plan,
    PrecisionGuarantee,
    Sku,
    TensorMut,
    TensorRef,
    Workspace,
)
from plans.core.plan import Arguments
from plans.core.sku import begins_early

_F32 = ElementKind.F32
_FLOATS = (ElementKind.BF16, ElementKind.F16, _F32)
_INTEGERS = (ElementKind.I32, ElementKind.I64)
_VECTOR_BYTES = 16
_COUNT = 2**31


@dataclass(frozen=True)
class TakeDescriptor:
    """out[o, j, i] = source[o, index[j], i] for source [outer, n, inner]; ``elementwise``: index[o, j, i].

    An index outside of 0..n-1 gives NaN (integers: -1), so that it shows. ``aligned``: everything but the index lies at
    multiples of 16 bytes.
    """

    outer: int
    n: int
    chosen: int
    inner: int
    element: ElementKind
    index: ElementKind
    elementwise: bool = False
    aligned: bool = True

    category = OpCategory.INDEXING

    def __post_init__(self) -> None:
        if min(self.outer, self.n, self.chosen, self.inner) < 0:
            raise InvalidProblem(f"take: {self}, wanted no negative extent; give the tensors' own")
        if self.index not in _INTEGERS:
            raise InvalidProblem(f"take: operand index holds {self.index.value}, wanted i32 or i64; give whole numbers")

    @property
    def out_shape(self) -> tuple[int, int, int]:
        """What is taken."""
        return (self.outer, self.chosen, self.inner)

    @property
    def alignment(self) -> int:
        """Of what is moved, in bytes; 0 is an element's own."""
        return _VECTOR_BYTES if self.aligned else 0

    @property
    def index_operand(self) -> Operand:
        """``index``."""
        return Operand("index", self.index, self.out_shape if self.elementwise else (self.chosen,))

    def operands(self) -> tuple[Operand, ...]:
        """``out``, ``source`` and ``index``."""
        return (
            Operand("out", self.element, self.out_shape, writes=True, alignment=self.alignment),
            Operand("source", self.element, (self.outer, self.n, self.inner), alignment=self.alignment),
            self.index_operand,
        )

    def places(self, index: np.ndarray) -> tuple[np.ndarray, ...]:
        """Where in the source each element comes from, and which indices are inside."""
        o, j, i = np.indices(self.out_shape)
        row = index.reshape(self.out_shape) if self.elementwise else index[j]
        return o, row, i, (row >= 0) & (row < self.n)

    def reference(self, source: np.ndarray, index: np.ndarray) -> np.ndarray:
        """The result, exactly."""
        o, row, i, ok = self.places(index)
        out = np.full(self.out_shape, -1 if self.element in _INTEGERS else np.nan, source.dtype)
        out[ok] = source.reshape(self.outer, self.n, self.inner)[o[ok], row[ok], i[ok]]
        return out


@dataclass(frozen=True)
class TakeBackwardDescriptor(TakeDescriptor):
    """d_source[o, r, i] += sum of d_out[o, j, i] over the j whose index is r, in an order that the index alone decides.

    ``element`` is d_out's kind, d_source is fp32. Rows that no index names are neither read nor written: who wants the
    gradient alone fills d_source with zeros beforehand, who adds up gradients leaves what is there.
    """

    def operands(self) -> tuple[Operand, ...]:
        """``d_source``, ``d_out`` and ``index``."""
        return (
            Operand("d_source", _F32, (self.outer, self.n, self.inner), writes=True, alignment=self.alignment),
            Operand("d_out", self.element, self.out_shape, alignment=self.alignment),
            self.index_operand,
        )

    def backward_reference(self, d_out: np.ndarray, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What is added, in float64, and its magnitude: the sum of |terms|, as often as there are terms."""
        o, row, i, ok = self.places(index)
        places = (o[ok], row[ok], i[ok])
        exact, terms, count = np.zeros((3, self.outer, self.n, self.inner))
        g = d_out.reshape(self.out_shape).astype(np.float64)[ok]
        np.add.at(exact, places, g)
        np.add.at(terms, places, np.abs(g))
        np.add.at(count, places, 1)
        return exact, terms * count


class TakeArgs(Arguments):
    """The tensor written (out or d_source), the one read (source or d_out), and the index."""

    def __init__(self, out: TensorMut, source: TensorRef, index: TensorRef) -> None:
        super().__init__()
        self.out, self.source, self.index = out, source, index

    def tensors(self) -> list[TensorRef]:
        """``out``, ``source`` and ``index``."""
        return [self.out, self.source, self.index]


def _refuses_take(d: TakeDescriptor) -> str:
    extents = (math.prod(d.out_shape), d.outer * d.n * d.inner)
    return "" if max(extents) < _COUNT else "takes fewer than 2**31 elements"


def _refuses_backward(d: TakeBackwardDescriptor) -> str:
    if d.element not in _FLOATS:
        return f"adds {', '.join(k.value for k in _FLOATS)}, not {d.element.value}"
    return _refuses_take(d)


def _refuses_added_rows(d: TakeBackwardDescriptor) -> str:
    return "has one index for all of inner" if d.elementwise else _refuses_backward(d)


def _refuses_added_elements(d: TakeBackwardDescriptor) -> str:
    return _refuses_backward(d) if d.elementwise else "has an index for each element"


def _refuses_taken_rows(d: TakeDescriptor) -> str:
    if reason := _refuses_take(d):
        return reason
    if d.elementwise or not d.n:
        return "takes whole rows of a source that has some"
    if not d.aligned or d.inner % (_VECTOR_BYTES // d.element.itemsize):
        return "wants rows of whole 16-byte accesses, aligned to 16 bytes"
    return ""


class _TakeProgram:
    """One launch, one thread an element."""

    def __init__(self, d: TakeDescriptor, device: Device) -> None:
        count = math.prod(d.out_shape)
        self.launch = None
        if count:
            made = kernel.take(d.element.value, d.index.value, d.elementwise, begins_early(device))
            self.launch = made.launcher((-(-count // THREADS), 1, 1))
            self.rest = (
                -1 if d.element in _INTEGERS else np.float32(np.nan),
                d.n,
                d.chosen,
                d.inner,
                count,
            )

    def bind(self, args: TakeArgs, workspace: Workspace) -> list[tuple[Callable, tuple]]:
        """The launch; none where nothing is taken."""
        if self.launch is None:
            return []
        return [(self.launch, (args.source.data, args.index.data, args.out.data, *self.rest))]


class _RowsProgram:
    """One launch, four accesses a thread."""

    def __init__(self, d: TakeDescriptor, device: Device) -> None:
        inner = d.inner * d.element.itemsize // _VECTOR_BYTES
        count = d.outer * d.chosen * inner
        self.launch = None
        if count:
            made = kernel.take_rows(d.element.value, d.index.value, begins_early(device))
            self.launch = made.launcher((-(-count // (THREADS * kernel.ACCESSES)), 1, 1))
            fill = np.full(4, -1 if d.element in _INTEGERS else np.nan, d.element.values).view(np.uint32)[0]
            self.rest = (fill, d.n, d.chosen, inner, count)

    def bind(self, args: TakeArgs, workspace: Workspace) -> list[tuple[Callable, tuple]]:
        """The launch; none where nothing is taken."""
        if self.launch is None:
            return []
        return [(self.launch, (args.source.data, args.index.data, args.out.data, *self.rest))]


def _segment(d: TakeBackwardDescriptor) -> int:
    """Places that a thread adds up at most."""
    return kernel.SEGMENT if d.outer * d.inner <= kernel.FEW_COLUMNS else kernel.RANGE


def _workspace(d: TakeBackwardDescriptor) -> int:
    if not math.prod(d.out_shape):
        return 0
    segments = kernel.RANGE // _segment(d)
    return 4 * (3 * kernel.RANGE + (segments * d.outer * d.inner if segments > 1 else 0))


class _AddRows:
    """Places are sorted, rows' sums added, and those of long rows' later segments: three launches a range of places."""

    def __init__(self, d: TakeBackwardDescriptor, device: Device) -> None:
        self.steps: list[tuple] = []
        if not math.prod(d.out_shape) or not d.n:
            return
        width = 8 if d.aligned and d.inner % 8 == 0 else 1
        inner, segment = d.inner // width, _segment(d)
        units = d.outer * inner
        team = min(THREADS, 1 << (units - 1).bit_length())
        across, teams = -(-units // team), THREADS // team
        early = begins_early(device)
        sort = kernel.sort_places(d.index.value, early)
        add, finish = kernel.add_rows(d.element.value, width, early), kernel.add_parts(width, early)
        for first in range(0, d.chosen, kernel.RANGE):
            count = min(kernel.RANGE, d.chosen - first)
            seekers = THREADS // kernel.SEEKERS
            segments = -(-count // segment)
            self.steps.append((
                (sort.launcher((-(-count // seekers), 1, 1)), (first, count, d.n)),
                (add.launcher((across, -(-count // teams), 1)), (d.n, d.chosen, inner, units, count, segment, team)),
                (finish.launcher((across, -(-segments // teams), 1)), (d.n, inner, units, count, segment, team))
                if segments > 1 else None,
            ))  # fmt: skip

    def bind(self, args: TakeArgs, workspace: Workspace) -> list[tuple[Callable, tuple]]:
        """The launches; none where nothing was taken."""
        made: list[tuple[Callable, tuple]] = []
        if not self.steps:
            return made
        ordered = workspace.buffer.pointer(np.int32)
        parts = workspace.buffer.pointer(np.float32, 4 * 3 * kernel.RANGE)
        for sort, add, finish in self.steps:
            made.append((sort[0], (args.index.data, ordered, *sort[1])))
            made.append((add[0], (ordered, args.source.data, args.out.data, parts, *add[1])))
            if finish:
                made.append((finish[0], (ordered, args.out.data, parts, *finish[1])))
        return made


class _AddElements:
    """One launch: a thread for each column, where the index is elementwise."""

    def __init__(self, d: TakeBackwardDescriptor, device: Device) -> None:
        self.launch = None
        columns = d.outer * d.inner
        if columns and d.chosen:
            made = kernel.gather_backward(d.element.value, d.index.value, begins_early(device))
            self.launch = made.launcher((-(-columns // THREADS), 1, 1))
            self.rest = (d.n, d.chosen, d.inner, columns)

    def bind(self, args: TakeArgs, workspace: Workspace) -> list[tuple[Callable, tuple]]:
        """The launch; none where nothing was taken."""
        if self.launch is None:
            return []
        return [(self.launch, (args.index.data, args.source.data, args.out.data, *self.rest))]


_EXACT = PrecisionGuarantee.exact("elements are moved, not computed")
_ADDED = PrecisionGuarantee(
    math_precision=MathPrecision.F32,
    accumulator=ElementKind.F32,
    deterministic=True,
    bit_stable_on_same_hardware=True,
    rounding_units=1.0,
    derivation="one rounding an addition, of no more than the sum of |terms|, of what was there before among them",
)


_TAKEN, _ADDED_UP = (lambda descriptor: _EXACT), (lambda descriptor: _ADDED)


class TakePlan(Plan):
    """Rows, or elements, chosen by an index; see :class:`TakeDescriptor`."""

    name = "take"
    skus = (
        Sku("rows", BackendKind.VECTOR, ArchSku.ANY, _refuses_taken_rows, _TAKEN, _RowsProgram),
        Sku("portable", BackendKind.PORTABLE, ArchSku.ANY, _refuses_take, _TAKEN, _TakeProgram),
    )


class TakeBackwardPlan(Plan):
    """The gradient of what was chosen from; see :class:`TakeBackwardDescriptor`."""

    name = "take backward"
    skus = (
        Sku("rows", BackendKind.VECTOR, ArchSku.ANY, _refuses_added_rows, _ADDED_UP, _AddRows, _workspace),
        Sku("elements", BackendKind.PORTABLE, ArchSku.ANY, _refuses_added_elements, _ADDED_UP, _AddElements),
    )
