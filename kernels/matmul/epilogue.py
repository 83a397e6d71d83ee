"""What becomes of a product before it is stored: steps as data, compiled into device functions for every matmul kernel.

A step is a tuple of plain data, the table's name first:

| step | computes | parameters |
|---|---|---|
| ("bias", kind) | v + bias[column] | pointer, batch stride |
| ("scale_row", kind) | v * scale[row] | pointer, batch stride |
| ("scale_column", kind) | v * scale[column] | pointer, batch stride |
| ("residual", kind) | v + beta * c[row, column] | pointer, row stride, batch stride, beta |
| ("relu",), ("gelu",), ("gelu_tanh",), ("silu",) | the function of v; gelu is erf's | none |
| ("gate", function, gate_first) | function(gate) * up | none |

Everything is fp32; the kernel rounds once, when it stores. A gate takes two columns of the product to one of the
result: of the n columns before it one half are gates and the other values ("up"); ``gate_first`` says which. Column c
of the result is made of columns c and c + n / 2; steps before the gate are asked with those, later ones with c.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np

from kernels import bits, functions, memory
from kernels.elements import ELEMENTS
from kernels.target import cuda, device, f32, i64, types

_SQRT_HALF = np.float32(math.sqrt(0.5))
_SQRT_8_OVER_PI = np.float32(math.sqrt(8 / math.pi))
_GELU_CUBE = np.float32(0.044715)


@device
def gelu(x):
    """Erf's GELU: x / 2 (1 + erf(x / sqrt 2))."""
    return np.float32(0.5) * x * (np.float32(1) + functions.erf(x * _SQRT_HALF))


@device
def gelu_tanh(x):
    """GELU by tanh: x / 2 (1 + tanh(y)) = x sigmoid(2 y) for y = sqrt(2 / pi) (x + 0.044715 x^3)."""
    return x * functions.sigmoid(_SQRT_8_OVER_PI * (x + _GELU_CUBE * x * x * x))


@device
def silu(x):
    """SiLU: x sigmoid(x)."""
    return x * functions.sigmoid(x)


ACTIVATIONS = {"relu": functions.relu, "gelu": gelu, "gelu_tanh": gelu_tanh, "silu": silu}


def _activation(name: str) -> SimpleNamespace:
    function = ACTIVATIONS[name]

    @device
    def one(value, batch, row, column, p):
        return function(value)

    @device
    def fetch(batch, row, column, p):
        return ()

    @device
    def two(value, following, words, p):
        return function(value), function(following)

    @device
    def eight(values, at, batch, row, column, p):
        for i in range(8):
            values[at + i] = function(values[at + i])

    return SimpleNamespace(parameters=types.Tuple(()), one=one, fetch=fetch, two=two, eight=eight)


def _pairs_of(kind: str, load32: Callable, load64: Callable) -> tuple[Callable, Callable]:
    """Device functions: two neighbouring elements as two words in registers, and those as fp32."""
    low, high = (bits.low_f16, bits.high_f16) if kind == "f16" else (bits.low_bf16, bits.high_bf16)
    packed = kind != "f32"

    @device
    def fetch(pointer, at):
        if packed:
            return load32(pointer, at), np.uint32(0)
        return load64(pointer, at)

    @device
    def values(words):
        if packed:
            return low(words[0]), high(words[0])
        return bits.bits_f32(words[0]), bits.bits_f32(words[1])

    return fetch, values


def _by_column(kind: str, combine: Callable) -> SimpleNamespace:
    element = ELEMENTS[kind]
    load, fetch8, unpack8, words = element.load, element.fetch8_cached, element.unpack8, element.words
    fetch_pair, values_of = _pairs_of(kind, memory.load32, memory.load64)

    @device
    def one(value, batch, row, column, p):
        return combine(value, load(p[0], batch * p[1] + column))

    @device
    def fetch(batch, row, column, p):
        return fetch_pair(p[0], batch * p[1] + column)

    @device
    def two(value, following, words, p):
        first, second = values_of(words)
        return combine(value, first), combine(following, second)

    @device
    def eight(values, at, batch, row, column, p):
        raw = cuda.local.array(words, np.uint32)
        operand = cuda.local.array(8, np.float32)
        fetch8(p[0], batch * p[1] + column, raw, 0)
        unpack8(raw, 0, operand, 0)
        for i in range(8):
            values[at + i] = combine(values[at + i], operand[i])

    parameters = types.Tuple((element.pointer, i64))
    return SimpleNamespace(parameters=parameters, one=one, fetch=fetch, two=two, eight=eight)


def _bias(kind: str) -> SimpleNamespace:
    return _by_column(kind, functions.add)


def _scale_column(kind: str) -> SimpleNamespace:
    return _by_column(kind, functions.multiply)


def _scale_row(kind: str) -> SimpleNamespace:
    element = ELEMENTS[kind]
    load = element.load

    @device
    def one(value, batch, row, column, p):
        return value * load(p[0], batch * p[1] + row)

    @device
    def fetch(batch, row, column, p):
        return load(p[0], batch * p[1] + row)

    @device
    def two(value, following, scale, p):
        return value * scale, following * scale

    @device
    def eight(values, at, batch, row, column, p):
        scale = load(p[0], batch * p[1] + row)
        for i in range(8):
            values[at + i] = values[at + i] * scale

    parameters = types.Tuple((element.pointer, i64))
    return SimpleNamespace(parameters=parameters, one=one, fetch=fetch, two=two, eight=eight)


def _residual(kind: str) -> SimpleNamespace:
    element = ELEMENTS[kind]
    # The result may be written over the residual, so these loads must not go through the read-only path.
    load, fetch8, unpack8, words = element.load, element.fetch8, element.unpack8, element.words
    fetch_pair, values_of = _pairs_of(kind, memory.load32_written, memory.load64_written)

    @device
    def one(value, batch, row, column, p):
        return value + p[3] * load(p[0], batch * p[2] + row * p[1] + column)

    @device
    def fetch(batch, row, column, p):
        return fetch_pair(p[0], batch * p[2] + row * p[1] + column)

    @device
    def two(value, following, words, p):
        first, second = values_of(words)
        return value + p[3] * first, following + p[3] * second

    @device
    def eight(values, at, batch, row, column, p):
        raw = cuda.local.array(words, np.uint32)
        operand = cuda.local.array(8, np.float32)
        fetch8(p[0], batch * p[2] + row * p[1] + column, raw, 0)
        unpack8(raw, 0, operand, 0)
        for i in range(8):
            values[at + i] = values[at + i] + p[3] * operand[i]

    parameters = types.Tuple((element.pointer, i64, i64, f32))
    return SimpleNamespace(parameters=parameters, one=one, fetch=fetch, two=two, eight=eight)


_STEPS: dict[str, Callable] = {
    "bias": _bias,
    "scale_row": _scale_row,
    "scale_column": _scale_column,
    "residual": _residual,
} | {name: functools.partial(_activation, name) for name in ACTIVATIONS}


@device
def _as_it_is(value, batch, row, column, p):
    return value


@device
def _fetch_nothing(batch, row, column, p):
    return ()


@device
def _both_as_they_are(value, following, words, p):
    return value, following


@device
def _nothing(values, at, batch, row, column, p):
    pass


def _then(rest: SimpleNamespace, step: SimpleNamespace, position: int) -> SimpleNamespace:
    """``rest``, then a step whose parameters are the epilogue's at ``position``."""
    rest_one, rest_fetch, rest_two, rest_eight = rest.one, rest.fetch, rest.two, rest.eight
    step_one, step_fetch, step_two, step_eight = step.one, step.fetch, step.two, step.eight

    @device
    def one(value, batch, row, column, p):
        return step_one(rest_one(value, batch, row, column, p), batch, row, column, p[position])

    @device
    def fetch(batch, row, column, p):
        return rest_fetch(batch, row, column, p), step_fetch(batch, row, column, p[position])

    @device
    def two(value, following, words, p):
        first, second = rest_two(value, following, words[0], p)
        return step_two(first, second, words[1], p[position])

    @device
    def eight(values, at, batch, row, column, p):
        rest_eight(values, at, batch, row, column, p)
        step_eight(values, at, batch, row, column, p[position])

    return SimpleNamespace(one=one, fetch=fetch, two=two, eight=eight)


def _chain(steps: dict[int, tuple]) -> SimpleNamespace:
    """Steps by their position, one after the other."""
    chain = SimpleNamespace(one=_as_it_is, fetch=_fetch_nothing, two=_both_as_they_are, eight=_nothing)
    for position, (name, *choices) in steps.items():
        chain = _then(chain, _STEPS[name](*choices), position)
    return chain


@functools.cache
def epilogue(steps: tuple[tuple, ...]) -> SimpleNamespace:
    """The steps as device functions; ``p`` are all their parameters, a tuple of tuples typed ``parameters``.

    Without a gate (``gated`` is false):
    ``one(value, batch, row, column, p)`` gives the result's element;
    ``fetch(batch, row, column, p)`` gives what the steps read for two neighbours, ``column`` even, as early as wanted;
    ``two(value, following, words, p)`` gives those two, of what `fetch` gave;
    ``eight(values, at, batch, row, column, p)`` changes eight neighbours in a local array, ``column`` a multiple of 8.

    With one, ``columns`` is the result's number of columns and every function takes gate and value columns as they lie
    in the product, the first half's element first:
    ``one(first, second, batch, row, column, columns, p)``;
    ``fetch(batch, row, column, columns, p)`` and ``two(a, b, second_a, second_b, words, p)`` give two neighbours;
    ``eight(values, at, second_at, batch, row, column, columns, p)`` leaves eight at ``at``.

    All coordinates are int64. ``fetch`` wants operands aligned to 2 and ``eight`` to 8 elements of 16 bits (fp32: 16
    bytes) in every row, strides included; ``plain`` says that there are no steps at all.
    """
    parameters = types.Tuple([_parameters_of(step) for step in steps])
    gates = [i for i, step in enumerate(steps) if step[0] == "gate"]
    if not gates:
        chain = _chain(dict(enumerate(steps)))
        return SimpleNamespace(parameters=parameters, gated=False, plain=not steps, **vars(chain))
    (gate,) = gates
    before = _chain({i: step for i, step in enumerate(steps) if i < gate})
    after = _chain({i: step for i, step in enumerate(steps) if i > gate})
    return SimpleNamespace(parameters=parameters, gated=True, plain=False, **_gated(before, steps[gate], after))


def _parameters_of(step: tuple) -> types.BaseTuple:
    name, *choices = step
    return types.Tuple(()) if name == "gate" else _STEPS[name](*choices).parameters


def _gated(before: SimpleNamespace, step: tuple, after: SimpleNamespace) -> dict[str, Callable]:
    _, name, gate_first = step
    function = ACTIVATIONS[name]
    before_one, before_fetch, before_two, before_eight = before.one, before.fetch, before.two, before.eight
    after_one, after_fetch, after_two, after_eight = after.one, after.fetch, after.two, after.eight

    @device
    def combine(first, second):
        return function(first) * second if gate_first else first * function(second)

    @device
    def one(first, second, batch, row, column, columns, p):
        first = before_one(first, batch, row, column, p)
        second = before_one(second, batch, row, column + columns, p)
        return after_one(combine(first, second), batch, row, column, p)

    @device
    def fetch(batch, row, column, columns, p):
        first, second = before_fetch(batch, row, column, p), before_fetch(batch, row, column + columns, p)
        return first, second, after_fetch(batch, row, column, p)

    @device
    def two(a, b, second_a, second_b, words, p):
        a, b = before_two(a, b, words[0], p)
        second_a, second_b = before_two(second_a, second_b, words[1], p)
        return after_two(combine(a, second_a), combine(b, second_b), words[2], p)

    @device
    def eight(values, at, second_at, batch, row, column, columns, p):
        before_eight(values, at, batch, row, column, p)
        before_eight(values, second_at, batch, row, column + columns, p)
        for i in range(8):
            values[at + i] = combine(values[at + i], values[second_at + i])
        after_eight(values, at, batch, row, column, p)

    return {"one": one, "fetch": fetch, "two": two, "eight": eight}
