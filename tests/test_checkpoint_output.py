"""Which outputs are refused before anything is written."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
from safetensors_files import snapshot, some_tensors, tensors_file, two_shards, write_shards

from lycoris.checkpoint import Checkpoint, CheckpointWriter
from lycoris.errors import RefusedInput


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder to stand in with a base file, a base folder, an adapter file and an adapter folder."""
    (tmp_path / "base.safetensors").write_bytes(tensors_file(some_tensors()))
    two_shards(tmp_path / "model")
    (tmp_path / "adapter.safetensors").write_bytes(b"adapter")
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft" / "adapter_config.json").write_text("{}")
    (tmp_path / "taken.safetensors").write_bytes(b"precious")
    write_shards(tmp_path / "taken", {"old.safetensors": some_tensors(1)})
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def open_writer(place, base, output, overwrite=True):
    with Checkpoint.open(place / base) as checkpoint:
        inputs = [place / "adapter.safetensors", place / "peft"]
        with CheckpointWriter(checkpoint, output, overwrite=overwrite, inputs=inputs) as writer:
            for name in checkpoint.tensors:
                writer.copy(name)
            writer.commit()


FILE, FOLDER, INDEX = "base.safetensors", "model", "model/model.safetensors.index.json"


def link(name, to, hard=False):
    return lambda place: os.link(place / to, place / name) if hard else os.symlink(to, place / name)


def nothing(place):
    pass


def folder_of_files(place):
    (place / "letters").mkdir()
    (place / "letters" / "to_mother.txt").write_text("dear")


def folder_of_two_checkpoints(place):
    folder_of_files(place)
    for name in ("one", "two"):
        (place / "letters" / f"{name}.safetensors").write_bytes(b"")


def folder_with_folders(place):
    two_shards(place / "letters")
    (place / "letters" / "old").mkdir()


def folder_that_holds_inputs(place):
    (place / "letters").mkdir()
    os.rename(place / "adapter.safetensors", place / "letters" / "adapter.safetensors")
    os.symlink("letters/adapter.safetensors", place / "adapter.safetensors")


def folder_that_holds_a_link_to_the_base(place):
    (place / "letters").mkdir()
    (place / "letters" / "model").symlink_to(place / "model")


# What is wrong -> (what to make first, base, output, words of the refusal). All of them with overwriting allowed.
REFUSED = {
    "empty name": (nothing, FILE, "", "output path is empty"),
    "the base": (nothing, FILE, FILE, "is the input"),
    "the base, spelled otherwise": (nothing, FILE, "model/../base.safetensors", "is the input"),
    "a link to the base": (link("other.safetensors", FILE), FILE, "other.safetensors", "is the input"),
    "a hard link to the base": (link("other.safetensors", FILE, hard=True), FILE, "other.safetensors", "is the input"),
    "an adapter": (nothing, FILE, "adapter.safetensors", "is the input"),
    "inside an adapter's folder": (nothing, FILE, "peft/out.safetensors", "inside the input"),
    "inside it by a link": (link("door", "peft"), FILE, "door/out.safetensors", "inside the input"),
    "an adapter's folder": (nothing, FOLDER, "peft", "is the input"),
    "the base folder": (nothing, FOLDER, "model", "is the input"),
    "the base folder with a slash": (nothing, FOLDER, "model/", "is the input"),
    "a link to the base folder": (link("other", "model"), FOLDER, "other", "is the input"),
    "inside the base folder": (nothing, FOLDER, "model/merged", "inside the input"),
    "around the base folder": (nothing, FOLDER, ".", "holds the input"),
    "around the index": (nothing, INDEX, "model", "holds the input"),
    "around an adapter that a link names": (folder_that_holds_inputs, FOLDER, "letters", "holds the input"),
    "a shard of the base": (nothing, INDEX, "model/model-00001-of-00002.safetensors", "is the input"),
    "folder for a file": (nothing, FILE, "empty", "is a folder"),
    "folder for a file, with a slash": (nothing, FILE, "out/", "names a folder"),
    "pipe for a file": (lambda place: os.mkfifo(place / "out"), FILE, "out", "not a regular file"),
    "file for a folder": (nothing, FOLDER, "taken.safetensors", "is a file"),
    "file for an index": (nothing, INDEX, "taken.safetensors", "is a file"),
    "no such folder": (nothing, FILE, "nowhere/out.safetensors", "nowhere does not exist"),
    "link to nowhere": (link("out", "nowhere/out"), FILE, "out", "nowhere does not exist"),
    "below a file": (nothing, FILE, "taken.safetensors/out", "is not a folder"),
    "name too long": (nothing, FILE, "x" * 256, "File name too long"),
    "link in a circle": (link("out", "out"), FILE, "out", "symbolic links"),
    "folder with other files": (folder_of_files, FOLDER, "letters", "1 files and 0 checkpoints"),
    "folder with two checkpoints": (folder_of_two_checkpoints, FOLDER, "letters", "3 files and 2 checkpoints"),
    "folder with folders": (folder_with_folders, FOLDER, "letters", "holds folders (old)"),
    "mount point": (nothing, FOLDER, "/proc", "mount point"),
}


@pytest.mark.parametrize(("make", "base", "output", "words"), REFUSED.values(), ids=REFUSED)
def test_output_is_refused_and_nothing_written(place, make, base, output, words):
    make(place)
    before = snapshot(place)
    with pytest.raises(RefusedInput) as refusal:
        open_writer(place, base, output)
    assert words in str(refusal.value) and str(refusal.value).startswith(output or "the output")
    assert snapshot(place) == before


@pytest.mark.parametrize(
    ("base", "output"),
    [(FILE, "taken.safetensors"), (FOLDER, "taken"), (INDEX, "taken"), (FOLDER, "empty"), (FOLDER, "empty/")],
)
def test_existing_output_is_refused_unless_it_may_be_overwritten(place, base, output):
    before = snapshot(place)
    with pytest.raises(RefusedInput, match=f"{output}: exists; give another output or .*--overwrite"):
        open_writer(place, base, output, overwrite=False)
    assert snapshot(place) == before
    open_writer(place, base, output, overwrite=True)
    assert snapshot(place) != before


@pytest.mark.parametrize(("base", "output"), [(FILE, "new.safetensors"), (FOLDER, "new"), (INDEX, "model/new")])
def test_new_output_is_written_whether_or_not_it_may_be_overwritten(place, base, output):
    for overwrite in (False, True):
        open_writer(place, base, f"{output}{overwrite}", overwrite=overwrite)
        assert (place / f"{output}{overwrite}").exists()


def test_what_a_link_points_to_is_replaced_and_the_link_stays(place):
    os.symlink("taken.safetensors", place / "out")
    open_writer(place, FILE, "out")
    assert (place / "out").is_symlink()
    assert (place / "taken.safetensors").read_bytes() == (place / FILE).read_bytes()


def test_folder_without_permission_is_refused(place, monkeypatch):
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: mode & os.W_OK == 0 and access(path, mode))
    before = snapshot(place)
    with pytest.raises(RefusedInput, match="out: no permission to write into"):
        open_writer(place, FILE, "out")
    assert snapshot(place) == before


def test_full_disk_is_refused_with_the_bytes_needed_and_free(place, monkeypatch):
    needed = (place / FILE).stat().st_size
    before = snapshot(place)
    for free in (needed - 1, needed):
        monkeypatch.setattr(os, "statvfs", lambda _, free=free: SimpleNamespace(f_bavail=free, f_frsize=1))
        if free < needed:
            with pytest.raises(RefusedInput, match=f"out: needs {needed} bytes .* {free} are free"):
                open_writer(place, FILE, "out")
            assert snapshot(place) == before
        else:
            open_writer(place, FILE, "out")


def test_leftover_of_a_killed_run_counts_as_free_space(place, monkeypatch):
    needed = (place / FILE).stat().st_size
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_bavail=0, f_frsize=1))
    leftover = place / ".out.1.0123abcd.tmp"
    leftover.write_bytes(bytes(needed))
    with Checkpoint.open(place / FILE) as checkpoint:
        CheckpointWriter(checkpoint, "out").check_space()
        assert leftover.exists()
        leftover.unlink()
        with pytest.raises(RefusedInput, match="0 are free"):
            CheckpointWriter(checkpoint, "out").check_space()


def test_space_can_be_checked_without_writing(place, monkeypatch):
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_bavail=0, f_frsize=4096))
    before = snapshot(place)
    with Checkpoint.open(place / FOLDER) as checkpoint:
        writer = CheckpointWriter(checkpoint, "out")
        assert writer.output_bytes == sum(path.stat().st_size for path in (place / FOLDER).iterdir())
        with pytest.raises(RefusedInput, match=f"needs {writer.output_bytes} bytes"):
            writer.check_space()
    assert snapshot(place) == before


def test_file_system_that_cannot_swap_folders_is_refused_before_the_work(place, monkeypatch):
    def refuse(first, second):
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr("lycoris.checkpoint.staging.exchange", refuse)
    before = snapshot(place)
    with pytest.raises(RefusedInput, match="cannot replace a folder in one step"):
        open_writer(place, FOLDER, "taken")
    assert snapshot(place) == before
    open_writer(place, FOLDER, "new")
