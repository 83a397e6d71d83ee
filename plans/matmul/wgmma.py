"""The wgmma SKU of the matmul family (sm_90a): TMA, warp-specialised persistent blocks, any number of segments."""

from __future__ import annotations

import functools
from dataclasses import replace

import numpy as np

from kernels.matmul.wgmma import multiply_wgmma
from kernels.matmul.wgmma_store import STAGING_BYTES, WARP_ROWS, chunk_columns
from kernels.matmul.wgmma_tile import (
    DIAGONAL,
    DIAGONAL_COLUMNS,
    GROUPS,
    LETS,
    PART_WORDS,
    ROWS,
    SEGMENT_WORDS,
    WAITS,
    WgmmaTile,
)
from kernels.target import HOPPER_SHARED_BYTES, SIMULATOR
from kernels.wgmma import DEPTH, STEPS
from plans.core.device import Device
from plans.core.operand import Operand
from plans.core.plan import Launches, Sku
from plans.core.precision import ElementKind, MathPrecision, PrecisionGuarantee
from plans.core.sku import ArchSku, BackendKind
from plans.core.tensor import TensorRef
from plans.core.tensor_map import Box, constants, map_address
from plans.core.tuning import tuned
from plans.core.workspace import Workspace
from plans.matmul.column_groups import extents, groups_of, own_blocks
from plans.matmul.descriptor import Segment, SegmentedMatmulArgs, SegmentedMatmulDescriptor
from plans.matmul.measure import program_seconds
from plans.matmul.program import MatmulProgram, kernel_steps, matmul_guarantee, refuses_low_rank

PANEL_ROWS = 2048
"""Rows that blocks running together go through before they turn to the next columns: theirs of A stay in L2."""

MEASURED = 4
"""How many tiles are measured: those that are likely the fastest."""

_KINDS = (ElementKind.BF16, ElementKind.F16)
_COLUMNS = (256, 192, 160, 128, 96, 64)
_LARGEST = 1 << 31
# What the choice of a tile reckons with, in cycles: a stage's products, its bytes from L2, and a tile's beginning and
# end, when its products do not run.
_CYCLES_A_COLUMN, _BYTES_A_CYCLE, TILE_CYCLES = 4.0, 40.0, 1500.0


def _row_strides(descriptor: SegmentedMatmulDescriptor) -> list[Operand]:
    return [operand for pair in descriptor.segment_operands for operand in pair]


def _refuses(descriptor: SegmentedMatmulDescriptor) -> str:
    if reason := refuses_low_rank(descriptor):
        return reason
    first = descriptor.segments[0]
    kinds = {segment.a for segment in descriptor.segments} | {segment.b for segment in descriptor.segments}
    if len(kinds) > 1 or first.a not in _KINDS:
        return f"wants all factors bf16 or all fp16, found {', '.join(sorted(kind.value for kind in kinds))}"
    if len(layouts := {segment.layout for segment in descriptor.segments}) > 1:
        return f"wants one layout for all segments, found {', '.join(sorted(layouts))}"
    if max(descriptor.m, descriptor.n, descriptor.depth) >= _LARGEST:
        return f"wants fewer than 2**31 rows, columns and terms, found {descriptor.m} x {descriptor.n}"
    for operand in _row_strides(descriptor):
        if any(stride * operand.element.itemsize % 16 for stride in operand.strides[:-1]):
            return f"TMA wants rows of {operand.name} a multiple of 16 bytes apart, found strides {operand.strides}"
    if descriptor.gated and not first.b_transposed and descriptor.columns * first.b.itemsize % 16:
        return f"TMA wants a gate's halves of B's rows a multiple of 16 bytes apart, found {descriptor.columns} values"
    return ""


def _suits(descriptor: SegmentedMatmulDescriptor) -> bool:
    """Whether there are rows enough for tiles of 128; the simulator's 384 threads are for tests that ask for them."""
    return not SIMULATOR and descriptor.m > ROWS // 2


def _guarantee(descriptor: SegmentedMatmulDescriptor) -> PrecisionGuarantee:
    units = 2.0 * descriptor.depth + 3.0 * len(descriptor.segments)
    derivation = (
        "the tensor core truncates each aligned term at fp32's last place (2 units a term); for each segment its "
        "scale's rounding, a product and a sum; then the epilogue's steps"
    )
    return matmul_guarantee(descriptor, MathPrecision.BF16_TENSOR_CORE, units, derivation)


def _stores_by_tma(descriptor: SegmentedMatmulDescriptor) -> bool:
    """Whether the result's rows lie as TMA wants them, and operands of the epilogue as pairs of columns."""
    out = descriptor.operands()[0]
    if descriptor.columns % 2 or any(stride * out.element.itemsize % 16 for stride in out.strides[:-1]):
        return False
    return all(stride % 2 == 0 for o in descriptor.step_operands if o is not None for stride in o.strides[:-1])


def stages_of(tile: WgmmaTile, staging: int) -> int:
    """As many as shared memory has room for beside ``staging`` bytes."""
    return min(8, (HOPPER_SHARED_BYTES - staging) // (tile.stage_bytes + 16))


def stage_cycles(tile: WgmmaTile) -> float:
    """Cycles of a stage: its products', or its bytes' from L2."""
    from_l2 = tile.a_bytes + tile.columns * DEPTH * 2 / tile.cluster
    return max(_CYCLES_A_COLUMN * tile.columns, from_l2 / _BYTES_A_CYCLE)


def product_cycles(
    descriptor: SegmentedMatmulDescriptor, tile: WgmmaTile, multiprocessors: int, parts: int = 1
) -> float:
    """Cycles that the product, its sum in so many parts, would take on so many multiprocessors, to compare tiles by."""
    results = (descriptor.batch or 1) * parts
    tiles = -(-descriptor.m // (ROWS * tile.cluster)) * -(-descriptor.columns // tile.result_columns) * results
    waves = -(-tiles // max(1, multiprocessors // tile.cluster))
    cycles = sum(_segment_cycles(segment, tile) for segment in descriptor.segments)
    return waves * (cycles / parts + TILE_CYCLES)


def _segment_cycles(segment: Segment, tile: WgmmaTile) -> float:
    if segment.diagonal > 1 and tile.diagonal:
        blocks = tile.columns // tile.diagonal
        return blocks * segment.k / segment.diagonal / DEPTH * stage_cycles(replace(tile, columns=tile.diagonal))
    return segment.k / DEPTH * stage_cycles(tile)


def _block_columns(descriptor: SegmentedMatmulDescriptor) -> int:
    """Columns of the blocks that some segments' B consists of, where a tile can skip what lies off the diagonal."""
    blocks = {(descriptor.n // s.diagonal, s.k // s.diagonal % DEPTH) for s in descriptor.segments if s.diagonal > 1}
    plain = descriptor.segments[0].layout == "NT" and not descriptor.gated
    (columns, rest), *others = blocks or {(0, 0)}
    return 0 if others or rest or columns != DIAGONAL_COLUMNS or not plain else columns


def candidate_tiles(descriptor: SegmentedMatmulDescriptor) -> list[WgmmaTile]:
    """Tiles that can compute the product."""
    a_k_major, b_k_major = (descriptor.segments[0].layout in pair for pair in (("NT", "NN"), ("NT", "TT")))
    block = _block_columns(descriptor)
    found = tile_widths(a_k_major, b_k_major, descriptor.gated, by_depth=True)
    return [replace(tile, diagonal=block) if block and tile.columns % block == 0 else tile for tile in found]


def tile_widths(a_k_major: bool, b_k_major: bool, gated: bool, by_depth: bool = False) -> list[WgmmaTile]:
    """Tiles of one stage, of all widths and clusters that fit the majors and a gate; ``by_depth`` where the loads take
    ``depth_shares``.
    """
    found = []
    for columns in _COLUMNS:
        for cluster in (2, 1):
            tile = WgmmaTile(columns, 1, cluster, a_k_major, b_k_major, gated)
            piece = columns if by_depth and tile.depth_shares > 1 else columns // tile.pieces
            if piece % (8 if b_k_major else 64) == 0 and tile.result_columns % 32 == 0:
                found.append(tile)
    return found


def likely_tiles(descriptor: SegmentedMatmulDescriptor, multiprocessors: int, staging: int) -> list[WgmmaTile]:
    """The tiles that a count of cycles finds fastest, the best first, with as many stages as fit."""
    ranked = sorted(candidate_tiles(descriptor), key=lambda tile: product_cycles(descriptor, tile, multiprocessors))
    return [replace(tile, stages=stages_of(tile, staging)) for tile in ranked[:MEASURED]]


def _problem_class(descriptor: SegmentedMatmulDescriptor, mode: str) -> tuple:
    """What problems have in common that share a choice: rows by tiles, columns, depth by stages, kinds, layout."""
    first = descriptor.segments[0]
    depth = sum(-(-segment.k // DEPTH) for segment in descriptor.segments)
    rows, batch = -(-descriptor.m // ROWS), descriptor.batch or 1
    problem = (rows, descriptor.n, depth, batch, first.layout, descriptor.out.value, descriptor.gated, mode)
    return (*problem, _block_columns(descriptor)) if _block_columns(descriptor) else problem


@functools.lru_cache(maxsize=4096)
def choose_tile(descriptor: SegmentedMatmulDescriptor, device: Device, mode: str) -> WgmmaTile:
    """The fastest of the likely tiles, measured once for a class of problems; see ``plans.core.tuning``."""
    likely = likely_tiles(descriptor, device.multiprocessors, 0 if mode == "direct" else STAGING_BYTES)
    problem = _problem_class(descriptor, mode)

    def seconds(tile: WgmmaTile) -> float:
        return program_seconds(descriptor, device, WgmmaProgram(descriptor, device, tile))

    return tuned(device, "matmul wgmma", problem, likely, seconds)


class WgmmaProgram(MatmulProgram):
    """One launch of a persistent grid over a table of parts and segments.

    With several ``parts`` the sum is divided by depth: each part is a result of its own, all of part 0 first. A batch
    of column groups is one result.
    """

    reads_addresses = True

    def __init__(
        self, descriptor: SegmentedMatmulDescriptor, device: Device, tile: WgmmaTile | None = None, parts: int = 1
    ) -> None:
        super().__init__(descriptor, device)
        self.mode = "tma" if _stores_by_tma(descriptor) else "direct"
        self.tile = tile or choose_tile(descriptor, device, self.mode)
        self.groups = groups_of(descriptor, self.tile.columns) if parts == 1 else 1
        self.results, self.parts = (descriptor.batch or 1) // self.groups * parts, parts
        kind = descriptor.segments[0].a.value
        self.kernel = multiply_wgmma(kind, descriptor.out.value, self.tile, self.mode, kernel_steps(descriptor))
        if self.empty:
            return
        cluster = self.tile.cluster
        columns = descriptor.columns * self.groups
        tiles = -(-descriptor.m // (ROWS * cluster)) * -(-columns // self.tile.result_columns) * self.results
        self.clusters, self.tiles = max(1, min(device.multiprocessors // cluster, tiles)), tiles
        if not any(segment.late for segment in descriptor.segments):
            # No more blocks than so many turns need: what may run beside finds multiprocessors free.
            self.clusters = -(-tiles // -(-tiles // self.clusters))
        grid = (self.clusters * cluster, 1, 1)
        self.launch = self.kernel.launcher(grid)
        self.early_launch = self.kernel.launcher(grid, overlaps=True)

    def idle_multiprocessors(self) -> tuple[int, float]:
        """How many have one tile less than the others, or none at all, and the cycles that a tile takes."""
        cycles = sum(_segment_cycles(segment, self.tile) for segment in self.descriptor.segments) / self.parts
        busy = self.tiles % self.clusters or self.clusters
        return self.device.multiprocessors - busy * self.tile.cluster, cycles

    def spare(self) -> tuple[int, float]:
        """Those with a tile less, for as long as one takes."""
        if self.empty:
            return 0, 0.0
        idle, cycles = self.idle_multiprocessors()
        return idle // 2 * 2, cycles

    def bind(self, args: SegmentedMatmulArgs, workspace: Workspace) -> Launches:
        """The launch; none where Y is empty."""
        if self.empty:
            return []
        segments, batches = self.descriptor.segments, self.results // self.parts
        kept = [i for i in self.smallest_first(args) if args.scales[i] and segments[i].k]
        factor = args.scales[kept[-1]] if kept else 1.0
        shares = [self._segment_rows(args, kept, i % batches, i // batches) for i in range(self.results)]
        table = constants(self.device).pointer(self._table(args, shares))
        _, rows, columns, row_stride, _ = self.result_arguments(args)
        numbers = (self.results, rows, columns * self.groups, max(1, PANEL_ROWS // (ROWS * self.tile.cluster)))
        result = (args.out.data, row_stride, np.float32(factor))
        # A grid that waits for nothing must not begin early: it could end, and the next begin, before the one it
        # depends on.
        launch = self.early_launch if all(shares) else self.launch
        return [(launch, (table, *numbers, *result, *self.epilogue_arguments(args)))]

    def _table(self, args: SegmentedMatmulArgs, shares: list[list[tuple[int, ...]]]) -> np.ndarray:
        """Parts, then their segments."""
        out, parts, segments = self.descriptor.operands()[0], [], []
        for number, share in enumerate(shares):
            first = self.results * PART_WORDS + len(segments) * SEGMENT_WORDS
            start = number * (out.strides[0] if self.descriptor.batch else out.count)
            parts.append((first, len(share), self._result_map(args.out, out, start), start))
            segments += share
        return np.concatenate([np.array(parts, np.int64).ravel(), np.array(segments, np.int64).ravel()])

    def _segment_rows(self, args: SegmentedMatmulArgs, kept: list[int], batch: int, part: int) -> list[tuple[int, ...]]:
        """The segments of one of the batch, or what a part of the sum takes of them: so many stages in order.

        Late segments wait for the launch before; where there are none the first does.
        """
        stages, late = [self._stages(i) for i in kept], any(self.descriptor.segments[i].late for i in kept)
        begin, end = (sum(stages) * at // self.parts for at in (part, part + 1))
        found, previous, passed = [], 0.0, 0
        for i, count in zip(kept, stages, strict=True):
            first, past, passed = max(begin - passed, 0), min(end - passed, count), passed + count
            if first >= past:
                continue
            segment, scale = self.descriptor.segments[i], args.scales[i]
            waits = segment.late if late else not found
            grouped = self.groups > 1 and own_blocks(segment)
            flags = WAITS * waits + DIAGONAL * self._by_blocks(i) + LETS * self.descriptor.early + GROUPS * grouped
            start = self.descriptor.n | segment.k << 32 if grouped else first * DEPTH
            whole = -(-segment.k // DEPTH)
            last = STEPS if past < count else -(-(segment.k - (whole - 1) * DEPTH) // 16)
            found.append(
                (*self._maps(args, i, batch), past - first, last, start, _ratio(previous, scale) | flags << 32)
            )
            previous = scale
        if found and previous != args.scales[kept[-1]]:
            found.append((*found[-1][:2], 0, 0, 0, _ratio(previous, args.scales[kept[-1]])))
        return found

    def _by_blocks(self, i: int) -> bool:
        return self.tile.diagonal > 0 and self.descriptor.segments[i].diagonal > 1

    def _stages(self, i: int) -> int:
        """Stages of a segment; where only the tile's blocks of B are read, those of a block."""
        segment = self.descriptor.segments[i]
        return -(-(segment.k // (segment.diagonal if self._by_blocks(i) else 1)) // DEPTH)

    def _maps(self, args: SegmentedMatmulArgs, i: int, batch: int) -> list[int]:
        boxes = self.tile.boxes(self._by_blocks(i))
        operands, found = self.descriptor.segment_operands[i], []
        for which, (tensor, operand, box) in enumerate(zip(args.segments[i], operands, boxes, strict=True)):
            start = batch * operand.strides[0] if len(operand.shape) > 2 else 0
            shape = extents(self.descriptor.segments[i], which, operand, self.groups)
            address = tensor.address + start * operand.element.itemsize
            matrix = Box.of_matrix(address, operand.element, shape, operand.strides[-2], box)
            found.append(map_address(self.device, matrix))
        return found

    def _result_map(self, tensor: TensorRef, out: Operand, start: int) -> int:
        if self.mode == "direct":
            return 0
        address, columns = tensor.address + start * out.element.itemsize, chunk_columns(out.element.value)
        shape, box = (out.shape[-2], out.shape[-1] * self.groups), (WARP_ROWS, columns)
        return map_address(self.device, Box.of_matrix(address, out.element, shape, out.strides[-2], box, 64))


def _ratio(previous: float, scale: float) -> int:
    """The fp32 bits of the factor that turns sums in units of one scale to those of another."""
    return int(np.float32(previous / scale if previous else 1.0).view(np.uint32))


WGMMA = Sku(
    name="wgmma",
    backend=BackendKind.WGMMA,
    arch=ArchSku.SM90A,
    refuses=_refuses,
    guarantee=_guarantee,
    build=WgmmaProgram,
    alignment=16,
    suits=_suits,
)
