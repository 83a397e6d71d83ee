"""A checkpoint: one safetensors file, or shards with their index, or a folder that holds either."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Literal

import numpy as np

from lycoris.checkpoint.discovery import ShardIndex, choose_checkpoint, split_others
from lycoris.checkpoint.file import SafetensorsFile
from lycoris.checkpoint.header import TensorEntry
from lycoris.errors import RefusedInput, shown

Kind = Literal["file", "index", "folder"]

_FETCH = "fetch index and shards again, all of one version"


class Checkpoint:
    """An open, validated checkpoint. Reads may come from several threads at once.

    Attributes:
        path: What the caller gave.
        kind: What that is: "file", "index" or "folder".
        files: The safetensors files, sorted by name.
        shard_names: Their paths relative to the checkpoint's folder, in the same order.
        tensors: Every tensor by name: file by file, in the order of the data.
        index: The shard index, None for a single file.
        other_files: For a folder: its regular files that belong to a copy of it (config.json, tokenizer...).
        left_out: For a folder: its files with other weights, which do not.
    """

    def __init__(self, path: Path, kind: Kind, weights: Path) -> None:
        """Open `weights`, a safetensors file or an index, as what `path` stands for; `open` finds both."""
        self.path = path
        self.kind: Kind = kind
        self.index = ShardIndex.read(weights) if weights.name.endswith(".json") else None
        self.shard_names = self.index.shards if self.index else [weights.name]
        self.tensors: dict[str, TensorEntry] = {}
        self.other_files: list[Path] = []
        self.left_out: list[Path] = []
        if kind == "folder":
            self.other_files, self.left_out = split_others(path, [*self.shard_names, weights.name])
        with ExitStack() as opened:
            self.files = self._open_files(weights.parent, opened)
            self._file_at = {file.path: file for file in self.files}
            for file in self.files:
                self._add_tensors(file)
            if self.index:
                self._check_index(self.index)
            self._opened = opened.pop_all()

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Checkpoint:
        """Open a .safetensors file, an index.json, or a folder that holds exactly one checkpoint.

        Raises:
            RefusedInput: there is no such checkpoint, it is ambiguous, or one of its files is faulty.
        """
        path = Path(path)
        if os.path.isdir(path):
            return cls(path, "folder", choose_checkpoint(path))
        return cls(path, "index" if path.name.endswith(".json") else "file", path)

    def _open_files(self, folder: Path, opened: ExitStack) -> list[SafetensorsFile]:
        paths = [folder / name for name in self.shard_names]
        missing = [path.name for path in paths if not os.path.exists(path)]
        if self.index and missing:
            count = f"{len(missing)} of {len(paths)} shards"
            raise RefusedInput(f"{self.index.path}: {count} are missing, first {missing[0]}; fetch them")
        return [opened.enter_context(SafetensorsFile.open(path)) for path in paths]

    def _add_tensors(self, file: SafetensorsFile) -> None:
        for name, entry in file.entries.items():
            if name in self.tensors:
                both = f"{self.tensors[name].file} and {entry.file}"
                raise RefusedInput(f"{self.path}: tensor {shown(name)} is in two shards, {both}; fetch them again")
            self.tensors[name] = entry

    def _check_index(self, index: ShardIndex) -> None:
        """Index and shards must name the same tensors, in the same places."""
        shard_of = {file.path: name for file, name in zip(self.files, self.shard_names, strict=True)}
        for name, entry in self.tensors.items():
            found, wanted = shard_of[entry.path], index.weight_map.get(name)
            if found != wanted:
                says = "does not name it" if wanted is None else f"says {wanted}"
                raise RefusedInput(
                    f"{index.path}: tensor {shown(name)} is in shard {found}, the index {says}; {_FETCH}"
                )
        for name, shard in index.weight_map.items():
            if name not in self.tensors:
                raise RefusedInput(f"{index.path}: tensor {shown(name)} is missing in its shard {shard}; {_FETCH}")

    @property
    def data_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.nbytes for entry in self.tensors.values())

    def file_of(self, name: str) -> SafetensorsFile:
        """The open file that holds tensor `name`."""
        return self._file_at[self.tensors[name].path]

    def read(self, name: str) -> np.ndarray:
        """Read tensor `name` whole; see `SafetensorsFile.read`."""
        return self.file_of(name).read(self.tensors[name])

    def close(self) -> None:
        """Close all files; no thread may still be reading."""
        self._opened.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
