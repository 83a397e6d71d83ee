"""Temporary files and folders beside their target, and how they take its place."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import shutil
from pathlib import Path

from lycoris.checkpoint.linux import exchange, reserve, start_writeback
from lycoris.errors import MergeFailed, RefusedInput, os_reason

# Smaller writes are left to fsync: early write-back would cost more calls than it saves time.
_WRITEBACK_BYTES = 1 << 20
_NAME_BYTES = 200  # of the target's name in the temporary's, which must stay under the limit of 255


class StagedFile:
    """A file under construction, of known size. `write` may be called from several threads at once.

    It is locked (flock) while open, so that a later process can tell it from the leftover of a killed one.
    """

    def __init__(self, path: Path, size: int, writes_back: bool = False) -> None:
        """Create `path`, which must not exist, and reserve `size` bytes: a full disk shows at once.

        With `writes_back` what is written begins its way to the disk at once, so that `sync` has little to wait for.
        """
        self.path = path
        self._writes_back = writes_back
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            # Some network file systems have no locks: leftovers are then never recognised, and stay.
            with contextlib.suppress(OSError):
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if size:
                reserve(self._descriptor, size)
        except BaseException:
            self.close()
            raise

    def write(self, data: memoryview, offset: int) -> None:
        """Write all of `data` at `offset` of the file."""
        done = 0
        while done < len(data):
            done += os.pwrite(self._descriptor, data[done:], offset + done)
        if self._writes_back and len(data) >= _WRITEBACK_BYTES:
            start_writeback(self._descriptor, offset, len(data))

    def sync(self) -> None:
        """Wait until the file is on disk."""
        os.fsync(self._descriptor)

    def close(self) -> None:
        """Close it; closing twice does nothing."""
        # Forgotten before it is closed: broken off in between, it must not be closed again as another file's.
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


def temporary_beside(target: Path) -> Path:
    """A new name in `target`'s folder: `.<name>.<pid>.<random>.tmp`."""
    return target.with_name(f"{_stem(target)}{os.getpid()}.{secrets.token_hex(4)}.tmp")


def find_leftovers(target: Path) -> list[Path]:
    """The temporaries of earlier, killed runs for `target`: those that no process holds a lock on."""
    pattern = re.compile(re.escape(_stem(target)) + r"\d+\.[0-9a-f]{8}\.tmp")
    found = [path for path in target.parent.iterdir() if pattern.fullmatch(path.name) and not path.is_symlink()]
    return [path for path in found if all(_lock_is_free(file) for file in _files_of(path))]


def disk_bytes(path: Path) -> int:
    """Disk space that a file, or a folder with all it holds, takes."""
    return sum(file.stat().st_blocks * 512 for file in _files_of(path))


def remove(path: Path) -> None:
    """Remove a file, or a folder with all it holds, if there is one."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Wait until the names in `folder` are on disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_exchange(scratch: Path, target: Path) -> None:
    """Check that a folder can take `target`'s place later, by swapping two empty ones in `scratch`.

    Raises:
        RefusedInput: the file system cannot swap folders.
    """
    first, second = scratch / "first", scratch / "second"
    first.mkdir()
    second.mkdir()
    try:
        exchange(first, second)
    except OSError as error:
        raise RefusedInput(
            f"{target}: this file system cannot replace a folder in one step ({os_reason(error)}); "
            "give another output or remove it yourself"
        ) from error
    first.rmdir()
    second.rmdir()


def publish(temporary: Path, target: Path, overwrite: bool, sync: bool) -> None:
    """Put `temporary` in `target`'s place in one atomic step; with `sync` wait until the new name is on disk.

    A folder that is replaced is deleted after that.

    Raises:
        MergeFailed: there is a target by now, and `overwrite` is not set.
    """
    exists = os.path.lexists(target)
    if exists and not overwrite:
        raise MergeFailed(f"{target}: another program made it meanwhile; give another output")
    if exists and temporary.is_dir():
        exchange(temporary, target)
    else:
        temporary.replace(target)
    if sync:
        sync_folder(target.parent)
    remove(temporary)  # after an exchange this is what was replaced


def _stem(target: Path) -> str:
    return f".{os.fsdecode(os.fsencode(target.name)[:_NAME_BYTES])}."


def _files_of(path: Path) -> list[Path]:
    """The file `path`, or every file below the folder `path`."""
    return [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]


def _lock_is_free(path: Path) -> bool:
    """Whether the file could be locked. Where that cannot be found out, the answer is no."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True
