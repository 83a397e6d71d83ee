"""Two Linux system calls that Python's `os` does not offer."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_SYNC_FILE_RANGE_WRITE = 2

_libc = ctypes.CDLL(None, use_errno=True)
_libc.renameat2.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]
_libc.sync_file_range.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]


def exchange(first: Path, second: Path) -> None:
    """Swap two existing paths in one atomic step (renameat2 with RENAME_EXCHANGE).

    Raises:
        OSError: EINVAL where the filesystem cannot do it.
    """
    _check(_libc.renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE))


def start_writeback(descriptor: int, offset: int, nbytes: int) -> None:
    """Begin writing dirty pages of a file range to disk, without waiting for it (sync_file_range).

    It gives no guarantee: that is what fsync is for, which then finds little left to do.
    """
    _check(_libc.sync_file_range(descriptor, offset, nbytes, _SYNC_FILE_RANGE_WRITE))


def _check(status: int) -> None:
    if status != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
