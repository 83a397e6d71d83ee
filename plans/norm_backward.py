"""The gradient of a normalisation of rows with those of its weight and bias, whose sums over rows cost no second pass.

d = NormBackwardDescriptor(True, 8192, 4096, (BF16,) * 4, F32, bias=True)
plan = NormBackwardPlan.select(stream, d)
plan.run(stream, workspace, NormBackwardArgs([d_x, d_w, d_b], [x, d_y, w, mean, rstd]))
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from kernels import normalization as kernel
from plans import expression, normalization
from plans.core import (
    ArchSku,
    BackendKind,
    Device,
    ElementKind,
    InvalidProblem,
    MathPrecision,
    OpCategory,
    Operand,
    Plan,
    PrecisionGuarantee,
    Sku,
    TensorMut,
    TensorRef,
    Workspace,
)
from plans.core.plan import Arguments
from plans.core.sku import begins_early
from plans.expression import leaf
from plans.partial_sums import Partial, Sums, partial_bytes
from plans.rows import KINDS, RowsDescriptor

_F32 = ElementKind.F32
_LEAST, _MOST = 8 * 32, kernel.RUN * kernel.MOST_THREADS
_ROWS = 2**31
_VECTOR_BYTES = 16


def takes(n: int) -> bool:
    """Whether rows of so many columns can be had; their matrices have to be aligned to 16 bytes."""
    return _LEAST <= n <= _MOST and n % kernel.RUN == 0


@dataclass(frozen=True)
class NormBackwardDescriptor:
    """v = d_y w, y = (x - mean) rstd: d_x = (v - mean(v) - y mean(v y)) rstd, d_w = sum d_y y, d_b = sum d_y over rows.

    Not ``centred``, for root mean squares: y = x rstd, and mean(v) is left out. ``kinds`` are those of x, d_y, w and
    d_x, ``out`` that of d_w and d_b, ``added`` that of a matrix d_r that is added to d_x, if any.
    """

    centred: bool
    rows: int
    n: int
    kinds: tuple[ElementKind, ElementKind, ElementKind, ElementKind]
    out: ElementKind
    bias: bool = False
    added: ElementKind | None = None

    category = OpCategory.NORMALIZATION

    def __post_init__(self) -> None:
        if min(self.rows, self.n) < 0:
            raise InvalidProblem(
                f"norm backward: {self.rows} rows of {self.n}, wanted 0 or more; give the tensor's own"
            )

    def operands(self) -> tuple[Operand, ...]:
        """``d_x``, ``d_w``, ``d_b``, then ``x``, ``d_y``, ``d_r``, ``w``, ``mean``, ``rstd``, of those there are."""
        full, column = (self.rows, self.n), (self.n,)
        x, d_y, w, d_x = self.kinds
        sources = [Operand("x", x, full, alignment=_VECTOR_BYTES), Operand("d_y", d_y, full, alignment=_VECTOR_BYTES)]
        if self.added:
            sources.append(Operand("d_r", self.added, full, alignment=_VECTOR_BYTES))
        sources.append(Operand("w", w, column, alignment=_VECTOR_BYTES))
        rows = [Operand(name, _F32, (self.rows,)) for name in ("mean",) * self.centred + ("rstd",)]
        sums = [Operand(name, self.out, column, writes=True) for name in ("d_w",) + ("d_b",) * self.bias]
        return (Operand("d_x", d_x, full, writes=True, alignment=_VECTOR_BYTES), *sums, *sources, *rows)

    @property
    def team(self) -> int:
        """Threads of a row."""
        return 1 << (-(-self.n // kernel.RUN) - 1).bit_length()

    @property
    def blocks(self) -> int:
        """Blocks, which are the parts of the sums."""
        return min(-(-self.rows // kernel.teams_of(self.team)), kernel.BLOCKS)

    @property
    def partials(self) -> tuple[Partial, ...]:
        """The parts of d_w and d_b."""
        return (Partial(self.blocks, 1, self.n),) * (1 + self.bias)

    def reference(self, sources: Sequence[np.ndarray]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Each result in float64, and its magnitude: what first-order error analysis allows.

        A sum over rows adds as many additions as there are rows, and the parts', times the sum of magnitudes.
        """
        recipe = normalization.LAYER_NORM_BACKWARD if self.centred else normalization.RMS_NORM_BACKWARD
        recipe = normalization.ADDED[recipe] if self.added else recipe
        kinds = tuple(operand.element for operand in self.operands()[2 + self.bias :])
        found = RowsDescriptor(recipe, self.rows, self.n, kinds, self.kinds[3:]).reference(sources)
        x, g, *_ = (np.asarray(source, np.float64) for source in sources)
        mean, rstd = sources[-2] if self.centred else np.zeros(self.rows), sources[-1]
        row = [np.asarray(values, np.float64)[:, None] for values in (mean, rstd)]
        values = [leaf(1) * ((leaf(0) - leaf(2)) * leaf(3))] + [leaf(1)] * self.bias
        for value, error in expression.evaluate(values, [x, g, *row]):
            error = np.broadcast_to(error, x.shape)
            found.append((value.sum(0), error.sum(0) + (self.rows + 16) * np.abs(value).sum(0)))
        return found


class NormBackwardArgs(Arguments):
    """Results and sources in the descriptor's order."""

    def __init__(self, targets: Sequence[TensorMut], sources: Sequence[TensorRef]) -> None:
        super().__init__()
        self.targets, self.sources = list(targets), list(sources)

    def tensors(self) -> list[TensorRef]:
        """Results, then sources."""
        return [*self.targets, *self.sources]


def _refuses(d: NormBackwardDescriptor) -> str:
    for kind in (*d.kinds, d.out, d.added or _F32):
        if kind not in KINDS:
            return f"computes on {', '.join(k.value for k in KINDS)}, not {kind.value}"
    if not takes(d.n):
        return f"takes rows of {_LEAST} to {_MOST} columns in multiples of {kernel.RUN}"
    return "" if 0 < d.rows < _ROWS else "takes at least one row, and fewer than 2**31"


class _Program:
    """Two launches: rows with parts of the sums, and the sums."""

    def __init__(self, d: NormBackwardDescriptor, device: Device) -> None:
        early = begins_early(device)
        self.descriptor, self.sums = d, Sums(d.partials, d.out, early)
        kinds, added = tuple(kind.value for kind in d.kinds), d.added.value if d.added else ""
        self.launch = kernel.norm_backward(d.centred, d.bias, added, kinds, d.team, early).launcher((d.blocks, 1, 1))

    def bind(self, args: NormBackwardArgs, workspace: Workspace) -> list[tuple[Callable, tuple]]:
        """The launches; an operand that there is not is another one, which is not touched."""
        d = self.descriptor
        d_x, *sums = args.targets
        x, d_y, *rest = args.sources
        added = rest.pop(0).data if d.added else d_x.data
        w, *rows = (tensor.data for tensor in rest)
        parts = self.sums.pointers(workspace)
        flat = (x.data, d_y.data, w, d_x.data, added, rows[0], rows[-1], parts[0], parts[-1])
        return [
            (self.launch, (*flat, np.float32(1 / d.n), d.rows, d.n)),
            (self.sums.launch, self.sums.arguments(sums, workspace, 1.0)),
        ]


_PROPAGATED = PrecisionGuarantee(
    math_precision=MathPrecision.F32,
    accumulator=_F32,
    deterministic=True,
    bit_stable_on_same_hardware=True,
    rounding_units=1.25,
    derivation="every function's and sum's own error carried through derivatives (NormBackwardDescriptor.reference); a "
    "quarter more for what is of second order",
)


class NormBackwardPlan(Plan):
    """All gradients of a normalisation; see :class:`NormBackwardDescriptor`."""

    name = "norm backward"
    skus = (
        Sku(
            name="blocks that stay",
            backend=BackendKind.VECTOR,
            arch=ArchSku.SM80,
            refuses=_refuses,
            guarantee=lambda descriptor: _PROPAGATED,
            build=_Program,
            workspace=lambda descriptor: partial_bytes(descriptor.partials),
        ),
    )
