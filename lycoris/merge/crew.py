"""Threads of which the first failure stops all."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any


class _Stopped(Exception):
    """A task was not begun, because another one failed."""


class Crew:
    """Pools of threads by name, used as a context.

    Leaving it waits for the tasks that run and drops those that wait; when it is left by an exception, tasks that
    have not begun do not begin.
    """

    def __init__(self, sizes: dict[str, int], initializer: Callable[[], None]) -> None:
        """`sizes`: threads of each pool; `initializer` runs first in each of them."""
        self._pools = {name: ThreadPoolExecutor(size, name, initializer) for name, size in sizes.items()}
        self._lock = threading.Lock()
        self._stopping = False
        self._failure: BaseException | None = None

    def submit(self, pool: str, task: Callable[..., None], *arguments: Any) -> Future[None]:
        """Have a thread of `pool` do `task(*arguments)`, after what was submitted before."""
        return self._pools[pool].submit(self._perform, task, arguments)

    def finish(self, futures: Iterable[Future[None]]) -> None:
        """Wait for `futures`. Raises the crew's first failure, whichever task it was in."""
        for future in futures:
            error = future.exception()
            if error is not None:
                raise error if self._failure is None else self._failure

    def _perform(self, task: Callable[..., None], arguments: tuple) -> None:
        if self._stopping:
            raise _Stopped
        try:
            task(*arguments)
        except BaseException as error:
            with self._lock:
                self._failure = error if self._failure is None else self._failure
                self._stopping = True
            raise

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stopping = self._stopping or error is not None
        for pool in self._pools.values():
            pool.shutdown(wait=True, cancel_futures=True)
