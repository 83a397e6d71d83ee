"""Choices that are measured on the device once, and kept on disk: which tile, how many stages.

A record is keyed by the device's name, the driver, this package's kernels and compilers, the family and the class of
the problem. ``LYCORIS_TUNE=off`` turns measuring off: choices that are not recorded are then a family's own estimate.
``LYCORIS_CACHE_DIR`` moves the records with the compiled kernels.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
import threading
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from kernels import binary_cache
from kernels.target import SIMULATOR
from plans.core.device import Device

Candidate = TypeVar("Candidate", bound=Hashable)
LAUNCHES, ROUNDS = 10, 5
_lock = threading.RLock()
_known: dict[Path | None, dict[str, str]] = {}


def enabled() -> bool:
    """Whether choices that are not recorded are measured: not in the simulator, nor where it is turned off."""
    setting = os.environ.get("LYCORIS_TUNE", "on")
    if setting not in ("on", "off"):
        raise ValueError(f"LYCORIS_TUNE is {setting!r}, wanted on or off; set one of them, or unset it")
    return setting == "on" and not SIMULATOR


def tuned(
    device: Device,
    family: str,
    problem: Hashable,
    candidates: Sequence[Candidate],
    seconds: Callable[[Candidate], float],
    measuring: bool | None = None,
) -> Candidate:
    """The fastest candidate for a class of problems on a device; the first, which a family estimates best, unmeasured.

    Candidates and ``problem`` are plain data. ``seconds`` measures one; ``measuring`` overrides :func:`enabled`.
    """
    key = f"{family} {problem!r}"
    by_name = {repr(candidate): candidate for candidate in candidates}
    with _lock:
        path = _path(device)
        records = _records(path)
        found = by_name.get(records.get(key, ""))
        if found is None:
            if not (enabled() if measuring is None else measuring):
                return candidates[0]
            found = min(candidates, key=seconds)
            records[key] = repr(found)
            _write(path, key, records[key])
    return found


def device_seconds(device: Device, launch: Callable[[Any], None]) -> float:
    """The shortest of several rounds of a launch on a GPU, seconds a launch."""
    from cuda.core import EventOptions

    stream, options = device._own_stream, EventOptions(timing_enabled=True)
    launch(stream)
    shortest = math.inf
    for _ in range(ROUNDS):
        start = stream.record(options=options)
        for _ in range(LAUNCHES):
            launch(stream)
        stop = stream.record(options=options)
        stop.sync()
        shortest = min(shortest, (stop - start) * 1e-3 / LAUNCHES)
    return shortest


def _path(device: Device) -> Path | None:
    root = binary_cache.folder()
    if root is None:
        return None
    identity = repr((device.name, device.arch, device.driver_version, binary_cache.sources_digest()))
    return root / f"tuning-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.json"


def _records(path: Path | None) -> dict[str, str]:
    if path not in _known:
        _known[path] = _read(path)
    return _known[path]


def _read(path: Path | None) -> dict[str, str]:
    """What is recorded; nothing where the file is absent or not one of ours."""
    if path is None or not path.is_file():
        return {}
    text = path.read_text(encoding="utf-8")
    return json.loads(text)["choices"] if text.startswith('{"choices"') and text.endswith("}\n") else {}


def _write(path: Path | None, key: str, value: str) -> None:
    """Add a record to what other processes have recorded meanwhile; the file appears whole."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(json.dumps({"choices": _read(path) | {key: value}}) + "\n")
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)
