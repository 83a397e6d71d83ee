"""Every golden case merged from end to end: what changes is right to the last bit, all else is the base's own."""

from __future__ import annotations

import numpy as np
import pytest
from golden import GoldenCase, assert_golden, golden_cases
from merging import read_all, run
from safetensors_files import snapshot

CASES = golden_cases()


def prefix(data: bytes) -> bytes:
    """All of a safetensors file before its data."""
    return data[: 8 + int.from_bytes(data[:8], "little")]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_golden(case: GoldenCase, tmp_path):
    sharded = case.base.suffix == ".json"
    output = tmp_path / ("merged" if sharded else "merged.safetensors")
    before = snapshot(case.base.parent)

    report = run(case.base, *case.adapters, output=output)

    expected, base = case.expected(), read_all(case.base)
    merged = read_all(output / case.base.name if sharded else output)
    assert list(merged) == list(base)
    for name, weight in base.items():
        if name in expected:
            assert_golden(merged[name], expected[name].astype(np.float64), weight, weight.dtype)
        else:
            assert merged[name].tobytes() == weight.tobytes(), f"{name} changed"
    assert report.tensors == len(base)
    assert report.tensors_changed == len(expected)
    assert sum(report.unmatched.values()) == len(case.unmatched)
    assert snapshot(case.base.parent) == before
    if sharded:
        written = snapshot(output)
        assert {name: prefix(data) for name, data in written.items() if name.endswith(".safetensors")} == {
            name: prefix(data) for name, data in before.items() if name.endswith(".safetensors")
        }
        assert written[case.base.name] == before[case.base.name]
    else:
        assert prefix(output.read_bytes()) == prefix(case.base.read_bytes())


@pytest.mark.parametrize("adapters", [(0, 1), (1, 0)])
def test_two_adapters_in_either_order(adapters, tmp_path):
    case = next(case for case in CASES if case.name == "lyco_two_adapters")
    output = tmp_path / "merged.safetensors"
    run(case.base, *(case.adapters[i] for i in adapters), output=output)
    expected, base, merged = case.expected(), read_all(case.base), read_all(output)
    for name, exact in expected.items():
        assert_golden(merged[name], exact.astype(np.float64), base[name], base[name].dtype)
