"""Errors that a user of `lycoris` sees: one line each, with what was found, what was wanted, what to do."""

from __future__ import annotations

import reprlib
from typing import Any

_LINE_BREAKS = {ord(c): repr(c)[1:-1] for c in "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"}

_SHORTENED = reprlib.Repr()
_SHORTENED.maxstring = _SHORTENED.maxother = 200
_SHORTENED.maxlist = 8


class LycorisError(Exception):
    """Base of every error that `lycoris` raises on purpose.

    The message is one line. Names that come out of files may hold line breaks: they are escaped here.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.translate(_LINE_BREAKS))


class RefusedInput(LycorisError):
    """A file, an adapter or an argument cannot be used; nothing was written."""


class MergeFailed(LycorisError):
    """Work that had begun could not be finished: disk full, input changed meanwhile, stopped by a signal."""


def os_reason(error: OSError) -> str:
    """The system's words for `error`, without the path that the caller names anyway."""
    return error.strerror or type(error).__name__


def shown(value: Any) -> str:
    """`repr(value)` for a message: what a damaged file holds may be of any length, so the middle is left out."""
    return _SHORTENED.repr(value)
