"""Recipes over the rows of a matrix: reductions of expressions, and results that need them, each row read once.

For example, softmax:

    x, *_, top, total = symbols(full=1, stages=2)
    SOFTMAX = Recipe("softmax", OpCategory.SOFTMAX, full=("x",),
                     stages=(("max", x), ("sum", (x - top).exp())), outputs=(("y", (x - top).exp() / total),))
    plan = RowsPlan.select(stream, RowsDescriptor(SOFTMAX, 8192, 4096, (ElementKind.BF16,), (ElementKind.BF16,)))
    plan.run(stream, None, RowsArgs([y], [x]))
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from kernels import rows as kernel
from kernels.elements import ELEMENTS
from plans import expression
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
from plans.expression import Expr, leaf

KINDS = (ElementKind.BF16, ElementKind.F16, ElementKind.F32)
ROW_KINDS = (*KINDS, ElementKind.I32, ElementKind.I64)
_ROWS = 2**31
_VECTOR_BYTES = 16
_MOST_THREADS = 1024
_RESIDENT_WORDS = {1024: 32, 512: 64}
"""Registers of a thread for a resident row; 64 in smaller teams."""

Named = tuple[tuple[str, Expr], ...]


class Symbols(NamedTuple):
    """The leaves of a recipe's expressions, in the kernel's order."""

    full: tuple[Expr, ...]
    columns: tuple[Expr, ...]
    position: Expr
    row: tuple[Expr, ...]
    picked: tuple[Expr, ...]
    inverse_n: Expr
    scalars: tuple[Expr, ...]
    stages: tuple[Expr, ...]


def symbols(full: int, columns: int = 0, row: int = 0, scalars: int = 0, stages: int = 0, picked: int = 0) -> Symbols:
    """Leaves for so many operands, scalars and stages: an element's own, its column in the row, 1 / n, results."""
    leaves = iter(range(full + columns + row + picked + scalars + stages + 2))

    def take(count: int) -> tuple[Expr, ...]:
        return tuple(leaf(next(leaves)) for _ in range(count))

    of_row = take(full), take(columns), *take(1), take(row), take(picked)
    return Symbols(*of_row, *take(1), take(scalars), take(stages))


@dataclass(frozen=True)
class Recipe:
    """What is computed of every row.

    ``full``, ``columns`` and ``row`` name operands [rows, n], [n] and [rows]; ``scalars`` names numbers. ``stages`` are
    reductions over the row, ("sum" | "max", expression), ``outputs`` results [rows, n] and ``row_outputs`` results
    [rows] of the row's values alone. ``picked`` are (matrix, row operand) by name: the row's element at the column that
    the operand names, or the nearest to it. The expressions' leaves are those of :func:`symbols`.
    """

    name: str
    category: OpCategory
    full: tuple[str, ...]
    columns: tuple[str, ...] = ()
    row: tuple[str, ...] = ()
    scalars: tuple[str, ...] = ()
    stages: Named = ()
    outputs: Named = ()
    row_outputs: Named = ()
    picked: tuple[tuple[str, str], ...] = ()

    @property
    def picks(self) -> tuple[tuple[int, int], ...]:
        """What is picked, by numbers of matrices and row operands."""
        return tuple((self.full.index(matrix), self.row.index(by)) for matrix, by in self.picked)

    @property
    def sources(self) -> tuple[str, ...]:
        """All operands that are read."""
        return (*self.full, *self.columns, *self.row)

    @functools.cached_property
    def programs(self) -> tuple[tuple, tuple | None, tuple | None]:
        """The stages, the matrices and the rows' results in plain data."""
        before = len(self.sources) + len(self.picked) + len(self.scalars) + 2
        stages = tuple(
            (operation, expression.lower([expr], [leaf(i) for i in range(before + k)]))
            for k, (operation, expr) in enumerate(self.stages)
        )
        everything = [leaf(i) for i in range(before + len(stages))]
        of_row = everything[len(self.full) + len(self.columns) + 1 :]
        final, last = ([expr for _, expr in named] for named in (self.outputs, self.row_outputs))
        return stages, *(
            expression.lower(e, a) if e else None for e, a in ((final, everything), (last, of_row))
        )  # fmt: skip


@dataclass(frozen=True)
class RowsDescriptor:
    """A recipe over [rows, n]. ``kinds`` are those of its sources, ``out_kinds`` of its outputs and row outputs.

    ``aligned``: every matrix and column lies at a multiple of 16 bytes.
    """

    recipe: Recipe
    rows: int
    n: int
    kinds: tuple[ElementKind, ...]
    out_kinds: tuple[ElementKind, ...]
    aligned: bool = True

    def __post_init__(self) -> None:
        recipe = self.recipe
        if min(self.rows, self.n) < 0:
            raise InvalidProblem(
                f"{recipe.name}: {self.rows} rows of {self.n}, wanted 0 or more; give the tensor's own"
            )
        for names, kinds in ((recipe.sources, self.kinds), (self.targets, self.out_kinds)):
            if len(names) != len(kinds):
                raise InvalidProblem(
                    f"{recipe.name}: {len(kinds)} kinds given for {', '.join(names)}; give one for each"
                )

    @property
    def category(self) -> OpCategory:
        """The recipe's family."""
        return self.recipe.category

    @property
    def targets(self) -> tuple[str, ...]:
        """The names of all results."""
        return tuple(name for name, _ in (*self.recipe.outputs, *self.recipe.row_outputs))

    def operands(self) -> tuple[Operand, ...]:
        """Results, then sources; the first result may be the first source, in place."""
        recipe = self.recipe
        full = (self.rows, self.n)
        shapes = [full] * len(recipe.outputs) + [(self.rows,)] * len(recipe.row_outputs)
        same = recipe.outputs and self.kinds[0] is self.out_kinds[0]
        targets = [
            Operand(name, kind, shape, writes=True, may_alias=recipe.full[0] if same and k == 0 else "")
            for k, (name, kind, shape) in enumerate(zip(self.targets, self.out_kinds, shapes, strict=True))
        ]
        shapes = [full] * len(recipe.full) + [(self.n,)] * len(recipe.columns) + [(self.rows,)] * len(recipe.row)
        return (*targets, *(Operand(*row) for row in zip(recipe.sources, self.kinds, shapes, strict=True)))

    def split(self, kinds: Sequence[ElementKind]) -> tuple[Sequence[ElementKind], ...]:
        """Kinds of sources as those of matrices, columns and rows."""
        full, columns = len(self.recipe.full), len(self.recipe.columns)
        return kinds[:full], kinds[full : full + columns], kinds[full + columns :]

    def team(self, width: int) -> int:
        """Threads for a row: sixteen elements each, eight one by one, a block at most."""
        wanted = -(-self.n // (16 if width == 8 else 8))
        return min(_MOST_THREADS, 1 << max(0, wanted - 1).bit_length())

    def accesses(self, width: int) -> int:
        """Accesses of a thread to its row."""
        return -(-self.n // (self.team(width) * width))

    def resident_words(self, width: int) -> int:
        """Registers that hold a thread's part of its row, and of the columns that stages read."""
        full, columns, _ = self.split(self.kinds)
        operands = kernel.Operands(*(tuple(kind.value for kind in kinds) for kinds in (full, columns)), (), (), ())
        read = set().union(*(kernel.columns_read(program, operands) for _, program in self.recipe.programs[0]))
        kinds = [*full, *(columns[c] for c in read)]
        words = sum(ELEMENTS[kind.value].words for kind in kinds) if width == 8 else len(kinds)
        return words * self.accesses(width)

    def reference(
        self, sources: Sequence[np.ndarray], scalars: Sequence[float] = ()
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """Each result in float64, and its magnitude: what first-order error analysis allows.

        A sum adds the longest chain of its additions, of any SKU, times the sum of magnitudes.
        """
        recipe = self.recipe
        full, columns, row = self.split([np.asarray(s, np.float64) for s in sources])
        inverse = 1 / self.n if self.n else 0.0
        numbers = [np.float64(inverse), *(np.float64(np.float32(s)) for s in scalars)]
        places = [np.clip(row[by], 0, max(0, self.n - 1)).astype(np.int64)[:, None] for _, by in recipe.picks]
        picked = [
            np.take_along_axis(full[matrix], place, 1) if self.n else np.zeros((self.rows, 1))
            for (matrix, _), place in zip(recipe.picks, places, strict=True)
        ]
        values = [*full, *columns, np.arange(self.n), *(r[:, None] for r in row), *picked, *numbers]
        errors = [np.float64(0)] * len(values)
        errors[-len(numbers)] = np.float64(expression.rounding(inverse))
        depth = max(self.accesses(1), 8 * self.accesses(8)) + 10
        for operation, expr in recipe.stages:
            value, error = (
                np.broadcast_to(part, (self.rows, self.n)) for part in expression.evaluate([expr], values, errors)[0]
            )
            if operation == "sum":
                values.append(value.sum(1, keepdims=True))
                errors.append(error.sum(1, keepdims=True) + depth * np.abs(value).sum(1, keepdims=True))
            else:
                values.append(value.max(1, keepdims=True, initial=-np.inf))
                errors.append(error.max(1, keepdims=True, initial=0))
        shapes = [(self.rows, self.n)] * len(recipe.outputs) + [(self.rows, 1)] * len(recipe.row_outputs)
        found = expression.evaluate([e for _, e in (*recipe.outputs, *recipe.row_outputs)], values, errors)
        results = [tuple(np.broadcast_to(p, s) for p in pair) for pair, s in zip(found, shapes, strict=True)]
        matrices = len(recipe.outputs)
        return results[:matrices] + [(exact[:, 0], error[:, 0]) for exact, error in results[matrices:]]


class RowsArgs(Arguments):
    """Results, sources and scalars in the recipe's order."""

    def __init__(
        self, targets: Sequence[TensorMut], sources: Sequence[TensorRef], scalars: Sequence[float] = ()
    ) -> None:
        super().__init__()
        self.targets, self.sources = list(targets), list(sources)
        self.scalars = tuple(np.float32(s) for s in scalars)

    def tensors(self) -> list[TensorRef]:
        """Results, then sources."""
        return [*self.targets, *self.sources]


def _refuses(width: int, resident: bool) -> Callable[[RowsDescriptor], str]:
    def refuses(d: RowsDescriptor) -> str:
        full, columns, row = d.split(d.kinds)
        for kind in (*full, *columns, *d.out_kinds):
            if kind not in KINDS:
                return f"computes on {', '.join(k.value for k in KINDS)}, not {kind.value}"
        for kind in row:
            if kind not in ROW_KINDS:
                return f"reads rows' values of {', '.join(k.value for k in ROW_KINDS)}, not {kind.value}"
        if d.rows >= _ROWS or d.n >= _ROWS:
            return "takes fewer than 2**31 rows and columns"
        if width == 8 and (d.n % 8 or not d.aligned):
            return "wants rows of a multiple of 8 elements, aligned to 16 bytes"
        most = _RESIDENT_WORDS.get(d.team(width), 64)
        if resident and d.resident_words(width) > most:
            return f"keeps rows in {most} registers a thread, these need {d.resident_words(width)}"
        return ""

    return refuses


class _Program:
    """One launch."""

    def __init__(self, descriptor: RowsDescriptor, device: Device, width: int, resident: bool) -> None:
        d, self.launch = descriptor, None
        team, own = d.team(width), len(d.recipe.outputs)
        if not d.rows or (not d.n and not d.recipe.row_outputs):
            return
        names = [tuple(kind.value for kind in kinds) for kinds in d.split(d.kinds)]
        outs = tuple(kind.value for kind in d.out_kinds)
        operands = kernel.Operands(*names, outs[:own], outs[own:])
        shape = kernel.Shape(team, width, max(1, d.accesses(width)) if resident else 0)
        _, rows_a_block = kernel.block_of(team)
        stages, final, last = d.recipe.programs
        early = begins_early(device)
        made = kernel.rows(stages, final, last, operands, shape, d.recipe.picks, early)
        self.launch = made.launcher((-(-d.rows // rows_a_block), 1, 1))
        self.inverse, self.rest = np.float32(1 / d.n if d.n else 0), (d.rows, d.n)

    def bind(self, args: RowsArgs, workspace: Workspace) -> list[tuple[Callable, tuple]]:
        """The launch; none where there is nothing to compute."""
        if self.launch is None:
            return []
        data = [tensor.data for tensor in (*args.sources, *args.targets)]
        return [(self.launch, (*data, self.inverse, *args.scalars, *self.rest))]


_PROPAGATED = PrecisionGuarantee(
    math_precision=MathPrecision.F32,
    accumulator=ElementKind.F32,
    deterministic=True,
    bit_stable_on_same_hardware=True,
    rounding_units=1.25,
    derivation="every function's and sum's own error carried through derivatives (RowsDescriptor.reference); a quarter "
    "more for what is of second order",
)


def _sku(name: str, backend: BackendKind, width: int, resident: bool) -> Sku:
    return Sku(
        name=name,
        backend=backend,
        arch=ArchSku.ANY,
        refuses=_refuses(width, resident),
        guarantee=lambda descriptor: _PROPAGATED,
        build=lambda descriptor, device: _Program(descriptor, device, width, resident),
    )


class RowsPlan(Plan):
    """A recipe over the rows of a matrix; see :class:`RowsDescriptor`."""

    name = "rows"
    skus = (
        _sku("resident, in eights", BackendKind.VECTOR, 8, True),
        _sku("streaming, in eights", BackendKind.VECTOR, 8, False),
        _sku("resident", BackendKind.PORTABLE, 1, True),
        _sku("streaming", BackendKind.PORTABLE, 1, False),
    )
