"""Plans on tensors, without gradients: what the differentiable operations are made of."""

from __future__ import annotations

import functools
import math
import struct
from collections.abc import Callable, Hashable, Sequence
from typing import Any

from lycoris.buffers import scratch, stream_of
from lycoris.errors import RefusedInput
from lycoris.tensor.tensor import FLOATS, Layout, Shape, Storage, Tensor, compact_strides, layout_of
from plans.core import Device, DeviceError, ElementKind, Plan, Workspace
from plans.core.device import device_error, driver_errors
from plans.core.plan import Arguments, Contract, bound
from plans.core.prepared import Prepared
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
    return of_layout(layout_of(shape, kind), device or Device.open("auto"))


def of_layout(layout: Layout, device: Device) -> Tensor:
    """Memory with undefined contents for a contiguous layout."""
    return Tensor(Storage(device.allocate(layout.nbytes, stream_of(device))), layout)


def of_layouts(layouts: Sequence[Layout], device: Device) -> list[Tensor]:
    """`of_layout` of several."""
    stream = stream_of(device)
    return [Tensor(Storage(device.allocate(layout.nbytes, stream)), layout) for layout in layouts]


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
    return out.viewed(shape, strides) if dense else out


def run(plan: Contract, args: Any) -> None:
    """Launch a plan on its device's stream, with workspace taken for the run.

    The descriptor was read off these very tensors, so that on a GPU nothing is checked again; the simulator checks.
    """
    device, size = plan.device, plan.workspace_size()
    workspace = Workspace(scratch(device, size)) if size else Workspace()
    if device.is_simulator:
        plan.can_implement(args)
    stream = stream_of(device)
    try:
        bound(plan.launches(args, workspace))(stream)
    except driver_errors() as error:
        raise refused(device, error) from error


def refused(device: Device, error: Exception) -> DeviceError:
    """What is raised where the driver refuses a launch."""
    return device_error(f"launching on {device.name}", error)


_MOST_KEPT = 1 << 13
_kept: dict[tuple, tuple[Prepared, Any]] = {}
"""Layouts, kinds and numbers -> the plan of an operation on such tensors, prepared, and what else is kept with it."""


def kept(key: tuple) -> tuple[Prepared, Any] | None:
    """What `keep` has kept for an operation."""
    return _kept.get(key)


def keep(
    key: Hashable, plan: Plan, out: Sequence[Tensor], sources: Sequence[Tensor], make: Callable[..., Arguments],
    more: Any = None,
) -> tuple[Prepared, Any]:  # fmt: skip
    """Prepare a plan for tensors like ``out`` and ``sources``, of which ``make`` makes its arguments, and keep it.

    ``key`` says everything that the plan and the arguments depend on, but not where tensors lie. Both sequences are as
    the plan takes them; `run_prepared` wants others that begin at the same elements.
    """
    if len(_kept) >= _MOST_KEPT:
        _kept.clear()
    operands = [*(x.mut() for x in out), *(x.ref() for x in sources)]
    _kept[key] = found = Prepared(plan, operands, make), more
    return found


def run_prepared(prepared: Prepared, tensors: Sequence[Tensor]) -> None:
    """Launch a prepared plan on its device's stream, on tensors in the order in which it was prepared."""
    device, size = prepared.device, prepared.workspace_bytes
    work = scratch(device, size) if size else None
    if device.is_simulator:
        data = tuple([x.argument for x in tensors])
        prepared.check(data, [x.available for x in tensors])
    else:
        data = tuple([x.address for x in tensors])
    stream = stream_of(device)
    try:
        prepared.run(stream, data, work)
    except driver_errors() as error:
        raise refused(device, error) from error


def same_device(operation: str, tensors: Sequence[Tensor]) -> Device:
    """The device of all tensors. Raises RefusedInput where they are on several."""
    device = tensors[0].device
    for other in tensors:
        if other.device is not device:
            raise RefusedInput(f"{operation}: tensors on {device.name} and {other.device.name}; bring them together")
    return device


def shaped(x: Tensor, shape: Shape) -> Tensor:
    """A contiguous tensor's elements under another shape; it is not looked at whether they are as many."""
    return x.viewed(shape)


def result_of_shape(x: Tensor, shape: Shape) -> Tensor:
    """A new result under a shape, itself where it has that: a pullback that keeps it would be kept by it."""
    return x if x.shape == shape else x.viewed(shape)


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


def number_bits(numbers: Sequence[float]) -> bytes:
    """Numbers for a key: each for itself, also -0.0 and NaN."""
    return struct.pack(f"{len(numbers)}d", *numbers)


def compute(outputs: tuple[Expr, ...], sources: Sequence[Tensor], scalars: Sequence[float], *targets: Tensor) -> None:
    """Write expressions of tensors that broadcast to the targets' shape."""
    given = (*targets, *sources)
    layouts, aligned = [x.layout for x in given], [x.aligned for x in given]
    key = (outputs, number_bits(scalars), targets[0].device.ordinal, *layouts, *aligned)
    found = kept(key)
    if found is None:
        found = _keep_pointwise(key, outputs, sources, tuple(scalars), targets)
    run_prepared(found[0], given)


def _keep_pointwise(
    key: tuple, outputs: tuple[Expr, ...], sources: Sequence[Tensor], scalars: tuple, targets: Sequence[Tensor]
) -> tuple[Prepared, Any]:
    shape = targets[0].shape
    aligned = all(x.aligned for x in (*sources, *targets))
    sources = [x if x.shape == shape else repeated(x, shape) for x in sources]
    views = tuple(View(x.kind, None if x.contiguous_ else x.strides) for x in (*sources, *targets))
    count = len(sources)
    descriptor = PointwiseDescriptor(outputs, shape, views[:count], views[count:], len(scalars), aligned)
    plan, many = PointwisePlan.select(None, descriptor, device=targets[0].device), len(targets)
    return keep(key, plan, targets, sources, lambda *refs: PointwiseArgs(refs[:many], refs[many:], scalars))


def repeated(x: Tensor, shape: Shape) -> Tensor:
    """A view of ``shape``, to which the tensor broadcasts, without gradients."""
    return x.viewed(shape, broadcast_strides(x, shape))


def filled(shape: Sequence[int], value: float, kind: ElementKind, device: Device | None = None) -> Tensor:
    """All elements ``value``, a floating kind."""
    out = empty(shape, kind, device)
    compute((leaf(0),), (), (float(value),), out)
    return out


def converted(x: Tensor, kind: ElementKind) -> Tensor:
    """A contiguous copy in a floating kind."""
    out = empty(x.shape, kind, x.device)
    in_eights = x.aligned and not any(extent % 8 for extent in x.shape[-2:])
    if kind is x.kind and not in_eights and _turned(x.layout):  # in eights, an expression is turned round faster
        key = ("transpose", x.layout, x.device.ordinal)
        found = kept(key) or _keep_transpose(key, x, out)
        run_prepared(found[0], (out, x))
    else:
        compute((leaf(0),), (x,), (), out)
    return out


def _keep_transpose(key: tuple, x: Tensor, out: Tensor) -> tuple[Prepared, Any]:
    batch, (rows, columns) = math.prod(x.shape[:-2]), x.shape[-2:]
    descriptor = LayoutDescriptor((batch, columns, rows), x.kind, Conversion.TO_NCHW)
    plan = LayoutPlan.select(None, descriptor, device=x.device)
    return keep(key, plan, [shaped(out, descriptor.out_shape)], [shaped(x, descriptor.shape)], LayoutArgs)


_TILE = 16
"""Extents from which a transpose goes through tiles in shared memory, which read and write neighbours."""


@functools.lru_cache(1 << 14)
def _turned(layout: Layout) -> bool:
    """Whether matrices lie one after the other, each of them transposed."""
    if len(layout.shape) < 2 or min(layout.shape[-2:]) < _TILE:
        return False
    rows, columns = layout.shape[-2:]
    whole = compact_strides((*layout.shape[:-2], columns, rows))
    return layout.strides == (*whole[:-2], 1, rows)


def copy_bits(target: Tensor, source: Tensor) -> None:
    """Write a tensor's elements over those of another of its kind and shape, bit by bit."""
    zero, one = (0,) * source.ndim, (1,) * source.ndim
    descriptor = WindowDescriptor(
        target.shape, source.shape, source.kind, zero, one, stride=source.strides, out_stride=target.strides,
        aligned=target.aligned,
    )  # fmt: skip
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
    steps = _steps(full, tuple(axes))
    for number, step in enumerate(steps):
        last = number == len(steps) - 1
        out = empty((step[0], step[2]), kind if last else F32, device)
        factor, aligned = scale if last else 1.0, all([source.aligned for source in sources])
        given = [source.kind for source in sources]
        key = (reduction, value, step, *given, out.kind, number_bits((factor,)), aligned, device.ordinal)
        found = kept(key) or _keep_reduction(key, reduction, value, step, sources, out, factor, aligned)
        run_prepared(found[0], (out, *sources))
        sources, value = (out,), ITSELF
    return shaped(sources[0], shape)


@functools.lru_cache(1 << 14)
def _steps(full: Shape, axes: tuple[int, ...]) -> list[tuple[int, int, int]]:
    """[outer, n, inner] of the reductions that together are one."""
    return split_axes(full, axes) or [(math.prod(full), 1, 1)]


def _keep_reduction(
    key: tuple, reduction: Reduction, value: Expr, step: tuple[int, int, int], sources: Sequence[Tensor], out: Tensor,
    scale: float, aligned: bool,
) -> tuple[Prepared, Any]:  # fmt: skip
    kinds = tuple(source.kind for source in sources)
    descriptor = ReductionDescriptor(reduction, value, *step, kinds, out.kind, scale=scale, aligned=aligned)
    plan = ReductionPlan.select(None, descriptor, device=out.device)
    return keep(key, plan, [out], [shaped(s, step) for s in sources], lambda first, *refs: ReductionArgs(first, refs))


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
