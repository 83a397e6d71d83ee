"""Which kernels have proven themselves on a device: those whose test file has passed there as a whole.

A SKU whose ``proof`` names a test file is chosen unasked only on devices where that file has passed; the test suite
records it (`tests/proofs.py`).
"""

from __future__ import annotations

import os

from plans.core.device import Device
from plans.core.records import Records

PROOFS = Records("proofs")
_PASSED = "passed"


def proven(device: Device, test_file: str) -> bool:
    """Whether the tests have passed on the device, or LYCORIS_UNPROVEN=on does without."""
    return os.environ.get("LYCORIS_UNPROVEN") == "on" or PROOFS.get(device, test_file) == _PASSED


def record(device: Device, test_file: str, passed: bool) -> None:
    """Keep what the tests of a file have shown on the device."""
    PROOFS.put(device, test_file, _PASSED if passed else "failed")
