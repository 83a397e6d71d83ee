"""Device time of launches: a CUDA graph of many, replayed between two events, buffers rotated past the L2 cache."""

from __future__ import annotations

import statistics
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


def device_seconds(device: Device, calls: Sequence[Callable[[Any], None]], rounds: int = 15) -> float:
    """Median seconds of one call, over replays of a graph of all of them."""
    stream = device.stream()
    for call in calls[:2]:
        call(stream)
    stream.sync()
    graph = graph_of(device, calls)
    graph.upload(stream)
    for _ in range(2):
        graph.launch(stream)
    stream.sync()
    times = []
    for _ in range(rounds):
        start = stream.record(options=EventOptions(timing_enabled=True))
        graph.launch(stream)
        stop = stream.record(options=EventOptions(timing_enabled=True))
        stop.sync()
        times.append((stop - start) * 1e-3 / len(calls))
    return statistics.median(times)


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
