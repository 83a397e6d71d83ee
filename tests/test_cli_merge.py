"""`lycoris merge`: what it writes, what it says, and what it refuses, down to the exit status."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from safetensors.numpy import load_file, save_file

from lycoris.cli import main

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
TARGET = "down.0.to_q"
STEM = "lora_unet_down_0_to_q"


class Workplace:
    """A folder with a good base (fp16) and a good adapter (LoCon, rank 2) for a test to break, and a free output."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.base, self.adapter, self.output = (
            folder / name for name in ("base.safetensors", "adapter.safetensors", "merged.safetensors")
        )
        rng = np.random.default_rng(7)
        names = [f"down.0.{name}.weight" for name in ("to_q", "to_k", "to_v", "to_out")]
        self.weights = {name: rng.normal(size=(8, 6)).astype(np.float16) for name in names}
        self.factors = {
            f"{STEM}.lora_up.weight": rng.normal(size=(8, 2)).astype(np.float16),
            f"{STEM}.lora_down.weight": rng.normal(size=(2, 6)).astype(np.float16),
            f"{STEM}.alpha": np.array(1, np.float16),
        }
        save_file(self.weights, self.base)
        save_file(self.factors, self.adapter)

    def save_adapter(self, changes: dict[str, np.ndarray | None]) -> None:
        """Write the adapter anew: arrays replace factors or join them, None takes one out."""
        factors = {**self.factors, **changes}
        save_file({name: array for name, array in factors.items() if array is not None}, self.adapter)

    def merge(self, *options: object) -> Result:
        return self.run(self.base, self.adapter, "--output", self.output, *options)

    def run(self, *arguments: object) -> Result:
        return CliRunner().invoke(main, ["merge", *map(str, arguments)])

    def snapshot(self) -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in self.folder.rglob("*") if path.is_file()}

    def expected(self, strength: float = 1.0) -> np.ndarray:
        """The merged weight: float64, rounded once."""
        up, down = (self.factors[f"{STEM}.lora_{name}.weight"].astype(np.float64) for name in ("up", "down"))
        return (self.weights[f"{TARGET}.weight"] + strength * 0.5 * (up @ down)).astype(np.float16)


@pytest.fixture
def work(tmp_path: Path) -> Workplace:
    return Workplace(tmp_path)


def header(fields: object, data: bytes = b"") -> bytes:
    """A safetensors file with any JSON for a header."""
    raw = fields if isinstance(fields, bytes) else json.dumps(fields).encode()
    return len(raw).to_bytes(8, "little") + raw + data


def tensor(begin: int, end: int, dtype: str = "F16") -> dict[str, object]:
    return {"dtype": dtype, "shape": [(end - begin) // 2], "data_offsets": [begin, end]}


FAULTY_FILES: dict[str, bytes] = {
    "no bytes": b"",
    "text": b"this is a README, not a checkpoint",
    "header longer than the file": (1 << 20).to_bytes(8, "little") + b"{}",
    "header over 100 MB": (100_000_001).to_bytes(8, "little") + b"{}",
    "header that is no JSON": header(b"{not json"),
    "header that is a list": header([]),
    "truncated data": header({"a": tensor(0, 8)}, b"\0" * 6),
    "bytes after the data": header({"a": tensor(0, 8)}, b"\0" * 10),
    "overlapping offsets": header({"a": tensor(0, 8), "b": tensor(4, 12)}, b"\0" * 12),
    "offsets out of range": header({"a": tensor(0, 8), "b": tensor(8, 1 << 40)}, b"\0" * 16),
    "offsets backwards": header({"a": {"dtype": "F16", "shape": [4], "data_offsets": [8, 0]}}, b"\0" * 8),
    "unknown dtype": header({"a": tensor(0, 8, "BF17")}, b"\0" * 8),
    "duplicate names": header(
        b'{"a":{"dtype":"F16","shape":[1],"data_offsets":[0,2]},"a":{"dtype":"F16","shape":[1],"data_offsets":[2,4]}}',
        b"\0" * 4,
    ),
}


def assert_refused(result: Result, *named: object) -> None:
    """Exit status 1, nothing on stdout, and one `error:` line on stderr that says each of `named`."""
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    for part in named:
        assert str(part) in result.stderr


def test_merge_writes_the_exact_result_and_a_table(work: Workplace):
    before = work.snapshot()
    result = work.merge()
    assert result.exit_code == 0, result.stderr
    merged = load_file(work.output)
    np.testing.assert_array_equal(merged.pop(f"{TARGET}.weight"), work.expected())
    for name, array in merged.items():
        np.testing.assert_array_equal(array, work.weights[name])
    assert work.snapshot() == {**before, work.output: work.output.read_bytes()}
    rows = {line.split("  ")[0].strip(): line for line in result.stdout.splitlines()}
    assert "1 locon" in rows["modules"]
    assert "2 in 1" in rows["ranks"]
    assert "1 of 4" in rows["tensors changed"]
    assert " s" in rows["written"]
    assert "GB/s" in rows["written"]
    assert str(work.output) in rows["output"]


def test_json_is_one_object_and_all_that_stdout_gets(work: Workplace):
    result = work.merge("--json")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["modules"] == {"locon": 1}
    assert report["ranks"] == {"2": 1}
    assert (report["tensors"], report["tensors_changed"]) == (4, 1)
    assert report["unmatched"] == {}
    assert report["bytes_written"] == sum(array.nbytes for array in work.weights.values())
    assert report["output"] == str(work.output)
    assert report["dry_run"] is False


def test_remark_says_once_that_the_simulator_does_the_work(work: Workplace, device):
    remarks = work.merge().stderr.splitlines()
    assert len(remarks) == (1 if device.is_simulator else 0)
    assert all("simulator" in line for line in remarks)


@pytest.mark.parametrize("strength", [0.0, 1.0, 0.75, -2.0])
def test_strength_scales_the_change(strength: float, work: Workplace):
    result = work.run(work.base, f"{work.adapter}={strength}", "--output", work.output)
    assert result.exit_code == 0, result.stderr
    np.testing.assert_array_equal(load_file(work.output)[f"{TARGET}.weight"], work.expected(strength))


def test_adapters_add_up(work: Workplace):
    halves = f"{work.adapter}=0.5"
    result = work.run(work.base, halves, halves, "--output", work.output)
    assert result.exit_code == 0, result.stderr
    np.testing.assert_array_equal(load_file(work.output)[f"{TARGET}.weight"], work.expected())


@pytest.mark.parametrize(("option", "dtype"), [("fp16", np.float16), ("fp32", np.float32), ("keep", np.float16)])
def test_dtype(option: str, dtype: type, work: Workplace):
    assert work.merge("--dtype", option).exit_code == 0
    assert load_file(work.output)[f"{TARGET}.weight"].dtype == dtype


def test_dry_run_reports_and_writes_nothing(work: Workplace):
    before = work.snapshot()
    result = work.merge("--dry-run")
    assert result.exit_code == 0, result.stderr
    assert "nothing (dry run)" in result.stdout
    assert json.loads(work.merge("--dry-run", "--json").stdout)["dry_run"] is True
    assert work.snapshot() == before


@pytest.mark.parametrize("options", [(), ("--no-sync",)])
def test_sync_waits_for_the_disk_before_the_output_has_its_name(options: tuple[str, ...], work: Workplace, monkeypatch):
    there, fsync = [], os.fsync

    def noted(descriptor: int) -> None:
        there.append(work.output.exists())
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    result = work.merge(*options)
    assert result.exit_code == 0, result.stderr
    assert there == ([] if options else [False, True]), "the file, then the folder that its name is in"
    np.testing.assert_array_equal(load_file(work.output)[f"{TARGET}.weight"], work.expected())


def test_folder_for_a_folder(work: Workplace):
    output = work.folder / "merged"
    result = work.run(EXAMPLES / "tiny-unet", EXAMPLES / "lokr.safetensors", "--output", output, "--json")
    assert result.exit_code == 0, result.stderr
    assert sorted(path.name for path in output.iterdir()) == sorted(
        path.name for path in (EXAMPLES / "tiny-unet").iterdir()
    )
    assert (output / "config.json").read_bytes() == (EXAMPLES / "tiny-unet" / "config.json").read_bytes()
    assert json.loads(result.stdout)["tensors_changed"] == 23


def test_output_that_exists_needs_overwrite(work: Workplace):
    work.output.write_bytes(b"precious")
    assert_refused(work.merge(), work.output, "--overwrite")
    assert work.output.read_bytes() == b"precious"
    assert work.merge("--overwrite").exit_code == 0
    np.testing.assert_array_equal(load_file(work.output)[f"{TARGET}.weight"], work.expected())


@pytest.mark.parametrize("which", ["base", "adapter"])
@pytest.mark.parametrize("option", [[], ["--overwrite"]])
def test_output_must_not_be_an_input(which: str, option: list[str], work: Workplace):
    before = work.snapshot()
    assert_refused(work.run(work.base, work.adapter, "--output", getattr(work, which), *option), getattr(work, which))
    assert work.snapshot() == before


@pytest.mark.parametrize("which", ["base", "adapter"])
@pytest.mark.parametrize("fault", FAULTY_FILES)
def test_faulty_files_are_refused_by_name(fault: str, which: str, work: Workplace):
    path: Path = getattr(work, which)
    path.write_bytes(FAULTY_FILES[fault])
    before = work.snapshot()
    assert_refused(work.merge(), path)
    assert work.snapshot() == before


@pytest.mark.parametrize("which", ["base", "adapter"])
def test_missing_files_and_empty_folders_are_refused_by_name(which: str, work: Workplace):
    path: Path = getattr(work, which)
    path.unlink()
    assert_refused(work.merge(), path, "no such file")
    path.mkdir()
    assert_refused(work.merge(), path)
    assert not work.output.exists()


def test_output_folder_that_is_missing_is_refused(work: Workplace):
    work.output = work.folder / "missing" / "merged.safetensors"
    before = work.snapshot()
    assert_refused(work.merge(), work.folder / "missing")
    assert work.snapshot() == before


def test_output_below_a_file_is_refused(work: Workplace):
    work.output = work.adapter / "merged.safetensors"
    before = work.snapshot()
    assert_refused(work.merge(), work.adapter)
    assert work.snapshot() == before


Factors = dict[str, np.ndarray | None]
UP, DOWN, ALPHA = f"{STEM}.lora_up.weight", f"{STEM}.lora_down.weight", f"{STEM}.alpha"


def filled(shape: tuple[int, ...], value: float = 1.0) -> np.ndarray:
    return np.full(shape, value, np.float16)


def other(*stems: str) -> Factors:
    """The same LoCon for other modules."""
    factors = {"lora_up.weight": filled((8, 2)), "lora_down.weight": filled((2, 6))}
    return {f"{stem}.{name}": array for stem in stems for name, array in factors.items()}


FAULTY_ADAPTERS: dict[str, tuple[Factors, list[str]]] = {
    "matches nothing": (
        {UP: None, DOWN: None, ALPHA: None, **other("lora_unet_x", "lora_unet_y", "lora_unet_z")},
        ["lora_unet_x", "lora_unet_y", "lora_unet_z", "down.0.to_k", "down.0.to_out", "down.0.to_q"],
    ),
    "matches in part": (other("lora_unet_x", "lora_unet_y"), ["2", "lora_unet_x", "lora_unet_y", "--allow-unmatched"]),
    "wrong outputs": ({UP: filled((9, 2))}, [STEM, "[9, 6]", "[8, 6]"]),
    "wrong inputs": ({DOWN: filled((2, 7))}, [STEM, "[8, 7]", "[8, 6]"]),
    "ranks that differ": ({DOWN: filled((3, 6))}, [STEM, "lora_up.weight", "lora_down.weight"]),
    "rank 0": ({UP: filled((8, 0)), DOWN: filled((0, 6))}, [STEM, "rank 0"]),
    "missing half": ({DOWN: None}, [STEM, "lora_down.weight is missing"]),
    "two algorithms": ({f"{STEM}.diff": filled((8, 6))}, [STEM, "locon", "full"]),
    "an algorithm that is not supported": ({f"{STEM}.oft_blocks": filled((2, 4, 4))}, ["diag-oft"]),
    "a key of no adapter": ({f"{STEM}.surprise": filled((1,))}, [f"{STEM}.surprise"]),
    "NaN in a factor": ({UP: filled((8, 2), np.nan)}, [STEM, UP]),
    "infinity in a factor": ({DOWN: filled((2, 6), -np.inf)}, [STEM, DOWN]),
    "NaN for an alpha": ({ALPHA: filled((), np.nan)}, [ALPHA]),
    "a result beyond the base's dtype": ({UP: filled((8, 2), 6e4), DOWN: filled((2, 6), 6e4)}, [TARGET]),
}


@pytest.mark.parametrize("fault", FAULTY_ADAPTERS)
def test_faulty_adapters_are_refused_by_module(fault: str, work: Workplace):
    changes, named = FAULTY_ADAPTERS[fault]
    work.save_adapter(changes)
    before = work.snapshot()
    assert_refused(work.merge(), *named)
    assert work.snapshot() == before


@pytest.mark.parametrize("alpha", [None, 0.0])
def test_alpha_missing_or_zero_is_read_as_lycoris_does(alpha: float | None, work: Workplace):
    work.save_adapter({ALPHA: None if alpha is None else filled((), alpha)})
    assert work.merge().exit_code == 0
    np.testing.assert_array_equal(load_file(work.output)[f"{TARGET}.weight"], work.expected(2.0))


def test_component_that_the_base_lacks_is_left_out_and_counted(work: Workplace):
    work.save_adapter(other("lora_te_layers_0_q", "lora_te_layers_1_q"))
    result = work.merge("--json")
    assert result.exit_code == 0, result.stderr
    assert sum(json.loads(result.stdout)["unmatched"].values()) == 2
    np.testing.assert_array_equal(load_file(work.output)[f"{TARGET}.weight"], work.expected())
    rows = {line.split("  ")[0].strip(): line for line in work.merge("--overwrite").stdout.splitlines()}
    assert "2 " in rows["left out"]


def test_allow_unmatched_merges_the_rest_and_says_so(work: Workplace):
    work.save_adapter(other("lora_unet_x"))
    result = work.merge("--allow-unmatched", "--json")
    assert result.exit_code == 0, result.stderr
    assert sum(json.loads(result.stdout)["unmatched"].values()) == 1
    np.testing.assert_array_equal(load_file(work.output)[f"{TARGET}.weight"], work.expected())


def test_device_that_is_not_there_is_refused(work: Workplace):
    assert_refused(work.merge("--device", "cuda:99"), "cuda:99")
    assert not work.output.exists()


def run_merge(
    work: Workplace, *options: str, before: str = "", setup: Callable[[], None] | None = None
) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, after the statements `before`."""
    code = f"{before}\nfrom lycoris.cli import main\nmain(prog_name='lycoris')"
    command = [sys.executable, "-c", code, "merge", work.base, work.adapter, "--output", work.output, *options]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False, preexec_fn=setup)


def test_simulator_can_be_asked_for(work: Workplace):
    done = run_merge(work, "--device", "simulator", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert "simulator" in json.loads(done.stdout)["device"]
    np.testing.assert_array_equal(load_file(work.output)[f"{TARGET}.weight"], work.expected())


@pytest.mark.parametrize("signal_name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_signal_in_the_middle_leaves_nothing_behind(signal_name: str, work: Workplace):
    signalled = f"""
import contextlib, os, signal
import lycoris.cli.merge as command

@contextlib.contextmanager
def progress_bar():
    yield lambda done, total: os.kill(os.getpid(), signal.{signal_name})

command.progress_bar = progress_bar
"""
    before = work.snapshot()
    done = run_merge(work, before=signalled)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ")
    assert work.snapshot() == before


def test_output_that_does_not_fit_leaves_nothing_behind(work: Workplace):
    limit = 4 << 20  # bytes a file may have: compiled kernels fit, the output does not
    save_file({**work.weights, "large.weight": np.zeros(limit, np.float16)}, work.base)
    before = work.snapshot()
    done = run_merge(work, setup=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"error: {work.output}")
    assert work.snapshot() == before


def test_progress_is_drawn_on_a_terminal_and_nowhere_else(work: Workplace):
    command = [sys.executable, "-m", "lycoris", "merge", work.base, work.adapter, "--output", work.output]
    piped = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert "\x1b" not in piped.stdout + piped.stderr
    reader, terminal = os.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    subprocess.run(
        [*command, "--overwrite"], stdout=subprocess.DEVNULL, stderr=terminal, cwd=ROOT, env=environment, check=True
    )
    os.close(terminal)
    drawn = b""
    with contextlib.suppress(OSError):  # so Linux ends a terminal whose other end is closed
        while chunk := os.read(reader, 4096):
            drawn += chunk
    os.close(reader)
    assert "━".encode() in drawn
