"""Merge files, and compare the output with the exact merge, tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from golden import assert_golden
from reference import expected_merge
from safetensors_files import tensors_file

from lycoris.checkpoint import Checkpoint
from lycoris.dtype import DTYPES, OPTIONS
from lycoris.formats import match, read_adapter
from lycoris.merge import AdapterInput, MergeOptions, MergeReport, merge

Given = Path | tuple[Path, float]


def write(path: Path, tensors: dict[str, np.ndarray], metadata: dict[str, str] | None = None) -> Path:
    """A safetensors file with `tensors` in the order given."""
    path.write_bytes(tensors_file(tensors, metadata))
    return path


def with_strengths(adapters: tuple[Given, ...]) -> list[tuple[Path, float]]:
    return [given if isinstance(given, tuple) else (given, 1.0) for given in adapters]


def run(
    base: Path, *adapters: Given, output: Path, progress: Callable[[int, int], None] | None = None, **options: Any
) -> MergeReport:
    """`lycoris.merge.merge` with adapters as paths, or as (path, strength)."""
    given = tuple(AdapterInput(path, strength) for path, strength in with_strengths(adapters))
    return merge(MergeOptions(base, given, output, **options), progress)


def read_all(path: Path) -> dict[str, np.ndarray]:
    """Every tensor of a checkpoint."""
    with Checkpoint.open(path) as checkpoint:
        return {name: checkpoint.read(name) for name in checkpoint.tensors}


def assert_merged(base: Path, *adapters: Given, output: Path, dtype: str = "keep") -> dict[str, np.ndarray]:
    """Every tensor of `output` is the exact one rounded once, and what no adapter changes the base's own or cast."""
    weights, merged = read_all(base), read_all(output)
    assert list(merged) == list(weights)
    with Checkpoint.open(base) as checkpoint:
        tensors = dict(checkpoint.tensors)
    rows = [
        (row, strength)
        for path, strength in with_strengths(adapters)
        for row in match(read_adapter(path), tensors, allow_unmatched=True).matched
    ]
    exact = expected_merge(weights, *zip(*rows, strict=True))
    for name, weight in weights.items():
        mergeable = tensors[name].dtype in OPTIONS.values()
        wanted = DTYPES[OPTIONS[dtype]].numpy if dtype in OPTIONS and mergeable else weight.dtype
        if name in exact:
            assert_golden(merged[name], exact[name], weight, wanted)
        else:
            assert merged[name].dtype == wanted, name
            assert merged[name].tobytes() == weight.astype(wanted).tobytes(), name
    return merged
