"""Finding a checkpoint: files, shard indexes, folders, and what is refused about them."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from golden import GOLDEN
from safetensors.numpy import load_file
from safetensors_files import some_tensors, tensors_file, two_shards, write_shards

from lycoris.checkpoint import Checkpoint
from lycoris.errors import RefusedInput

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def write(path: Path, content: bytes | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tensors_file(some_tensors()) if content is None else content)


def index_with(**fields):
    """A folder with two shards whose index has other fields."""
    return lambda folder: two_shards(folder, **fields)


def index_that_maps(**shards):
    """As `index_with`, for single entries of the weight map; None takes the name out."""

    def make(folder):
        path = two_shards(folder)
        index = json.loads(path.read_text())
        renamed = {name.replace("_", "."): shard for name, shard in shards.items()}
        index["weight_map"] = {k: v for k, v in (index["weight_map"] | renamed).items() if v is not None}
        path.write_text(json.dumps(index))

    return make


def raw_index(content):
    def make(folder):
        two_shards(folder).write_bytes(content)

    return make


def without_shard(folder):
    two_shards(folder)
    (folder / SECOND).unlink()


def same_name_in_two_shards(folder):
    write_shards(folder, {FIRST: some_tensors(3), SECOND: some_tensors(3, first=2)})


def damaged_shard(folder):
    two_shards(folder)
    os.truncate(folder / SECOND, (folder / SECOND).stat().st_size - 1)


BAD_INDEXES = {
    "empty": (raw_index(b""), "not JSON"),
    "an array": (raw_index(b"[]"), "not a JSON object"),
    "no weight_map": (raw_index(b'{"metadata": {}}'), "no weight_map"),
    "weight_map empty": (index_with(weight_map={}), "no weight_map"),
    "weight_map a list": (index_with(weight_map=[FIRST]), "no weight_map"),
    "shard a number": (index_with(weight_map={"a": 1}), "wanted a .safetensors file"),
    "shard a pickle": (index_with(weight_map={"a": "pytorch_model.bin"}), "wanted a .safetensors file"),
    "shard above the folder": (index_with(weight_map={"a": "../a.safetensors"}), "not a plain path inside"),
    "shard above, hidden": (index_with(weight_map={"a": "x/../../a.safetensors"}), "not a plain path inside"),
    "shard absolute": (index_with(weight_map={"a": "/etc/a.safetensors"}), "not a plain path inside"),
    "shard spelled oddly": (index_with(weight_map={"a": "./a.safetensors"}), "not a plain path inside"),
    "shard with a null": (index_with(weight_map={"a": "a\0.safetensors"}), "wanted a .safetensors file"),
    "name twice": (raw_index(b'{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}'), "'a' appears twice"),
    "shard missing": (without_shard, f"1 of 2 shards are missing, first {SECOND}"),
    "shard damaged": (damaged_shard, f"{SECOND}: tensor"),
    "names a tensor that no shard has": (index_that_maps(ghost=FIRST), f"'ghost' is missing in its shard {FIRST}"),
    "lacks a tensor of a shard": (index_that_maps(layer_0_weight=None), "'layer.0.weight' is in shard"),
    "names the wrong shard": (index_that_maps(layer_0_weight=SECOND), f"the index says {SECOND}"),
    "tensor in two shards": (same_name_in_two_shards, f"two shards, {FIRST} and {SECOND}"),
}


@pytest.mark.parametrize("kind", ["index", "folder"])
@pytest.mark.parametrize(("make", "words"), BAD_INDEXES.values(), ids=BAD_INDEXES)
def test_bad_index_is_refused(tmp_path, make, words, kind):
    folder = tmp_path / "model"
    make(folder)
    descriptors = len(os.listdir("/proc/self/fd"))
    with pytest.raises(RefusedInput) as refusal:
        Checkpoint.open(folder / "model.safetensors.index.json" if kind == "index" else folder)
    assert (
        words in str(refusal.value) and str(folder) in str(refusal.value) and len(str(refusal.value).splitlines()) == 1
    )
    assert len(os.listdir("/proc/self/fd")) == descriptors


def pipeline(folder):
    write(folder / "model_index.json", b"{}")
    write(folder / "unet" / "diffusion_pytorch_model.safetensors")
    two_shards(folder / "text_encoder")
    write(folder / "tokenizer" / "vocab.json", b"{}")


def pipeline_with_a_single_file(folder):
    pipeline(folder)
    write(folder / "flux1-dev.safetensors")


def files(*names):
    def make(folder):
        for name in names:
            write(folder / name)

    return make


def index_and(*names):
    def make(folder):
        two_shards(folder)
        files(*names)(folder)

    return make


BAD_FOLDERS = {
    "empty": (lambda folder: folder.mkdir(), ["holds no checkpoint"]),
    "other files only": (files("config.json", "pytorch_model.bin"), ["holds no checkpoint"]),
    "hidden file only": (files("._model.safetensors"), ["holds no checkpoint"]),
    "fp16 beside": (
        files("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors"),
        ["2 checkpoints", "diffusion_pytorch_model.fp16.safetensors, diffusion_pytorch_model.safetensors"],
    ),
    "index and a file": (index_and("consolidated.safetensors"), ["2 checkpoints", "consolidated.safetensors"]),
    "two indexes": (
        lambda folder: shutil.copy(two_shards(folder), folder / "model.fp16.safetensors.index.json"),
        ["2 checkpoints", "model.fp16.safetensors.index.json, model.safetensors.index.json"],
    ),
    "pipeline": (pipeline, ["diffusers pipeline", ": text_encoder, unet"]),
    "pipeline with a file": (pipeline_with_a_single_file, [": text_encoder, unet, flux1-dev.safetensors"]),
    "pipeline without weights": (files("model_index.json"), ["none of its sub-folders"]),
}


@pytest.mark.parametrize(("make", "words"), BAD_FOLDERS.values(), ids=BAD_FOLDERS)
def test_folder_without_one_checkpoint_is_refused(tmp_path, make, words):
    folder = tmp_path / "model"
    make(folder)
    with pytest.raises(RefusedInput) as refusal:
        Checkpoint.open(folder)
    assert str(refusal.value).startswith(f"{folder}: ")
    assert all(word in str(refusal.value) for word in words)


@pytest.mark.parametrize("name", ["missing.safetensors", "missing.safetensors.index.json", "missing"])
def test_missing_path_is_refused(tmp_path, name):
    with pytest.raises(RefusedInput, match=f"{name}: no such file"):
        Checkpoint.open(tmp_path / name)


def test_file(tmp_path):
    write(tmp_path / "a.safetensors")
    write(tmp_path / "b.safetensors")
    with Checkpoint.open(str(tmp_path / "a.safetensors")) as checkpoint:
        assert checkpoint.kind == "file" and checkpoint.index is None
        assert checkpoint.shard_names == ["a.safetensors"] and checkpoint.other_files == []
        assert list(checkpoint.tensors) == list(some_tensors())
        for name, array in some_tensors().items():
            assert checkpoint.read(name).tobytes() == array.tobytes()
        assert checkpoint.data_bytes == sum(array.nbytes for array in some_tensors().values())


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.safetensors", "model.safetensors", "anything.safetensors"])
def test_folder_with_one_file(tmp_path, name):
    for other in ("config.json", "tokenizer.model", "README.md", ".gitattributes"):
        write(tmp_path / other, b"x")
    for weights in ("pytorch_model.bin", "pytorch_model.bin.index.json", "flux.gguf"):
        write(tmp_path / weights, b"x")
    write(tmp_path / f".{name}.123.0123abcd.tmp", b"left by a kill")
    write(tmp_path / "folder" / "config.json", b"not copied")
    write(tmp_path / name)
    with Checkpoint.open(tmp_path) as checkpoint:
        assert checkpoint.kind == "folder" and checkpoint.shard_names == [name]
        assert [p.name for p in checkpoint.other_files] == [
            ".gitattributes",
            "README.md",
            "config.json",
            "tokenizer.model",
        ]
        assert [p.name for p in checkpoint.left_out] == [
            "flux.gguf",
            "pytorch_model.bin",
            "pytorch_model.bin.index.json",
        ]


def test_index_and_its_folder(tmp_path):
    index = two_shards(tmp_path / "model")
    for path, kind in ((index, "index"), (index.parent, "folder")):
        with Checkpoint.open(path) as checkpoint:
            assert checkpoint.kind == kind and checkpoint.index is not None
            assert checkpoint.shard_names == [FIRST, SECOND]
            assert [file.path for file in checkpoint.files] == [index.parent / FIRST, index.parent / SECOND]
            assert list(checkpoint.tensors) == list(some_tensors(5))
            assert checkpoint.file_of("layer.4.weight") is checkpoint.files[1]
            assert checkpoint.read("layer.3.weight").tobytes() == some_tensors(5)["layer.3.weight"].tobytes()
            assert [p.name for p in checkpoint.other_files] == (["config.json"] if kind == "folder" else [])


def test_index_of_shards_in_a_sub_folder(tmp_path):
    index = write_shards(tmp_path, {})
    write(tmp_path / "shards" / "a.safetensors")
    index.write_text(json.dumps({"weight_map": dict.fromkeys(some_tensors(), "shards/a.safetensors")}))
    with Checkpoint.open(tmp_path) as checkpoint:
        assert checkpoint.shard_names == ["shards/a.safetensors"]


def test_shards_that_are_links_out_of_the_folder_as_in_the_hugging_face_cache(tmp_path):
    index = two_shards(tmp_path / "snapshots" / "main")
    (tmp_path / "blobs").mkdir()
    for number, path in enumerate(sorted(index.parent.iterdir())):
        shutil.move(path, tmp_path / "blobs" / str(number))
        path.symlink_to(f"../../blobs/{number}")
    with Checkpoint.open(index.parent) as checkpoint:
        assert len(checkpoint.tensors) == 5 and [p.name for p in checkpoint.other_files] == ["config.json"]


@pytest.mark.parametrize("base", sorted(p.name for p in (GOLDEN / "bases").iterdir()))
def test_golden_base_reads_as_the_library_reads_it(base):
    with Checkpoint.open(GOLDEN / "bases" / base) as checkpoint:
        arrays = {}
        for file in checkpoint.files:
            arrays |= load_file(file.path)
        assert checkpoint.tensors.keys() == arrays.keys()
        for name, array in arrays.items():
            np.testing.assert_array_equal(checkpoint.read(name), array, strict=True)
