"""What is measured of hyper-connections, against what, and the gates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from plans.core import ElementKind, Plan
from plans.hyper_connection.common import NamedArguments
from plans.hyper_connection.dynamic import DynamicHyperConnectionDescriptor, DynamicHyperConnectionPlan
from plans.hyper_connection.dynamic_backward import (
    DynamicHyperConnectionBackwardDescriptor,
    DynamicHyperConnectionBackwardPlan,
)
from plans.hyper_connection.split import (
    HyperConnectionPostDescriptor,
    HyperConnectionPostPlan,
    HyperConnectionPreDescriptor,
    HyperConnectionPrePlan,
)
from plans.hyper_connection.split_backward import (
    HyperConnectionPostBackwardDescriptor,
    HyperConnectionPostBackwardPlan,
    HyperConnectionPreBackwardDescriptor,
    HyperConnectionPreBackwardPlan,
)
from plans.hyper_connection.static import HyperConnectionArgs, HyperConnectionDescriptor, HyperConnectionPlan
from plans.hyper_connection.static_backward import (
    HyperConnectionBackwardArgs,
    HyperConnectionBackwardDescriptor,
    HyperConnectionBackwardPlan,
)
from plans.sinkhorn import (
    SinkhornBackwardDescriptor,
    SinkhornBackwardPlan,
    SinkhornDescriptor,
    SinkhornMode,
    SinkhornPlan,
)

BF16, F32 = ElementKind.BF16, ElementKind.F32
ITERATIONS, EPS, STREAMS = 20, 1e-5, 4
SMALL = ((320, 1280), (512, 1920), (1280, 2560), (2560, 1280))
LARGE = (32768, 4096)


@dataclass(frozen=True)
class Work:
    """A plan: its descriptor from (batch, channels, streams, kind), and its arguments by operands' names.

    ``units`` is what it must read and write, counted in x's bytes; ``moved`` what it does read and write where that is
    more. ``gate`` is the largest ratio to a copy of the former.
    """

    name: str
    plan: type[Plan]
    describe: Any
    units: float
    moved: float
    gate: float | None


def _named(descriptor: Any, tensors: dict[str, Any]) -> Any:
    return NamedArguments(descriptor, **tensors)


def arguments(work: Work, descriptor: Any, tensors: dict[str, Any]) -> Any:
    """The plan's arguments object."""
    made = {
        HyperConnectionPlan: lambda: HyperConnectionArgs(**tensors),
        HyperConnectionBackwardPlan: lambda: HyperConnectionBackwardArgs(**tensors),
    }
    return made.get(work.plan, lambda: _named(descriptor, tensors))()


def _whole(cls: type) -> Any:
    return lambda batch, channels, n, kind: cls(batch, channels, n, ITERATIONS, EPS, kind)


def _pre(cls: type, projection: ElementKind | None) -> Any:
    return lambda batch, channels, n, kind: cls(batch, channels, n, ITERATIONS, EPS, kind, None, projection)


def _post(cls: type, per_sample: bool) -> Any:
    return lambda batch, channels, n, kind: cls(batch, channels, n, kind, per_sample)


_LINE = 1 / STREAMS
WORKS = {
    work.name: work
    for work in (
        Work("static", HyperConnectionPlan, _whole(HyperConnectionDescriptor), 2, 2, 1.15),
        Work("static backward", HyperConnectionBackwardPlan, _whole(HyperConnectionBackwardDescriptor), 3, 3, 1.3),
        Work("dynamic", DynamicHyperConnectionPlan, _whole(DynamicHyperConnectionDescriptor), 2, 2, 1.3),
        Work(
            "dynamic backward",
            DynamicHyperConnectionBackwardPlan,
            _whole(DynamicHyperConnectionBackwardDescriptor),
            3,
            5,
            1.5,
        ),
        Work(
            "pre, dynamic", HyperConnectionPrePlan, _pre(HyperConnectionPreDescriptor, BF16), 1 + _LINE, 1 + _LINE, None
        ),
        Work(
            "post, dynamic",
            HyperConnectionPostPlan,
            _post(HyperConnectionPostDescriptor, True),
            2 + _LINE,
            2 + _LINE,
            None,
        ),
        Work(
            "post backward, dynamic",
            HyperConnectionPostBackwardPlan,
            _post(HyperConnectionPostBackwardDescriptor, True),
            3 + 2 * _LINE,
            3 + 2 * _LINE,
            None,
        ),
        Work(
            "pre backward, dynamic",
            HyperConnectionPreBackwardPlan,
            _pre(HyperConnectionPreBackwardDescriptor, BF16),
            3 + _LINE,
            4 + 2 * _LINE,
            None,
        ),
        Work(
            "pre backward, static",
            HyperConnectionPreBackwardPlan,
            _pre(HyperConnectionPreBackwardDescriptor, None),
            3 + _LINE,
            3 + _LINE,
            None,
        ),
    )
}


@dataclass(frozen=True)
class Row:
    """One work at one shape; small shapes have no gate of their own, but that against torch."""

    work: str
    batch: int
    channels: int
    kind: ElementKind = BF16

    def __str__(self) -> str:
        return f"{self.work.replace(', ', '-').replace(' ', '-')}-{self.shape}-{self.kind.value}"

    @property
    def shape(self) -> str:
        """Samples x channels."""
        return f"{self.batch}x{self.channels}"

    @property
    def gate(self) -> float | None:
        """The issue's, at the large shape."""
        return WORKS[self.work].gate if (self.batch, self.channels) == LARGE else None

    def descriptor(self) -> Any:
        """The plan's problem."""
        return WORKS[self.work].describe(self.batch, self.channels, STREAMS, self.kind)


_FOUR = ("static", "static backward", "dynamic", "dynamic backward")
ROWS = (
    *(Row(work, *shape) for work in _FOUR for shape in (*SMALL, LARGE)),
    *(Row(work, *SMALL[2], F32) for work in _FOUR[:2]),
    *(Row(work, *LARGE) for work in WORKS if work not in _FOUR),
)

SINKHORN_ROWS = tuple(
    (name, plan, descriptor(batch, n, ITERATIONS, EPS, mode))
    for batch, n in ((8192, 4), (32768, 4), (8192, 8))
    for mode in SinkhornMode
    for name, plan, descriptor in (
        (f"sinkhorn-{mode.value}-{batch}x{n}", SinkhornPlan, SinkhornDescriptor),
        (f"sinkhorn-backward-{mode.value}-{batch}x{n}", SinkhornBackwardPlan, SinkhornBackwardDescriptor),
    )
)

FORWARD_OVER_NAIVE, FORWARD_OVER_COMPILED, STEP_OVER_COMPILED = 12.0, 5.0, 5.0
