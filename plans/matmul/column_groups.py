"""Batches whose results are groups of columns of one matrix, which kernels of tiles may take as one product.

So LoKr's: all groups share A of the base, their parts of W are rows of one matrix, and w2 is the same for all while
the mixed blocks of x lie side by side. As one product its tiles go through panels of rows, as those of any other, and
the maps of its operands are the same for all of them.
"""

from __future__ import annotations

from plans.core.operand import Operand
from plans.matmul.descriptor import Segment, SegmentedMatmulDescriptor

_UNIT = 16
"""Terms of a product by tensor cores: a group's depth is a multiple, so that none reads terms of the next."""


def groups_of(descriptor: SegmentedMatmulDescriptor, tile_columns: int) -> int:
    """How many groups of columns, each of whole tiles, make one matrix; 1 where they do not, or there is no batch."""
    groups, n = descriptor.batch or 1, descriptor.n
    if groups == 1 or descriptor.gated or n % tile_columns or descriptor.operands()[0].strides[0] != n:
        return 1
    segments = all(_one_matrix(descriptor, number) for number in range(len(descriptor.segments)))
    return groups if segments and _vectors_of_columns(descriptor) else 1


def own_blocks(segment: Segment) -> bool:
    """Whether each group has columns of A of its own, and B is the same for all."""
    return segment.b_shared


def extents(segment: Segment, which: int, operand: Operand, groups: int) -> tuple[int, int]:
    """Rows and columns of A (0) or B (1), as it is stored, over all groups."""
    rows, columns = operand.shape[-2:]
    if groups == 1 or own_blocks(segment) != (which == 0):
        return rows, columns
    return (rows * groups, columns) if which and segment.b_transposed else (rows, columns * groups)


def _one_matrix(descriptor: SegmentedMatmulDescriptor, number: int) -> bool:
    """Whether a segment is that of a product over all groups."""
    segment, (a, b) = descriptor.segments[number], descriptor.segment_operands[number]
    if own_blocks(segment):
        return not (segment.a_shared or segment.a_transposed or segment.k % _UNIT) and a.strides[0] == segment.k
    return segment.a_shared and b.strides[0] == descriptor.n * (b.strides[1] if segment.b_transposed else 1)


def _vectors_of_columns(descriptor: SegmentedMatmulDescriptor) -> bool:
    """Whether all that the epilogue reads are numbers of columns, each group's own."""
    steps = zip(descriptor.epilogue, descriptor.step_operands, strict=True)
    return all(o is None or (o.shape == (descriptor.batch, descriptor.n) and not step.by_row) for step, o in steps)
