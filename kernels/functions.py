"""Scalar functions in fp32 registers, by name: what expressions are made of.

``FUNCTIONS`` maps a name to a device function of one to three fp32 arguments. Predicates give 1 or 0. NaN is never
hidden: minimum and maximum hand it on. How exact each function is stands in :mod:`plans.expression`, beside its
derivative.
"""

from __future__ import annotations

import math

import numpy as np

from kernels.ptx import instruction
from kernels.target import SIMULATOR, device


def _library(name: str, twin):
    """A function of CUDA's libdevice through ``math``; NumPy's in the simulator, where overflow is no error."""
    if SIMULATOR:
        return lambda *x: np.float32(twin(*x))
    return device({"exp": _exp, "log": _log, "sin": _sin, "cos": _cos, "tanh": _tanh, "erf": _erf, "pow": _pow}[name])


def _exp(x):
    return math.exp(x)


def _log(x):
    return math.log(x)


def _sin(x):
    return math.sin(x)


def _cos(x):
    return math.cos(x)


def _tanh(x):
    return math.tanh(x)


def _erf(x):
    return math.erf(x)


def _pow(x, y):
    return math.pow(x, y)


exp = _library("exp", np.exp)
log = _library("log", np.log)
sin = _library("sin", np.sin)
cos = _library("cos", np.cos)
tanh = _library("tanh", np.tanh)
erf = _library("erf", math.erf)
power = _library("pow", np.power)

floor = instruction("cvt.rmi.f32.f32 $0, $1;", "f", "f", twin=np.floor, pure=True)
ceil = instruction("cvt.rpi.f32.f32 $0, $1;", "f", "f", twin=np.ceil, pure=True)
round_even = instruction("cvt.rni.f32.f32 $0, $1;", "f", "f", twin=np.rint, pure=True)
square_root = instruction("sqrt.rn.f32 $0, $1;", "f", "f", twin=np.sqrt, pure=True)
maximum = instruction("max.NaN.f32 $0, $1, $2;", "ff", "f", twin=np.maximum, pure=True)
minimum = instruction("min.NaN.f32 $0, $1, $2;", "ff", "f", twin=np.minimum, pure=True)


def _reciprocal(x):
    return np.float32(1) / x


def _inverse_root(x):
    return np.float32(1) / np.sqrt(x)


exp2 = instruction("ex2.approx.ftz.f32 $0, $1;", "f", "f", twin=np.exp2, pure=True)
root = instruction("sqrt.approx.f32 $0, $1;", "f", "f", twin=np.sqrt, pure=True)
reciprocal = instruction("rcp.approx.ftz.f32 $0, $1;", "f", "f", twin=_reciprocal, pure=True)
inverse_root = instruction("rsqrt.approx.ftz.f32 $0, $1;", "f", "f", twin=_inverse_root, pure=True)


_MINUS_LOG2_E = np.float32(-math.log2(math.e))


@device
def negative(x):
    """-x."""
    return -x


@device
def absolute(x):
    """|x|."""
    return math.fabs(x) if x == x else x


@device
def sign(x):
    """-1, 0 or 1; NaN where x is."""
    if x > np.float32(0):
        return np.float32(1)
    return np.float32(-1) if x < np.float32(0) else x


@device
def square(x):
    """The square."""
    return x * x


@device
def sigmoid(x):
    """1 / (1 + exp(-x))."""
    return reciprocal(np.float32(1) + exp2(x * _MINUS_LOG2_E))


# Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26: the error function within 1.5e-7.
_P = np.float32(0.3275911 * math.sqrt(0.5))
_A1, _A2, _A3, _A4, _A5 = map(np.float32, (0.254829592, -0.284496736, 1.421413741, -1.453152027, 1.061405429))
_HALF_SQUARE = np.float32(-0.5 * math.log2(math.e))


@device
def normal_cdf(x):
    """The normal distribution function, (1 + erf(x / sqrt(2))) / 2, of a third of erf's cost."""
    t = reciprocal(np.float32(1) + _P * absolute(x))
    series = ((((_A5 * t + _A4) * t + _A3) * t + _A2) * t + _A1) * t
    tail = np.float32(0.5) * series * exp2(x * x * _HALF_SQUARE)
    return np.float32(1) - tail if x > np.float32(0) else tail


@device
def relu(x):
    """The larger of x and 0."""
    return maximum(x, np.float32(0))


@device
def add(x, y):
    """The sum."""
    return x + y


@device
def subtract(x, y):
    """The difference."""
    return x - y


@device
def multiply(x, y):
    """The product."""
    return x * y


@device
def divide(x, y):
    """The quotient."""
    return x / y


@device
def greater(x, y):
    """1 where x > y, else 0."""
    return np.float32(1) if x > y else np.float32(0)


@device
def greater_equal(x, y):
    """1 where x >= y, else 0."""
    return np.float32(1) if x >= y else np.float32(0)


@device
def equal(x, y):
    """1 where x == y, else 0."""
    return np.float32(1) if x == y else np.float32(0)


@device
def not_equal(x, y):
    """1 where x != y, else 0."""
    return np.float32(1) if x != y else np.float32(0)


@device
def where(condition, x, y):
    """The second argument where the first is not 0, else the third."""
    return x if condition != np.float32(0) else y


@device
def multiply_add(x, y, z):
    """The sum x * y + z, rounded once or twice."""
    return x * y + z


FUNCTIONS = {
    "neg": negative, "abs": absolute, "sign": sign, "floor": floor, "ceil": ceil, "round": round_even,
    "square": square, "sqrt": square_root, "root": root, "rsqrt": inverse_root, "reciprocal": reciprocal,
    "exp": exp, "exp2": exp2,
    "log": log, "sin": sin, "cos": cos, "tanh": tanh, "erf": erf, "cdf": normal_cdf, "sigmoid": sigmoid, "relu": relu,
    "add": add, "sub": subtract, "mul": multiply, "div": divide, "pow": power,
    "maximum": maximum, "minimum": minimum,
    "gt": greater, "ge": greater_equal, "eq": equal, "ne": not_equal,
    "where": where, "fma": multiply_add,
}  # fmt: skip
"""Name -> device function."""
