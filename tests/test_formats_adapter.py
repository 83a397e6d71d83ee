"""What adapter files say: scales, spellings, and everything that is refused, by name."""

from __future__ import annotations

import json

import ml_dtypes
import numpy as np
import pytest
from crafted import ALGORITHM_SHAPES, module, peft_config, read, renamed, save
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lycoris.errors import RefusedInput
from lycoris.formats import describe_adapter, read_adapter
from lycoris.formats.keys import ALGORITHMS, SPELLINGS, UNSUPPORTED

STEM = "lora_unet_a"


def only(adapter):
    (row,) = adapter.modules
    return row


@pytest.mark.parametrize("form", ALGORITHM_SHAPES)
def test_algorithms(tmp_path, form):
    row = only(read(tmp_path, module(STEM, form)))
    assert (row.stem, row.path, row.component) == (STEM, "a", "unet")
    assert row.algorithm == form.split()[0]
    assert set(row.factors) == set(ALGORITHM_SHAPES[form]) - {"on_input"}
    assert row.scale == 1.0
    assert row.alpha is None
    assert row.dora is None


@pytest.mark.parametrize("form", ["locon", "locon tucker", "loha", "lokr factored"])
@pytest.mark.parametrize(("alpha", "scale"), [(1.0, 1.0), (3.0, 3.0), (0.0, None), (-2.0, -2.0)])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_alpha_over_rank(tmp_path, form, alpha, scale, shape):
    row = only(read(tmp_path, module(STEM, form, alpha=np.full(shape, alpha))))
    assert row.rank == (1 if form == "lokr factored" else 2)
    assert row.scale == (1.0 if scale is None else scale / row.rank)
    assert row.alpha == alpha


def test_rank_of_a_tucker_lokr_is_the_cores(tmp_path):
    tensors = {
        f"{STEM}.lokr_w1": np.ones((2, 2), np.float32),
        f"{STEM}.lokr_w2_a": np.ones((3, 4), np.float32),
        f"{STEM}.lokr_w2_b": np.ones((3, 5), np.float32),
        f"{STEM}.lokr_t2": np.ones((3, 3, 3, 3), np.float32),
        f"{STEM}.alpha": np.array(1.5, np.float32),
    }
    row = only(read(tmp_path, tensors))
    assert (row.rank, row.scale, row.delta_shape) == (3, 0.5, (8, 10, 3, 3))


def test_lokr_with_both_factors_full_ignores_alpha(tmp_path):
    row = only(read(tmp_path, module(STEM, "lokr", alpha=7.0)))
    assert (row.rank, row.alpha, row.scale) == (None, 7.0, 1.0)


@pytest.mark.parametrize("form", ["full", "norm", "ia3"])
def test_alpha_says_nothing_to_differences(tmp_path, form):
    assert only(read(tmp_path, module(STEM, form, alpha=7.0))).scale == 1.0


@pytest.mark.parametrize("form", ["locon", "loha", "lokr", "lokr factored"])
def test_a_trained_scalar_multiplies_the_scale(tmp_path, form):
    plain = only(read(tmp_path, module(STEM, form, alpha=3.0)))
    scaled = only(read(tmp_path, module(STEM, form, alpha=3.0, scalar=0.5)))
    assert scaled.scale == 0.5 * plain.scale
    assert "scalar" not in scaled.factors


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64, np.int64, np.bool_])
def test_scalars_of_any_number_type(tmp_path, dtype):
    tensors = module(STEM, "ia3")
    tensors[f"{STEM}.on_input"] = np.array(1, dtype)
    assert only(read(tmp_path, tensors)).on_input is True


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("key", ["alpha", "scalar"])
def test_scalars_that_are_not_finite(tmp_path, key, bad):
    with pytest.raises(RefusedInput, match=rf"key '{STEM}.{key}' is .*finite"):
        read(tmp_path, module(STEM, **{key: bad}))


def test_a_scale_that_overflows(tmp_path):
    with pytest.raises(RefusedInput, match=rf"{STEM}.*scale inf"):
        tensors = module(STEM) | {f"{STEM}.{key}": np.array(1e300) for key in ("alpha", "scalar")}
        read(tmp_path, tensors)


def test_a_scalar_with_two_elements(tmp_path):
    with pytest.raises(RefusedInput, match=r"alpha' is F32 of shape \[2\], wanted one number"):
        read(tmp_path, module(STEM, alpha=np.ones(2)))


@pytest.mark.parametrize(
    ("shape", "axis"), [((4, 1), "row"), ((1, 6), "column"), ((4,), "row")], ids=["row", "column", "flat"]
)
@pytest.mark.parametrize("form", ["locon", "loha", "lokr"])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_dora(tmp_path, form, shape, axis, dtype):
    tensors = module(STEM, form)
    tensors[f"{STEM}.dora_scale"] = np.ones(shape, dtype)
    row = only(read(tmp_path, tensors))
    assert row.dora == axis


PAIRS = [
    (".lora_up.weight", ".lora_down.weight"),
    (".lora_B.weight", ".lora_A.weight"),
    (".lora_B.default.weight", ".lora_A.default.weight"),
    (".lora_B", ".lora_A"),
    (".lora.up.weight", ".lora.down.weight"),
    ("_lora.up.weight", "_lora.down.weight"),
    (".lora_linear_layer.up.weight", ".lora_linear_layer.down.weight"),
]


@pytest.mark.parametrize("pair", PAIRS)
def test_lora_spellings(tmp_path, pair):
    names = dict(zip((".lora_up.weight", ".lora_down.weight"), pair, strict=True))
    row = only(read(tmp_path, renamed(module("diffusion_model.blocks.0.q"), names)))
    assert (row.stem, row.path) == ("diffusion_model.blocks.0.q", "blocks.0.q")
    assert row.factors["lora_up.weight"].shape == (4, 2)
    assert row.factors["lora_down.weight"].shape == (2, 6)


@pytest.mark.parametrize(
    ("stem", "path"),
    [
        ("unet.mid.attn1.processor.to_q", "mid.attn1.to_q"),
        ("unet.mid.attn1.processor.to_out", "mid.attn1.to_out.0"),
        ("text_encoder.text_model.encoder.layers.0.self_attn.to_q", "text_model.encoder.layers.0.self_attn.q_proj"),
        (
            "text_encoder.text_model.encoder.layers.0.self_attn.to_out",
            "text_model.encoder.layers.0.self_attn.out_proj",
        ),
    ],
)
def test_attention_processors_are_the_layers_they_changed(tmp_path, stem, path):
    names = {".lora_up.weight": "_lora.up.weight", ".lora_down.weight": "_lora.down.weight"}
    assert only(read(tmp_path, renamed(module(stem), names))).path == path


@pytest.mark.parametrize(
    ("stem", "format_name", "component", "path"),
    [
        ("lora_unet_x_y", "kohya", "unet", "x_y"),
        ("lora_unet__x_y", "kohya", "unet", "x_y"),
        ("lora_transformer_x_y", "kohya", "transformer", "x_y"),
        ("lora_te_x_y", "kohya", "text_encoder", "x_y"),
        ("lora_te1_x_y", "kohya", "text_encoder", "x_y"),
        ("lora_te2_x_y", "kohya", "text_encoder_2", "x_y"),
        ("lora_te3_x_y", "kohya", "text_encoder_3", "x_y"),
        ("lycoris_x_y", "lycoris", None, "x_y"),
        ("diffusion_model.x.y", "comfyui", "unet", "x.y"),
        ("model.diffusion_model.x.y", "comfyui", "unet", "x.y"),
        ("text_encoders.t5xxl.transformer.x.y", "comfyui", "text_encoder_3", "x.y"),
        ("unet.x.y", "diffusers", "unet", "x.y"),
        ("transformer.x.y", "diffusers", "transformer", "x.y"),
        ("text_encoder_2.x.y", "diffusers", "text_encoder_2", "x.y"),
        ("x.y", "diffusers", None, "x.y"),
    ],
)
def test_prefixes(tmp_path, stem, format_name, component, path):
    adapter = read(tmp_path, module(stem))
    assert adapter.format == format_name
    assert (only(adapter).component, only(adapter).path) == (component, path)


UNSUPPORTED_MODULES = {
    "glora": {"a1.weight": (4, 2), "a2.weight": (2, 6), "b1.weight": (4, 2), "b2.weight": (2, 6), "alpha": ()},
    "diag-oft": {"oft_blocks": (2, 2, 2), "alpha": ()},
    "boft": {"oft_blocks": (2, 2, 2, 2), "rescale": (4, 1), "alpha": ()},
    "tlora": {"q_layer.weight": (2, 6), "p_layer.weight": (4, 2), "lambda_layer": (1, 2), "alpha": ()},
    "oft": {"oft_R.weight": (2, 2)},
    "sparse bias": {"bias_indices": (2, 3), "bias_values": (3,), "bias_size": (2,)},
    "adalora": {"lora_A": (2, 6), "lora_B": (4, 2), "lora_E": (2, 1)},
    "ia3 of PEFT": {"ia3_l": (4, 1)},
    "lora_bias": {"lora_B.bias": (4,)},
    "modules_to_save": {"weight": (4, 6)},
    "set_weight": {"set_weight": (4, 6)},
    "save_embedding_layers": {"base_layer.weight": (4, 6)},
    "trainable_token_indices": {"token_adapter.trainable_tokens_delta": (4, 6)},
    "lokr_t1": {"lokr_t1": (2, 2)},
}


@pytest.mark.parametrize("name", UNSUPPORTED_MODULES)
def test_what_is_not_supported_is_named(tmp_path, name):
    tensors = {f"m.{key}": np.ones(shape, np.float32) for key, shape in UNSUPPORTED_MODULES[name].items()}
    with pytest.raises(RefusedInput, match=rf"adapter\.safetensors.*{name}\b.*locon, loha, lokr, full, norm, ia3"):
        read(tmp_path, tensors)


@pytest.mark.parametrize("end", UNSUPPORTED)
def test_every_unsupported_key_is_refused_by_its_name(tmp_path, end):
    tensors = module(STEM) | {f"m{end}": np.ones((2, 2), np.float32)}
    with pytest.raises(RefusedInput) as refusal:
        read(tmp_path, tensors)
    assert f"'m{end}'" in str(refusal.value)
    assert UNSUPPORTED[end] in str(refusal.value)


@pytest.mark.parametrize("key", ["prompt_embeddings", ".lora_up.weight", "bundle_emb.x.y", ""])
def test_a_key_of_no_adapter(tmp_path, key):
    with pytest.raises(RefusedInput, match="belongs to no adapter"):
        read(tmp_path, {key: np.ones((2, 2), np.float32)})


FORMS = [(name, form) for name, row in ALGORITHMS.items() for form in row.forms]


@pytest.mark.parametrize(
    ("name", "form"), FORMS, ids=lambda value: value if isinstance(value, str) else "+".join(sorted(value))
)
def test_a_missing_factor_is_named(tmp_path, name, form):
    for missing in form:
        rest = form - {missing}
        if not rest or rest in ALGORITHMS[name].forms:
            continue
        tensors = {f"{STEM}.{factor}": np.ones((2, 2), np.float32) for factor in rest | {"alpha"}}
        tensors[f"{STEM}.alpha"] = np.array(1, np.float32)
        with pytest.raises(RefusedInput) as refusal:
            read(tmp_path, tensors)
        assert STEM in str(refusal.value)
        if missing != "on_input":
            assert f"{missing} is missing" in str(refusal.value)


def test_two_algorithms_on_one_module(tmp_path):
    with pytest.raises(RefusedInput, match=r"two algorithms.*locon \(lora_down.weight, lora_up.weight\) and loha"):
        read(tmp_path, module(STEM, "locon") | module(STEM, "loha"))


def test_a_factor_both_full_and_factored(tmp_path):
    with pytest.raises(RefusedInput, match=r"lokr_w1 does not belong there|lokr_w1_[ab] does not belong there"):
        read(tmp_path, module(STEM, "lokr factored") | {f"{STEM}.lokr_w1": np.ones((2, 2), np.float32)})


def test_one_factor_spelled_twice(tmp_path):
    extra = {f"{STEM}.lora_B.weight": np.ones((4, 2), np.float32)}
    with pytest.raises(RefusedInput, match=r"lora_B.weight' and .*lora_up.weight' are the same factor"):
        read(tmp_path, extra | module(STEM))


@pytest.mark.parametrize("key", ["alpha", "dora_scale", "diff_b", "b_norm"])
def test_nothing_but_extras(tmp_path, key):
    with pytest.raises(RefusedInput, match=f"{STEM}.*only {key}"):
        read(tmp_path, {f"{STEM}.{key}": np.ones((), np.float32)})


@pytest.mark.parametrize(
    ("form", "key"), [("full", "dora_scale"), ("ia3", "scalar"), ("norm", "diff_b"), ("full", "b_norm")]
)
def test_extras_of_another_algorithm(tmp_path, form, key):
    with pytest.raises(RefusedInput, match=f"{key} does not belong there"):
        read(tmp_path, module(STEM, form, **{key: np.ones(4)}))


def test_rank_zero(tmp_path):
    tensors = {
        f"{STEM}.lora_up.weight": np.ones((4, 0), np.float32),
        f"{STEM}.lora_down.weight": np.ones((0, 6), np.float32),
    }
    with pytest.raises(RefusedInput, match=rf"{STEM}.*lora_up.weight \[4, 0\] has rank 0"):
        read(tmp_path, tensors)


@pytest.mark.parametrize("dtype", [np.float64, np.int8, ml_dtypes.float8_e4m3fn])
def test_a_factor_of_another_type(tmp_path, dtype):
    tensors = module(STEM)
    tensors[f"{STEM}.lora_up.weight"] = np.ones((4, 2), dtype)
    with pytest.raises(RefusedInput, match=r"lora_up.weight' has dtype \w+, wanted one of BF16, F16, F32"):
        read(tmp_path, tensors)


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(RefusedInput, match=r"none\.safetensors"):
        read_adapter(tmp_path / "none.safetensors")
    with pytest.raises(RefusedInput, match=r"holds 0 .safetensors files"):
        read_adapter(tmp_path)


def test_a_folder_with_several_files(tmp_path):
    for name in ("b", "a"):
        save(tmp_path / f"{name}.safetensors", module(STEM))
    with pytest.raises(RefusedInput, match=r"holds 2 .safetensors files \(a.safetensors, b.safetensors\)"):
        read_adapter(tmp_path)


def test_an_empty_file(tmp_path):
    with pytest.raises(RefusedInput, match="holds no tensors"):
        read(tmp_path, {})


METADATA = {
    "lora_adapter_metadata": json.dumps(
        {f"transformer.{key}": value for key, value in peft_config(alpha_pattern={"b": 1}).items()}
    )
}


def test_diffusers_metadata_holds_for_its_component(tmp_path):
    tensors = module("transformer.a") | module("transformer.x.b") | module("text_encoder.a")
    scales = {row.stem: row.scale for row in read(tmp_path, tensors, METADATA).modules}
    assert scales == {"transformer.a": 2.0, "transformer.x.b": 0.5, "text_encoder.a": 1.0}


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("no json", "JSON"),
        ("[]", "list"),
        (json.dumps(peft_config(r=None)), "r is None"),
        (json.dumps(peft_config(r=3)), "rank 2, .* says 3"),
        (json.dumps(peft_config(use_dora=True)), "magnitude"),
    ],
)
def test_bad_metadata(tmp_path, text, fault):
    with pytest.raises(RefusedInput, match=f"adapter.safetensors.*{fault}"):
        read(tmp_path, module("a"), {"lora_adapter_metadata": text})


def test_metadata_and_an_alpha(tmp_path):
    with pytest.raises(RefusedInput, match=r"transformer.a.*alpha.*lora_adapter_metadata"):
        read(tmp_path, module("transformer.a", alpha=1.0), METADATA)


def test_description_is_json(tmp_path):
    tensors = module("lora_unet_a", alpha=1.0) | module("lora_te_b", "lokr") | module("lora_unet_c", "ia3")
    tensors["lora_unet_d.hada_w1_a"] = np.ones((4, 2), np.float16)
    tensors |= {f"lora_unet_d.{name}": np.ones(shape, np.float32) for name, shape in ALGORITHM_SHAPES["loha"].items()}
    description = describe_adapter(read(tmp_path, tensors))
    assert json.loads(json.dumps(description, allow_nan=False)) == description
    assert description["format"] == "kohya"
    assert description["components"] == {"unet": 3, "text_encoder": 1}
    assert description["algorithms"] == {"locon": 1, "lokr": 1, "ia3": 1, "loha": 1}
    assert (description["ranks"], description["alphas"]) == ([2], [1.0])
    row = next(row for row in description["modules"] if row["name"] == "lora_unet_a")
    assert (row["rank"], row["scale"], row["delta_shape"]) == (2, 0.5, [4, 6])
    assert row["factors"]["lora_up.weight"] == {"dtype": "F32", "shape": [4, 2]}


names = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12)


@given(
    st.dictionaries(st.tuples(names, st.sampled_from([*SPELLINGS, *UNSUPPORTED, ""])), st.integers(0, 4), max_size=6)
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_keys_are_read_or_refused_in_one_line(tmp_path, keys):
    tensors = {stem + end: np.ones((2,) * ndim, np.float32) for (stem, end), ndim in keys.items() if stem + end}
    tensors.pop("__metadata__", None)
    save(tmp_path, tensors)
    try:
        adapter = read_adapter(tmp_path)
    except RefusedInput as refusal:
        assert "adapter.safetensors" in str(refusal)
        assert len(str(refusal).splitlines()) == 1
    else:
        assert sum(len(row.factors) for row in adapter.modules) <= len(tensors)
