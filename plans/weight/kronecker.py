"""The vector SKU of the weight family: one Kronecker product, w2 in registers over several blocks of the weight."""

from __future__ import annotations

import numpy as np

from kernels import kronecker as kernel
from plans.core.device import Device
from plans.core.plan import Sku
from plans.core.sku import ArchSku, BackendKind
from plans.core.workspace import Workspace
from plans.weight.descriptor import Sink, WeightArgs, WeightDescriptor, WeightLayout
from plans.weight.portable import fp32_guarantee
from plans.weight.program import Launches, WeightProgram, flat_factors, prepared_bytes
from plans.weight.sources import Kronecker

BLOCKS_PER_MULTIPROCESSOR = 10


def rows_of_thread(height: int, runs: int) -> int:
    """How many rows of w2 a thread keeps: the most that leave no more threads idle than fewer would, by a tenth."""

    def used(rows: int) -> float:
        threads = -(-height // rows) * runs
        return height * runs / (rows * kernel.THREADS * -(-threads // kernel.THREADS))

    return max((4, 2, 1), key=lambda rows: (used(rows) + 0.025 * rows, rows))


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
    if row % 8:
        return f"wants rows of w2 in multiples of 8 elements (16-byte accesses), found {row}"
    if source.c * row // 8 >= 1 << 31 or source.a >= 1 << 16:
        return f"wants w2 of fewer than 2**34 elements and w1 of fewer than 2**16 rows, found {source}"
    return ""


class KroneckerProgram(WeightProgram):
    """One launch."""

    fused_second_half = True

    def __init__(self, descriptor: WeightDescriptor, device: Device) -> None:
        super().__init__(descriptor, device)
        source: Kronecker = descriptor.sources[0]
        self.source, self.runs = source, source.d * descriptor.taps // 8
        rows = rows_of_thread(source.c, self.runs)
        threads = -(-source.c // rows) * self.runs
        self.tiles = max(1, -(-threads // kernel.THREADS))
        batch = kernel.RUNS_IN_BATCH // rows
        self.chunk = self._chunk(device, batch)
        self.chunks = max(1, -(-source.b // self.chunk))
        ragged = source.b % batch != 0 or source.c % rows != 0 or threads % kernel.THREADS != 0
        base = None if descriptor.base is None else descriptor.base.value
        self.kinds = (base, descriptor.out.value, *self.resolved[0].kernel[1:], descriptor.check_finite, rows, ragged)
        grid = (self.tiles, max(1, source.a), self.chunks)
        self.merge = kernel.kronecker_merge(*self.kinds).launcher(grid)

    def _chunk(self, device: Device, batch: int) -> int:
        """How many of the b blocks one thread block walks over: long walks while the device stays full."""
        chunk = 2 * batch
        wanted = BLOCKS_PER_MULTIPROCESSOR * device.multiprocessors
        while 2 * chunk <= self.source.b and self.tiles * self.source.a * -(-self.source.b // (2 * chunk)) >= wanted:
            chunk *= 2
        return chunk

    def weight_launches(self, args: WeightArgs, workspace: Workspace) -> Launches:
        """The merge."""
        return [(self.merge, self.arguments(args, workspace))]

    def arguments(self, args: WeightArgs, workspace: Workspace) -> tuple:
        """The kernel's flat parameters."""
        w1, *second = flat_factors(self.resolved[0], args.factors[0], workspace)
        base = (args.base or args.out).data
        numbers = (self.source.b, self.chunk, self.source.c, self.runs)
        return (base, args.out.data, w1, *numbers, np.float32(args.scales[0]), self.flag(args), *second)


VECTOR = Sku(
    name="vector",
    backend=BackendKind.VECTOR,
    arch=ArchSku.ANY,
    refuses=refuses,
    guarantee=fp32_guarantee,
    build=KroneckerProgram,
    workspace=lambda d: prepared_bytes(d, fused_second_half=True),
    alignment=16,
)
