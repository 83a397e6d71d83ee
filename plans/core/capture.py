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


class Kept:
    """Memory that a graph takes, and what of it is free again: launches run in order, so that they may share memory.

    It is taken on ``stream``. What is asked for on another stream than the ``captured`` one is no launch's result, such
    as what is uploaded: it stays as it is.
    """

    def __init__(self, stream: Any, captured: Any) -> None:
        self.stream, self.captured = stream, captured
        self.memory: list[Any] = []
        self._free: dict[int, list[Any]] = {}

    def keep(self, memory: Any) -> None:
        """Memory for as long as the graph lives."""
        self.memory.append(memory)

    def give_back(self, nbytes: int, memory: Any, stream: Any = None) -> None:
        """Memory of so many bytes for launches that follow; the graph has one order, whatever the stream."""
        self._free.setdefault(nbytes, []).append(memory)

    def again(self, nbytes: int) -> Any:
        """Memory of so many bytes that was given back, None where there is none."""
        free = self._free.get(nbytes)
        return free.pop() if free else None


@dataclass(frozen=True)
class Captured:
    """A recorded graph: what the work returned, how to launch it on a stream, and the memory that it needs."""

    result: Any
    launch: Callable[[Any], None]
    kept: Kept


class _Current(threading.local):
    kept: Kept | None = None


current = _Current()
"""``kept``: the memory of the graph that this thread captures; None outside of that."""


@contextmanager
def keeping(stream: Any, captured: Any) -> Iterator[Kept]:
    """Within, memory is taken for a graph, on a stream that is not itself captured."""
    before, current.kept = current.kept, Kept(stream, captured)
    try:
        yield current.kept
    finally:
        current.kept = before
