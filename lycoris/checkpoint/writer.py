"""Write a copy of a checkpoint with changed tensors: it appears whole or not at all."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np

from lycoris.checkpoint.checkpoint import Checkpoint
from lycoris.checkpoint.file import Buffer, byte_view
from lycoris.checkpoint.header import TensorEntry
from lycoris.checkpoint.layout import plan_layout
from lycoris.checkpoint.output import check_output, check_space
from lycoris.checkpoint.staging import (
    StagedFile,
    check_exchange,
    disk_bytes,
    find_leftovers,
    publish,
    remove,
    sync_folder,
    temporary_beside,
)
from lycoris.errors import MergeFailed, os_reason

# Unchanged tensors go through a buffer: as fast as os.copy_file_range, which cannot cross all file systems.
_COPY_BYTES = 8 << 20


class Coverage:
    """Which bytes of which tensors were written. Not thread-safe."""

    def __init__(self) -> None:
        self._ranges: dict[str, list[tuple[int, int]]] = {}

    def add(self, name: str, begin: int, end: int) -> None:
        """Note that bytes [begin, end) of tensor `name` were written."""
        if end > begin:
            self._ranges.setdefault(name, []).append((begin, end))

    def check(self, tensors: Mapping[str, TensorEntry]) -> None:
        """Raise AssertionError unless every byte of `tensors` was written exactly once."""
        for name, entry in tensors.items():
            covered = 0
            for begin, end in sorted(self._ranges.get(name, ())):
                if begin < covered:
                    raise AssertionError(f"byte {begin} of tensor {name!r} was written twice")
                if begin > covered:
                    break
                covered = end
            if covered != entry.nbytes:
                raise AssertionError(f"byte {covered} of tensor {name!r} ({entry.nbytes} bytes) was never written")


class CheckpointWriter:
    """A copy of `checkpoint` under construction: a file for a file, a folder for an index or a folder.

    Names, order, metadata and shards are those of the base; so is every header, byte for byte, unless an
    element type in it changes. `with` creates a temporary beside the output. `commit` puts it in place once
    every byte of every tensor came by `write` or `copy`; leaving the block before, or by an exception, removes
    it. A kill leaves the output as it was, and the temporary for the next run to remove. With `sync` so does a loss
    of power at any moment: the copy is on disk before it gets its name. Without, it is as durable as `cp`
    makes its own: what the system has not written yet, within its half a minute or so, a loss of power takes.

    `write` and `copy` may be called from several threads; all else is for one thread.

    Attributes:
        output: File or folder to write, as the caller named it.
        tensors: Every tensor as it will be written: `path`, `start`, `dtype` and `nbytes` are the output's.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        output: str | os.PathLike[str],
        *,
        dtypes: Mapping[str, str] | None = None,
        overwrite: bool = False,
        sync: bool = True,
        inputs: Sequence[Path] = (),
    ) -> None:
        """Check that the output may be written; nothing is written yet.

        Args:
            checkpoint: The base, which has to stay open until the block is left.
            output: File or folder to write.
            dtypes: Tensor name -> safetensors type, for those whose type changes.
            overwrite: Whether to replace an existing output.
            sync: Whether to have the copy on disk before it gets its name.
            inputs: Further files and folders that are read, and must not be the output.

        Raises:
            RefusedInput: the output exists, is an input, is of the wrong kind or cannot be written.
        """
        dtypes = dtypes or {}
        assert dtypes.keys() <= checkpoint.tensors.keys(), "dtypes names tensors that the checkpoint lacks"
        self.output = Path(output)
        self._target = check_output(checkpoint, output, overwrite, inputs)
        self._temporary = temporary_beside(self._target)
        self._checkpoint = checkpoint
        self._overwrite, self._sync = overwrite, sync
        self._layout = plan_layout(checkpoint, self.output, dtypes)
        self.tensors: dict[str, TensorEntry] = self._layout.tensors
        self._staged: dict[Path, StagedFile] = {}
        self._coverage = Coverage()
        self._state = threading.Condition()
        self._accepting = False
        self._writing: set[int] = set()  # threads inside `write`

    @property
    def output_bytes(self) -> int:
        """Bytes of all files that will be written."""
        return self._layout.total_bytes

    def check_space(self) -> None:
        """Check that the disk has room for the output; entering the block does so too.

        Raises:
            RefusedInput: with the bytes needed and free.
        """
        with _failures_of(self.output):
            reclaimable = sum(disk_bytes(path) for path in find_leftovers(self._target))
            check_space(self.output, self._target, self.output_bytes, reclaimable)

    def write(self, name: str, byte_offset: int, buffer: Buffer) -> None:
        """Write `buffer` (contiguous) at `byte_offset` of tensor `name`. Each byte is to be written once.

        Raises:
            MergeFailed: the system refused, e.g. because the disk is full, or the block has been left.
        """
        entry, view = self.tensors[name], byte_view(buffer)
        end = byte_offset + len(view)
        assert byte_offset >= 0 and end <= entry.nbytes, f"bytes {byte_offset} to {end} leave tensor {name!r}"
        with self._write_in_flight(), _failures_of(entry.path):
            self._staged[entry.path].write(view, entry.start + byte_offset)
        with self._state:
            self._coverage.add(name, byte_offset, end)

    def copy(self, name: str) -> None:
        """Copy tensor `name` from the base, byte for byte.

        Raises:
            MergeFailed: the base could not be read or the output not be written.
        """
        source = self._checkpoint.tensors[name]
        assert source.dtype == self.tensors[name].dtype, f"tensor {name!r} changes its type"
        file = self._checkpoint.file_of(name)
        buffer = np.empty(min(source.nbytes, _COPY_BYTES), np.uint8)
        for offset in range(0, source.nbytes, _COPY_BYTES):
            part = buffer[: source.nbytes - offset]
            file.read_into(part, source.start + offset)
            self.write(name, offset, part)

    def commit(self) -> None:
        """Put the copy in the output's place, once it is whole, and on disk where that is asked for.

        Raises:
            AssertionError: a byte was never written, or twice (our bug).
            MergeFailed: the base changed meanwhile, or the system refused.
        """
        self._coverage.check(self.tensors)
        for file in self._checkpoint.files:
            file.check_unchanged()
        with _failures_of(self.output):
            if self._sync:
                self._sync_files()
            self._close()
            publish(self._temporary, self._target, self._overwrite, self._sync)

    def _sync_files(self) -> None:
        """Wait until every file of the copy, and every name in its folders, is on disk."""
        for staged in self._staged.values():
            staged.sync()
        if self._layout.is_folder:
            for folder in {staged.path.parent for staged in self._staged.values()} | {self._temporary}:
                sync_folder(folder)

    def __enter__(self) -> CheckpointWriter:
        try:
            with _failures_of(self.output):
                for leftover in find_leftovers(self._target):
                    remove(leftover)
                self.check_space()
                self._create()
            self._accepting = True
            return self
        except BaseException:
            self._discard()
            raise

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self._discard()
        except BaseException:
            # Ctrl-C in the middle of it: once more, `interruptible` lets no second one through.
            self._discard()
            raise

    def _create(self) -> None:
        """Make the temporary: every file in its full size, with header, index and what is copied along."""
        if self._layout.is_folder:
            self._temporary.mkdir()
            if self._target.exists():
                check_exchange(self._temporary, self._target)
        for path, header in self._layout.headers.items():
            self._stage(path, header.file_bytes).write(memoryview(header.prefix), 0)
        for path, text in self._layout.texts.items():
            self._stage(path, len(text)).write(memoryview(text), 0)
        for path, source in self._layout.copies.items():
            with _open_source(source) as reading, self._stage(path, 0).path.open("wb") as writing:
                shutil.copyfileobj(reading, writing)

    def _stage(self, path: Path, size: int) -> StagedFile:
        """Create the temporary file that becomes the output's file `path`."""
        temporary = self._temporary / path.relative_to(self.output)
        temporary.parent.mkdir(parents=True, exist_ok=True)
        self._staged[path] = StagedFile(temporary, size, writes_back=self._sync)
        return self._staged[path]

    @contextmanager
    def _write_in_flight(self) -> Iterator[None]:
        """Hold the descriptors open during a write: once closed, their numbers may belong to other files."""
        thread = threading.get_ident()
        try:
            with self._state:
                if not self._accepting:
                    raise MergeFailed(
                        f"{self.output}: writing has ended, this write is too late; write before the block is left"
                    )
                self._writing.add(thread)
            yield
        finally:
            with self._state:
                self._writing.discard(thread)
                self._state.notify_all()

    def _close(self) -> None:
        """Take no more writes, and close the files when those under way are done."""
        with self._state:
            self._accepting = False
            # Not for this thread: an exception that broke off its own write may have kept it from saying so.
            self._state.wait_for(lambda: self._writing <= {threading.get_ident()})
        for staged in self._staged.values():
            staged.close()

    def _discard(self) -> None:
        """Remove the temporary, if it is still there."""
        self._close()
        with _failures_of(self._temporary):
            remove(self._temporary)


@contextmanager
def _failures_of(path: Path) -> Iterator[None]:
    """Turn errors of the system, while `path` is written, into MergeFailed."""
    try:
        yield
    except OSError as error:
        raise MergeFailed(f"{path}: cannot be written ({os_reason(error)}); mend that and run it again") from error


def _open_source(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise MergeFailed(f"{path}: cannot be read ({os_reason(error)}); mend that or move it away") from error
