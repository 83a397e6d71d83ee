"""New tensors: constants, ranges, random numbers by seed, from NumPy and from buffers of this library."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lycoris.buffers import DeviceArray
from lycoris.errors import RefusedInput
from lycoris.replay import Recorded, recorded
from lycoris.tensor import autograd, launch, streams
from lycoris.tensor.launch import F32, empty, run
from lycoris.tensor.tensor import FLOATS, Storage, Tensor, layout_of
from lycoris.tensor.uploaded import Uploaded
from plans.core import Device, ElementKind, TensorRef
from plans.random import (
    Distribution,
    DropoutArgs,
    DropoutDescriptor,
    DropoutPlan,
    RandomArgs,
    RandomDescriptor,
    RandomPlan,
    first_uniform,
)


def zeros(
    shape: Sequence[int], kind: ElementKind = F32, device: Device | None = None, *, requires_grad: bool = False
) -> Tensor:
    """All elements zero."""
    return launch.zeros(shape, kind, device).requires_grad_(requires_grad)


def full(
    shape: Sequence[int],
    value: float,
    kind: ElementKind = F32,
    device: Device | None = None,
    *,
    requires_grad: bool = False,
) -> Tensor:
    """All elements ``value``."""
    if kind not in FLOATS:
        return from_numpy(np.full(shape, value, kind.values), device)
    return launch.filled(shape, value, kind, device).requires_grad_(requires_grad)


def ones(
    shape: Sequence[int], kind: ElementKind = F32, device: Device | None = None, *, requires_grad: bool = False
) -> Tensor:
    """All elements one."""
    return full(shape, 1, kind, device, requires_grad=requires_grad)


def arange(
    start: float, stop: float | None = None, step: float = 1, kind: ElementKind = F32, device: Device | None = None
) -> Tensor:
    """start, start + step, ... below ``stop``; from 0 where one number is given."""
    first, last = (0, start) if stop is None else (start, stop)
    return from_numpy(np.arange(first, last, step), device, kind)


def from_numpy(
    array: np.ndarray, device: Device | None = None, kind: ElementKind | None = None, *, requires_grad: bool = False
) -> Tensor:
    """A copy on the device of a float32, float16, bfloat16 (ml_dtypes), int32 or int64 array.

    With ``kind``, of an array of any numbers, rounded to it once. Raises RefusedInput for other arrays.
    """
    array = np.asarray(array)
    if kind is None and array.dtype == np.float64:
        raise RefusedInput("from_numpy: an array of float64; say the kind, for example ElementKind.F32")
    if kind is not None and kind not in FLOATS:
        array, kind = array.astype(kind.values), None
    held = DeviceArray.from_numpy(array, kind, device)
    return from_array(held, requires_grad=requires_grad)


def from_array(array: DeviceArray, *, requires_grad: bool = False) -> Tensor:
    """A tensor that shares a `DeviceArray`'s memory."""
    made = Tensor(Storage(array.buffer), layout_of(array.shape, array.kind))
    return made.requires_grad_() if requires_grad else made


class Generator:
    """Random numbers by a seed: each call of one generator draws from a stream of its own, so that runs repeat.

    ``number`` is the next stream: what to save and to set for going on where a run stopped.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed, self.number = seed, 0

    def take(self) -> tuple[int, int]:
        """The seed and the next stream's number."""
        self.number += 1
        return self.seed, self.number - 1


_default = Generator()


def manual_seed(seed: int) -> Generator:
    """Start the generator that is used where no other is given from a seed."""
    _default.seed, _default.number = seed, 0
    return _default


def default_generator() -> Generator:
    """The generator that is used where no other is given."""
    return _default


class _Stream(NamedTuple):
    """Where random numbers come from: a seed, a stream's number, and what on the device both are counted from."""

    seed: int
    number: int
    origin: Tensor | None = None

    def arguments(self) -> tuple[int, int, TensorRef | None]:
        """As the plans take it."""
        return self.seed, self.number, None if self.origin is None else self.origin.ref()


class _Counted:
    """A generator's streams within recorded work: counted from where it stands at each replay."""

    def __init__(self, generator: Generator, work: Recorded, device: Device) -> None:
        self._generator, self._happens, self._count = generator, work.happens, 0
        self._origin = Uploaded(device)
        self._upload()
        work.updates.append(self._replay)

    def take(self) -> _Stream:
        """The next stream."""
        self._count += 1
        if self._happens:
            self._generator.take()
        return _Stream(0, self._count - 1, self._origin.tensor)

    def _upload(self) -> None:
        self._origin.set(np.array([self._generator.seed, self._generator.number], np.int64))

    def _replay(self) -> None:
        self._upload()
        self._generator.number += self._count


def _stream(seed: int | None, generator: Generator | None, device: Device) -> _Stream:
    return _Stream(seed, 0) if seed is not None else streams.take(lambda: _next(generator or _default, device))


def _next(generator: Generator, device: Device) -> _Stream:
    work = recorded()
    if work is None:
        return _Stream(*generator.take())
    key = ("random numbers", id(generator), device.ordinal)
    if key not in work.made:
        work.made[key] = _Counted(generator, work, device)
    return work.made[key].take()


def chance() -> float:
    """A uniform number on the host from the generator that is used where no other is given."""
    return first_uniform(*streams.take(_default.take))


def _random(
    distribution: Distribution, shape: Sequence[int], low: float, width: float, kind: ElementKind,
    device: Device | None, seed: int | None, generator: Generator | None,
) -> Tensor:  # fmt: skip
    out = empty(shape, kind, device)
    stream = _stream(seed, generator, out.device)
    descriptor = RandomDescriptor(out.size, kind, distribution, stream.origin is not None)
    flat = out.viewed((out.size,))
    plan = RandomPlan.select(None, descriptor, device=out.device)
    run(plan, RandomArgs(flat.mut(), low, width, *stream.arguments()))
    return out


def rand(
    shape: Sequence[int],
    low: float = 0.0,
    high: float = 1.0,
    kind: ElementKind = F32,
    device: Device | None = None,
    *,
    seed: int | None = None,
    generator: Generator | None = None,
    requires_grad: bool = False,
) -> Tensor:
    """Uniform numbers in [low, high): those of ``seed``, or a generator's next ones."""
    out = _random(Distribution.UNIFORM, shape, low, high - low, kind, device, seed, generator)
    return out.requires_grad_(requires_grad)


def randn(
    shape: Sequence[int],
    mean: float = 0.0,
    std: float = 1.0,
    kind: ElementKind = F32,
    device: Device | None = None,
    *,
    seed: int | None = None,
    generator: Generator | None = None,
    requires_grad: bool = False,
) -> Tensor:
    """Normal numbers: those of ``seed``, or a generator's next ones."""
    out = _random(Distribution.NORMAL, shape, mean, std, kind, device, seed, generator)
    return out.requires_grad_(requires_grad)


def dropout(x: Tensor, p: float = 0.5, *, seed: int | None = None, generator: Generator | None = None) -> Tensor:
    """Zeros with probability p, the others times 1 / (1 - p).

    The way back draws the same numbers again; no mask is kept. Raises RefusedInput unless 0 <= p < 1.
    """
    if not 0 <= p < 1:
        raise RefusedInput(f"dropout: p is {p}, wanted 0 up to, not including, 1; give a probability there")
    stream = _stream(seed, generator, x.device)
    out = _dropped(x.detach(), p, stream, x.kind)
    if not autograd.wanted((x,)):
        return out
    return autograd.record("dropout", out, (x,), (), lambda g, edges: [_dropped(g, p, stream, edges[0].kind)])


def _dropped(x: Tensor, p: float, stream: _Stream, kind: ElementKind) -> Tensor:
    source = x if x.contiguous_ and x.aligned else launch.converted(x, x.kind)
    out = empty(x.shape, kind, x.device)
    count = math.prod(x.shape)
    descriptor = DropoutDescriptor(count, x.kind, kind, stream.origin is not None)
    plan = DropoutPlan.select(None, descriptor, device=x.device)
    flat = out.viewed((count,)), source.viewed((count,))
    run(plan, DropoutArgs(flat[0].mut(), flat[1].ref(), p, 1 / (1 - p), *stream.arguments()))
    return out
