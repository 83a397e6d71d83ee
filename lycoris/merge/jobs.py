"""From changes to jobs: what becomes of some rows of the base, or of a part of them, in one run of a plan."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lycoris.checkpoint import TensorEntry
from lycoris.dtype import MERGEABLE, OPTIONS
from lycoris.errors import RefusedInput
from lycoris.formats import Place
from lycoris.formats.keys import DORA
from lycoris.merge.bits import KINDS, overflows
from lycoris.merge.changes import Change, Changes
from lycoris.merge.factors import Factor
from lycoris.sources import SourceBinding
from plans.core import ElementKind, PlanError
from plans.weight import Dense, Sink, Source, WeightDescriptor, WeightLayout

# Elementwise work is cut into pieces of about this many elements: whatever a tensor's size, its pieces stream.
PIECE_ELEMENTS = 1 << 24

_SINKS = {None: Sink.MERGE, "row": Sink.DORA_ROW, "column": Sink.DORA_COLUMN}


@dataclass(frozen=True, slots=True)
class Extent:
    """Elements [first, first + count) of a tensor of the base."""

    tensor: TensorEntry
    first: int
    count: int


@dataclass(frozen=True, slots=True)
class Job:
    """One run of a plan: W' from W, for some elements of the base.

    Attributes:
        extents: Those elements, one run after the other: of one tensor, or of several of one kind.
        out: Kind of the result.
        where: The modules that change it, or the tensor where only its type changes, for messages.
        descriptor: The weight plan's; None where only the type changes.
        factors: Of each source, in the order of its operands.
        scales: One for each source.
        magnitude: DoRA's norms.
        strength: DoRA's.
    """

    extents: tuple[Extent, ...]
    out: ElementKind
    where: str
    descriptor: WeightDescriptor | None = None
    factors: tuple[tuple[Factor, ...], ...] = ()
    scales: tuple[float, ...] = ()
    magnitude: Factor | None = None
    strength: float = 1.0

    @property
    def count(self) -> int:
        """Number of elements."""
        return sum(extent.count for extent in self.extents)

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of the tensors that the elements are of."""
        return tuple(dict.fromkeys(extent.tensor.name for extent in self.extents))

    @property
    def base(self) -> ElementKind:
        """Kind of W."""
        return KINDS[self.extents[0].tensor.dtype]

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


def make_jobs(tensors: Mapping[str, TensorEntry], changes: Changes, dtype: str) -> list[Job]:
    """The jobs of a merge, in the order of the base's data.

    Args:
        tensors: The base's.
        changes: From `by_place`.
        dtype: "keep", or a key of `lycoris.dtype.OPTIONS`.

    Raises:
        RefusedInput: a type or a combination of modules that is not merged.
    """
    jobs: list[Job] = []
    for place, group in changes.items():
        for run in place.runs:
            _refuse_type(tensors[run.tensor], group[0])
        if math.prod(place.shape):
            out = KINDS[OPTIONS.get(dtype, tensors[place.runs[0].tensor].dtype)]
            jobs += _merge_jobs(place, _extents(place, tensors), group, out)
    covered: dict[str, list[tuple[int, int]]] = {}
    for extent in (extent for job in jobs for extent in job.extents):
        covered.setdefault(extent.tensor.name, []).append((extent.first, extent.first + extent.count))
    for name, entry in tensors.items():
        out = OPTIONS.get(dtype, entry.dtype)
        if entry.dtype in MERGEABLE and out != entry.dtype:
            jobs += _cast_jobs(entry, gaps(covered.get(name, ()), entry.count), KINDS[out])
    position = {name: number for number, name in enumerate(tensors)}
    return sorted(jobs, key=lambda job: (position[job.extents[0].tensor.name], job.extents[0].first))


def _refuse_type(entry: TensorEntry, change: Change) -> None:
    if entry.dtype not in MERGEABLE:
        raise RefusedInput(
            f"{change.where}: changes {entry.name!r}, which the base stores as {entry.dtype}; "
            f"wanted one of {', '.join(OPTIONS.values())}; convert the base first"
        )


def gaps(ranges: Iterable[tuple[int, int]], end: int) -> Iterator[tuple[int, int]]:
    """What of [0, end) none of `ranges`, [first, last), holds; they do not overlap."""
    reached = 0
    for first, last in [*sorted(ranges), (end, end)]:
        if first > reached:
            yield reached, first
        reached = last


def _extents(place: Place, tensors: Mapping[str, TensorEntry]) -> tuple[Extent, ...]:
    columns = math.prod(place.shape[1:])
    return tuple(Extent(tensors[run.tensor], run.first * columns, run.count * columns) for run in place.runs)


def _within(extents: Sequence[Extent], first: int, count: int) -> tuple[Extent, ...]:
    """Elements [first, first + count) of what `extents` are together."""
    found, position = [], 0
    for extent in extents:
        begin, end = max(first, position), min(first + count, position + extent.count)
        if begin < end:
            found.append(Extent(extent.tensor, extent.first + begin - position, end - begin))
        position += extent.count
    return tuple(found)


def _cast_jobs(entry: TensorEntry, ranges: Iterable[tuple[int, int]], out: ElementKind) -> Iterator[Job]:
    for begin, end in ranges:
        for first in range(begin, end, PIECE_ELEMENTS):
            extent = Extent(entry, first, min(PIECE_ELEMENTS, end - first))
            yield Job((extent,), out, f"{entry.path}: tensor {entry.name!r}")


def _merge_jobs(place: Place, extents: tuple[Extent, ...], changes: Sequence[Change], out: ElementKind) -> list[Job]:
    _refuse_mixtures(place, changes)
    for change in changes:
        change.check_scale()
    where = " and ".join(change.where for change in changes)
    bindings = [change.source() for change in changes]
    if all(isinstance(binding.source, Dense) for binding in bindings) and not changes[0].transposed:
        return list(_dense_jobs(place, extents, changes, bindings, out, where))
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
            base=KINDS[extents[0].tensor.dtype],
            out=out,
            kernel=lead.kernel,
            sink=_SINKS[dora],
            layout=WeightLayout.FLAME if change.transposed else WeightLayout.CHECKPOINT,
            magnitude=magnitude.kind if magnitude else None,
            check_finite=True,
            settled=True,
        )
    except PlanError as error:
        raise RefusedInput(f"{where}: cannot change {place.name!r} ({error}); merge them one by one") from error
    factors = _factors(changes, bindings)
    _check_sizes(place, where, descriptor, factors, magnitude)
    scales = tuple(change.scale for change in changes)
    return [Job(extents, out, where, descriptor, factors, scales, magnitude, change.strength)]


def _dense_jobs(
    place: Place,
    extents: tuple[Extent, ...],
    changes: Sequence[Change],
    bindings: Sequence[SourceBinding],
    out: ElementKind,
    where: str,
) -> Iterator[Job]:
    """Differences are added element by element, so that any band of rows is a job. One axis is one row."""
    base = KINDS[extents[0].tensor.dtype]
    sources: tuple[Source, ...] = tuple(binding.source for binding in bindings)
    scales = tuple(change.scale for change in changes)
    factors = _factors(changes, bindings)
    rows = place.shape[0] if len(place.shape) > 1 else 1
    columns = math.prod(place.shape) // rows
    step = max(1, PIECE_ELEMENTS // columns)
    for row in range(0, rows, step):
        band = min(step, rows - row)
        first, count = row * columns, band * columns
        descriptor = WeightDescriptor(band, columns, sources, base=base, out=out, check_finite=True, settled=True)
        parts = tuple((factor.part(first, count),) for (factor,) in factors)
        yield Job(_within(extents, first, count), out, where, descriptor, parts, scales)


def _factors(changes: Sequence[Change], bindings: Sequence[SourceBinding]) -> tuple[tuple[Factor, ...], ...]:
    stored = [change.factors for change in changes]
    return tuple(
        tuple(own[name] for name in binding.factor_names) for own, binding in zip(stored, bindings, strict=True)
    )


def _refuse_mixtures(place: Place, changes: Sequence[Change]) -> None:
    if len(changes) < 2:
        return
    names = " and ".join(change.where for change in changes)
    if any(change.is_dora for change in changes):
        raise RefusedInput(
            f"{names}: both change {place.name!r}, and one of them is DoRA, which holds for the base alone; "
            "merge one, or train them together"
        )
    if len({change.transposed for change in changes}) > 1:
        raise RefusedInput(
            f"{names}: read {place.name!r} one as [out, in], one as [in, out]; merge them one after the other"
        )


def _check_sizes(
    place: Place,
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
                f"for {place.name!r} {list(place.shape)}; give a sound adapter, or the base that it was made for"
            )
    assert math.prod(descriptor.shape) == math.prod(place.shape), f"{where}: {descriptor.shape} for {place}"
