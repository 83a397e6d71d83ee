"""Read one safetensors file piece by piece, without ever loading it whole."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from types import TracebackType

import numpy as np

from lycoris.checkpoint.header import MAX_HEADER_BYTES, PREFIX_BYTES, Header, TensorEntry, parse_header
from lycoris.dtype import DTYPES
from lycoris.errors import MergeFailed, RefusedInput, os_reason

Buffer = memoryview | bytearray | bytes | np.ndarray

# First bytes of what is often given in place of a safetensors file, what it is, what to do.
_OTHER_FORMATS: tuple[tuple[bytes, str, str], ...] = (
    (b"version https://git-lfs", "a Git LFS pointer", "run `git lfs pull` to fetch the file it stands for"),
    (b"PK\x03\x04", "a zip archive, as torch.save writes", "convert it to safetensors"),
    (b"\x80\x02", "a Python pickle, as old torch.save writes", "convert it to safetensors"),
    (b"GGUF", "a GGUF file", "give the safetensors checkpoint it was made from"),
    (b"\x89HDF", "an HDF5 file", "convert it to safetensors"),
    (b"<!DOCTYPE", "a web page", "fetch the file again"),
    (b"<html", "a web page", "fetch the file again"),
)


def byte_view(buffer: Buffer) -> memoryview:
    """The bytes of a contiguous `buffer`, without a copy.

    Arrays take a detour, because NumPy exports no buffer for ml_dtypes such as bfloat16.
    """
    if isinstance(buffer, np.ndarray):
        assert buffer.flags.c_contiguous, "the buffer must be contiguous"
        return memoryview(buffer.reshape(-1).view(np.uint8))
    return memoryview(buffer).cast("B")


class SafetensorsFile:
    """An open safetensors file with a validated header. Reads may come from several threads at once.

    Attributes:
        path: The file as the caller named it.
        header: The parsed header; `entries`, `metadata` and `header_bytes` are parts of it.
    """

    def __init__(self, path: Path, descriptor: int, opened: os.stat_result, header: Header) -> None:
        """Take over an open file; `open` does the opening."""
        self.path = path
        self.header = header
        self._descriptor = descriptor
        self._opened = opened

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> SafetensorsFile:
        """Open and validate `path`.

        Raises:
            RefusedInput: the file is missing, unreadable or not a whole, valid safetensors file.
        """
        path = Path(path)
        try:
            # Without O_NONBLOCK, opening a named pipe would wait for someone to write to it.
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except FileNotFoundError:
            raise RefusedInput(f"{path}: no such file; give an existing .safetensors file") from None
        except OSError as error:
            raise RefusedInput(
                f"{path}: cannot be opened ({os_reason(error)}); mend that or give another file"
            ) from error
        try:
            opened = os.fstat(descriptor)
            if not stat.S_ISREG(opened.st_mode):
                found = "a folder" if stat.S_ISDIR(opened.st_mode) else "not a regular file"
                raise RefusedInput(f"{path}: is {found}, wanted a .safetensors file; give one")
            raw = _read_header(descriptor, path, opened.st_size)
            return cls(path, descriptor, opened, parse_header(raw, path, opened.st_size))
        except OSError as error:
            os.close(descriptor)
            raise RefusedInput(
                f"{path}: cannot be read ({os_reason(error)}); mend that or give another file"
            ) from error
        except BaseException:
            os.close(descriptor)
            raise

    @property
    def header_bytes(self) -> bytes:
        """The header's JSON as stored, padding included, without the length before it."""
        return self.header.raw

    @property
    def metadata(self) -> dict[str, str]:
        """The header's `__metadata__`, {} where there is none."""
        return self.header.metadata

    @property
    def entries(self) -> dict[str, TensorEntry]:
        """Every tensor by name, in the order of the data."""
        return self.header.entries

    def read(self, entry: TensorEntry) -> np.ndarray:
        """Read a whole tensor.

        Returns:
            A new array of `entry.shape`, of the NumPy or ml_dtypes type in `lycoris.dtype.DTYPES`. Types
            below 8 bits come as their packed bytes: uint8 of shape (entry.nbytes,).

        Raises:
            MergeFailed: the file could not be read, or has become shorter since it was opened.
        """
        data = np.empty(entry.nbytes, np.uint8)
        self.read_into(data, entry.start)
        dtype = DTYPES[entry.dtype]
        return data if dtype.packed else data.view(dtype.numpy).reshape(entry.shape)

    def read_into(self, buffer: Buffer, file_offset: int) -> None:
        """Fill the whole of `buffer` (writable, contiguous) with the file's bytes from `file_offset` on.

        Raises:
            MergeFailed: the file could not be read, or has become shorter since it was opened.
        """
        assert self._descriptor >= 0, f"{self.path} is closed"
        view = byte_view(buffer)
        try:
            count = _read_up_to(self._descriptor, view, file_offset)
        except OSError as error:
            raise MergeFailed(
                f"{self.path}: cannot be read ({os_reason(error)}); mend that and run it again"
            ) from error
        if count < len(view):
            raise MergeFailed(
                f"{self.path}: ends at byte {file_offset + count}, wanted {len(view) - count} more: it was "
                "cut short while it was read; run it again when nothing writes to the file"
            )

    def check_unchanged(self) -> None:
        """Check that nobody wrote to the file since it was opened: what was read may then be of two versions.

        Raises:
            MergeFailed: its size or time of change differs.
        """
        now = os.fstat(self._descriptor)
        if (now.st_size, now.st_mtime_ns) != (self._opened.st_size, self._opened.st_mtime_ns):
            raise MergeFailed(f"{self.path}: changed while it was read; run it again when nothing writes to the file")

    def close(self) -> None:
        """Close the file; no thread may still be reading. Closing twice does nothing."""
        # Forgotten before it is closed: broken off in between, it must not be closed again as another file's.
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def __enter__(self) -> SafetensorsFile:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _read_up_to(descriptor: int, view: memoryview, file_offset: int) -> int:
    """Fill `view` from the file; the count of bytes read is smaller only where the file ends."""
    done = 0
    while done < len(view):
        count = os.preadv(descriptor, [view[done:]], file_offset + done)
        if count == 0:
            break
        done += count
    return done


def _read_header(descriptor: int, path: Path, file_bytes: int) -> bytes:
    """The header's JSON bytes, once the length before them has proved possible."""
    if file_bytes < PREFIX_BYTES:
        raise RefusedInput(f"{path}: is {file_bytes} bytes long, wanted a .safetensors file; fetch or save it again")
    start = os.pread(descriptor, 32, 0)
    length = int.from_bytes(start[:PREFIX_BYTES], "little")
    if length > MAX_HEADER_BYTES or PREFIX_BYTES + length > file_bytes:
        # Only now: the bytes of a possible length may well be another format's first bytes.
        for magic, found, advice in _OTHER_FORMATS:
            if start.startswith(magic):
                raise RefusedInput(f"{path}: is not a safetensors file but {found}; {advice}")
        limit = min(MAX_HEADER_BYTES, file_bytes - PREFIX_BYTES)
        raise RefusedInput(
            f"{path}: is damaged or no safetensors file: it says that its header is {length} bytes long, "
            f"at most {limit} are possible in a file of {file_bytes}; fetch or save it again"
        )
    raw = bytearray(length)
    if _read_up_to(descriptor, memoryview(raw), PREFIX_BYTES) < length:
        raise RefusedInput(f"{path}: was cut short while its header was read; try again when nothing writes to it")
    return bytes(raw)
