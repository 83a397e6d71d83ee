"""Devices, streams and memory: cuda.core on a GPU, NumPy arrays under Numba's simulator.

device = Device.open("auto")
stream = device.stream()
weights = device.upload(array)                 # DeviceBuffer
ref = weights.tensor(ElementKind.BF16, (3072, 3072))
back = device.download(weights, np.float32, (3072, 3072))
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable
from importlib import metadata
from typing import Any

import numpy as np

from kernels.target import SIMULATOR
from plans.core.capture import Captured, Kept, Recording, current, keeping
from plans.core.device_memory import DeviceBuffer, HostBuffer, LentBuffer, device_error, driver_errors, reported
from plans.core.errors import Unsupported
from plans.core.reserve import Reserve

ALIGNMENT = 256
_FREE_MEMORY = "free memory there or take another device"
_RESERVED_SHIFT = 7
"""Of the device's memory, the 128th part may wait for whoever asks next."""


def _check(status: Any, action: str) -> None:
    if int(status) != 0:
        raise device_error(action, status.name)


class Device:
    """One GPU, or the simulator. Open it with :meth:`open`.

    ``main_stream`` is that of whoever has none of his own, whose memory is lent again; None in the simulator.
    """

    def __init__(self, ordinal: int) -> None:
        self.ordinal = ordinal
        self.is_simulator = SIMULATOR
        if SIMULATOR:
            self.name, self.arch, self._core = "Numba CUDA simulator", (9, 0), None
        else:
            from cuda.core import Device as CoreDevice

            with reported(f"opening cuda:{ordinal}", _FREE_MEMORY):
                self._core = CoreDevice(ordinal)
                self._core.set_current()
                self.name, self.arch = self._core.name, tuple(self._core.compute_capability)
        self.main_stream = self.stream()
        self._reserve = Reserve(self.main_stream, self.total_memory >> _RESERVED_SHIFT)

    @staticmethod
    def open(which: str = "auto") -> Device:
        """``auto``: the first GPU, or the simulator where there is none; ``cuda:N``; ``simulator``.

        Raises :class:`Unsupported` where the device is not there, saying what is, and :class:`DeviceError` where it
        does not answer.
        """
        return _open(which)

    @property
    def capturing(self) -> bool:
        """Whether this thread is recording a graph, whose memory has to be its own."""
        return current.kept is not None

    @property
    def multiprocessors(self) -> int:
        """How many streaming multiprocessors the device has."""
        return 4 if SIMULATOR else self._core.properties.multiprocessor_count

    @property
    def total_memory(self) -> int:
        """Device memory in bytes."""
        if SIMULATOR:
            return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        from cuda.bindings import driver

        status, total = driver.cuDeviceTotalMem(self.ordinal)
        _check(status, f"{self.name}: asking for its memory's size")
        return total

    @functools.cached_property
    def driver_version(self) -> int:
        """CUDA's version number of the driver; 0 in the simulator."""
        if SIMULATOR:
            return 0
        from cuda.bindings import driver

        status, version = driver.cuDriverGetVersion()
        _check(status, "asking for the driver's version")
        return version

    def make_current(self) -> None:
        """Bind the device to the calling thread."""
        if not SIMULATOR:
            self._core.set_current()

    def capture(self, work: Callable[[Any], Any], stream: Any = None) -> Captured:
        """Record what ``work(stream)`` launches on the stream that it is given; memory taken meanwhile is kept.

        Nothing happens yet. Everything that it launches must have been launched before, so that kernels are loaded.
        ``stream`` is where the graph will be launched, after which its memory may be freed. Raises DeviceError.
        """
        if SIMULATOR:
            recording = Recording()
            with keeping(None, recording) as memory:
                result = work(recording)
            return Captured(result, recording.replay, memory)
        self._reserve.release()  # for the graph, whose memory is its own
        with reported(f"{self.name}: capturing a graph"):
            builder = self._core.create_graph_builder()
            builder.begin_building()
            try:
                captured = builder.stream
                with keeping(stream or self._own_stream, captured) as memory:
                    result = work(captured)
            finally:
                builder.end_building()
            graph = builder.complete()
            graph.upload(self._own_stream)
        return Captured(result, graph.launch, memory)

    def stream(self) -> Any:
        """A new stream; None in the simulator, where everything is done when the call returns."""
        if SIMULATOR:
            return None
        with reported(f"{self.name}: making a stream"):
            return self._core.create_stream()

    def allocate(self, nbytes: int, stream: Any = None) -> DeviceBuffer:
        """Memory from the stream-ordered pool, with undefined contents; without ``stream`` it is every stream's.

        Raises :class:`DeviceError` where there is not so much, naming the bytes asked for.
        """
        try:
            if SIMULATOR:
                raw = np.empty(nbytes + ALIGNMENT, np.uint8)
                start = -raw.ctypes.data % ALIGNMENT
                memory = raw[start : start + nbytes]
                return DeviceBuffer(self, memory, memory.ctypes.data, nbytes)
            owner, reserve = current.kept, self._reserve
            if owner is not None:
                return self._lend(nbytes, owner, stream is owner.captured)
            if stream is reserve.stream:
                return LentBuffer(self, reserve.again(nbytes) or self._from_pool(nbytes, stream), nbytes, reserve)
            memory = self._from_pool(nbytes, stream or self._own_stream)
            if stream is None:
                self.synchronize(self._own_stream)
            return DeviceBuffer(self, memory, int(memory.handle), nbytes)
        except driver_errors() as error:
            raise device_error(f"{self.name}: allocating {nbytes} bytes", error, _FREE_MEMORY) from error

    def _lend(self, nbytes: int, owner: Kept, again: bool) -> DeviceBuffer:
        """Memory for a graph, taken now: it stays where its launches will look for it. ``again``: they may share it."""
        memory = owner.again(nbytes) if again else None
        if memory is None:
            memory = self._from_pool(nbytes, owner.stream)
            self.synchronize(owner.stream)
            owner.keep(memory)
        return (
            LentBuffer(self, memory, nbytes, owner) if again else DeviceBuffer(self, memory, int(memory.handle), nbytes)
        )

    def _from_pool(self, nbytes: int, stream: Any) -> Any:
        """Memory of the driver's pool, to which what waits in the reserve goes back where there is not enough."""
        try:
            return self._core.allocate(max(nbytes, 1), stream=stream)
        except driver_errors():
            if not self._reserve.release():
                raise
            return self._core.allocate(max(nbytes, 1), stream=stream)

    def pinned(self, nbytes: int) -> HostBuffer:
        """Page-locked host memory for asynchronous copies.

        Raises :class:`DeviceError` where there is not so much, naming the bytes asked for.
        """
        with reported(f"page-locking {nbytes} bytes of host memory", "free host memory or raise the process's limit"):
            if SIMULATOR:
                return HostBuffer(None, np.empty(nbytes, np.uint8))
            from cuda.core import LegacyPinnedMemoryResource

            memory = LegacyPinnedMemoryResource().allocate(nbytes)
            raw = (ctypes.c_uint8 * nbytes).from_address(int(memory.handle))
            return HostBuffer(memory, np.frombuffer(raw, np.uint8))

    def copy_in(self, target: DeviceBuffer, offset: int, source: np.ndarray, stream: Any) -> None:
        """Host to device, asynchronously where ``source`` is page-locked; ``source`` is contiguous."""
        if SIMULATOR:
            if stream is not None:
                stream.record(lambda: self.copy_in(target, offset, source, None))
                return
            target._memory[offset : offset + source.nbytes] = source.reshape(-1).view(np.uint8)
            return
        from cuda.bindings import driver

        (status,) = driver.cuMemcpyHtoDAsync(
            target.address + offset, source.ctypes.data, source.nbytes, int(stream.handle)
        )
        _check(status, f"{self.name}: copying {source.nbytes} bytes to it")

    def copy_out(self, target: np.ndarray, source: DeviceBuffer, offset: int, stream: Any) -> None:
        """Device to host, asynchronously where ``target`` is page-locked; ``target`` is contiguous."""
        if SIMULATOR:
            target.reshape(-1).view(np.uint8)[:] = source._memory[offset : offset + target.nbytes]
            return
        from cuda.bindings import driver

        (status,) = driver.cuMemcpyDtoHAsync(
            target.ctypes.data, source.address + offset, target.nbytes, int(stream.handle)
        )
        _check(status, f"{self.name}: copying {target.nbytes} bytes from it")

    def fill(self, target: DeviceBuffer, byte: int, stream: Any) -> None:
        """Set every byte."""
        if SIMULATOR:
            if stream is not None:
                stream.record(lambda: self.fill(target, byte, None))
                return
            target._memory[:] = byte
            return
        from cuda.bindings import driver

        (status,) = driver.cuMemsetD8Async(target.address, byte, target.nbytes, int(stream.handle))
        _check(status, f"{self.name}: filling {target.nbytes} bytes")

    def synchronize(self, stream: Any) -> None:
        """Wait for a stream. Raises :class:`DeviceError` where work on it failed."""
        if not SIMULATOR:
            with reported(f"{self.name}: work launched on it"):
                stream.sync()

    def upload(self, array: np.ndarray, stream: Any = None) -> DeviceBuffer:
        """A new buffer with the array's bytes; returns when they are there, also while a graph is captured.

        ``stream`` may not be one that is captured.
        """
        if stream is not None:
            self._refuse_captured(f"copying {array.nbytes} bytes to it")
        array = np.ascontiguousarray(array)
        stream = stream or self._own_stream
        buffer = self.allocate(array.nbytes, stream)
        if array.nbytes:
            self.copy_in(buffer, 0, array.view(np.uint8) if array.ndim else array.reshape(1).view(np.uint8), stream)
            self.synchronize(stream)
        return buffer

    def download(
        self, buffer: DeviceBuffer, dtype: np.dtype | type, shape: tuple[int, ...], stream: Any = None
    ) -> np.ndarray:
        """The buffer's contents as a new array; returns when the work before it on ``stream`` is done."""
        self._refuse_captured(f"copying {buffer.nbytes} bytes from it")
        stream = stream or self._own_stream
        array = np.empty(shape, dtype)
        if array.nbytes:
            self.copy_out(array.reshape(-1).view(np.uint8), buffer, 0, stream)
            self.synchronize(stream)
        return array

    def _refuse_captured(self, action: str) -> None:
        if self.capturing:
            found = "a graph is being captured, which is launches alone and has no values yet"
            raise device_error(f"{self.name}: {action}", found, "do it before the capture or after a replay")

    @functools.cached_property
    def _own_stream(self) -> Any:
        return self.stream()


@functools.cache
def _open(which: str) -> Device:
    if which == "auto":
        return Device(0)
    if which == "simulator":
        if SIMULATOR:
            return Device(0)
        raise Unsupported("device simulator: this process runs on a GPU; set NUMBA_ENABLE_CUDASIM=1 before it starts")
    kind, _, number = which.partition(":")
    if kind != "cuda" or not number.isdigit():
        raise Unsupported(f"device {which!r} is not known; name one of auto, cuda:N and simulator")
    if SIMULATOR:
        raise Unsupported(f"device {which}: no NVIDIA driver with a GPU was found; use auto or simulator")
    from cuda.core import Device as CoreDevice

    found = len(CoreDevice.get_all_devices())
    if int(number) >= found:
        raise Unsupported(f"device {which}: this machine has {found} GPU(s); name one of them, numbered from cuda:0")
    return Device(int(number))


def describe() -> dict[str, Any]:
    """The device, its driver, and the versions of the libraries, for ``lycoris info``."""
    device = Device.open("auto")
    names = ("numba", "numba-cuda", "cuda-core", "cuda-bindings", "numpy", "ml_dtypes", "safetensors")
    found: dict[str, Any] = {
        "device": device.name,
        "simulator": device.is_simulator,
        "compute_capability": ".".join(map(str, device.arch)),
        "memory_bytes": device.total_memory,
        "libraries": {name: metadata.version(name) for name in names},
    }
    if not device.is_simulator:
        version = device.driver_version
        found["driver"] = f"CUDA {version // 1000}.{version % 1000 // 10}"
        found["multiprocessors"] = device.multiprocessors
    return found
