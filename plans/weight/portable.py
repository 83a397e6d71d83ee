"""The portable SKU of the weight family: every source, sink, layout and kind, on any GPU and in the simulator."""

from __future__ import annotations

from typing import Any

import numpy as np

from kernels.weight import portable as kernel
from plans.core.device import Device
from plans.core.plan import Sku
from plans.core.precision import ElementKind, MathPrecision, PrecisionGuarantee
from plans.core.sku import ArchSku, BackendKind
from plans.core.workspace import Workspace
from plans.weight.descriptor import Sink, WeightArgs, WeightDescriptor
from plans.weight.program import Launches, WeightProgram, gain_count, prepared_bytes

_AXIS = {Sink.DORA_ROW: "row", Sink.DORA_COLUMN: "column"}


def fp32_guarantee(descriptor: WeightDescriptor) -> PrecisionGuarantee:
    """Pairs of fp32, or few operations in one."""
    depth = sum(source.depth for source in descriptor.sources)
    return PrecisionGuarantee(
        math_precision=MathPrecision.F32,
        accumulator=ElementKind.F32,
        deterministic=True,
        bit_stable_on_same_hardware=True,
        rounding_units=2.0**-23 * depth**2 + 6.0 * len(descriptor.sources) + (16.0 if descriptor.is_dora else 2.0),
        derivation="sums keep what each term rounds away in a second word, of which depth**2 * 2**-48 of the terms is "
        "lost; for each source contracted factors are rounded, or a scale and a product (6); the sum with the base is "
        "rounded once (2); DoRA's norm tree, division and products 16",
    )


class PortableProgram(WeightProgram):
    """DoRA's gains where there are any, then one pass over the weight."""

    def __init__(self, descriptor: WeightDescriptor, device: Device) -> None:
        super().__init__(descriptor, device)
        sources = tuple(r.kernel for r in self.resolved)
        axis, layout = _AXIS.get(descriptor.sink), descriptor.layout.value
        base = None if descriptor.base is None else descriptor.base.value
        rows, columns = descriptor.matrix
        self.row_blocks = max(1, -(-columns // kernel.THREADS))
        merge = kernel.merge(base, descriptor.out.value, sources, layout, axis, descriptor.check_finite)
        self.merge = merge.launcher((max(1, rows * self.row_blocks), 1, 1))
        self.gain = None
        if descriptor.is_dora:
            gain = kernel.dora_gain(base, sources, layout, axis, descriptor.magnitude.value)
            self.gain = gain.launcher((max(1, gain_count(descriptor)), 1, 1))

    def weight_launches(self, args: WeightArgs, workspace: Workspace) -> Launches:
        """The gain pass, if any, and the merge."""
        d, launches = self.descriptor, []
        flat = self.flat_sources(args, workspace)
        base = (args.base or args.out).data
        gain: Any = self.null(np.float32)
        if self.gain is not None:
            gain = self.scratch(workspace)
            dimensions = (d.out_features, d.in_features, d.taps)
            launches.append((self.gain, (base, gain, args.magnitude.data, *dimensions, *flat)))
        dimensions = (self.row_blocks, d.matrix[1], d.in_features, d.taps)
        sink = (gain, np.float32(args.strength))
        launches.append((self.merge, (base, args.out.data, *dimensions, self.flag(args), *flat, *sink)))
        return launches


PORTABLE = Sku(
    name="portable",
    backend=BackendKind.PORTABLE,
    arch=ArchSku.ANY,
    refuses=lambda descriptor: "",
    guarantee=fp32_guarantee,
    build=PortableProgram,
    workspace=lambda d: prepared_bytes(d) + (gain_count(d) * 4 if d.is_dora else 0),
)
