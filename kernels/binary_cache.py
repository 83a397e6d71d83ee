"""Compiled kernels on disk, so that a second process starts without compiling.

A file holds the digest of the rest, one line of JSON and the cubin. Its name is the digest of what made it:
the source of the kernel's module and of all that it imports of this package, the kernel's key and options, the
architecture, and the versions of the compilers. ``LYCORIS_CACHE_DIR`` moves the folder; set to the empty string it
turns the cache off.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import json
import os
import tempfile
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True)
class Binary:
    """A kernel compiled for one architecture."""

    cubin: bytes
    entry: str
    log: str


class Compilable(Protocol):
    """What the cache asks of a kernel: everything its binary depends on, and how to make it."""

    key: str
    module: str
    parameters: tuple
    threads: int
    min_blocks: int
    max_registers: int | None

    def compile(self, cc: tuple) -> Binary:
        """Compile for an architecture."""


def folder() -> Path | None:
    """The cache folder, or None where it is turned off or cannot be written."""
    setting = os.environ.get("LYCORIS_CACHE_DIR")
    if setting == "":
        return None
    if setting:
        root = Path(setting).absolute()
    else:
        root = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "lycoris"
        if not root.is_absolute():
            return None
    existing = root
    while not os.path.exists(existing):
        existing = existing.parent
    return root if existing.is_dir() and os.access(existing, os.W_OK | os.X_OK) else None


@functools.cache
def _imported(source: bytes) -> frozenset[str]:
    """Names that a source imports, wherever in it; of ``from a import b`` both a and a.b, whichever is a module."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.update((node.module, *(f"{node.module}.{alias.name}" for alias in node.names)))
    return frozenset(names)


def _sources(module: str) -> list[Path]:
    """The files of a module of this package, of all that it imports of it, and of the packages that they lie in.

    But not `kernels.launch`, on which no machine code depends.
    """
    package = Path(__file__).parent
    found: set[Path] = set()
    todo = [module]
    while todo:
        first, *inner = todo.pop().split(".")
        at = package.joinpath(*inner)
        path = at / "__init__.py" if at.is_dir() else at.with_suffix(".py")
        if first == package.name and inner != ["launch"] and path.is_file() and path not in found:
            found.add(path)
            todo += [*_imported(path.read_bytes()), ".".join([first, *inner[:-1]])]
    return sorted(found)


@functools.cache
def sources_digest(module: str = "") -> str:
    """The digest of the compilers' versions and of this package's sources: all, or those that a module is made of."""
    digest = hashlib.sha256()
    package = Path(__file__).parent
    for path in _sources(module) or sorted(package.rglob("*.py")):
        digest.update(str(path.relative_to(package)).encode() + b"\0" + path.read_bytes())
    for name in ("numba", "numba-cuda", "llvmlite", "numpy", "cuda-core", "cuda-bindings"):
        digest.update(f"{name}=={metadata.version(name)}".encode())
    from cuda.bindings import nvjitlink, nvvm

    digest.update(repr((nvjitlink.version(), nvvm.version())).encode())
    return digest.hexdigest()


def _file_name(kernel: Compilable, cc: tuple) -> str:
    identity = (sources_digest(kernel.module), kernel.key, str(kernel.parameters), kernel.threads, kernel.min_blocks,
                kernel.max_registers, cc)  # fmt: skip
    return hashlib.sha256(repr(identity).encode()).hexdigest() + ".kernel"


def _read(path: Path) -> Binary | None:
    """The cached binary; None if the file is absent or is not what was written."""
    if not path.is_file():
        return None
    digest, _, content = path.read_bytes().partition(b"\n")
    if digest != _digest(content):
        return None
    head, _, cubin = content.partition(b"\n")
    header = json.loads(head)
    return Binary(cubin, header["entry"], header["log"])


def _write(path: Path, kernel: Compilable, binary: Binary) -> None:
    """Store a binary; the file appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header = json.dumps({"entry": binary.entry, "log": binary.log, "key": kernel.key})
    content = header.encode() + b"\n" + binary.cubin
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(_digest(content) + b"\n" + content)
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).hexdigest().encode()


def load_or_compile(kernel: Compilable, cc: tuple) -> Binary:
    """The kernel's machine code for ``cc``, from the cache if it is there, else compiled and stored."""
    root = folder()
    if root is None:
        return kernel.compile(cc)
    path = root / _file_name(kernel, cc)
    binary = _read(path)
    if binary is None:
        binary = kernel.compile(cc)
        _write(path, kernel, binary)
    return binary
