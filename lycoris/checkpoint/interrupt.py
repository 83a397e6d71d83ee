"""Signals that end a process, as exceptions that unwind it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from lycoris.errors import MergeFailed

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class _Terminated(BaseException):
    """Not an Exception, so that no library on the way takes it for an error of its own."""


@contextmanager
def interruptible() -> Iterator[None]:
    """Let Ctrl-C, SIGTERM and SIGHUP unwind the block, so that its context managers clean up.

    Ctrl-C leaves as KeyboardInterrupt, the others as MergeFailed. Only the first signal counts: a second one
    must not break the clean-up off. A signal that the process ignores (SIGHUP under nohup) stays ignored.
    Outside the main thread, which alone can handle signals, this does nothing.

    Raises:
        MergeFailed: SIGTERM or SIGHUP came.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[signal.Signals] = []
    armed = True

    def unwind(number: int, frame: FrameType | None) -> None:
        nonlocal armed
        if not armed:
            return
        armed = False
        received.append(signal.Signals(number))
        raise KeyboardInterrupt if number == signal.SIGINT else _Terminated

    replaced = {
        number: handler for number in _SIGNALS if (handler := signal.getsignal(number)) not in (signal.SIG_IGN, None)
    }
    try:
        for number in replaced:
            signal.signal(number, unwind)
        yield
    except _Terminated:
        raise MergeFailed(f"stopped by {received[0].name} before it was done; run it again") from None
    finally:
        armed = False
        for number, handler in replaced.items():
            signal.signal(number, handler)
