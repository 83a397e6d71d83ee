"""The disk cache of compiled kernels: when it is used, when it must not be, and what a broken file does."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

import plans.catalogue
from kernels import binary_cache
from kernels.target import FACTORIES, Binary, Kernel, f32p, u16p

ROOT = Path(__file__).parent.parent
CC = (9, 0, "a")


class CountedKernel(Kernel):
    """A kernel whose compilation is counted and costs nothing."""

    compilations = 0

    def compile(self, cc):
        CountedKernel.compilations += 1
        cubin = f"\n{self.key} {self.threads} {cc}\n\0".encode()
        return Binary(cubin, f"entry of {self.key}", 'log with "quotes"\nand lines')


@pytest.fixture
def compilations(monkeypatch):
    """How many compilations the test has caused."""
    monkeypatch.setattr(CountedKernel, "compilations", 0)
    return lambda: CountedKernel.compilations


@pytest.fixture
def folder(monkeypatch, tmp_path):
    monkeypatch.setenv("LYCORIS_CACHE_DIR", str(tmp_path / "not" / "there yet"))
    return tmp_path / "not" / "there yet"


KERNEL = CountedKernel(print, (f32p,), threads=32, key="kernels.example.make(1,)")


def test_the_second_load_gives_the_same_binary_without_compiling(folder, compilations):
    first, second = (binary_cache.load_or_compile(KERNEL, CC) for _ in range(2))
    assert first == second == KERNEL.compile(CC)
    assert compilations() == 1 + 1
    assert [path.suffix for path in folder.iterdir()] == [".kernel"]


@pytest.mark.parametrize(
    "changed",
    [{"key": "kernels.example.make(2,)"}, {"parameters": (u16p,)}, {"threads": 64}, {"min_blocks": 2},
     {"max_registers": 64}],
    ids=str,
)  # fmt: skip
def test_another_choice_is_another_binary(folder, compilations, changed):
    other = replace(KERNEL, **changed)
    for kernel in (KERNEL, other, KERNEL, other):
        assert binary_cache.load_or_compile(kernel, CC).entry == f"entry of {kernel.key}"
    assert compilations() == 2


def test_another_architecture_is_another_binary(folder, compilations):
    for cc in ((8, 0), (8, 9), (9, 0), (9, 0, "a")):
        assert binary_cache.load_or_compile(KERNEL, cc) == binary_cache.load_or_compile(KERNEL, cc)
    assert compilations() == 4


@pytest.fixture
def package(monkeypatch, tmp_path):
    """A copy of the package's sources, which the cache takes for them; its digests are not kept."""
    shutil.copytree(Path(binary_cache.__file__).parent, tmp_path / "kernels")
    monkeypatch.setattr(binary_cache, "__file__", str(tmp_path / "kernels" / "binary_cache.py"))
    monkeypatch.setattr(binary_cache, "sources_digest", binary_cache.sources_digest.__wrapped__)
    return tmp_path / "kernels"


def add_line(path):
    with path.open("a") as file:
        file.write("\n")


def test_other_sources_or_libraries_are_another_binary(folder, compilations, monkeypatch, package):
    binary_cache.load_or_compile(KERNEL, CC)
    seen = {binary_cache.sources_digest()}
    (package / "bits.py").rename(package / "renamed.py")
    seen.add(binary_cache.sources_digest())
    (package / "family").mkdir()
    (package / "renamed.py").rename(package / "family" / "renamed.py")
    seen.add(binary_cache.sources_digest())
    add_line(package / "warp.py")
    seen.add(binary_cache.sources_digest())
    monkeypatch.setattr(binary_cache.metadata, "version", lambda name: "0.0")
    seen.add(binary_cache.sources_digest())
    assert len(seen) == 5
    binary_cache.load_or_compile(KERNEL, CC)
    assert compilations() == 2


def test_a_kernel_is_compiled_again_where_its_module_or_what_that_imports_changed(folder, compilations, package):
    """kernels/weight/tile.py imports bits.py by way of elements.py; it has nothing of rows.py.

    By way of target.py also launch.py, which has nothing to do with machine code.
    """
    kernel = replace(KERNEL, module="kernels.weight.tile")
    changes = {
        "rows.py": 1,
        "launch.py": 1,
        "attention/__init__.py": 1,
        "weight/tile.py": 2,
        "bits.py": 3,
        "weight/__init__.py": 4,
    }
    binary_cache.load_or_compile(kernel, CC)
    for path, wanted in changes.items():
        add_line(package / path)
        binary_cache.load_or_compile(kernel, CC)
        assert compilations() == wanted, path


def test_every_factory_names_its_module():
    made = [factory(*factory.examples[0]) for factory in FACTORIES if factory.examples]
    assert len(made) >= len({type_ for type_, *_ in plans.catalogue.EXAMPLES})
    assert {kernel.module for kernel in made} <= set(sys.modules)
    assert all(kernel.key.startswith(f"{kernel.module}.") for kernel in made)
    assert all(binary_cache._sources(kernel.module) for kernel in made)


def flip(data, at):
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


@pytest.mark.parametrize(
    "corrupt",
    [
        lambda data: b"",
        lambda data: b"\n",
        lambda data: data[:-1],
        lambda data: data[: len(data) // 2],
        lambda data: data + b"\0",
        lambda data: data.replace(b"\n", b" "),
        lambda data: flip(data, 0),
        lambda data: flip(data, data.index(b"{")),
        lambda data: flip(data, data.index(b'"entry"') + 1),
        lambda data: flip(data, data.index(b'"log"') + 8),
        lambda data: flip(data, len(data) - 2),
        lambda data: b"{}\n" + data,
        lambda data: bytes(len(data)),
    ],
)
def test_a_broken_file_is_compiled_again_and_replaced(folder, compilations, corrupt):
    good = binary_cache.load_or_compile(KERNEL, CC)
    (path,) = folder.iterdir()
    whole = path.read_bytes()
    path.write_bytes(corrupt(whole))
    assert binary_cache.load_or_compile(KERNEL, CC) == good
    assert compilations() == 2
    assert path.read_bytes() == whole
    assert binary_cache.load_or_compile(KERNEL, CC) == good
    assert compilations() == 2


def test_an_empty_setting_turns_the_cache_off(monkeypatch, tmp_path, compilations):
    monkeypatch.setenv("LYCORIS_CACHE_DIR", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert binary_cache.folder() is None
    for _ in range(2):
        binary_cache.load_or_compile(KERNEL, CC)
    assert compilations() == 2
    assert not any(tmp_path.iterdir())


def test_the_folder_is_the_setting_else_under_the_cache_home_else_under_home(monkeypatch, tmp_path):
    monkeypatch.setenv("LYCORIS_CACHE_DIR", str(tmp_path / "a"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    monkeypatch.setenv("HOME", str(tmp_path / "c"))
    assert binary_cache.folder() == tmp_path / "a"
    monkeypatch.delenv("LYCORIS_CACHE_DIR")
    assert binary_cache.folder() == tmp_path / "b" / "lycoris"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert binary_cache.folder() == tmp_path / "c" / ".cache" / "lycoris"


def test_a_folder_that_cannot_be_made_turns_the_cache_off(monkeypatch, tmp_path, compilations):
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("LYCORIS_CACHE_DIR", str(tmp_path / "file" / "cache"))
    assert binary_cache.folder() is None
    binary_cache.load_or_compile(KERNEL, CC)
    assert compilations() == 1


def test_a_failed_store_leaves_no_file(folder, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        binary_cache.load_or_compile(KERNEL, CC)
    assert not any(folder.iterdir())


def test_writers_at_the_same_time_leave_one_whole_file(folder):
    with ThreadPoolExecutor(8) as pool:
        found = set(pool.map(lambda _: binary_cache.load_or_compile(KERNEL, CC), range(32)))
    assert found == {KERNEL.compile(CC)}
    assert len(list(folder.iterdir())) == 1


OFFLINE = """
import sys
from kernels import binary_cache, target, warp

def kernel(x):
    x[warp.block_x()] = warp.warp_sum(x[warp.thread_index()])

if sys.argv[1] == "forbidden":
    def compile_function(kernel, cc):
        raise SystemExit("compiled though it was in the cache")
    target.compile_function = compile_function

assert not target.SIMULATOR
for cc in ((8, 0), (9, 0, "a")):
    example = target.Kernel(kernel, (target.f32p,), threads=32, key="example")
    binary = binary_cache.load_or_compile(example, cc)
    assert binary.cubin[:4] == b"\\x7fELF" and binary.entry.encode() in binary.cubin
    print(binary.entry, len(binary.cubin))
"""


def test_a_second_process_starts_without_compiling(folder, tmp_path):
    script = tmp_path / "offline.py"
    script.write_text(OFFLINE)
    environment = os.environ | {"NUMBA_ENABLE_CUDASIM": "0", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    printed = [
        subprocess.run(
            [sys.executable, script, word], env=environment, check=True, capture_output=True, text=True
        ).stdout
        for word in ("allowed", "forbidden")
    ]
    assert printed[0] == printed[1] != ""
    assert len(list(folder.iterdir())) == 2
