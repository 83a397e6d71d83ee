"""The second launch of long sums: every result from its parts in workspace, in one launch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kernels import partial_sums as kernel
from plans.core.device import ALIGNMENT
from plans.core.precision import ElementKind
from plans.core.tensor import TensorRef
from plans.core.workspace import Workspace

SLOTS = 2 * 132
"""Blocks that run at once. The workspace must not depend on the device, so one chip stands for all."""


@dataclass(frozen=True)
class Partial:
    """A result [rows, columns], or stored the other way round, as ``number`` parts of its sum."""

    number: int
    rows: int
    columns: int
    transposed: bool = False

    @property
    def count(self) -> int:
        """Elements of the result."""
        return self.rows * self.columns

    @property
    def nbytes(self) -> int:
        """Bytes of the parts in workspace, up to the next result's; never 0."""
        return max(1, -(-4 * self.number * self.count // ALIGNMENT)) * ALIGNMENT


def partial_bytes(partials: tuple[Partial, ...]) -> int:
    """Bytes of workspace of all parts."""
    return sum(partial.nbytes for partial in partials)


class Sums:
    """The launch that adds up the parts of some results of one kind; ``early`` it takes its places before (sm_90)."""

    def __init__(self, partials: tuple[Partial, ...], out: ElementKind, early: bool = False) -> None:
        self.partials = partials
        self._starts = [partial_bytes(partials[:i]) for i in range(len(partials))]
        self._numbers = [(partial.number, partial.rows, partial.columns) for partial in partials]
        elements, most = sum(partial.count for partial in partials), max(partial.number for partial in partials)
        warps = kernel.warps_of(elements, most)
        made = kernel.sum_parts(out.value, tuple(partial.transposed for partial in partials), warps, early)
        blocks = sum(-(-partial.count // kernel.elements_of_block(warps)) for partial in partials)
        self.launch = made.launcher((blocks, 1, 1)) if blocks else None

    def pointers(self, workspace: Workspace) -> list[object]:
        """Where each result's parts lie."""
        return [workspace.buffer.pointer(np.float32, start) for start in self._starts]

    def arguments(self, results: list[TensorRef], workspace: Workspace, scale: float) -> tuple:
        """The launch's arguments."""
        flat: list[object] = []
        for numbers, result, parts in zip(self._numbers, results, self.pointers(workspace), strict=True):
            flat += [result.data, parts, *numbers]
        return (*flat, np.float32(scale))
