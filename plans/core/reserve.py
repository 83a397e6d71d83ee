"""Memory of one stream that nothing refers to any more, for who asks for as many bytes next.

The driver's pool takes microseconds of the host to give memory and as many to take it back, and a step of training asks
for the same sizes again and again. What is done on a stream is done in order, so that the next user need not wait.
"""

from __future__ import annotations

import threading
from typing import Any


class Reserve:
    """At most ``most_bytes`` that wait to be used again on ``stream``; of more, the oldest go back to the driver.

    It may be used from several threads.
    """

    def __init__(self, stream: Any, most_bytes: int) -> None:
        self.stream, self._most_bytes = stream, most_bytes
        self._free: dict[int, list[Any]] = {}  # by bytes; the size that was given back last stands last
        self._bytes = 0
        # Taken again by one thread where a search for garbage, within, gives memory back.
        self._lock = threading.RLock()

    def again(self, nbytes: int) -> Any:
        """Memory of so many bytes, None where none waits."""
        with self._lock:
            free = self._free.get(nbytes)
            if not free:
                return None
            self._bytes -= nbytes
            return free.pop()

    def give_back(self, nbytes: int, memory: Any, stream: Any = None) -> None:
        """Memory of so many bytes that was used on the reserve's stream, or last on another one, which is not kept."""
        if stream is not None and stream is not self.stream:
            memory.close(stream)
            return
        with self._lock:
            free = self._free.pop(nbytes, None) or []
            free.append(memory)
            self._free[nbytes] = free
            self._bytes += nbytes
            while self._bytes > self._most_bytes:
                self._drop_oldest()

    def _drop_oldest(self) -> None:
        size, free = next(iter(self._free.items()))
        if free:
            self._bytes -= size
            free.pop(0)  # the last reference: the driver takes it back in the stream's order
        else:
            del self._free[size]
