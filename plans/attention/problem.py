"""What attention's SKUs share: tiles, what they refuse, and a problem's numbers as kernels take them."""

from __future__ import annotations

import math

import numpy as np

from kernels.attention import portable
from kernels.attention.tiles import UNIT, Tile, padded
from kernels.target import SIMULATOR
from plans.attention.descriptor import AttentionDescriptor
from plans.core.operand import Operand
from plans.core.precision import ElementKind
from plans.core.tensor import TensorRef

MOST_WIDTH = 128
_LOG2_E = math.log2(math.e)
_MOST_TOKENS = 1 << 30
_MOST_BLOCKS = 1 << 31


def tile_of(width: int) -> Tile:
    """Queries of a block and keys at a time: as many as registers hold scores of."""
    width = padded(width)
    if SIMULATOR:
        return Tile(32, 16, 2, width)
    return Tile(128, 64 if width <= 96 else 48 if width <= 112 else 32, 4, width)


def blocks_of(slots: int, tokens: int, rows: int) -> int:
    """Blocks for tiles of ``rows`` tokens of every head."""
    return slots * -(-tokens // rows)


def matrix_arguments(tensor: TensorRef) -> tuple:
    """A tensor as kernels take it: it, and the strides of batch, head and token."""
    return (tensor.data, *tensor.stride[:3])


def unfit(operands: tuple[Operand, ...]) -> str:
    """Why tensors of 16-bit kinds cannot be copied 16 bytes at a time; '' where they can."""
    for operand in operands:
        axes = zip(operand.strides[:-1], operand.shape[:-1], strict=True)
        strides = [stride for stride, extent in axes if extent > 1]
        if any(stride % UNIT for stride in strides):
            return f"wants strides of multiples of {UNIT}, found {operand.name} with {strides}"
        if max(strides, default=0) >= _MOST_BLOCKS:
            return f"wants strides below 2**31, found {operand.name} with {strides}"
        if operand.count and operand.strides[-1] != 1:
            return f"wants a head's elements side by side, found {operand.name} with strides {operand.strides}"
    return ""


def mma_refuses(descriptor: AttentionDescriptor) -> str:
    """Why tensor cores' kernels do not take a problem."""
    if descriptor.element is ElementKind.F32:
        return "wants q, k and v of bf16 or fp16, found f32"
    if descriptor.mask is not None:
        return "wants no mask but causal"
    if descriptor.width % UNIT or descriptor.width > MOST_WIDTH:
        return f"wants a width that is a multiple of {UNIT} and at most {MOST_WIDTH}, found {descriptor.width}"
    if max(descriptor.queries, descriptor.keys, abs(descriptor.diagonal)) > _MOST_TOKENS:
        return f"wants at most 2**30 tokens, found {descriptor.queries} queries and {descriptor.keys} keys"
    if blocks_of(descriptor.batch * descriptor.heads, max(descriptor.queries, descriptor.keys), 16) >= _MOST_BLOCKS:
        return "wants fewer than 2**31 tiles"
    return unfit(tuple(o for o in descriptor.operands() if o.name != "lse"))


def portable_refuses(descriptor: AttentionDescriptor) -> str:
    """Why the portable kernels do not take a problem."""
    if descriptor.width > portable.MOST_WIDTH:
        return f"wants a width of at most {portable.MOST_WIDTH}, found {descriptor.width}"
    slots, tokens = descriptor.batch * descriptor.heads, max(descriptor.queries, descriptor.keys)
    if max(blocks_of(slots, tokens, 1), tokens, abs(descriptor.diagonal)) >= _MOST_TOKENS:
        return f"wants fewer than 2**30 tokens in all, found {slots} times {tokens}"
    rows = [o for o in descriptor.operands() if o.name not in ("lse", "mask") and o.count and o.strides[-1] != 1]
    return f"wants a head's elements side by side, found {rows[0].name} with strides {rows[0].strides}" if rows else ""


def factor_of(scale: float) -> np.float32:
    """The scale of powers of two."""
    return np.float32(scale * _LOG2_E)


def sizes_of(descriptor: AttentionDescriptor) -> tuple[int, int, int]:
    """Queries, keys, width."""
    return descriptor.queries, descriptor.keys, descriptor.width
