"""The cluster SKU of the weight family (sm_90): DoRA by output row in one launch, the base read once."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from kernels.target import HOPPER_SHARED_BYTES, SIMULATOR
from kernels.weight import tile_cluster as kernel
from kernels.weight.low_rank_tile import Tile
from plans.core.device import Device
from plans.core.plan import Sku
from plans.core.sku import ArchSku, BackendKind
from plans.core.workspace import Workspace
from plans.weight import tile as tiles
from plans.weight.descriptor import Sink, WeightArgs, WeightDescriptor
from plans.weight.program import Launches, WeightProgram, prepared_bytes
from plans.weight.resolve import resolve

LARGEST_CLUSTER = 8
"""Blocks of a cluster that every device has room for."""
WARPS = (1,) if SIMULATOR else (8, 4, 2, 1)
TEAMS = (1, 2)
"""Into how many shares of columns a block's warps may be divided."""
ENOUGH_WARPS, ENOUGH_BLOCKS = 16, 256
"""Busy warps of a multiprocessor, and blocks of a launch, beyond which more are not worth another split."""
RESERVED_BYTES = 1024
LEAST_WARPS = 8
_SOURCES = ("low_rank", "hadamard")


@dataclass(frozen=True)
class _Split:
    """How a band of rows is shared: its tile, the blocks of a cluster, the tiles side by side of each block."""

    tile: Tile
    cluster: int
    panels: int
    teams: int
    shared_bytes: int
    warps_by_registers: int
    blocks: int

    @property
    def warps_resident(self) -> int:
        """Warps that a multiprocessor has room for."""
        warps = self.tile.warps * self.teams
        return warps * min(
            HOPPER_SHARED_BYTES // (self.shared_bytes + RESERVED_BYTES), self.warps_by_registers // warps
        )

    @property
    def warps_busy(self) -> float:
        """Warps that have something to do while the busiest team goes through its panels."""
        return self.warps_resident * self.panels / (self.teams * -(-self.panels // self.teams))

    @property
    def preference(self) -> tuple[float, int, int, int]:
        """The larger the better: measured, see docs/performance.md."""
        return min(self.warps_busy, ENOUGH_WARPS), min(self.blocks, ENOUGH_BLOCKS), -self.teams, -self.tile.warps


def cluster_of(panels: int) -> int:
    """The most blocks of which few have nothing to do."""
    sizes = [1 << i for i in range(LARGEST_CLUSTER.bit_length())]
    return max(size for size in sizes if 4 * size * -(-panels // size) <= 5 * panels)


def _splits(descriptor: WeightDescriptor) -> Iterator[_Split]:
    """Every way to share a band of rows."""
    rows, columns = descriptor.matrix
    sources, settled = tiles.tile_sources(descriptor), tiles.settles(descriptor)
    for warps, teams in itertools.product(WARPS, TEAMS):
        tile = Tile(warps, tiles.MAX_GROUPS, True, "shared")
        all_panels = max(1, -(-columns // tile.columns))
        cluster = cluster_of(all_panels)
        panels = -(-all_panels // cluster)
        ragged = rows % tile.rows != 0 or columns != cluster * panels * tile.columns
        tile = Tile(warps, tiles.MAX_GROUPS, ragged, "shared", settled)
        shared = kernel.cluster_shared_bytes(descriptor.base.value, sources, tile, panels, teams)
        blocks = cluster * -(-rows // tile.rows)
        yield _Split(tile, cluster, panels, teams, shared, kernel.warps_on_multiprocessor(sources, tile), blocks)


@functools.cache
def split_of(descriptor: WeightDescriptor) -> _Split | None:
    """The split that is preferred; None where none fits."""
    best = max(_splits(descriptor), key=lambda split: split.preference)
    return best if best.warps_resident else None


def refuses(descriptor: WeightDescriptor) -> str:
    """Why the cluster kernel cannot compute a descriptor, or ""."""
    if descriptor.sink is not Sink.DORA_ROW:
        return "computes DoRA by output row"
    if reason := tiles.refuses(descriptor):
        return reason
    if 0 in descriptor.matrix:
        return "an empty weight is left to the portable SKU"
    names = {resolved.kernel[0] for resolved in resolve(descriptor, fused_second_half=True)}
    if others := sorted(names.difference(_SOURCES)):
        return f"wants low-rank products and products of two, found {', '.join(others)}"
    if split_of(descriptor) is None:
        return (
            f"16 rows need more than {LARGEST_CLUSTER} x {HOPPER_SHARED_BYTES - RESERVED_BYTES} bytes of shared memory"
        )
    return ""


def suits(descriptor: WeightDescriptor) -> bool:
    """Whether enough warps share a multiprocessor; with long rows or high ranks two launches keep more of them."""
    return split_of(descriptor).warps_resident >= LEAST_WARPS


class ClusterProgram(WeightProgram):
    """One launch."""

    fused_second_half = True

    def __init__(self, descriptor: WeightDescriptor, device: Device) -> None:
        super().__init__(descriptor, device)
        self.split = split = split_of(descriptor)
        dora = kernel.dora_cluster(
            descriptor.base.value,
            descriptor.out.value,
            tiles.tile_sources(descriptor),
            descriptor.magnitude.value,
            descriptor.check_finite,
            split.tile,
            split.cluster,
            split.teams,
        )
        bands = -(-descriptor.matrix[0] // split.tile.rows)
        self.launch = dora.launcher((bands * split.cluster, 1, 1), split.shared_bytes)

    def weight_launches(self, args: WeightArgs, workspace: Workspace) -> Launches:
        """The norms and the merge."""
        rows, columns = self.descriptor.matrix
        head = (args.base.data, args.out.data, rows, columns, self.split.panels, self.flag(args))
        sink = (args.magnitude.data, np.float32(args.strength))
        return [(self.launch, (*head, *self.flat_sources(args, workspace), *sink))]


CLUSTER = Sku(
    name="cluster",
    backend=BackendKind.CLUSTER,
    arch=ArchSku.SM90A,
    refuses=refuses,
    guarantee=tiles.tensor_core_guarantee,
    build=ClusterProgram,
    workspace=functools.partial(prepared_bytes, fused_second_half=True),
    alignment=16,
    suits=suits,
)
