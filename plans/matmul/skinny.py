"""The skinny SKU of the matmul family: up to 16 rows of A, bound by reading B."""

from __future__ import annotations

from dataclasses import replace

from kernels.matmul.skinny import SkinnyProblem, matmul_skinny
from kernels.matmul.skinny_sums import GROUP, SkinnyTile
from kernels.target import SIMULATOR
from plans.core.device import Device
from plans.core.plan import Launches, Sku
from plans.core.precision import ElementKind, MathPrecision, PrecisionGuarantee
from plans.core.sku import ArchSku, BackendKind, begins_early
from plans.core.tuning import tuned
from plans.core.workspace import Workspace
from plans.matmul.descriptor import SegmentedMatmulArgs, SegmentedMatmulDescriptor
from plans.matmul.measure import program_seconds
from plans.matmul.mma import UNIT, is_wide
from plans.matmul.program import MOST_BLOCKS, MatmulProgram, kernel_steps, matmul_guarantee, refuses_low_rank

FEW_WARPS, MANY_WARPS = (1, 2) if SIMULATOR else (4, 8)
"""Warps of a block where there are blocks enough for every multiprocessor to run several, and where there are not."""
BLOCKS = 1 if SIMULATOR else 128
"""Blocks that keep every multiprocessor reading."""
_LATE_ROW_GROUPS = 4
MOST_ROWS = 16
WORDS, MOST_WORDS = 64, 180
SHARED_BYTES = 47 << 10
_KINDS = (ElementKind.BF16, ElementKind.F16)


def tile_of(descriptor: SegmentedMatmulDescriptor) -> SkinnyTile:
    """Two groups of rows of B in a block, so that A is read seldom, where that leaves enough blocks; four of many rows,
    where every block waits for late operands in the end.
    """
    a_groups, blocks_of = 1 if descriptor.m <= 8 else 2, descriptor.n * (descriptor.batch or 1) // GROUP
    late = a_groups > 1 and any(segment.late for segment in descriptor.segments)
    if late and 2 * blocks_of >= 3 * BLOCKS * _LATE_ROW_GROUPS:
        return SkinnyTile(_LATE_ROW_GROUPS, a_groups, FEW_WARPS, 2)
    row_groups = 2 if descriptor.gated or blocks_of // 2 >= BLOCKS else 1
    slot = 8 * row_groups + 4 * a_groups
    warps = FEW_WARPS if blocks_of // row_groups >= 3 * BLOCKS else MANY_WARPS
    return SkinnyTile(row_groups, a_groups, warps, max(1, min(4, WORDS // slot)))


def likely_tiles(descriptor: SegmentedMatmulDescriptor) -> list[SkinnyTile]:
    """The estimate, and its neighbours: more or fewer rows of B in a block, more loads under way, other warps."""
    estimate, sides = tile_of(descriptor), 2 if descriptor.gated else 1
    rows, unroll, less = estimate.row_groups, estimate.unroll, max(1, estimate.unroll // 2)
    other = FEW_WARPS if estimate.warps == MANY_WARPS else MANY_WARPS
    found = [
        estimate,
        replace(estimate, row_groups=2 * rows, unroll=less),
        replace(estimate, row_groups=2 * rows),
        replace(estimate, row_groups=rows // 2, unroll=2 * unroll),
        replace(estimate, row_groups=rows // 2, warps=other, unroll=2 * unroll),
        replace(estimate, unroll=2 * unroll),
        replace(estimate, warps=other),
        replace(estimate, warps=2 * estimate.warps, unroll=less),
    ]

    def fits(tile: SkinnyTile) -> bool:
        in_reach = tile.words <= MOST_WORDS and tile.shared_bytes <= SHARED_BYTES
        return tile == estimate or (tile.row_groups >= sides and in_reach)

    return [tile for tile in dict.fromkeys(found) if fits(tile)]


def choose_tile(descriptor: SegmentedMatmulDescriptor, device: Device) -> SkinnyTile:
    """The fastest of the likely tiles, measured once for a class of problems; see ``plans.core.tuning``."""
    ks = tuple(segment.k for segment in descriptor.segments)
    problem = (descriptor.m, descriptor.n, ks, descriptor.batch or 1, descriptor.gated)
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
    if reason := refuses_low_rank(descriptor):
        return reason
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
    blocks = _blocks(descriptor, tile_of(descriptor))[1]
    return f"wants fewer than 2**31 blocks, found {blocks}" if blocks > MOST_BLOCKS else ""


def _guarantee(descriptor: SegmentedMatmulDescriptor) -> PrecisionGuarantee:
    derivation = (
        "the tensor core truncates each aligned term at fp32's last place (2 units a term); each segment's scale 4, "
        "the sums of sixteen warps 16, alignment 8; then the epilogue"
    )
    units = 2.0 * descriptor.depth + 4.0 * len(descriptor.segments) + 24.0
    return matmul_guarantee(descriptor, MathPrecision.BF16_TENSOR_CORE, units, derivation)


class SkinnyProgram(MatmulProgram):
    """One launch, which may begin before the launch that makes its late operands has ended (sm_90)."""

    def __init__(self, descriptor: SegmentedMatmulDescriptor, device: Device, tile: SkinnyTile | None = None) -> None:
        super().__init__(descriptor, device)
        if self.empty:
            return
        tile = tile or choose_tile(descriptor, device)
        self.tiles, blocks = _blocks(descriptor, tile)
        early = sum(not segment.late for segment in descriptor.segments) % len(descriptor.segments)
        # Several blocks a multiprocessor, placed while another grid ends, would queue where that has ended first.
        overlaps = begins_early(device) and (early > 0 or blocks <= device.multiprocessors)
        problem = SkinnyProblem(
            descriptor.segments[0].a.value,
            len(descriptor.segments),
            descriptor.out.value,
            kernel_steps(descriptor),
            is_wide(descriptor),
            early if overlaps else None,
        )
        self.launch = matmul_skinny(problem, tile).launcher((blocks, 1, 1), overlaps=overlaps)

    def bind(self, args: SegmentedMatmulArgs, workspace: Workspace) -> Launches:
        """The launch; none where Y is empty."""
        if self.empty:
            return []
        order = sorted(self.smallest_first(args), key=lambda i: self.descriptor.segments[i].late)
        head = (self.tiles, *self.result_arguments(args), *self.segment_arguments(args, order))
        return [(self.launch, (*head, *self.epilogue_arguments(args)))]


SKINNY = Sku(
    name="skinny",
    backend=BackendKind.SKINNY,
    arch=ArchSku.SM80,
    refuses=_refuses,
    guarantee=_guarantee,
    build=SkinnyProgram,
    alignment=16,
)
