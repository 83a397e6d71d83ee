"""The time of a product's program on the device, for choices that are measured: operands rotated past the L2 cache."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from kernels.target import bound
from plans.core.device import Device
from plans.core.operand import Operand
from plans.core.plan import Launches
from plans.core.tensor import TensorMut
from plans.core.tuning import device_seconds
from plans.core.workspace import NO_WORKSPACE
from plans.matmul.descriptor import SegmentedMatmulArgs, SegmentedMatmulDescriptor
from plans.matmul.program import MatmulProgram

_ROTATED_BYTES, _MOST_SETS = 180 << 20, 8


def launches_seconds(operands: Sequence[Operand], device: Device, bind: Callable[[list[TensorMut]], Launches]) -> float:
    """Seconds of the launches that ``bind`` makes of operands of random bits with small exponents."""
    nbytes = sum(operand.nbytes for operand in operands)
    count = min(_MOST_SETS, -(-_ROTATED_BYTES // max(1, nbytes)))
    sets = [[_random_operand(device, operand) for operand in operands] for _ in range(count)]
    runs = itertools.cycle([bound(bind(tensors)) for tensors in sets])

    def launch(stream: Any) -> None:
        next(runs)(stream)

    return device_seconds(device, launch)


def program_seconds(descriptor: SegmentedMatmulDescriptor, device: Device, program: MatmulProgram) -> float:
    """Seconds of one run of a product's program that needs no workspace."""

    def bind(tensors: list[TensorMut]) -> Launches:
        return program.bind(_arguments(descriptor, tensors), NO_WORKSPACE)

    return launches_seconds(descriptor.operands(), device, bind)


def _arguments(descriptor: SegmentedMatmulDescriptor, tensors: list[TensorMut]) -> SegmentedMatmulArgs:
    out, *rest = tensors
    pairs = len(descriptor.segments) + len(descriptor.low_rank)
    both = list(zip(rest[0 : 2 * pairs : 2], rest[1 : 2 * pairs : 2], strict=True))
    first = len(descriptor.segments)
    return SegmentedMatmulArgs(out, both[:first], epilogue=rest[2 * pairs :], low_rank=both[first:])


def _random_operand(device: Device, operand: Operand) -> TensorMut:
    """Values of random mantissas: a product of zeros would draw less power and run faster than any real one."""
    block = np.random.default_rng(0).standard_normal(1 << 16).astype(operand.element.values)
    buffer = device.upload(np.resize(block, operand.span))
    data = buffer.pointer(operand.element.storage)
    return TensorMut(data, operand.shape, operand.strides, operand.element, operand.span, device.ordinal, buffer)
