"""Device time of launches: a CUDA graph of many, replayed between two events, buffers rotated past the L2 cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from cuda.bindings import driver
from cuda.core import EventOptions

from plans.core import Device

L2_BYTES = 60 << 20


def rotations(bytes_per_call: int, least: int = 4) -> int:
    """How many buffer sets make one round touch ten times the L2 cache."""
    return max(least, -(-10 * L2_BYTES // max(1, bytes_per_call)))


def graph_of(device: Device, calls: Sequence[Callable[[Any], None]]) -> Any:
    """A launchable graph of ``call(stream)`` for each call, in order."""
    builder = device._core.create_graph_builder()
    builder.begin_building()
    for call in calls:
        call(builder)
    return builder.end_building().complete()


class Replay:
    """A graph of ``call(stream)`` for each call, to be launched again and again; keeps the calls, and their memory."""

    def __init__(self, device: Device, calls: Sequence[Callable[[Any], None]]) -> None:
        self._stream, self._calls, self._count = device.stream(), calls, len(calls)
        for call in calls[:2]:  # what the first call of a kernel loads is no part of the graph
            call(self._stream)
        self._stream.sync()
        self._graph = graph_of(device, calls)
        self._graph.upload(self._stream)
        self._stream.sync()

    def seconds(self) -> float:
        """Launch the graph and wait for it: device seconds of one call."""
        options = EventOptions(timing_enabled=True)
        start = self._stream.record(options=options)
        self._graph.launch(self._stream)
        stop = self._stream.record(options=options)
        stop.sync()
        return (stop - start) * 1e-3 / self._count


def copy_call(target: int, source: int, nbytes: int) -> Callable[[Any], None]:
    """A device-to-device copy of ``nbytes``."""

    def call(stream: Any) -> None:
        handle = int(getattr(stream, "stream", stream).handle)
        (status,) = driver.cuMemcpyDtoDAsync(target, source, nbytes, handle)
        assert status == driver.CUresult.CUDA_SUCCESS, status

    return call


def fill_call(target: int, nbytes: int) -> Callable[[Any], None]:
    """A fill of ``nbytes``."""

    def call(stream: Any) -> None:
        handle = int(getattr(stream, "stream", stream).handle)
        (status,) = driver.cuMemsetD32Async(target, 0x3F803F80, nbytes // 4, handle)
        assert status == driver.CUresult.CUDA_SUCCESS, status

    return call
