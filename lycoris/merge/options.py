"""What a merge is asked for, and what it reports."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path

from lycoris.dtype import OPTIONS
from lycoris.errors import RefusedInput

KEEP = "keep"


@dataclass(frozen=True)
class AdapterInput:
    """An adapter file or folder, and the factor on all that it changes."""

    path: Path
    strength: float = 1.0


@dataclass(frozen=True)
class MergeOptions:
    """A merge: `base + sum of strength * adapter -> output`.

    Attributes:
        base: A .safetensors file, an index.json with shards, or a folder that holds either.
        adapters: At least one.
        output: A file for a file, a folder for an index or a folder; one that ends in a slash names a folder.
        device: "auto", "cuda:N" or "simulator".
        dtype: "keep", or the type that all of the output's bf16, fp16 and fp32 tensors get.
        overwrite: Replace an existing output.
        sync: Have the output on disk before it gets its name, so that a loss of power, too, leaves a whole output or
            none. Without it the output is as durable as a file that `cp` has written.
        allow_unmatched: Merge the rest where modules match nothing in a part that the base has.
        dry_run: Check everything and report; compute and write nothing.
    """

    base: Path
    adapters: tuple[AdapterInput, ...]
    output: str | os.PathLike[str]
    device: str = "auto"
    dtype: str = KEEP
    overwrite: bool = False
    sync: bool = True
    allow_unmatched: bool = False
    dry_run: bool = False

    def check(self) -> None:
        """Raise `RefusedInput` for values that no file has to be looked at for."""
        if not self.adapters:
            raise RefusedInput("no adapter given, wanted at least one; name its file or folder")
        for adapter in self.adapters:
            if not math.isfinite(adapter.strength):
                raise RefusedInput(f"{adapter.path}: strength is {adapter.strength}, wanted a finite number; give one")
        if self.dtype != KEEP and self.dtype not in OPTIONS:
            raise RefusedInput(
                f"dtype {self.dtype!r} is not known, wanted one of {KEEP}, {', '.join(OPTIONS)}; choose one of them"
            )


@dataclass(frozen=True)
class MergeReport:
    """What was done.

    Attributes:
        device: Name of the GPU, or of the simulator.
        modules: Algorithm -> modules merged, of all adapters.
        ranks: Rank -> modules that have it.
        tensors: Tensors in the output.
        tensors_changed: How many of them an adapter changed; a change of dtype does not count.
        unmatched: What was left out, by component or reason -> modules.
        bytes_read, bytes_written: Tensor data of base, adapters and output; 0 written by a dry run.
        seconds: Wall time of the whole call.
        phases: Its parts: `plan` (headers, names, shapes), `device` (what was left of opening it by then), `kernels`
            (loaded or compiled), `stream` (read, computed, written), `publish` (synced where that is asked for, named).
            A dry run has two.
        output: As given.
        dry_run: Whether nothing was written.
        skus: Kernel -> tensors that it computed.
    """

    device: str
    modules: dict[str, int]
    ranks: dict[int, int]
    tensors: int
    tensors_changed: int
    unmatched: dict[str, int]
    bytes_read: int
    bytes_written: int
    seconds: float
    phases: dict[str, float]
    output: str
    dry_run: bool
    skus: dict[str, int]
