"""What was found out on a device, kept on disk beside the compiled kernels: one small JSON file a kind of record.

A record holds for the device's name, the driver, and this package's kernels and compilers; when one of them changes it
is found out anew. ``LYCORIS_CACHE_DIR`` moves the files; set to the empty string, records live as long as the process.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import threading
from pathlib import Path

from kernels import binary_cache
from plans.core.device import Device


class Records:
    """Texts by key, of one kind. Several processes may add to a file; each sees what it had read and what it adds."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._known: dict[Path | None, dict[str, str]] = {}
        self._lock = threading.RLock()

    def get(self, device: Device, key: str) -> str | None:
        """What is recorded, or None."""
        with self._lock:
            return self._of(self._path(device)).get(key)

    def put(self, device: Device, key: str, text: str) -> None:
        """Record; what other processes have recorded meanwhile stays, and the file appears whole."""
        with self._lock:
            path = self._path(device)
            self._of(path)[key] = text
            if path is not None:
                _write(path, _read(path) | {key: text})

    def _of(self, path: Path | None) -> dict[str, str]:
        if path not in self._known:
            self._known[path] = _read(path)
        return self._known[path]

    def _path(self, device: Device) -> Path | None:
        root = binary_cache.folder()
        if root is None:
            return None
        identity = repr((device.name, device.arch, device.driver_version, binary_cache.sources_digest()))
        return root / f"{self.kind}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.json"


def _read(path: Path | None) -> dict[str, str]:
    """What a file holds; nothing where it is absent or not one of ours."""
    if path is None or not path.is_file():
        return {}
    text = path.read_text(encoding="utf-8")
    return json.loads(text)["records"] if text.startswith('{"records"') and text.endswith("}\n") else {}


def _write(path: Path, records: dict[str, str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(json.dumps({"records": records}) + "\n")
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)
