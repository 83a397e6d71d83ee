"""Conversion of elements between bf16, fp16 and fp32: one rounding to nearest even where the kind narrows.

For example:

    plan = CastPlan.select(stream, CastDescriptor(count, source=ElementKind.F32, out=ElementKind.BF16))
    plan.run(stream, None, CastArgs(out, source))
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from kernels import cast as kernel
from plans.core import (
    ArchSku,
    BackendKind,
    Device,
    ElementKind,
    InvalidProblem,
    OpCategory,
    Operand,
    Plan,
    PrecisionGuarantee,
    Sku,
    Workspace,
)
from plans.core.plan import UnaryArguments

_KINDS = (ElementKind.BF16, ElementKind.F16, ElementKind.F32)
_BLOCK = kernel.THREADS * kernel.RUN
_VECTOR_BYTES = 16


@dataclass(frozen=True)
class CastDescriptor:
    """out[i] = round(source[i]) for ``count`` elements, given as one axis."""

    count: int
    source: ElementKind
    out: ElementKind

    category = OpCategory.ELEMENTWISE

    def __post_init__(self) -> None:
        if self.count < 0:
            raise InvalidProblem(f"cast: {self.count} elements, wanted 0 or more; give the tensor's count")

    def operands(self) -> tuple[Operand, ...]:
        """``out`` and ``source``."""
        return (
            Operand("out", self.out, (self.count,), writes=True),
            Operand("source", self.source, (self.count,)),
        )

    def reference(self, source: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The exact result in float64, and its magnitude."""
        exact = source.astype(np.float64)
        return exact, np.abs(exact)


class CastArgs(UnaryArguments):
    """The tensors of one cast."""


def _refuses(descriptor: CastDescriptor) -> str:
    for kind in (descriptor.source, descriptor.out):
        if kind not in _KINDS:
            return f"converts between {', '.join(k.value for k in _KINDS)}, not {kind.value}"
    return ""


class _PortableProgram:
    """One launch; a thread converts eight elements."""

    def __init__(self, descriptor: CastDescriptor, device: Device) -> None:
        self.count = descriptor.count
        make = kernel.cast(descriptor.source.value, descriptor.out.value)
        self.launch = make.launcher((max(1, -(-self.count // _BLOCK)), 1, 1))

    def bind(self, args: CastArgs, workspace: Workspace) -> list[tuple[Callable, tuple]]:
        """The launch; none where there is nothing to convert."""
        return [(self.launch, (args.source.data, args.out.data, self.count))] if self.count else []


_ROUNDED_ONCE = PrecisionGuarantee.exact(
    "every value of the three kinds is an fp32 value, so only the final rounding is left",
)


class CastPlan(Plan):
    """Elements of another kind; see :class:`CastDescriptor`."""

    name = "cast"
    skus = (
        Sku(
            name="portable",
            backend=BackendKind.PORTABLE,
            arch=ArchSku.ANY,
            refuses=_refuses,
            guarantee=lambda descriptor: _ROUNDED_ONCE,
            build=_PortableProgram,
            alignment=_VECTOR_BYTES,
        ),
    )
