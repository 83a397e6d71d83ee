"""Memory on a device and page-locked memory on the host, and how a device's failures are told."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from kernels.target import SIMULATOR
from plans.core.errors import DeviceError
from plans.core.precision import ElementKind
from plans.core.tensor import TensorMut, contiguous_strides

if TYPE_CHECKING:
    from plans.core.capture import Kept
    from plans.core.device import Device
    from plans.core.reserve import Reserve

_RUN_AGAIN = "run it again, in a new process; if it fails again, report it"


class DeviceBuffer:
    """Bytes on a device, aligned to 256. Freed when closed or collected, in stream order."""

    __slots__ = ("_memory", "_whole", "address", "device", "nbytes")

    def __init__(
        self, device: Device, memory: Any, address: int, nbytes: int, whole: DeviceBuffer | None = None
    ) -> None:
        self.device, self._memory, self.address, self.nbytes = device, memory, address, nbytes
        self._whole = whole

    def part(self, start: int, nbytes: int) -> DeviceBuffer:
        """Bytes [start, start + nbytes) as a buffer that keeps this one; closing it frees nothing."""
        assert 0 <= start <= start + nbytes <= self.nbytes, (start, nbytes, self.nbytes)
        memory = self._memory[start : start + nbytes] if SIMULATOR else None
        return DeviceBuffer(self.device, memory, self.address + start, nbytes, self)

    def pointer(self, dtype: np.dtype | type = np.uint8, byte_offset: int = 0) -> Any:
        """The buffer as a kernel argument: an address, or in the simulator a flat array of ``dtype``."""
        if not SIMULATOR:
            return self.address + byte_offset
        tail = self._memory[byte_offset : self.nbytes]
        size = np.dtype(dtype).itemsize
        return tail[: len(tail) // size * size].view(dtype)

    def tensor(self, element: ElementKind, shape: tuple[int, ...], byte_offset: int = 0) -> TensorMut:
        """A contiguous view of ``shape`` at ``byte_offset``."""
        return TensorMut(
            self.pointer(element.storage, byte_offset),
            tuple(shape),
            contiguous_strides(tuple(shape)),
            element,
            max(0, self.nbytes - byte_offset) // element.itemsize,
            self.device.ordinal,
            self,
        )

    def close(self, stream: Any = None) -> None:
        """Give the memory back, after the work already on ``stream``."""
        if not SIMULATOR and self._memory is not None:
            with reported(f"{self.device.name}: freeing {self.nbytes} bytes"):
                self._memory.close(stream)
        self._memory = self._whole = None


class LentBuffer(DeviceBuffer):
    """Memory that its owner, a graph or a stream's reserve, lends again where nothing refers to it any more."""

    __slots__ = ("_owner",)

    def __init__(self, device: Device, memory: Any, nbytes: int, owner: Kept | Reserve) -> None:
        self.device, self._memory, self.address, self.nbytes = device, memory, int(memory.handle), nbytes
        self._whole, self._owner = None, owner

    def close(self, stream: Any = None) -> None:
        """Give the memory back to its owner, after the work already on ``stream``."""
        memory, self._memory = self._memory, None
        if memory is not None:
            self._owner.give_back(self.nbytes, memory, stream)

    def __del__(self) -> None:
        if self._memory is not None:
            self._owner.give_back(self.nbytes, self._memory)


class HostBuffer:
    """Page-locked host memory; ``array`` is its bytes."""

    __slots__ = ("_memory", "array")

    def __init__(self, memory: Any, array: np.ndarray) -> None:
        self._memory, self.array = memory, array

    def close(self) -> None:
        """Give the memory back; nothing may be in flight."""
        self.array = None
        if self._memory is not None:
            with reported("freeing page-locked memory"):
                self._memory.close()
            self._memory = None


@functools.cache
def driver_errors() -> tuple[type[Exception], ...]:
    """What is raised where a device fails; in the simulator, where host memory ends."""
    if SIMULATOR:
        return (MemoryError,)
    # cuda.core raises this class of its own and exports it nowhere else.
    from cuda.core._utils.cuda_utils import CUDAError

    from kernels.launch import LaunchError

    return (CUDAError, LaunchError)


def device_error(action: str, error: Exception | str, advice: str = _RUN_AGAIN) -> DeviceError:
    """One line: what failed, the driver's words, what to do."""
    return DeviceError(f"{action} failed ({' '.join(str(error).split())}); {advice}")


@contextmanager
def reported(action: str, advice: str = _RUN_AGAIN) -> Iterator[None]:
    """Failures of the device within the block are a DeviceError."""
    try:
        yield
    except driver_errors() as error:
        raise device_error(action, error, advice) from error
