"""Linux system calls that Python's `os` does not offer, or not as they are."""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_SYNC_FILE_RANGE_WRITE = 2

_libc = ctypes.CDLL(None, use_errno=True)
_libc.renameat2.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
_libc.sync_file_range.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]


def exchange(first: Path, second: Path) -> None:
    """Swap two existing paths in one atomic step (renameat2 with RENAME_EXCHANGE).

    Raises:
        OSError: EINVAL where the filesystem cannot do it.
    """
    _check(_libc.renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE))


def reserve(descriptor: int, nbytes: int) -> None:
    """Give an empty file its size, and disk space for all of it where the filesystem can say so (fallocate).

    Elsewhere (NFS 3, ramfs, many in user space) it gets the size alone. `os.posix_fallocate` would then write to every
    block of the file: 2 s a GB.

    Raises:
        OSError: the disk is full, or the file larger than is allowed.
    """
    while _libc.fallocate(descriptor, 0, 0, nbytes) != 0:
        number = ctypes.get_errno()
        if number == errno.EOPNOTSUPP:
            os.ftruncate(descriptor, nbytes)
            return
        if number != errno.EINTR:  # a signal came: its handler has run by now
            raise OSError(number, os.strerror(number))


def start_writeback(descriptor: int, offset: int, nbytes: int) -> None:
    """Begin writing dirty pages of a file range to disk, without waiting for it (sync_file_range).

    It gives no guarantee: that is what fsync is for, which then finds little left to do.
    """
    _check(_libc.sync_file_range(descriptor, offset, nbytes, _SYNC_FILE_RANGE_WRITE))


def _check(status: int) -> None:
    if status != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
