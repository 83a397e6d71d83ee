"""What the weight SKUs share: resolved sources, their preparatory contractions, and flattened kernel arguments."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from kernels.target import Kernel, Launcher
from plans.core.device import Device
from plans.core.sku import begins_early
from plans.core.workspace import Workspace
from plans.weight.descriptor import Sink, WeightArgs, WeightDescriptor
from plans.weight.resolve import ALIGN, Resolved, contraction_arguments, factor_data, prepare, resolve

Launches = list[tuple[Callable, tuple]]

_NULL = {np.dtype(np.int32): np.zeros(1, np.int32), np.dtype(np.float32): np.zeros(1, np.float32)}


def gain_count(descriptor: WeightDescriptor) -> int:
    """How many gains DoRA has: one an output row, or one an input channel."""
    return descriptor.out_features if descriptor.sink is Sink.DORA_ROW else descriptor.in_features


def prepared_bytes(descriptor: WeightDescriptor, fused_second_half: bool = False) -> int:
    """Workspace for contracted factors; what a SKU needs besides begins there, aligned."""
    return resolve(descriptor, fused_second_half)[-1].workspace


class WeightProgram:
    """A weight SKU built for a descriptor: contractions first, then what ``weight_launches`` gives.

    ``fused_second_half``: the kernel multiplies a Kronecker product's factored w2 out by itself.
    """

    fused_second_half = False
    group_kernel: Kernel | None = None
    """The grouped kernel that computes this weight as a member of a group; None where it cannot be a member."""
    early = False
    """Whether the device starts a kernel before the one before it has ended."""
    grid: tuple[int, int, int] = (0, 0, 0)
    """The grid of the member's own launch."""
    kernel: Kernel | None = None
    """The kernel of its own launch, where it can be a member of a group."""

    @functools.cached_property
    def merge(self) -> Launcher:
        """The launch over the weight, compiled when it is first asked for: members of a group never need it."""
        return self.kernel.launcher(self.grid)

    def __init__(self, descriptor: WeightDescriptor, device: Device) -> None:
        self.descriptor, self.device = descriptor, device
        self.early = begins_early(device)
        self.resolved = resolve(descriptor, self.fused_second_half)
        self.prepared = self.resolved[-1].workspace
        self.contractions = [(i, item, *prepare(item)) for i, r in enumerate(self.resolved) for item in r.contractions]
        rows, columns = descriptor.matrix
        self.empty = rows * columns == 0

    def bind(self, args: WeightArgs, workspace: Workspace) -> Launches:
        """The launches of one run; none for an empty weight."""
        if self.empty:
            return []
        launches: Launches = [
            (launch, contraction_arguments(item, elements, args.factors[i], workspace.buffer))
            for i, item, launch, elements in self.contractions
        ]
        return launches + self.weight_launches(args, workspace)

    def weight_launches(self, args: WeightArgs, workspace: Workspace) -> Launches:
        """The launches over the weight itself."""
        raise TypeError("WeightProgram is abstract")

    def arguments(self, args: WeightArgs, workspace: Workspace) -> tuple:
        """The flat parameters of the one launch over the weight; a row of a group's table holds the same."""
        raise TypeError("WeightProgram is abstract")

    def null(self, dtype: type) -> Any:
        """An argument for a pointer that the kernel was compiled not to touch."""
        return _NULL[np.dtype(dtype)] if self.device.is_simulator else 0

    def flag(self, args: WeightArgs) -> Any:
        """The not-finite flag."""
        return args.not_finite.data if args.not_finite else self.null(np.int32)

    def scratch(self, workspace: Workspace) -> Any:
        """fp32 workspace after the contracted factors."""
        return workspace.buffer.pointer(np.float32, -(-self.prepared // ALIGN) * ALIGN)

    def flat_sources(self, args: WeightArgs, workspace: Workspace) -> tuple:
        """Every source's kernel parameters: pointers and integers of each product, then the scale."""
        flat: list[Any] = []
        for resolved, scale, tensors in zip(self.resolved, args.scales, args.factors, strict=True):
            flat += [*flat_factors(resolved, tensors, workspace), np.float32(scale)]
        return tuple(flat)


def flat_factors(resolved: Resolved, tensors: tuple, workspace: Workspace) -> list[Any]:
    """Pointers and integers of a source's products, in kernel order."""
    flat: list[Any] = []
    for factors, numbers in zip(resolved.factors, resolved.numbers, strict=True):
        flat += [factor_data(factor, tensors, workspace.buffer) for factor in factors]
        flat += numbers
    return flat
