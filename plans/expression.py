"""Expressions over tensors' elements: what fused kernels compute, with references, derivatives and error bounds.

    x, y = leaf(0), leaf(1)
    swish = x * x.sigmoid() * y
    d_x, = gradients([swish], [leaf(2)], [x])       # an expression too, so a backward is one kernel
    program = lower([d_x], [x, y, leaf(2)])         # plain data, as kernels.expression takes it
    exact, error = evaluate([d_x], [1.0, 2.0, 3.0])[0]

``FUNCTIONS`` is the table: for each scalar function its float64 reference, its derivative and its own error. All else,
the derivative and the error bound of any expression, follows from it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar
from weakref import WeakValueDictionary

import numpy as np

Number = float | int


class Expr:
    """A node: a function of other nodes, a constant, or the argument number ``value`` ("leaf").

    Equal expressions are one object, so that what is shared is computed once. Built from leaves by operators and by
    the methods that the table's names make.
    """

    __slots__ = ("__weakref__", "args", "op", "value")
    _made: ClassVar[WeakValueDictionary] = WeakValueDictionary()

    def __new__(cls, op: str, args: tuple[Expr, ...] = (), value: Number = 0) -> Expr:
        """The node, made if there is none yet."""
        key = (op, args, value, math.copysign(1, value))
        found = cls._made.get(key)
        if found is None:
            found = super().__new__(cls)
            found.op, found.args, found.value = op, args, value
            cls._made[key] = found
        return found

    def __repr__(self) -> str:
        if self.args:
            return f"{self.op}({', '.join(map(repr, self.args))})"
        return f"x{self.value}" if self.op == "leaf" else f"{self.value:g}"

    def __add__(self, other: Expr | Number) -> Expr:
        return apply("add", self, other)

    def __radd__(self, other: Number) -> Expr:
        return apply("add", other, self)

    def __sub__(self, other: Expr | Number) -> Expr:
        return apply("sub", self, other)

    def __rsub__(self, other: Number) -> Expr:
        return apply("sub", other, self)

    def __mul__(self, other: Expr | Number) -> Expr:
        return apply("mul", self, other)

    def __rmul__(self, other: Number) -> Expr:
        return apply("mul", other, self)

    def __truediv__(self, other: Expr | Number) -> Expr:
        return apply("div", self, other)

    def __rtruediv__(self, other: Number) -> Expr:
        return apply("div", other, self)

    def __pow__(self, other: Expr | Number) -> Expr:
        return apply("square", self) if other == 2 else apply("pow", self, other)

    def __neg__(self) -> Expr:
        return apply("neg", self)

    def __abs__(self) -> Expr:
        return apply("abs", self)

    def __gt__(self, other: Expr | Number) -> Expr:
        return apply("gt", self, other)

    def __ge__(self, other: Expr | Number) -> Expr:
        return apply("ge", self, other)

    def __lt__(self, other: Expr | Number) -> Expr:
        return apply("gt", other, self)

    def __le__(self, other: Expr | Number) -> Expr:
        return apply("ge", other, self)


def leaf(number: int) -> Expr:
    """Argument ``number`` of the expression."""
    return Expr("leaf", (), number)


def constant(value: Number) -> Expr:
    """A number that the kernel is compiled with, in fp32."""
    near = float(np.float32(value))
    return Expr("const", (), float(value) if math.isfinite(near) else near)


def rounding(value: Number) -> float:
    """What fp32's rounding changes of a number, in units of 2**-24."""
    near = float(np.float32(value))
    return abs(near - value) * 2.0**24 if math.isfinite(near) else 0.0


ZERO, ONE = constant(0.0), constant(1.0)


def as_expr(x: Expr | Number) -> Expr:
    """A number as a constant."""
    return x if isinstance(x, Expr) else constant(x)


def apply(name: str, *args: Expr | Number) -> Expr:
    """A function of the table; what multiplies by one or adds nothing is left out."""
    parts = tuple(as_expr(arg) for arg in args)
    if name == "mul" and ONE in parts:
        return parts[1] if parts[0] is ONE else parts[0]
    if (name == "add" and ZERO in parts) or (name == "sub" and parts[1] is ZERO):
        return parts[1] if parts[0] is ZERO else parts[0]
    return Expr(name, parts)


Pulled = tuple[Expr | None, ...]


@dataclass(frozen=True)
class Function:
    """A scalar function.

    ``reference`` computes it in float64. ``pull(g, y, *x)`` gives the gradients of its arguments for the gradient g of
    its result y, None where there is none. ``units`` is its own error in 2**-24 of its result, a number or a function
    of y and the arguments.
    """

    reference: Callable
    pull: Callable[..., Pulled]
    units: float | Callable[..., np.ndarray]


def _none(count: int) -> Callable[..., Pulled]:
    return lambda *_: (None,) * count


def _pull_extremum(chosen: Callable[[Expr, Expr], Expr]) -> Callable[..., Pulled]:
    """All to the one that was chosen, half to each where they are equal."""

    def pull(g: Expr, y: Expr, a: Expr, b: Expr) -> Pulled:
        half = g * 0.5
        return half * (chosen(a, b) + apply("eq", a, y)), half * (chosen(b, a) + apply("eq", b, y))

    return pull


def _pull_power(g: Expr, y: Expr, a: Expr, b: Expr) -> Pulled:
    return g * b * apply("pow", a, b - 1.0), apply("where", apply("eq", y, 0.0), 0.0, g * y * apply("log", a))


_erf, _erfc = np.frompyfunc(math.erf, 1, 1), np.frompyfunc(math.erfc, 1, 1)


def _indicator(compare: Callable) -> Callable:
    return lambda a, b: compare(a, b).astype(np.float64)


ROUNDED, ULP, TWO_ULP = 1.0, 2.0, 4.0
"""An operation rounded to nearest; a result within one, or two, units in the last place (CUDA programming guide)."""


def _sigmoid_units(y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """A power of two (2 ulp) of a product rounded twice, of which 1 - y counts; a sum, and a reciprocal of 1 ulp."""
    return (TWO_ULP + 2 * np.abs(x)) * (1 - y) + ROUNDED + ULP


def _cdf(x: np.ndarray) -> np.ndarray:
    return 0.5 * np.asarray(_erfc(-np.asarray(x) / math.sqrt(2)), np.float64)


def _density(x: Expr) -> Expr:
    """exp(-x^2 / 2) / sqrt(2 pi)."""
    return (apply("square", x) * (-0.5 * math.log2(math.e))).exp2() * (1 / math.sqrt(2 * math.pi))


def _cdf_units(y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """An absolute bound: the approximation's 7.5e-8, and six roundings of numbers below a half."""
    return 5.0 / np.maximum(y, 2.0**-100)


FUNCTIONS: dict[str, Function] = {
    "neg": Function(np.negative, lambda g, y, x: (-g,), 0),
    "abs": Function(np.abs, lambda g, y, x: (g * apply("sign", x),), 0),
    "sign": Function(np.sign, _none(1), 0),
    "floor": Function(np.floor, _none(1), 0),
    "ceil": Function(np.ceil, _none(1), 0),
    "round": Function(np.rint, _none(1), 0),
    "square": Function(np.square, lambda g, y, x: (g * (x + x),), ROUNDED),
    "sqrt": Function(np.sqrt, lambda g, y, x: (g * 0.5 / y,), ROUNDED),
    "root": Function(np.sqrt, lambda g, y, x: (g * 0.5 / y,), ULP),
    "rsqrt": Function(lambda x: 1 / np.sqrt(x), lambda g, y, x: (g * -0.5 * (y * apply("square", y)),), TWO_ULP),
    "reciprocal": Function(lambda x: 1 / x, lambda g, y, x: (-(g * apply("square", y)),), ULP),
    "exp": Function(np.exp, lambda g, y, x: (g * y,), TWO_ULP),
    "exp2": Function(np.exp2, lambda g, y, x: (g * y * math.log(2),), TWO_ULP),
    "log": Function(np.log, lambda g, y, x: (g / x,), ULP),
    "sin": Function(np.sin, lambda g, y, x: (g * apply("cos", x),), TWO_ULP),
    "cos": Function(np.cos, lambda g, y, x: (-(g * apply("sin", x)),), TWO_ULP),
    "tanh": Function(np.tanh, lambda g, y, x: (g * (1.0 - apply("square", y)),), TWO_ULP),
    "erf": Function(
        lambda x: np.asarray(_erf(x), np.float64),
        lambda g, y, x: (g * (2 / math.sqrt(math.pi)) * apply("exp", -apply("square", x)),), TWO_ULP,
    ),
    "cdf": Function(_cdf, lambda g, y, x: (g * _density(x),), _cdf_units),
    "sigmoid": Function(lambda x: 1 / (1 + np.exp(-x)), lambda g, y, x: (g * y * (1.0 - y),), _sigmoid_units),
    "relu": Function(lambda x: np.maximum(x, 0), lambda g, y, x: (apply("where", x > 0.0, g, 0.0),), 0),
    "add": Function(np.add, lambda g, y, a, b: (g, g), ROUNDED),
    "sub": Function(np.subtract, lambda g, y, a, b: (g, -g), ROUNDED),
    "mul": Function(np.multiply, lambda g, y, a, b: (g * b, g * a), ROUNDED),
    "div": Function(np.divide, lambda g, y, a, b: (g / b, -(g * y / b)), ROUNDED),
    # 4 ulp and what the logarithm's bits cost at the ends of the range
    "pow": Function(np.power, _pull_power, 16.0),
    "maximum": Function(np.maximum, _pull_extremum(lambda a, b: a > b), 0),
    "minimum": Function(np.minimum, _pull_extremum(lambda a, b: a < b), 0),
    "gt": Function(_indicator(np.greater), _none(2), 0),
    "ge": Function(_indicator(np.greater_equal), _none(2), 0),
    "eq": Function(_indicator(np.equal), _none(2), 0),
    "ne": Function(_indicator(np.not_equal), _none(2), 0),
    "where": Function(
        lambda c, a, b: np.where(c != 0, a, b),
        lambda g, y, c, a, b: (None, apply("where", c, g, 0.0), apply("where", c, 0.0, g)), 0,
    ),
    "fma": Function(lambda a, b, c: a * b + c, lambda g, y, a, b, c: (g * b, g * a, g), ROUNDED),
}  # fmt: skip
"""Name -> function; the kernels' device functions have the same names. ``fma`` may round its product too; ``root`` is a
square root of a few instructions."""

COMPOSED: dict[str, Callable[..., Expr]] = {
    "gelu": lambda x: x * apply("cdf", x),
    "silu": lambda x: x * apply("sigmoid", x),
    "leaky_relu": lambda x, slope=0.01: apply("where", x > 0.0, x, x * slope),
    "clamp": lambda x, low, high: apply("minimum", apply("maximum", x, low), high),
    "softplus": lambda x: apply("relu", x) + apply("log", apply("exp", -abs(x)) + 1.0),
    "lt": lambda a, b: apply("gt", b, a),
    "le": lambda a, b: apply("ge", b, a),
}
"""Functions made of those of the table; GELU is the exact one, x Phi(x), and SiLU is x sigmoid(x)."""


def _arguments(reference: Callable) -> int:
    return reference.nin if isinstance(reference, np.ufunc) else reference.__code__.co_argcount


ARITY: dict[str, int] = {name: _arguments(function.reference) for name, function in FUNCTIONS.items()}
"""How many arguments each function takes."""


def call(name: str, *args: Expr | Number) -> Expr:
    """A function of either table."""
    composed = COMPOSED.get(name)
    return composed(as_expr(args[0]), *args[1:]) if composed else apply(name, *args)


def order(outputs: Sequence[Expr]) -> list[Expr]:
    """Every node once, arguments before their functions."""
    found: dict[Expr, None] = {}
    stack = [(node, False) for node in reversed(outputs)]
    while stack:
        node, done = stack.pop()
        if done:
            found[node] = None
        elif node not in found:
            stack.append((node, True))
            stack += [(arg, False) for arg in reversed(node.args)]
    return list(found)


def leaves(outputs: Sequence[Expr]) -> list[int]:
    """The numbers of the arguments that the expressions read, ascending."""
    return sorted(node.value for node in order(outputs) if node.op == "leaf")


def gradients(outputs: Sequence[Expr], seeds: Sequence[Expr], wanted: Sequence[Expr]) -> list[Expr]:
    """d(sum of seed * output) / d(each wanted node), as expressions; ZERO where none of the outputs depends on it."""
    found: dict[Expr, Expr] = {}
    for output, seed in zip(outputs, seeds, strict=True):
        found[output] = found.get(output, ZERO) + seed
    for node in reversed(order(outputs)):
        g = found.get(node)
        if g is not None and node.args:
            for arg, part in zip(node.args, FUNCTIONS[node.op].pull(g, node, *node.args), strict=True):
                if part is not None and arg.op != "const":
                    found[arg] = found.get(arg, ZERO) + part
    return [found.get(node, ZERO) for node in wanted]


def substitute(expr: Expr, replaced: Mapping[Expr, Expr]) -> Expr:
    """The expression with other nodes in place of some."""
    made = dict(replaced)
    for node in order([expr]):
        if node not in made:
            made[node] = Expr(node.op, tuple(made[arg] for arg in node.args), node.value)
    return made[expr]


def lower(outputs: Sequence[Expr], arguments: Sequence[Expr]) -> tuple:
    """The program ``(count, steps, outputs)`` of :mod:`kernels.expression` over the given leaves."""
    numbers = {node: i for i, node in enumerate(arguments)}
    steps: list[tuple] = []
    for node in order(outputs):
        if node not in numbers:
            assert node.op != "leaf", f"{node} is no argument"
            if node.op == "const":
                row = "const", float(np.float32(node.value))
            else:
                row = node.op, *(numbers[arg] for arg in node.args)
            numbers[node] = len(arguments) + len(steps)
            steps.append(row)
    return len(arguments), tuple(steps), tuple(numbers[output] for output in outputs)


def evaluate(
    outputs: Sequence[Expr], arguments: Sequence[np.ndarray], errors: Sequence[np.ndarray] | None = None
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Each output in float64, and a bound of the first order on the error of computing it in fp32, in units of 2**-24.

    A function adds its own error to what its arguments' errors cost by its derivative; results below fp32's normal
    numbers may be flushed. ``arguments`` (by leaf number) are exact unless ``errors`` says by how many units they are
    not. No bound holds where a computed value decides a step (floor, a comparison) that lies within its error.
    """
    known: dict[Expr, tuple[np.ndarray, np.ndarray]] = {}
    with np.errstate(all="ignore"):
        for node in order(outputs):
            if node.op == "leaf":
                error = errors[node.value] if errors is not None else 0.0
                known[node] = np.asarray(arguments[node.value], np.float64), np.asarray(error, np.float64)
            elif node.op == "const":
                known[node] = np.float64(node.value), np.float64(rounding(node.value))
            else:
                known[node] = _step(node.op, [known[arg] for arg in node.args])
    return [known[output] for output in outputs]


_TINY = 2.0**-100
"""2**-124 in units of 2**-24: more than what flushing a subnormal number costs."""


def _step(op: str, args: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    function, values = FUNCTIONS[op], [value for value, _ in args]
    result = function.reference(*values)
    own = np.abs(values[0] * values[1]) if op == "fma" else 0.0
    units = function.units(result, *values) if callable(function.units) else function.units
    error = units * np.abs(result) + own + (_TINY if function.units else 0.0)
    for slope, (_, inherited) in zip(_slopes(op, values, result), args, strict=True):
        error = error + np.where(inherited == 0, 0.0, np.abs(slope) * inherited)
    return result, error


def _slopes(op: str, values: list[np.ndarray], result: np.ndarray) -> list[np.ndarray]:
    """The derivative by each argument, from the table's own expressions."""
    places = [leaf(i) for i in range(len(values) + 1)]
    pulled = FUNCTIONS[op].pull(ONE, places[-1], *places[:-1])
    known = dict(zip(places, [*values, result], strict=True))
    for node in order([part for part in pulled if part is not None]):
        if node.op == "const":
            known[node] = np.float64(node.value)
        elif node not in known:
            known[node] = FUNCTIONS[node.op].reference(*(known[arg] for arg in node.args))
    return [np.float64(0) if part is None else known[part] for part in pulled]


def _method(name: str) -> Callable[..., Expr]:
    def method(self: Expr, *args: Expr | Number) -> Expr:
        return call(name, self, *args)

    method.__name__, method.__doc__ = name, f"``{name}`` of the tables."
    return method


for _name in (*FUNCTIONS, *COMPOSED):
    setattr(Expr, _name, _method(_name))
