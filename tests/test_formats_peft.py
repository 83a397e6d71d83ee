"""PEFT configurations: scales, patterns, transposed weights, and the options that are refused."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from crafted import PEFT_SPELLING, base, module, peft_config, renamed, save_peft
from reference import expected_merge, load
from safetensors.numpy import save_file

from lycoris.errors import RefusedInput
from lycoris.formats import match, read_adapter
from lycoris.formats.peft import REFUSED_OPTIONS, parse_config

PREFIX = "base_model.model."


def lora(path="model.q", rank=2, rows=4, columns=6, **extra):
    rng = np.random.default_rng(2)
    tensors = {
        f"{PREFIX}{path}.lora_A.weight": rng.standard_normal((rank, columns)).astype(np.float32),
        f"{PREFIX}{path}.lora_B.weight": rng.standard_normal((rows, rank)).astype(np.float32),
    }
    return tensors | {f"{PREFIX}{path}.{name}": value for name, value in extra.items()}


def scale(tmp_path, tensors, **options):
    (row,) = read_adapter(save_peft(tmp_path, tensors, **options)).modules
    return row.scale


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, 2.0),
        ({"lora_alpha": 1}, 0.5),
        ({"lora_alpha": 0}, 0.0),
        ({"use_rslora": True}, 4 / math.sqrt(2)),
        ({"alpha_pattern": {"q": 6}}, 3.0),
        ({"alpha_pattern": {"model.q": 6}}, 3.0),
        ({"alpha_pattern": {".*q": 6, "q": 8}}, 3.0),
        ({"alpha_pattern": {"del.q": 6}}, 2.0),
        ({"alpha_pattern": {"^model\\.[qk]": 6}}, 3.0),
        ({"alpha_pattern": {"k": 6}}, 2.0),
        ({"r": 8, "rank_pattern": {"q": 2}}, 2.0),
        ({"r": 8, "rank_pattern": {"q": 2}, "alpha_pattern": {"q": 1}, "use_rslora": True}, 1 / math.sqrt(2)),
    ],
)
def test_scales(tmp_path, options, wanted):
    assert scale(tmp_path, lora(), **options) == wanted


def test_lokr_with_both_factors_full_still_scales(tmp_path):
    tensors = {PREFIX + key: value for key, value in module("q", "lokr").items()}
    assert scale(tmp_path, tensors, peft_type="LOKR", alpha=3, r=2) == 1.5


def test_the_file_reads_its_configuration_beside_it(tmp_path):
    folder = save_peft(tmp_path, lora())
    (row,) = read_adapter(folder / "adapter_model.safetensors").modules
    assert (row.path, row.component, row.alpha, row.scale) == ("model.q", None, 4.0, 2.0)


def test_names_without_the_prefix(tmp_path):
    assert scale(tmp_path, {key.removeprefix(PREFIX): value for key, value in lora().items()}) == 2.0


def test_a_configuration_beside_another_format_is_not_its_own(tmp_path):
    save_peft(tmp_path, lora())
    save_file(module("lora_unet_a"), tmp_path / "kohya.safetensors")
    assert read_adapter(tmp_path / "kohya.safetensors").modules[0].scale == 1.0


def test_no_configuration(tmp_path):
    save_file(lora(), tmp_path / "adapter_model.safetensors")
    with pytest.raises(RefusedInput, match=r"model.q.*adapter_config.json"):
        read_adapter(tmp_path)


def test_alphas_of_its_own_do_without_a_configuration(tmp_path):
    save_file(lora(alpha=np.array(1, np.float32)), tmp_path / "adapter.safetensors")
    assert read_adapter(tmp_path).modules[0].scale == 0.5


def test_no_weights(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps(peft_config()))
    with pytest.raises(RefusedInput, match=r"no adapter_model.safetensors"):
        read_adapter(tmp_path)


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"peft_type": "VERA"}, "peft_type 'VERA' is not supported; give one of LORA, LOHA, LOKR"),
        ({"peft_type": "IA3"}, "peft_type 'IA3'"),
        ({"peft_type": None}, "peft_type None"),
        ({"peft_type": ["LORA"]}, "peft_type"),
        ({"peft_type": "LOHA", "alpha": 1}, "holds locon, .* says loha"),
        ({"r": 0}, "r is 0"),
        ({"r": "2"}, "r is '2'"),
        ({"r": True}, "r is True"),
        ({"r": 10**400}, "r is 1"),
        ({"r": 3}, "rank 2, .* says 3"),
        ({"lora_alpha": None}, "lora_alpha is None"),
        ({"lora_alpha": math.nan}, "NaN is not JSON"),
        ({"lora_alpha": 10**400}, "lora_alpha is 1"),
        ({"alpha_pattern": {"(": 1}}, "alpha_pattern '\\(' is no regular expression"),
        ({"alpha_pattern": [1]}, "alpha_pattern is \\[1\\]"),
        ({"rank_pattern": {"q": -1}}, "rank_pattern\\['q'\\] is -1"),
        ({"use_dora": True}, "has no magnitude vector"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
        ({"init_lora_weights": "pissa_niter_16"}, "init_lora_weights"),
        ({"init_lora_weights": "olora"}, "init_lora_weights"),
        *(({option: ["x"]}, f"{option} is set") for option in REFUSED_OPTIONS),
    ],
)
def test_refused_options(tmp_path, options, fault):
    save_peft(tmp_path, lora(), **options)
    with pytest.raises(RefusedInput, match=fault) as refusal:
        read_adapter(tmp_path)
    assert "adapter" in str(refusal.value)


@pytest.mark.parametrize("value", [False, None, [], {}, ""])
def test_options_that_are_off(value):
    parse_config(peft_config(**dict.fromkeys(REFUSED_OPTIONS, value)), "config")


@pytest.mark.parametrize("value", [True, False, "gaussian", "eva", "orthogonal"])
def test_initialisers_that_leave_the_base_alone(value):
    parse_config(peft_config(init_lora_weights=value), "config")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"r": 2, "r": 3}', "\x00"])
def test_a_damaged_configuration(tmp_path, text):
    save_peft(tmp_path, lora())
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(RefusedInput, match=r"adapter_config.json"):
        read_adapter(tmp_path)


def test_an_alpha_beside_the_configuration(tmp_path):
    with pytest.raises(RefusedInput, match=r"alpha.*adapter_config.json"):
        scale(tmp_path, lora(alpha=np.array(1, np.float32)))


@pytest.mark.parametrize("end", ["", ".weight", ".default.weight"])
@pytest.mark.parametrize("shape", [(4,), (1, 4, 1, 1)])
def test_magnitude_vectors_are_norms_of_rows(tmp_path, end, shape):
    tensors = lora(**{f"lora_magnitude_vector{end}": np.ones(shape, np.float32)})
    (row,) = read_adapter(save_peft(tmp_path, tensors, use_dora=True)).modules
    assert row.dora == "row"
    assert row.factors["dora_scale"].shape == shape


def test_a_magnitude_vector_that_the_configuration_denies(tmp_path):
    with pytest.raises(RefusedInput, match="has a magnitude vector"):
        scale(tmp_path, lora(lora_magnitude_vector=np.ones(4, np.float32)))


def merged(tmp_path, folder, shapes):
    tensors = base(tmp_path, shapes)
    matching = match(read_adapter(folder), tensors)
    values = {name: load(entry) for name, entry in tensors.items()}
    return values, expected_merge(values, matching.matched, [1.0] * len(matching.matched)), matching


def test_embeddings(tmp_path):
    tensors = renamed(
        lora("model.embed", rows=4, columns=6),
        {".lora_A.weight": ".lora_embedding_A", ".lora_B.weight": ".lora_embedding_B"},
    )
    values, result, matching = merged(tmp_path, save_peft(tmp_path, tensors), {"model.embed.weight": (6, 4)})
    up, down = (tensors[f"{PREFIX}model.embed.lora_embedding_{name}"].astype(np.float64) for name in "BA")
    assert matching.matched[0].module.transposed
    np.testing.assert_allclose(result["model.embed.weight"], values["model.embed.weight"] + 2.0 * (up @ down).T)


@pytest.mark.parametrize(("rows", "columns"), [(4, 6), (4, 4)])
def test_fan_in_fan_out(tmp_path, rows, columns):
    tensors = lora("h.c_attn", rows=rows, columns=columns)
    folder = save_peft(tmp_path, tensors, fan_in_fan_out=True)
    values, result, _ = merged(tmp_path, folder, {"h.c_attn.weight": (columns, rows)})
    up, down = (tensors[f"{PREFIX}h.c_attn.lora_{name}.weight"].astype(np.float64) for name in "BA")
    np.testing.assert_allclose(result["h.c_attn.weight"], values["h.c_attn.weight"] + 2.0 * (up @ down).T)


@pytest.mark.parametrize("shape", [(5, 4), (6, 5), (6, 2, 2), (24,)])
def test_fan_in_fan_out_over_another_shape(tmp_path, shape):
    adapter = read_adapter(save_peft(tmp_path, lora("h.c_attn"), fan_in_fan_out=True))
    with pytest.raises(RefusedInput, match=r"h.c_attn.*make \[4, 6\] transposed"):
        match(adapter, base(tmp_path, {"h.c_attn.weight": shape}))


def test_a_linear_layer_beside_conv1d(tmp_path):
    tensors = lora("h.c_attn") | lora("lm_head", rows=8)
    folder = save_peft(tmp_path, tensors, fan_in_fan_out=True)
    shapes = {"h.c_attn.weight": (6, 4), "lm_head.weight": (8, 6)}
    _, _, matching = merged(tmp_path, folder, shapes)
    assert {row.weight.name: row.module.transposed for row in matching.matched} == {
        "h.c_attn.weight": True,
        "lm_head.weight": False,
    }


def test_dora_over_a_transposed_weight(tmp_path):
    tensors = lora(lora_magnitude_vector=np.ones(4, np.float32))
    with pytest.raises(RefusedInput, match="DoRA over a transposed weight"):
        scale(tmp_path, tensors, use_dora=True, fan_in_fan_out=True)


def test_peft_spelling_of_a_conv(tmp_path):
    tensors = {PREFIX + key: value for key, value in renamed(module("c", "locon"), PEFT_SPELLING).items()}
    tensors[f"{PREFIX}c.lora_A.weight"] = np.ones((2, 6, 3, 3), np.float32)
    tensors[f"{PREFIX}c.lora_B.weight"] = np.ones((4, 2, 1, 1), np.float32)
    values, result, _ = merged(tmp_path, save_peft(tmp_path, tensors), {"c.weight": (4, 6, 3, 3)})
    np.testing.assert_allclose(result["c.weight"], values["c.weight"] + 2.0 * 2.0, rtol=1e-6)
