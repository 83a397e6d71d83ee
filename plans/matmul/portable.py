"""The portable SKU of the matmul family: fp32 FMA, any kinds, layouts, strides and extents."""

from __future__ import annotations

from kernels.matmul_portable import Tile, matmul_portable, matmul_portable_grouped
from kernels.target import SIMULATOR
from plans.core.device import Device
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
    segments = len(descriptor.segments)
    units = 2.0 * descriptor.depth + 3.0 * segments
    derivation = (
        "two roundings a term (fewer where the product is fused), for each segment its scale's, a product and a sum; "
        "then the epilogue's steps"
    )
    return matmul_guarantee(descriptor, MathPrecision.F32, units, derivation)


class PortableProgram(MatmulProgram):
    """One launch, a block a tile."""

    def __init__(self, descriptor: SegmentedMatmulDescriptor, device: Device) -> None:
        super().__init__(descriptor, device)
        self.choices = (kernel_segments(descriptor), descriptor.out.value, kernel_steps(descriptor), TILE)
        self.blocks = tile_count(descriptor, TILE.rows, _columns_of_tile(descriptor))
        self.group_kernel = matmul_portable_grouped(*self.choices)

    def bind(self, args: SegmentedMatmulArgs, workspace: Workspace) -> Launches:
        """The launch; none where Y is empty."""
        if self.empty:
            return []
        launch = matmul_portable(*self.choices).launcher((self.blocks, 1, 1))
        return [(launch, self.arguments(args))]


PORTABLE = Sku(
    name="portable",
    backend=BackendKind.PORTABLE,
    arch=ArchSku.ANY,
    refuses=_refuses,
    guarantee=_guarantee,
    build=PortableProgram,
)
