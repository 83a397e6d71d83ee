"""Memory of one stream that nothing refers to any more, for who asks for as many bytes next.

The driver's pool takes microseconds of the host to give memory and as many to take it back, and a step of training asks
for the same sizes again and again. What is done on a stream is done in order, so that the next user need not wait.
"""

from __future__ import annotations

import threading
from typing import Any


class Reserve:
    """Memory that waits to be used again on ``stream``; where it is more than ``most_bytes``, all goes back.

    It may be used from several threads.
    """

    __slots__ = ("_bytes", "_free", "_lock", "_most_bytes", "stream")

    def __init__(self, stream: Any, most_bytes: int) -> None:
        self.stream, self._most_bytes = stream, most_bytes
        self._free: dict[int, list[Any]] = {}
        self._bytes = 0
        # Taken again by one thread where a search for garbage, within, gives memory back.
        self._lock = threading.RLock()

    def again(self, nbytes: int) -> Any:
        """Memory of so many bytes, what was given back last; None where none waits."""
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
            self._free.setdefault(nbytes, []).append(memory)
            self._bytes += nbytes
            if self._bytes > self._most_bytes:
                self.release()

    def release(self) -> bool:
        """Let everything go, with the last reference to which the driver takes it back; whether there was anything."""
        with self._lock:
            found, self._free, self._bytes = self._free, {}, 0
        return any(found.values())
