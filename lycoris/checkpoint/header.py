"""The header of a safetensors file: parsed, validated in full, and written anew for other element types.

A file is `u64 n (little endian) | n bytes of JSON, padded with spaces | tensor data without holes`. The JSON
maps each tensor's name to {"dtype", "shape", "data_offsets": [begin, end] relative to the data}, and
`__metadata__` to a map of strings. Source: https://github.com/huggingface/safetensors#format. All that the
library refuses is refused here too; so are names that appear twice, which it lets pass.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lycoris.dtype import DTYPES, bits_of
from lycoris.errors import RefusedInput, shown

PREFIX_BYTES = 8
MAX_HEADER_BYTES = 100_000_000
METADATA_KEY = "__metadata__"

_MAX_DIMENSIONS = 64  # NumPy's limit
_MAX_INTEGER = 2**63 - 1
_ALIGNMENT = 8  # of the data's start, as the safetensors library pads it
_DAMAGED = "the file is damaged, fetch or save it again"


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where a tensor lies.

    Attributes:
        name: Key in the file's header.
        dtype: safetensors name of the element type, a key of `lycoris.dtype.DTYPES`.
        shape: Elements along each axis; () for a scalar.
        path: The file that holds it.
        start: Offset of its first byte from the beginning of the file.
        nbytes: Size in bytes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    start: int
    nbytes: int

    @property
    def count(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def file(self) -> str:
        """Name of the file that holds it, without the folder."""
        return self.path.name


@dataclass(frozen=True, slots=True)
class Header:
    """A validated header.

    Attributes:
        raw: The JSON bytes as stored, padding included, without the length before them.
        fields: The parsed JSON, in the header's own order.
        metadata: `__metadata__`, or {}.
        entries: Every tensor, in the order of the data.
    """

    raw: bytes
    fields: dict[str, Any]
    metadata: dict[str, str]
    entries: dict[str, TensorEntry]

    @property
    def names(self) -> list[str]:
        """Tensor names in the header's own order."""
        return [name for name in self.fields if name != METADATA_KEY]

    @property
    def prefix(self) -> bytes:
        """All of the file before the data."""
        return len(self.raw).to_bytes(PREFIX_BYTES, "little") + self.raw

    @property
    def file_bytes(self) -> int:
        """Size of the whole file."""
        return PREFIX_BYTES + len(self.raw) + sum(entry.nbytes for entry in self.entries.values())


class _DuplicateName(ValueError):
    """A JSON object says the same name twice."""


def parse_json(raw: bytes, path: Path, what: str) -> dict[str, Any]:
    """Parse `raw` as one JSON object in UTF-8: `json.loads` without doubled names, NaN and half characters.

    Raises:
        RefusedInput: naming `path`, `what` of it is wrong ("header", "index"), and the fault.
    """
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse_constant)
        if b"\\u" in raw:
            json.dumps(value, ensure_ascii=False).encode("utf-8")  # fails for half a surrogate pair
    except _DuplicateName as error:
        raise RefusedInput(f"{path}: {error} in the {what}, names must be unique; {_DAMAGED}") from None
    except (ValueError, RecursionError) as error:
        reason = str(error)
        raise RefusedInput(f"{path}: the {what} is not JSON in UTF-8 ({reason}); {_DAMAGED}") from None
    if not isinstance(value, dict):
        raise RefusedInput(f"{path}: the {what} is a {type(value).__name__}, not a JSON object; {_DAMAGED}")
    return value


def parse_header(raw: bytes, path: Path, file_bytes: int) -> Header:
    """Validate the header `raw` of a file of `file_bytes` bytes: names, types, shapes, offsets.

    Raises:
        RefusedInput: naming the file, the tensor and the fault.
    """
    if not raw.startswith(b"{"):
        raise RefusedInput(f"{path}: the header begins with {raw[:8]!r}, wanted '{{'; {_DAMAGED}")
    fields = parse_json(raw, path, "header")
    metadata = _parse_metadata(fields.get(METADATA_KEY), path)
    data_start = PREFIX_BYTES + len(raw)
    tensors = ((name, value) for name, value in fields.items() if name != METADATA_KEY)
    entries = [_parse_entry(name, value, path, data_start) for name, value in tensors]
    entries.sort(key=lambda entry: (entry.start, entry.nbytes))
    _check_coverage(entries, path, data_start, file_bytes)
    return Header(raw, fields, metadata, {entry.name: entry for entry in entries})


def rewrite_header(header: Header, dtypes: Mapping[str, str], path: Path) -> Header:
    """The header of a file at `path` with the same tensors in the same order, some with another element type.

    Args:
        header: The header to start from; its bytes are kept where no type changes.
        dtypes: Tensor name -> safetensors type. Tensors of other files may be among them.
        path: The file that it is for.
    """
    if all(header.entries[name].dtype == dtype for name, dtype in dtypes.items() if name in header.entries):
        return parse_header(header.raw, path, header.file_bytes)
    fields = dict(header.fields)
    end = 0
    for name, entry in header.entries.items():
        dtype = dtypes.get(name, entry.dtype)
        begin, end = end, end + bits_of(dtype, entry.shape) // 8
        fields[name] = {**fields[name], "dtype": dtype, "data_offsets": [begin, end]}
    raw = json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    raw += b" " * (-len(raw) % _ALIGNMENT)
    return parse_header(raw, path, PREFIX_BYTES + len(raw) + end)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, value in pairs:
        if name in result:
            raise _DuplicateName(f"{shown(name)} appears twice")
        result[name] = value
    return result


def _refuse_constant(word: str) -> None:
    raise ValueError(f"{word} is not JSON")


def _parse_metadata(value: Any, path: Path) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise RefusedInput(f"{path}: {METADATA_KEY} is a {type(value).__name__}, not a JSON object; {_DAMAGED}")
    for key, text in value.items():
        if not isinstance(text, str):
            found = type(text).__name__
            raise RefusedInput(f"{path}: {METADATA_KEY} entry {shown(key)} is a {found}, not a string; {_DAMAGED}")
    return value


def _parse_entry(name: str, value: Any, path: Path, data_start: int) -> TensorEntry:
    def refusal(fault: str) -> RefusedInput:
        return RefusedInput(f"{path}: tensor {shown(name)}: {fault}; {_DAMAGED}")

    if not isinstance(value, dict) or not {"dtype", "shape", "data_offsets"} <= value.keys():
        raise refusal("its header entry is not an object with dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise RefusedInput(
            f"{path}: tensor {shown(name)}: unknown dtype {shown(dtype)}, wanted one of {', '.join(DTYPES)}; {_DAMAGED}"
        )
    if not _are_counts(shape) or len(shape) > _MAX_DIMENSIONS:
        raise refusal(f"shape {shown(shape)} is not a list of at most {_MAX_DIMENSIONS} whole numbers")
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise refusal(f"data_offsets {shown(offsets)} are not [begin, end] in bytes")
    # Empty tensors too: NumPy cannot make one of shape (0, 2**62, 2**62).
    if math.prod(extent for extent in shape if extent) * DTYPES[dtype].bits > _MAX_INTEGER:
        raise refusal(f"shape {shown(shape)} is too large")
    begin, end = offsets
    bits = bits_of(dtype, shape)
    if bits != 8 * (end - begin):
        wanted = f"{bits // 8} bytes" if bits % 8 == 0 else f"{bits} bits, which are not whole bytes"
        raise refusal(
            f"{dtype} of shape {shown(shape)} takes {wanted}, data_offsets {shown(offsets)} hold {end - begin}"
        )
    return TensorEntry(name, dtype, tuple(shape), path, data_start + begin, end - begin)


def _are_counts(value: Any) -> bool:
    """Whether a JSON value is a list of whole numbers >= 0 (true and false are int to Python)."""
    return isinstance(value, list) and all(type(item) is int and 0 <= item <= _MAX_INTEGER for item in value)


def _check_coverage(entries: list[TensorEntry], path: Path, data_start: int, file_bytes: int) -> None:
    """Check that `entries`, sorted by offset, cover the file from `data_start` to its end, each byte once."""
    data_bytes = file_bytes - data_start
    covered = 0
    for entry in entries:
        begin = entry.start - data_start
        where = f"{path}: tensor {shown(entry.name)}: its data, bytes {begin} to {begin + entry.nbytes},"
        if begin + entry.nbytes > data_bytes:
            raise RefusedInput(f"{where} leave the file, which holds {data_bytes}: it is truncated; {_DAMAGED}")
        if begin < covered:
            raise RefusedInput(f"{where} overlap another tensor's, which end at {covered}; {_DAMAGED}")
        if begin > covered:
            raise RefusedInput(f"{where} leave a hole behind byte {covered}; {_DAMAGED}")
        covered += entry.nbytes
    if covered != data_bytes:
        raise RefusedInput(f"{path}: {data_bytes - covered} bytes trail the last tensor, wanted none; {_DAMAGED}")
