"""``lycoris merge`` on a generated 8 GB checkpoint against ``cp`` of the same file: processes' wall time, in turns.

``cp`` leaves its file in the page cache, the command's is on disk before it gets its name. What the disk alone takes
for as many bytes, written and synced by as many threads, stands beside it: no command that syncs can be faster.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from cases import COMMAND_GATE, Limit, flux_checkpoint, flux_linears, flux_locon
from checkpoint_files import read_bf16, write_random_bf16
from golden import assert_golden
from measure import Result, record

from lycoris.checkpoint.staging import StagedFile
from lycoris.merge.pipeline import GPU_SIZES
from plans.core import Device

ROOT = Path(__file__).parents[1]
ROUNDS = 3
RANK = 16


@pytest.fixture
def folder(device: Device, tmp_path: Path) -> Iterator[Path]:
    """Where the files go: LYCORIS_BENCH_DIR, or pytest's temporary folder. They are removed afterwards."""
    folder = Path(os.environ.get("LYCORIS_BENCH_DIR", tmp_path))
    yield folder
    for name in ("base", "adapter", "copied", "merged"):
        (folder / f"{name}.safetensors").unlink(missing_ok=True)


def wall_seconds(output: Path, *command: str) -> tuple[float, str]:
    """Seconds that a process takes to write ``output``, which is absent before, with no other write under way."""
    output.unlink(missing_ok=True)
    os.sync()
    start = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - start
    assert done.returncode == 0, f"{' '.join(command)}:\n{done.stderr}"
    return seconds, done.stdout


def disk_seconds(output: Path, size: int) -> float:
    """Seconds in which ``size`` bytes of memory are written and synced, as the command's writers do it."""
    output.unlink(missing_ok=True)
    os.sync()
    block = memoryview(np.random.default_rng(0).bytes(GPU_SIZES.block_bytes))
    start = time.perf_counter()
    staged = StagedFile(output, size)
    with ThreadPoolExecutor(GPU_SIZES.writers) as pool:
        offsets = range(0, size, len(block))
        list(pool.map(lambda offset: staged.write(block[: size - offset], offset), offsets))
    staged.sync()
    seconds = time.perf_counter() - start
    staged.close()
    output.unlink()
    return seconds


def check_merged(base: Path, adapter: Path, merged: Path, rng: np.random.Generator) -> None:
    """Some rows of a few merged weights are right."""
    layers = [path for path, _ in flux_linears()]

    def values(file: Path, name: str, rows: Any = slice(None)) -> np.ndarray:
        return np.asarray(read_bf16(file, name)[rows]).view(ml_dtypes.bfloat16)

    for path in rng.choice(layers, 6, replace=False):
        weight = f"{path}.weight"
        rows = rng.integers(read_bf16(base, weight).shape[0], size=16)
        found, before = values(merged, weight, rows), values(base, weight, rows)
        up = values(adapter, f"transformer.{path}.lora_B.weight", rows).astype(np.float64)
        down = values(adapter, f"transformer.{path}.lora_A.weight").astype(np.float64)
        assert_golden(found, before.astype(np.float64) + up @ down, before, found.dtype)


@pytest.mark.benchmark(group="lycoris merge")
def test_merge_command(folder: Path, rng: np.random.Generator, benchmark: Any):
    base, adapter, copied, merged = (folder / f"{name}.safetensors" for name in ("base", "adapter", "copied", "merged"))
    write_random_bf16(base, flux_checkpoint(), rng)
    write_random_bf16(adapter, flux_locon(RANK), rng)
    command = [sys.executable, "-m", "lycoris", "merge", str(base), str(adapter), "--output", str(merged), "--json"]
    wall_seconds(merged, *command)  # compiles what the cache of kernels has not got, and has the base read once
    check_merged(base, adapter, merged, rng)

    ours: list[float] = []
    reported: list[dict[str, float]] = []
    plain: list[float] = []
    synced: list[float] = []
    disk: list[float] = []

    def copy() -> None:
        plain.append(wall_seconds(copied, "cp", str(base), str(copied))[0])
        synced.append(wall_seconds(copied, "sh", "-c", 'cp "$1" "$2" && sync "$2"', "sh", str(base), str(copied))[0])
        copied.unlink()
        disk.append(disk_seconds(copied, base.stat().st_size))

    def merge() -> None:
        seconds, output = wall_seconds(merged, *command)
        ours.append(seconds)
        report = json.loads(output)
        reported.append({"all": report["seconds"], **report["phases"]})
        merged.unlink()

    benchmark.pedantic(merge, setup=copy, rounds=ROUNDS)
    size = f"{base.stat().st_size / 1e9:.2f} GB, {len(list(flux_linears()))} linear layers"
    results = [
        Result("lycoris merge", size, f"LoCon r={RANK}", "", statistics.median(ours), limit, seconds, gate)
        for limit, seconds, gate in (
            (Limit.CP, statistics.median(plain), COMMAND_GATE),
            (Limit.CP_SYNCED, statistics.median(synced), None),
            (Limit.DISK, statistics.median(disk), None),
        )
    ]
    times = {"process": ours, "reported": reported, "cp": plain, "cp synced": synced, "disk": disk}
    record(benchmark, *results, seconds=times)
