"""Memory of one stream that nothing refers to any more, for who asks for as many bytes next.

The driver's pool takes microseconds of the host to give memory and as many to take it back, and a step of training asks
for the same sizes again and again. What is done on a stream is done in order, so that the next user need not wait.
"""

from __future__ import annotations

import threading
from typing import Any


class Reserve:
    """Memory that waits to be used again on ``stream``; where it could be more than ``most_bytes``, all goes back.

    It may be used from several threads: lists are taken from and added to in one step of the interpreter.
    """

    __slots__ = ("_free", "_lock", "_most", "_most_bytes", "stream")

    def __init__(self, stream: Any, most_bytes: int) -> None:
        self.stream, self._most_bytes = stream, most_bytes
        self._free: dict[int, list[Any]] = {}
        self._most: dict[int, int] = {}
        """How many of a size waited at once."""
        # Taken again by one thread where a search for garbage, within, gives memory back.
        self._lock = threading.RLock()

    def again(self, nbytes: int) -> Any:
        """Memory of so many bytes, what was given back last; None where none waits."""
        free = self._free.get(nbytes)
        try:
            return free.pop() if free else None
        except IndexError:  # another thread has taken the last one
            return None

    def give_back(self, nbytes: int, memory: Any, stream: Any = None) -> None:
        """Memory of so many bytes that was used on the reserve's stream, or last on another one, which is not kept."""
        if stream is not None and stream is not self.stream:
            memory.close(stream)
            return
        free = self._free.get(nbytes)
        if free is None:
            free = self._free.setdefault(nbytes, [])
        free.append(memory)
        if len(free) > self._most.get(nbytes, 0):
            self._count(nbytes, len(free))

    def _count(self, nbytes: int, waiting: int) -> None:
        """More of a size wait than ever: whether all sizes together could be too many bytes."""
        with self._lock:
            self._most[nbytes] = max(waiting, self._most.get(nbytes, 0))
            if sum(size * count for size, count in self._most.items()) > self._most_bytes:
                self.release()

    def release(self) -> bool:
        """Let everything go, with the last reference to which the driver takes it back; whether there was anything."""
        with self._lock:
            found, self._free, self._most = self._free, {}, {}
        return any(found.values())
