"""From matched modules to jobs: what becomes of one tensor, or of a range of it, in one run of a plan."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lycoris.algorithms import FactorSpec, SourceBinding, weight_source
from lycoris.checkpoint import SafetensorsFile, TensorEntry
from lycoris.dtype import MERGEABLE, OPTIONS
from lycoris.errors import RefusedInput
from lycoris.formats import AdapterModule, Matching
from lycoris.formats.keys import DORA
from lycoris.merge.bits import KINDS, overflows
from lycoris.merge.factors import Factor
from plans.core import ElementKind, PlanError
from plans.weight import Dense, Sink, Source, WeightDescriptor, WeightLayout

# Elementwise work is cut into pieces of about this many elements: whatever a tensor's size, its pieces stream.
PIECE_ELEMENTS = 1 << 24

# Kernels take scales as float32.
_LARGEST_SCALE = float(np.finfo(np.float32).max)

_SINKS = {None: Sink.MERGE, "row": Sink.DORA_ROW, "column": Sink.DORA_COLUMN}


@dataclass(frozen=True, slots=True)
class LoadedAdapter:
    """An adapter laid over the base, with its file open for the factors."""

    path: Path
    file: SafetensorsFile
    matching: Matching
    strength: float


@dataclass(frozen=True, slots=True)
class Change:
    """What one module does to one tensor.

    Attributes:
        where: File and module, for messages.
        module: The module; its `bias` alone where `is_bias`.
        file: Holds the factors.
        strength: Of the adapter.
        is_bias: Whether the tensor is the layer's bias.
    """

    where: str
    module: AdapterModule
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

    def source(self, shape: tuple[int, ...]) -> SourceBinding:
        """The plan's source over a tensor of `shape`."""
        if self.is_bias:
            ((name, factor),) = self.factors.items()
            return SourceBinding(Dense(factor.kind), (name,), math.prod(shape), 1, ())
        specs = {name: FactorSpec(tuple(e.shape), KINDS[e.dtype]) for name, e in self.module.factors.items()}
        shape = shape[::-1] if self.transposed else shape
        return weight_source(self.module.algorithm, specs, shape, on_input=self.module.on_input, name=self.where)


@dataclass(frozen=True, slots=True)
class Job:
    """One run of a plan: W' from W, for a whole tensor or for elements [first, first + count) of it.

    Attributes:
        tensor: Of the base.
        first: First element.
        count: Elements.
        out: Kind of the result.
        where: The modules that change it, or the tensor where only its type changes, for messages.
        descriptor: The weight plan's; None where only the type changes.
        factors: Of each source, in the order of its operands.
        scales: One for each source.
        magnitude: DoRA's norms.
        strength: DoRA's.
    """

    tensor: TensorEntry
    first: int
    count: int
    out: ElementKind
    where: str
    descriptor: WeightDescriptor | None = None
    factors: tuple[tuple[Factor, ...], ...] = ()
    scales: tuple[float, ...] = ()
    magnitude: Factor | None = None
    strength: float = 1.0

    @property
    def key(self) -> tuple[str, int]:
        """Tells the job from all others of a merge."""
        return self.tensor.name, self.first

    @property
    def base(self) -> ElementKind:
        """Kind of W."""
        return KINDS[self.tensor.dtype]

    @property
    def operands(self) -> list[Factor]:
        """Everything that is read beside W."""
        flat = [factor for group in self.factors for factor in group]
        return flat if self.magnitude is None else [*flat, self.magnitude]

    def check_range(self, data: np.ndarray) -> None:
        """Refuse values among `data`, uint8, that a mere change of type makes infinite; merged ones the plan checks.

        Raises:
            RefusedInput: naming the tensor.
        """
        if self.descriptor is None and overflows(data, self.base, self.out):
            raise RefusedInput(
                f"{self.where} has finite values beyond the range of {self.out.values.name}; choose another dtype"
            )

    @property
    def in_place(self) -> bool:
        """Whether W' takes W's place in memory."""
        return self.out is self.base


def collect_changes(adapters: Sequence[LoadedAdapter]) -> dict[str, list[Change]]:
    """Every change, by the name of the base's tensor."""
    changes: dict[str, list[Change]] = {}
    for adapter in adapters:
        for row in adapter.matching.matched:
            where = f"{adapter.path}: module {row.module.stem!r}"
            weight = Change(where, row.module, adapter.file, adapter.strength)
            changes.setdefault(row.weight, []).append(weight)
            if row.bias is not None:
                bias = Change(where, row.module, adapter.file, adapter.strength, is_bias=True)
                changes.setdefault(row.bias, []).append(bias)
    return changes


def make_jobs(tensors: Mapping[str, TensorEntry], changes: Mapping[str, list[Change]], dtype: str) -> list[Job]:
    """The jobs of a merge, in the order of the base's data.

    Args:
        tensors: The base's.
        changes: From `collect_changes`, without idle ones.
        dtype: "keep", or a key of `lycoris.dtype.OPTIONS`.

    Raises:
        RefusedInput: a type or a combination of modules that is not merged.
    """
    jobs: list[Job] = []
    for name, entry in tensors.items():
        mergeable = entry.dtype in MERGEABLE
        if name in changes and not mergeable:
            raise RefusedInput(
                f"{changes[name][0].where}: changes {name!r}, which the base stores as {entry.dtype}; "
                f"wanted one of {', '.join(OPTIONS.values())}: convert the base first"
            )
        if not mergeable or not entry.count:
            continue
        out = KINDS[OPTIONS.get(dtype, entry.dtype)]
        if name in changes:
            jobs += _merge_jobs(entry, changes[name], out)
        elif out is not KINDS[entry.dtype]:
            where = f"{entry.path}: tensor {name!r}"
            for first in range(0, entry.count, PIECE_ELEMENTS):
                jobs.append(Job(entry, first, min(PIECE_ELEMENTS, entry.count - first), out, where))
    return jobs


def _merge_jobs(entry: TensorEntry, changes: list[Change], out: ElementKind) -> list[Job]:
    _refuse_mixtures(entry, changes)
    for change in changes:
        change.check_scale()
    where = " and ".join(change.where for change in changes)
    bindings = [change.source(entry.shape) for change in changes]
    if all(isinstance(binding.source, Dense) for binding in bindings) and not changes[0].transposed:
        return list(_dense_jobs(entry, changes, bindings, out, where))
    # A Tucker core splits the columns of a flat base into channels and filter; what goes with it follows.
    lead = max(bindings, key=lambda binding: math.prod(binding.kernel))
    change = changes[0]
    dora = change.module.dora if change.is_dora else None
    magnitude = change.factors[DORA] if dora else None
    try:
        descriptor = WeightDescriptor(
            lead.out_features,
            lead.in_features,
            tuple(binding.source for binding in bindings),
            base=KINDS[entry.dtype],
            out=out,
            kernel=lead.kernel,
            sink=_SINKS[dora],
            layout=WeightLayout.FLAME if change.transposed else WeightLayout.CHECKPOINT,
            magnitude=magnitude.kind if magnitude else None,
            check_finite=True,
        )
    except PlanError as error:
        raise RefusedInput(f"{where}: cannot change {entry.name!r} ({error}); merge them one by one") from error
    factors = _factors(changes, bindings)
    _check_sizes(entry, where, descriptor, factors, magnitude)
    scales = tuple(change.scale for change in changes)
    return [Job(entry, 0, entry.count, out, where, descriptor, factors, scales, magnitude, change.strength)]


def _dense_jobs(
    entry: TensorEntry, changes: list[Change], bindings: list[SourceBinding], out: ElementKind, where: str
) -> Iterator[Job]:
    """Differences are added element by element, so that any band of rows is a job. One axis is one row."""
    sources: tuple[Source, ...] = tuple(binding.source for binding in bindings)
    scales = tuple(change.scale for change in changes)
    factors = _factors(changes, bindings)
    rows = entry.shape[0] if len(entry.shape) > 1 else 1
    columns = entry.count // rows
    step = max(1, PIECE_ELEMENTS // columns)
    for row in range(0, rows, step):
        band = min(step, rows - row)
        first, count = row * columns, band * columns
        descriptor = WeightDescriptor(band, columns, sources, base=KINDS[entry.dtype], out=out, check_finite=True)
        parts = tuple((factor.part(first, count),) for (factor,) in factors)
        yield Job(entry, first, count, out, where, descriptor, parts, scales)


def _factors(changes: list[Change], bindings: list[SourceBinding]) -> tuple[tuple[Factor, ...], ...]:
    stored = [change.factors for change in changes]
    return tuple(
        tuple(own[name] for name in binding.factor_names) for own, binding in zip(stored, bindings, strict=True)
    )


def _refuse_mixtures(entry: TensorEntry, changes: list[Change]) -> None:
    if len(changes) < 2:
        return
    names = " and ".join(change.where for change in changes)
    if any(change.is_dora for change in changes):
        raise RefusedInput(
            f"{names}: both change {entry.name!r}, and one of them is DoRA, which holds for the base alone; "
            "merge one, or train them together"
        )
    if len({change.transposed for change in changes}) > 1:
        raise RefusedInput(
            f"{names}: read {entry.name!r} one as [out, in], one as [in, out]; merge them one after the other"
        )


def _check_sizes(
    entry: TensorEntry,
    where: str,
    descriptor: WeightDescriptor,
    factors: tuple[tuple[Factor, ...], ...],
    magnitude: Factor | None,
) -> None:
    """Stored factors have as many elements as the plan reads: shapes were compared before, up to their axes' split."""
    shapes = [operand.shape for group in descriptor.source_operands for operand in group]
    found = [factor for group in factors for factor in group]
    if magnitude is not None:
        shapes.append((descriptor.out_features if descriptor.sink is Sink.DORA_ROW else descriptor.in_features,))
        found.append(magnitude)
    for factor, shape in zip(found, shapes, strict=True):
        if factor.count != math.prod(shape):
            raise RefusedInput(
                f"{factor.where} has {factor.count} elements, wanted {list(shape)} "
                f"for {entry.name!r} {list(entry.shape)}"
            )
    assert math.prod(descriptor.shape) == entry.count, f"{where}: {descriptor.shape} for {entry.shape}"
