"""The golden cases: files that LyCORIS, PEFT and diffusers wrote, with the merged values that must come out.

`data/golden` is a copy of the set; `assert_golden` is its rule of comparison.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file

GOLDEN = Path(__file__).parent / "data" / "golden"

# Smallest step between values, as a power of two, and bits of the significand with the hidden one.
_FORMATS = {np.dtype(np.float16): (-24, 11), np.dtype(ml_dtypes.bfloat16): (-133, 8)}


@dataclass(frozen=True)
class GoldenCase:
    """What to merge: (adapter file, strength) pairs into a base, which is a file or a shard index."""

    name: str
    base: Path
    adapters: tuple[tuple[Path, float], ...]
    expected_file: Path
    unmatched: tuple[str, ...]
    algorithm: str

    def expected(self) -> dict[str, np.ndarray]:
        """Every tensor that changes, float32."""
        return load_file(self.expected_file)


def golden_cases() -> list[GoldenCase]:
    """All cases, by name."""
    return [_read(path) for path in sorted(GOLDEN.glob("cases/*/case.json"))]


def _read(path: Path) -> GoldenCase:
    case = json.loads(path.read_text())
    folder = path.parent
    return GoldenCase(
        name=case["name"],
        base=(folder / case["base"]).resolve(),
        adapters=tuple((folder / row["file"], row["strength"]) for row in case["adapters"]),
        expected_file=folder / case["expected"],
        unmatched=tuple(case.get("unmatched_modules", ())),
        algorithm=case["algorithm"],
    )


def ulp(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Distance between neighbouring values of a 16-bit `dtype` at each of float64 `values`."""
    smallest, bits = _FORMATS[np.dtype(dtype)]
    _, exponent = np.frexp(values)
    return np.ldexp(1.0, np.maximum(exponent - bits, smallest))


def round_once(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """float64 `values` rounded once to a 16-bit `dtype`, nearest even, as float64. NumPy goes through float32."""
    step = ulp(values, dtype)
    rounded = np.rint(values / step) * step
    largest = float(ml_dtypes.finfo(dtype).max)
    return np.where(np.abs(rounded) > largest, np.copysign(np.inf, values), rounded)


def assert_golden(actual: np.ndarray, expected64: np.ndarray, base: np.ndarray, dtype: np.dtype) -> None:
    """Compare a merged tensor with the exact one, as the golden set's README says.

    Args:
        actual: The merged tensor, in `dtype`.
        expected64: The exact values E, float64.
        base: The base's values W.
        dtype: float16, bfloat16: each value must be the rounding of some x with
            |x - E| <= 2^-12 ulp + 8 * 2^-24 * (|W| + |E - W|). float32: |actual - E| <= 2^-20 max(|W|, |E - W|, |E|).
    """
    assert actual.dtype == np.dtype(dtype), f"dtype {actual.dtype}, wanted {dtype}"
    assert actual.shape == base.shape, f"shape {actual.shape}, wanted {base.shape}"
    found, weight = actual.astype(np.float64), base.astype(np.float64)
    exact = expected64.astype(np.float64).reshape(weight.shape)
    change = np.abs(exact - weight)
    if np.dtype(dtype) == np.float32:
        bound = 2.0**-20 * np.maximum.reduce([np.abs(weight), change, np.abs(exact)])
        wrong = ~(np.abs(found - exact) <= bound)
    else:
        slack = 2.0**-12 * ulp(exact, dtype) + 8 * 2.0**-24 * (np.abs(weight) + change)
        # Rounding is monotonic: the roundings of all x in the interval lie between those of its ends.
        wrong = ~((round_once(exact - slack, dtype) <= found) & (found <= round_once(exact + slack, dtype)))
    if wrong.any():
        at = tuple(int(index) for index in np.argwhere(wrong)[0])
        raise AssertionError(
            f"{int(wrong.sum())} of {wrong.size} values are wrong, first at {at}: "
            f"found {found[at]!r}, exact {exact[at]!r}, base {weight[at]!r}"
        )
