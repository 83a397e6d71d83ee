"""Which files a copy of a checkpoint consists of, and where each tensor lies in them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lycoris.checkpoint.checkpoint import Checkpoint
from lycoris.checkpoint.header import Header, TensorEntry, rewrite_header
from lycoris.dtype import bits_of


@dataclass(frozen=True, slots=True)
class Layout:
    """The files of an output, decided before anything is written.

    Attributes:
        headers: Header of each safetensors file, by its path in the output.
        texts: Bytes of each file written whole (the shard index), likewise.
        copies: Each file copied as it is: path in the output -> source.
        is_folder: Whether the output is a folder; if not, it is the one file in `headers`.
    """

    headers: dict[Path, Header]
    texts: dict[Path, bytes]
    copies: dict[Path, Path]
    is_folder: bool

    @property
    def tensors(self) -> dict[str, TensorEntry]:
        """Every tensor by name, with its place in the output."""
        return {name: entry for header in self.headers.values() for name, entry in header.entries.items()}

    @property
    def total_bytes(self) -> int:
        """Size of all files together."""
        written = sum(header.file_bytes for header in self.headers.values()) + sum(map(len, self.texts.values()))
        return written + sum(source.stat().st_size for source in self.copies.values())


def plan_layout(checkpoint: Checkpoint, output: Path, dtypes: Mapping[str, str]) -> Layout:
    """Lay out a copy of `checkpoint` in `output`, some tensors with another element type (`dtypes`, by name).

    Header and index bytes are kept where no type in them changes.
    """
    if checkpoint.kind == "file":
        return Layout({output: rewrite_header(checkpoint.files[0].header, dtypes, output)}, {}, {}, is_folder=False)
    headers = {
        output / name: rewrite_header(file.header, dtypes, output / name)
        for file, name in zip(checkpoint.files, checkpoint.shard_names, strict=True)
    }
    texts = {}
    if checkpoint.index:
        texts[output / checkpoint.index.path.name] = _plan_index(checkpoint, dtypes)
    copies = {output / source.name: source for source in checkpoint.other_files}
    return Layout(headers, texts, copies, is_folder=True)


def _plan_index(checkpoint: Checkpoint, dtypes: Mapping[str, str]) -> bytes:
    """The index, with `metadata.total_size` set anew where element types change and it has one."""
    index = checkpoint.index
    assert index is not None
    metadata = index.fields.get("metadata")
    unchanged = all(checkpoint.tensors[name].dtype == dtype for name, dtype in dtypes.items())
    if unchanged or not isinstance(metadata, dict) or "total_size" not in metadata:
        return index.raw
    total = sum(bits_of(dtypes.get(name, entry.dtype), entry.shape) // 8 for name, entry in checkpoint.tensors.items())
    fields = {**index.fields, "metadata": {**metadata, "total_size": total}}
    return (json.dumps(fields, indent=2, ensure_ascii=False) + "\n").encode("utf-8")
