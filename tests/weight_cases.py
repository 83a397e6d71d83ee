"""Cases of the weight plan, generated from tables: sources, sinks, layouts, kinds, shapes, for every SKU that accepts.

`run_case` evaluates one with fresh random factors into poisoned memory, beside its float64 reference.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from plans.core import BackendKind, Device, DeviceBuffer, ElementKind, PlanPreference, Sku, TensorMut, Workspace
from plans.core.precision import PrecisionGuarantee, round_to
from plans.weight import (
    ChannelScale,
    Dense,
    GroupedWeightPlan,
    Hadamard,
    Kronecker,
    LowRank,
    Sink,
    Source,
    WeightArgs,
    WeightDescriptor,
    WeightLayout,
    WeightPlan,
)

BF16, F16, F32 = ElementKind.BF16, ElementKind.F16, ElementKind.F32


@dataclass(frozen=True)
class Shape:
    """A weight [out, channels, *kernel], split for Kronecker products as out = a * c, channels = b * d."""

    a: int
    b: int
    c: int
    d: int
    kernel: tuple[int, ...] = ()

    @property
    def out(self) -> int:
        return self.a * self.c

    @property
    def channels(self) -> int:
        return self.b * self.d

    def __str__(self) -> str:
        return "x".join(map(str, (self.out, self.channels, *self.kernel)))


SHAPES = (
    Shape(1, 1, 1, 1),
    Shape(1, 1, 13, 17),
    Shape(1, 1, 1, 33),
    Shape(3, 1, 11, 31),
    Shape(1, 5, 16, 8),
    Shape(5, 3, 3, 8),
    Shape(2, 9, 8, 4, (1,)),
    Shape(3, 2, 2, 3, (3,)),
    Shape(2, 1, 4, 8, (3, 3)),
    Shape(1, 2, 3, 1, (2, 2, 2)),
    Shape(1, 1, 0, 8),
    Shape(1, 1, 8, 0),
)

Kinds = Iterator[ElementKind]


def low_rank(k: Kinds, rank: int) -> LowRank:
    return LowRank(rank, next(k), next(k))


def tucker(k: Kinds, rank: int, core_rank: int, transposed: bool = True) -> LowRank:
    return LowRank(rank, next(k), next(k), left_transposed=transposed, core=next(k), core_rank=core_rank)


def kronecker(s: Shape, w1: ElementKind | LowRank, w2: ElementKind | LowRank) -> Kronecker:
    return Kronecker(s.a, s.b, s.c, s.d, w1, w2)


SOURCES: dict[str, Callable[[Shape, Kinds], tuple[Source, ...]]] = {
    "locon r1": lambda s, k: (low_rank(k, 1),),
    "locon r17": lambda s, k: (low_rank(k, 17),),
    "locon r150": lambda s, k: (low_rank(k, 150),),
    "locon r0": lambda s, k: (low_rank(k, 0),),
    "locon tucker": lambda s, k: (tucker(k, 5, 3, transposed=False),),
    "loha r4": lambda s, k: (Hadamard(low_rank(k, 4), low_rank(k, 4)),),
    "loha tucker": lambda s, k: (Hadamard(tucker(k, 2, 3), tucker(k, 3, 2)),),
    "lokr full full": lambda s, k: (kronecker(s, next(k), next(k)),),
    "lokr full factored": lambda s, k: (kronecker(s, next(k), low_rank(k, 3)),),
    "lokr factored full": lambda s, k: (kronecker(s, low_rank(k, 2), next(k)),),
    "lokr both factored": lambda s, k: (kronecker(s, low_rank(k, 2), low_rank(k, 16)),),
    "lokr tucker": lambda s, k: (kronecker(s, next(k), tucker(k, 2, 2)),),
    "dense": lambda s, k: (Dense(next(k)),),
    "ia3 out": lambda s, k: (ChannelScale(next(k), "out"),),
    "ia3 in": lambda s, k: (ChannelScale(next(k), "in"),),
    "two locons": lambda s, k: (low_rank(k, 4), low_rank(k, 16)),
    "locon, lokr, dense": lambda s, k: (low_rank(k, 3), kronecker(s, next(k), next(k)), Dense(next(k))),
}

# Base, result, kinds that the factors take in turn.
MIXTURES: tuple[tuple[ElementKind, ElementKind, tuple[ElementKind, ...]], ...] = (
    (BF16, BF16, (BF16,)),
    (F16, F16, (F16,)),
    (F32, F32, (F32,)),
    (BF16, BF16, (F16,)),
    (BF16, BF16, (F32, BF16)),
    (F16, F16, (BF16, F32, F16)),
    (F32, F32, (F16, BF16)),
    (F32, BF16, (BF16,)),
    (BF16, F16, (F32,)),
)

FORMS = tuple(itertools.product(Sink, WeightLayout))

# More than one tile of a GPU's blocks in each direction, and a ragged end.
LARGE = (Shape(3, 1, 43, 136), Shape(1, 3, 65, 88))
LARGE_SOURCES = ("locon r17", "loha r4", "lokr full full", "lokr both factored", "dense")
# Kronecker products of many blocks: short rows side by side, and rows longer than a tile.
BLOCKS = (Shape(2, 12, 17, 8), Shape(2, 5, 3, 24), Shape(1, 3, 5, 264))
BLOCKS_SOURCES = tuple(name for name in SOURCES if name.startswith("lokr"))
LARGE_FORMS = ((Sink.MERGE, WeightLayout.CHECKPOINT), (Sink.DORA_ROW, WeightLayout.CHECKPOINT))


@dataclass(frozen=True)
class Case:
    """A descriptor for one SKU."""

    name: str
    sku: Sku
    descriptor: WeightDescriptor

    def __str__(self) -> str:
        return self.name


def cases() -> list[Case]:
    """Sources x sinks x layouts, each with half of the shapes, the mixtures in turn, for every SKU that accepts.

    Every source meets every shape. The tiled SKUs meet the large ones too, which take the portable one too long.
    """
    found = []
    for row, (source, form) in enumerate(itertools.product(SOURCES, FORMS)):
        if source.startswith("ia3") and form[0] is Sink.DELTA:
            continue
        first = (row // len(FORMS) + sum(divmod(row % len(FORMS), 2))) % 2
        for shape in SHAPES[first::2]:
            found += _accepting(source, form, shape, MIXTURES[row % len(MIXTURES)], WeightPlan.skus)
    for row, (source, form) in enumerate(itertools.product(LARGE_SOURCES, LARGE_FORMS)):
        skus = [sku for sku in WeightPlan.skus if sku.backend is not BackendKind.PORTABLE]
        found += _accepting(source, form, LARGE[row % 2], MIXTURES[row % len(MIXTURES)], skus)
    for row, (shape, source) in enumerate(itertools.product(BLOCKS, BLOCKS_SOURCES)):
        form = ((Sink.DELTA, Sink.MERGE)[row % 2], WeightLayout.CHECKPOINT)
        skus = [sku for sku in WeightPlan.skus if sku.backend is BackendKind.VECTOR]
        found += _accepting(source, form, shape, MIXTURES[row % len(MIXTURES)], skus)
    return found


def _accepting(
    source: str,
    form: tuple[Sink, WeightLayout],
    shape: Shape,
    mixture: tuple[ElementKind, ElementKind, tuple[ElementKind, ...]],
    skus: Sequence[Sku],
) -> Iterator[Case]:
    """The case for every SKU that does not refuse its descriptor itself."""
    base, out, factors = mixture
    (sink, layout), sources = form, SOURCES[source](shape, itertools.cycle(factors))
    descriptor = describe(shape, sources, out, sink, layout, base=base)
    kinds = f"{base.value} to {out.value} with {','.join(kind.value for kind in factors)}"
    for sku in skus:
        if not sku.refuses(descriptor):
            yield Case(f"{sku.name}-{source}-{sink.name}-{layout.name}-{shape}-{kinds}".lower(), sku, descriptor)


def describe(
    shape: Shape,
    sources: tuple[Source, ...],
    kind: ElementKind,
    sink: Sink = Sink.MERGE,
    layout: WeightLayout = WeightLayout.CHECKPOINT,
    check_finite: bool = False,
    base: ElementKind | None = None,
) -> WeightDescriptor:
    """A descriptor over a shape; the base has the result's kind unless another is given."""
    return WeightDescriptor(
        shape.out,
        shape.channels,
        sources,
        out=kind,
        base=None if sink is Sink.DELTA else base or kind,
        kernel=shape.kernel,
        sink=sink,
        layout=layout,
        magnitude=F32 if sink in (Sink.DORA_ROW, Sink.DORA_COLUMN) else None,
        check_finite=check_finite,
    )


@dataclass(frozen=True)
class Inputs:
    """What a run reads, in the stored kinds' values."""

    base: np.ndarray | None
    factors: list[list[np.ndarray]]
    scales: list[float]
    magnitude: np.ndarray | None
    strength: float

    @classmethod
    def random(cls, descriptor: WeightDescriptor, rng: np.random.Generator) -> Inputs:
        """Factors of about the size that makes deltas of the base's order, with zeros among the values."""

        def draw(shape: tuple[int, ...], kind: ElementKind) -> np.ndarray:
            values = rng.standard_normal(shape) * rng.choice([0.0, 0.3, 1.0], shape, p=[0.05, 0.25, 0.7])
            return round_to(values, kind)

        magnitude = None
        if descriptor.is_dora:
            count = descriptor.out_features if descriptor.sink is Sink.DORA_ROW else descriptor.in_features
            magnitude = round_to(rng.uniform(0.5, 4.0, count), descriptor.magnitude)
        return cls(
            None if descriptor.base is None else draw(descriptor.shape, descriptor.base),
            [[draw(operand.shape, operand.element) for operand in group] for group in descriptor.source_operands],
            [float(scale) for scale in rng.uniform(-1.0, 1.0, len(descriptor.sources))],
            magnitude,
            float(rng.uniform(0.1, 1.0)),
        )

    def reference(self, descriptor: WeightDescriptor) -> tuple[np.ndarray, np.ndarray]:
        """The exact result and its magnitude, float64."""
        return descriptor.reference(self.factors, self.scales, self.base, self.magnitude, self.strength)


@dataclass(frozen=True)
class Outcome:
    """What a run wrote, and what its SKU promises."""

    values: np.ndarray
    not_finite: int | None
    guarantee: PrecisionGuarantee


def select(descriptor: WeightDescriptor, sku: Sku, device: Device) -> WeightPlan:
    """The plan of that very SKU."""
    plan = WeightPlan.select(None, descriptor, PlanPreference(prefer_backend=sku.backend), device)
    assert plan.chosen is sku, f"wanted {sku.name}, selected {plan.chosen.name}"
    return plan


@dataclass(frozen=True)
class Placed:
    """The arguments of a run, in device memory whose result was NaN before."""

    descriptor: WeightDescriptor
    device: Device
    args: WeightArgs
    out: DeviceBuffer
    flag: DeviceBuffer | None

    @classmethod
    def of(cls, descriptor: WeightDescriptor, inputs: Inputs, device: Device, in_place: bool = False) -> Placed:
        """``in_place``: the result takes the base's memory."""
        sources = zip(inputs.factors, descriptor.source_operands, strict=True)
        factors = [[_tensor(v, o.element, device) for v, o in zip(*source, strict=True)] for source in sources]
        base = _tensor(inputs.base, descriptor.base, device)
        if in_place:
            out = base.owner
        else:
            out = device.upload(np.full(int(np.prod(descriptor.shape)) * descriptor.out.itemsize, 0xFF, np.uint8))
        flag = device.upload(np.zeros(1, np.int32)) if descriptor.check_finite else None
        args = WeightArgs(
            out.tensor(descriptor.out, descriptor.shape),
            factors,
            inputs.scales,
            base,
            _tensor(inputs.magnitude, descriptor.magnitude, device),
            inputs.strength,
            None if flag is None else flag.tensor(ElementKind.I32, (1,)),
        )
        return cls(descriptor, device, args, out, flag)

    def outcome(self, guarantee: PrecisionGuarantee) -> Outcome:
        """What a run that is done has written."""
        raised = None if self.flag is None else int(self.device.download(self.flag, np.int32, (1,))[0])
        return Outcome(
            self.device.download(self.out, self.descriptor.out.values, self.descriptor.shape), raised, guarantee
        )


def _tensor(values: np.ndarray | None, kind: ElementKind | None, device: Device) -> TensorMut | None:
    return None if values is None else device.upload(values).tensor(kind, values.shape)


def poisoned_workspace(plan: WeightPlan | GroupedWeightPlan, device: Device) -> Workspace:
    """As much as a plan needs, NaN."""
    return Workspace(device.upload(np.full(plan.workspace_size(), 0xFF, np.uint8)))


def run(descriptor: WeightDescriptor, sku: Sku, inputs: Inputs, device: Device) -> Outcome:
    """Evaluate on the device, in memory that was NaN before."""
    plan, stream = select(descriptor, sku, device), device.stream()
    placed = Placed.of(descriptor, inputs, device)
    plan.run(stream, poisoned_workspace(plan, device), placed.args)
    device.synchronize(stream)
    return placed.outcome(plan.precision_guarantee)


def assert_promised(outcome: Outcome, exact: np.ndarray, magnitude: np.ndarray, kind: ElementKind) -> None:
    """The guarantee holds for every value."""
    kept = outcome.guarantee.accepts(outcome.values, exact, magnitude, kind)
    if not kept.all():
        at = tuple(int(i) for i in np.argwhere(~kept)[0])
        raise AssertionError(
            f"{int((~kept).sum())} of {kept.size} values break the guarantee, first at {at}: found "
            f"{outcome.values[at]!r}, exact {exact[at]!r}, magnitude {magnitude[at]!r}"
        )
