"""Shapes: views that share memory, and what has to move elements: cat, stack, pad, flip, triu, copies."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lycoris.errors import RefusedInput
from lycoris.tensor import autograd, pointwise
from lycoris.tensor.launch import (
    broadcast_shape,
    broadcast_strides,
    compute,
    converted,
    copy_bits,
    empty,
    same_device,
    sum_to,
    window,
)
from lycoris.tensor.reductions import Axes, normal_axes
from lycoris.tensor.tensor import FLOATS, Shape, Tensor
from plans.core.tensor import contiguous_strides
from plans.expression import leaf

Index = int | slice | None | type(Ellipsis)


def _view(name: str, x: Tensor, shape: Shape, strides: Shape, offset: int, pull: autograd.Pull) -> Tensor:
    out = x.viewed(shape, strides, offset)
    # A view's gradient is of its tensor's kind, so that nothing is rounded on the way to an fp32 one.
    return autograd.record(name, out, (x,), (), pull, autograd.edge(x).kind) if autograd.wanted((x,)) else out


def _extents(x: Tensor, shape: Sequence[int] | tuple[Sequence[int]]) -> Shape:
    """Extents given one by one or as one sequence; one of them may be -1."""
    given = tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else tuple(shape)
    if given.count(-1) == 1:
        rest = math.prod(extent for extent in given if extent != -1)
        if rest and x.size % rest == 0:
            given = tuple(x.size // rest if extent == -1 else extent for extent in given)
    if math.prod(given) != x.size or min(given, default=0) < 0:
        raise RefusedInput(
            f"reshape: a tensor of shape {x.shape} holds {x.size} elements, {given} was asked for; "
            "give extents of that product"
        )
    return given


def reshape(x: Tensor, *shape: int | Sequence[int]) -> Tensor:
    """The same elements in row-major order under another shape, one extent -1; a copy where x is not contiguous.

    The tensor itself where it is contiguous and has that shape.
    """
    extents = _extents(x, shape)
    source, before = pointwise.contiguous(x), x.shape
    if extents == before:
        return source

    def pull(g: Tensor, edges: Sequence[autograd.Node | None]) -> list[Tensor]:
        return [reshape(g, before)]

    return _view("reshape", source, extents, contiguous_strides(extents), source.offset, pull)


def view(x: Tensor, *shape: int | Sequence[int]) -> Tensor:
    """`reshape` that never copies. Raises RefusedInput where x is not contiguous."""
    if not x.contiguous_:
        raise RefusedInput(f"view: strides {x.strides} of shape {x.shape} are not contiguous; use reshape")
    return reshape(x, *shape)


def permute(x: Tensor, *axes: int | Sequence[int]) -> Tensor:
    """The axes in another order."""
    given = tuple(axes[0]) if len(axes) == 1 and not isinstance(axes[0], int) else tuple(axes)
    if normal_axes("permute", x.ndim, given) != tuple(range(x.ndim)):
        raise RefusedInput(f"permute: axes {given}, wanted all {x.ndim}, each once; add those that are missing")
    order = tuple(axis % x.ndim for axis in given)
    inverse = tuple(order.index(i) for i in range(x.ndim))
    shape, strides = (tuple(values[axis] for axis in order) for values in (x.shape, x.strides))
    return _view("permute", x, shape, strides, x.offset, lambda g, edges: [permute(g, inverse)])


def transpose(x: Tensor, first: int = -2, second: int = -1) -> Tensor:
    """Two axes exchanged."""
    order = list(range(x.ndim))
    normal_axes("transpose", x.ndim, (first,)), normal_axes("transpose", x.ndim, (second,))
    order[first], order[second] = order[second], order[first]
    return permute(x, order)


def t(x: Tensor) -> Tensor:
    """A matrix transposed."""
    if x.ndim != 2:
        raise RefusedInput(f"t: a tensor of shape {x.shape}, wanted a matrix; use transpose")
    return permute(x, 1, 0)


def expand(x: Tensor, *shape: int | Sequence[int]) -> Tensor:
    """A view in which axes of extent 1 repeat; -1 keeps an extent."""
    given = tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else tuple(shape)
    missing = len(given) - x.ndim
    wanted = tuple(x.shape[i - missing] if e == -1 and i >= missing else e for i, e in enumerate(given))
    if missing < 0 or broadcast_shape("expand", [x.shape, wanted]) != wanted:
        raise RefusedInput(
            f"expand: shape {x.shape} does not repeat to {given}, wanted 1 or the same extents; reshape it first"
        )
    before = x.shape

    def pull(g: Tensor, edges: Sequence[autograd.Node | None]) -> list[Tensor]:
        return [sum_to(g, before, edges[0].kind)]

    return _view("expand", x, wanted, broadcast_strides(x, wanted), x.offset, pull)


def unsqueeze(x: Tensor, axis: int) -> Tensor:
    """One more axis, of extent 1."""
    if not -x.ndim - 1 <= axis <= x.ndim:
        raise RefusedInput(
            f"unsqueeze: axis {axis} of {x.ndim + 1}, wanted {-x.ndim - 1} to {x.ndim}; give one of those"
        )
    at = axis % (x.ndim + 1)
    shape, strides = (*x.shape[:at], 1, *x.shape[at:]), (*x.strides[:at], 0, *x.strides[at:])
    return _view("unsqueeze", x, shape, strides, x.offset, lambda g, edges: [squeeze(g, at)])


def squeeze(x: Tensor, axis: int) -> Tensor:
    """One axis less, which has extent 1."""
    (at,) = normal_axes("squeeze", x.ndim, axis)
    if x.shape[at] != 1:
        raise RefusedInput(
            f"squeeze: axis {axis} of shape {x.shape} has extent {x.shape[at]}, wanted 1; "
            "give another axis, or use reshape"
        )
    shape, strides = x.shape[:at] + x.shape[at + 1 :], x.strides[:at] + x.strides[at + 1 :]
    return _view("squeeze", x, shape, strides, x.offset, lambda g, edges: [unsqueeze(g, at)])


def narrow(x: Tensor, axis: int, start: int, length: int, step: int = 1) -> Tensor:
    """Elements start, start + step, ... of an axis, ``length`` of them; a view."""
    (at,) = normal_axes("narrow", x.ndim, axis)
    if length < 0 or step < 1 or start < 0 or (length and start + (length - 1) * step >= x.shape[at]):
        raise RefusedInput(
            f"narrow: {length} from {start} in steps of {step} of an axis of {x.shape[at]}, wanted steps of 1 or more "
            "within it; take fewer"
        )
    if (start, length, step) == (0, x.shape[at], 1):
        return x
    shape, strides, whole = list(x.shape), list(x.strides), (x.shape, x.strides)
    shape[at], strides[at] = length, x.strides[at] * step

    def pull(g: Tensor, edges: Sequence[autograd.Node | None]) -> list[autograd.Part]:
        return [autograd.Part(g, *whole, at, start, step)]

    return _view("slice", x, tuple(shape), tuple(strides), x.offset + start * x.strides[at], pull)


def getitem(x: Tensor, index: Index | tuple[Index, ...]) -> Tensor:
    """Views by integers, slices of positive steps, None and ... as in NumPy. Raises RefusedInput for others."""
    parts = index if isinstance(index, tuple) else (index,)
    used = sum_of_axes(parts)
    if used > x.ndim:
        raise RefusedInput(f"index: {used} axes of {x.ndim}, wanted no more than there are; leave the others out")
    if Ellipsis in parts:
        at = parts.index(Ellipsis)
        parts = (*parts[:at], *(slice(None),) * (x.ndim - used), *parts[at + 1 :])
    axis = 0
    for part in parts:
        if part is None:
            x = unsqueeze(x, axis)
        elif isinstance(part, slice):
            start, stop, step = part.indices(x.shape[axis])
            if step < 1:
                raise RefusedInput(f"index: a step of {step}, wanted 1 or more; use flip")
            length = max(0, -(-(stop - start) // step))
            if (start, length, step) != (0, x.shape[axis], 1):
                x = narrow(x, axis, start if length else 0, length, step)
        elif isinstance(part, int):
            extent = x.shape[axis]
            if not -extent <= part < extent:
                raise RefusedInput(
                    f"index: {part} of an axis of {extent}, wanted one within; count from 0, or back from -1"
                )
            x = squeeze(narrow(x, axis, part % extent, 1), axis)
            continue
        else:
            raise RefusedInput(f"index: a {type(part).__name__}, wanted int, slice, None or ...; use index_select")
        axis += 1
    return x


def sum_of_axes(parts: Sequence[Index]) -> int:
    """How many axes an index goes through."""
    return sum(part is not None and part is not Ellipsis for part in parts)


def split(x: Tensor, sizes: int | Sequence[int], axis: int = 0) -> list[Tensor]:
    """Views of neighbouring parts of an axis: of one size, the last one smaller, or of given sizes."""
    (at,) = normal_axes("split", x.ndim, axis)
    extent = x.shape[at]
    if isinstance(sizes, int):
        if sizes < 1:
            raise RefusedInput(f"split: parts of {sizes}, wanted 1 or more; give another size")
        sizes = [min(sizes, extent - start) for start in range(0, extent, sizes)]
    if sum(sizes) != extent:
        raise RefusedInput(f"split: parts of {list(sizes)}, an axis of {extent}, wanted that sum; change a part")
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [narrow(x, at, start, size) for start, size in zip(starts, sizes, strict=True)]


def cat(tensors: Sequence[Tensor], axis: int = 0) -> Tensor:
    """Tensors one after the other along an axis; of one kind, and equal in the other extents."""
    if not tensors:
        raise RefusedInput("cat: no tensors, wanted one or more; leave the call out")
    device, first = same_device("cat", tensors), tensors[0]
    (at,) = normal_axes("cat", first.ndim, axis)
    for other in tensors[1:]:
        same = (
            other.ndim == first.ndim
            and other.shape[:at] + other.shape[at + 1 :] == first.shape[:at] + first.shape[at + 1 :]
        )
        if not same or other.kind is not first.kind:
            raise RefusedInput(
                f"cat: {other.kind.value} {other.shape} along axis {axis} of {first.kind.value} {first.shape}, wanted "
                "one kind and the same other extents; call to() or reshape() first"
            )
    sizes = [tensor.shape[at] for tensor in tensors]
    out = empty((*first.shape[:at], sum(sizes), *first.shape[at + 1 :]), first.kind, device)
    for part, tensor in zip(split(out, sizes, at), tensors, strict=True):
        if first.kind in FLOATS:
            compute((leaf(0),), (tensor,), (), part)
        else:
            copy_bits(part, tensor)
    if not autograd.wanted(tensors):
        return out

    def pull(g: Tensor, edges: Sequence[autograd.Node | None]) -> list[Tensor | None]:
        return [part if edge else None for part, edge in zip(split(g, sizes, at), edges, strict=True)]

    return autograd.record("cat", out, tensors, (), pull)


def stack(tensors: Sequence[Tensor], axis: int = 0) -> Tensor:
    """Tensors of one shape along a new axis."""
    return cat([unsqueeze(tensor, axis) for tensor in tensors], axis)


def _window(
    name: str, x: Tensor, shape: Shape, shifts: Shape, signs: Shape, fill: float = 0, diagonal: int | None = None
) -> Tensor:
    out = window(x.detach(), shape, shifts, signs, fill, diagonal)
    if not autograd.wanted((x,)):
        return out
    back = tuple(-shift if sign > 0 else shift for shift, sign in zip(shifts, signs, strict=True))
    before = x.shape
    return autograd.record(
        name, out, (x,), (), lambda g, edges: [converted(window(g, before, back, signs, 0, diagonal), edges[0].kind)]
    )


def pad(x: Tensor, widths: Sequence[tuple[int, int]], value: float = 0) -> Tensor:
    """``value`` before and after each axis, one pair of widths an axis; a negative width takes elements away."""
    if len(widths) != x.ndim:
        raise RefusedInput(
            f"pad: {len(widths)} pairs of widths, wanted one for each of {x.ndim} axes; give (0, 0) for those to keep"
        )
    shape = tuple(extent + before + after for extent, (before, after) in zip(x.shape, widths, strict=True))
    if min(shape, default=0) < 0:
        raise RefusedInput(
            f"pad: widths {list(widths)} leave {shape} of {x.shape}, wanted no negative extent; take fewer away"
        )
    return _window("pad", x, shape, tuple(-before for before, _ in widths), (1,) * x.ndim, value)


def flip(x: Tensor, axes: Axes = None) -> Tensor:
    """The elements of axes in reverse order, of all axes where none are given."""
    chosen = normal_axes("flip", x.ndim, axes)
    shifts = tuple(extent - 1 if i in chosen else 0 for i, extent in enumerate(x.shape))
    return _window("flip", x, x.shape, shifts, tuple(-1 if i in chosen else 1 for i in range(x.ndim)))


def triu(x: Tensor, diagonal: int = 0) -> Tensor:
    """The last two axes' elements on and above a diagonal, zeros below."""
    if x.ndim < 2:
        raise RefusedInput(f"triu: a tensor of shape {x.shape}, wanted two axes or more; call unsqueeze() first")
    return _window("triu", x, x.shape, (0,) * x.ndim, (1,) * x.ndim, 0, diagonal)
