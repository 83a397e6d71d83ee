"""What recorded work leaves to do on the host before each of its replays.

A graph repeats launches with the arguments that they were recorded with. What is new each time, such as an optimiser's
step or where a generator stands, lies in device memory, and is written there by an update that was registered while the
work was recorded (`lycoris.graph`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lycoris.tensor.tensor import Storage


class Recorded:
    """Work under way, and what is left to do before each replay.

    ``happens``: the work is done now, as it is when it is called for the first time; else it is only recorded.
    ``updates`` are called in their order, the storages ``changed`` in place are counted so. ``made`` is what the work
    has made for itself, by a key.
    """

    def __init__(self, happens: bool) -> None:
        self.happens = happens
        self.updates: list[Callable[[], None]] = []
        self.changed: list[Storage] = []
        self.made: dict[Hashable, Any] = {}

    def update(self) -> None:
        """What is to be done before a replay."""
        for update in self.updates:
            update()
        for storage in self.changed:
            storage.version += 1


class _Current(threading.local):
    work: Recorded | None = None


_current = _Current()


def recorded() -> Recorded | None:
    """The work that this thread records, or calls before it does; None outside of that."""
    return _current.work


def only_recorded() -> Recorded | None:
    """The work that this thread records, of which nothing happens now; None outside of that."""
    work = _current.work
    return None if work is None or work.happens else work


@contextmanager
def recording(work: Recorded) -> Iterator[None]:
    """Within, this thread's work is that."""
    before, _current.work = _current.work, work
    try:
        yield
    finally:
        _current.work = before
