"""What the gradients of a LoKr by one pass over g and x have in common: extents, operands and checks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from plans.core.errors import InvalidProblem
from plans.core.operand import Operand
from plans.core.precision import ElementKind
from plans.core.sku import OpCategory

LEAST_ROWS = 512
"""Rows that are worth tensor maps, which name addresses and so cost the host."""

_FLOATS = (ElementKind.BF16, ElementKind.F16, ElementKind.F32)

Arrays = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


@dataclass(frozen=True)
class KroneckerProblem(ABC):
    """Gradients of y_l = scale * sum_m w1[l, m] (x_m w2^T), of which g is y's.

    Attributes:
        rows: Rows t of g and x.
        out_blocks: Blocks l of a row of g.
        in_blocks: Blocks m of a row of x.
        out_width: Elements of a block of g.
        in_width: Elements of a block of x.
        element: The kind of the operands.
        out: The kind of factors' gradients.
    """

    rows: int
    out_blocks: int
    in_blocks: int
    out_width: int
    in_width: int
    element: ElementKind = ElementKind.BF16
    out: ElementKind = ElementKind.F32

    category = OpCategory.MATMUL
    title: ClassVar[str]
    of_element: ClassVar[str]
    of_out: ClassVar[str]
    """In words: the problem, and what is of either kind."""

    def __post_init__(self) -> None:
        if min(self.rows, self.out_blocks, self.in_blocks, self.out_width, self.in_width) < 0:
            raise InvalidProblem(
                f"{self.title}: {self.rows} rows, {self.out_blocks} x {self.in_blocks} blocks of "
                f"{self.out_width} x {self.in_width}: wanted none negative; give the tensors' own extents"
            )
        for name, kind in ((self.of_element, self.element), (self.of_out, self.out)):
            if kind not in _FLOATS:
                raise InvalidProblem(f"{self.title}: {name} of {kind.value}, wanted bf16, f16 or f32; cast first")

    def given(self) -> tuple[Operand, Operand, Operand, Operand]:
        """``g``, ``x``, ``w1``, ``w2``."""
        return (
            Operand("g", self.element, (self.rows, self.out_blocks, self.out_width)),
            Operand("x", self.element, (self.rows, self.in_blocks, self.in_width)),
            Operand("w1", self.element, (self.out_blocks, self.in_blocks)),
            Operand("w2", self.element, (self.out_width, self.in_width)),
        )

    @staticmethod
    @abstractmethod
    def exact(g: np.ndarray, x: np.ndarray, w1: np.ndarray, w2: np.ndarray, scale: float) -> list[np.ndarray]:
        """Both results, of float64."""

    def reference(self, arrays: Arrays, scale: float = 1.0) -> list[tuple[np.ndarray, np.ndarray]]:
        """Both results of g, x, w1, w2 in float64, each with the magnitude that the guarantee is relative to."""
        exact = [np.asarray(array, np.float64) for array in arrays]
        sizes = [np.abs(array) for array in exact]
        return list(zip(self.exact(*exact, scale), self.exact(*sizes, abs(scale)), strict=True))
