"""Which checkpoint a folder holds, and what a shard index says."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from lycoris.checkpoint.header import MAX_HEADER_BYTES, parse_json
from lycoris.errors import RefusedInput, os_reason, shown

WEIGHT_SUFFIX = ".safetensors"
INDEX_SUFFIX = ".safetensors.index.json"
PIPELINE_FILE = "model_index.json"  # a diffusers pipeline: one sub-folder a component

# Weights in other formats, and their indexes: beside merged weights they would pass for the same model.
OTHER_WEIGHT_SUFFIXES = (
    *(".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".onnx_data"),
    ".index.json",
)
TEMPORARY_NAME = re.compile(r"\..*\.\d+\.[0-9a-f]{8}\.tmp", re.DOTALL)


@dataclass(frozen=True, slots=True)
class ShardIndex:
    """A Hugging Face shard index (`model.safetensors.index.json`).

    Attributes:
        path: The index file.
        raw: Its bytes as stored.
        fields: The parsed JSON.
        weight_map: Tensor name -> shard, a path relative to the index's folder.
    """

    path: Path
    raw: bytes
    fields: dict[str, Any]
    weight_map: dict[str, str]

    @property
    def shards(self) -> list[str]:
        """Shard paths relative to the index's folder, sorted."""
        return sorted(set(self.weight_map.values()))

    @classmethod
    def read(cls, path: Path) -> ShardIndex:
        """Read and validate an index file; its shards are not looked at.

        Raises:
            RefusedInput: not JSON, no weight_map, or a shard that is no safetensors file in this folder.
        """
        try:
            if not os.path.isfile(path):
                raise RefusedInput(f"{path}: no such file; give an existing checkpoint")
            if path.stat().st_size > MAX_HEADER_BYTES:
                raise RefusedInput(
                    f"{path}: is over {MAX_HEADER_BYTES} bytes long, too long for a shard index; give another"
                )
            raw = path.read_bytes()
        except OSError as error:
            raise RefusedInput(
                f"{path}: cannot be read ({os_reason(error)}); mend that or give another checkpoint"
            ) from error
        fields = parse_json(raw, path, "index")
        weight_map = fields.get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise RefusedInput(f"{path}: has no weight_map; give a shard index or a {WEIGHT_SUFFIX} file")
        for name, shard in weight_map.items():
            _check_shard_name(path, name, shard)
        return cls(path, raw, fields, weight_map)


def _check_shard_name(index: Path, tensor: str, shard: Any) -> None:
    if not isinstance(shard, str) or not shard.endswith(WEIGHT_SUFFIX) or "\0" in shard:
        raise RefusedInput(
            f"{index}: tensor {shown(tensor)} is in {shown(shard)}, wanted a {WEIGHT_SUFFIX} file; fetch it again"
        )
    pure = PurePosixPath(shard)
    # Only the spelling counts: in a Hugging Face cache the files themselves are links out of the folder.
    if pure.is_absolute() or ".." in pure.parts or str(pure) != shard:
        raise RefusedInput(
            f"{index}: shard {shown(shard)} is not a plain path inside the index's folder; put the shard there"
        )


def find_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in `folder`: shard indexes, and safetensors files that belong to no index there."""
    files = [path for path in _listed(folder) if os.path.isfile(path) and path.name[0] != "."]
    indexes = [path for path in files if path.name.endswith(INDEX_SUFFIX)]
    sharded = {shard for index in indexes for shard in ShardIndex.read(index).shards}
    singles = [path for path in files if path.name.endswith(WEIGHT_SUFFIX) and path.name not in sharded]
    return indexes + singles


def choose_checkpoint(folder: Path) -> Path:
    """The one checkpoint in `folder`: an index or a safetensors file.

    Raises:
        RefusedInput: none, several, or a diffusers pipeline, whose components are to be merged one by one.
    """
    found = find_checkpoints(folder)
    names = ", ".join(path.name for path in found)
    if os.path.isfile(folder / PIPELINE_FILE):
        components = [path.name for path in _listed(folder) if os.path.isdir(path) and find_checkpoints(path)]
        choice = ", ".join(components + [names] * bool(names)) or "none of its sub-folders holds one"
        raise RefusedInput(f"{folder}: is a diffusers pipeline; give one checkpoint of it: {choice}")
    if not found:
        raise RefusedInput(
            f"{folder}: holds no checkpoint, wanted a {WEIGHT_SUFFIX} file or *{INDEX_SUFFIX} in it; give another"
        )
    if len(found) > 1:
        raise RefusedInput(f"{folder}: holds {len(found)} checkpoints; give one of them, not the folder: {names}")
    return found[0]


def split_others(folder: Path, weights: Iterable[str]) -> tuple[list[Path], list[Path]]:
    """The regular files of `folder` besides the checkpoint's own `weights` (names of shards and index).

    Returns:
        (files to copy along with a merged checkpoint, files to leave out: weights in other formats).
    """
    own = set(weights)
    copied, left_out = [], []
    for path in _listed(folder):
        if os.path.isfile(path) and path.name not in own and not TEMPORARY_NAME.fullmatch(path.name):
            is_weights = path.name.endswith((WEIGHT_SUFFIX, *OTHER_WEIGHT_SUFFIXES))
            (left_out if is_weights else copied).append(path)
    return copied, left_out


def _listed(folder: Path) -> list[Path]:
    try:
        return [folder / name for name in sorted(os.listdir(folder))]
    except OSError as error:
        raise RefusedInput(
            f"{folder}: cannot be listed ({os_reason(error)}); mend that or give another folder"
        ) from error
