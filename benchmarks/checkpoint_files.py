"""Large safetensors files of random bf16 numbers, written as fast as the disk takes them."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

CHUNK = 1 << 26
"""Bytes made and written at a time; a thread makes 1 GB/s of them."""
THREADS = 12

# Of a bf16's bits: keep sign, mantissa and the low five of the exponent's eight, and set the upper three to 011.
_KEPT, _SET = np.uint16(0x8FFF), np.uint16(0x3000)


def write_random_bf16(path: Path, shapes: Mapping[str, tuple[int, ...]], rng: np.random.Generator) -> None:
    """A safetensors file with the tensors named, of random bf16 values from 2**-31 to 2 in magnitude."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.flush()

        def write(begin: int, rng: np.random.Generator) -> None:
            values = _random_bf16(min(CHUNK, end - begin) // 2, rng)
            assert os.pwrite(file.fileno(), values.data, 8 + len(text) + begin) == values.nbytes

        with ThreadPoolExecutor(THREADS) as pool:
            begins = range(0, end, CHUNK)
            list(pool.map(write, begins, rng.spawn(len(begins))))


def read_bf16(path: Path, name: str) -> np.ndarray:
    """A tensor of such a file as it lies there: bf16 bits in uint16, mapped, not read."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        entry = json.loads(file.read(length))[name]
    assert entry["dtype"] == "BF16", f"{path}: {name} is {entry['dtype']}"
    begin, _ = entry["data_offsets"]
    return np.memmap(path, np.uint16, "r", 8 + length + begin, tuple(entry["shape"]))


def _random_bf16(count: int, rng: np.random.Generator) -> np.ndarray:
    bits = rng.integers(0, 1 << 64, -(-count // 4), np.uint64).view(np.uint16)[:count]
    bits &= _KEPT
    bits |= _SET
    return bits
