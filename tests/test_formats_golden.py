"""Every golden case through the reader: its names, scales and shapes make the merged tensors, in float64."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from golden import assert_golden, golden_cases, round_once, ulp
from hypothesis import given
from hypothesis import strategies as st
from reference import expected_merge, load

from lycoris.checkpoint import Checkpoint
from lycoris.formats import match, read_adapter

CASES = golden_cases()
DTYPES = {"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32}


def merged_case(case):
    """(base tensors, base entries, exact merged tensors, matchings) of a golden case."""
    with Checkpoint.open(case.base) as base:
        tensors = dict(base.tensors)
    matchings = [(match(read_adapter(path), tensors), strength) for path, strength in case.adapters]
    values = {name: load(entry) for name, entry in tensors.items()}
    rows = [(row, strength) for matching, strength in matchings for row in matching.matched]
    return tensors, values, expected_merge(values, *zip(*rows, strict=True)), [m for m, _ in matchings]


def test_all_cases_are_there():
    assert len(CASES) == 41


# Of the rows of the weights that PEFT's DoRA cases change.
SMALLEST_NORM = 0.05


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_merged_values(case):
    tensors, values, merged, matchings = merged_case(case)
    expected = case.expected()
    assert merged.keys() == expected.keys()
    # PEFT divides DoRA's magnitude by the norm alone, a merge always by the norm plus 2^-23.
    eps_shift = 2.0**-23 / SMALLEST_NORM if case.algorithm == "lora+dora" else 0.0
    for name, wanted in expected.items():
        np.testing.assert_allclose(merged[name], wanted, rtol=1e-6 + eps_shift, atol=1e-12, err_msg=name)
        dtype = DTYPES[tensors[name].dtype]
        assert_golden(merged[name].astype(dtype), wanted, values[name], dtype)
    absent = [stem for matching in matchings for stems in matching.absent.values() for stem in stems]
    assert sorted(absent) == sorted(case.unmatched)
    assert not any(matching.unmatched for matching in matchings)


@pytest.mark.parametrize("case", [case for case in CASES if len(case.adapters) == 1], ids=lambda case: case.name)
def test_a_folder_reads_as_its_file(case, tmp_path):
    file = case.adapters[0][0]
    for source in (file, file.with_name("adapter_config.json")):
        if source.exists():
            (tmp_path / source.name).symlink_to(source)
    from_folder, from_file = read_adapter(tmp_path), read_adapter(file)
    assert from_folder.format == from_file.format
    assert [(m.stem, m.scale, m.rank, m.dora) for m in from_folder.modules] == [
        (m.stem, m.scale, m.rank, m.dora) for m in from_file.modules
    ]


FORMATS = {"peft": "peft", "lyco": "kohya", "unet": "diffusers"}
OTHER_FORMATS = {
    "lyco_standalone_prefix": "lycoris",
    "lyco_grouped_conv": "lycoris",
    "flux_lyco_lokr": "lycoris",
    "flux_lyco_loha": "lycoris",
    "flux_diffusers_lora": "diffusers",
    "flux_diffusers_lora_bare": "diffusers",
}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_format(case):
    wanted = OTHER_FORMATS.get(case.name) or FORMATS[case.name.partition("_")[0]]
    assert {read_adapter(path).format for path, _ in case.adapters} == {wanted}


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_comparison_refuses_a_neighbour_away_from_a_tie(dtype):
    exact = np.array([1.0 + 2.0**-14, -3.0, 0.0])
    base = np.zeros(3, dtype)
    good = exact.astype(dtype)
    assert_golden(good, exact, base, dtype)
    for index in range(2):
        bad = good.copy()
        bad[index] = np.nextafter(np.float32(good[index]), np.float32(9)) + ulp(exact, dtype)[index]
        with pytest.raises(AssertionError, match="1 of 3 values"):
            assert_golden(bad, exact, base, dtype)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_comparison_allows_both_sides_of_a_tie(dtype):
    step = ulp(np.array([1.0]), dtype)
    base = np.zeros(1, dtype)
    for sign in (0.0, 1.0):
        assert_golden((1 + sign * step).astype(dtype), 1 + step / 2, base, dtype)
    with pytest.raises(AssertionError):
        assert_golden((1 + step).astype(dtype), 1 + step * (0.5 - 2.0**-8), base, dtype)


def test_comparison_in_fp32_refuses_one_part_in_a_hundred_thousand():
    base = np.ones(1, np.float32)
    assert_golden(np.array([2.0], np.float32), np.array([2.0]), base, np.float32)
    with pytest.raises(AssertionError):
        assert_golden(np.array([2.0], np.float32), np.array([2.00002]), base, np.float32)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_comparison_refuses_what_is_not_finite(bad):
    for dtype in (np.float16, ml_dtypes.bfloat16, np.float32):
        with pytest.raises(AssertionError):
            assert_golden(np.array([bad], dtype), np.array([1.0]), np.ones(1, dtype), dtype)


@given(st.floats(-70000, 70000, width=32))
def test_rounding_once(value):
    # float32 to either type is a single rounding in NumPy and ml_dtypes: an independent check of our own.
    for dtype in (np.float16, ml_dtypes.bfloat16):
        with np.errstate(over="ignore"):
            wanted = np.float32(value).astype(dtype).astype(np.float64)
        np.testing.assert_array_equal(round_once(np.array([float(value)]), dtype)[0], wanted)
