"""What the writer writes: the base's own bytes where nothing changes, and what it is given where something does."""

from __future__ import annotations

import json
import os
import shutil
import threading
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from golden import GOLDEN
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from safetensors.numpy import load_file
from safetensors_files import entry, file_bytes, snapshot, some_tensors, tensors_file, two_shards, write_shards

from lycoris.checkpoint import Checkpoint, CheckpointWriter
from lycoris.checkpoint import writer as writer_module
from lycoris.dtype import DTYPES
from lycoris.errors import MergeFailed

BASES = sorted(p.relative_to(GOLDEN) for p in GOLDEN.glob("bases/*"))
BASES += sorted(p.relative_to(GOLDEN) for p in GOLDEN.glob("bases/*/*model.safetensors*"))


def merge(base: Path, output: Path, changed: dict[str, np.ndarray], *, dtypes=None, overwrite=False) -> None:
    """Write a copy of `base` in which the tensors in `changed` have other values."""
    with (
        Checkpoint.open(base) as checkpoint,
        CheckpointWriter(checkpoint, output, dtypes=dtypes, overwrite=overwrite) as writer,
    ):
        for name in reversed(checkpoint.tensors):
            if name in changed:
                writer.write(name, 0, changed[name])
            else:
                writer.copy(name)
        writer.commit()


@pytest.mark.parametrize("base", BASES, ids=str)
def test_copy_of_a_golden_base_is_the_same_byte_for_byte(tmp_path, base):
    source = GOLDEN / base
    merge(source, tmp_path / "out", {})
    if source.is_dir():
        assert snapshot(tmp_path / "out") == snapshot(source)
    elif source.suffix == ".json":
        expected = snapshot(source.parent)
        del expected["config.json"]
        assert snapshot(tmp_path / "out") == expected
    else:
        assert (tmp_path / "out").read_bytes() == source.read_bytes()
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("kind", ["file", "folder", "index"])
def test_changed_tensors_are_written_and_every_other_byte_is_kept(tmp_path, kind):
    index = two_shards(tmp_path / "model")
    shard = index.parent / "model-00001-of-00002.safetensors"
    base = {"file": shard, "folder": index.parent, "index": index}[kind]
    new = np.full((3, 5), -1.5, ml_dtypes.bfloat16)
    merge(base, tmp_path / "out", {"layer.0.weight": new})
    written = tmp_path / "out" if kind == "file" else tmp_path / "out" / shard.name
    assert written.read_bytes() == shard.read_bytes().replace(some_tensors()["layer.0.weight"].tobytes(), new.tobytes())
    assert load_file(written)["layer.0.weight"].tobytes() == new.tobytes()
    if kind != "file":
        copied = set(os.listdir(index.parent)) - ({"config.json"} if kind == "index" else set())
        assert set(os.listdir(tmp_path / "out")) == copied
        for name in copied - {shard.name}:
            assert (tmp_path / "out" / name).read_bytes() == (index.parent / name).read_bytes()


def test_odd_headers_are_kept_byte_for_byte(tmp_path):
    first, second = json.dumps(entry("U8", [3], 0, 3)), json.dumps(entry("F4", [4], 3, 5) | {"note": [1]})
    header = f'{{ "b":{second},\n"__metadata__":{{"\\u00e9":"\\n"}}, "a" : {first}}}\n   '
    (tmp_path / "base").write_bytes(file_bytes(header, b"abcde"))
    merge(tmp_path / "base", tmp_path / "out", {"b": np.frombuffer(b"xy", np.uint8)})
    assert (tmp_path / "out").read_bytes() == file_bytes(header, b"abcxy")


def test_dtype_change_keeps_names_order_and_metadata(tmp_path):
    index = two_shards(tmp_path / "model")
    base = some_tensors(5)
    wide = {"layer.0.weight": base["layer.0.weight"].astype(np.float32) + 0.001}
    merge(index.parent, tmp_path / "out", wide, dtypes={"layer.0.weight": "F32"})
    with Checkpoint.open(tmp_path / "out") as out, Checkpoint.open(index) as before:
        assert list(out.tensors) == list(before.tensors)
        assert [file.metadata for file in out.files] == [{"format": "pt"}] * 2
        assert out.files[1].header_bytes == before.files[1].header_bytes
        for name, array in (base | wide).items():
            np.testing.assert_array_equal(out.read(name), array, strict=True)
        assert out.index.fields == before.index.fields | {"metadata": {"total_size": out.data_bytes}}
        assert out.index.raw == before.index.raw.replace(b"%d" % before.data_bytes, b"%d" % out.data_bytes)
    loaded = load_file(tmp_path / "out" / "model-00001-of-00002.safetensors")
    np.testing.assert_array_equal(loaded["layer.0.weight"], wide["layer.0.weight"], strict=True)


@pytest.mark.parametrize("index", [{"metadata": {"mode": "x"}}, {"metadata": None}, {}])
def test_index_is_kept_where_it_says_no_size_or_no_type_changes(tmp_path, index):
    path = two_shards(tmp_path / "model", **index)
    dtype = "F32" if index else "BF16"
    values = some_tensors()["layer.0.weight"].astype(DTYPES[dtype].numpy)
    merge(path, tmp_path / "out", {"layer.0.weight": values}, dtypes={"layer.0.weight": dtype})
    assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


_ARRAYS = st.sampled_from([ml_dtypes.bfloat16, np.float16, np.float32, np.float64, np.int8, np.bool_]).flatmap(
    lambda dtype: npst.arrays(
        np.uint8, npst.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4), fill=st.nothing()
    ).map(lambda array: (array % 2).astype(dtype))
)
_TENSORS = st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), _ARRAYS, max_size=6)


@given(shards=st.lists(_TENSORS, min_size=1, max_size=3), data=st.data())
def test_any_checkpoint_survives_the_round_trip(tmp_path_factory, shards, data):
    shards = [{f"{n}.{name}": array for name, array in shard.items()} for n, shard in enumerate(shards)]
    tensors = {name: array for shard in shards for name, array in shard.items()}
    folder = tmp_path_factory.mktemp("any")
    if tensors:
        base = write_shards(folder / "base", {f"{n}.safetensors": shard for n, shard in enumerate(shards) if shard})
    else:
        base = folder / "base.safetensors"
        base.write_bytes(tensors_file({}, {}))
    picked = data.draw(st.sets(st.sampled_from(sorted(tensors)))) if tensors else set()
    changed = {name: (~tensors[name].astype(np.bool_)).astype(np.float32) for name in picked}
    merge(base, folder / "out", changed, dtypes=dict.fromkeys(changed, "F32"))
    files = list((folder / "out").glob("*.safetensors")) if tensors else [folder / "out"]
    loaded = {name: array for file in files for name, array in load_file(file).items()}
    assert loaded.keys() == tensors.keys()
    for name, array in (tensors | changed).items():
        assert (loaded[name].dtype, loaded[name].shape) == (array.dtype, array.shape)
        assert loaded[name].tobytes() == array.tobytes()
    shutil.rmtree(folder)


def test_large_tensors_are_copied_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(writer_module, "_COPY_BYTES", 1000)
    arrays = {f"t{n}": np.random.default_rng(n).bytes(size) for n, size in enumerate((999, 1000, 1001, 3000, 0, 1))}
    (tmp_path / "base").write_bytes(tensors_file({k: np.frombuffer(v, np.uint8) for k, v in arrays.items()}))
    merge(tmp_path / "base", tmp_path / "out", {})
    assert (tmp_path / "out").read_bytes() == (tmp_path / "base").read_bytes()


def test_large_writes_start_write_back(tmp_path):
    big = {"a": np.arange(1 << 19, dtype=np.int32), "b": np.zeros(3, np.uint8)}
    (tmp_path / "base").write_bytes(tensors_file(big))
    merge(tmp_path / "base", tmp_path / "out", {"a": big["a"] + 1})
    np.testing.assert_array_equal(load_file(tmp_path / "out")["a"], big["a"] + 1)


def test_short_writes_are_continued(tmp_path, monkeypatch):
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, data[:7], at))
    merge(GOLDEN / "bases/tiny-llama", tmp_path / "out", {})
    assert snapshot(tmp_path / "out") == snapshot(GOLDEN / "bases/tiny-llama")


def test_many_threads_write_one_file_piece_by_piece(tmp_path):
    rng = np.random.default_rng(5)
    arrays = {f"t{n}": rng.integers(0, 255, 10_000 + n, np.uint8) for n in range(20)}
    (tmp_path / "base").write_bytes(tensors_file({name: np.zeros_like(array) for name, array in arrays.items()}))
    pieces = [(name, at) for name, array in arrays.items() for at in range(0, array.size, 997)]
    rng.shuffle(pieces)
    with (
        Checkpoint.open(tmp_path / "base") as checkpoint,
        CheckpointWriter(checkpoint, tmp_path / "out") as writer,
    ):

        def write(part):
            for name, at in part:
                writer.write(str(name), int(at), arrays[name][int(at) : int(at) + 997])

        threads = [threading.Thread(target=write, args=(pieces[n::8],)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        writer.commit()
    assert (tmp_path / "out").read_bytes() == tensors_file(arrays)


def test_tensors_tell_where_they_will_lie(tmp_path):
    index = two_shards(tmp_path / "model")
    with Checkpoint.open(index) as checkpoint:
        writer = CheckpointWriter(checkpoint, tmp_path / "out", dtypes={"layer.0.weight": "F32"})
        found = writer.tensors["layer.0.weight"]
        assert (found.dtype, found.nbytes) == ("F32", 60)
        assert found.path == tmp_path / "out" / "model-00001-of-00002.safetensors"
        assert list(writer.tensors) == list(checkpoint.tensors)


BAD_USE = {
    "nothing written": (lambda w: None, r"byte 0 of tensor 'a' \(4 bytes\) was never written"),
    "end missing": (lambda w: w.write("a", 0, b"abc"), "byte 3 of tensor 'a'"),
    "start missing": (lambda w: w.write("a", 1, b"bcd"), "byte 0 of tensor 'a'"),
    "middle missing": (lambda w: (w.write("a", 0, b"a"), w.write("a", 2, b"cd")), "byte 1 of tensor 'a'"),
    "written twice": (lambda w: (w.copy("a"), w.write("a", 1, b"b")), "byte 1 of tensor 'a' was written twice"),
    "too long": (lambda w: w.write("a", 1, b"abcd"), "bytes 1 to 5 leave tensor 'a'"),
    "before the start": (lambda w: w.write("a", -1, b"a"), "bytes -1 to 0 leave tensor 'a'"),
}


@pytest.mark.parametrize(("use", "words"), BAD_USE.values(), ids=BAD_USE)
def test_incomplete_output_is_never_published(tmp_path, use, words):
    (tmp_path / "base").write_bytes(tensors_file({"a": np.zeros(4, np.uint8), "b": np.zeros(0)}))
    with (
        pytest.raises(AssertionError, match=words),
        Checkpoint.open(tmp_path / "base") as checkpoint,
        CheckpointWriter(checkpoint, tmp_path / "out") as writer,
    ):
        use(writer)
        writer.commit()
    assert os.listdir(tmp_path) == ["base"]


def test_empty_writes_count_for_nothing(tmp_path):
    (tmp_path / "base").write_bytes(tensors_file({"a": np.zeros(4, np.uint8), "b": np.zeros(0)}))
    with Checkpoint.open(tmp_path / "base") as checkpoint, CheckpointWriter(checkpoint, tmp_path / "out") as writer:
        writer.write("a", 2, b"")
        writer.write("b", 0, np.zeros(0))
        writer.write("a", 0, np.full((2, 2), 7, np.uint8))
        writer.commit()
    assert load_file(tmp_path / "out")["a"].tolist() == [7] * 4


def test_left_without_commit_nothing_is_written(tmp_path):
    two_shards(tmp_path / "model")
    before = snapshot(tmp_path)
    with Checkpoint.open(tmp_path / "model") as checkpoint, CheckpointWriter(checkpoint, tmp_path / "out") as writer:
        for name in checkpoint.tensors:
            writer.copy(name)
    assert snapshot(tmp_path) == before
    with pytest.raises(MergeFailed, match="too late"):
        writer.write("layer.4.weight", 0, b"")


def test_folder_is_replaced_whole(tmp_path):
    two_shards(tmp_path / "model")
    old = write_shards(tmp_path / "out", {f"old-{n}.safetensors": some_tensors(1, first=n) for n in range(4)})
    (old.parent / "notes.txt").write_text("about the old one")
    merge(tmp_path / "model", tmp_path / "out", {}, overwrite=True)
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "model")
    assert sorted(os.listdir(tmp_path)) == ["model", "out"]


def test_shards_in_a_sub_folder_stay_there(tmp_path):
    (tmp_path / "model" / "shards").mkdir(parents=True)
    (tmp_path / "model" / "shards" / "a.safetensors").write_bytes(tensors_file(some_tensors()))
    index = tmp_path / "model" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(some_tensors(), "shards/a.safetensors")}))
    merge(index.parent, tmp_path / "out", {})
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "model")


def test_base_that_is_written_to_meanwhile_fails(tmp_path):
    base = tmp_path / "base"
    base.write_bytes(tensors_file(some_tensors()))
    with (
        pytest.raises(MergeFailed, match="base: changed while it was read"),
        Checkpoint.open(base) as checkpoint,
        CheckpointWriter(checkpoint, tmp_path / "out") as writer,
    ):
        for name in checkpoint.tensors:
            writer.copy(name)
        os.utime(base, ns=(1, 1))
        writer.commit()
    assert os.listdir(tmp_path) == ["base"]


def test_output_that_appears_meanwhile_is_kept(tmp_path):
    (tmp_path / "base").write_bytes(tensors_file(some_tensors()))
    with (
        pytest.raises(MergeFailed, match="another program made it meanwhile"),
        Checkpoint.open(tmp_path / "base") as checkpoint,
        CheckpointWriter(checkpoint, tmp_path / "out") as writer,
    ):
        for name in checkpoint.tensors:
            writer.copy(name)
        (tmp_path / "out").write_text("theirs")
        writer.commit()
    assert (tmp_path / "out").read_text() == "theirs"
    assert sorted(os.listdir(tmp_path)) == ["base", "out"]


def test_new_files_get_the_usual_mode(tmp_path):
    two_shards(tmp_path / "model")
    old = os.umask(0o027)
    try:
        merge(tmp_path / "model", tmp_path / "out", {})
    finally:
        os.umask(old)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o750
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()} == {0o640}


def test_longest_file_name(tmp_path):
    (tmp_path / "base").write_bytes(tensors_file(some_tensors()))
    output = tmp_path / ("ü" * 127 + "x")
    merge(tmp_path / "base", output, {})
    assert output.read_bytes() == (tmp_path / "base").read_bytes()
