"""Whatever stops the writer, a kill included, the target is what it was before or the whole new output."""

from __future__ import annotations

import errno
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import threading
import time
from multiprocessing import forkserver
from pathlib import Path

import pytest
from safetensors_files import snapshot, some_tensors, tensors_file, two_shards, write_shards

import lycoris.checkpoint
from lycoris.checkpoint import Checkpoint, CheckpointWriter, interruptible, staging
from lycoris.errors import MergeFailed

PACKAGE = str(Path(lycoris.checkpoint.__file__).parent)

# Processes that die are forked from one without threads or Numba, in milliseconds.
PROCESSES = multiprocessing.get_context("forkserver")


@pytest.fixture(scope="module", autouse=True)
def process_server():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        PROCESSES.set_forkserver_preload([__name__])
        forkserver.ensure_running()
        yield


def merge(base, output, sync=True):
    with Checkpoint.open(base) as checkpoint, CheckpointWriter(checkpoint, output, overwrite=True, sync=sync) as writer:
        for name in checkpoint.tensors:
            writer.copy(name)
        writer.commit()


def at_line(number, act):
    """Call `act` before the package's `number`-th line from now. The result holds the count so far."""
    count = [0]

    def trace(frame, event, arg):
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        if event == "line":
            count[0] += 1
            if count[0] == number:
                act()
        return trace

    sys.settrace(trace)
    return count


def kill_at_line(base, output, number):
    at_line(number, lambda: os.kill(os.getpid(), signal.SIGKILL))
    merge(base, output)


def lines_of(work):
    """How many of the package's lines `work` runs."""
    count = at_line(0, lambda: None)
    try:
        work()
    finally:
        sys.settrace(None)
    return count[0]


def started(function, *args):
    process = PROCESSES.Process(target=function, args=args)
    process.start()
    return process


def exit_status(function, *args):
    process = started(function, *args)
    process.join(60)
    return process.exitcode


@pytest.fixture(params=["file", "folder", "new file", "new folder"])
def job(request, tmp_path):
    """(base, output, folder that the output is in): outputs that exist, and outputs that do not."""
    (tmp_path / "place").mkdir()
    output = tmp_path / "place" / "out"
    if "folder" in request.param:
        base = two_shards(tmp_path / "base").parent
    else:
        base = tmp_path / "base"
        base.write_bytes(tensors_file(some_tensors()))
    if request.param == "folder":
        write_shards(output, {"old.safetensors": some_tensors(1)})
    if request.param == "file":
        output.write_bytes(tensors_file(some_tensors(1)))
    return base, output, output.parent


def content(path):
    """What `path` holds: None, a file's bytes or a folder's snapshot."""
    if not path.exists():
        return None
    return path.read_bytes() if path.is_file() else snapshot(path)


def test_killed_at_any_line_the_target_is_old_or_new_and_the_next_run_cleans_up(job):
    base, output, place = job
    old, new = content(output), content(base)
    shutil.copytree(place, place.parent / "spare")
    total = lines_of(lambda: merge(base, place.parent / "spare" / "out"))
    # A few moments while it writes, and each one while it publishes.
    for number in [*range(1, total - 20, total // 16), *range(total - 20, total + 1)]:
        assert exit_status(kill_at_line, base, output, number) == -signal.SIGKILL
        assert content(base) == new
        assert content(output) in (old, new)
        assert len([name for name in os.listdir(place) if name != "out"]) <= 1, "leftovers pile up"
        if content(output) == new:
            break
    assert content(output) == new, "the last lines run after the new one is in place"
    merge(base, output)
    assert os.listdir(place) == ["out"] and content(output) == new


class Stop(BaseException):
    pass


def test_interrupted_at_any_line_nothing_is_left_behind(job):
    base, output, place = job
    old, new = content(output), content(base)

    def stop():
        raise Stop

    for number in range(1, 100_000, 3):
        at_line(number, stop)
        try:
            merge(base, output)
        except Stop:
            pass
        else:
            break
        finally:
            sys.settrace(None)
        assert content(output) in (old, new)
        assert os.listdir(place) == (["out"] if output.exists() else [])
        if content(output) == new:
            old = new
    assert content(output) == new


def merge_slowly(base, output, status):
    """Write the first tensor, then wait for a signal; tell how it ended."""
    outcome = "finished"
    try:
        with interruptible(), Checkpoint.open(base) as checkpoint, CheckpointWriter(checkpoint, output) as writer:
            writer.copy("layer.0.weight")
            status.send("waiting")
            time.sleep(60)
    except BaseException as error:
        outcome = f"{type(error).__name__}: {error}"
    status.send(outcome)


@pytest.mark.parametrize(
    ("number", "outcome"),
    [
        (signal.SIGINT, "KeyboardInterrupt: "),
        (signal.SIGTERM, "MergeFailed: stopped by SIGTERM before it was done; run it again"),
        (signal.SIGHUP, "MergeFailed: stopped by SIGHUP before it was done; run it again"),
    ],
)
def test_signal_unwinds_and_cleans_up(tmp_path, number, outcome):
    base = two_shards(tmp_path / "base").parent
    before = snapshot(tmp_path)
    here, there = PROCESSES.Pipe()
    process = started(merge_slowly, base, tmp_path / "out", there)
    assert here.recv() == "waiting"
    assert len(os.listdir(tmp_path)) == 2
    os.kill(process.pid, number)
    assert here.recv() == outcome
    process.join(60)
    assert snapshot(tmp_path) == before


def test_second_signal_does_not_break_the_clean_up_off():
    done = []
    with pytest.raises(KeyboardInterrupt), interruptible():
        try:
            signal.raise_signal(signal.SIGINT)
        finally:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGTERM)
            done.append("cleaned up")
    assert done == ["cleaned up"]


def test_ignored_signal_stays_ignored_and_handlers_come_back():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with interruptible():
            signal.raise_signal(signal.SIGHUP)
            assert signal.getsignal(signal.SIGTERM) is not before[signal.SIGTERM]
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before[signal.SIGHUP])
    assert before == {number: signal.getsignal(number) for number in before}


def test_outside_the_main_thread_signals_are_left_alone():
    ran = []

    def run():
        with interruptible():
            ran.append(True)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert ran


def test_temporary_of_a_running_merge_is_left_alone(tmp_path):
    base = two_shards(tmp_path / "base").parent
    here, there = PROCESSES.Pipe()
    process = started(merge_slowly, base, tmp_path / "out", there)
    assert here.recv() == "waiting"
    temporary = next(name for name in os.listdir(tmp_path) if name.endswith(".tmp"))
    merge(base, tmp_path / "out")
    assert temporary in os.listdir(tmp_path)
    process.kill()
    process.join(60)
    merge(base, tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["base", "out"]


def test_only_temporaries_of_the_same_target_are_removed(tmp_path):
    (tmp_path / "base").write_bytes(tensors_file(some_tensors()))
    others = [".out.tmp", ".out.1.tmp", ".out.2.0123abcd.tmpx", ".out2.1.0123abcd.tmp", "out.1.0123abcd.tmp", "x.tmp"]
    for name in [*others, ".out.1.0123abcd.tmp"]:
        (tmp_path / name).write_bytes(b"")
    merge(tmp_path / "base", tmp_path / "out")
    assert set(os.listdir(tmp_path)) == {"base", "out", *others}


FAILURES = {
    "full disk while reserving": ("reserve", errno.ENOSPC, "No space left on device"),
    "full disk while writing": ("pwrite", errno.ENOSPC, "No space left on device"),
    "over quota": ("pwrite", errno.EDQUOT, "quota"),
    "failing disk": ("pwrite", errno.EIO, "Input/output error"),
    "failing disk at the end": ("fsync", errno.EIO, "Input/output error"),
}


@pytest.mark.parametrize(("call", "number", "words"), FAILURES.values(), ids=FAILURES)
def test_failing_system_is_reported_and_nothing_left_behind(job, monkeypatch, call, number, words):
    base, output, place = job
    before = snapshot(place)
    place_of_call = staging if call == "reserve" else os
    original, calls = getattr(place_of_call, call), []

    def fail(*args):
        calls.append(args)
        if len(calls) >= (1 if call == "fsync" else 2) or call == "reserve":
            raise OSError(number, os.strerror(number))
        return original(*args)

    monkeypatch.setattr(place_of_call, call, fail)
    with pytest.raises(MergeFailed) as failure:
        merge(base, output)
    assert str(failure.value).startswith(str(output)) and words in str(failure.value)
    assert isinstance(failure.value.__cause__, OSError)
    monkeypatch.undo()
    assert snapshot(place) == before


@pytest.mark.parametrize("sync", [False, True])
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_is_on_disk_before_the_output_has_its_name(tmp_path, monkeypatch, kind, sync):
    """Every file and folder of it where that is asked for, the name itself last; else nothing waits for the disk."""
    base = two_shards(tmp_path / "model").parent
    if kind == "file":
        base = base / "model-00001-of-00002.safetensors"
    calls, fsync, replace = [], os.fsync, Path.replace

    def noted_fsync(descriptor):
        calls.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def noted_replace(source, target):
        calls.append("named")
        return replace(source, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(Path, "replace", noted_replace)
    merge(base, tmp_path / "out", sync)
    named = calls.index("named")
    before, after = set(calls[:named]), calls[named + 1 :]
    if not sync:
        assert calls == ["named"]
    elif kind == "file":
        (written,) = before
        assert written.parent == tmp_path and written.name.endswith(".tmp") and after == [tmp_path]
    else:
        (temporary,) = {path for path in before if path.parent == tmp_path}
        assert before == {temporary, *(temporary / path.name for path in base.iterdir())}
        assert after == [tmp_path]


def merge_with_limit(base, output, status):
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
    try:
        merge(base, output)
    except MergeFailed as error:
        status.send(str(error))


def test_limit_on_the_size_of_files(tmp_path):
    base = two_shards(tmp_path / "base").parent
    before = snapshot(tmp_path)
    here, there = PROCESSES.Pipe()
    assert exit_status(merge_with_limit, base, tmp_path / "out", there) == 0
    assert f"{tmp_path / 'out'}: cannot be written (File too large)" in here.recv()
    assert snapshot(tmp_path) == before


def test_unreadable_file_beside_the_weights_is_named(tmp_path, monkeypatch):
    base = two_shards(tmp_path / "base").parent
    before = snapshot(tmp_path)
    original = Path.open

    def refuse(path, *args, **named):
        if path == base / "config.json":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return original(path, *args, **named)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(MergeFailed, match=r"config\.json: cannot be read \(Permission denied\)"):
        merge(base, tmp_path / "out")
    monkeypatch.undo()
    assert snapshot(tmp_path) == before


def test_leaving_waits_for_writes_under_way(tmp_path, monkeypatch):
    """A descriptor that is closed during a write may by then be another file's."""
    (tmp_path / "base").write_bytes(tensors_file(some_tensors()))
    pwrite, entered, go_on = os.pwrite, threading.Event(), threading.Event()
    errors = []

    def slow(*args):
        entered.set()
        assert go_on.wait(60)
        return pwrite(*args)

    def work(writer):
        try:
            writer.copy("layer.0.weight")
            writer.copy("layer.1.weight")
        except MergeFailed as error:
            errors.append(str(error))

    with Checkpoint.open(tmp_path / "base") as checkpoint:
        with pytest.raises(Stop), CheckpointWriter(checkpoint, tmp_path / "out") as writer:
            monkeypatch.setattr(os, "pwrite", slow)
            thread = threading.Thread(target=work, args=(writer,))
            thread.start()
            assert entered.wait(60)
            threading.Timer(0.2, go_on.set).start()
            raise Stop
        assert go_on.is_set()
        thread.join()
    assert errors and "too late" in errors[0]
    assert os.listdir(tmp_path) == ["base"]
