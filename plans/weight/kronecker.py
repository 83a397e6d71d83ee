"""The vector SKU of the weight family: one Kronecker product whose w2 is kept in registers over several blocks."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from kernels.division import reciprocal_of
from kernels.weight import kronecker as kernel
from kernels.weight import low_rank_runs
from plans.core.device import Device
from plans.core.plan import Sku
from plans.core.precision import ElementKind, PrecisionGuarantee
from plans.core.sku import ArchSku, BackendKind
from plans.core.workspace import Workspace
from plans.weight.descriptor import Sink, WeightArgs, WeightDescriptor, WeightLayout
from plans.weight.portable import fp32_guarantee
from plans.weight.program import Launches, WeightProgram, prepared_bytes
from plans.weight.resolve import factor_data, resolve
from plans.weight.sources import Kronecker, LowRank
from plans.weight.tile import product_of, settles, tensor_core_guarantee

BLOCKS_PER_MULTIPROCESSOR = 40
LEAST_RUNS = 32
LEAST_ELEMENTS = 1 << 22
LEAST_ELEMENTS_IN_GROUP = 1 << 20


def refuses(descriptor: WeightDescriptor) -> str:
    """Why the Kronecker kernel cannot compute a descriptor, or ""."""
    if len(descriptor.sources) != 1 or not isinstance(descriptor.sources[0], Kronecker):
        return "wants exactly one Kronecker source"
    source = descriptor.sources[0]
    if descriptor.sink not in (Sink.DELTA, Sink.MERGE):
        return "computes deltas and merges, not DoRA"
    if descriptor.layout is not WeightLayout.CHECKPOINT:
        return "wants checkpoint layout [out, in, *kernel]"
    if 0 in descriptor.matrix:
        return "an empty weight is left to the portable SKU"
    row = source.d * descriptor.taps
    if row % 8:
        return f"wants rows of w2 in multiples of 8 elements (16-byte accesses), found {row}"
    if source.b * source.c * row // 8 >= 1 << 31 or source.a >= 1 << 16:
        return f"wants a block row of fewer than 2**34 elements and w1 of fewer than 2**16 rows, found {source}"
    if _share(source, row // 8)[2] >= 1 << 16:
        return f"wants w2 in fewer than 2**16 tiles, found {source}"
    return _refuses_product(descriptor, source, row) if _multiplies(source) else ""


def _multiplies(source: Kronecker) -> bool:
    """Whether the kernel multiplies w2 out; one with a Tucker core is contracted before."""
    return isinstance(source.w2, LowRank) and source.w2.core is None


def _refuses_product(descriptor: WeightDescriptor, source: Kronecker, row: int) -> str:
    """Why warps cannot multiply w2 out in registers, or ""."""
    left, right = source.w2.left, source.w2.right
    if left is not right or left is ElementKind.F32:
        return f"wants both factors of w2 in bf16 or both in fp16, found {left.value} and {right.value}"
    if not 0 < source.w2.rank <= low_rank_runs.MAX_RANK:
        return f"wants w2 of rank 1 to {low_rank_runs.MAX_RANK}, found {source.w2.rank}"
    rows, columns = low_rank_runs.ROWS, 8 * low_rank_runs.RUNS
    if source.c % rows or _span(source, row // 8) * row % columns:
        return f"wants w2, side by side for some blocks, in pieces of {rows} rows and {columns} columns, found {source}"
    return "settled products are computed by the mma SKU" if settles(descriptor) else ""


def suits(descriptor: WeightDescriptor) -> bool:
    """Whether there is enough to walk over; small weights are faster in tiles."""
    return _enough(descriptor, LEAST_ELEMENTS)


def suits_in_group(descriptor: WeightDescriptor) -> bool:
    """The same for a member of a group, where the other members' blocks hide what a short walk waits for."""
    prepared = any(resolved.contractions for resolved in resolve(descriptor, _fused(descriptor)))
    return not prepared and _enough(descriptor, LEAST_ELEMENTS_IN_GROUP)


def _enough(descriptor: WeightDescriptor, least: int) -> bool:
    """Whether a weight is that large, and there are bases to wait for while w2 is multiplied out."""
    rows, columns = descriptor.matrix
    return rows * columns >= least and (descriptor.base is not None or not _fused(descriptor))


def _fused(descriptor: WeightDescriptor) -> bool:
    """Whether w2 stays two factors."""
    return isinstance(descriptor.sources[0], Kronecker) and _multiplies(descriptor.sources[0])


@dataclass(frozen=True)
class _Walk:
    """How thread blocks share w2 and the blocks of the weight."""

    slots: int
    span: int
    tiles: int
    chunk: int
    chunks: int
    ragged: bool


def _span(source: Kronecker, runs: int) -> int:
    """How many neighbouring blocks neighbouring threads take, so that together they write LEAST_RUNS runs.

    Warps that multiply need whole ones for all of their lanes.
    """
    divisors = [s for s in range(1, source.b + 1) if source.b % s == 0]
    whole = low_rank_runs.RUNS if _multiplies(source) else 1
    return next((s for s in divisors if s * runs >= LEAST_RUNS and s * runs % whole == 0), divisors[-1])


def _rows_of_thread(height: int, runs: int) -> int:
    """How many rows of w2 a thread keeps: as many as leave hardly more threads idle than fewer would."""

    def used(rows: int) -> float:
        threads = -(-height // rows) * runs
        return height * runs / (rows * kernel.THREADS * -(-threads // kernel.THREADS))

    return max((4, 2, 1), key=lambda rows: (used(rows) + 0.025 * rows, rows))


def _share(source: Kronecker, runs: int) -> tuple[int, int, int]:
    """Neighbouring blocks and rows of w2 that a thread is given, and thread blocks for all of w2."""
    span = _span(source, runs)
    slots = low_rank_runs.SLOTS if _multiplies(source) else _rows_of_thread(source.c, runs * span)
    return span, slots, -(-_threads(source, runs, span, slots) // kernel.THREADS)


def _threads(source: Kronecker, runs: int, span: int, slots: int) -> int:
    return -(-source.c // slots) * runs * span


def _walk(source: Kronecker, runs: int, device: Device) -> _Walk:
    span, slots, tiles = _share(source, runs)
    batch, steps = kernel.RUNS_IN_BATCH // slots, source.b // span
    chunk = 2 * batch
    wanted = BLOCKS_PER_MULTIPROCESSOR * device.multiprocessors
    while 2 * chunk <= steps and tiles * source.a * -(-steps // (2 * chunk)) >= wanted:
        chunk *= 2
    ragged = source.c % slots != 0 or _threads(source, runs, span, slots) % kernel.THREADS != 0 or steps % batch != 0
    return _Walk(slots, span, tiles, chunk, -(-steps // chunk), ragged)


class KroneckerProgram(WeightProgram):
    """One launch."""

    def __init__(self, descriptor: WeightDescriptor, device: Device) -> None:
        self.fused_second_half = _fused(descriptor)
        super().__init__(descriptor, device)
        source: Kronecker = descriptor.sources[0]
        self.source, self.runs = source, source.d * descriptor.taps // 8
        self.walk = walk = _walk(source, self.runs, device)
        base = None if descriptor.base is None else descriptor.base.value
        _, first, *second = self.resolved[0].kernel
        if self.fused_second_half:
            second = [product_of(*second, *self.resolved[0].numbers[1][:3])]
        kinds = (base, descriptor.out.value, first, *second)
        choices = (*kinds, descriptor.check_finite, walk.slots, walk.ragged, self.early)
        self.grid = (walk.chunks, walk.tiles, source.a)
        self.kernel = kernel.kronecker_merge(*choices)
        if not self.contractions:
            self.group_kernel = kernel.kronecker_merge_grouped(*choices)

    def weight_launches(self, args: WeightArgs, workspace: Workspace) -> Launches:
        """The merge."""
        return [(self.merge, self.arguments(args, workspace))]

    def arguments(self, args: WeightArgs, workspace: Workspace) -> tuple:
        """Base, out, w1, w2, the walk, w2's shape, scale, flag."""
        factors = itertools.chain.from_iterable(self.resolved[0].factors)
        factors = [factor_data(factor, args.factors[0], workspace.buffer) for factor in factors]
        product = itertools.chain.from_iterable(self.resolved[0].numbers[1:])
        base = (args.base or args.out).data
        b, span, runs = self.source.b, self.walk.span, self.runs
        reciprocals = reciprocal_of(span * runs), reciprocal_of(runs)
        numbers = (b, span, b // span, self.walk.chunk, self.source.c, runs, *reciprocals)
        return (base, args.out.data, *factors, *product, *numbers, np.float32(args.scales[0]), self.flag(args))


def _guarantee(descriptor: WeightDescriptor) -> PrecisionGuarantee:
    return tensor_core_guarantee(descriptor) if _fused(descriptor) else fp32_guarantee(descriptor)


VECTOR = Sku(
    name="vector",
    backend=BackendKind.VECTOR,
    arch=ArchSku.SM80,
    refuses=refuses,
    guarantee=_guarantee,
    build=KroneckerProgram,
    workspace=lambda descriptor: prepared_bytes(descriptor, _fused(descriptor)),
    alignment=16,
    suits=suits,
)
