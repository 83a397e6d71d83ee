"""The skinny SKU of the matmul family: up to 16 rows of A, bound by reading B; low-rank terms in the same launch."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from kernels.matmul.skinny import SkinnyProblem, matmul_skinny
from kernels.matmul.skinny_sums import GROUP, SkinnyTile
from kernels.target import SIMULATOR
from plans.core.device import Device
from plans.core.plan import Launches, Sku
from plans.core.precision import ElementKind, MathPrecision, PrecisionGuarantee
from plans.core.sku import ArchSku, BackendKind
from plans.core.tuning import tuned
from plans.core.workspace import Workspace
from plans.matmul.descriptor import SegmentedMatmulArgs, SegmentedMatmulDescriptor
from plans.matmul.measure import program_seconds
from plans.matmul.mma import UNIT, is_wide
from plans.matmul.program import MOST_BLOCKS, MatmulProgram, element_offset, kernel_steps, matmul_guarantee

FEW_WARPS, MANY_WARPS = (1, 2) if SIMULATOR else (4, 8)
"""Warps of a block where there are blocks enough for every multiprocessor to run several, and where there are not."""
BLOCKS = 1 if SIMULATOR else 128
"""Blocks that keep every multiprocessor reading."""
MOST_ROWS = 16
WORDS, MOST_WORDS = 64, 180
SHARED_BYTES = 47 << 10
_KINDS = (ElementKind.BF16, ElementKind.F16)


@dataclass(frozen=True)
class _Piece:
    """Up to 16 ranks of a low-rank term: which term, the first rank and how many."""

    term: int
    first: int
    rank: int


def pieces_of(descriptor: SegmentedMatmulDescriptor) -> tuple[_Piece, ...]:
    """The low-rank terms in pieces of 16 ranks, in the order of the segments whose A they take."""
    return tuple(
        _Piece(number, first, min(GROUP, term.rank - first))
        for number, term in sorted(enumerate(descriptor.low_rank), key=lambda entry: entry[1].of)
        for first in range(0, term.rank, GROUP)
    )


def tile_of(descriptor: SegmentedMatmulDescriptor) -> SkinnyTile:
    """As many rows of B in a block as leave enough blocks, so that A and D are read seldom."""
    a_groups, pieces = (1 if descriptor.m <= 8 else 2), len(pieces_of(descriptor))
    sides = 2 if descriptor.gated else 1
    blocks_of = descriptor.n * (descriptor.batch or 1) // GROUP
    row_groups = next((g for g in (2 * a_groups, a_groups) if g >= sides and blocks_of // g >= BLOCKS), sides)
    slot = 8 * (row_groups + pieces) + 4 * a_groups
    warps = FEW_WARPS if blocks_of // row_groups >= 3 * BLOCKS else MANY_WARPS
    return SkinnyTile(row_groups, a_groups, warps, max(1, min(4, WORDS // slot)))


def likely_tiles(descriptor: SegmentedMatmulDescriptor) -> list[SkinnyTile]:
    """The estimate, and its neighbours: more or fewer rows of B in a block, more loads under way, other warps."""
    estimate, pieces = tile_of(descriptor), len(pieces_of(descriptor))
    sides = 2 if descriptor.gated else 1
    found = [
        estimate,
        replace(estimate, row_groups=2 * estimate.row_groups, unroll=max(1, estimate.unroll // 2)),
        replace(estimate, row_groups=estimate.row_groups // 2, unroll=2 * estimate.unroll),
        replace(estimate, unroll=2 * estimate.unroll),
        replace(estimate, warps=FEW_WARPS if estimate.warps == MANY_WARPS else MANY_WARPS),
    ]

    def fits(tile: SkinnyTile) -> bool:
        in_reach = tile.words(pieces) <= MOST_WORDS and tile.shared_bytes(pieces) <= SHARED_BYTES
        return tile == estimate or (tile.row_groups >= sides and in_reach)

    return [tile for tile in dict.fromkeys(found) if fits(tile)]


def choose_tile(descriptor: SegmentedMatmulDescriptor, device: Device) -> SkinnyTile:
    """The fastest of the likely tiles, measured once for a class of problems; see ``plans.core.tuning``."""
    ks, ranks = (tuple(s.k for s in descriptor.segments), tuple(term.rank for term in descriptor.low_rank))
    problem = (descriptor.m, descriptor.n, ks, ranks, descriptor.batch or 1, descriptor.gated)
    return tuned(
        device,
        "matmul skinny",
        problem,
        likely_tiles(descriptor),
        lambda tile: program_seconds(descriptor, device, SkinnyProgram(descriptor, device, tile)),
    )


def _blocks(descriptor: SegmentedMatmulDescriptor, tile: SkinnyTile) -> tuple[int, int]:
    """Tiles of one result, and blocks of the batch."""
    tiles = -(-descriptor.columns // (tile.rows // 2 if descriptor.gated else tile.rows))
    return tiles, tiles * (1 if descriptor.batch is None else descriptor.batch)


def _refuses(descriptor: SegmentedMatmulDescriptor) -> str:
    if descriptor.m > MOST_ROWS:
        return f"wants at most {MOST_ROWS} rows, found {descriptor.m}"
    first = descriptor.segments[0]
    for segment, operands in zip(descriptor.segments, descriptor.segment_operands, strict=True):
        if segment.layout != "NT":
            return f"wants layout NT, found {segment.layout}"
        if segment.a is not segment.b or segment.a is not first.a or segment.a not in _KINDS:
            return f"wants A and B of all segments bf16 or all fp16, found {segment.a.value} and {segment.b.value}"
        strides = [stride for operand in operands for stride in operand.strides[:-1]]
        if any(value % UNIT for value in (segment.k, *strides)):
            return f"wants k and strides in multiples of {UNIT} elements, found {segment.k} and {strides}"
    for term in descriptor.low_rank:
        if term.element is not first.a or term.rank % UNIT:
            return f"wants low-rank terms of {first.a.value} with ranks in multiples of {UNIT}, found {term}"
    needed = tile_of(descriptor).shared_bytes(len(pieces_of(descriptor)))
    if needed > SHARED_BYTES:
        return f"the low-rank terms need {needed} bytes of shared memory, wanted at most {SHARED_BYTES}"
    blocks = _blocks(descriptor, tile_of(descriptor))[1]
    return f"wants fewer than 2**31 blocks, found {blocks}" if blocks > MOST_BLOCKS else ""


def _guarantee(descriptor: SegmentedMatmulDescriptor) -> PrecisionGuarantee:
    terms = len(descriptor.segments) + len(descriptor.low_rank)
    derivation = (
        "the tensor core truncates each aligned term at fp32's last place (2 units a term), low-rank terms' second "
        "product rounds twice a rank; each segment's scale 4, the sums of eight warps 8, alignment 8; then the epilogue"
    )
    units = 2.0 * descriptor.depth + 4.0 * terms + 16.0
    return matmul_guarantee(descriptor, MathPrecision.BF16_TENSOR_CORE, units, derivation)


class SkinnyProgram(MatmulProgram):
    """One launch."""

    def __init__(self, descriptor: SegmentedMatmulDescriptor, device: Device, tile: SkinnyTile | None = None) -> None:
        super().__init__(descriptor, device)
        self.pieces = pieces_of(descriptor)
        if self.empty:
            return
        tile = tile or choose_tile(descriptor, device)
        self.tiles, blocks = _blocks(descriptor, tile)
        problem = SkinnyProblem(
            descriptor.segments[0].a.value,
            len(descriptor.segments),
            tuple(descriptor.low_rank[piece.term].of for piece in self.pieces),
            descriptor.out.value,
            kernel_steps(descriptor),
            is_wide(descriptor),
            self._late(),
        )
        self.launch = matmul_skinny(problem, tile).launcher((blocks, 1, 1), overlaps=problem.late > 0)

    def bind(self, args: SegmentedMatmulArgs, workspace: Workspace) -> Launches:
        """The launch; none where Y is empty."""
        if self.empty:
            return []
        low_rank = [value for piece in self.pieces for value in self._low_rank(args, piece)]
        # A low-rank term's A belongs to a segment by number, so segments keep their order.
        order = None if self.pieces else sorted(self.smallest_first(args), key=self._is_late)
        shared = {term.of for term in self.descriptor.low_rank}
        segments = self.segment_arguments(args, order, shared)
        head = (self.tiles, *self.result_arguments(args), *segments)
        return [(self.launch, (*head, *low_rank, *self.epilogue_arguments(args)))]

    def _is_late(self, number: int) -> bool:
        return self.descriptor.segments[number].late

    def _late(self) -> int:
        """How many segments, the last ones, wait for the launch before; none where their order is given."""
        if self.pieces or self.device.arch < (9, 0):
            return 0
        return sum(segment.late for segment in self.descriptor.segments)

    def _low_rank(self, args: SegmentedMatmulArgs, piece: _Piece) -> tuple:
        """D, U, rank, row strides, batch strides, scale."""
        (down, up), scale = args.low_rank[piece.term], args.low_rank_scales[piece.term]
        d_stride, u_stride = down.shape[1], up.shape[1]
        return (
            element_offset(down, piece.first * d_stride),
            element_offset(up, piece.first),
            piece.rank if scale else 0,
            d_stride,
            u_stride,
            0,
            0,
            np.float32(scale),
        )


SKINNY = Sku(
    name="skinny",
    backend=BackendKind.SKINNY,
    arch=ArchSku.SM80,
    refuses=_refuses,
    guarantee=_guarantee,
    build=SkinnyProgram,
    alignment=16,
)
