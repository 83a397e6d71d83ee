"""Which random numbers were drawn, so that a function that is called again draws the same ones.

What is kept are the streams (a seed and a number), in the order in which generators gave them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from lycoris.errors import RefusedInput


class _Log(threading.local):
    def __init__(self) -> None:
        self.notes: list[list[Any]] = []
        self.again: Iterator[Any] | None = None


_log = _Log()


def take(draw: Callable[[], Any]) -> Any:
    """The next stream of a generator, by ``draw``; or the one that was drawn at this place the time before.

    Raises RefusedInput where fewer were drawn then.
    """
    stream = draw() if _log.again is None else next(_log.again, None)
    if stream is None:
        raise RefusedInput("checkpoint: more random numbers on the way back than before; let the function do the same")
    for note in _log.notes:
        note.append(stream)
    return stream


@contextmanager
def noted() -> Iterator[list[Any]]:
    """Within, streams are noted in the list."""
    found: list[Any] = []
    _log.notes.append(found)
    try:
        yield found
    finally:
        _log.notes.pop()


@contextmanager
def repeated(streams: list[Any]) -> Iterator[None]:
    """Within, streams are those of the list."""
    before, _log.again = _log.again, iter(streams)
    try:
        yield
    finally:
        _log.again = before
