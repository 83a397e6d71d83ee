"""Every kernel compiles for sm_80 and sm_90a without a GPU, to machine code without spills or 64-bit arithmetic."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import compile_kernels
import pytest

from kernels.target import Kernel

ROOT = Path(__file__).parent.parent


def factories() -> Iterator[str]:
    """module.function of every kernel factory, read from the sources: here Numba may be the simulator."""
    for package in ("kernels", "plans"):
        for path in sorted((ROOT / package).rglob("*.py")):
            module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            for node in ast.walk(ast.parse(path.read_text())):
                decorators = getattr(node, "decorator_list", ())
                if any(ast.unparse(decorator).startswith("kernel_factory(") for decorator in decorators):
                    yield f"{module}.{node.name}"


def compile_in_a_process(*arguments: str) -> tuple[int, str]:
    """Exit status and output of the script."""
    command = [sys.executable, str(ROOT / "tests" / "compile_kernels.py"), *arguments]
    done = subprocess.run(command, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return done.returncode, done.stdout


@pytest.mark.machine_code
@pytest.mark.parametrize("factory", list(factories()))
def test_machine_code(factory):
    status, output = compile_in_a_process(factory)
    print(output)
    assert status == 0, "\n".join(line for line in output.splitlines() if not line.startswith("sm_"))


def test_all_modules_import_and_all_factories_are_checked():
    status, output = compile_in_a_process("--list")
    assert status == 0, output
    assert sorted(output.split()) == sorted(factories())
    assert {*compile_kernels.EXCEPTIONS, *compile_kernels.EXPECTED} <= {*factories()}


FAULTY = """
import numpy as np
from kernels import warp
from kernels.target import cuda, f32, f32p, i64, i64p, kernel_factory

def spills(x, n, m):
    buffer = cuda.local.array(40, np.int64)
    for i in range(n):
        buffer[i] = m * i
    x[warp.block_x()] = buffer[m]

def divides(x, n, m):
    x[warp.block_x()] = n // m

def remainders(x, n, m):
    x[warp.block_x()] = np.int64(np.uint64(n) % np.uint64(m))

def doubles(x, n, m):
    x[warp.block_x()] = np.int64(np.float32(n) * 2.5)

def clean(x, n, m):
    x[warp.block_x()] = np.int64(np.float32(n) / np.float32(m))

@kernel_factory(("spills",), ("divides",), ("remainders",), ("doubles",), ("clean",))
def make(name):
    return globals()[name], (i64p, i64, i64), {"threads": 64, "architectures": (9, 0, "a")}
"""


def test_faults_in_the_machine_code_are_found(monkeypatch, tmp_path):
    (tmp_path / "faulty.py").write_text(FAULTY)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
    status, output = compile_in_a_process("faulty.make")
    lines = output.splitlines()
    assert status == 1
    assert [line.split()[0] for line in lines] == ["sm_90a"] * 5 + ["FAULT"] * 4
    assert [re.sub(r"\d+x", "Nx", line) for line in lines[5:]] == [
        "FAULT sm_90a faulty.make('spills',): local memory, Nx",
        "FAULT sm_90a faulty.make('divides',): 64-bit division, Nx",
        "FAULT sm_90a faulty.make('remainders',): 64-bit division, Nx",
        "FAULT sm_90a faulty.make('doubles',): fp64 arithmetic, Nx",
    ]


@pytest.mark.parametrize(
    ("options", "code", "log", "fault"),
    [
        ({}, {}, "INFO: created", None),
        ({}, {}, "ptxas warning : C7510 serialized", "the linker says: ptxas warning : C7510 serialized"),
        ({"threads": 128}, {}, "", "compiled for 256 threads, launched with 128"),
        ({"min_blocks": 3}, {}, "", "88 registers do not fit 3 blocks of 256 threads"),
        ({"min_blocks": 2, "shared_bytes": 80 << 10}, {}, "", "172032 bytes of shared memory for 2 blocks"),
        ({}, {"static_shared": 164 << 10}, "", "167936 bytes of shared memory for 1 blocks"),
        ({}, {"serialized": True}, "", "ptxas makes every wgmma wait"),
    ],
)
def test_kernels_that_could_not_run_as_declared_are_found(options, code, log, fault):
    kernel = Kernel(print, (), key="example", **{"threads": 256, **options})
    numbers = {"registers": 88, "max_threads": 256, "static_shared": 4 << 10, "serialized": False, **code}
    found = list(compile_kernels.limits_exceeded(kernel, (8, 0), SimpleNamespace(**numbers), log))
    assert len(found) == (fault is not None)
    assert all(line.startswith(fault) for line in found)


def test_rows_that_nothing_needs_are_found(monkeypatch, capsys):
    def factory():
        raise AssertionError("it has no examples")

    factory.examples = ()
    name = compile_kernels.name_of(factory)
    monkeypatch.setitem(compile_kernels.EXCEPTIONS, name, {"64-bit division": "once there was a reason"})
    monkeypatch.setitem(compile_kernels.EXPECTED, name, (("low_rank", "HMMA"),))
    assert compile_kernels.check_factory(factory) == 3
    assert [line.partition(name)[2] for line in capsys.readouterr().out.splitlines()] == [
        ": no examples to compile",
        ": nothing needs the row '64-bit division', drop it",
        ": nothing needs the row ('low_rank', 'HMMA'), drop it",
    ]
