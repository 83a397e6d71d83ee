"""The tensor-core SKUs of sm_80 and later: one launch, or for few tiles the sum split in two stages."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from kernels.matmul.mma import Problem, matmul_mma, matmul_mma_grouped
from kernels.matmul.mma_tile import UNIT, MmaTile
from kernels.target import SIMULATOR, Kernel
from plans.core.device import Device
from plans.core.plan import Launches, Sku
from plans.core.precision import ElementKind, MathPrecision, PrecisionGuarantee
from plans.core.sku import ArchSku, BackendKind
from plans.core.tuning import tuned
from plans.core.workspace import Workspace
from plans.matmul.descriptor import SegmentedMatmulArgs, SegmentedMatmulDescriptor
from plans.matmul.measure import program_seconds
from plans.matmul.program import (
    MOST_BLOCKS,
    MatmulProgram,
    is_wide,
    kernel_steps,
    matmul_guarantee,
    refuses_low_rank,
    row_words,
    tile_count,
    vector_of,
)
from plans.matmul.second_stage import SecondStage, parts_bytes, refuses_elements

TILES = (
    (MmaTile(32, 32, 32, 2, 1, 3), MmaTile(16, 32, 16, 1, 2, 3))
    if SIMULATOR
    else (MmaTile(128, 128, 32, 2, 4, 4), MmaTile(128, 64, 32, 4, 2, 4), MmaTile(64, 64, 32, 2, 2, 4))
)
"""Tiles, the largest first: the larger, the fewer bytes go through shared memory for a product."""
SLOTS = 8 if SIMULATOR else 2 * 132
"""Blocks that run at once. The workspace must not depend on the device, so one chip stands for all."""
MOST_PARTS, LEAST_DEPTH = 16, 16 if SIMULATOR else 512
_KINDS = (ElementKind.BF16, ElementKind.F16)
_LARGEST = 1 << 31


def tile_of(descriptor: SegmentedMatmulDescriptor) -> MmaTile:
    """The largest tile that leaves no multiprocessor idle, else the smallest."""
    return next((tile for tile in TILES if _tiles(descriptor, tile) >= SLOTS // 2), TILES[-1])


def _tiles(descriptor: SegmentedMatmulDescriptor, tile: MmaTile) -> int:
    return tile_count(descriptor, tile.rows, tile.columns // 2 if descriptor.gated else tile.columns)


@functools.cache
def _problem(descriptor: SegmentedMatmulDescriptor, tile: MmaTile, split: bool) -> Problem:
    """The kernel's compile-time shape; where the sum is split, its parts are plain fp32 products."""
    layout, kind = descriptor.segments[0].layout, descriptor.segments[0].a
    halves = (descriptor.columns,) if descriptor.gated else ()
    a_vector = vector_of(a for a, _ in descriptor.segment_operands)
    b_vector = vector_of((b for _, b in descriptor.segment_operands), *(halves if layout[1] == "N" else ()))
    gated = descriptor.gated and not split
    columns = descriptor.columns if gated else descriptor.n
    whole = columns % (tile.columns // 2 if gated else tile.columns) == 0 and descriptor.m % tile.rows == 0
    whole = whole and all(segment.k % tile.depth == 0 for segment in descriptor.segments)
    return Problem(
        layout,
        kind.value,
        len(descriptor.segments),
        "f32" if split else descriptor.out.value,
        () if split else kernel_steps(descriptor),
        a_vector,
        b_vector,
        descriptor.n % UNIT == 0 if split else is_wide(descriptor),
        not (whole and a_vector == b_vector == UNIT),
    )


def depth_tiles(descriptor: SegmentedMatmulDescriptor, tile: MmaTile) -> int:
    """Tiles of depth of all segments together."""
    return sum(-(-segment.k // tile.depth) for segment in descriptor.segments)


def parts_of(descriptor: SegmentedMatmulDescriptor) -> int:
    """How many parts the sum is best split into; 1 where the tiles fill the chip as they are."""
    tile = tile_of(descriptor)
    tiles, total = _split_tiles(descriptor, tile), depth_tiles(descriptor, tile)
    wanted = min(SLOTS // max(1, tiles), MOST_PARTS, total * tile.depth // LEAST_DEPTH)
    if wanted <= 1:
        return 1
    return -(-total // -(-total // wanted))


def _split_tiles(descriptor: SegmentedMatmulDescriptor, tile: MmaTile) -> int:
    """Tiles of the product before any gate."""
    batch = 1 if descriptor.batch is None else descriptor.batch
    return batch * -(-descriptor.m // tile.rows) * -(-descriptor.n // tile.columns)


def choose_tile(descriptor: SegmentedMatmulDescriptor, device: Device) -> MmaTile:
    """The fastest tile, measured once for a class of problems; see ``plans.core.tuning``."""
    first, batch = descriptor.segments[0], descriptor.batch or 1
    estimate = tile_of(descriptor)
    rows = -(-descriptor.m // TILES[-1].rows)
    kinds = (first.layout, first.a.value, descriptor.out.value, descriptor.gated)
    problem = (rows, descriptor.n, depth_tiles(descriptor, TILES[-1]), batch, *kinds)
    return tuned(
        device,
        "matmul mma",
        problem,
        (estimate, *(tile for tile in TILES if tile != estimate)),
        lambda tile: program_seconds(descriptor, device, MmaProgram(descriptor, device, tile)),
    )


def tile_of_group(descriptors: Sequence[SegmentedMatmulDescriptor]) -> MmaTile:
    """The largest tile of which all products together have enough."""
    return next((tile for tile in TILES if sum(_tiles(d, tile) for d in descriptors) >= SLOTS // 2), TILES[-1])


def group_kernel(problems: Sequence[Problem], tile: MmaTile) -> tuple[Kernel, int]:
    """The kernel that takes all problems, which differ in alignment and extents only, and the words of a table row."""
    common = dataclasses.replace(
        problems[0],
        a_vector=min(problem.a_vector for problem in problems),
        b_vector=min(problem.b_vector for problem in problems),
        wide=all(problem.wide for problem in problems),
        ragged=any(problem.ragged for problem in problems),
    )
    return matmul_mma_grouped(common, tile), row_words(matmul_mma(common, tile))


def _refuses(descriptor: SegmentedMatmulDescriptor) -> str:
    if reason := refuses_low_rank(descriptor):
        return reason
    if max(descriptor.m, descriptor.n, *(segment.k for segment in descriptor.segments)) >= _LARGEST:
        return "wants extents below 2**31"
    for segment in descriptor.segments:
        if segment.a is not segment.b or segment.a not in _KINDS:
            return f"wants A and B both bf16 or both fp16, found {segment.a.value} and {segment.b.value}"
        first = descriptor.segments[0]
        if segment.layout != first.layout or segment.a is not first.a:
            return "wants all segments in one layout and of one kind"
    blocks = _split_tiles(descriptor, TILES[-1]) * MOST_PARTS
    return f"wants fewer than 2**31 blocks, found {blocks}" if blocks > MOST_BLOCKS else ""


def _split_refuses(descriptor: SegmentedMatmulDescriptor) -> str:
    if reason := _refuses(descriptor):
        return reason
    if reason := refuses_elements(descriptor):
        return reason
    return "" if parts_of(descriptor) > 1 else "its tiles fill the chip without splitting the sum"


def _guarantee(descriptor: SegmentedMatmulDescriptor) -> PrecisionGuarantee:
    units = 2.0 * descriptor.depth + 2.0 * len(descriptor.segments) + MOST_PARTS + 10.0
    derivation = (
        "the tensor core truncates each aligned term at fp32's last place (2 units a term); a rescaling between "
        "segments 2, the last scale 2, the parts of a split sum 16, and 8 for the sums' own alignment; then the "
        "epilogue's steps"
    )
    return matmul_guarantee(descriptor, MathPrecision.BF16_TENSOR_CORE, units, derivation)


class MmaProgram(MatmulProgram):
    """One launch, a block a tile. Members of a group, which have one tile in common, launch nothing themselves."""

    def __init__(
        self, descriptor: SegmentedMatmulDescriptor, device: Device, tile: MmaTile | None = None, member: bool = False
    ) -> None:
        super().__init__(descriptor, device)
        self.tile = tile or choose_tile(descriptor, device)
        self.problem = _problem(descriptor, self.tile, False)
        self.batches = 1 if descriptor.batch is None else descriptor.batch
        self.blocks = _tiles(descriptor, self.tile)
        self.part = depth_tiles(descriptor, self.tile)
        if not member and not self.empty:
            self.launch = matmul_mma(self.problem, self.tile).launcher((self.blocks, 1, 1))

    def bind(self, args: SegmentedMatmulArgs, workspace: Workspace) -> Launches:
        """The launch; none where Y is empty."""
        return [] if self.empty else [(self.launch, self.arguments(args))]

    def arguments(self, args: SegmentedMatmulArgs) -> tuple:
        """The flat parameters: the work's, the result's, the segments', the epilogue's."""
        segments = self.segment_arguments(args, self.smallest_first(args))
        return (self.batches, self.part, *self.result_arguments(args), *segments, *self.epilogue_arguments(args))


class SplitProgram(MatmulProgram):
    """Two launches: the parts of the sum in fp32 to workspace, and their sum through the epilogue."""

    def __init__(self, descriptor: SegmentedMatmulDescriptor, device: Device) -> None:
        super().__init__(descriptor, device)
        tile, self.parts = tile_of(descriptor), parts_of(descriptor)
        self.batches = 1 if descriptor.batch is None else descriptor.batch
        self.part = -(-depth_tiles(descriptor, tile) // self.parts)
        blocks = _split_tiles(descriptor, tile) * self.parts
        self.multiply = matmul_mma(_problem(descriptor, tile, True), tile).launcher((blocks, 1, 1))
        self.second = SecondStage(descriptor, self.parts)

    def bind(self, args: SegmentedMatmulArgs, workspace: Workspace) -> Launches:
        """Both launches."""
        m, n = self.descriptor.m, self.descriptor.n
        parts = workspace.buffer.pointer(np.float32)
        segments = self.segment_arguments(args, self.smallest_first(args))
        result = (parts, m, n, n, m * n)
        return [
            (self.multiply, (self.batches, self.part, *result, *segments)),
            self.second.bind(self, args, workspace),
        ]


MMA_SPLIT = Sku(
    name="mma, split sum",
    backend=BackendKind.MMA,
    arch=ArchSku.SM80,
    refuses=_split_refuses,
    guarantee=_guarantee,
    build=SplitProgram,
    workspace=lambda descriptor: parts_bytes(descriptor, parts_of(descriptor)),
    alignment=16,
)
MMA = Sku(
    name="mma",
    backend=BackendKind.MMA,
    arch=ArchSku.SM80,
    refuses=_refuses,
    guarantee=_guarantee,
    build=MmaProgram,
    alignment=16,
)
