"""Learning rates over steps: functions of the number of the step, from 0, to a factor of the learning rate.

optimizer = AdamW(parameters, 1e-3, schedule=warmup(cosine(10_000), 500))
"""

from __future__ import annotations

import math
from collections.abc import Callable

from lycoris.errors import RefusedInput

Schedule = Callable[[int], float]


def constant() -> Schedule:
    """Always 1."""
    return lambda step: 1.0


def linear(steps: int, last: float = 0.0) -> Schedule:
    """From 1 to ``last`` in even steps, then ``last``."""
    _positive("linear", steps)
    return lambda step: 1 + (last - 1) * min(step, steps) / steps


def cosine(steps: int, last: float = 0.0) -> Schedule:
    """Half a cosine wave from 1 to ``last`` (arXiv:1608.03983), then ``last``."""
    _positive("cosine", steps)
    return lambda step: last + (1 - last) * 0.5 * (1 + math.cos(math.pi * min(step, steps) / steps))


def warmup(schedule: Schedule, steps: int) -> Schedule:
    """1 / steps, 2 / steps, ... 1 in the first ``steps`` steps; then ``schedule`` from its beginning."""
    _positive("warmup", steps)
    return lambda step: (step + 1) / steps if step < steps else schedule(step - steps)


def _positive(name: str, steps: int) -> None:
    if steps < 1:
        raise RefusedInput(f"{name}: {steps} steps, wanted 1 or more; give another number")


SCHEDULES: dict[str, Callable[..., Schedule]] = {"constant": constant, "linear": linear, "cosine": cosine}
"""Name -> schedule, for configurations."""
