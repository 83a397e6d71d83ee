"""Kernels that are chosen only where their tests have passed."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from proofs import PROVING, Proofs

from plans.core import PlanPreference, proof
from plans.matmul import MatmulDescriptor, SegmentedMatmulPlan
from plans.matmul.wgmma import WGMMA

REASON = f"waits for {WGMMA.proof} to pass on"


@pytest.fixture
def records(tmp_path, monkeypatch):
    monkeypatch.delenv("LYCORIS_UNPROVEN", raising=False)
    monkeypatch.setenv("LYCORIS_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(proof.PROOFS, "_known", {})
    return tmp_path / "cache"


def reason(device, preference=None):
    descriptor = MatmulDescriptor(256, 256, 256).segmented
    return SegmentedMatmulPlan._reason_against(WGMMA, descriptor, preference or PlanPreference(), device)


def test_what_kernels_wait_for_exists():
    root = Path(__file__).parents[1]
    assert PROVING and all((root / file).is_file() for file in PROVING)


def test_kernels_are_chosen_where_their_tests_have_passed(device, records, monkeypatch):
    assert reason(device).startswith(REASON)
    proof.record(device, WGMMA.proof, passed=True)
    assert reason(device) == ""
    monkeypatch.setattr(proof.PROOFS, "_known", {})  # as another process
    assert reason(device) == ""
    proof.record(device, WGMMA.proof, passed=False)
    assert reason(device).startswith(REASON)


def test_they_can_be_asked_for_without(device, records, monkeypatch):
    assert reason(device, PlanPreference(prefer_backend=WGMMA.backend)) == ""
    monkeypatch.setenv("LYCORIS_UNPROVEN", "on")
    assert reason(device) == ""


def outcome(nodeid, when="call", **more):
    return SimpleNamespace(nodeid=nodeid, when=when, **({"failed": False, "passed": True} | more))


def test_a_file_with_a_failure_or_without_a_test_that_ran_proves_nothing(device, records):
    good, bad, skipped = sorted(PROVING)[:3]
    watched = Proofs()
    for file in (good, bad, "tests/test_cast.py"):
        watched.pytest_runtest_logreport(outcome(f"{file}::test_one[2]", "setup"))
        watched.pytest_runtest_logreport(outcome(f"{file}::test_one[2]"))
    watched.pytest_runtest_logreport(outcome(f"{bad}::test_two", "setup", failed=True, passed=False))
    watched.pytest_runtest_logreport(outcome(f"{skipped}::test_one", passed=False))
    assert watched.verdicts() == {good: True, bad: False}
    watched.pytest_sessionfinish(pytest.ExitCode.INTERRUPTED)
    assert not records.exists()
    watched.pytest_sessionfinish(pytest.ExitCode.TESTS_FAILED)
    assert [proof.proven(device, file) for file in (good, bad, skipped)] == [True, False, False]
