"""What a merge refuses, case by case: the error names what was found, nothing is written, inputs stay."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from crafted import module
from merging import run, write
from safetensors_files import BAD_FILES, BAD_PATHS, snapshot

from lycoris.errors import MergeFailed, RefusedInput
from lycoris.merge import AdapterInput, MergeOptions, merge
from lycoris.merge import estimate as merge_estimate

BF16 = ml_dtypes.bfloat16
ONES = np.ones((4, 6), BF16)


def base_file(folder: Path, **tensors: np.ndarray) -> Path:
    return write(folder / "base.safetensors", {"a.b.weight": ONES, "a.c.weight": ONES, **tensors})


def adapter_file(folder: Path, *names: str, name: str = "adapter", **extra) -> Path:
    tensors = {key: value for stem in names or ("lora_unet_a_b",) for key, value in module(stem, **extra).items()}
    return write(folder / f"{name}.safetensors", tensors)


def changed(folder: Path, key: str, change: Callable[[np.ndarray], np.ndarray], **options) -> Path:
    """An adapter for a.b with one of its tensors changed."""
    tensors = module("lora_unet_a_b", **options)
    return write(folder / "adapter.safetensors", {n: change(v) if n.endswith(key) else v for n, v in tensors.items()})


def refused(base: Path, *adapters, words: tuple[str, ...], error: type[Exception] = RefusedInput, **options) -> None:
    """The merge raises `error`, in one line that has `words`, and leaves the folder as it was."""
    folder = base.parent
    options.setdefault("output", folder / "merged.safetensors")
    before = snapshot(folder)
    with pytest.raises(error) as caught:
        run(base, *adapters, **options)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message
    assert snapshot(folder) == before


@pytest.mark.parametrize("fault", BAD_FILES)
def test_bad_files(fault, tmp_path):
    content, words = BAD_FILES[fault]
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(content)
    refused(bad, adapter_file(tmp_path), words=("bad.safetensors", words))
    refused(base_file(tmp_path), bad, words=("bad.safetensors", words))


@pytest.mark.parametrize("fault", [fault for fault in BAD_PATHS if fault == "missing"])
def test_missing_files(fault, tmp_path):
    words = BAD_PATHS[fault][1]
    refused(tmp_path / "bad.safetensors", adapter_file(tmp_path), words=("bad.safetensors", words))
    refused(base_file(tmp_path), tmp_path / "bad.safetensors", words=("bad.safetensors", words))


def test_folder_without_a_checkpoint(tmp_path):
    (tmp_path / "folder").mkdir()
    refused(tmp_path / "folder", adapter_file(tmp_path), words=("folder", "no checkpoint"), output=tmp_path / "out")


def test_adapter_that_matches_nothing(tmp_path):
    names = [f"lora_unet_x_{i}" for i in range(5)]
    words = (*names[:3], "a.b.weight", "a.c.weight")
    refused(base_file(tmp_path), adapter_file(tmp_path, *names), words=words, allow_unmatched=True)


def test_names_that_match_nothing(tmp_path):
    adapter = adapter_file(tmp_path, "lora_unet_a_b", "lora_unet_a_x", "lora_unet_a_y")
    refused(base_file(tmp_path), adapter, words=("2 of its 3", "lora_unet_a_x", "--allow-unmatched"))


def test_shapes_that_do_not_make_the_base(tmp_path):
    base = base_file(tmp_path, **{"a.d.weight": np.ones((4, 5), BF16)})
    refused(base, adapter_file(tmp_path, "lora_unet_a_d"), words=("lora_unet_a_d", "[4, 6]", "[4, 5]"))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, BF16])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dry_run", [False, True])
def test_factor_that_is_not_finite(value, dtype, dry_run, tmp_path):
    def spoil(factor: np.ndarray) -> np.ndarray:
        factor = factor.astype(dtype)
        factor.reshape(-1)[-1] = value
        return factor

    adapter = changed(tmp_path, "lora_down.weight", spoil)
    words = ("adapter.safetensors", "lora_unet_a_b", "lora_down.weight", "NaN or infinity")
    refused(base_file(tmp_path), adapter, words=words, dry_run=dry_run)


@pytest.mark.parametrize("key", ["dora_scale", "diff_b"])
def test_magnitude_or_bias_that_is_not_finite(key, tmp_path):
    extra = {"dora_scale": np.ones((4, 1)), "diff_b": np.ones(4)}
    extra[key][0] = np.nan
    adapter = adapter_file(tmp_path, **extra)
    refused(base_file(tmp_path, **{"a.b.bias": np.ones(4, BF16)}), adapter, words=("lora_unet_a_b", key))


def test_idle_factor_that_is_not_finite(tmp_path):
    adapter = changed(tmp_path, "lora_down.weight", lambda factor: factor * np.nan)
    refused(base_file(tmp_path), (adapter, 0.0), words=("lora_unet_a_b", "lora_down.weight"))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, BF16])
def test_result_that_is_not_finite(dtype, tmp_path):
    base = base_file(tmp_path, **{"a.b.weight": ONES.astype(dtype)})
    refused(base, (adapter_file(tmp_path), 3e38), words=("lora_unet_a_b", "a.b.weight", "not finite"))


def test_result_beyond_the_new_type(tmp_path):
    base = base_file(tmp_path, **{"a.b.weight": np.full((4, 6), 1e30, np.float32)})
    refused(base, adapter_file(tmp_path), words=("a.b.weight", "float16"), dtype="fp16")


@pytest.mark.parametrize(
    ("value", "kind", "dtype"),
    [(65520, np.float32, "fp16"), (-1e30, np.float32, "fp16"), (65536, BF16, "fp16"), (3.4e38, np.float32, "bf16")],
)
def test_unchanged_value_beyond_the_new_type(value, kind, dtype, tmp_path):
    other = np.array([0, value, np.inf], np.float32).astype(kind)
    base = base_file(tmp_path, other=other)
    refused(base, adapter_file(tmp_path), words=("base.safetensors", "'other'", dtype[-2:]), dtype=dtype)


@pytest.mark.parametrize("kind", [ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, np.int8, np.float64])
def test_base_of_a_type_that_is_not_merged(kind, tmp_path):
    base = base_file(tmp_path, **{"a.b.weight": np.ones((4, 6), kind)})
    refused(base, adapter_file(tmp_path), words=("lora_unet_a_b", "a.b.weight", "BF16"))


@pytest.mark.parametrize(
    ("missing", "words"),
    [("lora_down.weight", "lora_down.weight is missing"), ("lora_up.weight", "lora_up.weight is missing")],
)
def test_missing_half_of_a_pair(missing, words, tmp_path):
    tensors = {key: value for key, value in module("lora_unet_a_b").items() if not key.endswith(missing)}
    refused(base_file(tmp_path), write(tmp_path / "a.safetensors", tensors), words=("lora_unet_a_b", words))


def test_two_algorithms_on_one_module(tmp_path):
    tensors = module("lora_unet_a_b") | module("lora_unet_a_b", "lokr")
    words = ("lora_unet_a_b", "two algorithms", "locon", "lokr")
    refused(base_file(tmp_path), write(tmp_path / "a.safetensors", tensors), words=words)


def test_rank_0(tmp_path):
    tensors = {"lora_unet_a_b.lora_up.weight": np.ones((4, 0)), "lora_unet_a_b.lora_down.weight": np.ones((0, 6))}
    adapter = write(tmp_path / "a.safetensors", {key: value.astype(np.float32) for key, value in tensors.items()})
    refused(base_file(tmp_path), adapter, words=("lora_unet_a_b", "rank 0"))


def test_dora_with_another_adapter(tmp_path):
    one, two = adapter_file(tmp_path, name="one"), adapter_file(tmp_path, dora_scale=np.ones((4, 1)), name="two")
    for order in ((one, two), (two, one), (two, two)):
        refused(base_file(tmp_path), *order, words=(order[0].name, order[1].name, "a.b.weight", "DoRA"))


def test_weight_read_in_both_directions(tmp_path):
    base = write(tmp_path / "base.safetensors", {"emb.weight": np.ones((6, 6), BF16)})
    embedding = {
        "emb.lora_embedding_B": np.ones((6, 2)),
        "emb.lora_embedding_A": np.ones((2, 6)),
        "emb.alpha": np.ones(()),
    }
    linear = {"emb.lora_B.weight": np.ones((6, 2)), "emb.lora_A.weight": np.ones((2, 6)), "emb.alpha": np.ones(1)}
    files = [
        write(tmp_path / f"{name}.safetensors", {key: value.astype(np.float32) for key, value in tensors.items()})
        for name, tensors in (("one", embedding), ("two", linear))
    ]
    refused(base, *files, words=("one.safetensors", "two.safetensors", "[in, out]"))


def test_output_exists(tmp_path):
    base, adapter = base_file(tmp_path), adapter_file(tmp_path)
    (tmp_path / "merged.safetensors").write_bytes(b"mine")
    refused(base, adapter, words=("merged.safetensors", "exists"))


@pytest.mark.parametrize("dry_run", [False, True])
@pytest.mark.parametrize("which", ["base", "adapter", "link"])
def test_output_is_an_input(which, dry_run, tmp_path):
    base, adapter = base_file(tmp_path), adapter_file(tmp_path)
    link = tmp_path / "link.safetensors"
    link.symlink_to(base)
    output = {"base": base, "adapter": adapter, "link": link}[which]
    refused(base, adapter, words=(output.name, "input"), output=output, overwrite=True, dry_run=dry_run)


def test_output_folder_is_missing(tmp_path):
    base, adapter = base_file(tmp_path), adapter_file(tmp_path)
    refused(base, adapter, words=("nowhere",), output=tmp_path / "nowhere" / "merged.safetensors")


def test_disk_full(tmp_path, monkeypatch):
    def full(*arguments: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    base, adapter = base_file(tmp_path), adapter_file(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        refused(base, adapter, words=("merged.safetensors", "No space left"), error=MergeFailed)


def test_adapter_cut_while_it_is_read(tmp_path, monkeypatch):
    """Its header was read; then someone saves it again."""
    base, adapter = base_file(tmp_path), adapter_file(tmp_path)
    other = adapter_file(tmp_path, "lora_unet_a_b", "lora_unet_a_c", name="other").read_bytes()

    def replace(done: int, total: int) -> None:
        adapter.write_bytes(other)

    with pytest.raises(MergeFailed, match=r"adapter\.safetensors.*(changed|cut short)"):
        run(base, adapter, output=tmp_path / "merged.safetensors", progress=replace)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "adapter.safetensors",
        "base.safetensors",
        "other.safetensors",
    ]


def sparse_file(path: Path, name: str, count: int) -> Path:
    """One bf16 tensor of zeros that take no disk space."""
    header = json.dumps({name: {"dtype": "BF16", "shape": [count], "data_offsets": [0, 2 * count]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(path, 8 + len(header) + 2 * count)
    return path


MERGE = """
import sys
from pathlib import Path
from lycoris.errors import RefusedInput
from lycoris.merge import AdapterInput, MergeOptions, merge

folder = Path(sys.argv[1])
adapter = AdapterInput(folder / "adapter.safetensors")
for dry_run in (False, True):
    try:
        merge(MergeOptions(folder / "base.safetensors", (adapter,), folder / "merged.safetensors", dry_run=dry_run))
    except RefusedInput as error:
        print(error)
"""


def test_too_large_for_the_simulator(tmp_path):
    count = 1 << 26
    sparse_file(tmp_path / "base.safetensors", "a.weight", count)
    sparse_file(tmp_path / "adapter.safetensors", "lora_unet_a.w_norm", count)
    environment = os.environ | {
        "NUMBA_ENABLE_CUDASIM": "1",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path]),
    }
    command = [sys.executable, "-c", MERGE, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=True, timeout=100)
    wet, dry = result.stdout.splitlines()
    assert wet == dry
    for words in (str(count), "minutes", 'pip install "lycoris-numba[cu13]"', "NVIDIA"):
        assert words in wet
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter.safetensors", "base.safetensors"]


@pytest.mark.parametrize(("seconds", "words"), [(3600, "60 minutes"), (10000, "3 hours"), (400_000, "5 days")])
def test_durations(seconds, words):
    assert merge_estimate.duration(seconds) == words


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"adapters": ()}, "no adapter"),
        ({"adapters": (AdapterInput(Path("x"), float("nan")),)}, "strength is nan"),
        ({"dtype": "fp8"}, "'fp8'"),
        ({"device": "cuda:99"}, "cuda:99"),
        ({"device": "gpu"}, "'gpu'"),
    ],
)
def test_options(options, words, tmp_path):
    given = {"base": base_file(tmp_path), "adapters": (AdapterInput(adapter_file(tmp_path)),)}
    before = snapshot(tmp_path)
    with pytest.raises(RefusedInput, match=re.escape(words)):
        merge(MergeOptions(**given | {"output": tmp_path / "merged.safetensors"} | options))
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("extra", [{}, {"dora_scale": np.ones((4, 1), np.float32)}], ids=["plain", "dora"])
@pytest.mark.parametrize("strength", [1e39, -1e300])
def test_strength_beyond_float32(strength, extra, tmp_path):
    refused(base_file(tmp_path), (adapter_file(tmp_path, **extra), strength), words=("lora_unet_a_b", "lower the"))


def test_strength_that_alpha_takes_beyond_float32(tmp_path):
    adapter = changed(tmp_path, "alpha", lambda alpha: np.full_like(alpha, 1e38), alpha=1.0)
    refused(base_file(tmp_path), (adapter, 1e10), words=("lora_unet_a_b", "scale", "lower the strength"))
