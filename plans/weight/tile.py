"""The tensor-core SKU of the weight family: tiles of any sum of sources, bf16 and fp16 mma.sync, 16-byte accesses."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from kernels.elements import ELEMENTS
from kernels.target import SIMULATOR
from kernels.weight import tile as weight_tile
from kernels.weight.low_rank_tile import STEP, Product, Tile
from kernels.weight.tile_groups import shared_bytes
from kernels.weight.tile_sources import Source, product_words, products
from plans.core.device import Device
from plans.core.plan import Sku
from plans.core.precision import ElementKind, MathPrecision, PrecisionGuarantee
from plans.core.sku import ArchSku, BackendKind
from plans.core.workspace import Workspace
from plans.weight.descriptor import Sink, WeightArgs, WeightDescriptor, WeightLayout
from plans.weight.program import Launches, WeightProgram, prepared_bytes
from plans.weight.resolve import ALIGN, Resolved, resolve

WARPS = 1 if SIMULATOR else 8
MAX_GROUPS = 1 if SIMULATOR else 4
MAX_SHARED_BYTES = 160 * 1024
MAX_ROWS = 65535 * 16 * WARPS
"""As many tiles as a grid has along y."""
PRODUCT_WORDS, ONE_STEP_WORDS = 12, 24
"""Up to how many registers of left factors the base waits in registers too, and where all products have one step."""
WALK_WORDS, WARPGROUPS_WALK_WORDS = 32, 24
"""From how many of them tiles walk."""
WALK_START = 0.35
LONGEST_WALK = 32
SHORT_LAUNCH, ROUNDS_AHEAD = 4, 1.5
"""Rounds of blocks up to which a launch of more than one asks for bases while the one before still runs, and of how
many rounds it asks for them: measured, see docs/performance.md."""
_SETTLED = (
    "; where that error could decide a rounding, by the magnitudes of the very terms, the element is summed again in "
    "pairs of fp32; factors that are contracted before are rounded to fp32 and not settled"
)
_FIRST_PRODUCT = {"low_rank": 0, "hadamard": 0, "kronecker_product": 1}


def tile_source(resolved: Resolved) -> Source:
    """The tile kernel's name of a source: its kinds and its products."""
    name, *kinds = resolved.kernel
    if name not in _FIRST_PRODUCT:
        return resolved.kernel
    skipped = _FIRST_PRODUCT[name]
    made = [
        product_of(kinds[skipped + 2 * i], kinds[skipped + 2 * i + 1], *numbers[:3])
        for i, numbers in enumerate(resolved.numbers[skipped:])
    ]
    return (*resolved.kernel, *made)


def product_of(left: str, right: str, rank: int, row_stride: int, rank_stride: int) -> Product:
    """A product's compile-time shape; steps above eight are powers of two, so that few kernels serve all ranks."""
    steps = max(1, -(-rank // STEP))
    steps = steps if steps <= 8 else 1 << (steps - 1).bit_length()
    vector = 1
    if rank_stride == 1 and row_stride == rank:
        by_eight = left != "f32" and rank % 8 == 0 and steps % 2 == 0
        # Two ranks an access keep a single step's registers in the tensor core's order; more save accesses.
        by_two = left != "f32" and rank % 2 == 0 and (steps == 1 or rank % 4 != 0)
        vector = 8 if by_eight else 2 if by_two else 4 if rank % 4 == 0 else 1
    return Product(left, right, steps, vector, rank == steps * STEP)


@functools.cache
def tile_sources(descriptor: WeightDescriptor) -> tuple[Source, ...]:
    """All sources' names in the tile kernel."""
    return tuple(tile_source(r) for r in resolve(descriptor, fused_second_half=True))


@functools.cache
def tile_of(descriptor: WeightDescriptor, wgmma: bool = False) -> Tile | None:
    """The tile: as wide as shared memory allows, None if not even 32 columns fit, or 64 of a warpgroup's."""
    sources, base = tile_sources(descriptor), descriptor.base
    base_name = base.value if base else None
    rows, columns = descriptor.matrix
    warps, groups, least = (max(WARPS, 4), max(MAX_GROUPS, 2), 2) if wgmma else (WARPS, MAX_GROUPS, 1)
    while groups >= least:
        tile = Tile(warps, groups, True, "registers")
        ragged = rows % tile.rows != 0 or columns % tile.columns != 0
        place = _base_place(descriptor, wgmma)
        tile = Tile(warps, groups, ragged, place, settles(descriptor), wgmma)
        if shared_bytes(base_name, sources, tile) <= MAX_SHARED_BYTES:
            return tile
        groups //= 2
    return None


def settles(descriptor: WeightDescriptor) -> bool:
    """Whether a kernel has sums to settle; a single source without products keeps the golden rule as it is."""
    sources = tile_sources(descriptor)
    return descriptor.settled and (len(sources) > 1 or sources[0][0] in _FIRST_PRODUCT)


def _base_place(descriptor: WeightDescriptor, wgmma: bool) -> str:
    """Where the base waits, by how many registers the products take: measured, see docs/performance.md."""
    base, sources = descriptor.base, tile_sources(descriptor)
    words, one_step = product_words(sources), all(p.steps == 1 for source in sources for p in products(source))
    if base is not None and words >= (WARPGROUPS_WALK_WORDS if wgmma else WALK_WORDS):
        return "walk"
    shared = base is not None and (
        ELEMENTS[base.value].words > 4
        or words > (ONE_STEP_WORDS if one_step and not settles(descriptor) else PRODUCT_WORDS)
    )
    return "shared" if shared else "registers"


def refuses(descriptor: WeightDescriptor) -> str:
    """Why the tile kernel cannot compute a descriptor, or ""."""
    rows, columns = descriptor.matrix
    if descriptor.layout is not WeightLayout.CHECKPOINT:
        return "wants checkpoint layout [out, in, *kernel]"
    if descriptor.sink is Sink.DORA_COLUMN:
        return "DoRA by input channel is computed by the portable SKU"
    if columns % 8:
        return f"wants in_features * kernel to be a multiple of 8 (16-byte accesses), found {columns}"
    if max(rows, columns) >= 1 << 31:
        return f"wants fewer than 2**31 rows and columns, found {rows} x {columns}"
    if rows > MAX_ROWS:
        return f"wants at most {MAX_ROWS} rows, found {rows}"
    for resolved in resolve(descriptor, fused_second_half=True):
        name = resolved.kernel[0]
        if name in _FIRST_PRODUCT and min(numbers[0] for numbers in resolved.numbers[_FIRST_PRODUCT[name] :]) == 0:
            return "a product of rank 0 is computed by the portable SKU"
        if name.startswith("kronecker") and resolved.numbers[0][2] % 8:
            return f"wants rows of w2 in multiples of 8 elements, found {resolved.numbers[0][2]}"
    if tile_of(descriptor) is None:
        return f"the ranks need more than {MAX_SHARED_BYTES} bytes of shared memory"
    return ""


def tensor_core_guarantee(descriptor: WeightDescriptor) -> PrecisionGuarantee:
    """Exact products of parts, summed by the tensor core."""
    settled = settles(descriptor)
    depth = sum(source.depth for source in descriptor.sources)
    return PrecisionGuarantee(
        math_precision=MathPrecision.BF16_TENSOR_CORE,
        accumulator=ElementKind.F32,
        deterministic=True,
        bit_stable_on_same_hardware=True,
        rounding_units=2.0 * depth + 10.0 * len(descriptor.sources) + (48.0 if descriptor.is_dora else 2.0),
        derivation="the tensor core truncates each aligned term at fp32's last place (2 units a term); parts left "
        "out of fp32 factors are below 2**-24 (2), scaling, combination and addition 8; DoRA's norm sums 32 squares "
        "a lane, 4 lanes and the tiles (half of 64), division and products 16" + (_SETTLED if settled else ""),
        settled=settled and not any(r.contractions for r in resolve(descriptor, fused_second_half=True)),
    )


def walk_of(column_tiles: int, row_tiles: int, at_once: int) -> int:
    """How many tiles a block walks down, where ``at_once`` blocks run: what leaves least to do for the busiest place.

    A walk costs about a third of a tile to begin.
    """

    def busiest(walk: int) -> float:
        blocks = column_tiles * -(-row_tiles // walk)
        return -(-blocks // at_once) * (walk + WALK_START)

    return min(range(1, min(row_tiles, LONGEST_WALK) + 1), key=busiest)


def blocks_ahead(blocks: int, at_once: int) -> int:
    """How many blocks ask for their base ahead, where ``at_once`` run; long launches would lose by it."""
    return int(ROUNDS_AHEAD * at_once) if at_once < blocks <= SHORT_LAUNCH * at_once else 0


class TileProgram(WeightProgram):
    """One launch over the weight; two for DoRA, the first leaving sums of squares of each row's tiles."""

    fused_second_half = True
    wgmma = False

    def __init__(self, descriptor: WeightDescriptor, device: Device) -> None:
        super().__init__(descriptor, device)
        tile, sources = tile_of(descriptor, self.wgmma), tile_sources(descriptor)
        rows, columns = descriptor.matrix
        self.tiles = max(1, -(-columns // tile.columns))
        row_tiles = max(1, -(-rows // tile.rows))
        base = None if descriptor.base is None else descriptor.base.value
        out, check = descriptor.out.value, descriptor.check_finite
        sink = f"dora {descriptor.magnitude.value}" if descriptor.is_dora else "delta" if base is None else "merge"
        choices = (base, out, sources, sink, check, tile, self.early)
        kernel = weight_tile.weight_tile(*choices)
        at_once = device.multiprocessors * kernel.min_blocks
        self.walk = walk_of(self.tiles, row_tiles, at_once) if tile.base == "walk" else 1
        self.grid = (self.tiles, -(-row_tiles // self.walk), 1)
        self.ahead = blocks_ahead(self.tiles * row_tiles, at_once)
        if descriptor.is_dora:
            unsettled = dataclasses.replace(tile, settled=False)
            norm = weight_tile.weight_tile(base, out, sources, "norm", False, unsettled, self.early)
            self.norm, self.merge = norm.launcher(self.grid), kernel.launcher(self.grid)
            return
        self.kernel = kernel
        if not self.contractions:
            self.group_kernel = weight_tile.weight_tile_grouped(*choices)

    def arguments(self, args: WeightArgs, workspace: Workspace) -> tuple:
        """Base, out, rows, columns, walk, flag, sources."""
        rows, columns = self.descriptor.matrix
        base = (args.base or args.out).data
        flat = self.flat_sources(args, workspace)
        return (base, args.out.data, rows, columns, self.walk, self.flag(args), *flat)

    def weight_launches(self, args: WeightArgs, workspace: Workspace) -> Launches:
        """The merge, for DoRA after the norms."""
        if not self.descriptor.is_dora:
            return [(self.merge, (*self.arguments(args, workspace), self.ahead))]
        sink = (self.tiles, np.float32(args.strength))
        partials, head = self.scratch(workspace), self.arguments(args, workspace)
        return [
            (self.norm, (*head, partials, args.out.data, *sink, 0)),
            (self.merge, (*head, partials, args.magnitude.data, *sink, 0)),
        ]


def workspace_bytes(descriptor: WeightDescriptor) -> int:
    """Contracted factors, then DoRA's sums of squares, one a row and tile."""
    prepared = prepared_bytes(descriptor, fused_second_half=True)
    if not descriptor.is_dora:
        return prepared
    rows, columns = descriptor.matrix
    tiles = -(-columns // tile_of(descriptor).columns)
    return -(-prepared // ALIGN) * ALIGN + 4 * rows * tiles


MMA = Sku(
    name="mma",
    backend=BackendKind.MMA,
    arch=ArchSku.SM80,
    refuses=refuses,
    guarantee=tensor_core_guarantee,
    build=TileProgram,
    workspace=workspace_bytes,
    alignment=16,
)
