"""Names of other families of checkpoints: what they stand for, one way and the other, up to merged files."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from merging import assert_merged, read_all, run, write
from safetensors_files import write_shards

from lycoris.checkpoint import Checkpoint
from lycoris.errors import RefusedInput
from lycoris.formats import Place, Rows, match, read_adapter
from lycoris.formats.aliases import ALIASES, NUMBER, Alias
from lycoris.merge import jobs as merge_jobs
from lycoris.merge import pipeline as merge_pipeline
from lycoris.merge.batches import ALIGNMENT
from lycoris.merge.pipeline import Sizes

BF16, F32 = ml_dtypes.bfloat16, np.float32
COLUMNS = 6
TINY = Sizes(readers=2, writers=2, block_bytes=ALIGNMENT, batch_bytes=4 * ALIGNMENT)


def random(shape, dtype=F32, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def numbered(name: str) -> str:
    return name.replace(NUMBER, "7")


def rows_of(alias: Alias) -> int:
    """Rows of a whole that the row of the table holds for."""
    return alias.chunks * COLUMNS if alias.chunks else 2 * sum(alias.shares)


def weight_name(layer: str) -> str:
    """The tensor of a layer; some of the table's names are parameters' own."""
    is_parameter = layer.endswith(("in_proj_weight", ".scale", "positional_embedding")) or layer == "text_projection"
    return layer if is_parameter else f"{layer}.weight"


def heights(alias: Alias) -> list[int]:
    unit = rows_of(alias) // sum(alias.shares)
    return [unit * share for share in alias.shares]


def full(path: str, diffs: dict[str, np.ndarray]):
    return write(path, {f"transformer.{layer}.diff": diff for layer, diff in diffs.items()})


def laid_out(alias: Alias, parts: list[np.ndarray]) -> np.ndarray:
    """What the whole is, where the other family has `parts`."""
    joined = np.concatenate(parts)
    if alias.swapped:
        joined = np.concatenate(np.split(joined, 2)[::-1])
    return joined.T if alias.transposed else joined


def ids(alias: Alias) -> str:
    return f"{alias.whole}-{alias.chunks}"


@pytest.mark.parametrize("underscored", [False, True], ids=["dotted", "underscored"])
@pytest.mark.parametrize("alias", ALIASES, ids=ids)
def test_parts_of_a_whole(alias, underscored, tmp_path):
    parts = [random((height, COLUMNS), seed=seed) for seed, height in enumerate(heights(alias))]
    whole = laid_out(alias, parts)
    base = write(tmp_path / "base.safetensors", {weight_name(numbered(alias.whole)): np.zeros_like(whole)})
    names = [numbered(name) for name in alias.parts]
    stems = [f"lora_unet_{name.replace('.', '_')}" if underscored else f"transformer.{name}" for name in names]
    adapter = write(tmp_path / "a.safetensors", {f"{stem}.diff": diff for stem, diff in zip(stems, parts, strict=True)})
    run(base, adapter, output=tmp_path / "merged.safetensors")
    (merged,) = read_all(tmp_path / "merged.safetensors").values()
    assert merged.tobytes() == np.ascontiguousarray(whole).tobytes()


@pytest.mark.parametrize("alias", [alias for alias in ALIASES if not alias.transposed], ids=ids)
def test_a_whole_over_its_parts(alias, tmp_path):
    parts = [random((height, COLUMNS), seed=seed) for seed, height in enumerate(heights(alias))]
    layers = [f"{numbered(name)}.weight" for name in alias.parts]
    base = write(
        tmp_path / "base.safetensors",
        {name: np.zeros_like(part) for name, part in zip(layers, parts, strict=True)},
    )
    adapter = full(tmp_path / "a.safetensors", {numbered(alias.whole): laid_out(alias, parts)})
    run(base, adapter, output=tmp_path / "merged.safetensors")
    merged = read_all(tmp_path / "merged.safetensors")
    for name, part in zip(layers, parts, strict=True):
        np.testing.assert_array_equal(merged[name], part)


def matched(base, adapter) -> dict[str, Place]:
    with Checkpoint.open(base) as checkpoint:
        return {row.module.stem: row.weight for row in match(read_adapter(adapter), checkpoint.tensors).matched}


def test_a_projection_that_transformers_stores_is_not_transposed(tmp_path):
    base = write(tmp_path / "base.safetensors", {"text_projection.weight": random((4, 6))})
    adapter = write(tmp_path / "a.safetensors", {"lora_te2_text_projection.diff": random((4, 6))})
    assert matched(base, adapter)["lora_te2_text_projection"] == Place((Rows("text_projection.weight", 0, 4),), (4, 6))


def test_own_names_come_before_other_families(tmp_path):
    """A UNet's `proj_out` is its own, whatever else it could be."""
    tensors = {"proj_out.weight": random((4, 6)), "final_layer.linear.weight": random((4, 6))}
    base = write(tmp_path / "base.safetensors", tensors)
    adapter = write(tmp_path / "a.safetensors", {"transformer.proj_out.diff": random((4, 6))})
    assert matched(base, adapter)["transformer.proj_out"].name == "proj_out.weight"


@pytest.mark.parametrize("rows", [7, 14, 21])
def test_shares_of_single_blocks(rows, tmp_path):
    base = write(tmp_path / "base.safetensors", {"single_blocks.0.linear1.weight": random((rows, 2))})
    stem = "transformer.single_transformer_blocks.0.proj_mlp"
    adapter = write(tmp_path / "a.safetensors", {f"{stem}.diff": random((rows // 7 * 4, 2))})
    run_of_rows = Rows("single_blocks.0.linear1.weight", rows // 7 * 3, rows // 7 * 4)
    assert matched(base, adapter) == {stem: Place((run_of_rows,), (rows // 7 * 4, 2))}


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("single_blocks.0.linear1", (8, 2)),
        ("double_blocks.0.img_attn.qkv", (10, 2)),
        ("double_blocks.0.img_attn.qkv", ()),
    ],
)
def test_rows_that_do_not_divide_have_no_parts(name, shape, tmp_path):
    base = write(tmp_path / "base.safetensors", {f"{name}.weight": random(shape), "other.weight": random((2, 2))})
    stems = ("transformer_blocks.0.attn.to_q", "other")
    adapter = full(tmp_path / "a.safetensors", {stem: random((2, 2)) for stem in stems})
    with pytest.raises(RefusedInput, match="1 of its 2 modules match nothing"):
        matched(base, adapter)


def test_a_part_of_the_wrong_height(tmp_path):
    base = write(tmp_path / "base.safetensors", {"double_blocks.0.img_attn.qkv.weight": random((12, 4))})
    adapter = write(tmp_path / "a.safetensors", {"transformer.transformer_blocks.0.attn.to_k.diff": random((5, 4))})
    with pytest.raises(RefusedInput, match=r"make \[5, 4\], double_blocks.0.img_attn.qkv.weight .* \[4, 4\]; give"):
        matched(base, adapter)


def test_parts_without_their_neighbours_are_no_whole(tmp_path):
    names = ("transformer_blocks.0.attn.to_q.weight", "transformer_blocks.0.attn.to_v.weight")
    base = write(tmp_path / "base.safetensors", {name: random((4, 4)) for name in names})
    adapter = write(tmp_path / "a.safetensors", {"lora_unet_double_blocks_0_img_attn_qkv.diff": random((12, 4))})
    with pytest.raises(RefusedInput, match="none of its 1 modules"):
        matched(base, adapter)


def test_a_whole_and_its_part_in_one_file(tmp_path):
    base = write(tmp_path / "base.safetensors", {"double_blocks.0.img_attn.qkv.weight": random((12, 4))})
    stems = {"double_blocks.0.img_attn.qkv": 12, "transformer_blocks.0.attn.to_k": 4}
    adapter = full(tmp_path / "a.safetensors", {stem: random((rows, 4)) for stem, rows in stems.items()})
    with pytest.raises(RefusedInput, match=r"both change double_blocks.0.img_attn.qkv.weight of the base, wanted one;"):
        matched(base, adapter)


FUSED = "double_blocks.0.img_attn.qkv"
SPLIT = tuple(f"transformer_blocks.0.attn.to_{letter}" for letter in "qkv")
ROWS, WIDTH = 8, 12  # of one of the three


def fused_base(folder, dtype=BF16, **others):
    tensors = {"first": random((5,), dtype), f"{FUSED}.weight": random((3 * ROWS, WIDTH), dtype, 1)}
    return write(folder / "base.safetensors", {**tensors, f"{FUSED}.bias": random((3 * ROWS,), dtype, 2), **others})


def split_base(folder, dtypes=(BF16, BF16, BF16)):
    tensors = {"first": random((5,), BF16)}
    for seed, (name, dtype) in enumerate(zip(SPLIT, dtypes, strict=True)):
        tensors |= {f"{name}.weight": random((ROWS, WIDTH), dtype, seed), f"{name}.bias": random((ROWS,), dtype, seed)}
    return write(folder / "base.safetensors", tensors)


def factors(algorithm: str, rows: int, seed: int = 0) -> dict[str, np.ndarray]:
    """A module over a [rows, WIDTH] weight."""
    shapes = {
        "locon": {"lora_up.weight": (rows, 3), "lora_down.weight": (3, WIDTH)},
        "loha": {"hada_w1_a": (rows, 2), "hada_w1_b": (2, WIDTH), "hada_w2_a": (rows, 2), "hada_w2_b": (2, WIDTH)},
        "lokr": {"lokr_w1": (rows // 4, 3), "lokr_w2": (4, WIDTH // 3)},
        "lokr factored": {
            **{"lokr_w1_a": (2, 2), "lokr_w1_b": (2, 3)},
            **{"lokr_w2_a": (rows // 2, 2), "lokr_w2_b": (2, WIDTH // 3)},
        },
        "full": {"diff": (rows, WIDTH), "diff_b": (rows,)},
        "ia3": {"weight": (rows,), "on_input": ()},
        "ia3 input": {"weight": (WIDTH,), "on_input": ()},
        "dora row": {"lora_up.weight": (rows, 3), "lora_down.weight": (3, WIDTH), "dora_scale": (rows, 1)},
        "dora column": {"lora_up.weight": (rows, 3), "lora_down.weight": (3, WIDTH), "dora_scale": (1, WIDTH)},
        "locon bias": {"lora_up.weight": (rows, 3), "lora_down.weight": (3, WIDTH), "diff_b": (rows,)},
    }[algorithm]
    made = {name: random(shape, seed=seed + number) for number, (name, shape) in enumerate(shapes.items())}
    if "on_input" in made:
        made["on_input"] = np.float32(algorithm == "ia3 input")
    if "dora_scale" in made:
        made["dora_scale"] = np.abs(made["dora_scale"])
    return made


ALGORITHMS = (
    *("locon", "loha", "lokr", "lokr factored", "full", "ia3", "ia3 input"),
    *("dora row", "dora column", "locon bias"),
)


def adapter_file(path, stems: dict[str, int], algorithm: str, seed: int = 0):
    tensors = {}
    for number, (stem, rows) in enumerate(stems.items()):
        tensors |= {f"{stem}.{key}": value for key, value in factors(algorithm, rows, seed + 10 * number).items()}
    return write(path, tensors)


@pytest.fixture
def output(tmp_path):
    return tmp_path / "merged.safetensors"


@pytest.mark.parametrize("dtype", ["keep", "fp32"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_part_merges_into_its_rows(algorithm, dtype, tmp_path, output):
    base = fused_base(tmp_path)
    adapter = adapter_file(tmp_path / "a.safetensors", {f"transformer.{SPLIT[1]}": ROWS}, algorithm)
    report = run(base, (adapter, 0.5), output=output, dtype=dtype)
    merged = assert_merged(base, (adapter, 0.5), output=output, dtype=dtype)
    assert report.tensors_changed == (2 if algorithm in ("full", "locon bias") else 1)
    before, after = read_all(base)[f"{FUSED}.weight"], merged[f"{FUSED}.weight"]
    others = [*range(ROWS), *range(2 * ROWS, 3 * ROWS)]
    np.testing.assert_array_equal(after[others].astype(F32), before[others].astype(F32))
    assert (after[ROWS : 2 * ROWS].astype(F32) != before[ROWS : 2 * ROWS].astype(F32)).any()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_all_parts_merge_into_one_weight(algorithm, tmp_path, output):
    base = fused_base(tmp_path)
    adapter = adapter_file(tmp_path / "a.safetensors", {f"transformer.{name}": ROWS for name in SPLIT}, algorithm)
    report = run(base, adapter, output=output)
    assert_merged(base, adapter, output=output)
    assert sum(report.modules.values()) == 3


@pytest.mark.parametrize("dtype", ["keep", "fp32"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_whole_merges_into_its_parts(algorithm, dtype, tmp_path, output):
    """LoKr and DoRA by columns included, which no cut of their factors would make."""
    base = split_base(tmp_path)
    adapter = adapter_file(tmp_path / "a.safetensors", {f"lora_unet_{FUSED.replace('.', '_')}": 3 * ROWS}, algorithm)
    report = run(base, (adapter, 0.5), output=output, dtype=dtype)
    assert_merged(base, (adapter, 0.5), output=output, dtype=dtype)
    assert report.tensors_changed == (6 if algorithm in ("full", "locon bias") else 3)


@pytest.mark.parametrize("stored", [fused_base, split_base], ids=["fused", "split"])
@pytest.mark.parametrize("part", ["locon", "loha", "lokr", "full", "ia3 input"])
@pytest.mark.parametrize("whole", ["locon", "loha", "lokr", "full", "ia3", "locon bias"])
def test_adapters_of_both_namings_are_rounded_once(whole, part, stored, tmp_path, output):
    base = stored(tmp_path)
    first = adapter_file(tmp_path / "a.safetensors", {f"lora_unet_{FUSED.replace('.', '_')}": 3 * ROWS}, whole)
    second = adapter_file(tmp_path / "b.safetensors", {f"transformer.{name}": ROWS for name in SPLIT[1:]}, part, 50)
    run(base, (first, 0.7), (second, -0.4), output=output)
    assert_merged(base, (first, 0.7), (second, -0.4), output=output)


def test_a_whole_over_parts_of_several_types(tmp_path, output):
    base = split_base(tmp_path, (BF16, F32, BF16))
    adapter = adapter_file(tmp_path / "a.safetensors", {f"transformer.{FUSED}": 3 * ROWS}, "full")
    run(base, adapter, output=output)
    assert_merged(base, adapter, output=output)


@pytest.mark.parametrize(
    ("whole", "reason"),
    [
        ("lokr factored", "lokr factors cannot be cut at its rows"),
        ("dora row", "DoRA holds for all of its rows together"),
    ],
)
def test_what_cannot_be_cut_is_refused(whole, reason, tmp_path, output):
    base = fused_base(tmp_path)
    first = adapter_file(tmp_path / "a.safetensors", {f"transformer.{FUSED}": 3 * ROWS}, whole)
    second = adapter_file(tmp_path / "b.safetensors", {f"transformer.{SPLIT[1]}": ROWS}, "locon")
    with pytest.raises(RefusedInput, match=f"a.safetensors: module .*{FUSED}.*{reason}.*; merge"):
        run(base, first, second, output=output)
    assert not output.exists()


def test_types_that_a_dora_cannot_span_are_refused(tmp_path, output):
    base = split_base(tmp_path, (BF16, F32, BF16))
    adapter = adapter_file(tmp_path / "a.safetensors", {f"transformer.{FUSED}": 3 * ROWS}, "dora row")
    with pytest.raises(RefusedInput, match=r"stores them in several dtypes.*; convert the base"):
        run(base, adapter, output=output)


def test_a_result_that_is_not_finite_names_its_tensor(tmp_path, output):
    base = split_base(tmp_path, (np.float16,) * 3)
    diff = np.zeros((3 * ROWS, WIDTH), F32)
    diff[ROWS + 1, 3] = 70000
    adapter = full(tmp_path / "a.safetensors", {FUSED: diff})
    with pytest.raises(RefusedInput, match=f"makes values in '{SPLIT[1]}.weight' that are not finite in float16"):
        run(base, adapter, output=output)


def test_the_second_text_encoder_of_a_single_file(tmp_path, output):
    """OpenCLIP's in_proj_weight and in_proj_bias, kohya's names."""
    prefix = "conditioner.embedders.1.model.transformer.resblocks.3"
    tensors = {
        f"{prefix}.attn.in_proj_weight": random((3 * ROWS, WIDTH), BF16, 1),
        f"{prefix}.attn.in_proj_bias": random((3 * ROWS,), BF16, 2),
        f"{prefix}.attn.out_proj.weight": random((WIDTH, WIDTH), BF16, 3),
        f"{prefix}.attn.out_proj.bias": random((WIDTH,), BF16, 4),
        f"{prefix}.mlp.c_fc.weight": random((2 * ROWS, WIDTH), BF16, 5),
        "conditioner.embedders.0.transformer.text_model.encoder.layers.3.mlp.fc1.weight": random((2, 2), BF16),
        "model.diffusion_model.out.2.weight": random((2, 2), BF16),
    }
    base = write(tmp_path / "base.safetensors", tensors)
    layers = {"self_attn_q_proj": ROWS, "self_attn_v_proj": ROWS, "self_attn_out_proj": WIDTH, "mlp_fc1": 2 * ROWS}
    stems = {f"lora_te2_text_model_encoder_layers_3_{layer}": rows for layer, rows in layers.items()}
    adapter = adapter_file(tmp_path / "a.safetensors", {k: stems[k] for k in list(stems)[:3]}, "locon bias")
    other = adapter_file(tmp_path / "b.safetensors", {k: stems[k] for k in list(stems)[3:]}, "loha")
    report = run(base, adapter, (other, 0.3), output=output)
    assert_merged(base, adapter, (other, 0.3), output=output)
    assert not report.unmatched
    assert report.tensors_changed == 5


def test_parts_in_different_shards(tmp_path):
    """One job reads from both files and writes to both; the shards stay as they were otherwise."""
    tensors = list(read_all(split_base(tmp_path)).items())
    index = write_shards(tmp_path / "base", {"a.safetensors": dict(tensors[:4]), "b.safetensors": dict(tensors[4:])})
    adapter = adapter_file(tmp_path / "a.safetensors", {f"transformer.{FUSED}": 3 * ROWS}, "lokr")
    run(index, adapter, output=tmp_path / "merged")
    (merged,) = (tmp_path / "merged").glob("*.json")
    assert_merged(index, adapter, output=merged)


@pytest.mark.parametrize("slots", [1, 2])
@pytest.mark.parametrize("stored", [fused_base, split_base], ids=["fused", "split"])
def test_windows_that_cut_through_parts(stored, slots, tmp_path, output, monkeypatch):
    """Blocks of 256 bytes, and parts of 192: every window, piece and gap has its turn."""
    monkeypatch.setattr(merge_pipeline, "SIMULATOR_SIZES", TINY)
    monkeypatch.setattr(merge_pipeline, "GPU_SIZES", TINY)
    monkeypatch.setattr(merge_pipeline, "MAX_SLOTS", slots)
    monkeypatch.setattr(merge_jobs, "PIECE_ELEMENTS", 40)
    base = stored(tmp_path)
    whole = adapter_file(tmp_path / "a.safetensors", {f"transformer.{FUSED}": 3 * ROWS}, "full")
    part = adapter_file(tmp_path / "b.safetensors", {f"transformer.{SPLIT[1]}": ROWS}, "loha", 50)
    run(base, whole, output=output, dtype="fp32")
    assert_merged(base, whole, output=output, dtype="fp32")
    run(base, part, whole, output=output, overwrite=True)
    assert_merged(base, part, whole, output=output)
