"""What the matmul SKUs share: flattened kernel arguments, and the guarantee of a sum of so many products."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from kernels.matmul.store import UNIT
from kernels.parameters import flat_length
from kernels.target import Kernel
from plans.core.device import Device
from plans.core.operand import Operand
from plans.core.precision import ElementKind, MathPrecision, PrecisionGuarantee
from plans.core.tensor import TensorRef
from plans.matmul.descriptor import SegmentedMatmulArgs, SegmentedMatmulDescriptor
from plans.matmul.epilogue import units_after

MOST_BLOCKS = (1 << 31) - 1


def kernel_segments(descriptor: SegmentedMatmulDescriptor) -> tuple[tuple[str, str, str], ...]:
    """The segments as kernels name them."""
    return tuple((segment.layout, segment.a.value, segment.b.value) for segment in descriptor.segments)


def kernel_steps(descriptor: SegmentedMatmulDescriptor) -> tuple[tuple, ...]:
    """The epilogue as kernels name it."""
    return tuple(step.kernel for step in descriptor.epilogue)


def row_words(kernel: Kernel) -> int:
    """Words of a table row with a single kernel's parameters, for its grouped form."""
    return sum(flat_length(parameter) for parameter in kernel.parameters)


def vector_of(operands: Iterable[Operand], *more: int) -> int:
    """Elements, of at most eight, that every line of the operands begins at a multiple of."""
    strides = [stride for operand in operands for stride in operand.strides[:-1]]
    return math.gcd(UNIT, *strides, *more)


def is_wide(descriptor: SegmentedMatmulDescriptor) -> bool:
    """Whether results and the epilogue's operands lie in whole 16-byte units."""
    operands = [descriptor.operands()[0], *(o for o in descriptor.step_operands if o is not None)]
    return descriptor.columns % UNIT == 0 and vector_of(operands) == UNIT


def refuses_low_rank(descriptor: SegmentedMatmulDescriptor) -> str:
    """The refusal of SKUs without low-rank terms, or ""."""
    return "wants A D^T of low-rank terms multiplied before, as the A of a segment" if descriptor.low_rank else ""


def tile_count(descriptor: SegmentedMatmulDescriptor, tile_rows: int, tile_columns: int) -> int:
    """Tiles of all results of the batch; ``tile_columns`` are the result's."""
    batch = 1 if descriptor.batch is None else descriptor.batch
    return batch * -(-descriptor.m // tile_rows) * -(-descriptor.columns // tile_columns)


def matmul_guarantee(
    descriptor: SegmentedMatmulDescriptor, precision: MathPrecision, units: float, derivation: str
) -> PrecisionGuarantee:
    """A sum with an error of ``units``, through the epilogue, whose steps add theirs."""
    return PrecisionGuarantee(
        math_precision=precision,
        accumulator=ElementKind.F32,
        deterministic=True,
        bit_stable_on_same_hardware=True,
        rounding_units=units_after(descriptor.epilogue, units),
        derivation=derivation,
    )


def _batch_stride(operand: Operand) -> int:
    return operand.strides[0] if len(operand.shape) > 2 else 0


class MatmulProgram:
    """A SKU built for a descriptor; subclasses launch."""

    def __init__(self, descriptor: SegmentedMatmulDescriptor, device: Device) -> None:
        self.descriptor, self.device = descriptor, device
        out = descriptor.operands()[0]
        self.empty = out.count == 0
        self.result = (descriptor.m, descriptor.columns, out.strides[-2], _batch_stride(out))
        self.strides = tuple(
            (a.strides[-2], b.strides[-2], _batch_stride(a), _batch_stride(b)) for a, b in descriptor.segment_operands
        )

    def spare(self) -> tuple[int, float]:
        """Multiprocessors, in pairs, that a launch before may keep, and for how many cycles; none where unknown."""
        return 0, 0.0

    def result_arguments(self, args: SegmentedMatmulArgs) -> tuple:
        """Pointer, rows, columns, row stride and batch stride of the result."""
        return (args.out.data, *self.result)

    def segment_arguments(self, args: SegmentedMatmulArgs, order: Sequence[int] | None = None) -> tuple:
        """Every segment's parameters, in ``order``: pointers, k (0 where the scale is), strides, ratio and scale."""
        flat: list[Any] = []
        previous = 0.0
        for i in order if order is not None else range(len(args.segments)):
            (a, b), scale, k = args.segments[i], args.scales[i], self.descriptor.segments[i].k
            k = k if scale else 0
            current = scale if k > 0 else previous or 1.0
            ratio = previous / current if previous else 1.0
            flat += [a.data, b.data, k, *self.strides[i], np.float32(ratio), np.float32(current)]
            previous = current
        return tuple(flat)

    def smallest_first(self, args: SegmentedMatmulArgs) -> list[int]:
        """The segments by the size of their scales, those that are left out last: ratios are then at most 1."""
        left_out = [not scale or not s.k for scale, s in zip(args.scales, self.descriptor.segments, strict=True)]
        return sorted(range(len(args.scales)), key=lambda i: (left_out[i], abs(args.scales[i])))

    def epilogue_arguments(self, args: SegmentedMatmulArgs) -> tuple:
        """Every step's parameters."""
        flat: list[Any] = []
        given = iter(zip(args.epilogue, args.numbers, strict=True))
        for step, operand in zip(self.descriptor.epilogue, self.descriptor.step_operands, strict=True):
            tensor, number = next(given) if operand is not None else (None, 1.0)
            flat += step.parameters(tensor.data if tensor is not None else None, operand, number)
        return tuple(flat)

    def arguments(self, args: SegmentedMatmulArgs) -> tuple:
        """The flat parameters of the one launch: the result's, the segments', the epilogue's."""
        return (*self.result_arguments(args), *self.segment_arguments(args), *self.epilogue_arguments(args))


def element_offset(tensor: TensorRef, elements: int) -> Any:
    """A tensor's data from some element on, as a kernel argument."""
    data = tensor.data
    return data[elements:] if isinstance(data, np.ndarray) else data + elements * tensor.element.itemsize
