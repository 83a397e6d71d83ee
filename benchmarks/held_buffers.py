"""Device memory that a benchmark's problem holds for as long as it is open."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Self

import numpy as np

from plans.core import Device, DeviceBuffer


class HeldBuffers:
    """A context manager, which frees its buffers when the work on its stream is done."""

    def __init__(self, device: Device) -> None:
        self.device, self._held, self._stream = device, ExitStack(), device.stream()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.device.synchronize(self._stream)
        self._held.close()

    @contextmanager
    def _freed_on_failure(self) -> Iterator[None]:
        """Buffers that were taken are freed if the block, in which the others are taken, fails."""
        with ExitStack() as failed:
            failed.callback(self._held.close)
            yield
            failed.pop_all()

    def _hold(self, buffer: DeviceBuffer) -> DeviceBuffer:
        self._held.callback(buffer.close)
        return buffer

    def _take(self, nbytes: int) -> DeviceBuffer:
        return self._hold(self.device.allocate(nbytes, self._stream))

    def _upload(self, array: np.ndarray) -> DeviceBuffer:
        return self._hold(self.device.upload(array))
