"""Choices that are measured once and kept on disk."""

from __future__ import annotations

import pytest

from plans.core import tuning
from plans.core.tuning import tuned
from plans.matmul import MatmulDescriptor
from plans.matmul.wgmma import MEASURED, likely_tiles, stages_of

TIMES = {"a": 3.0, "b": 1.0, "c": 2.0}


@pytest.fixture
def records(tmp_path, monkeypatch):
    monkeypatch.setenv("LYCORIS_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(tuning.CHOICES, "_known", {})
    return tmp_path / "cache"


def choose(device, problem=(1, 2), candidates=("a", "b", "c"), measuring=True):
    measured = []

    def seconds(candidate):
        measured.append(candidate)
        return TIMES[candidate]

    return tuned(device, "family", problem, candidates, seconds, measuring), measured


def test_the_fastest_is_measured_once_and_kept(device, records, monkeypatch):
    assert choose(device) == ("b", ["a", "b", "c"])
    assert choose(device) == ("b", [])
    monkeypatch.setattr(tuning.CHOICES, "_known", {})  # as another process
    assert choose(device) == ("b", [])
    assert choose(device, (1, 3), ("c", "a"))[0] == "c"
    monkeypatch.setattr(tuning.CHOICES, "_known", {})
    assert choose(device, measuring=False) == ("b", [])


def test_unmeasured_the_estimate_decides_and_nothing_is_written(device, records):
    assert choose(device, measuring=False) == ("a", [])
    assert not records.exists()


def test_a_choice_that_is_no_candidate_any_more_is_measured_again(device, records, monkeypatch):
    choose(device)
    assert choose(device, candidates=("a", "c")) == ("c", ["a", "c"])


def test_a_damaged_record_counts_as_none(device, records, monkeypatch):
    choose(device)
    (path,) = records.iterdir()
    path.write_text('{"records": {"fam')
    monkeypatch.setattr(tuning.CHOICES, "_known", {})
    assert choose(device) == ("b", ["a", "b", "c"])


def test_two_processes_add_to_one_file(device, records, monkeypatch):
    choose(device, (1,))
    first = tuning.CHOICES._known.copy()
    monkeypatch.setattr(tuning.CHOICES, "_known", {})
    tuning.CHOICES._known[next(iter(first))] = {}  # a process that had read the file before the first wrote
    choose(device, (2,))
    monkeypatch.setattr(tuning.CHOICES, "_known", {})
    assert choose(device, (1,)) == ("b", [])
    assert choose(device, (2,)) == ("b", [])


def test_the_setting_is_on_or_off(monkeypatch):
    monkeypatch.setenv("LYCORIS_TUNE", "maybe")
    with pytest.raises(ValueError, match="LYCORIS_TUNE is 'maybe', wanted on or off; set one of them, or unset it"):
        tuning.enabled()
    monkeypatch.setenv("LYCORIS_TUNE", "off")
    assert not tuning.enabled()


@pytest.mark.parametrize(
    ("shape", "columns"),
    [((4096, 1280, 1280), 160), ((4096, 640, 640), 160), ((8192, 8192, 8192), 256), ((4096, 12288, 3072), 256)],
    ids=str,
)
def test_the_estimate_of_tiles(shape, columns):
    """132 multiprocessors: whole waves of narrower tiles beat half-empty ones of wide tiles."""
    likely = likely_tiles(MatmulDescriptor(*shape).segmented, 132, 1 << 15)
    assert len(likely) == MEASURED
    assert columns in {tile.columns for tile in likely[:2]}
    assert all(tile.stages == stages_of(tile, 1 << 15) >= 3 for tile in likely)
