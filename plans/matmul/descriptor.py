"""What a product computes: Y = epilogue(sum over segments of scale_s A_s B_s^T), one rounding.

    SegmentedMatmulDescriptor(4096, 3072, (Segment(3072), Segment(16)), epilogue=(Bias(),))     # base + LoCon
    MatmulDescriptor(4096, 3072, 3072, epilogue=(Bias(), Activation("gelu")))                    # one segment

Y is [m, n] (half the columns after a gate), or [batch, m, n]. Layouts are BLAS's letters: "NT" takes A [m, k] and
B [n, k], an activation and a weight as checkpoints store it; "NN" B as [k, n], "TN" A as [k, m], "TT" A [k, m] and
B [n, k]. Strides are part of the problem: rows may be further apart than they are long, the last axis is contiguous.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from plans.core.errors import InvalidProblem
from plans.core.operand import Operand
from plans.core.plan import Arguments
from plans.core.precision import ElementKind
from plans.core.sku import OpCategory
from plans.core.tensor import TensorMut, TensorRef
from plans.matmul.epilogue import (
    EPILOGUE_KINDS,
    Epilogue,
    Extents,
    Values,
    apply_steps,
    check_epilogue,
    matrix_strides,
    step_operands,
)

BF16 = ElementKind.BF16
LAYOUTS = ("NT", "NN", "TN", "TT")


@dataclass(frozen=True)
class Segment:
    """One product A B^T of a sum, over ``k``.

    Attributes:
        k: The extent that is summed over.
        layout: How A and B are stored, "NT" and so on; see the module.
        a: A's kind.
        b: B's kind.
        a_stride: Elements from a stored row of A to the next; 0 where it is contiguous.
        b_stride: The same of B.
        a_batch_stride, b_batch_stride: From one A or B of the batch to the next; 0 where they lie one after the other.
        a_shared, b_shared: All of the batch take the same A, or B, which then has two axes.
        diagonal: B consists of so many blocks along its diagonal, and is zero elsewhere, which kernels may skip.
        late: A, or A and B, come of the launch right before, all else of older ones: kernels may begin before it ends.
    """

    k: int
    layout: str = "NT"
    a: ElementKind = BF16
    b: ElementKind = BF16
    a_stride: int = 0
    b_stride: int = 0
    a_batch_stride: int = 0
    b_batch_stride: int = 0
    a_shared: bool = False
    b_shared: bool = False
    diagonal: int = 1
    late: bool = False

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise InvalidProblem(
                f"matmul: layout {self.layout!r}, wanted one of {', '.join(LAYOUTS)}; name how A and B lie"
            )
        strides = (self.a_stride, self.b_stride, self.a_batch_stride, self.b_batch_stride)
        if min(self.k, *strides) < 0:
            raise InvalidProblem(
                f"matmul: k {self.k} and strides {strides}, wanted none negative; give A's and B's own"
            )
        if self.diagonal < 1 or self.k % self.diagonal:
            raise InvalidProblem(f"matmul: k {self.k} in {self.diagonal} blocks, wanted equal ones; give their number")

    @property
    def a_transposed(self) -> bool:
        """Whether A is stored [k, m]."""
        return self.layout[0] == "T"

    @property
    def b_transposed(self) -> bool:
        """Whether B is stored [n, k]."""
        return self.layout[1] == "T"

    def operands(self, number: str, m: int, n: int, batch: int | None) -> tuple[Operand, Operand]:
        """A and B as they are stored."""
        a = (self.k, m) if self.a_transposed else (m, self.k)
        b = (n, self.k) if self.b_transposed else (self.k, n)
        return (
            _matrix(f"a{number}", self.a, a, None if self.a_shared else batch, self.a_stride, self.a_batch_stride),
            _matrix(f"b{number}", self.b, b, None if self.b_shared else batch, self.b_stride, self.b_batch_stride),
        )


@dataclass(frozen=True)
class LowRankTerm:
    """A low-rank term of a sum, scale (A D^T) U^T, with A of another segment; A D^T is as good as in fp32.

    Attributes:
        rank: Rows of D [rank, k] and columns of U [n, rank], which all of a batch share.
        of: The number of the segment whose A, [m, k], it takes.
        element: D's and U's kind.
    """

    rank: int
    of: int = 0
    element: ElementKind = BF16

    def operands(self, number: str, k: int, n: int) -> tuple[Operand, Operand]:
        """D and U, as LoRA's down and up."""
        return (
            Operand(f"down{number}", self.element, (self.rank, k)),
            Operand(f"up{number}", self.element, (n, self.rank)),
        )


def _matrix(
    name: str, kind: ElementKind, shape: tuple[int, int], batch: int | None, stride: int, batch_stride: int
) -> Operand:
    full = shape if batch is None else (batch, *shape)
    return Operand(name, kind, full, layout=matrix_strides(name, full, stride, batch_stride))


@dataclass(frozen=True)
class SegmentedMatmulDescriptor:
    """Y = epilogue(sum_s scale_s A_s B_s^T), fp32 sums; see the module.

    Attributes:
        m: Rows of Y.
        n: Columns of the product; Y has half of them after a gate.
        segments: The products that are added up, one or more.
        out: Y's kind.
        batch: How many such products, None for one without a batch axis.
        epilogue: What becomes of the sum; see ``plans.matmul.epilogue``.
        out_stride: Elements from a row of Y to the next; 0 where it is contiguous.
        out_batch_stride: Elements from one Y of the batch to the next; 0 where they lie one after the other.
        low_rank: Low-rank terms of the sum.
        early: The next launch takes Y as a ``late`` A, or nothing of this one, and may begin before this one ends,
            where a kernel allows that.
        beside: The next launch leaves so many multiprocessors to this one (`blocks_beside`); 0 for all of them.
    """

    m: int
    n: int
    segments: tuple[Segment, ...]
    out: ElementKind = BF16
    batch: int | None = None
    epilogue: Epilogue = ()
    out_stride: int = 0
    out_batch_stride: int = 0
    low_rank: tuple[LowRankTerm, ...] = ()
    early: bool = False
    beside: int = 0

    category = OpCategory.MATMUL

    def __post_init__(self) -> None:
        if min(self.m, self.n, self.batch or 0, self.out_stride, self.out_batch_stride, self.beside) < 0:
            strides = (self.out_stride, self.out_batch_stride)
            raise InvalidProblem(
                f"matmul: m {self.m}, n {self.n}, batch {self.batch}, strides {strides} of out, wanted none negative; "
                "give the result's own"
            )
        if not self.segments:
            raise InvalidProblem("matmul: no segments given, wanted at least one; give each product A @ B as one")
        if any(self.n % segment.diagonal for segment in self.segments):
            raise InvalidProblem(f"matmul: n {self.n}, wanted a multiple of every segment's diagonal blocks; pad B")
        for term in self.low_rank:
            if term.rank < 1 or not 0 <= term.of < len(self.segments) or self.segments[term.of].a_transposed:
                raise InvalidProblem(
                    f"matmul: {term}, wanted a positive rank and a segment with A stored [m, k]; "
                    "give such a segment, or leave it out"
                )
        check_epilogue(self.epilogue, self.n)
        wanted = ", ".join(kind.value for kind in EPILOGUE_KINDS)
        for operand in self.operands():
            if operand.element not in EPILOGUE_KINDS:
                raise InvalidProblem(
                    f"matmul: {operand.name} of {operand.element.value}, wanted one of {wanted}; cast it first"
                )
        out = self.operands()[0]
        if out.count and self.batch is not None and not _apart(out.shape, out.strides):
            raise InvalidProblem(
                f"matmul: out with strides {out.strides} writes some elements twice, wanted each once; "
                "give 0 where it is contiguous"
            )

    @property
    def gated(self) -> bool:
        """Whether the epilogue halves the columns."""
        return any(step.gates for step in self.epilogue)

    @property
    def columns(self) -> int:
        """Columns of Y."""
        return self.n // 2 if self.gated else self.n

    @property
    def depth(self) -> int:
        """Products in an element's sum, those of low-rank terms' inner products included."""
        low_rank = sum(self.segments[term.of].k + term.rank for term in self.low_rank)
        return sum(segment.k for segment in self.segments) + low_rank

    @property
    def layout_name(self) -> str:
        """The segments' layouts, for the SKU."""
        return "+".join(segment.layout for segment in self.segments).lower()

    @property
    def epilogue_name(self) -> str:
        """The steps' names, for the SKU."""
        return "+".join("_".join(map(str, step.kernel)) for step in self.epilogue)

    @functools.cached_property
    def step_operands(self) -> tuple[Operand | None, ...]:
        """Each step's operand."""
        return tuple(step_operands(self.epilogue, Extents(self.m, self.n, self.batch)))

    @functools.cached_property
    def segment_operands(self) -> tuple[tuple[Operand, Operand], ...]:
        """A and B of each segment."""
        several = len(self.segments) > 1
        return tuple(
            segment.operands(str(i) if several else "", self.m, self.n, self.batch)
            for i, segment in enumerate(self.segments)
        )

    @functools.cached_property
    def low_rank_operands(self) -> tuple[tuple[Operand, Operand], ...]:
        """D and U of each low-rank term."""
        several = len(self.low_rank) > 1
        return tuple(
            term.operands(str(i) if several else "", self.segments[term.of].k, self.n)
            for i, term in enumerate(self.low_rank)
        )

    def operands(self) -> tuple[Operand, ...]:
        """``out``, ``a`` and ``b`` of each segment, ``down`` and ``up`` of each low-rank term, the epilogue's.

        Numbered where there are several.
        """
        return self._operands

    @functools.cached_property
    def _operands(self) -> tuple[Operand, ...]:
        shape = (self.m, self.columns) if self.batch is None else (self.batch, self.m, self.columns)
        layout = matrix_strides("out", shape, self.out_stride, self.out_batch_stride)
        steps = [operand for operand in self.step_operands if operand is not None]
        same = [o.name for o in steps if o.element is self.out and o.shape == shape and o.strides == layout]
        out = Operand("out", self.out, shape, writes=True, layout=layout, may_alias=same[0] if same else "")
        pairs = (*self.segment_operands, *self.low_rank_operands)
        return (out, *(operand for pair in pairs for operand in pair), *steps)

    def reference(
        self,
        segments: Sequence[tuple[np.ndarray, np.ndarray]],
        scales: Sequence[float] | None = None,
        epilogue: Sequence[np.ndarray | None] = (),
        numbers: Sequence[float] | None = None,
        low_rank: Sequence[tuple[np.ndarray, np.ndarray]] = (),
        low_rank_scales: Sequence[float] = (),
    ) -> tuple[np.ndarray, np.ndarray]:
        """The exact Y in float64, and the magnitude that the guarantee is relative to.

        ``epilogue`` has an array or None for each step, ``numbers`` each step's number. The magnitude is
        sum_s |scale_s| |A_s| |B_s|^T (of low-rank terms |A| |D|^T |U|^T) on its way through the steps.
        """
        values = Values(np.zeros(()), np.zeros(()))
        for segment, (a, b), scale in zip(self.segments, segments, scales or [1.0] * len(segments), strict=True):
            a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
            a = np.swapaxes(a, -1, -2) if segment.a_transposed else a
            b = np.swapaxes(b, -1, -2) if segment.b_transposed else b
            values = Values(values.exact + scale * (a @ b), values.magnitude + abs(scale) * (np.abs(a) @ np.abs(b)))
        for term, (down, up), scale in zip(self.low_rank, low_rank, low_rank_scales, strict=True):
            a, down, up = (np.asarray(array, np.float64) for array in (segments[term.of][0], down, up))
            size = abs(scale) * (np.abs(a) @ np.abs(down.T) @ np.abs(up.T))
            values = Values(values.exact + scale * (a @ down.T @ up.T), values.magnitude + size)
        shape = (self.m, self.n) if self.batch is None else (self.batch, self.m, self.n)
        values = Values(np.broadcast_to(values.exact, shape), np.broadcast_to(values.magnitude, shape))
        operands = list(epilogue) or [None] * len(self.epilogue)
        return apply_steps(self.epilogue, values, operands, numbers or [1.0] * len(self.epilogue))


def _apart(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether no two elements share a place: every axis steps over all that lies in the finer ones."""
    reach = 0
    for stride, extent in sorted((s, e) for s, e in zip(strides, shape, strict=True) if e > 1):
        if stride <= reach:
            return False
        reach += (extent - 1) * stride
    return True


@dataclass(frozen=True)
class MatmulDescriptor:
    """Y = epilogue(A B^T): one segment of :class:`SegmentedMatmulDescriptor`; its fields and Segment's."""

    m: int
    n: int
    k: int
    layout: str = "NT"
    a: ElementKind = BF16
    b: ElementKind = BF16
    out: ElementKind = BF16
    batch: int | None = None
    epilogue: Epilogue = ()
    a_stride: int = 0
    b_stride: int = 0
    out_stride: int = 0
    a_batch_stride: int = 0
    b_batch_stride: int = 0
    out_batch_stride: int = 0
    a_shared: bool = False
    b_shared: bool = False

    def __post_init__(self) -> None:
        _ = self.segmented

    @functools.cached_property
    def segmented(self) -> SegmentedMatmulDescriptor:
        """The same problem as a sum of one product."""
        segment = Segment(
            self.k, self.layout, self.a, self.b, self.a_stride, self.b_stride,
            self.a_batch_stride, self.b_batch_stride, self.a_shared, self.b_shared,
        )  # fmt: skip
        return SegmentedMatmulDescriptor(
            self.m, self.n, (segment,), self.out, self.batch, self.epilogue, self.out_stride, self.out_batch_stride
        )

    def operands(self) -> tuple[Operand, ...]:
        """``out``, ``a``, ``b``, then the epilogue's."""
        return self.segmented.operands()


class SegmentedMatmulArgs(Arguments):
    """The tensors and numbers of one run.

    ``segments`` are (A, B) pairs and ``scales`` one finite number each (all 1 where left out); ``low_rank`` are (D, U)
    pairs and ``low_rank_scales`` likewise. ``epilogue`` has the tensor of each step that takes one, in the steps'
    order; for a residual (C, beta), or C alone where beta is 1.
    """

    def __init__(
        self,
        out: TensorMut,
        segments: Sequence[tuple[TensorRef, TensorRef]],
        scales: Sequence[float] | None = None,
        epilogue: Sequence[TensorRef | tuple[TensorRef, float]] = (),
        low_rank: Sequence[tuple[TensorRef, TensorRef]] = (),
        low_rank_scales: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self.out = out
        self.segments, self.scales = _pairs(segments, scales)
        self.low_rank, self.low_rank_scales = _pairs(low_rank, low_rank_scales)
        given = [entry if isinstance(entry, tuple) else (entry, 1.0) for entry in epilogue]
        self.epilogue = tuple([tensor for tensor, _ in given])
        self.numbers = tuple([float(number) for _, number in given])

    def tensors(self) -> list[TensorRef]:
        """``out``, the segments' pairs, the low-rank terms', the epilogue's."""
        found = [self.out]
        for pair in self.segments:
            found += pair
        for pair in self.low_rank:
            found += pair
        found += self.epilogue
        return found


def _pairs(
    pairs: Sequence[tuple[TensorRef, TensorRef]], scales: Sequence[float] | None
) -> tuple[tuple[tuple[TensorRef, TensorRef], ...], tuple[float, ...]]:
    """Pairs and their scales, 1 where left out."""
    found = tuple(map(tuple, pairs))
    return found, (1.0,) * len(found) if scales is None else tuple(map(float, scales))


class MatmulArgs(SegmentedMatmulArgs):
    """The tensors of one product, and the scale that it takes."""

    def __init__(
        self,
        out: TensorMut,
        a: TensorRef,
        b: TensorRef,
        epilogue: Sequence[TensorRef | tuple[TensorRef, float]] = (),
        scale: float = 1.0,
    ) -> None:
        super().__init__(out, [(a, b)], [scale], epilogue)
