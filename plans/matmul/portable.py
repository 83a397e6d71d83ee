"""The portable SKU of the matmul family: fp32 FMA, any kinds, layouts, strides and extents."""

from __future__ import annotations

import dataclasses

import numpy as np

from kernels.matmul.portable import Tile, matmul_portable, matmul_portable_grouped
from kernels.target import SIMULATOR, Kernel
from plans.core.device import ALIGNMENT, Device
from plans.core.plan import Launches, Sku
from plans.core.precision import MathPrecision, PrecisionGuarantee
from plans.core.sku import ArchSku, BackendKind
from plans.core.workspace import Workspace
from plans.matmul.descriptor import SegmentedMatmulArgs, SegmentedMatmulDescriptor
from plans.matmul.program import (
    MOST_BLOCKS,
    MatmulProgram,
    kernel_segments,
    kernel_steps,
    matmul_guarantee,
    refuses_low_rank,
    row_words,
    tile_count,
)

TILE = Tile(16, 16, 8, 4, 2) if SIMULATOR else Tile(64, 64, 16, 4, 4)
_LARGEST = 1 << 31


def _columns_of_tile(descriptor: SegmentedMatmulDescriptor) -> int:
    return TILE.columns // 2 if descriptor.gated else TILE.columns


def _refuses(descriptor: SegmentedMatmulDescriptor) -> str:
    if max(descriptor.m, descriptor.n) >= _LARGEST:
        return f"wants fewer than 2**31 rows and columns, found {descriptor.m} x {descriptor.n}"
    blocks = tile_count(descriptor, TILE.rows, _columns_of_tile(descriptor))
    return f"wants fewer than 2**31 tiles, found {blocks}" if blocks > MOST_BLOCKS else ""


def _guarantee(descriptor: SegmentedMatmulDescriptor) -> PrecisionGuarantee:
    terms = len(descriptor.segments) + len(descriptor.low_rank)
    units = 2.0 * descriptor.depth + 3.0 * terms
    derivation = (
        "two roundings a term (fewer where the product is fused), for each segment its scale's, a product and a sum; "
        "then the epilogue's steps"
    )
    return matmul_guarantee(descriptor, MathPrecision.F32, units, derivation)


class PortableProgram(MatmulProgram):
    """One launch, a block a tile; before it one for each low-rank term, A D^T in fp32 to workspace."""

    def __init__(self, descriptor: SegmentedMatmulDescriptor, device: Device) -> None:
        super().__init__(descriptor, device)
        terms = tuple(("NT", "f32", term.element.value) for term in descriptor.low_rank)
        segments = kernel_segments(descriptor)
        self.choices = ((*segments, *terms), descriptor.out.value, kernel_steps(descriptor), TILE)
        self.blocks = tile_count(descriptor, TILE.rows, _columns_of_tile(descriptor))
        self.inner, self.places = [], [0]
        batch = 1 if descriptor.batch is None else descriptor.batch
        for term in descriptor.low_rank:
            segment = (("NT", descriptor.segments[term.of].a.value, term.element.value),)
            blocks = batch * -(-descriptor.m // TILE.rows) * -(-term.rank // TILE.columns)
            kernel = matmul_portable(segment, "f32", (), TILE)
            self.inner.append(None if self.empty else kernel.launcher((blocks, 1, 1)))
            self.places.append(self.places[-1] + _inner_bytes(descriptor, term.rank))

    def bind(self, args: SegmentedMatmulArgs, workspace: Workspace) -> Launches:
        """The launches; none where Y is empty."""
        if self.empty:
            return []
        launches, terms = [], []
        m, one = self.descriptor.m, np.float32(1)
        for i, term in enumerate(self.descriptor.low_rank):
            (down, up), a = args.low_rank[i], args.segments[term.of][0]
            k, (a_stride, _, a_batch, _) = self.descriptor.segments[term.of].k, self.strides[term.of]
            inner = workspace.buffer.pointer(np.float32, self.places[i])
            segment = (a.data, down.data, k, a_stride, k, a_batch, 0, one, one)
            launches.append((self.inner[i], (inner, m, term.rank, term.rank, m * term.rank, *segment)))
            scale = args.low_rank_scales[i]
            strides = (term.rank, term.rank, m * term.rank, 0)
            terms += [inner, up.data, term.rank if scale else 0, *strides, one, np.float32(scale)]
        launch = matmul_portable(*self.choices).launcher((self.blocks, 1, 1))
        head = (*self.result_arguments(args), *self.segment_arguments(args))
        return [*launches, (launch, (*head, *terms, *self.epilogue_arguments(args)))]


def group_kernel(program: PortableProgram) -> tuple[Kernel, int]:
    """The kernel of all programs with the same choices, and the words of a table row."""
    return matmul_portable_grouped(*program.choices), row_words(matmul_portable(*program.choices))


def _inner_bytes(descriptor: SegmentedMatmulDescriptor, rank: int) -> int:
    """Bytes of one A D^T, aligned."""
    batch = 1 if descriptor.batch is None else descriptor.batch
    return -(-4 * batch * descriptor.m * rank // ALIGNMENT) * ALIGNMENT


PORTABLE = Sku(
    name="portable",
    backend=BackendKind.PORTABLE,
    arch=ArchSku.ANY,
    refuses=_refuses,
    guarantee=_guarantee,
    build=PortableProgram,
    workspace=lambda descriptor: sum(_inner_bytes(descriptor, term.rank) for term in descriptor.low_rank),
)
PORTABLE_MEMBER = dataclasses.replace(PORTABLE, refuses=lambda d: refuses_low_rank(d) or _refuses(d))
"""The same as a member of a group, which has no launches before its own."""
