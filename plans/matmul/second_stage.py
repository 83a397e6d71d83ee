"""The second launch of a product whose sum is split: parts in workspace added up in order, through the epilogue."""

from __future__ import annotations

from typing import Any

import numpy as np

from kernels.matmul import reduce as matmul_reduce
from kernels.matmul.store import UNIT
from plans.core.workspace import Workspace
from plans.matmul.descriptor import SegmentedMatmulArgs, SegmentedMatmulDescriptor
from plans.matmul.program import MatmulProgram, is_wide, kernel_steps

LARGEST = 1 << 31


def product_elements(descriptor: SegmentedMatmulDescriptor) -> int:
    """Elements of the product, all columns of a gate, over the batch."""
    return (1 if descriptor.batch is None else descriptor.batch) * descriptor.m * descriptor.n


def parts_bytes(descriptor: SegmentedMatmulDescriptor, parts: int) -> int:
    """Workspace of so many parts, [parts, batch, m, n] in fp32."""
    return 4 * parts * product_elements(descriptor)


def refuses_elements(descriptor: SegmentedMatmulDescriptor) -> str:
    """The refusal of results that the second launch does not number, or ""."""
    elements = product_elements(descriptor)
    return "" if 0 < elements < LARGEST else f"wants 1 to 2**31 elements, found {elements}"


class SecondStage:
    """The launch for a descriptor's parts."""

    def __init__(self, descriptor: SegmentedMatmulDescriptor, parts: int) -> None:
        self._descriptor, self._parts = descriptor, parts
        self._batches = 1 if descriptor.batch is None else descriptor.batch
        wide = is_wide(descriptor) and descriptor.n % UNIT == 0
        kernel = matmul_reduce.matmul_reduce(descriptor.out.value, kernel_steps(descriptor), wide)
        units = self._batches * descriptor.m * -(-descriptor.columns // UNIT)
        self._launch = kernel.launcher((-(-units // matmul_reduce.THREADS), 1, 1))

    def bind(self, program: MatmulProgram, args: SegmentedMatmulArgs, workspace: Workspace) -> tuple[Any, tuple]:
        """The launch with its arguments; ``program`` is the descriptor's."""
        plane = product_elements(self._descriptor)
        head = (workspace.buffer.pointer(np.float32), self._parts, plane, self._descriptor.n, self._batches)
        return self._launch, (*head, *program.result_arguments(args), *program.epilogue_arguments(args))
