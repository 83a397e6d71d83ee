"""A weight problem on the device, with enough bases and outputs that no call finds its data in the L2 cache."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
from golden import assert_golden
from held_buffers import HeldBuffers
from timing import copy_call, fill_call, rotations

from plans.core import Device, DeviceBuffer, ElementKind, Operand, PrecisionGuarantee, Workspace
from plans.weight import Hadamard, Kronecker, LowRank, Source, WeightArgs, WeightDescriptor, WeightPlan

SCALE = 0.75  # a scale that fp32 holds exactly
LEAST_CALLS = 20  # in a graph, so that its own launch is no part of the time
POISON = 0xFF  # every float is NaN

Call = Callable[[Any], None]

# A prime below 2**22: repeated over a weight, the same values never meet the same columns.
_BLOCK = 4194301


def repeats(pairs: int) -> int:
    """How often a graph goes over the pairs of buffers."""
    return -(-LEAST_CALLS // pairs)


def random_values(rng: np.random.Generator, shape: tuple[int, ...], kind: ElementKind) -> np.ndarray:
    """Normal values of deviation 0.05."""
    return (rng.standard_normal(shape, np.float32) * np.float32(0.05)).astype(kind.values)


def fill_random(
    device: Device, rng: np.random.Generator, target: DeviceBuffer, nbytes: int, kind: ElementKind, stream: Any
) -> None:
    """Random values over the first ``nbytes``: one block from the host, doubled on the device until it fills them."""
    block = random_values(rng, (min(_BLOCK, nbytes // kind.itemsize),), kind)
    device.copy_in(target, 0, block.view(np.uint8), stream)
    filled = block.nbytes
    while filled < nbytes:
        count = min(filled, nbytes - filled)
        copy_call(target.address + filled, target.address, count)(stream)
        filled += count
    device.synchronize(stream)


class Factors:
    """Random factors of a descriptor, on the host and on the device."""

    def __init__(self, device: Device, descriptor: WeightDescriptor, rng: np.random.Generator, held: ExitStack) -> None:
        def upload(operand: Operand) -> tuple[np.ndarray, Any]:
            values = random_values(rng, operand.shape, operand.element)
            buffer = device.upload(values)
            held.callback(buffer.close)
            return values, buffer.tensor(operand.element, operand.shape)

        pairs = [[upload(operand) for operand in group] for group in descriptor.source_operands]
        self.values = [[values for values, _ in group] for group in pairs]
        self.tensors = [[tensor for _, tensor in group] for group in pairs]


class Problem(HeldBuffers):
    """A weight plan with its arguments over several buffers; a context manager, which frees them.

    ``calls`` are launches of the plan, over one pair of base and output after the other.
    """

    def __init__(self, device: Device, descriptor: WeightDescriptor, rng: np.random.Generator) -> None:
        super().__init__(device)
        self.descriptor = descriptor
        self.plan = WeightPlan.select(None, descriptor, device=device)
        with self._freed_on_failure():
            self._allocate(rng)

    @property
    def nbytes(self) -> int:
        """Bytes of the result, and of the base."""
        return math.prod(self.descriptor.shape) * self.descriptor.out.itemsize

    @property
    def calls(self) -> list[Call]:
        """One launch or more for every pair of buffers."""
        plan, workspace = self.plan, self.workspace
        return self._rotated([lambda stream, args=args: plan.run(stream, workspace, args) for args in self.arguments])

    @property
    def copy_calls(self) -> list[Call]:
        """Copies of every base to its output."""
        pairs = zip(self._outs, self._bases, strict=True)
        return self._rotated([copy_call(out.address, base.address, self.nbytes) for out, base in pairs])

    @property
    def fill_calls(self) -> list[Call]:
        """Fills of every output."""
        return self._rotated([fill_call(out.address, self.nbytes) for out in self._outs])

    def poison(self) -> None:
        """Fill the outputs with NaN."""
        for out in self._outs:
            self.device.fill(out, POISON, self._stream)
        self.device.synchronize(self._stream)

    def check(self, rng: np.random.Generator) -> None:
        """Every value of one output was written, and those of some rows are right."""
        at = int(rng.integers(len(self._outs)))
        descriptor, device = self.descriptor, self.device
        out = device.download(self._outs[at], descriptor.out.values, descriptor.matrix, self._stream)
        base = None
        if descriptor.base is not None:
            base = device.download(self._bases[at], descriptor.base.values, descriptor.matrix, self._stream)
        check_rows(self.plan.precision_guarantee, descriptor, self.factors.values, out, base, self.magnitude, rng)
        assert not device.download(self._flag, np.int32, (1,), self._stream)[0], "a result was said not to be finite"

    def _rotated(self, calls: list[Call]) -> list[Call]:
        return calls * repeats(len(calls))

    def _allocate(self, rng: np.random.Generator) -> None:
        device, descriptor = self.device, self.descriptor
        has_base = descriptor.base is not None
        pairs = rotations(self.nbytes * (1 + has_base))
        self._outs = [self._take(self.nbytes) for _ in range(pairs)]
        self._bases = [self._take(self.nbytes) for _ in range(pairs if has_base else 0)]
        self._flag = self._take(4)
        self.workspace = Workspace(self._take(size) if (size := self.plan.workspace_size()) else None)
        self.factors = Factors(device, descriptor, rng, self._held)
        self.magnitude = magnitude = None
        if descriptor.is_dora:
            (operand,) = (o for o in descriptor.operands() if o.name == "magnitude")
            self.magnitude = rng.uniform(0.5, 4.0, operand.shape).astype(operand.element.values)
            magnitude = self._upload(self.magnitude).tensor(operand.element, operand.shape)
        device.fill(self._flag, 0, self._stream)
        for base in self._bases[:1]:
            fill_random(device, rng, base, self.nbytes, descriptor.base, self._stream)
        for base in self._bases[1:]:  # the same values elsewhere
            copy_call(base.address, self._bases[0].address, self.nbytes)(self._stream)
        self.arguments = [self._arguments(number, magnitude) for number in range(pairs)]
        self.poison()

    def _arguments(self, number: int, magnitude: Any) -> WeightArgs:
        descriptor = self.descriptor
        base = None
        if descriptor.base is not None:
            base = self._bases[number].tensor(descriptor.base, descriptor.shape)
        return WeightArgs(
            self._outs[number].tensor(descriptor.out, descriptor.shape),
            self.factors.tensors,
            [SCALE] * len(descriptor.sources),
            base,
            magnitude,
            not_finite=self._flag.tensor(ElementKind.I32, (1,)) if descriptor.check_finite else None,
        )


def check_rows(
    guarantee: PrecisionGuarantee,
    descriptor: WeightDescriptor,
    factors: Sequence[Sequence[np.ndarray]],
    out: np.ndarray,
    base: np.ndarray | None,
    magnitude: np.ndarray | None,
    rng: np.random.Generator,
) -> None:
    """No value of ``out`` is the poison that it was filled with, and some rows are right.

    A merge keeps the golden set's rule, a delta its plan's guarantee. ``out`` and ``base`` are matrices.
    """
    unwritten = int(np.isnan(out).sum())
    assert not unwritten, f"{unwritten} of {out.size} values were not written"
    small, cut, rows = some_rows(descriptor, factors, rng)
    found, weight = out[rows], None if base is None else base[rows]
    exact, size = small.reference(cut, [SCALE] * len(cut), weight, None if magnitude is None else magnitude[rows])
    exact, size = exact.reshape(found.shape), size.reshape(found.shape)
    if weight is not None:
        assert_golden(found, exact, weight, descriptor.out.values)
    else:
        kept = guarantee.accepts(found, exact, size, descriptor.out)
        assert kept.all(), f"{int((~kept).sum())} of {kept.size} values break the guarantee"


def some_rows(
    descriptor: WeightDescriptor, factors: Sequence[Sequence[np.ndarray]], rng: np.random.Generator
) -> tuple[WeightDescriptor, list[list[np.ndarray]], np.ndarray]:
    """A few output rows of a problem, the first and the last among them, as a small problem of its own.

    Returns the small descriptor, its factors, and which rows they are. The rows of a Kronecker product are those of
    some rows of w1 with some of w2.
    """
    splits = {(source.a, source.c) for source in descriptor.sources if isinstance(source, Kronecker)}
    assert len(splits) < 2, f"Kronecker products of several splits: {splits}"
    outer_count, inner_count = splits.pop() if splits else (1, descriptor.out_features)
    outer, inner = _some(outer_count, 4, rng), _some(inner_count, 12, rng)
    rows = (outer[:, None] * inner_count + inner).reshape(-1)
    pairs = [
        _rows_of(source, group, outer, inner, rows) for source, group in zip(descriptor.sources, factors, strict=True)
    ]
    small = dataclasses.replace(descriptor, out_features=len(rows), sources=tuple(source for source, _ in pairs))
    return small, [group for _, group in pairs], rows


def _some(count: int, wanted: int, rng: np.random.Generator) -> np.ndarray:
    return np.unique(np.concatenate([[0, count - 1], rng.integers(count, size=wanted - 2)]))


def _rows_of(
    source: Source, factors: Sequence[np.ndarray], outer: np.ndarray, inner: np.ndarray, rows: np.ndarray
) -> tuple[Source, list[np.ndarray]]:
    """A source and its factors cut to some rows: those of the first factor of each product."""
    cut = list(factors)
    if isinstance(source, Kronecker):
        second = 1 if isinstance(source.w1, ElementKind) else 2
        cut[0], cut[second] = cut[0][outer], cut[second][inner]
        return dataclasses.replace(source, a=len(outer), c=len(inner)), cut
    assert isinstance(source, LowRank | Hadamard), source
    for first in (0,) if isinstance(source, LowRank) else (0, 2):
        cut[first] = cut[first][rows]
    return source, cut
