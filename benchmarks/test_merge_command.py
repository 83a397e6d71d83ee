"""``lycoris merge`` on a generated 8 GB checkpoint against ``cp`` of the same file: processes' wall time, in turns.

Like is compared with like. With ``--no-sync`` the command leaves its output where ``cp`` does, in the page cache. As it
is it has it on disk before it gets its name, and is compared with ``cp`` and ``sync``; what the disk alone takes for as
many bytes, written and synced by as many threads, stands beside that: nothing that syncs can be faster.
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
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pytest
from cases import COMMAND_GATE, Limit, flux_checkpoint, flux_linears, flux_locon
from checkpoint_files import read_bf16, write_random_bf16
from golden import assert_golden
from measure import Result, record

from lycoris.checkpoint.staging import StagedFile
from lycoris.merge.pipeline import GPU_SIZES

ROOT = Path(__file__).parents[1]
ROUNDS = 5
RANK = 16


class Files(NamedTuple):
    """The inputs, and where the copy and the merged checkpoint go."""

    base: Path
    adapter: Path
    copied: Path
    merged: Path

    @property
    def merge(self) -> list[str]:
        """The command."""
        names = map(str, (self.base, self.adapter, "--output", self.merged))
        return [sys.executable, "-m", "lycoris", "merge", *names, "--json"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Files]:
    """In LYCORIS_BENCH_DIR, or pytest's temporary folder; with one right merge behind them, and removed afterwards.

    That first merge compiles what the cache of kernels has not got, and has the base read once.
    """
    rng = np.random.default_rng(1)
    folder = Path(os.environ.get("LYCORIS_BENCH_DIR") or tmp_path_factory.mktemp("merge"))
    files = Files(*(folder / f"{name}.safetensors" for name in Files._fields))
    try:
        write_random_bf16(files.base, flux_checkpoint(), rng)
        write_random_bf16(files.adapter, flux_locon(RANK), rng)
        wall_seconds(files.merged, *files.merge)
        check_merged(files, rng)
        yield files
    finally:
        for path in files:
            path.unlink(missing_ok=True)


def wall_seconds(output: Path, *command: str) -> tuple[float, str]:
    """Seconds that a process takes to write ``output``, which is absent before, with no other write under way.

    Its Python keeps bytecode, as that of an installed package does, also where that is turned off for this process.
    """
    output.unlink(missing_ok=True)
    os.sync()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    start = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - start
    assert done.returncode == 0, f"{' '.join(command)}:\n{done.stderr}"
    return seconds, done.stdout


def disk_seconds(output: Path, size: int) -> float:
    """Seconds in which ``size`` bytes of memory are written and synced, as the command's writers do it."""
    output.unlink(missing_ok=True)
    os.sync()
    block = memoryview(np.random.default_rng(0).bytes(GPU_SIZES.block_bytes))
    start = time.perf_counter()
    staged = StagedFile(output, size, writes_back=True)
    with ThreadPoolExecutor(GPU_SIZES.writers) as pool:
        offsets = range(0, size, len(block))
        list(pool.map(lambda offset: staged.write(block[: size - offset], offset), offsets))
    staged.sync()
    seconds = time.perf_counter() - start
    staged.close()
    output.unlink()
    return seconds


def check_merged(files: Files, rng: np.random.Generator) -> None:
    """Some rows of a few merged weights are right."""
    layers = [path for path, _ in flux_linears()]

    def values(file: Path, name: str, rows: Any = slice(None)) -> np.ndarray:
        return np.asarray(read_bf16(file, name)[rows]).view(ml_dtypes.bfloat16)

    for path in rng.choice(layers, 6, replace=False):
        weight = f"{path}.weight"
        rows = rng.integers(read_bf16(files.base, weight).shape[0], size=16)
        found, before = values(files.merged, weight, rows), values(files.base, weight, rows)
        up = values(files.adapter, f"transformer.{path}.lora_B.weight", rows).astype(np.float64)
        down = values(files.adapter, f"transformer.{path}.lora_A.weight").astype(np.float64)
        assert_golden(found, before.astype(np.float64) + up @ down, before, found.dtype)


@pytest.mark.parametrize("sync", [False, True], ids=["no-sync", "sync"])
@pytest.mark.benchmark(group="lycoris merge")
def test_merge_command(files: Files, sync: bool, benchmark: Any):
    work, limit, options = "lycoris merge --no-sync", Limit.CP, ["--no-sync"]
    copying = ["cp", str(files.base), str(files.copied)]
    if sync:
        work, limit, options = "lycoris merge", Limit.CP_SYNCED, []
        copying = ["sh", "-c", 'cp "$1" "$2" && sync "$2"', "sh", *copying[1:]]
    ours: list[float] = []
    reported: list[dict[str, float]] = []
    copies: list[float] = []
    disk: list[float] = []

    def copy() -> None:
        copies.append(wall_seconds(files.copied, *copying)[0])
        files.copied.unlink()
        if sync:
            disk.append(disk_seconds(files.copied, files.base.stat().st_size))

    def merge() -> None:
        seconds, output = wall_seconds(files.merged, *files.merge, *options)
        ours.append(seconds)
        report = json.loads(output)
        reported.append({"all": report["seconds"], **report["phases"]})
        files.merged.unlink()

    benchmark.pedantic(merge, setup=copy, rounds=ROUNDS)
    size = f"{files.base.stat().st_size / 1e9:.2f} GB, {len(list(flux_linears()))} linear layers"
    found = [(limit, copies, COMMAND_GATE)] + [(Limit.DISK, disk, None)] * sync
    seconds = statistics.median(ours)
    record(
        benchmark,
        *(Result(work, size, f"LoCon r={RANK}", "", seconds, of, statistics.median(t), gate) for of, t, gate in found),
        seconds={"process": ours, "reported": reported, limit.value: copies, "disk": disk},
    )
