"""What a merge makes: algorithms, types, shapes, several adapters, strengths, conversions, folders, the report."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from crafted import ALGORITHM_SHAPES, module, save_peft
from golden import assert_golden
from hypothesis import given, settings
from hypothesis import strategies as st
from merging import assert_merged, read_all, run, write
from reference import expected_merge
from safetensors_files import snapshot, two_shards, write_shards

from lycoris.checkpoint import Checkpoint
from lycoris.errors import RefusedInput
from lycoris.formats import match, read_adapter

BF16, F16, F32 = ml_dtypes.bfloat16, np.float16, np.float32
FLOATS = {"bf16": BF16, "fp16": F16, "fp32": F32}
SHAPES = {"locon tucker": (4, 6, 3, 3), "norm": (4,)}


def random(shape: tuple[int, ...], dtype=F32, seed: int = 1, size: float = 1.0) -> np.ndarray:
    return (size * np.random.default_rng(seed).standard_normal(shape)).astype(dtype)


def base_file(folder: Path, dtype=BF16, algorithm: str = "locon", **others: np.ndarray) -> Path:
    """A base with one layer `a.b` for `module("lora_unet_a_b", algorithm)`, and tensors besides."""
    shape = SHAPES.get(algorithm, (4, 6))
    tensors = {"first": random((3,), dtype, 5), "a.b.weight": random(shape, dtype), **others, "last": np.arange(3)}
    return write(folder / "base.safetensors", tensors, {"format": "pt"})


def adapter_file(folder: Path, algorithm: str = "locon", name: str = "adapter", dtype=None, **extra) -> Path:
    tensors = module("lora_unet_a_b", algorithm, **extra)
    return write(folder / f"{name}.safetensors", {k: v.astype(dtype or v.dtype) for k, v in tensors.items()})


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "merged.safetensors"


@pytest.mark.parametrize("dtype", FLOATS.values(), ids=FLOATS)
@pytest.mark.parametrize("algorithm", ALGORITHM_SHAPES)
def test_algorithms(algorithm, dtype, tmp_path, output):
    base = base_file(tmp_path, dtype, algorithm)
    adapter = adapter_file(tmp_path, algorithm)
    report = run(base, (adapter, 0.75), output=output)
    assert_merged(base, (adapter, 0.75), output=output)
    assert report.modules == {algorithm.split()[0]: 1}
    assert report.tensors_changed == 1


@pytest.mark.parametrize("factors", FLOATS.values(), ids=FLOATS)
@pytest.mark.parametrize("dtype", FLOATS.values(), ids=FLOATS)
def test_factor_types(factors, dtype, tmp_path, output):
    base = base_file(tmp_path, dtype)
    adapter = adapter_file(tmp_path, "loha", dtype=factors)
    run(base, adapter, output=output)
    assert_merged(base, adapter, output=output)


@pytest.mark.parametrize("rank", [1, 5])
@pytest.mark.parametrize(
    "shape", [(1, 1), (1, 17), (17, 1), (13, 31), (33, 65), (5, 3, 1, 1), (7, 5, 3), (3, 2, 2, 3, 2)]
)
def test_shapes(shape, rank, tmp_path, output):
    base = write(tmp_path / "base.safetensors", {"a.b.weight": random(shape, BF16)})
    factors = {"lora_up.weight": random((shape[0], rank)), "lora_down.weight": random((rank, *shape[1:]), seed=2)}
    adapter = write(tmp_path / "a.safetensors", {f"lora_unet_a_b.{key}": value for key, value in factors.items()})
    run(base, adapter, output=output)
    assert_merged(base, adapter, output=output)


def test_empty_weight_is_kept(tmp_path, output):
    base = write(tmp_path / "base.safetensors", {"a.b.weight": random((0, 6), BF16), "a.c.weight": random((4, 6))})
    factors = {"lora_up.weight": random((0, 2)), "lora_down.weight": random((2, 6))}
    adapter = write(tmp_path / "a.safetensors", {f"lora_unet_a_b.{key}": value for key, value in factors.items()})
    report = run(base, adapter, output=output)
    assert output.read_bytes() == base.read_bytes()
    assert report.tensors_changed == 0


@pytest.mark.parametrize("algorithm", ["full", "norm", "locon"])
def test_biases(algorithm, tmp_path, output):
    base = base_file(tmp_path, BF16, algorithm, **{"a.b.bias": random((4,), F16)})
    key = "b_norm" if algorithm == "norm" else "diff_b"
    adapter = adapter_file(tmp_path, algorithm, **{key: random((4,), seed=3), "alpha": 1.0})
    report = run(base, (adapter, -0.5), output=output)
    assert_merged(base, (adapter, -0.5), output=output)
    assert report.tensors_changed == 2


@pytest.mark.parametrize("strength", [0.0, 0.3, 1.0, -2.0])
@pytest.mark.parametrize("norms", [(4, 1), (1, 6)], ids=["row", "column"])
def test_dora(norms, strength, tmp_path, output):
    base = base_file(tmp_path, BF16)
    adapter = adapter_file(tmp_path, dora_scale=np.abs(random(norms, seed=4)), diff_b=random((4,)), alpha=1.0)
    bias = base_file(tmp_path, BF16, **{"a.b.bias": random((4,), BF16)})
    run(bias, (adapter, strength), output=output)
    merged = assert_merged(bias, (adapter, strength), output=output)
    assert (merged["a.b.weight"].tobytes() == read_all(base)["a.b.weight"].tobytes()) == (strength == 0)


@pytest.mark.parametrize("names", [("lora_embedding_B", "lora_embedding_A"), ("lora_B.weight", "lora_A.weight")])
def test_transposed_weights(names, tmp_path, output):
    base = write(tmp_path / "base.safetensors", {"emb.weight": random((13, 5), BF16)})
    up, down = (f"base_model.model.emb.{name}" for name in names)
    folder = tmp_path / "adapter"
    folder.mkdir()
    save_peft(folder, {up: random((5, 2)), down: random((2, 13), seed=2)}, fan_in_fan_out="embedding" not in names[0])
    run(base, folder, output=output)
    assert_merged(base, folder, output=output)


def test_several_adapters_are_added_before_the_one_rounding(tmp_path, output):
    base = base_file(tmp_path, BF16, **{"a.b.bias": random((4,), BF16)})
    adapters = [
        (adapter_file(tmp_path, "locon", "one", diff_b=random((4,), seed=7)), 0.5),
        (adapter_file(tmp_path, "lokr", "two", dtype=F16), -1.5),
        (adapter_file(tmp_path, "full", "three", dtype=BF16, diff_b=random((4,), seed=8)), 0.25),
        (adapter_file(tmp_path, "ia3", "four"), 1.0),
    ]
    for order in (adapters, adapters[::-1]):
        run(base, *order, output=output, overwrite=True)
        assert_merged(base, *adapters, output=output)


def test_one_adapter_twice_is_one_of_twice_the_strength(tmp_path, output):
    base, adapter = base_file(tmp_path, F32), adapter_file(tmp_path)
    run(base, adapter, adapter, output=output)
    assert_merged(base, (adapter, 2.0), output=output)


@settings(max_examples=15)
@given(
    st.lists(st.tuples(st.sampled_from(["locon", "loha", "lokr", "lokr factored", "full", "ia3"]), st.floats(-4, 4)),
             min_size=1, max_size=4),
    st.sampled_from(sorted(FLOATS)), st.sampled_from(sorted(FLOATS)), st.integers(0, 1000),
)  # fmt: skip
def test_any_adapters_in_any_order(given_adapters, dtype, factors, seed):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = write(folder / "base.safetensors", {"a.b.weight": random((4, 6), FLOATS[dtype], seed)})
        adapters = [
            (adapter_file(folder, algorithm, f"adapter{number}", FLOATS[factors]), strength)
            for number, (algorithm, strength) in enumerate(given_adapters)
        ]
        for order in (adapters, adapters[::-1]):
            run(base, *order, output=folder / "merged.safetensors", overwrite=True)
            assert_merged(base, *adapters, output=folder / "merged.safetensors")


@pytest.mark.parametrize("algorithm", ["locon", "full", "ia3"])
def test_strength_0_keeps_every_bit(algorithm, tmp_path, output):
    weight = random((4, 6), BF16)
    weight[0, :4] = [-0.0, np.nan, np.inf, -np.inf]
    base = write(tmp_path / "base.safetensors", {"a.b.weight": weight})
    report = run(base, (adapter_file(tmp_path, algorithm), 0.0), output=output)
    assert output.read_bytes() == base.read_bytes()
    assert report.tensors_changed == 0
    assert report.modules == {algorithm: 1}


def test_strength_0_leaves_other_adapters_alone(tmp_path, output):
    base = base_file(tmp_path)
    one, two = adapter_file(tmp_path, name="one"), adapter_file(tmp_path, dora_scale=random((4, 1)), name="two")
    run(base, one, (two, 0.0), output=output)
    assert_merged(base, one, output=output)


@pytest.mark.parametrize("dtype", ["keep", "fp32"])
def test_what_is_not_finite_in_the_base_stays_so(dtype, tmp_path, output):
    weight = random((4, 6), BF16)
    weight[1, :3] = [np.nan, np.inf, -np.inf]
    base = write(tmp_path / "base.safetensors", {"first": random((5,), BF16), "a.b.weight": weight})
    adapter = adapter_file(tmp_path)
    run(base, adapter, output=output, dtype=dtype)
    merged = read_all(output)["a.b.weight"].astype(F32)
    np.testing.assert_array_equal(merged[1, :3], np.array([np.nan, np.inf, -np.inf], F32))
    assert np.isfinite(np.delete(merged.reshape(-1), [6, 7, 8])).all()
    with pytest.raises(RefusedInput, match="not finite"):
        run(base, (adapter, 1e38), (adapter, 3e38), output=tmp_path / "other.safetensors", dtype=dtype)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("algorithm", ["locon", "full"])
def test_conversion(algorithm, dtype, tmp_path, output):
    others = {f"other.{name}": random((11, 3), kind, 6, 100.0) for name, kind in FLOATS.items()}
    layers = {f"{name}.weight": random((4, 6), kind) for name, kind in FLOATS.items()}
    kept = {"ids": np.arange(3), "small": random((2, 2), ml_dtypes.float8_e4m3fn), "wide": random((3,), np.float64)}
    base = write(tmp_path / "base.safetensors", others | layers | {"none": np.zeros((0, 3), F32)} | kept)
    tensors = {key: value for name in FLOATS for key, value in module(f"lora_unet_{name}", algorithm).items()}
    adapter = write(tmp_path / "adapter.safetensors", tensors)
    report = run(base, adapter, output=output, dtype=dtype)
    assert_merged(base, adapter, output=output, dtype=dtype)
    assert report.tensors_changed == 3
    assert report.bytes_written == sum(array.nbytes for array in read_all(output).values())


def test_conversion_rounds_once(tmp_path, output):
    # W + dW = 1 + 2^-8 + 2^-20: up in bf16. Rounded to the base's fp16 before, it would be a tie, and go down.
    base = write(tmp_path / "base.safetensors", {"a.b.weight": np.ones((4, 6), F16)})
    adapter = write(tmp_path / "a.safetensors", {"lora_unet_a_b.diff": np.full((4, 6), 2.0**-8 + 2.0**-20, F32)})
    run(base, adapter, output=output, dtype="bf16")
    assert set(read_all(output)["a.b.weight"].astype(F32).reshape(-1)) == {1 + 2.0**-7}


def test_conversion_keeps_infinities(tmp_path, output):
    other = np.array([np.inf, -np.inf, np.nan, 65519.0], F32)
    base = base_file(tmp_path, F32, other=other)
    run(base, adapter_file(tmp_path), output=output, dtype="fp16")
    np.testing.assert_array_equal(read_all(output)["other"], np.array([np.inf, -np.inf, np.nan, 65504], F16))


def sharded(folder: Path) -> tuple[Path, Path]:
    """A checkpoint in two shards with layers in both, and an adapter for them."""
    index = write_shards(
        folder / "base",
        {
            "model-00001-of-00002.safetensors": {"a.b.weight": random((4, 6), BF16), "n.weight": random((4,), F32)},
            "model-00002-of-00002.safetensors": {"a.c.weight": random((4, 6), F32, 2), "ids": np.arange(5)},
        },
    )
    (folder / "base" / "config.json").write_text("{}\n")
    tensors = module("lora_unet_a_b") | module("lora_unet_a_c", "lokr")
    return index, write(folder / "adapter.safetensors", tensors)


@pytest.mark.parametrize("as_folder", [False, True], ids=["index", "folder"])
def test_shards(as_folder, tmp_path):
    index, adapter = sharded(tmp_path)
    base = index.parent if as_folder else index
    before = snapshot(index.parent)
    report = run(base, adapter, output=tmp_path / "merged")
    assert_merged(index, adapter, output=tmp_path / "merged" / index.name)
    written = snapshot(tmp_path / "merged")
    assert written.keys() == before.keys() - (set() if as_folder else {"config.json"})
    assert written[index.name] == before[index.name]
    assert snapshot(index.parent) == before
    assert report.tensors_changed == 2


def test_shards_of_another_type(tmp_path):
    index, adapter = sharded(tmp_path)
    run(index, adapter, output=tmp_path / "merged", dtype="fp32")
    assert_merged(index, adapter, output=tmp_path / "merged" / index.name, dtype="fp32")
    total = json.loads((tmp_path / "merged" / index.name).read_text())["metadata"]["total_size"]
    assert total == sum(array.nbytes for array in read_all(tmp_path / "merged").values())


def test_component_that_the_base_does_not_have(tmp_path, output):
    tensors = module("lora_unet_a_b") | module("lora_te1_x") | module("lora_te1_y")
    adapter = write(tmp_path / "adapter.safetensors", tensors)
    base = base_file(tmp_path)
    report = run(base, adapter, output=output)
    assert_merged(base, adapter, output=output)
    assert report.unmatched == {"text_encoder": 2}
    assert report.modules == {"locon": 1}


def test_allow_unmatched(tmp_path, output):
    adapter = write(tmp_path / "adapter.safetensors", module("lora_unet_a_b") | module("lora_unet_a_x"))
    base = base_file(tmp_path)
    report = run(base, adapter, output=output, allow_unmatched=True)
    assert_merged(base, adapter, output=output)
    assert report.unmatched == {"unmatched in unet": 1}
    assert report.modules == {"locon": 1}


def test_report(tmp_path, output):
    tensors = module("lora_unet_a_b", alpha=1.0) | module("lora_unet_a_c", "lokr") | module("lora_unet_a_d", "loha")
    layers = {f"a.{name}.weight": random((4, 6), BF16) for name in "cd"}
    base = base_file(tmp_path, **layers)
    adapter = write(tmp_path / "adapter.safetensors", tensors)
    report = run(base, adapter, output=output)
    data = sum(array.nbytes for array in read_all(base).values())
    factors = sum(array.nbytes for name, array in tensors.items() if not name.endswith("alpha"))
    assert report.modules == {"locon": 1, "lokr": 1, "loha": 1}
    assert report.ranks == {2: 2}
    assert (report.tensors, report.tensors_changed, report.unmatched) == (5, 3, {})
    assert (report.bytes_read, report.bytes_written) == (data + factors, data)
    assert list(report.phases) == ["plan", "device", "kernels", "stream", "publish"]
    assert 0 < sum(report.phases.values()) <= report.seconds
    assert report.output == str(output)
    assert not report.dry_run
    assert sum(report.skus.values()) == 3


def test_dry_run_reports_and_writes_nothing(tmp_path, output):
    base, adapter = base_file(tmp_path), adapter_file(tmp_path)
    before = snapshot(tmp_path)
    dry = run(base, adapter, output=output, dry_run=True)
    assert snapshot(tmp_path) == before
    wet = run(base, adapter, output=output)
    assert (dry.dry_run, dry.bytes_written, list(dry.phases)) == (True, 0, ["plan", "device"])
    for name in ("device", "modules", "ranks", "tensors", "tensors_changed", "unmatched", "output", "skus"):
        assert getattr(dry, name) == getattr(wet, name), name


def test_progress_ends_at_the_total(tmp_path, output):
    seen: list[tuple[int, int]] = []
    base = base_file(tmp_path)
    report = run(base, adapter_file(tmp_path), output=output, progress=lambda *step: seen.append(step))
    done = [step[0] for step in seen]
    assert done == sorted(done)
    assert {total for _, total in seen} == {report.bytes_written}
    assert (done[0], done[-1]) == (0, report.bytes_written)


def test_overwrite(tmp_path, output):
    base, adapter = base_file(tmp_path), adapter_file(tmp_path)
    output.write_bytes(b"old")
    run(base, adapter, output=output, overwrite=True)
    assert_merged(base, adapter, output=output)


def test_values_between_two_adapters_signs(tmp_path, output):
    """Two large changes that cancel leave the base: nothing is rounded in between."""
    base = base_file(tmp_path, BF16)
    adapter = adapter_file(tmp_path, "full")
    run(base, (adapter, 1024.0), (adapter, -1024.0), output=output)
    assert_merged(base, (adapter, 0.0), output=output)


def test_a_folder_of_files_not_of_the_checkpoint(tmp_path):
    index = two_shards(tmp_path / "base")
    with Checkpoint.open(index) as checkpoint:
        weight = next(name for name, entry in checkpoint.tensors.items() if entry.dtype == "BF16")
    shape = read_all(index)[weight].shape
    stem = "lycoris_" + weight.removesuffix(".weight").replace(".", "_")
    adapter = write(tmp_path / "adapter.safetensors", {f"{stem}.diff": random(shape)})
    run(index.parent, adapter, output=tmp_path / "merged")
    exact = expected_merge(read_all(index), match(read_adapter(adapter), checkpoint.tensors).matched, [1.0])
    assert_golden(read_all(tmp_path / "merged")[weight], exact[weight], read_all(index)[weight], BF16)
    assert (tmp_path / "merged" / "config.json").read_bytes() == b"{}\n"
