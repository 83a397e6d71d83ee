"""Ways between files and the device: a block of page-locked memory and a stream for each thread at work."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import TracebackType

from plans.core import Device, DeviceBuffer


class Lane:
    """A block of host memory with a stream that copies out of it and into it.

    Attributes:
        block: The memory, uint8.
    """

    def __init__(self, device: Device, nbytes: int, held: ExitStack) -> None:
        """Allocate; closing `held` gives the memory back."""
        memory = device.pinned(nbytes)
        held.callback(memory.close)
        self.block = memory.array
        self._device, self._stream = device, device.stream()

    def copy_in(self, slot: DeviceBuffer, start: int, nbytes: int) -> None:
        """The block's first `nbytes` to `slot` from byte `start` on; they are there on return."""
        self._device.copy_in(slot, start, self.block[:nbytes], self._stream)
        self._device.synchronize(self._stream)

    def copy_out(self, slot: DeviceBuffer, start: int, nbytes: int) -> None:
        """Bytes of `slot` from `start` on to the block's first `nbytes`; they are there on return."""
        self._device.copy_out(self.block[:nbytes], slot, start, self._stream)
        self._device.synchronize(self._stream)


class Lanes:
    """Lanes that threads take and give back, used as a context that frees them. One is made where none is free."""

    def __init__(self, device: Device, block_bytes: int) -> None:
        self._device, self._block_bytes = device, block_bytes
        self._free: queue.SimpleQueue[Lane] = queue.SimpleQueue()
        self._held = ExitStack()
        self._lock = threading.Lock()

    @contextmanager
    def take(self) -> Iterator[Lane]:
        """A lane that is the caller's own within the block."""
        try:
            lane = self._free.get_nowait()
        except queue.Empty:
            with self._lock:
                lane = Lane(self._device, self._block_bytes, self._held)
        try:
            yield lane
        finally:
            self._free.put(lane)

    def __enter__(self) -> Lanes:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._held.close()
