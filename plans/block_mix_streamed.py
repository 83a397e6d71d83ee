"""The streamed SKU of block mixes (sm_90a): on the multiprocessors that the next launch leaves idle last, or on all."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from kernels.block_mix_streamed import MOST_LINES, MOST_TILES, OUT_LINES, MixTile, mix_blocks_streamed
from kernels.division import reciprocal_of
from kernels.target import SIMULATOR
from kernels.wgmma import DEPTH
from plans.core.device import Device
from plans.core.plan import Launches, Sku
from plans.core.precision import PrecisionGuarantee
from plans.core.sku import ArchSku, BackendKind
from plans.core.tensor_map import Box, map_address
from plans.core.workspace import Workspace

if TYPE_CHECKING:
    from plans.block_mix import BlockMixArgs, BlockMixDescriptor

Shares = Callable[["BlockMixDescriptor", int, Device, float], tuple[int, int]]

_UNIT = 8
_PAIR = 2
BYTES_A_CYCLE = 32.0
"""That a multiprocessor reads and writes so beside others that multiply, in cycles as a product's count has them."""

_LEAST_BLOCKS = 32
"""Blocks of x and of out that make an item worth a warpgroup's turn."""


def _refuses(descriptor: BlockMixDescriptor) -> str:
    """Beyond what tensor cores refuse."""
    d = descriptor
    if not min(d.rows, d.out_blocks, d.width):
        return "wants a result: TMA has no map of nothing"
    most = MOST_LINES if d.transposed else DEPTH
    if d.in_blocks > most or d.out_blocks > MOST_TILES * DEPTH:
        return f"wants at most {most} blocks of x and {MOST_TILES * DEPTH} of out, found {d.in_blocks}, {d.out_blocks}"
    columns = d.operands()[2].shape[1]
    return f"wants rows of w of a multiple of {_UNIT} elements, found {columns}" if columns % _UNIT else ""


def spare_holds_all(descriptor: BlockMixDescriptor) -> bool:
    """Whether those that are spare can do all of it in their time."""
    spare, cycles = descriptor.spare
    out, x, _ = descriptor.operands()
    return spare >= _PAIR and spare * cycles * BYTES_A_CYCLE >= out.nbytes + x.nbytes


def _suits(descriptor: BlockMixDescriptor) -> bool:
    """Whether the launch after it begins as this one allows, and an item is worth a warpgroup's turn."""
    least = min(descriptor.in_blocks, descriptor.out_blocks)
    return not SIMULATOR and descriptor.early and least >= _LEAST_BLOCKS


class StreamedProgram:
    """One launch, on what is spare where that holds all of it, else on the whole chip in shares."""

    reads_addresses = True

    def __init__(self, descriptor: BlockMixDescriptor, device: Device, shares: Shares) -> None:
        d = self.descriptor = descriptor
        self.device = device
        self.tile = MixTile(-(-d.in_blocks // 16) * 16, -(-d.out_blocks // DEPTH), d.transposed)
        spans = -(-d.width // DEPTH)
        items = d.rows * spans
        alone = spare_holds_all(d)
        self.quick = (0, 0) if alone else shares(d, items, device, BYTES_A_CYCLE)
        some = d.spare[0] if alone else device.multiprocessors
        self.blocks = some if self.quick[1] else min(some, items)
        made = mix_blocks_streamed(d.element.value, self.tile)
        self.launch = made.launcher((-(-self.blocks // _PAIR) * _PAIR, 1, 1), overlaps=True)
        self.numbers = (items, spans, reciprocal_of(spans), d.out_blocks, *self.quick)

    def bind(self, args: BlockMixArgs, workspace: Workspace) -> Launches:
        """The launch."""
        d, (out, x, w) = self.descriptor, self.descriptor.operands()
        x_box, w_box = (1, self.tile.lines, DEPTH), (self.tile.lines if d.transposed else DEPTH, DEPTH)
        out_box = (1, OUT_LINES, DEPTH)
        boxes = (
            Box.of_blocks(args.x.address, d.element, (d.rows, d.in_blocks, d.width), x.strides[0], x_box),
            Box.of_matrix(args.w.address, d.element, w.shape, w.strides[0], w_box),
            Box.of_blocks(args.out.address, d.element, (d.rows, d.out_blocks, d.width), out.strides[0], out_box),
        )
        maps = [map_address(self.device, box) for box in boxes]
        return [(self.launch, (*maps, np.float32(args.scale), *self.numbers))]


def streamed_sku(
    refuses: Callable[[BlockMixDescriptor], str],
    guarantee: Callable[[BlockMixDescriptor], PrecisionGuarantee],
    shares: Shares,
) -> Sku:
    """The SKU, of what tensor cores refuse and promise, and how multiprocessors share."""
    return Sku(
        name="streamed",
        backend=BackendKind.STREAMED,
        arch=ArchSku.SM90A,
        refuses=lambda descriptor: refuses(descriptor) or _refuses(descriptor),
        guarantee=guarantee,
        build=functools.partial(StreamedProgram, shares=shares),
        alignment=16,
        suits=_suits,
    )
