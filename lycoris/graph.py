"""Work recorded once and launched again at the cost of one launch: CUDA graphs.

graph = capture(lambda: layer(x))
x.copy_(new)                     # inputs change in place
graph.replay()
graph.result                     # the same tensor, with new contents
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lycoris.buffers import on_stream, stream_of
from lycoris.tensor.autograd import no_grad
from plans.core import Device


class Graph:
    """Recorded work; ``result`` is what it returned, rewritten by every `replay`."""

    def __init__(self, device: Device, work: Callable[[], Any]) -> None:
        def recorded(stream: Any) -> Any:
            with on_stream(stream):
                return work()

        self._device, self._captured = device, device.capture(recorded)

    @property
    def result(self) -> Any:
        """What the work returned."""
        return self._captured.result

    def replay(self) -> None:
        """Launch everything again, after what was launched before; returns at once."""
        self._captured.launch(stream_of(self._device))


def capture(work: Callable[[], Any], device: Device | None = None) -> Graph:
    """Record what ``work()`` launches; it is called twice, the first time to load and prepare what it needs.

    The work has to be the same every time: it must not copy to the host, nor depend on values there. Memory that it
    takes stays taken as long as the graph lives. Nothing is recorded for gradients.
    """
    device = device or Device.open("auto")
    with no_grad():
        work()
        device.synchronize(stream_of(device))
        return Graph(device, work)
