"""What the benchmarks share: a GPU or nothing, random numbers that can be repeated, the machine in the record."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("LYCORIS_QUIET", "1")
sys.path.append(str(Path(__file__).parents[1] / "tests"))  # the golden set's rule of comparison

import numpy as np
import pytest

from plans.core import Device
from plans.core.device import describe


@pytest.fixture(scope="session")
def device() -> Device:
    """The GPU; without one there is nothing to measure."""
    device = Device.open("auto")
    if device.is_simulator:
        pytest.skip("benchmarks need a GPU: no NVIDIA driver with one was found")
    return device


@pytest.fixture(autouse=True)
def measuring(device: Device, benchmark: Any) -> None:
    """Numbers from processes that share the GPU would be wrong, so pytest-benchmark does not measure under xdist."""
    if benchmark.disabled:
        benchmark.skipped = True
        pytest.skip("pytest-benchmark is disabled: run `pytest -o addopts= benchmarks`, which leaves xdist out")


@pytest.fixture
def rng() -> np.random.Generator:
    """Fresh random numbers; a failing benchmark shows the setting that repeats them."""
    seed = int(os.environ.get("LYCORIS_TEST_SEED") or secrets.randbits(32))
    print(f"LYCORIS_TEST_SEED={seed} repeats the random numbers")
    return np.random.default_rng(seed)


_unmeasured: dict[str, str] = {}


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Remember what failed or did not run."""
    if report.failed:
        _unmeasured[report.nodeid] = f"failed in its {report.when}"
    elif report.skipped:
        _unmeasured[report.nodeid] = report.longrepr[2]


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: Any, output_json: dict[str, Any]) -> None:
    """Those of them that have no numbers, so that a table cannot hide them."""
    measured = {record["fullname"] for record in output_json["benchmarks"]}
    output_json["unmeasured"] = {name: why for name, why in _unmeasured.items() if name not in measured}


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """The device, its driver and the libraries, for the tables."""
    machine_info["lycoris"] = describe()
    if command := shutil.which("nvidia-smi"):
        query = [command, "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(query, capture_output=True, text=True, check=True)
        machine_info["lycoris"]["driver"] = f"{done.stdout.split()[0]} ({machine_info['lycoris']['driver']})"
