"""Gradients of many tensors: statistics in one pass, and scaling, clipping and noise in one launch.

For example:

    descriptor = StatisticsDescriptor(ElementKind.F32, counts=(4096, 77))
    plan = StatisticsPlan.select(stream, descriptor)
    plan.run(stream, workspace, StatisticsArgs(out, tensors, table, blocks, ends))
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from kernels import optimizer as kernel
from plans.core import Device, ElementKind, OpCategory, Operand, Plan, TensorMut, TensorRef, Workspace
from plans.core.plan import Arguments
from plans.optimizer import block_count, one_launch

F32, I32, I64 = ElementKind.F32, ElementKind.I32, ElementKind.I64
_VECTOR_BYTES = 16


@dataclass(frozen=True)
class StatisticsDescriptor:
    """out[i] = (sum of squares, largest magnitude, NaN, infinite elements) of tensor i; of all in out's last row."""

    kind: ElementKind
    counts: tuple[int, ...]

    category = OpCategory.OPTIMIZER

    def operands(self) -> tuple[Operand, ...]:
        """``out``, each ``tensor``, ``table`` ([address, count]), ``blocks`` and ``ends`` (blocks up to each end)."""
        return (
            Operand("out", F32, (len(self.counts) + 1, kernel.STATISTICS), writes=True),
            *(Operand(f"tensor {i}", self.kind, (c,), alignment=_VECTOR_BYTES) for i, c in enumerate(self.counts)),
            *_tables(self.counts),
            Operand("ends", I32, (len(self.counts),)),
        )

    @property
    def chain(self) -> int:
        """The longest chain of additions."""
        pieces = block_count(self.counts)
        return kernel.PIECE // kernel.THREADS + 10 + -(-pieces // 32) + 5

    def ends(self) -> np.ndarray:
        """The number of blocks up to each tensor's end; int32."""
        return np.cumsum([-(-count // kernel.PIECE) for count in self.counts]).astype(np.int32)

    def reference(self, arrays: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """The statistics in float64, and their magnitudes."""
        flat = [np.asarray(a, np.float64).reshape(-1) for a in arrays]
        rows = [_statistics(a) for a in (*flat, np.concatenate([np.zeros(0), *flat]))]
        exact = np.array(rows)
        magnitude = np.zeros_like(exact)
        magnitude[:, 0] = exact[:, 0] * (self.chain + 1)
        return exact, magnitude


def _statistics(a: np.ndarray) -> tuple[float, float, int, int]:
    top = np.abs(a).max(initial=0)
    return (a**2).sum(), top, np.isnan(a).sum(), np.isinf(a).sum()


class StatisticsArgs(Arguments):
    """The result, the tensors, the tables."""

    def __init__(
        self, out: TensorMut, members: Sequence[TensorRef], table: TensorRef, blocks: TensorRef, ends: TensorRef
    ) -> None:
        super().__init__()
        self.out, self.members, self.table, self.blocks, self.ends = out, list(members), table, blocks, ends

    def tensors(self) -> list[TensorRef]:
        """The result, the tensors, the tables."""
        return [self.out, *self.members, self.table, self.blocks, self.ends]


@dataclass(frozen=True)
class AdjustDescriptor:
    """Tensor i becomes clip(factors[i] * tensor, -limit, limit) + deviation * normal noise, fp32, in place."""

    counts: tuple[int, ...]
    noisy: bool = False

    category = OpCategory.OPTIMIZER

    def operands(self) -> tuple[Operand, ...]:
        """Each ``tensor``, ``table``, ``blocks`` and ``factors``."""
        return (
            *(
                Operand(f"tensor {i}", F32, (count,), writes=True, alignment=_VECTOR_BYTES)
                for i, count in enumerate(self.counts)
            ),
            *_tables(self.counts),
            Operand("factors", F32, (len(self.counts),)),
        )


class AdjustArgs(Arguments):
    """The tensors, the tables, the factors; the largest magnitude, the noise's deviation, its seed and step."""

    def __init__(
        self, members: Sequence[TensorMut], table: TensorRef, blocks: TensorRef, factors: TensorRef,
        limit: float = math.inf, deviation: float = 0.0, seed: int = 0, step: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.members, self.table, self.blocks, self.factors = list(members), table, blocks, factors
        self.rest = (np.float32(limit), np.float32(deviation), seed, step)

    def tensors(self) -> list[TensorRef]:
        """The tensors, the tables, the factors."""
        return [*self.members, self.table, self.blocks, self.factors]


def _tables(counts: Sequence[int]) -> tuple[Operand, Operand]:
    return Operand("table", I64, (len(counts), 2)), Operand("blocks", I32, (block_count(counts), 2))


class _StatisticsProgram:
    """One launch over the pieces, one over the tensors."""

    def __init__(self, d: StatisticsDescriptor, device: Device) -> None:
        blocks, self.tensors = block_count(d.counts), len(d.counts)
        self.parts = kernel.statistics(d.kind.value).launcher((blocks, 1, 1)) if blocks else None
        self.collect = kernel.collect().launcher((self.tensors + 1, 1, 1)) if self.tensors else None

    def bind(self, args: StatisticsArgs, workspace: Workspace) -> list[tuple[Callable, tuple]]:
        """Both launches; the second alone where there is no element, none without a tensor."""
        if self.collect is None:
            return []
        parts = workspace.buffer.pointer(np.float32)
        last = (self.collect, (parts, args.ends.data, args.out.data, self.tensors))
        return [last] if self.parts is None else [(self.parts, (args.table.data, args.blocks.data, parts)), last]


class _AdjustProgram:
    """One launch, a block a piece of a tensor."""

    def __init__(self, d: AdjustDescriptor, device: Device) -> None:
        blocks = block_count(d.counts)
        self.launch = kernel.adjust(d.noisy).launcher((blocks, 1, 1)) if blocks else None

    def bind(self, args: AdjustArgs, workspace: Workspace) -> list[tuple[Callable, tuple]]:
        """The launch; none where there is no element."""
        data = [tensor.data for tensor in (args.table, args.blocks, args.factors)]
        return [] if self.launch is None else [(self.launch, (*data, *args.rest))]


class StatisticsPlan(Plan):
    """Statistics of tensors; see :class:`StatisticsDescriptor`."""

    name = "statistics"
    skus = (
        one_launch(
            _StatisticsProgram, 1.0, "one rounding an addition along the longest chain, and one a square",
            lambda d: 4 * kernel.STATISTICS * max(1, block_count(d.counts)),
        ),
    )  # fmt: skip


class AdjustPlan(Plan):
    """Gradients scaled, clipped and with noise; see :class:`AdjustDescriptor`."""

    name = "adjust"
    skus = (
        one_launch(_AdjustProgram, 2.0, "one product, one sum; noise within plans.random's bound times the deviation"),
    )
