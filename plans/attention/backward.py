"""Attention's gradients: statistics of each query to workspace, then d_k and d_v, then d_q, each in a launch."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from kernels.attention import portable, statistics
from kernels.attention.key_gradients import attention_key_gradients
from kernels.attention.portable_gradients import key_gradients_portable, query_gradient_portable
from kernels.attention.query_gradient import attention_query_gradient
from kernels.attention.statistics import STATISTICS, attention_statistics
from kernels.attention.tiles import UNIT, Tile, gradient_shared_bytes
from kernels.attention.tiles import padded as padded_width
from kernels.target import SIMULATOR
from plans.attention import wgmma
from plans.attention.descriptor import AttentionBackwardArgs, AttentionBackwardDescriptor
from plans.attention.guarantee import backward_guarantee
from plans.attention.problem import (
    blocks_of,
    factor_of,
    matrix_arguments,
    mma_refuses,
    portable_refuses,
    sizes_of,
    tile_of,
    unfit,
)
from plans.core.device import Device
from plans.core.plan import Launches, Plan, Sku
from plans.core.precision import MathPrecision
from plans.core.sku import ArchSku, BackendKind, begins_early
from plans.core.tensor import TensorMut, TensorRef
from plans.core.workspace import Workspace


def key_tile(width: int) -> Tile:
    """Keys of a block and queries at a time."""
    width = padded_width(width)
    if SIMULATOR:
        return Tile(32, 16, 1, width)
    return Tile(128 if width <= 64 else 64, 32, 4, width)


def query_tile(width: int) -> Tile:
    """Queries of a block and keys at a time."""
    width = padded_width(width)
    if SIMULATOR:
        return Tile(32, 16, 2, width)
    return Tile(128 if width <= 64 else 64, 32, 4, width)


def _workspace(descriptor: AttentionBackwardDescriptor) -> int:
    f = descriptor.forward
    return 0 if f.empty else 4 * STATISTICS * f.batch * f.heads * descriptor.padded


def _part(tensor: TensorMut, number: int) -> TensorMut:
    """One of the packed gradients."""
    start = number * tensor.stride[0]
    data = tensor.data
    data = data + start * tensor.element.itemsize if isinstance(data, int) else data[start:]
    return replace(
        tensor, data=data, shape=tensor.shape[1:], stride=tensor.stride[1:], available=tensor.available - start
    )


@dataclass(frozen=True)
class _Kernels:
    """A technique's launchers, None where there is nothing to compute."""

    descriptor: AttentionBackwardDescriptor
    of_keys: object
    of_queries: object

    reads_addresses = False

    def launches(
        self, results: list[TensorMut], inputs: tuple[TensorRef, ...], mask: list[TensorRef], place: Any, scale: float
    ) -> Launches:
        """Of results in order, of q, k, v and d_out, with the statistics at a place."""
        f = self.descriptor.forward
        read = [number for tensor in inputs for number in matrix_arguments(tensor)]
        read += [number for tensor in mask for number in (tensor.data, *tensor.stride)]
        numbers = (*read, place, self.descriptor.padded, *sizes_of(f))
        last = (f.group, f.diagonal, factor_of(scale), np.float32(scale))
        launches: Launches = []
        if self.of_keys is not None:
            pair = [number for tensor in results[-2:] for number in matrix_arguments(tensor)]
            launches.append((self.of_keys, (*pair, *numbers, f.shared_heads, *last)))
        if self.of_queries is not None:
            launches.append((self.of_queries, (*matrix_arguments(results[0]), *numbers, f.heads, *last)))
        return launches


class _Program:
    """Up to three launches; ``together``: neighbouring elements of a query that are loaded at once, 8 if aligned."""

    def __init__(
        self,
        descriptor: AttentionBackwardDescriptor,
        kernels: _Kernels | wgmma.GradientKernels,
        together: int,
        early: bool = False,
    ) -> None:
        f = descriptor.forward
        self.descriptor, self.kernels, self.reads_addresses = descriptor, kernels, kernels.reads_addresses
        self.count = f.batch * f.heads * descriptor.padded
        nothing = f.empty or (kernels.of_keys is None and kernels.of_queries is None)
        wanted = -(-f.width // together)
        lanes = next((lanes for lanes in statistics.LANES if lanes >= wanted), statistics.LANES[-1])
        blocks = -(-self.count * lanes // (32 * statistics.WARPS))
        made = attention_statistics(f.element.value, lanes, together, early)
        self.prepare = None if nothing else made.launcher((blocks, 1, 1))

    def bind(self, args: AttentionBackwardArgs, workspace: Workspace) -> Launches:
        """The launches; none where there is nothing to write."""
        descriptor, f = self.descriptor, self.descriptor.forward
        d_out, out, lse, q, k, v, *mask = args.reads
        # Where no query is, no statistics are read either.
        place = lse.data if self.prepare is None else workspace.buffer.pointer(np.float32)
        launches: Launches = []
        if self.prepare is not None:
            flat = (*matrix_arguments(out), *matrix_arguments(d_out), lse.data)
            launches.append((self.prepare, (place, *flat, f.queries, descriptor.padded, f.width, f.heads, self.count)))
        results = list(args.results)
        if descriptor.packed is not None:
            results = [_part(results[0], number) for number in range(3)]
        return launches + self.kernels.launches(results, (q, k, v, d_out), mask, place, args.scale)


def _blocks(descriptor: AttentionBackwardDescriptor, key_rows: int, query_rows: int) -> tuple[int, int]:
    """Blocks of both kernels, 0 for one that has nothing to write."""
    f = descriptor.forward
    of_keys = blocks_of(f.batch * f.shared_heads, f.keys, key_rows) if descriptor.key_value and f.width else 0
    of_queries = blocks_of(f.batch * f.heads, f.queries, query_rows) if descriptor.query and f.width else 0
    return of_keys, of_queries


def _build_mma(descriptor: AttentionBackwardDescriptor, device: Device) -> _Program:
    f = descriptor.forward
    rows, columns = key_tile(f.width), query_tile(f.width)
    of_keys, of_queries = _blocks(descriptor, rows.rows, columns.rows)
    early = begins_early(device)
    keys = attention_key_gradients(f.element.value, rows, f.causal, early)
    queries = attention_query_gradient(f.element.value, columns, f.causal, early)
    kernels = _Kernels(
        descriptor,
        keys.launcher((of_keys, 1, 1), gradient_shared_bytes(rows)) if of_keys else None,
        queries.launcher((of_queries, 1, 1), gradient_shared_bytes(columns)) if of_queries else None,
    )
    return _Program(descriptor, kernels, UNIT, early)


def _build_wgmma(descriptor: AttentionBackwardDescriptor, device: Device) -> _Program:
    return _Program(descriptor, wgmma.GradientKernels(descriptor, device), UNIT, begins_early(device))


def _build_portable(descriptor: AttentionBackwardDescriptor, device: Device) -> _Program:
    f = descriptor.forward
    mask = "" if f.mask is None else f.mask.element.value
    choices = (f.element.value, mask, portable.groups_of(f.width), f.causal)
    shared = portable.shared_bytes(f.width, 2)
    of_keys, of_queries = _blocks(descriptor, portable.BLOCK_ROWS, portable.BLOCK_ROWS)
    kernels = _Kernels(
        descriptor,
        key_gradients_portable(*choices).launcher((of_keys, 1, 1), shared) if of_keys else None,
        query_gradient_portable(*choices).launcher((of_queries, 1, 1), shared) if of_queries else None,
    )
    return _Program(descriptor, kernels, 1)


def _mma_refuses(descriptor: AttentionBackwardDescriptor) -> str:
    return mma_refuses(descriptor.forward) or unfit(tuple(o for o in descriptor.operands() if o.name != "lse"))


def _wgmma_refuses(descriptor: AttentionBackwardDescriptor) -> str:
    d_out = next(o for o in descriptor.operands() if o.name == "d_out")
    return wgmma.refuses(descriptor.forward) or _mma_refuses(descriptor) or wgmma.repeated((d_out,))


def _portable_refuses(descriptor: AttentionBackwardDescriptor) -> str:
    return portable_refuses(descriptor.forward)


class AttentionBackwardPlan(Plan):
    """Gradients of attention; see :class:`AttentionBackwardDescriptor`."""

    name = "attention backward"
    skus = (
        Sku(
            name="wgmma",
            backend=BackendKind.WGMMA,
            arch=ArchSku.SM90A,
            refuses=_wgmma_refuses,
            guarantee=lambda d: backward_guarantee(MathPrecision.BF16_TENSOR_CORE, wgmma.COLUMNS, d),
            build=_build_wgmma,
            workspace=_workspace,
            alignment=16,
            suits=lambda d: wgmma.suits(d.forward),
        ),
        Sku(
            name="mma",
            backend=BackendKind.MMA,
            arch=ArchSku.SM80,
            refuses=_mma_refuses,
            guarantee=lambda d: backward_guarantee(MathPrecision.BF16_TENSOR_CORE, tile_of(d.forward.width).columns, d),
            build=_build_mma,
            workspace=_workspace,
            alignment=16,
        ),
        Sku(
            name="portable",
            backend=BackendKind.PORTABLE,
            arch=ArchSku.ANY,
            refuses=_portable_refuses,
            guarantee=functools.partial(backward_guarantee, MathPrecision.F32, portable.OTHERS),
            build=_build_portable,
            workspace=_workspace,
        ),
    )
