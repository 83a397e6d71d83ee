"""What a benchmark leaves in pytest-benchmark's record, and the gate that fails a run."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass
from typing import Any

from cases import Limit
from timing import Replay

ROUNDS = 15
WARMUP_ROUNDS = 2


@dataclass(frozen=True)
class Result:
    """A row of the table: seconds of ours, seconds of the limit, and the largest ratio of the two.

    ``gate`` is None for a number that is shown and held to nothing. ``kernel`` is the SKU that ran.
    """

    work: str
    shape: str
    algorithm: str
    kernel: str
    seconds: float
    limit: Limit
    limit_seconds: float
    gate: float | None

    @property
    def ratio(self) -> float:
        """Ours over the limit."""
        return self.seconds / self.limit_seconds

    @property
    def met(self) -> bool:
        """Whether the gate is kept; True where there is none."""
        return self.gate is None or self.ratio <= self.gate


def side_by_side(benchmark: Any, ours: Replay, limit: Replay) -> tuple[float, float]:
    """Median device seconds of one call of each, replayed in turns.

    pytest-benchmark's own statistics are wall time of a replay of ``ours``.
    """
    found: list[float] = []
    limits: list[float] = []
    benchmark.pedantic(
        lambda: found.append(ours.seconds()),
        setup=lambda: limits.append(limit.seconds()),
        rounds=ROUNDS,
        warmup_rounds=WARMUP_ROUNDS,
    )
    return statistics.median(found[WARMUP_ROUNDS:]), statistics.median(limits[WARMUP_ROUNDS:])


def record(benchmark: Any, *results: Result, **more: Any) -> None:
    """Keep the results, and whatever else is worth keeping, in the JSON; then fail where a gate is missed."""
    rows = [
        asdict(result) | {"limit": result.limit.value, "ratio": result.ratio, "met": result.met} for result in results
    ]
    benchmark.extra_info.update(results=rows, **more)
    missed = [f"{row.ratio:.3f} of {row.limit.value}, gate {row.gate:g}" for row in results if not row.met]
    assert not missed, "; ".join(missed)
