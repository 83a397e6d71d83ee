"""What is recorded while a graph is captured: the memory that it keeps, and in the simulator the work itself."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


class Recording:
    """The simulator's stand-in for a stream that is captured: what would be done is done at each replay, not before."""

    def __init__(self) -> None:
        self._steps: list[Callable[[], None]] = []

    def record(self, step: Callable[[], None]) -> None:
        """One thing to be done."""
        self._steps.append(step)

    def replay(self, stream: Any = None) -> None:
        """Do everything."""
        for step in self._steps:
            step()


@dataclass(frozen=True)
class Captured:
    """A recorded graph: what the work returned, how to launch it on a stream, and the memory that it needs."""

    result: Any
    launch: Callable[[Any], None]
    buffers: list[Any]


class Kept(threading.local):
    """Memory that this thread takes for the graph that it captures, and the stream on which it is taken."""

    buffers: list[Any] | None = None
    stream: Any = None

    @contextmanager
    def on(self, stream: Any) -> Iterator[list[Any]]:
        """Within, memory is kept; it is taken on a stream that is not itself captured."""
        before = self.buffers, self.stream
        self.buffers, self.stream = [], stream
        try:
            yield self.buffers
        finally:
            self.buffers, self.stream = before


KEPT = Kept()
