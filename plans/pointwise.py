"""Expressions over tensors, element by element: any function of :mod:`plans.expression` in one kernel.

For example:

    x, y = leaf(0), leaf(1)
    operands = (View(ElementKind.BF16), View(ElementKind.BF16, (0, 1)))      # a matrix, and a row that repeats
    descriptor = PointwiseDescriptor((x.silu() * y,), (4096, 3072), operands, (View(ElementKind.BF16),))
    plan = PointwisePlan.select(stream, descriptor)
    plan.run(stream, None, PointwiseArgs([out], [a, b]))
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from kernels import pointwise as kernel
from kernels import pointwise_turned as turned_kernel
from plans import expression
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
from plans.core.tensor import contiguous_strides
from plans.expression import Expr, leaf

KINDS = (ElementKind.BF16, ElementKind.F16, ElementKind.F32)
MAX_AXES = 6
_UNITS = 2**31
_SHARED_BYTES = 48 << 10
_VECTOR_BYTES = 16


class View(NamedTuple):
    """An operand's kind, and its strides in elements where it is not contiguous; 0 repeats along an axis."""

    element: ElementKind
    stride: tuple[int, ...] | None = None


@dataclass(frozen=True)
class PointwiseDescriptor:
    """targets[k][i] = round(outputs[k](sources[0][i], ..., scalars)) for every index i of ``shape``.

    The expressions' leaves are the sources and then ``scalars`` numbers, given as fp32 with the arguments. A target may
    be the source of its own number, in place. ``aligned``: every operand's first element lies at a multiple of 16
    bytes. Raises InvalidProblem where an expression reads a leaf that is not there or a target repeats an element.
    """

    outputs: tuple[Expr, ...]
    shape: tuple[int, ...]
    sources: tuple[View, ...]
    targets: tuple[View, ...]
    scalars: int = 0
    aligned: bool = True

    category = OpCategory.ELEMENTWISE

    def __post_init__(self) -> None:
        arguments = len(self.sources) + self.scalars
        if any(number >= arguments for number in expression.leaves(self.outputs)):
            raise InvalidProblem(
                f"pointwise: {self.outputs} reads beyond its {arguments} arguments; "
                "give a source or a scalar for each leaf"
            )
        if len(self.outputs) != len(self.targets) or not self.targets:
            raise InvalidProblem(
                f"pointwise: {len(self.targets)} targets, wanted {len(self.outputs)}, one an output; give one for each"
            )
        for view in (*self.sources, *self.targets):
            if view.stride is not None and (len(view.stride) != len(self.shape) or min(view.stride, default=0) < 0):
                raise InvalidProblem(
                    f"pointwise: strides {view.stride}, wanted one, not negative, an axis of {self.shape}; "
                    "give the tensor's"
                )
        for view in self.targets:
            if view.stride and any(s == 0 and extent > 1 for s, extent in zip(view.stride, self.shape, strict=True)):
                raise InvalidProblem(
                    f"pointwise: a target has strides {view.stride}, wanted each element once; "
                    "write to a tensor of its own"
                )

    def operands(self) -> tuple[Operand, ...]:
        """``out0``, ... and then ``x0``, ..."""
        targets = []
        for k, view in enumerate(self.targets):
            alias = f"x{k}" if k < len(self.sources) and self.sources[k] == view else ""
            targets.append(
                Operand(f"out{k}", view.element, self.shape, writes=True, may_alias=alias, layout=view.stride)
            )
        sources = [Operand(f"x{k}", v.element, self.shape, layout=v.stride) for k, v in enumerate(self.sources)]
        return (*targets, *sources)

    @functools.cached_property
    def program(self) -> tuple:
        """The outputs in plain data."""
        return expression.lower(self.outputs, [leaf(i) for i in range(len(self.sources) + self.scalars)])

    @functools.cached_property
    def geometry(self) -> Geometry:
        """The axes that are left where neighbours are walked as one."""
        views = (*self.sources, *self.targets)
        strides = [contiguous_strides(self.shape) if v.stride is None else v.stride for v in views]
        return Geometry.of(self.shape, strides)

    def reference(
        self, sources: Sequence[np.ndarray], scalars: Sequence[float] = ()
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """Each output in float64 and its magnitude: what first-order error analysis allows, see expression.evaluate."""
        numbers = [np.float64(np.float32(s)) for s in scalars]
        found = expression.evaluate(self.outputs, [*(np.asarray(s, np.float64) for s in sources), *numbers])
        return [tuple(np.broadcast_to(part, self.shape) for part in pair) for pair in found]


@dataclass(frozen=True)
class Geometry:
    """Extents of the axes, outermost first, at least one, and each operand's strides."""

    extents: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, shape: Sequence[int], strides: Sequence[Sequence[int]]) -> Geometry:
        """Axes of extent 1 are left out, and two are one where every operand steps through them evenly."""
        axes: list[list] = []
        for axis, extent in enumerate(shape):
            steps = tuple(s[axis] for s in strides)
            if extent == 1:
                continue
            if axes and all(outer == extent * inner for outer, inner in zip(axes[-1][1], steps, strict=True)):
                axes[-1] = [axes[-1][0] * extent, steps]
            else:
                axes.append([extent, steps])
        if not axes:
            axes = [[math.prod(shape), (1,) * len(strides)]]
        return cls(tuple(e for e, _ in axes), tuple(zip(*(steps for _, steps in axes), strict=True)))

    @property
    def flat(self) -> bool:
        """Whether every operand is one run of neighbours."""
        return len(self.extents) == 1 and all(s == (1,) for s in self.strides)

    def turned(self, targets: int) -> Turned | None:
        """Tiles of the two axes along which the last ``targets`` operands and the others have neighbours, if any."""
        last_axes = [a for a in range(len(self.extents)) if all(s[a] == 1 for s in self.strides[-targets:])]
        for columns in last_axes:
            for rows in range(len(self.extents)):
                across = [s[columns] > 1 for s in self.strides]
                if (
                    rows != columns
                    and any(across)
                    and all(s[rows] == 1 if a else s[columns] < 2 for a, s in zip(across, self.strides, strict=True))
                ):
                    order = [*(a for a in range(len(self.extents)) if a not in (rows, columns)), rows, columns]
                    strides = tuple(tuple(s[a] for a in order) for s in self.strides)
                    ways = tuple("across" if s[-1] > 1 else ("repeated", "along")[s[-1]] for s in strides)
                    return Turned(Geometry(tuple(self.extents[a] for a in order), strides), ways)
        return None

    def in_eights(self) -> Geometry:
        """The same in units of eight elements of the innermost axis."""
        strides = tuple((*s[:-1], 8 * s[-1]) for s in self.strides)
        return Geometry((*self.extents[:-1], self.extents[-1] // 8), strides)


class Turned(NamedTuple):
    """Axes with a tile's rows and columns last; each operand lies "across", "along" the columns, or is "repeated"."""

    geometry: Geometry
    ways: tuple[str, ...]


class PointwiseArgs(Arguments):
    """Targets, sources, and the numbers that the descriptor's scalars stand for."""

    def __init__(
        self, targets: Sequence[TensorMut], sources: Sequence[TensorRef], scalars: Sequence[float] = ()
    ) -> None:
        super().__init__()
        self.targets, self.sources = list(targets), list(sources)
        self.scalars = tuple(np.float32(s) for s in scalars)

    def tensors(self) -> list[TensorRef]:
        """Targets, then sources."""
        return [*self.targets, *self.sources]


def _refuses_any(descriptor: PointwiseDescriptor) -> str:
    for view in (*descriptor.sources, *descriptor.targets):
        if view.element not in KINDS:
            return f"computes on {', '.join(k.value for k in KINDS)}, not {view.element.value}"
    return ""


def _refuses_flat(descriptor: PointwiseDescriptor) -> str:
    if reason := _refuses_any(descriptor):
        return reason
    if not descriptor.aligned:
        return "wants operands aligned to 16 bytes"
    return "" if descriptor.geometry.flat else "wants every operand contiguous"


def _refuses_placed(descriptor: PointwiseDescriptor) -> str:
    if reason := _refuses_any(descriptor):
        return reason
    geometry = descriptor.geometry
    if len(geometry.extents) > MAX_AXES:
        return f"takes up to {MAX_AXES} axes that do not merge, not {len(geometry.extents)}"
    return "" if math.prod(geometry.extents) < _UNITS else "takes fewer than 2**31 elements"


def _refuses_rows(descriptor: PointwiseDescriptor) -> str:
    if reason := _refuses_placed(descriptor):
        return reason
    geometry, sources = descriptor.geometry, len(descriptor.sources)
    if not descriptor.aligned or geometry.extents[-1] % 8:
        return "wants operands aligned to 16 bytes and a multiple of 8 innermost"
    for k, strides in enumerate(geometry.strides):
        if strides[-1] != 1 and (k >= sources or strides[-1] != 0):
            return "wants the innermost axis walked in steps of 1 or not at all"
        if strides[-1] == 1 and any(s % 8 for s in strides[:-1]):
            return "wants outer strides that are multiples of 8"
    return ""


def _refuses_turned(descriptor: PointwiseDescriptor) -> str:
    if reason := _refuses_placed(descriptor):
        return reason
    found = descriptor.geometry.turned(len(descriptor.targets))
    if found is None:
        return "wants sources that lie across, all along one axis"
    extents, strides = found.geometry.extents, found.geometry.strides
    if not descriptor.aligned or extents[-1] % 8 or extents[-2] % 8:
        return "wants operands aligned to 16 bytes and multiples of 8 along both axes of a tile"
    outer = {"along": lambda s: s[:-1], "across": lambda s: (*s[:-2], s[-1]), "repeated": lambda s: ()}
    steps = [outer[way](s) for s, way in zip(strides, found.ways, strict=True)]
    if any(step % 8 for own in steps for step in own):
        return "wants outer strides that are multiples of 8"
    ways = found.ways[: len(descriptor.sources)]
    cells = turned_kernel.shared_bytes(kinds_of(descriptor.sources), ways)
    return (
        "" if cells <= _SHARED_BYTES else f"keeps tiles in {_SHARED_BYTES} bytes of shared memory, these need {cells}"
    )


@dataclass
class _Program:
    """One launch."""

    descriptor: PointwiseDescriptor
    device: Device
    launch: Callable | None = None
    rest: tuple = field(default=())

    def __post_init__(self) -> None:
        if math.prod(self.descriptor.shape):
            self.build(self.descriptor)

    @property
    def early(self) -> bool:
        """Whether the launch begins while the one before ends."""
        return begins_early(self.device)

    def build(self, d: PointwiseDescriptor) -> None:
        """Set the launcher and what follows the scalars."""
        raise TypeError("_Program is abstract")

    def bind(self, args: PointwiseArgs, workspace: Workspace) -> list[tuple[Callable, tuple]]:
        """The launch; none where there is nothing to compute."""
        if self.launch is None:
            return []
        data = [t.data for t in (*args.sources, *args.targets)]
        return [(self.launch, (*data, *args.scalars, *self.rest))]


def kinds_of(views: Sequence[View]) -> tuple[str, ...]:
    """The kernels' names of the views' kinds."""
    return tuple(view.element.value for view in views)


class _Flat(_Program):
    def build(self, d: PointwiseDescriptor) -> None:
        count = math.prod(d.shape)
        made = kernel.flat(d.program, kinds_of(d.sources), kinds_of(d.targets), self.early)
        self.launch = made.launcher((-(-count // (kernel.THREADS * kernel.RUN)), 1, 1))
        self.rest = (count,)


def _placed(launch: Callable, d: PointwiseDescriptor, geometry: Geometry) -> tuple[Callable, tuple]:
    units = math.prod(geometry.extents)
    strides = [step for strides in geometry.strides for step in strides]
    return launch.launcher((-(-units // kernel.THREADS), 1, 1)), (*geometry.extents, *strides, units)


class _Rows(_Program):
    def build(self, d: PointwiseDescriptor) -> None:
        geometry, count = d.geometry, len(d.sources)
        repeated = tuple(strides[-1] == 0 for strides in geometry.strides[:count])
        made = kernel.rows(
            d.program, kinds_of(d.sources), kinds_of(d.targets), repeated, len(geometry.extents), self.early
        )
        self.launch, self.rest = _placed(made, d, geometry.in_eights())


class _Turned(_Program):
    def build(self, d: PointwiseDescriptor) -> None:
        geometry, ways = d.geometry.turned(len(d.targets))
        extents, strides, tile = geometry.extents, geometry.strides, turned_kernel.TILE
        count, axes = len(d.sources), len(extents)
        tiles = (*extents[:-2], -(-extents[-2] // tile), -(-extents[-1] // tile))
        in_tiles = [step for s in strides for step in (*s[:-2], tile * s[-2], tile * s[-1])]
        origin = (*(0,) * (axes - 2), tile, 0, *(0,) * (axes - 2), 0, tile)
        steps = [s[-1] if way == "across" else s[-2] for s, way in zip(strides, ways, strict=True)]
        made = turned_kernel.turned(d.program, kinds_of(d.sources), kinds_of(d.targets), ways[:count], axes, self.early)
        self.launch = made.launcher((math.prod(tiles), 1, 1))
        self.rest = (*tiles, *in_tiles, *origin, *steps, *extents[-2:])


class _Strided(_Program):
    def build(self, d: PointwiseDescriptor) -> None:
        made = kernel.strided(d.program, kinds_of(d.sources), kinds_of(d.targets), len(d.geometry.extents), self.early)
        self.launch, self.rest = _placed(made, d, d.geometry)


_PROPAGATED = PrecisionGuarantee(
    math_precision=MathPrecision.F32,
    accumulator=ElementKind.F32,
    deterministic=True,
    bit_stable_on_same_hardware=True,
    rounding_units=1.25,
    derivation="every function's own error carried through the derivatives of those after it (expression.evaluate); "
    "a quarter more for what is of second order",
)


def _sku(name: str, backend: BackendKind, refuses: Callable, build: type, alignment: int) -> Sku:
    return Sku(
        name=name,
        backend=backend,
        arch=ArchSku.ANY,
        refuses=refuses,
        guarantee=lambda descriptor: _PROPAGATED,
        build=build,
        alignment=alignment,
    )


class PointwisePlan(Plan):
    """Expressions over tensors; see :class:`PointwiseDescriptor`."""

    name = "pointwise"
    skus = (
        _sku("flat", BackendKind.VECTOR, _refuses_flat, _Flat, _VECTOR_BYTES),
        _sku("rows", BackendKind.VECTOR, _refuses_rows, _Rows, _VECTOR_BYTES),
        _sku("turned", BackendKind.VECTOR, _refuses_turned, _Turned, _VECTOR_BYTES),
        _sku("strided", BackendKind.PORTABLE, _refuses_placed, _Strided, 0),
    )
