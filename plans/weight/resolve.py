"""From a descriptor's sources to what kernels evaluate: small factors are contracted into workspace first.

Tucker cores, factored halves of a Kronecker product and transposed factors become plain low-rank or full fp32
factors, so that the weight kernels know five simple sources.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kernels.division import reciprocal_of
from kernels.weight.contraction import THREADS, contract
from plans.core.precision import ElementKind
from plans.core.tensor import TensorRef
from plans.weight.descriptor import WeightDescriptor
from plans.weight.sources import ChannelScale, Dense, Hadamard, Kronecker, LowRank, Source

ALIGN = 256


@dataclass(frozen=True)
class Factor:
    """A factor as a kernel reads it: an operand by position in its source, or a place in the workspace."""

    kind: ElementKind
    operand: int = -1
    workspace: int = -1


@dataclass(frozen=True)
class Contraction:
    """One preparatory launch: out[i, q, tap] = sum_j core[i, j, tap] right[j, q] in fp32."""

    core: int
    right: int
    target: int
    rows: int
    inner: int
    taps: int
    columns: int
    stride_i: int
    stride_j: int
    kinds: tuple[str, str]


@dataclass(frozen=True)
class Resolved:
    """One source as kernels see it: its kernel name and kinds, factors, and integer parameters between them.

    ``numbers`` are the integers that follow the pointers in the kernel's parameter tuple.
    """

    kernel: tuple
    factors: tuple[tuple[Factor, ...], ...]
    numbers: tuple[tuple[int, ...], ...]
    contractions: tuple[Contraction, ...]
    workspace: int


@functools.cache
def resolve(descriptor: WeightDescriptor, fused_second_half: bool = False) -> list[Resolved]:
    """Resolve every source; workspace offsets do not overlap.

    With ``fused_second_half`` a factored w2 of a Kronecker product stays two factors, for the kernel to multiply.
    """
    found, offset = [], 0
    for source in descriptor.sources:
        builder = _Builder(offset, descriptor, fused_second_half)
        resolved = builder.resolve(source)
        offset = resolved.workspace
        found.append(resolved)
    return found


class _Builder:
    """Resolves one source; keeps the workspace offset and the contractions on the way."""

    def __init__(self, offset: int, descriptor: WeightDescriptor, fused_second_half: bool) -> None:
        self.offset, self.contractions, self.fused_second_half = offset, [], fused_second_half
        self.shape = (descriptor.out_features, descriptor.in_features, descriptor.taps)

    def resolve(self, source: Source) -> Resolved:
        out, channels, taps = self.shape
        if isinstance(source, LowRank):
            factors, numbers = self._product(source, 0, out, channels, taps)
            kernel = ("low_rank", *(f.kind.value for f in factors))
            return self._done(kernel, (factors,), (numbers,))
        if isinstance(source, Hadamard):
            first, first_numbers = self._product(source.first, 0, out, channels, taps)
            at = 2 if source.first.core is None else 3
            second, second_numbers = self._product(source.second, at, out, channels, taps)
            kernel = ("hadamard", *(f.kind.value for f in (*first, *second)))
            return self._done(kernel, (first, second), (first_numbers, second_numbers))
        if isinstance(source, Kronecker):
            w1 = self._half(source.w1, 0, source.a, source.b, 1)
            at = 1 if isinstance(source.w1, ElementKind) else 2 if source.w1.core is None else 3
            if self.fused_second_half and isinstance(source.w2, LowRank):
                return self._fused(source, w1, at, taps)
            w2 = self._half(source.w2, at, source.c, source.d, taps)
            numbers = _split(source, taps)
            return self._done(("kronecker", w1.kind.value, w2.kind.value), ((w1, w2),), (numbers,))
        if isinstance(source, Dense):
            return self._done(("dense", source.element.value), ((Factor(source.element, 0),),), ((channels * taps,),))
        assert isinstance(source, ChannelScale)
        return self._done(
            ("channel", source.element.value, source.axis),
            ((Factor(source.element, 0),),),
            ((taps, reciprocal_of(max(taps, 1))),),
        )

    def _fused(self, source: Kronecker, w1: Factor, at: int, taps: int) -> Resolved:
        """w2's product stays in the kernel: parameters w1, the split, then the product's."""
        factors, numbers = self._product(source.w2, at, source.c, source.d, taps)
        kernel = ("kronecker_product", w1.kind.value, *(f.kind.value for f in factors))
        return self._done(kernel, ((w1,), factors), (_split(source, taps), numbers))

    def _done(self, kernel: tuple, factors: tuple, numbers: tuple) -> Resolved:
        return Resolved(kernel, factors, numbers, tuple(self.contractions), self.offset)

    def _product(
        self, source: LowRank, at: int, rows: int, channels: int, taps: int
    ) -> tuple[tuple[Factor, Factor], tuple[int, ...]]:
        """(left, right) and rank, left's row and rank strides, right's rank stride."""
        left, right = Factor(source.left, at), Factor(source.right, at + 1)
        if source.core is not None:
            right = self._contract(at + 2, at + 1, source.rank, source.core_rank, taps, channels,
                                   source.core_rank * taps, taps, (source.core, source.right))  # fmt: skip
        strides = (1, rows) if source.left_transposed else (source.rank, 1)
        return (left, right), (source.rank, *strides, channels * taps)

    def _half(self, half: ElementKind | LowRank, at: int, rows: int, channels: int, taps: int) -> Factor:
        """A half of a Kronecker product, full: as stored, or multiplied out."""
        if isinstance(half, ElementKind):
            return Factor(half, at)
        (left, right), (rank, row_stride, rank_stride, _) = self._product(half, at, rows, channels, taps)
        return self._contract(left.operand, right, rows, rank, 1, channels * taps, row_stride, rank_stride,
                              (left.kind, right.kind))  # fmt: skip

    def _contract(
        self, core: int, right: int | Factor, rows: int, inner: int, taps: int, columns: int,
        stride_i: int, stride_j: int, kinds: tuple[ElementKind, ElementKind],
    ) -> Factor:  # fmt: skip
        target = self.offset
        self.offset += -(-rows * columns * taps * 4 // ALIGN) * ALIGN
        position = right if isinstance(right, int) else right.operand if right.operand >= 0 else ~right.workspace
        self.contractions.append(
            Contraction(
                core,
                position,
                target,
                rows,
                inner,
                taps,
                columns,
                stride_i,
                stride_j,
                (kinds[0].value, kinds[1].value),
            )
        )
        return Factor(ElementKind.F32, workspace=target)


def _split(source: Kronecker, taps: int) -> tuple[int, ...]:
    """b, c and e of a Kronecker product, and the reciprocals of c and e; an empty w2 divides nothing."""
    c, e = source.c, source.d * taps
    return source.b, c, e, reciprocal_of(max(c, 1)), reciprocal_of(max(e, 1))


def prepare(item: Contraction) -> tuple[Callable, int]:
    """The launcher of a contraction and its number of elements."""
    elements = item.rows * item.columns * item.taps
    return contract(*item.kinds).launcher((max(1, -(-elements // THREADS)), 1, 1)), elements


def contraction_arguments(item: Contraction, elements: int, operands: Sequence[TensorRef], workspace: Any) -> tuple:
    """Flat kernel arguments; a negative ``right`` is a place in the workspace."""
    inside = item.right < 0
    right = workspace.pointer(np.float32, ~item.right) if inside else operands[item.right].data
    return (operands[item.core].data, right, workspace.pointer(np.float32, item.target), elements, item.inner,
            item.taps, item.columns, item.stride_i, item.stride_j)  # fmt: skip


def factor_data(factor: Factor, operands: Sequence[TensorRef], workspace: Any) -> Any:
    """What a kernel takes for a factor."""
    if factor.operand >= 0:
        return operands[factor.operand].data
    return workspace.pointer(np.float32, factor.workspace)
