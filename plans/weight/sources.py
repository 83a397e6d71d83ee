"""Where a weight delta comes from: the adapters' formulas as data.

A source describes factors and a formula over a weight of ``out`` rows and ``in * taps`` columns (taps: the
product of the kernel's extents); its factors' shapes follow. Everything is in checkpoint layout.

    LowRank      left @ right                                     LoRA/LoCon, arXiv:2106.09685
                 sum_ij core[i, j, tap] left[i, o] right[j, q]    Tucker form, LyCORIS arXiv:2309.14859
    Hadamard     first * second, elementwise                      LoHa/FedPara, arXiv:2108.06098
    Kronecker    kron(w1, w2) over the two channel axes           LoKr/KronA, arXiv:2212.10650
    Dense        the difference itself                            full, norm
    ChannelScale W * m along the output or the input axis         (IA)^3, arXiv:2205.05638
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from plans.core.errors import InvalidProblem
from plans.core.plan import Operand
from plans.core.precision import ElementKind


@dataclass(frozen=True)
class LowRank:
    """left [out, rank] @ right [rank, in * taps].

    ``left_transposed``: left is stored [rank, out]. ``core``: the kind of a Tucker core [rank, core_rank, taps];
    right is then [core_rank, in].
    """

    rank: int
    left: ElementKind
    right: ElementKind
    left_transposed: bool = False
    core: ElementKind | None = None
    core_rank: int = 0

    def operands(self, prefix: str, out: int, channels: int, taps: int) -> tuple[Operand, ...]:
        """left, right and, in the Tucker form, core."""
        left = (self.rank, out) if self.left_transposed else (out, self.rank)
        if self.core is None:
            return (
                Operand(f"{prefix}.left", self.left, left),
                Operand(f"{prefix}.right", self.right, (self.rank, channels * taps)),
            )
        return (
            Operand(f"{prefix}.left", self.left, left),
            Operand(f"{prefix}.right", self.right, (self.core_rank, channels)),
            Operand(f"{prefix}.core", self.core, (self.rank, self.core_rank, taps)),
        )

    def exact(self, factors: list[np.ndarray], out: int, channels: int, taps: int) -> np.ndarray:
        """The product in float64, [out, channels * taps]."""
        left, right = factors[0], factors[1]
        left = left.T if self.left_transposed else left
        if self.core is not None:
            right = np.einsum("ijk,jq->iqk", factors[2], right).reshape(self.rank, channels * taps)
        return left @ right

    @property
    def depth(self) -> int:
        """How many terms are summed for one element."""
        return self.rank + self.core_rank


@dataclass(frozen=True)
class Hadamard:
    """first * second, two low-rank products over the same weight."""

    first: LowRank
    second: LowRank

    def operands(self, prefix: str, out: int, channels: int, taps: int) -> tuple[Operand, ...]:
        """The operands of both products."""
        return (
            *self.first.operands(f"{prefix}.first", out, channels, taps),
            *self.second.operands(f"{prefix}.second", out, channels, taps),
        )

    def exact(self, factors: list[np.ndarray], out: int, channels: int, taps: int) -> np.ndarray:
        """The elementwise product in float64."""
        split = 2 if self.first.core is None else 3
        first = self.first.exact(factors[:split], out, channels, taps)
        return first * self.second.exact(factors[split:], out, channels, taps)

    @property
    def depth(self) -> int:
        """How many terms are summed for one element."""
        return self.first.depth + self.second.depth


@dataclass(frozen=True)
class Kronecker:
    """kron(w1, w2): w1 [a, b], w2 [c, d * taps], over a weight of a * c rows and b * d * taps columns.

    Either half is a kind (stored full) or a :class:`LowRank` (w1 with one tap).
    """

    a: int
    b: int
    c: int
    d: int
    w1: ElementKind | LowRank
    w2: ElementKind | LowRank

    def operands(self, prefix: str, out: int, channels: int, taps: int) -> tuple[Operand, ...]:
        """w1 and w2, each full or by its factors. Raises InvalidProblem where a*c, b*d do not make the weight."""
        if (self.a * self.c, self.b * self.d) != (out, channels):
            raise InvalidProblem(
                f"{prefix}: kron of ({self.a}, {self.b}) and ({self.c}, {self.d}) makes "
                f"({self.a * self.c}, {self.b * self.d}), wanted ({out}, {channels}); "
                "give factors of the base's extents"
            )
        return (
            *_half(f"{prefix}.w1", self.w1, self.a, self.b, 1),
            *_half(f"{prefix}.w2", self.w2, self.c, self.d, taps),
        )

    def exact(self, factors: list[np.ndarray], out: int, channels: int, taps: int) -> np.ndarray:
        """The Kronecker product in float64."""
        split = _half_count(self.w1)
        w1 = factors[0] if split == 1 else self.w1.exact(factors[:split], self.a, self.b, 1)
        rest = factors[split:]
        w2 = rest[0] if _half_count(self.w2) == 1 else self.w2.exact(rest, self.c, self.d, taps)
        return np.kron(w1, w2)

    @property
    def depth(self) -> int:
        """How many terms are summed for one element."""
        return sum(half.depth for half in (self.w1, self.w2) if isinstance(half, LowRank)) or 1


@dataclass(frozen=True)
class Dense:
    """diff [out, in * taps], added as it is."""

    element: ElementKind

    def operands(self, prefix: str, out: int, channels: int, taps: int) -> tuple[Operand, ...]:
        """Diff."""
        return (Operand(f"{prefix}.diff", self.element, (out, channels * taps)),)

    def exact(self, factors: list[np.ndarray], out: int, channels: int, taps: int) -> np.ndarray:
        """The difference."""
        return factors[0]

    depth = 1


@dataclass(frozen=True)
class ChannelScale:
    """m [out] or [in]: the delta is W * m along ``axis`` "out" or "in"; needs a base."""

    element: ElementKind
    axis: str

    def operands(self, prefix: str, out: int, channels: int, taps: int) -> tuple[Operand, ...]:
        """The multiplier."""
        return (Operand(f"{prefix}.multiplier", self.element, (out if self.axis == "out" else channels,)),)

    def exact(self, factors: list[np.ndarray], out: int, channels: int, taps: int) -> np.ndarray:
        """The multiplier over the weight's shape; the base multiplies it."""
        if self.axis == "out":
            return np.repeat(factors[0][:, None], channels * taps, axis=1)
        return np.repeat(np.repeat(factors[0], taps)[None, :], out, axis=0)

    depth = 1


Source = LowRank | Hadamard | Kronecker | Dense | ChannelScale


def _half(prefix: str, half: ElementKind | LowRank, rows: int, channels: int, taps: int) -> tuple[Operand, ...]:
    if isinstance(half, ElementKind):
        return (Operand(prefix, half, (rows, channels * taps)),)
    return half.operands(prefix, rows, channels, taps)


def _half_count(half: ElementKind | LowRank) -> int:
    if isinstance(half, ElementKind):
        return 1
    return 2 if half.core is None else 3
