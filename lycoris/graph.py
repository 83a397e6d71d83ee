"""Work recorded once and launched again at the cost of one launch: CUDA graphs.

graph = capture(lambda: layer(x))
x.copy_(new)                     # inputs change in place
graph.replay()
graph.result                     # the same tensor, with new contents

A whole training step may be recorded: gradients (within `lycoris.tensor.enable_grad`), clipping, the optimiser's step.
Each replay is a step of its own, bit for bit the one that the same calls would have made: optimisers count it and
follow their schedules, and generators go on, so that dropout draws other numbers each time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lycoris.buffers import on_stream, stream_of
from lycoris.replay import Recorded, recording
from lycoris.tensor.autograd import no_grad
from plans.core import Device


class Graph:
    """Recorded work; ``result`` is what it returned, written by every `replay`."""

    def __init__(self, device: Device, work: Callable[[], Any]) -> None:
        self._recorded = Recorded(happens=False)

        def recorded(stream: Any) -> Any:
            with on_stream(stream), recording(self._recorded):
                return work()

        self._device, self._captured = device, device.capture(recorded, stream_of(device))

    @property
    def result(self) -> Any:
        """What the work returned; it has no contents before the first `replay`."""
        return self._captured.result

    def replay(self) -> None:
        """Launch everything again, after what was launched before; returns at once."""
        self._recorded.update()
        self._captured.launch(stream_of(self._device))


def capture(work: Callable[[], Any], device: Device | None = None) -> Graph:
    """Record what ``work()`` launches; it is called twice: once for real, to load and prepare what it needs, and once
    to be recorded, when nothing happens on the device.

    The work has to launch the same every time: it must not copy to the host, nor depend on values there. Memory that it
    takes stays taken as long as the graph or a result of it lives. No gradients are recorded unless the work asks for
    them. Raises plans.core.DeviceError where it copies, RefusedInput for what cannot be repeated.
    """
    device = device or Device.open("auto")
    with no_grad():
        with recording(Recorded(happens=True)):
            work()
        device.synchronize(stream_of(device))
        return Graph(device, work)
