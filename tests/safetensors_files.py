"""Make safetensors files, good and bad, byte by byte."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from lycoris.dtype import DTYPES

NAMES = {dtype.numpy: name for name, dtype in DTYPES.items() if not dtype.packed}
"""NumPy or ml_dtypes type -> safetensors name."""


def file_bytes(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """A file of a header (JSON value, text or bytes) and data; `length` lies about the header's length."""
    if not isinstance(header, str | bytes):
        header = json.dumps(header)
    raw = header.encode() if isinstance(header, str) else header
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + data


def entry(dtype: Any, shape: Any, begin: Any, end: Any) -> dict[str, Any]:
    """A tensor's entry in a header."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def tensors_file(tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> bytes:
    """A valid file that holds `tensors` in the order given."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    data = b""
    for name, array in tensors.items():
        header[name] = entry(NAMES[array.dtype], list(array.shape), len(data), len(data) + array.nbytes)
        data += array.tobytes()
    return file_bytes(header, data)


def some_tensors(count: int = 3, *, first: int = 0) -> dict[str, np.ndarray]:
    """Small tensors of several types and shapes, one of them empty and one a scalar."""
    types = (ml_dtypes.bfloat16, np.float16, np.float32, np.int64, np.uint8)
    shapes = ((3, 5), (7,), (2, 1, 3, 3), (), (0, 4))
    return {
        f"layer.{n}.weight": np.asarray(np.random.default_rng(n).integers(0, 99, shapes[n % 5])).astype(types[n % 5])
        for n in range(first, first + count)
    }


def write_shards(folder: Path, shards: Mapping[str, Mapping[str, np.ndarray]], **index: Any) -> Path:
    """A sharded checkpoint in `folder`, which is made. Fields in `index` replace those of the true index."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard, tensors in shards.items():
        (folder / shard).write_bytes(tensors_file(tensors, {"format": "pt"}))
    weight_map = {name: shard for shard, tensors in shards.items() for name in tensors}
    total = sum(array.nbytes for tensors in shards.values() for array in tensors.values())
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map} | index, indent=2) + "\n")
    return path


def two_shards(folder: Path, **index: Any) -> Path:
    """A checkpoint of five tensors in two shards, with a config.json; its index."""
    shards = {
        "model-00001-of-00002.safetensors": some_tensors(3),
        "model-00002-of-00002.safetensors": some_tensors(2, first=3),
    }
    path = write_shards(folder, shards, **index)
    (folder / "config.json").write_text("{}\n")
    return path


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """All paths below `folder` with their contents, None for a folder: equal snapshots, nothing changed."""
    paths = sorted(folder.rglob("*"))
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in paths}


def _valid() -> bytes:
    return tensors_file({"a": np.arange(4, dtype=np.float32)}, {"format": "pt"})


def _one(value: Any, data: bytes = b"") -> bytes:
    return file_bytes({"a": value}, data)


def _nested(depth: int) -> bytes:
    return file_bytes('{"a": ' + "[" * depth + "]" * depth + "}")


# What is wrong -> (bytes of the file, words that the error says about it).
BAD_FILES: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", "0 bytes long"),
    "shorter than the length field": (b"\1\0\0\0\0\0\0", "7 bytes long"),
    "length field only": (_valid()[:8], "header is"),
    "text": (b"just some text, and then more of it", "header is"),
    "torch zip": (b"PK\x03\x04" + bytes(60), "zip archive"),
    "pickle": (b"\x80\x02}q\x00X" + bytes(60), "pickle"),
    "git lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull"),
    "gguf": (b"GGUF" + bytes(60), "GGUF"),
    "web page": (b"<!DOCTYPE html><html></html>" + bytes(60), "web page"),
    "header longer than the file": (file_bytes("{}", length=3), "3 bytes long"),
    "header longer than 100 MB": (file_bytes("{}", length=100_000_001), "100000001 bytes long"),
    "header length with the top bit": (file_bytes("{}", length=2**64 - 1), "18446744073709551615"),
    "header of length 0": (file_bytes(""), "begins with b''"),
    "header not JSON": (file_bytes("{'a': 1}"), "not JSON"),
    "header cut": (file_bytes('{"a": {"dtype": "F32"'), "not JSON"),
    "header with text behind": (file_bytes("{} x"), "not JSON"),
    "header with a mark before": (file_bytes("\ufeff{}"), "begins with"),
    "header with a space before": (file_bytes(" {}"), "begins with"),
    "header an array": (file_bytes("[]"), "begins with"),
    "header not UTF-8": (file_bytes(b'{"\xff": 1}'), "not JSON in UTF-8"),
    "header with half a surrogate": (file_bytes('{"\\ud800": {}}'), "not JSON in UTF-8"),
    "header with NaN": (file_bytes('{"a": NaN}'), "NaN is not JSON"),
    "header nested too deep": (_nested(200_000), "not JSON"),
    "integer of 5000 digits": (file_bytes('{"a":' + "9" * 5000 + "}"), "not JSON"),
    "data truncated": (_valid()[:-1], "truncated"),
    "no data": (_valid()[:-16], "truncated"),
    "bytes behind the data": (_valid() + b"\0", "1 bytes trail"),
    "bytes without tensors": (file_bytes("{}", b"\0"), "1 bytes trail"),
    "overlap": (file_bytes({"a": entry("U8", [4], 0, 4), "b": entry("U8", [4], 2, 6)}, bytes(6)), "'b'"),
    "same bytes twice": (file_bytes({"a": entry("U8", [4], 0, 4), "b": entry("U8", [4], 0, 4)}, bytes(4)), "overlap"),
    "empty tensor inside another": (
        file_bytes({"a": entry("U8", [4], 0, 4), "b": entry("U8", [0], 2, 2)}, bytes(4)),
        "overlap",
    ),
    "hole at the start": (_one(entry("U8", [4], 1, 5), bytes(5)), "hole"),
    "hole between": (file_bytes({"a": entry("U8", [2], 0, 2), "b": entry("U8", [2], 3, 5)}, bytes(5)), "hole"),
    "offsets out of range": (_one(entry("U8", [4], 96, 100), bytes(4)), "leave the file"),
    "offsets near 2**63": (_one(entry("U8", [4], 2**63 - 5, 2**63 - 1), bytes(4)), "leave the file"),
    "offsets beyond 64 bits": (_one(entry("U8", [4], 2**70, 2**70 + 4), bytes(4)), "data_offsets"),
    "offsets swapped": (_one(entry("U8", [4], 4, 0), bytes(4)), "data_offsets [4, 0]"),
    "offsets negative": (_one(entry("U8", [4], -4, 0), bytes(4)), "data_offsets [-4, 0]"),
    "offsets fractions": (_one(entry("U8", [4], 0.0, 4.0), bytes(4)), "data_offsets [0.0, 4.0]"),
    "offsets booleans": (_one(entry("U8", [1], False, True), bytes(1)), "data_offsets [False, True]"),
    "offsets text": (_one(entry("U8", [4], "0", "4"), bytes(4)), "data_offsets"),
    "offsets of three": (_one({"dtype": "U8", "shape": [4], "data_offsets": [0, 2, 4]}, bytes(4)), "data_offsets"),
    "offsets null": (_one({"dtype": "U8", "shape": [4], "data_offsets": None}, bytes(4)), "data_offsets"),
    "shape negative": (_one(entry("U8", [-4], 0, 4), bytes(4)), "shape [-4]"),
    "shape twice negative": (_one(entry("U8", [-2, -2], 0, 4), bytes(4)), "shape [-2, -2]"),
    "shape fraction": (_one(entry("U8", [4.0], 0, 4), bytes(4)), "shape [4.0]"),
    "shape boolean": (_one(entry("U8", [True], 0, 1), bytes(1)), "shape [True]"),
    "shape a number": (_one(entry("U8", 4, 0, 4), bytes(4)), "shape 4"),
    "shape text": (_one(entry("U8", "4", 0, 4), bytes(4)), "shape '4'"),
    "shape of 65 dimensions": (_one(entry("U8", [1] * 65, 0, 1), bytes(1)), "64 whole numbers"),
    "shape too large": (_one(entry("U8", [2**62, 2**62], 0, 4), bytes(4)), "too large"),
    "shape empty and too large": (_one(entry("U8", [0, 2**62, 2**62], 0, 0)), "too large"),
    "shape and offsets differ": (_one(entry("F32", [2], 0, 4), bytes(4)), "takes 8 bytes"),
    "offsets longer than the shape": (_one(entry("F32", [1], 0, 8), bytes(8)), "takes 4 bytes"),
    "half a byte": (_one(entry("F4", [3], 0, 2), bytes(2)), "12 bits"),
    "dtype unknown": (_one(entry("F31", [1], 0, 4), bytes(4)), "unknown dtype 'F31'"),
    "dtype in small letters": (_one(entry("bf16", [1], 0, 2), bytes(2)), "unknown dtype 'bf16'"),
    "dtype a number": (_one(entry(5, [1], 0, 4), bytes(4)), "unknown dtype 5"),
    "dtype a list": (_one(entry(["F32"], [1], 0, 4), bytes(4)), "unknown dtype"),
    "name of a million letters": (file_bytes({"a" * 10**6: 5}), "aaa'"),
    "dtype of a million letters": (_one(entry("F" * 10**6, [1], 0, 4), bytes(4)), "unknown dtype 'FFF"),
    "shape of a million numbers": (_one(entry("U8", [1] * 10**6, 0, 4), bytes(4)), "shape [1, 1, 1"),
    "tensor a number": (_one(5), "not an object"),
    "tensor a list": (_one([]), "not an object"),
    "tensor without dtype": (_one({"shape": [0], "data_offsets": [0, 0]}), "not an object with dtype"),
    "tensor without shape": (_one({"dtype": "U8", "data_offsets": [0, 0]}), "not an object with dtype"),
    "tensor without offsets": (_one({"dtype": "U8", "shape": [0]}), "not an object with dtype"),
    "name twice": (file_bytes('{"a":%s,"a":%s}' % ((json.dumps(entry("U8", [0], 0, 0)),) * 2)), "'a' appears twice"),
    "dtype twice": (
        file_bytes('{"a":{"dtype":"U8","dtype":"I8","shape":[0],"data_offsets":[0,0]}}'),
        "'dtype' appears twice",
    ),
    "metadata a list": (file_bytes({"__metadata__": []}), "__metadata__"),
    "metadata a number": (file_bytes({"__metadata__": {"step": 5}}), "'step'"),
    "metadata nested": (file_bytes({"__metadata__": {"config": {"a": "b"}}}), "'config'"),
}

# Things in a path's place that are no file at all: how to make them, and words of the error.
BAD_PATHS: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing": (lambda path: None, "no such file"),
    "dangling link": (lambda path: path.symlink_to("nowhere"), "no such file"),
    "named pipe": (os.mkfifo, "not a regular file"),
    "link in a circle": (lambda path: path.symlink_to(path), "cannot be opened"),
}
