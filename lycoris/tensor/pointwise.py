"""Element by element: every function of `plans.expression` on tensors, with broadcasting and gradients; fusion.

`UNARY`, `PARAMETRIC` and `BINARY` are the methods of a tensor by name; their formulas, derivatives and error bounds
are rows of the tables there. Integers are moved (`lycoris.tensor.views`), not computed with.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

from lycoris.errors import RefusedInput
from lycoris.tensor import autograd
from lycoris.tensor.launch import (
    broadcast_shape,
    compute,
    converted,
    copy_bits,
    empty,
    filled,
    same_device,
    sum_to,
    sum_to_of,
)
from lycoris.tensor.tensor import FLOATS, Layout, Shape, Tensor, changed
from plans import expression
from plans.core import ElementKind
from plans.expression import ZERO, Expr, leaf

Scalar = float | int

UNARY = (
    "neg", "abs", "sign", "floor", "ceil", "round", "square", "sqrt", "rsqrt", "reciprocal", "exp", "log", "sin", "cos",
    "tanh", "erf", "sigmoid", "relu", "gelu", "silu", "softplus",
)  # fmt: skip
BINARY = ("add", "sub", "mul", "div", "pow", "maximum", "minimum", "gt", "ge", "lt", "le", "eq", "ne")
"""Of two tensors, or a tensor and a number. Comparisons give 1 and 0 in the tensors' kind."""


def result_kind(operation: str, tensors: Sequence[Tensor | Layout]) -> ElementKind:
    """The kind of a result: the operands', or f32 where they differ. Raises RefusedInput for integers."""
    for tensor in tensors:
        if tensor.kind not in FLOATS:
            raise RefusedInput(
                f"{operation}: a tensor of {tensor.kind.value}, wanted bf16, f16 or f32; convert it first"
            )
    kinds = {tensor.kind for tensor in tensors}
    return kinds.pop() if len(kinds) == 1 else ElementKind.F32


def apply(
    expr: Expr, tensors: Sequence[Tensor], scalars: Sequence[float] = (), kind: ElementKind | None = None
) -> Tensor:
    """An expression of tensors that broadcast, as one kernel, recorded for gradients, which are one kernel too.

    The expression's leaves are the tensors and then the scalars. The result has ``kind``, or the tensors' common one.
    Raises RefusedInput where shapes do not broadcast or devices differ.
    """
    device = same_device(expr.op, tensors)
    shape = broadcast_shape(expr.op, [tensor.shape for tensor in tensors])
    out = empty(shape, kind or result_kind(expr.op, tensors), device)
    compute((expr,), tensors, scalars, out)
    if not autograd.wanted(tensors):
        return out
    slopes = derivatives(expr, len(tensors), len(scalars))
    flows = [
        tensor for tensor, slope in zip(tensors, slopes, strict=True) if tensor.requires_grad and slope is not ZERO
    ]
    if not flows:
        return out
    read = _leaves(tuple([s for s, t in zip(slopes, tensors, strict=True) if t.requires_grad]))
    saved = {number: tensors[number].detach() for number in read if number < len(tensors)}
    numbers, given = len(tensors) + len(scalars), tuple(scalars)
    shapes = [tensor.shape for tensor in tensors]

    def pull(g: Tensor, edges: Sequence[autograd.Node | None]) -> list[Tensor | None]:
        sources = saved | {numbers: g}
        return [
            None if edge is None or slope is ZERO else _weighted(slope, sources, len(shapes), given, own, edge.kind)
            for slope, edge, own in zip(slopes, edges, shapes, strict=True)
        ]

    return autograd.record(expr.op, out, tensors, list(saved.values()), pull)


@functools.lru_cache(4096)
def _leaves(exprs: tuple[Expr, ...]) -> tuple[int, ...]:
    return tuple(expression.leaves(exprs))


@functools.lru_cache(4096)
def derivatives(expr: Expr, tensors: int, scalars: int) -> tuple[Expr, ...]:
    """The gradients of an expression's tensors; that of the result is the leaf after tensors and scalars."""
    seed = leaf(tensors + scalars)
    return tuple(expression.gradients([expr], [seed], [leaf(i) for i in range(tensors)]))


def _weighted(
    slope: Expr, sources: dict[int, Tensor], tensors: int, scalars: tuple, shape: Shape, kind: ElementKind
) -> Tensor:
    """A gradient of ``shape``: the expression, summed over what was repeated."""
    g = sources[max(sources)]
    if slope.op == "leaf" and slope.value == tensors + len(scalars):
        return sum_to(g, shape, kind)
    used, expr = narrowed(slope, tuple(sources), tensors, len(scalars))
    parts = [sources[number] for number in used]
    if g.shape != shape:
        return sum_to_of(expr, parts, scalars, g.shape, shape, kind)
    out = empty(shape, kind, g.device)
    compute((expr,), parts, scalars, out)
    return out


@functools.lru_cache(4096)
def narrowed(expr: Expr, given: tuple[int, ...], tensors: int, scalars: int) -> tuple[tuple[int, ...], Expr]:
    """The tensors' leaves that an expression reads, and itself over those, then the scalars."""
    scalar_numbers = range(tensors, tensors + scalars)
    used = tuple(number for number in expression.leaves([expr]) if number not in scalar_numbers)
    assert set(used) <= set(given), (expr, given)
    order = [*used, *scalar_numbers]
    return used, expression.substitute(expr, {leaf(number): leaf(i) for i, number in enumerate(order)})


def fuse(fn: Callable[..., Expr]) -> Callable[..., Tensor]:
    """A function of tensors that runs as one kernel, and its gradients as one a tensor.

        swiglu = fuse(lambda a, b: a.silu() * b)
        y = swiglu(a, b)

    ``fn`` is called once with symbols in place of tensors: what it does with them by operators and by methods named as
    in `plans.expression` is the kernel. Numbers in it are part of the kernel; keyword arguments are handed to it.
    """

    @functools.cache
    def traced(count: int, options: tuple[tuple[str, Scalar], ...]) -> Expr:
        return expression.as_expr(fn(*map(leaf, range(count)), **dict(options)))

    @functools.wraps(fn)
    def fused(*tensors: Tensor, **options: Scalar) -> Tensor:
        return apply(traced(len(tensors), tuple(sorted(options.items()))), tensors)

    return fused


@functools.cache
def _symbolic(name: str, count: int, parameters: tuple[Scalar, ...] = ()) -> Expr:
    return expression.call(name, *map(leaf, range(count)), *parameters)


def unary(name: str, x: Tensor) -> Tensor:
    """One of `UNARY`."""
    return apply(_symbolic(name, 1), (x,))


def binary(name: str, a: Tensor | Scalar, b: Tensor | Scalar) -> Tensor:
    """One of `BINARY`; a number is no part of the kernel, so that others need no other kernel."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return apply(_symbolic(name, 2), (a, b))
    if isinstance(a, Tensor):
        if name == "pow" and b == 2:
            return unary("square", a)
        return apply(_symbolic(name, 2), (a,), (float(b),))
    return apply(_reversed(name), (b,), (float(a),))


@functools.cache
def _reversed(name: str) -> Expr:
    return expression.call(name, leaf(1), leaf(0))


def where(condition: Tensor, a: Tensor | Scalar, b: Tensor | Scalar) -> Tensor:
    """``a`` where the condition is not 0, else ``b``."""
    tensors, scalars, places = [condition], [], []
    for part in (a, b):
        places.append(isinstance(part, Tensor))
        (tensors if places[-1] else scalars).append(part)
    numbers = iter(range(1, len(tensors)))
    rest = iter(range(len(tensors), 3))
    picked = tuple(next(numbers) if tensor else next(rest) for tensor in places)
    return apply(_where(picked), tensors, [float(s) for s in scalars])


@functools.cache
def _where(picked: tuple[int, int]) -> Expr:
    return expression.apply("where", leaf(0), *map(leaf, picked))


def clamp(x: Tensor, low: Scalar, high: Scalar) -> Tensor:
    """The element of [low, high] that is nearest."""
    return apply(_symbolic("clamp", 3), (x,), (float(low), float(high)))


def leaky_relu(x: Tensor, slope: Scalar = 0.01) -> Tensor:
    """Element x where it is positive, else slope * x."""
    return apply(_symbolic("leaky_relu", 2), (x,), (float(slope),))


def fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """The sum a * b + c."""
    return apply(_symbolic("fma", 3), (a, b, c))


def to(x: Tensor, kind: ElementKind) -> Tensor:
    """The elements in another kind, rounded to nearest even; the tensor itself where it has that kind."""
    return x if x.kind is kind else apply(leaf(0), (x,), kind=kind)


def clone(x: Tensor) -> Tensor:
    """A contiguous copy with memory of its own."""
    if x.kind in FLOATS:
        out = converted(x, x.kind)
        recorded = autograd.wanted((x,))
        return autograd.record("clone", out, (x,), (), lambda g, edges: [g]) if recorded else out
    out = empty(x.shape, x.kind, x.device)
    copy_bits(out, x)
    return out


def contiguous(x: Tensor) -> Tensor:
    """The tensor itself where it is contiguous, else a copy that is."""
    return x if x.contiguous_ else clone(x)


def full_like(x: Tensor, value: Scalar) -> Tensor:
    """A tensor of x's shape and kind, all of its elements ``value``."""
    return filled(x.shape, value, x.kind, x.device)


def sum_of(a: Tensor, b: Tensor | Scalar, kind: ElementKind | None = None) -> Tensor:
    """The sum a + b, in ``kind`` or the operands'."""
    if isinstance(b, Tensor):
        return apply(_symbolic("add", 2), (a, b), kind=kind)
    return apply(_symbolic("add", 2), (a,), (float(b),), kind)


def in_place(name: str, x: Tensor, *operands: Tensor | Scalar) -> Tensor:
    """Write name(x, operands) to x's memory; no gradient flows through it.

    Raises RefusedInput where x requires a gradient outside of `no_grad`, and where operands do not have or broadcast to
    x's shape.
    """
    if x.requires_grad and autograd.is_grad_enabled():
        raise RefusedInput(
            f"{name}_: a tensor that requires a gradient is changed in place within no_grad() only; "
            "enter it, or make a new tensor"
        )
    tensors = [x, *(part for part in operands if isinstance(part, Tensor))]
    scalars = [float(part) for part in operands if not isinstance(part, Tensor)]
    if broadcast_shape(name, [tensor.shape for tensor in tensors]) != x.shape:
        raise RefusedInput(
            f"{name}_: an operand of shape {tensors[1].shape} does not broadcast to {x.shape}; "
            "make a new tensor, or reshape it"
        )
    expr = leaf(len(tensors) + len(scalars) - 1) if name == "copy" else _symbolic(name, 1 + len(operands))
    compute((expr,), tensors, scalars, x)
    changed(x)
    return x
