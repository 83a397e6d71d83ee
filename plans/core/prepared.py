"""Launches that are made once for tensors of given layouts, and run wherever such tensors lie.

    prepared = Prepared(plan, [out.mut(), a.ref(), b.ref()], lambda out, a, b: MatmulArgs(out, a, b))
    prepared.run(stream, [out.data, a.data, b.data], workspace)

A plan lists its kernels' arguments from descriptions of all tensors, which costs more on the host than the launch. Here
it lists them once, with places where addresses belong; a run puts the addresses there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from kernels.target import SIMULATOR, bound
from plans.core.device import Device, DeviceBuffer
from plans.core.plan import Arguments, Launches, Plan
from plans.core.tensor import TensorRef
from plans.core.workspace import NO_WORKSPACE, Workspace

_MOST_KEPT = 1 << 10
"""Launches kept by their addresses: where a step is repeated, tensors come back to the same few."""

Template = tuple[Callable, list, tuple[tuple[int, int, int, Any], ...]]
"""A launcher, its arguments, and for each that is an address: where among them, whose, bytes from there, as what."""


class Place:
    """An address that is not known yet: of operand ``number``, ``offset`` bytes from its beginning.

    It can be added to, and nothing else: a program that reads addresses says so (`Program.reads_addresses`).
    """

    __slots__ = ("dtype", "number", "offset")

    def __init__(self, number: int, dtype: Any, offset: int = 0) -> None:
        self.number, self.dtype, self.offset = number, dtype, offset

    def __add__(self, nbytes: int) -> Place:
        return Place(self.number, self.dtype, self.offset + nbytes)


class _Unplaced(DeviceBuffer):
    """Workspace without an address: pointers into it are places."""

    __slots__ = ("_number", "_start")

    def __init__(self, device: Device, number: int, nbytes: int, start: int = 0) -> None:
        super().__init__(device, None, 0, nbytes)
        self._number, self._start = number, start

    def part(self, start: int, nbytes: int) -> _Unplaced:
        """Bytes [start, start + nbytes)."""
        return _Unplaced(self.device, self._number, nbytes, self._start + start)

    def pointer(self, dtype: np.dtype | type = np.uint8, byte_offset: int = 0) -> Any:
        """A place."""
        return Place(self._number, dtype, self._start + byte_offset)


class Prepared:
    """A plan for tensors like ``operands``, of which ``make`` makes its arguments.

    It may be used from several threads. Nothing is checked on the way: a caller whose tensors might differ from
    ``operands`` in more than their address calls `check`.
    """

    def __init__(self, plan: Plan, operands: Sequence[TensorRef], make: Callable[..., Arguments]) -> None:
        self.plan, self.device, self.workspace_bytes = plan, plan.device, plan.workspace_size()
        # Their memory is not kept: it is in use at some other address when the launches are.
        self._operands, self._make = [dataclasses.replace(o, data=None, owner=None) for o in operands], make
        self._by_address: dict[tuple, Callable[[Any], None]] = {}
        self._templates: list[Template] | None = None
        if not plan.reads_addresses:
            places = [Place(i, operand.element.storage) for i, operand in enumerate(operands)]
            work = Workspace(_Unplaced(plan.device, len(places), self.workspace_bytes))
            found = plan.launches(self._arguments(places), work if self.workspace_bytes else NO_WORKSPACE)
            self._templates = [_template(launch, arguments) for launch, arguments in found]

    def run(self, stream: Any, data: Sequence[Any], workspace: DeviceBuffer | None) -> None:
        """Launch for operands that lie at ``data``, as `TensorRef.data` has it."""
        if SIMULATOR:  # where arrays, not addresses, say what is meant
            bound(self.launches(data, workspace))(stream)
            return
        key = tuple(data) if workspace is None else (*data, workspace.address)
        found = self._by_address.get(key)
        if found is None:
            if len(self._by_address) >= _MOST_KEPT:
                self._by_address.clear()
            found = self._by_address[key] = bound(self.launches(data, workspace))
        found(stream)

    def check(self, data: Sequence[Any], available: Sequence[int]) -> None:
        """Raise a :class:`PlanError` where operands at ``data`` with so many elements do not fit the plan."""
        self.plan.can_implement(self._arguments(data, available))

    def _arguments(self, data: Sequence[Any], available: Sequence[int] | None = None) -> Arguments:
        sizes = [operand.available for operand in self._operands] if available is None else available
        pairs = zip(self._operands, data, sizes, strict=True)
        return self._make(*(dataclasses.replace(o, data=d, available=n) for o, d, n in pairs))

    def launches(self, data: Sequence[Any], workspace: DeviceBuffer | None) -> Launches:
        """What `run` launches."""
        if self._templates is None:
            return self.plan.launches(self._arguments(data), Workspace(workspace))
        given = data if workspace is None else (*data, workspace.pointer())
        return [(launch, _filled(arguments, places, given)) for launch, arguments, places in self._templates]


def _template(launch: Callable, arguments: tuple) -> Template:
    places = tuple((i, p.number, p.offset, p.dtype) for i, p in enumerate(arguments) if isinstance(p, Place))
    return launch, list(arguments), places


if SIMULATOR:

    def _filled(arguments: list, places: Sequence[tuple], data: Sequence[Any]) -> tuple:
        """The arguments with arrays in their places."""
        filled = arguments.copy()
        for at, number, offset, dtype in places:
            tail = data[number].view(np.uint8)[offset:]
            size = np.dtype(dtype).itemsize
            filled[at] = tail[: len(tail) // size * size].view(dtype)
        return tuple(filled)

else:

    def _filled(arguments: list, places: Sequence[tuple], data: Sequence[Any]) -> tuple:
        """The arguments with addresses in their places."""
        filled = arguments.copy()
        for at, number, offset, _ in places:
            filled[at] = data[number] + offset
        return tuple(filled)
