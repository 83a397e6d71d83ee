"""What stands in for a GPU: blocks of greenlets, warp operations, and shared memory that starts as NaN.

Numba's own simulator runs each CUDA thread as an operating-system thread and polls barriers; here each is a
greenlet, switched only where it waits. That is deterministic and some sixty times faster where there are
barriers.

It is stricter than hardware, so that what passes here is defined there. Refused with an error: a barrier that
some threads of a block cannot reach, threads of one warp that meet at different barriers or warp operations,
and warp operations in a warp of fewer than 32 threads. A thread that has returned counts as arrived at block
barriers. Shared and local memory start as NaN, and a shared array's address is a multiple of the alignment
asked for (its element's size where none is) and of nothing larger. Every other block runs its threads backwards,
so that a missing barrier shows in one order if not in the other.

The blocks of a cluster take turns, all others run one after the other. Hopper's asynchronous operations happen at
the worst time that their definition allows: loads at once, so that they overwrite what is still being read; products
and stores when they are waited for, so that they read what was overwritten too soon.
"""

from __future__ import annotations

import contextvars
import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
from greenlet import getcurrent, greenlet
from numba.cuda import types
from numba.cuda.np import numpy_support

from kernels.hardware import WARP, WARPGROUP

_TEAMS = {"warp": WARP, "team of 64": 64, "warpgroup": WARPGROUP, "team of 256": 256, "team of 512": 512}
"""Who can meet without the rest of the block, and how many threads they are."""
_NAMES = {size: name for name, size in _TEAMS.items()}
# Blocks along x, y and z, and threads in a block, that a GPU takes.
_LIMITS = (2**31 - 1, 65535, 65535, 1024)


class _Thread(greenlet):
    """One CUDA thread; `waiting` names what for, or is None, and `site` is the instruction it waits at.

    `ready` is asked again and again while it waits for an "event".
    """

    def __init__(self, function: Callable, block: _Block, index: int) -> None:
        super().__init__(self._execute)
        self._function = function
        self.gr_context = contextvars.copy_context()
        self.block = block
        self.thread_id = index
        self.waiting: str | None = None
        self.site: tuple | None = None
        self.value: Any = None
        self.result: Any = None
        self.copies: list[tuple[np.ndarray, np.ndarray]] = []
        self.copy_groups: list[list] = []
        self.stores: list[Callable[[], None]] = []
        self.store_groups: list[list] = []
        self.products: list[Any] = []
        self.ready: Callable[[], bool] | None = None

    def _execute(self) -> None:
        self._function()
        if self.stores or self.store_groups:
            raise RuntimeError(
                f"{self.block}: thread {self.thread_id} returns while its stores still read shared memory"
            )

    def wait_for(self, ready: Callable[[], bool]) -> None:
        """Stop until `ready()`."""
        if not ready():
            self.waiting, self.ready = "event", ready
            self.parent.switch()

    def wait(self, scope: str, value: Any) -> Any:
        """Stop until the block or the warp has gathered; `site` is where the primitive was called."""
        frame = sys._getframe(3)
        self.waiting, self.site, self.value = scope, (frame.f_code, frame.f_lasti, frame.f_lineno), value
        self.parent.switch()
        return self.result


class _Block:
    def __init__(self, name: str, run: Callable, index: tuple, threads: int, launch: _Launch) -> None:
        self.name, self.index, self.launch = name, index, launch
        self.cluster: list[_Block] = [self]
        self.threads = [_Thread(run, self, i) for i in range(threads)]
        self.live = self.threads[:: -1 if sum(index) % 2 else 1]
        self.shared: dict[tuple, np.ndarray] = {}
        self.barriers: dict[int, Any] = {}

    def advance(self) -> bool:
        """Run every thread that can run up to its next wait, then deal what has gathered; whether anything did."""
        moved = False
        for thread in self.live:
            if thread.waiting == "event" and thread.ready():
                thread.waiting = thread.ready = None
            if thread.waiting is None:
                thread.switch()
                moved = True
        self.live = [thread for thread in self.live if not thread.dead]
        gathered = [self._complete(scope) for scope in sorted({thread.waiting for thread in self.live} & _TEAMS.keys())]
        gathered = any(gathered)
        if self.live and not gathered and not any(t.waiting in (None, "event", "cluster") for t in self.live):
            self._complete_block()
            gathered = True
        return moved or gathered

    def _complete(self, scope: str) -> bool:
        """Deal the results of the operations that all lanes of a warp or another team have reached."""
        gathered, size = False, _TEAMS[scope]
        for group in sorted({thread.thread_id // size for thread in self.live if thread.waiting == scope}):
            lanes = self.threads[group * size : (group + 1) * size]
            if len(lanes) < size:
                raise RuntimeError(f"{self}: a {scope} operation in a {scope} of {len(lanes)} threads, wanted {size}")
            if all(lane.waiting == scope and not lane.dead for lane in lanes):
                self._refuse_divergence(lanes)
                combine = lanes[0].value[0]
                for lane, result in zip(lanes, combine([lane.value[1] for lane in lanes]), strict=True):
                    lane.result, lane.waiting = result, None
                gathered = True
        return gathered

    def _complete_block(self) -> None:
        """Deal the result of the barrier that all live threads have reached; anything else is a deadlock."""
        for scope in _TEAMS:
            stuck = [thread.thread_id for thread in self.live if thread.waiting == scope]
            if stuck:
                raise RuntimeError(
                    f"{self}: deadlock: threads {stuck} wait at a {scope} operation for lanes that have returned "
                    f"or wait at a block barrier"
                )
        for first in range(0, len(self.threads), WARP):
            self._refuse_divergence([t for t in self.threads[first : first + WARP] if not t.dead])
        combine, *others = {thread.value[0] for thread in self.live}
        if others:
            raise RuntimeError(f"{self}: some warps wait at a barrier, others at a vote")
        result = combine([thread.value[1] for thread in self.live])
        for thread in self.live:
            thread.result, thread.waiting = result, None

    def _refuse_divergence(self, lanes: list[_Thread]) -> None:
        sites = {lane.site for lane in lanes}
        if len(sites) > 1:
            where = ", ".join(sorted(f"{code.co_qualname} line {line}" for code, _, line in sites))
            raise RuntimeError(f"{self}: threads of one warp wait at different instructions: {where}")

    def __str__(self) -> str:
        return f"{self.name} block {self.index}"


def _run_cluster(blocks: list[_Block]) -> None:
    """Run blocks together until every thread has returned."""
    for block in blocks:
        block.cluster = blocks
    while any(block.live for block in blocks):
        moved = [block.advance() for block in blocks if block.live]
        if any(moved):
            continue
        waiting = [thread for block in blocks for thread in block.live]
        if not all(thread.waiting == "cluster" for thread in waiting):
            stuck = {f"{t.block}: thread {t.thread_id} waits for its {t.waiting}" for t in waiting}
            raise RuntimeError(f"deadlock: {'; '.join(sorted(stuck))}")
        for thread in waiting:
            thread.waiting = None


def current_thread() -> _Thread:
    """The CUDA thread that is running: `thread_id`, `block.index`, `copies` not yet waited for."""
    return getcurrent()


def collective(combine: Callable[[Sequence[Any]], Sequence[Any]], value: Any) -> Any:
    """A warp operation: give this lane's `value`, take its element of `combine(values of all lanes)`."""
    return current_thread().wait("warp", (combine, value))


def warpgroup_collective(combine: Callable[[Sequence[Any]], Sequence[Any]], value: Any) -> Any:
    """The same for the 128 threads of a warpgroup."""
    return current_thread().wait("warpgroup", (combine, value))


def team_collective(threads: int, combine: Callable[[Sequence[Any]], Sequence[Any]], value: Any) -> Any:
    """The same for 32 to 512 neighbouring threads, a power of two."""
    return current_thread().wait(_NAMES[threads], (combine, value))


def cluster_collective() -> None:
    """A barrier of all threads of the cluster that have not returned."""
    current_thread().wait("cluster", None)


def block_collective(combine: Callable[[Sequence[Any]], Any], value: Any) -> Any:
    """A block barrier that gives every thread `combine(values of all threads that have not returned)`."""
    return current_thread().wait("block", (combine, value))


def _poisoned(nbytes: int, alignment: int) -> np.ndarray:
    """Bytes of NaN at an address that is a multiple of `alignment` but not of twice that."""
    raw = np.full(nbytes + 3 * alignment, 0xFF, np.uint8)
    start = (alignment - raw.ctypes.data) % (2 * alignment)
    return raw[start : start + nbytes]


def _shared_array(shape: int | tuple[int, ...], dtype: Any, alignment: int | None = None) -> np.ndarray:
    """One array per block and allocation site; the launch's dynamic bytes where the shape is 0."""
    dtype = _as_dtype(dtype)
    block, alignment = current_thread().block, alignment or dtype.itemsize
    frame = sys._getframe(1)
    site = (frame.f_code, frame.f_lasti, shape, dtype) if shape != 0 else ("dynamic", alignment)
    found = block.shared.get(site)
    if found is None:
        if shape == 0 and any(other[0] == "dynamic" for other in block.shared):
            raise RuntimeError(f"{block}: dynamic shared arrays are one memory: give all the same alignment")
        nbytes = int(np.prod(shape)) * dtype.itemsize if shape != 0 else block.launch.shared_bytes
        found = block.shared[site] = _poisoned(nbytes, alignment)
    if shape == 0:
        return found[: len(found) // dtype.itemsize * dtype.itemsize].view(dtype)
    return found.view(dtype).reshape(shape)


def _local_array(shape: int | tuple[int, ...], dtype: Any, alignment: int | None = None) -> np.ndarray:
    dtype = _as_dtype(dtype)
    return np.full(int(np.prod(shape)) * dtype.itemsize, 0xFF, np.uint8).view(dtype).reshape(shape)


# All that a kernel here takes from Numba's module itself; everything else is a primitive with a twin.
cuda = SimpleNamespace(shared=SimpleNamespace(array=_shared_array), local=SimpleNamespace(array=_local_array))


def _as_dtype(dtype: Any) -> np.dtype:
    return np.dtype(numpy_support.as_dtype(dtype) if isinstance(dtype, types.Type) else dtype)


@dataclass(frozen=True)
class _Launch:
    grid: tuple[int, int, int]
    shared_bytes: int


def launch(
    function: Callable,
    grid: tuple[int, int, int],
    threads: int,
    shared_bytes: int,
    arguments: tuple,
    cluster: int = 1,
) -> None:
    """Run a kernel function over `grid` blocks of `threads` threads, cluster by cluster along x."""
    name = function.__qualname__
    if any(not 1 <= extent <= limit for extent, limit in zip((*grid, threads), _LIMITS, strict=True)):
        raise ValueError(f"{name}: grid {grid} of {threads} threads, wanted 1 to {_LIMITS}")
    if grid[0] % cluster:
        raise ValueError(f"{name}: grid {grid}, wanted clusters of {cluster} along x")
    launched = _Launch(grid, shared_bytes)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore", under="ignore"):
        for z, y, x in np.ndindex(grid[2], grid[1], grid[0] // cluster):
            places = [(x * cluster + rank, y, z) for rank in range(cluster)]
            run = functools.partial(function, *arguments)
            _run_cluster([_Block(name, run, place, threads, launched) for place in places])
