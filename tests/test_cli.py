"""The command as a whole: usage, errors, arguments, `inspect`, `info`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from safetensors.numpy import save_file

from lycoris import RefusedInput, __version__
from lycoris.cli import main
from lycoris.cli.arguments import AdapterType, DeviceType
from lycoris.cli.output import byte_count, counted, dimensions, printable
from plans.catalogue import catalogue

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
GOLDEN = Path(__file__).parent / "data" / "golden"


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def run_python(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)


def assert_refused(result: Result, *named: str) -> None:
    """Exit status 1, nothing on stdout, one `error:` line on stderr that says each of `named`."""
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit)
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert result.stderr.endswith("\n")
    for part in named:
        assert part in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["unknown"],
        ["merge"],
        ["merge", "base"],
        ["merge", "base", "adapter"],
        ["merge", "base", "--output", "out"],
        ["merge", "base", "adapter", "--output", "out", "--dtype", "bf17"],
        ["merge", "base", "adapter", "--output", "out", "--device", "cuda"],
        ["merge", "base", "adapter", "--output", "out", "--device", "cuda:-1"],
        ["merge", "base", "adapter", "--output", "out", "--device", "cpu"],
        ["merge", "base", "adapter", "--output", "out", "--unknown"],
        ["merge", "base", "adapter=loud", "--output", "out"],
        ["merge", "base", "adapter=", "--output", "out"],
        ["merge", "base", "", "--output", "out"],
        ["merge", "base", "=0.5", "--output", "out"],
        ["merge", "base", "adapter=nan", "--output", "out"],
        ["merge", "base", "adapter=-inf", "--output", "out"],
        ["merge", "base", "adapter=1e999", "--output", "out"],
        ["inspect"],
        ["inspect", "one", "two"],
        ["info", "extra"],
    ],
)
def test_wrong_usage_exits_with_2(arguments: list[str]):
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "Usage: " in result.stderr
    assert "Error: " in result.stderr


@pytest.mark.parametrize("arguments", [["--help"], ["merge", "-h"], ["inspect", "--help"], ["info", "--help"]])
def test_help(arguments: list[str]):
    result = invoke(*arguments)
    assert result.exit_code == 0
    assert result.stdout.startswith("Usage: ")


def test_every_way_to_start_is_the_same_command():
    script = Path(sys.executable).with_name("lycoris")
    for command in ([script], [sys.executable, "-m", "lycoris"]):
        done = subprocess.run([*command, "--version"], capture_output=True, text=True, cwd=ROOT, check=False)
        assert (done.returncode, done.stdout, done.stderr) == (0, f"lycoris {__version__}\n", "")


@pytest.mark.parametrize(
    "arguments", [["--help"], ["merge", "--help"], ["inspect", str(EXAMPLES / "lokr.safetensors")]]
)
def test_numba_stays_unloaded_without_need(arguments: list[str]):
    code = (
        "import sys; from lycoris.cli import main; main(sys.argv[1:], standalone_mode=False); "
        "sys.exit('numba' in sys.modules)"
    )
    done = run_python(code, *arguments)
    assert done.returncode == 0, done.stderr


def test_the_driver_is_woken_before_anything_large_is_loaded():
    done = run_python("import sys, lycoris.cli.merge; print(*sys.modules)")
    assert done.returncode == 0, done.stderr
    assert "click" in done.stdout.split()
    assert not {"numpy", "ml_dtypes", "rich", "numba", "safetensors"} & set(done.stdout.split())


def test_tables_are_drawn_only_where_somebody_reads_them(tmp_path: Path):
    code = (
        "import sys; from lycoris.cli import main; main(sys.argv[1:], standalone_mode=False); "
        "sys.exit('rich' in sys.modules)"
    )
    merge = ["merge", EXAMPLES / "tiny-unet", EXAMPLES / "lokr.safetensors", "--output", tmp_path / "out", "--dry-run"]
    assert run_python(code, *merge, "--json").returncode == 0
    assert run_python(code, *merge).returncode == 1


def test_what_a_merge_imports_is_no_garbage():
    code = "import gc; from lycoris.cli.merge import kept_imports\nwith kept_imports(): import email.mime\n"
    done = run_python(code + "print(gc.isenabled(), gc.get_freeze_count() > 1000)")
    assert (done.returncode, done.stdout) == (0, "True True\n"), done.stderr


def test_a_merge_loads_nothing_for_training():
    """Imports are a tenth of a second a family: a merge starts with the weight and cast plans alone."""
    code = "import sys, lycoris.merge; print(*(name for name in sys.modules if name.startswith(('lycoris', 'plans'))))"
    loaded = set(run_python(code).stdout.split())
    assert {"lycoris.merge", "plans.weight", "plans.cast"} <= loaded
    assert not loaded & {"lycoris.tensor", "lycoris.nn", "lycoris.optim", "plans.matmul", "plans.catalogue"}


@pytest.mark.parametrize(
    ("text", "path", "strength"),
    [
        ("a.safetensors", "a.safetensors", 1.0),
        ("a.safetensors=0.5", "a.safetensors", 0.5),
        ("a.safetensors=-2", "a.safetensors", -2.0),
        ("a.safetensors=0", "a.safetensors", 0.0),
        ("a.safetensors=1e-3", "a.safetensors", 1e-3),
        ("rank=8/a.safetensors=0.5", "rank=8/a.safetensors", 0.5),
    ],
)
def test_adapter_argument(text: str, path: str, strength: float):
    assert AdapterType().convert(text, None, None) == (Path(path), strength)


@pytest.mark.parametrize("name", ["rank=8", "a=b.safetensors", "lr=1e-4", "=", "x=nan"])
def test_adapter_argument_that_exists_is_a_path(name: str, tmp_path: Path):
    (tmp_path / name).touch()
    assert AdapterType().convert(str(tmp_path / name), None, None) == (tmp_path / name, 1.0)
    assert AdapterType().convert(f"{tmp_path / name}=0.25", None, None) == (tmp_path / name, 0.25)


@pytest.mark.parametrize("device", ["auto", "simulator", "cuda:0", "cuda:15"])
def test_device_argument(device: str):
    assert DeviceType().convert(device, None, None) == device


def test_printable_leaves_names_alone_and_escapes_the_rest():
    assert printable("größe/层.weight") == "größe/层.weight"
    assert printable("a\nb\x1b[31m\ud800") == "a\\nb\\x1b[31m\\ud800"


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (123_456_789, "123.5 MB"), (8 * 10**15, "8000 TB")]
)
def test_byte_count(count: int, text: str):
    assert byte_count(count) == text


def test_formatting_of_counts_and_shapes():
    assert counted({"lokr": 40, "locon": 9}) == "40 lokr, 9 locon"
    assert dimensions([1280, 640, 3, 3]) == "1280x640x3x3"
    assert dimensions([]) == "scalar"


def test_error_line_stays_one_line_whatever_the_file_is_called():
    assert_refused(invoke("inspect", "no\nsuch\x1b[31m.safetensors"), r"no\nsuch\x1b[31m.safetensors")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RefusedInput("x: found y, wanted z"), "x: found y, wanted z"),
        (PermissionError(13, "Permission denied", "secret"), "secret: Permission denied"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (OSError("odd"), "odd"),
        (KeyboardInterrupt(), "interrupted"),
    ],
)
def test_failures_are_one_line(error: BaseException, said: str, monkeypatch: pytest.MonkeyPatch):
    def fail(path: Path):
        raise error

    monkeypatch.setattr("lycoris.cli.inspect.describe", fail)
    assert_refused(invoke("inspect", "anything"), said)


def test_closed_pipe_ends_quietly():
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "lycoris", "inspect", EXAMPLES / "tiny-unet", "--json"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, cwd=ROOT, check=False)
    os.close(write)
    assert done.returncode == 1
    assert done.stderr == ""


@pytest.mark.parametrize("closed", ["stdout", "stderr"])
@pytest.mark.parametrize("command", ["inspect", "merge"])
def test_stream_closed_from_the_start_is_no_failure(command: str, closed: str, tmp_path: Path):
    options = {
        "inspect": [EXAMPLES / "tiny-unet"],
        "merge": [EXAMPLES / "tiny-unet", EXAMPLES / "lokr.safetensors", "--output", tmp_path / "out", "--dry-run"],
    }
    closing = {"stdout": ">&-", "stderr": "2>&-"}[closed]
    line = ["bash", "-c", f'"$@" {closing}', "-", sys.executable, "-m", "lycoris", command, *options[command]]
    done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr


def test_what_the_terminal_cannot_show_is_escaped(tmp_path: Path):
    path = tmp_path / "bäse.safetensors"
    save_file({"größe": np.ones(3, np.float16)}, path)
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "lycoris", "inspect"]
    shown = subprocess.run([*command, path], capture_output=True, text=True, cwd=ROOT, env=environment, check=True)
    assert "b\\xe4se.safetensors" in shown.stdout
    assert "gr\\xf6\\xdfe" in shown.stdout
    path.write_bytes(b"")
    refused = subprocess.run([*command, path], capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    assert refused.returncode == 1
    assert refused.stderr.startswith("error: ")
    assert "se.safetensors" in refused.stderr


def test_inspect_adapter_as_json():
    result = invoke("inspect", EXAMPLES / "locon.safetensors", "--json")
    assert result.exit_code == 0
    assert result.stderr == ""
    found = json.loads(result.stdout)
    assert found["kind"] == "adapter"
    assert found["format"] == "kohya"
    assert found["algorithms"] == {"locon": 23}
    assert len(found["modules"]) == 23
    (conv_in,) = [module for module in found["modules"] if module["name"] == "lora_unet_conv_in"]
    assert (conv_in["rank"], conv_in["delta_shape"]) == (4, [16, 4, 3, 3])


def test_inspect_adapter_table_has_a_row_for_each_module():
    result = invoke("inspect", EXAMPLES / "locon.safetensors")
    modules = json.loads(invoke("inspect", EXAMPLES / "locon.safetensors", "--json").stdout)["modules"]
    rows = {line.split()[0]: line.split() for line in result.stdout.splitlines() if line.startswith("lora_")}
    assert rows.keys() == {module["name"] for module in modules}
    assert rows["lora_unet_conv_in"] == ["lora_unet_conv_in", "locon", "4", "1", "0.25", "16x4x3x3", "BF16"]


@pytest.mark.parametrize("path", ["tiny-unet", "tiny-unet/diffusion_pytorch_model.safetensors"])
def test_inspect_checkpoint(path: str):
    found = json.loads(invoke("inspect", EXAMPLES / path, "--json").stdout)
    assert found["kind"] == "checkpoint"
    assert found["files"] == ["diffusion_pytorch_model.safetensors"]
    assert found["dtypes"] == {"BF16": 208}
    assert found["parameters"] == 142_292
    assert found["bytes"] == 2 * 142_292
    shapes = {tensor["name"]: tensor["shape"] for tensor in found["tensors"]}
    assert shapes["conv_in.weight"] == [16, 4, 3, 3]
    table = invoke("inspect", EXAMPLES / path).stdout
    assert "conv_in.weight" in table
    assert "16x4x3x3" in table


def test_inspect_tells_every_golden_adapter_from_its_base():
    cases = sorted(GOLDEN.glob("cases/*/case.json"))
    assert cases
    for path in cases:
        case = json.loads(path.read_text())
        for kind, name in [("checkpoint", case["base"]), *(("adapter", row["file"]) for row in case["adapters"])]:
            result = invoke("inspect", path.parent / name, "--json")
            assert result.exit_code == 0, result.stderr
            assert json.loads(result.stdout)["kind"] == kind
        table = invoke("inspect", path.parent / case["adapters"][0]["file"])
        assert table.exit_code == 0, table.stderr


def test_inspect_peft_folder():
    found = json.loads(invoke("inspect", GOLDEN / "cases" / "peft_lora", "--json").stdout)
    assert (found["kind"], found["format"], found["ranks"]) == ("adapter", "peft", [4])


def test_inspect_shards():
    for path in ("tiny-llama-sharded", "tiny-llama-sharded/model.safetensors.index.json"):
        found = json.loads(invoke("inspect", GOLDEN / "bases" / path, "--json").stdout)
        assert found["kind"] == "checkpoint"
        assert found["files"] == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
        assert {tensor["file"] for tensor in found["tensors"]} == set(found["files"])
    assert "2 shards" in invoke("inspect", GOLDEN / "bases" / "tiny-llama-sharded").stdout


def test_inspect_checkpoint_of_scalars_and_empty_tensors(tmp_path: Path):
    tensors = {"scale": np.array(3, np.float32), "empty.weight": np.zeros((0, 7), np.float16)}
    save_file(tensors, tmp_path / "odd.safetensors")
    result = invoke("inspect", tmp_path / "odd.safetensors")
    assert result.exit_code == 0
    rows = [line.split() for line in result.stdout.splitlines()]
    assert ["scale", "scalar", "F32"] in rows
    assert ["empty.weight", "0x7", "F16"] in rows


def test_inspect_names_an_algorithm_that_is_not_supported(tmp_path: Path):
    save_file({"lora_unet_conv_in.oft_blocks": np.zeros((2, 4, 4), np.float32)}, tmp_path / "oft.safetensors")
    assert_refused(invoke("inspect", tmp_path / "oft.safetensors"), "oft.safetensors", "diag-oft")


def test_inspect_does_not_cut_names_in_a_pipe(tmp_path: Path):
    name = "block." * 60 + "weight"
    save_file({name: np.zeros(1, np.float32)}, tmp_path / "deep.safetensors")
    assert name in invoke("inspect", tmp_path / "deep.safetensors").stdout


def test_info_names_the_device_and_every_plan():
    result = invoke("info")
    assert result.exit_code == 0, result.stderr
    for name in ("device", "driver", "numba-cuda", "numpy"):
        assert any(line.startswith(name) for line in result.stdout.splitlines())
    examples = catalogue()
    assert examples
    for family, _, sku in examples:
        assert family in result.stdout
        assert str(sku) in result.stdout


@pytest.mark.parametrize(
    "arguments", [("", "a", "--output", "o"), ("b", "a", "--output", ""), ("b", "", "--output", "o")]
)
def test_empty_paths_are_wrong_usage(arguments):
    result = invoke("merge", *arguments)
    assert result.exit_code == 2
    assert "is empty; give" in result.stderr


def test_an_output_with_a_slash_names_a_folder(tmp_path: Path):
    base = EXAMPLES / "tiny-unet" / "diffusion_pytorch_model.safetensors"
    result = invoke("merge", base, EXAMPLES / "lokr.safetensors", "--output", f"{tmp_path}/merged/")
    assert_refused(result, "merged/: names a folder, but the base is a single file")
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_given_as_an_adapter():
    base = EXAMPLES / "tiny-unet"
    result = invoke("merge", base, base, "--output", "nowhere", "--dry-run")
    assert_refused(result, "holds whole weights (conv_in.bias, conv_in.weight", "give the adapter's own file")
