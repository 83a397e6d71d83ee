"""Where a merge's time goes."""

from __future__ import annotations

import time


class Clock:
    """Seconds since it was made, divided into phases that follow each other.

    Attributes:
        phases: Phase -> seconds, in order.
    """

    def __init__(self) -> None:
        self.phases: dict[str, float] = {}
        self._started = self._reached = time.perf_counter()

    def end(self, phase: str) -> None:
        """What passed since the last phase ended was `phase`."""
        now = time.perf_counter()
        self.phases[phase], self._reached = now - self._reached, now

    @property
    def seconds(self) -> float:
        """All of it so far."""
        return time.perf_counter() - self._started
