"""Choices that are measured on the device once, and kept on disk: which tile, how many stages.

Choices are kept by family and class of problem (`plans.core.records`). ``LYCORIS_TUNE=off`` turns measuring off:
choices that are not recorded are then a family's own estimate.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

from kernels.target import SIMULATOR
from plans.core.device import Device
from plans.core.records import Records

Candidate = TypeVar("Candidate", bound=Hashable)
LAUNCHES, ROUNDS = 10, 5
CHOICES = Records("tuning")
_lock = threading.RLock()


def enabled() -> bool:
    """Whether choices that are not recorded are measured: not in the simulator, nor where it is turned off."""
    setting = os.environ.get("LYCORIS_TUNE", "on")
    if setting not in ("on", "off"):
        raise ValueError(f"LYCORIS_TUNE is {setting!r}, wanted on or off; set one of them, or unset it")
    return setting == "on" and not SIMULATOR


def tuned(
    device: Device,
    family: str,
    problem: Hashable,
    candidates: Sequence[Candidate],
    seconds: Callable[[Candidate], float],
    measuring: bool | None = None,
) -> Candidate:
    """The fastest candidate for a class of problems on a device; the first, which a family estimates best, unmeasured.

    Candidates and ``problem`` are plain data. ``seconds`` measures one; ``measuring`` overrides :func:`enabled`.
    """
    key = f"{family} {problem!r}"
    by_name = {repr(candidate): candidate for candidate in candidates}
    with _lock:
        found = by_name.get(CHOICES.get(device, key) or "")
        if found is None:
            if not (enabled() if measuring is None else measuring):
                return candidates[0]
            found = min(candidates, key=seconds)
            CHOICES.put(device, key, repr(found))
    return found


def device_seconds(device: Device, launch: Callable[[Any], None]) -> float:
    """The shortest of several rounds of a launch on a GPU, seconds a launch."""
    from cuda.core import EventOptions

    stream, options = device._own_stream, EventOptions(timing_enabled=True)
    launch(stream)
    shortest = math.inf
    for _ in range(ROUNDS):
        start = stream.record(options=options)
        for _ in range(LAUNCHES):
            launch(stream)
        stop = stream.record(options=options)
        stop.sync()
        shortest = min(shortest, (stop - start) * 1e-3 / LAUNCHES)
    return shortest
