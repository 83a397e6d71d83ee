"""The vector SKU of the weight family: one Kronecker product, w2 in registers over several blocks of the weight."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kernels import kronecker as kernel
from plans.core.device import Device
from plans.core.plan import Sku
from plans.core.precision import PrecisionGuarantee
from plans.core.sku import ArchSku, BackendKind
from plans.core.workspace import Workspace
from plans.weight.descriptor import Sink, WeightArgs, WeightDescriptor, WeightLayout
from plans.weight.portable import fp32_guarantee
from plans.weight.program import Launches, WeightProgram, flat_factors, prepared_bytes
from plans.weight.resolve import resolve
from plans.weight.sources import Kronecker
from plans.weight.tile import product_shape, tensor_core_guarantee

BLOCKS_PER_MULTIPROCESSOR = 20
LEAST_RUNS = 32
MAX_SHARED_BYTES = 128 * 1024


def refuses(descriptor: WeightDescriptor) -> str:
    """Why the Kronecker kernel cannot compute a descriptor, or ""."""
    if len(descriptor.sources) != 1 or not isinstance(descriptor.sources[0], Kronecker):
        return "wants exactly one Kronecker source"
    source = descriptor.sources[0]
    if descriptor.sink not in (Sink.DELTA, Sink.MERGE):
        return "computes deltas and merges, not DoRA"
    if descriptor.layout is not WeightLayout.CHECKPOINT:
        return "wants checkpoint layout [out, in, *kernel]"
    row = source.d * descriptor.taps
    if 0 in (source.a, source.b, source.c, row):
        return "an empty weight is computed by the portable SKU"
    if row % 8:
        return f"wants rows of w2 in multiples of 8 elements (16-byte accesses), found {row}"
    if source.b * source.c * row // 8 >= 1 << 31 or source.a >= 1 << 16:
        return f"wants a block row of fewer than 2**34 elements and w1 of fewer than 2**16 rows, found {source}"
    base, second = _base_name(descriptor), _second(descriptor)
    if second[0] == "low_rank" and resolve(descriptor, fused_second_half=True)[0].numbers[0][0] == 0:
        return "a product of rank 0 is computed by the portable SKU"
    if kernel.shared_bytes(base, second) > MAX_SHARED_BYTES:
        return f"the rank of w2 needs more than {MAX_SHARED_BYTES} bytes of shared memory"
    return ""


def _base_name(descriptor: WeightDescriptor) -> str | None:
    return None if descriptor.base is None else descriptor.base.value


def _second(descriptor: WeightDescriptor) -> tuple:
    """The kernel's name of w2."""
    resolved = resolve(descriptor, fused_second_half=True)[0]
    second = resolved.kernel[2]
    return second if second[0] == "full" else (*second, product_shape(*resolved.numbers[0][:3]))


def guarantee(descriptor: WeightDescriptor) -> PrecisionGuarantee:
    """fp32 for a full w2, tensor cores for its factors."""
    return (fp32_guarantee if _second(descriptor)[0] == "full" else tensor_core_guarantee)(descriptor)


@dataclass(frozen=True)
class _Walk:
    """How thread blocks share w2 and the blocks of the weight."""

    slots: int
    span: int
    tiles: int
    chunk: int
    chunks: int
    ragged: bool


def _spans(source: Kronecker, runs: int) -> int:
    """How many neighbouring blocks neighbouring threads take, so that together they write LEAST_RUNS runs."""
    divisors = [s for s in range(1, source.b + 1) if source.b % s == 0]
    return next((s for s in divisors if s * runs >= LEAST_RUNS), divisors[-1])


def _walk(source: Kronecker, runs: int, fragment: bool, device: Device) -> _Walk:
    if fragment:
        slots, span = kernel.FRAGMENT_SLOTS, 1
        tiles = -(-source.c // (16 * kernel.WARPS)) * -(-runs // kernel.FRAGMENT_RUNS)
        even = source.c % (16 * kernel.WARPS) == 0 and runs % kernel.FRAGMENT_RUNS == 0
    else:
        span = _spans(source, runs)
        slots = _rows_of_thread(source.c, runs * span)
        threads = -(-source.c // slots) * runs * span
        tiles = -(-threads // kernel.THREADS)
        even = source.c % slots == 0 and threads % kernel.THREADS == 0
    batch = kernel.RUNS_IN_BATCH // slots
    steps = source.b // span
    chunk = 2 * batch
    wanted = BLOCKS_PER_MULTIPROCESSOR * device.multiprocessors
    while 2 * chunk <= steps and tiles * source.a * -(-steps // (2 * chunk)) >= wanted:
        chunk *= 2
    return _Walk(slots, span, max(1, tiles), chunk, max(1, -(-steps // chunk)), not even or steps % batch != 0)


def _rows_of_thread(height: int, runs: int) -> int:
    """How many rows of w2 a thread keeps: as many as leave hardly more threads idle than fewer would."""

    def used(rows: int) -> float:
        threads = -(-height // rows) * runs
        return height * runs / (rows * kernel.THREADS * -(-threads // kernel.THREADS))

    return max((4, 2, 1), key=lambda rows: (used(rows) + 0.025 * rows, rows))


class KroneckerProgram(WeightProgram):
    """One launch."""

    fused_second_half = True

    def __init__(self, descriptor: WeightDescriptor, device: Device) -> None:
        super().__init__(descriptor, device)
        source: Kronecker = descriptor.sources[0]
        self.source, self.runs = source, source.d * descriptor.taps // 8
        second = _second(descriptor)
        self.walk = walk = _walk(source, self.runs, second[0] != "full", device)
        first = self.resolved[0].kernel[1]
        self.kinds = (_base_name(descriptor), descriptor.out.value, first, second, descriptor.check_finite)
        made = kernel.kronecker_merge(*self.kinds, walk.slots, walk.ragged)
        self.merge = made.launcher((walk.tiles, max(1, source.a), walk.chunks))

    def weight_launches(self, args: WeightArgs, workspace: Workspace) -> Launches:
        """The merge."""
        return [(self.merge, self.arguments(args, workspace))]

    def arguments(self, args: WeightArgs, workspace: Workspace) -> tuple:
        """The kernel's flat parameters."""
        w1, *second = flat_factors(self.resolved[0], args.factors[0], workspace)
        base = (args.base or args.out).data
        numbers = (self.source.b, self.walk.span, self.walk.chunk, self.source.c, self.runs)
        return (base, args.out.data, w1, *numbers, np.float32(args.scales[0]), self.flag(args), *second)


VECTOR = Sku(
    name="vector",
    backend=BackendKind.VECTOR,
    arch=ArchSku.SM80,
    refuses=refuses,
    guarantee=guarantee,
    build=KroneckerProgram,
    workspace=lambda d: prepared_bytes(d, fused_second_half=True),
    alignment=16,
)
