"""Records which kernels have proven themselves on this GPU: those whose test file has passed in this run as a whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from kernels.target import SIMULATOR
from plans.catalogue import EXAMPLES
from plans.core import Device
from plans.core.proof import record

PROVING = {sku.proof for family in {example[0] for example in EXAMPLES} for sku in family.skus if sku.proof}


class Proofs:
    """Collects outcomes by test file; ``verdicts`` are those of the files that kernels wait for."""

    def __init__(self) -> None:
        self.passed: set[str] = set()
        self.failed: set[str] = set()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        file = "tests/" + Path(report.nodeid.split("::")[0]).name
        if report.failed:
            self.failed.add(file)
        elif report.when == "call" and report.passed:
            self.passed.add(file)

    def verdicts(self) -> dict[str, bool]:
        return {file: file not in self.failed for file in sorted(PROVING & (self.passed | self.failed))}

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        if exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
            device = Device.open()
            for file, passed in self.verdicts().items():
                record(device, file, passed)


def register(config: pytest.Config) -> None:
    """Watch a run on a GPU, unless it runs parts of files or stops early; xdist workers leave it to their parent."""
    option = config.option
    parts = option.keyword or option.markexpr != "not machine_code" or option.maxfail or option.deselect
    parts = parts or getattr(option, "lf", False) or any("::" in argument for argument in config.args)
    if not SIMULATOR and not parts and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Proofs())
