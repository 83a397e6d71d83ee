"""Plans on tensors, without gradients: what the differentiable operations are made of."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

from lycoris.buffers import scratch, stream_of
from lycoris.errors import RefusedInput
from lycoris.tensor.tensor import FLOATS, Shape, Storage, Tensor, compact_strides
from plans.core import Device, ElementKind, Workspace
from plans.core.plan import Contract
from plans.expression import Expr, leaf
from plans.layout import Conversion, LayoutArgs, LayoutDescriptor, LayoutPlan
from plans.movement import WindowArgs, WindowDescriptor, WindowPlan
from plans.pointwise import PointwiseArgs, PointwiseDescriptor, PointwisePlan, View
from plans.reduction import Reduction, ReductionArgs, ReductionDescriptor, ReductionPlan, elements, split_axes

F32 = ElementKind.F32
ITSELF = elements(1).full[0]


def empty(shape: Sequence[int], kind: ElementKind = F32, device: Device | None = None) -> Tensor:
    """Memory with undefined contents, from the stream-ordered pool of ``device`` or the first there is."""
    shape = tuple(shape)
    if min(shape, default=0) < 0:
        raise RefusedInput(f"empty: shape {shape}, wanted no negative extent; give 0 or more elements an axis")
    device = device or Device.open("auto")
    return Tensor(Storage(device.allocate(math.prod(shape) * kind.itemsize, stream_of(device))), shape, kind)


def zeros(shape: Sequence[int], kind: ElementKind = F32, device: Device | None = None) -> Tensor:
    """All elements zero."""
    out = empty(shape, kind, device)
    if out.size:
        out.device.fill(out.storage.buffer, 0, stream_of(out.device))
    return out


def zeros_like_layout(shape: Shape, strides: Shape, kind: ElementKind, device: Device) -> Tensor:
    """All elements zero, with strides that are given if they are those of a permuted contiguous tensor."""
    out = zeros(shape, kind, device)
    order = sorted(range(len(shape)), key=lambda axis: (-strides[axis], axis))
    compact = compact_strides(tuple(shape[axis] for axis in order))
    dense = all(strides[axis] == step or shape[axis] == 1 for axis, step in zip(order, compact, strict=True))
    return Tensor(out.storage, shape, kind, strides) if dense else out


def run(plan: Contract, args: Any) -> None:
    """Launch a plan on its device's stream, with workspace taken for the run.

    The descriptor was read off these very tensors, so that on a GPU nothing is checked again; the simulator checks.
    """
    device = plan.device
    stream, size = stream_of(device), plan.workspace_size()
    workspace = Workspace(scratch(device, size)) if size else Workspace()
    if device.is_simulator:
        plan.can_implement(args)
    for launch, arguments in plan.launches(args, workspace):
        launch(stream, arguments)


def same_device(operation: str, tensors: Sequence[Tensor]) -> Device:
    """The device of all tensors. Raises RefusedInput where they are on several."""
    device = tensors[0].device
    for other in tensors[1:]:
        if other.device is not device:
            raise RefusedInput(f"{operation}: tensors on {device.name} and {other.device.name}; bring them together")
    return device


def shaped(x: Tensor, shape: Shape) -> Tensor:
    """A contiguous tensor's elements under another shape; it is not looked at whether they are as many."""
    return Tensor(x.storage, shape, x.kind, offset=x.offset)


def broadcast_shape(operation: str, shapes: Sequence[Shape]) -> Shape:
    """The common shape: axes are aligned from the last one, and an extent of 1 repeats. Raises RefusedInput."""
    if len(set(shapes)) == 1:
        return shapes[0]
    axes = max(map(len, shapes), default=0)
    padded = [(1,) * (axes - len(shape)) + shape for shape in shapes]
    found = []
    for extents in zip(*padded, strict=True):
        others = {extent for extent in extents if extent != 1}
        if len(others) > 1:
            raise RefusedInput(
                f"{operation}: shapes {' and '.join(map(str, shapes))} do not broadcast, wanted equal extents or 1; "
                "reshape one of them"
            )
        found.append(others.pop() if others else 1)
    return tuple(found)


def broadcast_strides(x: Tensor, shape: Shape) -> Shape:
    """The strides under which a tensor has ``shape``: 0 where it repeats."""
    missing = len(shape) - x.ndim
    own = zip(x.strides, x.shape, shape[missing:], strict=True)
    return (0,) * missing + tuple(0 if extent == 1 and to != 1 else step for step, extent, to in own)


def _layout(x: Tensor) -> tuple:
    """What a plan's choice depends on of a tensor, cheap to hash."""
    return (x.shape, None if x.contiguous_ else x.strides, id(x.kind), x.aligned)


_pointwise_plans: dict[tuple, tuple[PointwisePlan, list[Shape | None]]] = {}


def _pointwise_plan(
    outputs: tuple[Expr, ...], sources: Sequence[Tensor], scalars: int, targets: Sequence[Tensor]
) -> tuple[PointwisePlan, list[Shape | None]]:
    """The plan, and each source's strides where it repeats."""
    shape = targets[0].shape
    repeated = [None if x.shape == shape else broadcast_strides(x, shape) for x in sources]
    views = tuple(
        View(x.kind, (None if x.contiguous_ else x.strides) if strides is None else strides)
        for x, strides in zip((*sources, *targets), (*repeated, *(None for _ in targets)), strict=True)
    )
    aligned = all(x.aligned for x in (*sources, *targets))
    count = len(sources)
    descriptor = PointwiseDescriptor(outputs, shape, views[:count], views[count:], scalars, aligned)
    return PointwisePlan.select(None, descriptor, device=targets[0].device), repeated


def compute(outputs: tuple[Expr, ...], sources: Sequence[Tensor], scalars: Sequence[float], *targets: Tensor) -> None:
    """Write expressions of tensors that broadcast to the targets' shape."""
    target = targets[0]
    key = (outputs, len(scalars), target.device.ordinal, *map(_layout, (*sources, *targets)))
    found = _pointwise_plans.get(key)
    if found is None:
        found = _pointwise_plans[key] = _pointwise_plan(outputs, sources, len(scalars), targets)
    plan, repeated = found
    refs = [
        x.ref() if strides is None else Tensor(x.storage, target.shape, x.kind, strides, x.offset).ref()
        for x, strides in zip(sources, repeated, strict=True)
    ]
    run(plan, PointwiseArgs([x.mut() for x in targets], refs, scalars))


def filled(shape: Sequence[int], value: float, kind: ElementKind, device: Device | None = None) -> Tensor:
    """All elements ``value``, a floating kind."""
    out = empty(shape, kind, device)
    compute((leaf(0),), (), (float(value),), out)
    return out


def converted(x: Tensor, kind: ElementKind) -> Tensor:
    """A contiguous copy in a floating kind."""
    out = empty(x.shape, kind, x.device)
    if kind is x.kind and _turned(x):
        batch, (rows, columns) = math.prod(x.shape[:-2]), x.shape[-2:]
        descriptor = LayoutDescriptor((batch, columns, rows), kind, Conversion.TO_NCHW)
        args = LayoutArgs(shaped(out, descriptor.out_shape).mut(), shaped(x, descriptor.shape).ref())
        run(LayoutPlan.select(None, descriptor, device=x.device), args)
    else:
        compute((leaf(0),), (x,), (), out)
    return out


_TILE = 16
"""Extents from which a transpose goes through tiles in shared memory, which read and write neighbours."""


def _turned(x: Tensor) -> bool:
    """Whether matrices lie one after the other, each of them transposed."""
    if x.ndim < 2 or min(x.shape[-2:]) < _TILE:
        return False
    rows, columns = x.shape[-2:]
    whole = compact_strides((*x.shape[:-2], columns, rows))
    return x.strides == (*whole[:-2], 1, rows)


def copy_bits(target: Tensor, source: Tensor) -> None:
    """Write a tensor's elements over those of another of its kind and shape, bit by bit."""
    zero, one = (0,) * source.ndim, (1,) * source.ndim
    descriptor = WindowDescriptor(
        target.shape, source.shape, source.kind, zero, one, stride=source.strides, out_stride=target.strides
    )
    run(WindowPlan.select(None, descriptor, device=target.device), WindowArgs(target.mut(), source.ref()))


def compact(x: Tensor) -> Tensor:
    """The tensor's elements, contiguous: itself, or a copy."""
    if x.contiguous_:
        return x
    if x.kind in FLOATS:
        return converted(x, x.kind)
    out = empty(x.shape, x.kind, x.device)
    copy_bits(out, x)
    return out


def window(
    x: Tensor, shape: Shape, shifts: Shape, signs: Shape, fill: float = 0, diagonal: int | None = None
) -> Tensor:
    """out[c] = x[shift + sign * c] where that is inside and on or above a diagonal, else ``fill``."""
    out = empty(shape, x.kind, x.device)
    stride = None if x.contiguous_ else x.strides
    descriptor = WindowDescriptor(shape, x.shape, x.kind, shifts, signs, fill, diagonal, stride)
    run(WindowPlan.select(None, descriptor, device=x.device), WindowArgs(out.mut(), x.ref()))
    return out


def reduce(
    reduction: Reduction,
    value: Expr,
    sources: Sequence[Tensor],
    axes: Sequence[int],
    shape: Shape,
    kind: ElementKind,
    scale: float = 1.0,
) -> Tensor:
    """A reduction of an expression over axes of contiguous tensors of one shape, as a tensor of ``shape``."""
    full, device = sources[0].shape, sources[0].device
    steps = split_axes(full, axes) or [(math.prod(full), 1, 1)]
    for number, (outer, n, inner) in enumerate(steps):
        last = number == len(steps) - 1
        out = empty((outer, inner), kind if last else F32, device)
        kinds = tuple(source.kind for source in sources)
        aligned = all(source.aligned for source in sources)
        descriptor = ReductionDescriptor(
            reduction, value, outer, n, inner, kinds, out.kind, scale=scale if last else 1.0, aligned=aligned
        )
        plan = ReductionPlan.select(None, descriptor, device=device)
        run(plan, ReductionArgs(out.mut(), [shaped(s, (outer, n, inner)).ref() for s in sources]))
        sources, value = (out,), ITSELF
    return shaped(sources[0], shape)


@functools.cache
def repeated_axes(full: Shape, shape: Shape) -> tuple[int, ...]:
    """The axes of ``full`` along which a tensor of ``shape`` repeats."""
    missing = len(full) - len(shape)
    return (*range(missing), *(missing + i for i, e in enumerate(shape) if e == 1 and full[missing + i] != 1))


def sum_to(g: Tensor, shape: Shape, kind: ElementKind) -> Tensor:
    """The gradient of a tensor of ``shape`` that was repeated to g's: g summed over what repeats."""
    if g.shape == shape:
        return g
    return reduce(Reduction.SUM, ITSELF, (compact(g),), repeated_axes(g.shape, shape), shape, kind)


def sum_to_of(
    expr: Expr, parts: Sequence[Tensor], scalars: tuple, full: Shape, shape: Shape, kind: ElementKind
) -> Tensor:
    """`sum_to` of an expression of tensors, in one pass where every one is contiguous and not repeated itself."""
    if not scalars and all(part.shape == full and part.contiguous_ for part in parts):
        # The leaves of a reduction's expression are numbered as those of a pointwise one.
        return reduce(Reduction.SUM, expr, parts, repeated_axes(full, shape), shape, kind)
    out = empty(full, F32, parts[0].device)
    compute((expr,), parts, scalars, out)
    return sum_to(out, shape, kind)
