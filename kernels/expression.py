"""Expressions as device functions: a program in plain data becomes straight-line code over the scalar functions.

A program is ``(count, steps, outputs)``: ``count`` arguments, then one value a step, ``(function, *values)`` or
``("const", x)`` with values by their number, and the numbers of the values that it returns. So a kernel's binary is
named by the expression that it computes, and no kernel is written for one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import numpy as np

from kernels.functions import FUNCTIONS
from kernels.target import device

Program = tuple


def written(name: str, arguments: str, lines: Sequence[str], known: dict) -> Callable:
    """A device function of generated lines.

    One function of straight-line code, where a chain of closures would be one function a step: that is slower to
    compile, and far slower in the simulator.
    """
    body = "\n    ".join(lines)
    space = dict(known)
    exec(compile(f"def {name}({arguments}):\n    {body}\n", f"<{name}>", "exec"), space)
    return device(space[name])


def _tuple(parts: Sequence[str]) -> str:
    return "(" + "".join(f"{part}, " for part in parts) + ")"


@functools.cache
def evaluator(program: Program) -> Callable:
    """A device function: the tuple of the program's arguments -> the tuple of its results, fp32 all of them."""
    count, steps, outputs = program
    known = {"float32": np.float32} | {f"f_{name}": function for name, function in FUNCTIONS.items()}
    lines = [f"v{i} = x[{i}]" for i in range(count)]
    for at, (name, *values) in enumerate(steps, count):
        if name == "const":
            known[f"c{at}"] = np.float32(values[0])
            lines.append(f"v{at} = c{at}")
        else:
            lines.append(f"v{at} = f_{name}({', '.join(f'v{value}' for value in values)})")
    lines.append(f"return {_tuple([f'v{value}' for value in outputs])}")
    return written("evaluate", "x", lines, known)


@functools.cache
def identity(count: int) -> Program:
    """The program that returns its arguments."""
    return count, (), tuple(range(count))


@functools.cache
def gather(loads: tuple[Callable, ...]) -> Callable:
    """A device function ``(pointers, offsets) -> tuple``: each load at its own pointer and offset."""
    known = {f"load{i}": load for i, load in enumerate(loads)}
    parts = [f"load{i}(pointers[{i}], offsets[{i}])" for i in range(len(loads))]
    return written("gather", "pointers, offsets", [f"return {_tuple(parts)}"], known)


@functools.cache
def scatter(stores: tuple[Callable, ...]) -> Callable:
    """A device function ``(pointers, offsets, values)``: each store of its value."""
    known = {f"store{i}": store for i, store in enumerate(stores)}
    lines = [f"store{i}(pointers[{i}], offsets[{i}], values[{i}])" for i in range(len(stores))]
    return written("scatter", "pointers, offsets, values", lines or ["pass"], known)


@functools.cache
def column(count: int, pitch: int) -> Callable:
    """A device function ``(values, j, rest) -> tuple``: element ``j`` of every group of ``pitch``, then ``rest``."""
    parts = [f"values[{i * pitch} + j]" for i in range(count)]
    return written("column", "values, j, rest", [f"return ({''.join(p + ', ' for p in parts)}*rest,)"], {})


@functools.cache
def offsets(dimensions: int, operands: int) -> Callable:
    """A device function ``(index, extents, strides)``: each operand's offset of the element of a row-major index.

    ``index`` is below 2**32; ``strides`` holds every operand's strides one after the other.
    """
    known = {"uint32": np.uint32, "int64": np.int64}
    lines = ["rest = uint32(index)"]
    for d in reversed(range(1, dimensions)):
        lines += [f"q{d} = rest // uint32(extents[{d}])", f"c{d} = int64(rest - q{d} * uint32(extents[{d}]))"]
        lines.append(f"rest = q{d}")
    lines.append("c0 = int64(rest)")
    sums = [" + ".join(f"c{d} * strides[{k * dimensions + d}]" for d in range(dimensions)) for k in range(operands)]
    return written("offsets", "index, extents, strides", [*lines, f"return {_tuple(sums)}"], known)
