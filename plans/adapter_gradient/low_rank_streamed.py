"""The streamed SKU of LoCon's gradients (sm_90a): TMA brings g and x."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from kernels.adapter_gradient.low_rank_streamed import low_rank_gradient_streamed
from kernels.matmul.streamed_tile import GROUP_ROWS, StreamTile
from kernels.wgmma import DEPTH
from plans.core.device import Device
from plans.core.operand import Operand
from plans.core.plan import Launches, Sku
from plans.core.precision import PrecisionGuarantee
from plans.core.sku import ArchSku, BackendKind
from plans.core.tensor import TensorRef
from plans.core.tensor_map import Box, map_address
from plans.core.workspace import Workspace

if TYPE_CHECKING:
    from plans.adapter_gradient.low_rank import LowRankGradientArgs, LowRankGradientDescriptor

MOST_RANKS = 64


_SHARING, _SHARING_BESIDE = 2, 1
"""Blocks that would fill a multiprocessor. One that takes half of it begins while another such ends; beside a product
two would queue on each of the multiprocessors that are free first.
"""

# An H200's cycles of a line of a box, and bytes of a cycle that all multiprocessors read; how much longer that takes
# where some of them have two blocks; clusters of four that find a place at once.
_LINE_CYCLES, _BYTES_A_CYCLE, _UNEVEN, _CLUSTERS_OF_FOUR = 1.75, 2280.0, 1.25, 28


class _Layout(NamedTuple):
    """Groups of 64 columns that a block has, and how many blocks share the rows of those."""

    groups: int
    parts: int

    def tiles(self, columns: int) -> int:
        """Of a side."""
        return -(-columns // (GROUP_ROWS * self.groups))


LAYOUTS = tuple(_Layout(*pair) for pair in ((2, 2), (1, 2), (2, 4), (2, 1), (3, 1)))


def _layout(rows: int, columns: tuple[int, ...], multiprocessors: int) -> _Layout:
    """The layout whose blocks, one a multiprocessor if possible, bring boxes as fast as memory does; of those with the
    most to spare.
    """

    def cycles(layout: _Layout) -> tuple[float, float]:
        tiles = sum(map(layout.tiles, columns))
        at_once = _CLUSTERS_OF_FOUR if layout.parts == 4 else multiprocessors // layout.parts
        rounds = -(-tiles // max(1, at_once))
        stages = -(-rows // (DEPTH * layout.parts))
        boxes = rounds * stages * (layout.groups + 1) * DEPTH * _LINE_CYCLES
        memory = 2 * rows * sum(columns) / _BYTES_A_CYCLE * (_UNEVEN if rounds > 1 else 1.0)
        return max(boxes, memory), boxes

    return min(LAYOUTS, key=cycles)


def _refuses(descriptor: LowRankGradientDescriptor) -> str:
    """Beyond what tensor cores refuse."""
    if not descriptor.rows:
        return "wants rows, found none: TMA has no map of nothing"
    if descriptor.parts > 1 or descriptor.rank > MOST_RANKS:
        return f"wants t in one part of at most {MOST_RANKS} ranks, found {descriptor.parts} of {descriptor.rank}"
    return ""


class StreamedProgram:
    """One launch; clusters of blocks share the rows of some columns."""

    reads_addresses = True

    def __init__(self, descriptor: LowRankGradientDescriptor, device: Device) -> None:
        self.descriptor, self.device = descriptor, device
        operands = descriptor.operands()
        self.empty = not descriptor.rank or not operands
        if self.empty:
            return
        self.wides, self.narrows = operands[1::3], operands[2::3]
        turned = [side[4] for side in descriptor._sides()]
        columns = 8 << (-(-descriptor.rank // 8) - 1).bit_length()
        extents = tuple(wide.shape[1] for wide in self.wides)
        layout = _layout(descriptor.rows, extents, device.multiprocessors)
        parts = min(layout.parts, columns // 4)  # of a thread's pairs of sums each block finishes some
        sharing = _SHARING_BESIDE if descriptor.beside else _SHARING
        self.tile = StreamTile(layout.groups, columns, parts, parts, True, True, sharing, descriptor.beside)
        kind, out = descriptor.element.value, descriptor.out.value
        made = low_rank_gradient_streamed(kind, out, self.tile, (turned[0], turned[-1]))
        tiles = [layout.tiles(extent) for extent in extents]
        self.work = (layout.groups * GROUP_ROWS, tiles[0], sum(tiles), -(-descriptor.rows // DEPTH))
        self.launch = made.launcher((parts * sum(tiles), 1, 1), overlaps=True)

    def bind(self, args: LowRankGradientArgs, workspace: Workspace) -> Launches:
        """The launch; none where there is nothing to write."""
        if self.empty:
            return []
        outs, wides, narrows = zip(*args.sides, strict=True)
        results = [(out.data, wide.shape[1]) for out, wide in zip(outs, self.wides, strict=True)]
        maps = [self._maps(wides, self.wides, (DEPTH, GROUP_ROWS)), self._maps(narrows, self.narrows, self.tile.b_box)]
        flat = [*results[0], *results[-1], *(side for pair in maps for side in (pair[0], pair[-1]))]
        return [(self.launch, (*flat, *self.work, self.descriptor.rank, np.float32(args.scale)))]

    def _maps(self, tensors: tuple[TensorRef, ...], operands: tuple[Operand, ...], box: tuple[int, int]) -> list[int]:
        found = []
        for tensor, operand in zip(tensors, operands, strict=True):
            size, shape = operand.element.itemsize, (operand.shape[0], operand.shape[-1])
            matrix = Box.of_matrix(tensor.address, operand.element, shape, operand.strides[0], box, box[1] * size)
            found.append(map_address(self.device, matrix))
        return found


def streamed_sku(
    refuses: Callable[[LowRankGradientDescriptor], str],
    guarantee: Callable[[LowRankGradientDescriptor], PrecisionGuarantee],
    suits: Callable[[LowRankGradientDescriptor], bool],
) -> Sku:
    """The SKU, of what tensor cores refuse and promise, and of when it is the fast one."""
    return Sku(
        name="streamed",
        backend=BackendKind.STREAMED,
        arch=ArchSku.SM90A,
        refuses=lambda descriptor: refuses(descriptor) or _refuses(descriptor),
        guarantee=guarantee,
        build=StreamedProgram,
        alignment=16,
        suits=suits,
    )
