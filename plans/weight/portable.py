"""The portable SKU of the weight family: every source, sink, layout and kind, on any GPU and in the simulator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from kernels import weight_portable as kernel
from plans.core.device import Device
from plans.core.plan import Sku
from plans.core.precision import ElementKind, MathPrecision, PrecisionGuarantee
from plans.core.sku import ArchSku, BackendKind
from plans.core.workspace import Workspace
from plans.weight.descriptor import Sink, WeightArgs, WeightDescriptor
from plans.weight.resolve import (
    ALIGN,
    Resolved,
    contraction_arguments,
    factor_data,
    prepare,
    resolve,
)

_AXIS = {Sink.DORA_ROW: "row", Sink.DORA_COLUMN: "column"}
_NO_FLAG = np.zeros(1, np.int32)
_NO_GAIN = np.zeros(1, np.float32)


def null(array: np.ndarray, device: Device) -> Any:
    """An argument for a pointer that the kernel was compiled not to touch."""
    return array if device.is_simulator else 0


def workspace_bytes(descriptor: WeightDescriptor) -> int:
    """Contracted factors, then DoRA's gains."""
    return resolve(descriptor)[-1].workspace + (gain_count(descriptor) * 4 if descriptor.is_dora else 0)


def gain_count(descriptor: WeightDescriptor) -> int:
    """How many gains DoRA has: one an output row, or one an input channel."""
    return descriptor.out_features if descriptor.sink is Sink.DORA_ROW else descriptor.in_features


def fp32_guarantee(descriptor: WeightDescriptor) -> PrecisionGuarantee:
    """fp32 FMA throughout."""
    depth = sum(source.depth for source in descriptor.sources)
    return PrecisionGuarantee(
        math_precision=MathPrecision.F32,
        accumulator=ElementKind.F32,
        deterministic=True,
        bit_stable_on_same_hardware=True,
        rounding_units=depth + 6.0 * len(descriptor.sources) + (16.0 if descriptor.is_dora else 2.0),
        derivation="each of the summed terms is rounded once in the running sum (depth), each source is scaled, "
        "combined and added (6), the base added (2); DoRA's norm tree, division and products 16",
    )


def flatten(resolved: Resolved, scale: float, args: tuple, workspace: Workspace) -> tuple:
    """A source's kernel parameters: pointers and integers of each product, then the scale."""
    flat: list[Any] = []
    for factors, numbers in zip(resolved.factors, resolved.numbers, strict=True):
        flat += [factor_data(factor, args, workspace.buffer) for factor in factors]
        flat += numbers
    return (*flat, np.float32(scale))


class PortableProgram:
    """Contractions, DoRA's gains where there are any, then one pass over the weight."""

    def __init__(self, descriptor: WeightDescriptor, device: Device) -> None:
        self.descriptor, self.device = descriptor, device
        self.resolved = resolve(descriptor)
        self.contractions = [(i, item, *prepare(item)) for i, r in enumerate(self.resolved) for item in r.contractions]
        sources = tuple(r.kernel for r in self.resolved)
        axis, layout = _AXIS.get(descriptor.sink), descriptor.layout.value
        base = None if descriptor.base is None else descriptor.base.value
        rows, columns = descriptor.matrix
        self.row_blocks = max(1, -(-columns // kernel.THREADS))
        make = kernel.merge(base, descriptor.out.value, sources, layout, axis, descriptor.check_finite)
        self.empty = rows * columns == 0
        self.merge = make.launcher((max(1, rows * self.row_blocks), 1, 1))
        self.gain = None
        if descriptor.is_dora:
            gain = kernel.dora_gain(base, sources, layout, axis, descriptor.magnitude.value)
            self.gain = gain.launcher((max(1, gain_count(descriptor)), 1, 1))

    def bind(self, args: WeightArgs, workspace: Workspace) -> list[tuple[Callable, tuple]]:
        """The launches of one run."""
        d, scratch = self.descriptor, workspace.buffer
        if self.empty:
            return []
        launches = [
            (launch, contraction_arguments(item, elements, args.factors[i], scratch))
            for i, item, launch, elements in self.contractions
        ]
        flat = tuple(
            value
            for r, scale, tensors in zip(self.resolved, args.scales, args.factors, strict=True)
            for value in flatten(r, scale, tensors, workspace)
        )
        base = args.base or args.out
        gain: Any = null(_NO_GAIN, self.device)
        if self.gain is not None:
            gain = scratch.pointer(np.float32, -(-self.resolved[-1].workspace // ALIGN) * ALIGN)
            launches.append(
                (
                    self.gain,
                    (base.data, gain, args.magnitude.data, d.out_features, d.in_features, d.taps, *flat),
                )
            )
        flag = args.not_finite.data if args.not_finite else null(_NO_FLAG, self.device)
        launches.append(
            (
                self.merge,
                (
                    base.data,
                    args.out.data,
                    self.row_blocks,
                    d.matrix[1],
                    d.in_features,
                    d.taps,
                    flag,
                    *flat,
                    gain,
                    np.float32(args.strength),
                ),
            )  # fmt: skip
        )
        return launches


PORTABLE = Sku(
    name="portable",
    backend=BackendKind.PORTABLE,
    arch=ArchSku.ANY,
    refuses=lambda descriptor: "",
    guarantee=fp32_guarantee,
    build=PortableProgram,
    workspace=workspace_bytes,
)
