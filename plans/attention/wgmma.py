"""Attention's SKUs by warpgroup products: heads of up to 64 elements, by TMA."""

from __future__ import annotations

from typing import Any

import numpy as np

from kernels.attention import forward_wgmma, key_gradients_wgmma, query_gradient_wgmma, ring
from kernels.target import Kernel, Launcher
from plans.attention.descriptor import AttentionArgs, AttentionBackwardDescriptor, AttentionDescriptor
from plans.attention.problem import (
    blocks_of,
    factor_of,
    matrix_arguments,
    mma_refuses,
    sizes_of,
)
from plans.core.device import Device
from plans.core.operand import Operand
from plans.core.plan import Launches
from plans.core.sku import begins_early
from plans.core.tensor import TensorRef
from plans.core.tensor_map import Box, map_address
from plans.core.workspace import Workspace

ROWS, WIDTH = ring.ROWS, ring.WIDTH
COLUMNS = forward_wgmma.RING.columns
"""Keys of a tile."""
_ALIGNED = 8
_LEAST_WIDTH = 48
"""From here on lines of 64 elements, some of them zeros, take less time than what `mma.sync` pads to 16."""


def repeated(operands: tuple[Operand, ...]) -> str:
    """Why TMA does not take tensors whose outer axes repeat; '' where none does."""
    for operand in operands:
        if any(not stride and extent > 1 for stride, extent in zip(operand.strides, operand.shape, strict=True)):
            return f"wants no axis that repeats, found {operand.name} with strides {operand.strides}"
    return ""


def refuses(descriptor: AttentionDescriptor) -> str:
    """Why these kernels do not take a problem."""
    if descriptor.width > WIDTH:
        return f"wants a width of at most {WIDTH}, found {descriptor.width}"
    if descriptor.empty or not descriptor.keys:
        return "wants queries and keys"
    return mma_refuses(descriptor) or repeated(descriptor.inputs())


def suits(descriptor: AttentionDescriptor) -> bool:
    """Whether they are the fast choice."""
    return descriptor.width >= _LEAST_WIDTH


def tensor_map(device: Device, tensor: TensorRef, lines: int) -> int:
    """The map of boxes of so many lines of a tensor [batch, head, token, width], as an address."""
    extents = tensor.shape[::-1]
    strides = [stride if extent > 1 else _ALIGNED for stride, extent in zip(tensor.stride, tensor.shape, strict=True)]
    return map_address(
        device, Box(tensor.address, tensor.element, extents, (strides[2], strides[1], strides[0]), (WIDTH, lines, 1, 1))
    )


def staying(kernel: Kernel, tiles: int, device: Device) -> Launcher | None:
    """A kernel whose blocks take tiles in turn; None where there are none."""
    return kernel.launcher((min(tiles, device.multiprocessors), 1, 1)) if tiles else None


class ForwardProgram:
    """One launch."""

    reads_addresses = True

    def __init__(self, descriptor: AttentionDescriptor, device: Device) -> None:
        self.descriptor, self.device = descriptor, device
        self.tiles = blocks_of(descriptor.batch * descriptor.heads, descriptor.queries, ROWS)
        made = forward_wgmma.attention_forward_wgmma(descriptor.element.value, descriptor.causal, begins_early(device))
        self.launch = staying(made, self.tiles, device)

    def bind(self, args: AttentionArgs, workspace: Workspace) -> Launches:
        """The launch."""
        d = self.descriptor
        lines = zip(args.inputs, (ROWS, COLUMNS, COLUMNS), strict=True)
        maps = [tensor_map(self.device, tensor, count) for tensor, count in lines]
        numbers = (*sizes_of(d), d.heads, d.group, d.diagonal, self.tiles, factor_of(args.scale))
        return [(self.launch, (*matrix_arguments(args.out), args.lse.data, *map(np.uint64, maps), *numbers))]


class GradientKernels:
    """The launches that make gradients of statistics."""

    reads_addresses = True

    def __init__(self, descriptor: AttentionBackwardDescriptor, device: Device) -> None:
        f, early = descriptor.forward, begins_early(device)
        self.descriptor, self.device = descriptor, device
        choices = (f.element.value, f.causal, early)
        self.key_tiles = blocks_of(f.batch * f.shared_heads, f.keys, ROWS) if descriptor.key_value else 0
        self.query_tiles = blocks_of(f.batch * f.heads, f.queries, ROWS) if descriptor.query else 0
        self.of_keys = staying(key_gradients_wgmma.attention_key_gradients_wgmma(*choices), self.key_tiles, device)
        self.of_queries = staying(
            query_gradient_wgmma.attention_query_gradient_wgmma(*choices), self.query_tiles, device
        )

    def launches(
        self, results: list[TensorRef], inputs: tuple[TensorRef, ...], mask: list[TensorRef], place: Any, scale: float
    ) -> Launches:
        """Of results in order, of q, k, v and d_out, with the statistics at a place."""
        assert not mask, "a mask is refused"
        f, (q, k, v, d_out) = self.descriptor.forward, inputs
        sizes, last = (place, self.descriptor.padded, *sizes_of(f)), (factor_of(scale), np.float32(scale))
        launches: Launches = []
        if self.of_keys is not None:
            pair = [number for tensor in results[-2:] for number in matrix_arguments(tensor)]
            maps = self._maps((k, v), (q, d_out), key_gradients_wgmma.RING.columns)
            numbers = (*sizes, f.shared_heads, f.group, f.diagonal, self.key_tiles, *last)
            launches.append((self.of_keys, (*pair, *maps, *numbers)))
        if self.of_queries is not None:
            numbers = (*sizes, f.heads, f.group, f.diagonal, self.query_tiles, *last)
            maps = self._maps((q, d_out), (k, v), query_gradient_wgmma.RING.columns)
            launches.append((self.of_queries, (*matrix_arguments(results[0]), *maps, *numbers)))
        return launches

    def _maps(self, kept: tuple[TensorRef, ...], walked: tuple[TensorRef, ...], columns: int) -> list[np.uint64]:
        lines = [*((tensor, ring.ROWS) for tensor in kept), *((tensor, columns) for tensor in walked)]
        return [np.uint64(tensor_map(self.device, *line)) for line in lines]
