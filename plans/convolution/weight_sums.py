"""The second launch of a weight's gradient whose sum over pixels is split: parts in workspace added up in order."""

from __future__ import annotations

from typing import Any

import numpy as np

from kernels.matmul import reduce as matmul_reduce
from kernels.matmul.store import UNIT
from plans.convolution.descriptor import Conv2dArgs
from plans.convolution.geometry import Convolution
from plans.convolution.program import Descriptor
from plans.core.workspace import Workspace


def plane_of(geometry: Convolution) -> int:
    """Elements of one tap's part: [out_channels, in_channels / groups]."""
    return geometry.out_channels * geometry.group_in


def sums_bytes(geometry: Convolution, parts: int) -> int:
    """Workspace of so many parts, [parts, taps, out_channels, in_channels / groups] in fp32."""
    return 4 * parts * geometry.taps * plane_of(geometry)


def residual_arguments(geometry: Convolution, args: Conv2dArgs) -> tuple:
    """The parameters of residuals that lie as the weight does, taps being the batch."""
    row, tap, _ = geometry.weight_strides
    pairs = zip(args.epilogue, args.numbers, strict=True)
    return tuple(value for tensor, number in pairs for value in (tensor.data, row, tap, np.float32(number)))


class WeightSums:
    """The launch for a descriptor's parts."""

    def __init__(self, descriptor: Descriptor, parts: int) -> None:
        g = self._geometry = descriptor.geometry
        self._parts = parts
        steps = tuple(step.kernel for step in descriptor.epilogue)
        kernel = matmul_reduce.matmul_reduce(descriptor.out.value, steps, g.group_in % UNIT == 0)
        units = g.taps * g.out_channels * -(-g.group_in // UNIT)
        self._launch = kernel.launcher((-(-units // matmul_reduce.THREADS), 1, 1))

    def bind(self, args: Conv2dArgs, workspace: Workspace) -> tuple[Any, tuple]:
        """The launch with its arguments."""
        g = self._geometry
        row, tap, _ = g.weight_strides
        head = (workspace.buffer.pointer(np.float32), self._parts, g.taps * plane_of(g), g.group_in, g.taps)
        result = (args.out.data, g.out_channels, g.group_in, row, tap)
        return self._launch, (*head, *result, *residual_arguments(g, args))
