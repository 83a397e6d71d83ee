"""The pipeline's parts: windows, batches, slots, threads, stored bits; and what is left after a kill."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from crafted import module
from hypothesis import given
from hypothesis import strategies as st
from merging import assert_merged, run, write

from lycoris.dtype import DTYPES
from lycoris.errors import MergeFailed, RefusedInput
from lycoris.merge import jobs as merge_jobs
from lycoris.merge import pipeline as merge_pipeline
from lycoris.merge.batches import ALIGNMENT, Segment, cut
from lycoris.merge.bits import KINDS, all_finite, became_infinite, overflows
from lycoris.merge.crew import Crew
from lycoris.merge.pipeline import Pipeline, Sizes
from plans.core.precision import round_to
from plans.weight import GroupedWeightPlan

ROOT = Path(__file__).parents[1]
TINY = Sizes(readers=3, writers=3, block_bytes=ALIGNMENT, batch_bytes=4 * ALIGNMENT)


@st.composite
def segments(draw) -> list[Segment[int]]:
    found, position = [], draw(st.integers(0, 1000))
    for number in range(draw(st.integers(0, 8))):
        size = draw(st.integers(0, 3000))
        found.append(Segment(position, size, number))
        position += size + draw(st.sampled_from([0, 1, 255, 256, 257, 5000]))
    return found


@given(segments(), st.integers(1, 8))
def test_windows_hold_every_byte_once(found, blocks):
    limit = blocks * ALIGNMENT
    windows = list(cut(found, limit))
    covered = {segment.content: 0 for segment in found}
    for window in windows:
        assert 0 < window.nbytes <= limit
        for piece in window.pieces:
            assert piece.first == covered[piece.content]
            assert piece.first % ALIGNMENT == 0
            assert window.start + piece.at == found[piece.content].start + piece.first
            assert piece.at + piece.nbytes <= window.nbytes
            covered[piece.content] += piece.nbytes
    assert covered == {segment.content: segment.nbytes for segment in found}
    starts = [window.start for window in windows]
    assert starts == sorted(starts)


def test_neighbours_share_a_window():
    found = [Segment(0, 100, 0), Segment(256, 100, 1), Segment(512, 100, 2), Segment(2000, 8, 3)]
    assert [(w.start, w.nbytes, len(w.pieces)) for w in cut(found, 1024)] == [(0, 612, 3), (2000, 8, 1)]


def random(shape: tuple[int, ...], dtype=ml_dtypes.bfloat16, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def many_layers(folder: Path, count: int = 12) -> tuple[Path, Path]:
    """A base of layers that do and do not change, in turns, and its adapter."""
    algorithms = ("locon", "loha", "lokr", "full", "ia3")
    layers, tensors = {}, {}
    for number in range(count):
        layers[f"n.{number}.weight"] = random((4, 6), seed=number)
        layers[f"other.{number}"] = random((7 * number, 9), (ml_dtypes.bfloat16, np.float32)[number % 2], number)
        tensors |= module(f"lora_unet_n_{number}", algorithms[number % 5])
    return write(folder / "base.safetensors", layers), write(folder / "adapter.safetensors", tensors)


@pytest.mark.parametrize("dtype", ["keep", "fp32", "fp16"])
@pytest.mark.parametrize("slots", [1, 2, 3])
def test_many_small_batches(slots, dtype, tmp_path, monkeypatch):
    """Every batch, window, piece and slot has its turn; nothing depends on where a tensor was cut."""
    monkeypatch.setattr(merge_pipeline, "SIMULATOR_SIZES", TINY)
    monkeypatch.setattr(merge_pipeline, "GPU_SIZES", TINY)
    monkeypatch.setattr(merge_pipeline, "MAX_SLOTS", slots)
    monkeypatch.setattr(merge_jobs, "PIECE_ELEMENTS", 10)
    base, adapter = many_layers(tmp_path)
    output = tmp_path / "merged.safetensors"
    seen = []
    report = run(base, adapter, output=output, dtype=dtype, progress=lambda *step: seen.append(step))
    assert_merged(base, adapter, output=output, dtype=dtype)
    assert seen[-1] == (report.bytes_written, report.bytes_written)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


class Counting:
    """A device that adds up what is allocated on it, and what of it at once."""

    def __init__(self, device):
        self._device, self.held, self.peak, self.pinned_bytes = device, 0, 0, 0

    def __getattr__(self, name: str):
        return getattr(self._device, name)

    def allocate(self, nbytes, stream=None):
        self.held += nbytes
        self.peak = max(self.peak, self.held)
        return self._device.allocate(nbytes, stream)

    def pinned(self, nbytes):
        self.pinned_bytes += nbytes
        return self._device.pinned(nbytes)


@pytest.mark.parametrize("algorithm", ["locon", "full"])
def test_device_memory_is_bounded_by_the_largest_tensor(algorithm, device, tmp_path, monkeypatch):
    """Four times the largest tensor and a constant, here set to 0, however many tensors there are."""
    counting = Counting(device)
    monkeypatch.setattr(merge_pipeline, "SIMULATOR_SIZES", TINY)
    monkeypatch.setattr(merge_pipeline, "GPU_SIZES", TINY)
    monkeypatch.setattr(merge_pipeline, "SPARE_BYTES", 0)
    monkeypatch.setattr(merge_jobs, "PIECE_ELEMENTS", 256)
    monkeypatch.setattr(Pipeline, "__init__", with_device(Pipeline.__init__, counting))
    layers = {f"n.{number}.weight": random((32, 64)) for number in range(20)}
    tensors = {}
    for number in range(20):
        stem = f"lora_unet_n_{number}"
        if algorithm == "full":
            tensors[f"{stem}.diff"] = random((32, 64), np.float32)
        else:
            tensors |= {f"{stem}.lora_up.weight": random((32, 1)), f"{stem}.lora_down.weight": random((1, 64))}
    base, adapter = write(tmp_path / "b.safetensors", layers), write(tmp_path / "a.safetensors", tensors)
    run(base, adapter, output=tmp_path / "merged.safetensors")
    flags = 20 * ALIGNMENT
    assert 0 < counting.peak <= 4 * (32 * 64 * 2) + flags
    assert counting.pinned_bytes <= (TINY.readers + TINY.writers) * TINY.block_bytes


@pytest.mark.parametrize("kind", ["allocate", "pinned"])
def test_device_without_memory(kind, device, tmp_path, monkeypatch):
    """Whichever thread asks for it."""

    class Full(Counting):
        def __getattribute__(self, name: str):
            if name == kind:
                return lambda nbytes, *stream: getattr(device, kind)(1 << 60, *stream)
            return super().__getattribute__(name)

    base, adapter = many_layers(tmp_path)
    monkeypatch.setattr(Pipeline, "__init__", with_device(Pipeline.__init__, Full(device)))
    with pytest.raises(MergeFailed, match=rf"{1 << 60} bytes .*failed \(.*\); free") as failed:
        run(base, adapter, output=tmp_path / "merged.safetensors")
    assert "\n" not in str(failed.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter.safetensors", "base.safetensors"]


@pytest.mark.parametrize("sizes", [None, TINY], ids=["one batch", "many"])
def test_a_batch_is_one_run_of_a_group(sizes, tmp_path, monkeypatch):
    runs = []
    original = GroupedWeightPlan.run

    def counted(plan, stream, workspace, args) -> None:
        runs.append(len(plan.members))
        original(plan, stream, workspace, args)

    if sizes is not None:
        monkeypatch.setattr(merge_pipeline, "SIMULATOR_SIZES", sizes)
        monkeypatch.setattr(merge_pipeline, "GPU_SIZES", sizes)
    monkeypatch.setattr(GroupedWeightPlan, "run", counted)
    base, adapter = many_layers(tmp_path)
    report = run(base, adapter, output=tmp_path / "merged.safetensors")
    assert_merged(base, adapter, output=tmp_path / "merged.safetensors")
    assert sum(runs) == sum(report.skus.values()) == 12
    assert len(runs) == 1 if sizes is None else len(runs) > 2


def with_device(original: Callable, replacement: object) -> Callable:
    def init(self, device, *arguments, **options):
        original(self, replacement, *arguments, **options)

    return init


def test_first_failure_stops_the_crew():
    begun, released = [], threading.Event()

    def fail() -> None:
        raise MergeFailed("the first")

    def late(number: int) -> None:
        begun.append(number)
        released.wait(10)
        raise MergeFailed("a later one")

    with pytest.raises(MergeFailed, match="the first"), Crew({"a": 1, "b": 1}, lambda: None) as crew:
        other = crew.submit("b", late, 0)
        crew.submit("a", fail)
        waiting = [crew.submit("a", late, number) for number in range(1, 5)]
        released.set()
        crew.finish([*waiting, other])
    assert begun == [0]


def test_crew_waits_for_what_runs():
    done = []
    with Crew({"a": 2}, lambda: None) as crew:
        crew.finish([crew.submit("a", done.append, number) for number in range(20)])
    assert sorted(done) == list(range(20))


def test_failing_progress_stops_the_merge(tmp_path):
    base, adapter = many_layers(tmp_path)

    def stop(done: int, total: int) -> None:
        if done:
            raise RefusedInput("enough")

    with pytest.raises(RefusedInput, match="enough"):
        run(base, adapter, output=tmp_path / "merged.safetensors", progress=stop)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter.safetensors", "base.safetensors"]


INTERRUPTED = """
import os, sys
from pathlib import Path
from lycoris.errors import MergeFailed
from lycoris.merge import AdapterInput, MergeOptions, merge

folder, number = Path(sys.argv[1]), int(sys.argv[2])

def interrupt(done, total):
    if done:
        os.kill(os.getpid(), number)

try:
    merge(
        MergeOptions(folder / "base.safetensors", (AdapterInput(folder / "adapter.safetensors"),),
                     folder / "merged.safetensors", overwrite=True),
        interrupt,
    )
except (KeyboardInterrupt, MergeFailed) as error:
    print(type(error).__name__)
"""


@pytest.mark.parametrize(
    ("number", "raised"),
    [(signal.SIGINT, "KeyboardInterrupt"), (signal.SIGTERM, "MergeFailed"), (signal.SIGKILL, "")],
)
def test_interruption(number, raised, tmp_path):
    base, adapter = many_layers(tmp_path)
    output = tmp_path / "merged.safetensors"
    output.write_bytes(b"old")
    before = base.read_bytes(), adapter.read_bytes()
    command = [sys.executable, "-c", INTERRUPTED, str(tmp_path), str(int(number))]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=120)
    assert result.stdout.strip() == raised, result.stderr
    assert result.returncode == (0 if raised else -number)
    assert output.read_bytes() == b"old"
    assert (base.read_bytes(), adapter.read_bytes()) == before
    if raised:
        assert len(list(tmp_path.iterdir())) == 3
    run(base, adapter, output=output, overwrite=True)
    assert_merged(base, adapter, output=output)
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("name", KINDS)
def test_every_16_bit_pattern_is_finite_or_not(name):
    kind = KINDS[name]
    high = np.arange(1 << 16, dtype=np.uint16)
    bits = high if kind.itemsize == 2 else high.astype(np.uint32) << 16
    finite = np.isfinite(bits.view(DTYPES[name].numpy).astype(np.float32))
    for pattern, wanted in zip(bits, finite, strict=True):
        assert all_finite(pattern.reshape(1).view(np.uint8), kind) == wanted


@pytest.mark.parametrize("out", KINDS)
@pytest.mark.parametrize("name", KINDS)
def test_overflow_is_what_rounding_makes_infinite(name, out):
    kind, target = KINDS[name], KINDS[out]
    limits = np.array([1e-30, 1, 65503, 65519, 65519.996, 65520, 65536, 1e30, 3.38e38, 3.3961e38, 3.4e38], np.float32)
    patterns = limits.view(np.uint32)[:, None] + np.arange(-3, 4).astype(np.uint32)[None, :]
    with np.errstate(over="ignore"):
        values = np.concatenate([patterns.reshape(-1).view(np.float32), [np.inf, -np.inf, np.nan]]).astype(kind.values)
    values = np.concatenate([values, -values])
    wide = values.astype(np.float64)
    infinite = np.isfinite(wide) & ~np.isfinite(round_to(wide, target).astype(np.float64))
    for value, wanted in zip(values, infinite, strict=True):
        assert overflows(value.reshape(1).view(np.uint8), kind, target) == wanted, value


@pytest.mark.parametrize("out", KINDS)
@pytest.mark.parametrize("name", KINDS)
def test_what_became_infinite(name, out):
    kind, target = KINDS[name], KINDS[out]
    rows = [(1, 2, False), (np.nan, np.nan, False), (np.inf, np.nan, False), (np.inf, 3, False), (1, np.nan, True)]
    for before, after, wanted in [*rows, (-1, np.inf, True), (-1, -np.inf, True)]:
        arrays = [np.array([0, x], np.float32).astype(k.values) for x, k in ((before, kind), (after, target))]
        assert became_infinite(arrays[0].view(np.uint8), kind, arrays[1].view(np.uint8), target) == wanted


@pytest.mark.parametrize("position", [0, (1 << 18) - 1, 1 << 18, 700_000 - 1])
def test_one_value_among_many_is_found(position):
    values = np.zeros(700_000, np.float32)
    values[position] = 1e30
    assert overflows(values.view(np.uint8), KINDS["F32"], KINDS["F16"])
    assert all_finite(values.view(np.uint8), KINDS["F32"])
    values[position] = np.nan
    assert not overflows(values.view(np.uint8), KINDS["F32"], KINDS["F16"])
    assert not all_finite(values.view(np.uint8), KINDS["F32"])
