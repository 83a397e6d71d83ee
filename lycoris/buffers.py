"""Tensors in device memory, no more than plans and files need: a shape, an element kind and a buffer.

    w = DeviceArray.from_numpy(array)            # float32, float16 or ml_dtypes.bfloat16 keeps its kind
    w.numpy()                                    # a copy on the host, in the kind's NumPy type
    run(plan, WeightArgs(out.mut(), [[w.ref()]], [1.0]))

What is done here to a device is done on one stream of it, in order, or on the caller's by `on_stream`.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from lycoris.errors import RefusedInput
from plans.core import Device, DeviceBuffer, ElementKind, Plan, TensorMut, TensorRef, Workspace
from plans.core.precision import round_to
from plans.core.tensor import contiguous_strides

Shape = tuple[int, ...]


class DeviceArray:
    """A contiguous tensor of ``shape`` and ``kind`` at the start of ``buffer``."""

    __slots__ = ("buffer", "kind", "shape")

    def __init__(self, buffer: DeviceBuffer, shape: Shape, kind: ElementKind) -> None:
        self.buffer, self.shape, self.kind = buffer, tuple(shape), kind

    @classmethod
    def empty(cls, shape: Shape, kind: ElementKind, device: Device | None = None) -> DeviceArray:
        """Memory with undefined contents, on ``device`` or the first there is."""
        device = device or Device.open("auto")
        return cls(device.allocate(math.prod(shape) * kind.itemsize, stream_of(device)), shape, kind)

    @classmethod
    def zeros(cls, shape: Shape, kind: ElementKind, device: Device | None = None) -> DeviceArray:
        """All elements zero."""
        array = cls.empty(shape, kind, device)
        if array.buffer.nbytes:
            array.device.fill(array.buffer, 0, stream_of(array.device))
        return array

    @classmethod
    def from_numpy(
        cls, array: np.ndarray, kind: ElementKind | None = None, device: Device | None = None
    ) -> DeviceArray:
        """A copy on ``device``; with ``kind`` rounded to it once, to nearest even.

        Raises RefusedInput for an element type that no kind stores.
        """
        if kind is not None:
            array = round_to(array, kind)
        try:
            kind = ElementKind.of(array.dtype)
        except KeyError:
            names = ", ".join(str(known.values) for known in ElementKind)
            raise RefusedInput(
                f"an array of {array.dtype} has no place on the device, wanted one of {names}; convert it first"
            ) from None
        device = device or Device.open("auto")
        return cls(device.upload(array, stream_of(device)), array.shape, kind)

    @property
    def device(self) -> Device:
        """Where it lies."""
        return self.buffer.device

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    def numpy(self) -> np.ndarray:
        """A copy on the host; waits for what was launched before."""
        return self.device.download(self.buffer, self.kind.values, self.shape, stream_of(self.device))

    def reshape(self, shape: Shape) -> DeviceArray:
        """The same elements under another shape, sharing memory; one extent may be -1."""
        shape = tuple(shape)
        if -1 in shape:
            rest = math.prod(extent for extent in shape if extent != -1)
            shape = tuple(self.size // max(1, rest) if extent == -1 else extent for extent in shape)
        if math.prod(shape) != self.size:
            raise RefusedInput(
                f"a tensor of shape {self.shape} holds {self.size} elements, {shape} was asked for; ask for as many"
            )
        return DeviceArray(self.buffer, shape, self.kind)

    def ref(self) -> TensorRef:
        """The tensor as plans read it."""
        return TensorRef(*self._view())

    def mut(self) -> TensorMut:
        """The tensor as plans write it."""
        return TensorMut(*self._view())

    def _view(self) -> tuple[Any, ...]:
        data = self.buffer.pointer(self.kind.storage)
        available = self.buffer.nbytes // self.kind.itemsize
        return (
            data,
            self.shape,
            contiguous_strides(self.shape),
            self.kind,
            available,
            self.device.ordinal,
            self.buffer,
        )

    def __repr__(self) -> str:
        return f"DeviceArray(shape={self.shape}, kind={self.kind.value}, device={self.device.name!r})"


class _Chosen(threading.local):
    """A thread's own: the stream that it chose, and the device that it is bound to."""

    stream: Any = None
    device: Device | None = None


_chosen = _Chosen()


def stream_of(device: Device) -> Any:
    """The stream on which everything here is done to a device, or the one that `on_stream` chose.

    None in the simulator, where everything is done when a call returns.
    """
    if _chosen.device is not device:  # a launch wants the device bound to its thread, and threads begin without one
        device.make_current()
        _chosen.device = device
    return _chosen.stream or device.main_stream


@contextmanager
def on_stream(stream: Any) -> Iterator[None]:
    """Within, this thread works on the caller's stream, a handle or an object of cuda.core.

    torch's handle is ``torch.cuda.current_stream().cuda_stream``. Memory that was used on another stream before must be
    ready, as for any two streams.
    """
    if isinstance(stream, int):
        from cuda.core import Stream

        stream = Stream.from_handle(stream)
    before, _chosen.stream = _chosen.stream, stream
    try:
        yield
    finally:
        _chosen.stream = before


class _Scratch(threading.local):
    """A thread's own: launches of two threads on one stream take turns, and would write over each other's parts."""

    def __init__(self) -> None:
        self.by_stream: dict[tuple[int, Any], DeviceBuffer] = {}


_scratch = _Scratch()


def scratch(device: Device, nbytes: int, stream: Any = None) -> DeviceBuffer:
    """Memory for this thread's next launches on its stream alone: the same every time, grown where it is too small.

    Within a captured graph it is the graph's own. ``stream`` is `stream_of` the device, where that is known already.
    """
    stream = stream or stream_of(device)
    if device.capturing:
        return device.allocate(nbytes, stream)
    key = (device.ordinal, stream)
    found = _scratch.by_stream.get(key)
    if found is None or found.nbytes < nbytes:
        size = max(nbytes, 2 * found.nbytes if found is not None else 0)
        found = _scratch.by_stream[key] = device.allocate(size, stream)
    return found


def run(plan: Plan, args: Any) -> None:
    """Run a plan on its device's stream, with workspace taken for the run.

    Raises plans.core.PlanError where the arguments do not fit the plan, naming the operand.
    """
    stream, size = stream_of(plan.device), plan.workspace_size()
    workspace = Workspace(scratch(plan.device, size)) if size else None
    plan.run(stream, workspace, args)
