"""What adapters change: every module over its rows of the base, and modules that share some of their rows cut apart."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lycoris.checkpoint import SafetensorsFile, TensorEntry
from lycoris.errors import RefusedInput
from lycoris.formats import AdapterModule, Matching, Place, Rows, rows_of
from lycoris.merge.bits import KINDS
from lycoris.merge.factors import Factor
from lycoris.sources import FactorSpec, SourceBinding, weight_source
from plans.weight import Dense


class _Reason(NamedTuple):
    """Why a change has to be cut, and what to do where it cannot be: with such factors, with DoRA."""

    what: str
    advice: str
    advice_for_dora: str


_CONVERT = "convert the base to one dtype first"
_MIXED = _Reason("the base stores them in several dtypes", _CONVERT, _CONVERT)
_SHARED = _Reason(
    "another adapter changes some of them",
    "merge the adapters one after the other",
    "merge one, or train them together",
)

# Kernels take scales as float32.
_LARGEST_SCALE = float(np.finfo(np.float32).max)


@dataclass(frozen=True, slots=True)
class LoadedAdapter:
    """An adapter laid over the base, with its file open for the factors."""

    path: Path
    file: SafetensorsFile
    matching: Matching
    strength: float


@dataclass(frozen=True, slots=True)
class Change:
    """What one module does to the rows of one place.

    Attributes:
        where: File and module, for messages.
        module: The module; its `bias` alone where `is_bias`.
        place: The rows.
        file: Holds the factors.
        strength: Of the adapter.
        is_bias: Whether the rows are those of the layer's bias.
    """

    where: str
    module: AdapterModule
    place: Place
    file: SafetensorsFile
    strength: float
    is_bias: bool = False

    @property
    def is_dora(self) -> bool:
        """Whether the change replaces norms, so that it has to be alone."""
        return self.module.dora is not None and not self.is_bias

    @property
    def transposed(self) -> bool:
        """Whether the tensor is stored as [in, out]."""
        return self.module.transposed and not self.is_bias

    @property
    def scale(self) -> float:
        """What the sources are multiplied by. DoRA's strength scales the whole change instead."""
        if self.is_bias:
            return self.strength
        return self.module.scale if self.is_dora else self.strength * self.module.scale

    @property
    def is_idle(self) -> bool:
        """Whether the tensor stays as it is, bit for bit."""
        return self.strength == 0 or (self.scale == 0 and not self.is_dora)

    def check_scale(self) -> None:
        """Refuse a strength, or a scale that it makes, beyond float32.

        Raises:
            RefusedInput: naming file and module.
        """
        for name, value in (("strength", self.strength), ("scale, strength and alpha together,", self.scale)):
            if not abs(value) <= _LARGEST_SCALE:
                raise RefusedInput(
                    f"{self.where}: the {name} is {value:g}, wanted at most {_LARGEST_SCALE:.3g}; lower the strength"
                )

    @property
    def factors(self) -> dict[str, Factor]:
        """The factors that the change takes, by canonical name."""
        bias = self.module.bias
        chosen = {k: e for k, e in self.module.factors.items() if (e is bias) == self.is_bias}
        return {key: Factor.of(self.file, entry, self.where) for key, entry in chosen.items()}

    def source(self) -> SourceBinding:
        """The plan's source over the place."""
        shape = self.place.shape
        if self.is_bias:
            ((name, factor),) = self.factors.items()
            return SourceBinding(Dense(factor.kind), (name,), math.prod(shape), 1, ())
        specs = {name: FactorSpec(tuple(e.shape), KINDS[e.dtype]) for name, e in self.module.factors.items()}
        shape = shape[::-1] if self.transposed else shape
        return weight_source(self.module.algorithm, specs, shape, on_input=self.module.on_input, name=self.where)

    def part(self, first: int, rows: Rows) -> Change | None:
        """The change of `rows` alone, to which the module's outputs from `first` on belong; None: no factors make it.

        A part of DoRA's columns would need the norms of all rows, and is not asked for.
        """
        assert not self.is_dora, self.where
        module = rows_of(self.module, first, rows.count, bias=self.is_bias)
        if module is None or self.transposed:
            return None
        return replace(self, module=module, place=Place((rows,), (rows.count, *self.place.shape[1:])))


Changes = Mapping[Place, Sequence[Change]]
"""Changes by the rows that they change; those of different places have no row in common."""


def collect_changes(adapters: Sequence[LoadedAdapter]) -> list[Change]:
    """Every change, in the order of the adapters and their modules."""
    found = []
    for adapter in adapters:
        for row in adapter.matching.matched:
            where = f"{adapter.path}: module {row.module.stem!r}"
            found.append(Change(where, row.module, row.weight, adapter.file, adapter.strength))
            if row.bias is not None:
                found.append(Change(where, row.module, row.bias, adapter.file, adapter.strength, is_bias=True))
    return found


def by_place(changes: Sequence[Change], tensors: Mapping[str, TensorEntry]) -> dict[Place, list[Change]]:
    """Group `changes` by what they change.

    Where one changes a fused weight and another a part of it, both are cut where the parts end, so that each row is
    still rounded once.

    Args:
        changes: None of them idle.
        tensors: The base's.

    Raises:
        RefusedInput: such a change cannot be cut, or is DoRA.
    """
    groups = _grouped(changes)
    reasons = dict.fromkeys(_sharing(groups), _SHARED)
    for place in groups:
        if len({tensors[run.tensor].dtype for run in place.runs}) > 1:
            reasons.setdefault(place, _MIXED)
    if not reasons:
        return groups
    bounds: dict[str, set[int]] = {}
    for run in (run for place in reasons for run in place.runs):
        bounds.setdefault(run.tensor, set()).update((run.first, run.first + run.count))
    cut: list[Change] = []
    for place, group in groups.items():
        for change in group:
            cut += _cut(change, bounds, reasons[place]) if place in reasons else [change]
    return _grouped(cut)


def _grouped(changes: Sequence[Change]) -> dict[Place, list[Change]]:
    groups: dict[Place, list[Change]] = {}
    for change in changes:
        groups.setdefault(change.place, []).append(change)
    return groups


def _sharing(groups: Mapping[Place, Sequence[Change]]) -> set[Place]:
    """Places of which some rows, but not the same in the same order, are another's too."""
    runs: dict[str, list[tuple[int, int, int, Place]]] = {}
    for number, place in enumerate(groups):
        for run in place.runs:
            runs.setdefault(run.tensor, []).append((run.first, run.first + run.count, number, place))
    found = set()
    for of_tensor in runs.values():
        of_tensor.sort(key=lambda run: run[:3])
        open_run = of_tensor[0]
        for run in of_tensor[1:]:
            if run[0] < open_run[1] and run[3] != open_run[3]:
                found |= {run[3], open_run[3]}
            open_run = max(open_run, run, key=lambda run: run[1])
    return found


def _cut(change: Change, bounds: Mapping[str, set[int]], reason: _Reason) -> list[Change]:
    """`change` as changes of the rows between `bounds`."""
    fault = f"{change.where}: changes rows of {change.place.name}, and {reason.what}:"
    if change.is_dora:
        raise RefusedInput(f"{fault} DoRA holds for all of its rows together, and alone; {reason.advice_for_dora}")
    parts, offset = [], 0
    for run in change.place.runs:
        points = sorted(point for point in bounds[run.tensor] if run.first <= point <= run.first + run.count)
        for first, end in pairwise(points):
            row = offset + first - run.first
            part = change.part(row, Rows(run.tensor, first, end - first))
            if part is None:
                raise RefusedInput(
                    f"{fault} {change.module.algorithm} factors cannot be cut at its rows {row} to "
                    f"{row + end - first}; {reason.advice}"
                )
            parts.append(part)
        offset += run.count
    return parts
