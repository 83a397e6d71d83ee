"""Names and shapes against a base: every way of writing a module's name, and every way of missing."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from crafted import base, module, read, renamed
from hypothesis import given
from hypothesis import strategies as st
from reference import expected_merge, load

from lycoris.errors import RefusedInput
from lycoris.formats import match
from lycoris.formats.names import diffusers_spelling


@dataclass(frozen=True)
class Shaped:
    shape: tuple[int, ...]


def layers(*paths, shape=(4, 6), bias=False):
    """A base's tensors."""
    tensors = {f"{path}.weight": Shaped(shape) for path in paths}
    return tensors | ({f"{path}.bias": Shaped(shape[:1]) for path in paths} if bias else {})


def weights(matching):
    return {row.module.stem: row.weight.name for row in matching.matched}


NAMES = [
    ("lora_unet_mid_block_attn1_to_q", "mid_block.attn1.to_q"),
    ("lora_unet_mid_block_attn1_to_q", "unet.mid_block.attn1.to_q"),
    ("lora_unet_mid_block_attn1_to_q", "model.diffusion_model.mid_block.attn1.to_q"),
    ("lora_unet__blocks_0_q", "blocks.0.q"),
    ("lora_transformer_blocks_0_q", "transformer.blocks.0.q"),
    ("lora_te_text_model_q_proj", "text_model.q_proj"),
    ("lora_te1_text_model_q_proj", "cond_stage_model.transformer.text_model.q_proj"),
    ("lora_te1_text_model_q_proj", "conditioner.embedders.0.transformer.text_model.q_proj"),
    ("lora_te2_text_model_q_proj", "text_encoder_2.text_model.q_proj"),
    ("lora_te3_encoder_block_0_q", "text_encoders.t5xxl.transformer.encoder.block.0.q"),
    ("lycoris_blocks_0_q", "blocks.0.q"),
    ("lycoris_blocks_0_q", "model.diffusion_model.blocks.0.q"),
    ("diffusion_model.blocks.0.q", "blocks.0.q"),
    ("diffusion_model.blocks.0.q", "model.diffusion_model.blocks.0.q"),
    ("transformer.blocks.0.q", "blocks.0.q"),
    ("transformer.blocks.0.q", "transformer.blocks.0.q"),
    ("unet.blocks.0.q", "model.diffusion_model.blocks.0.q"),
    ("text_encoder.text_model.q", "text_model.q"),
    ("blocks.0.q", "blocks.0.q"),
    ("blocks.0.q", "diffusion_model.blocks.0.q"),
    ("model.layers.0.q", "model.layers.0.q"),
]


@pytest.mark.parametrize(("stem", "layer"), NAMES)
def test_names(tmp_path, stem, layer):
    adapter = read(tmp_path, module(stem))
    assert weights(match(adapter, layers("other", layer))) == {stem: f"{layer}.weight"}


paths = st.lists(st.sampled_from(["a", "to_q", "to", "q", "0", "x_y_z", "x", "y_z", "y"]), min_size=1, max_size=4)


@given(st.lists(paths.map(".".join), min_size=1, max_size=12, unique=True), st.data())
def test_underscored_names_find_their_layer_or_are_refused(tmp_path_factory, names, data):
    chosen = data.draw(st.sampled_from(names))
    adapter = read(tmp_path_factory.mktemp("adapter"), module("lora_unet_" + chosen.replace(".", "_")))
    twins = [name for name in names if name.replace(".", "_") == chosen.replace(".", "_")]
    if len(twins) == 1:
        assert match(adapter, layers(*names)).matched[0].weight.name == f"{chosen}.weight"
    else:
        with pytest.raises(RefusedInput, match="can be"):
            match(adapter, layers(*names))


def test_a_dotted_name_is_not_ambiguous(tmp_path):
    adapter = read(tmp_path, module("unet.a_b.c"))
    assert match(adapter, layers("a.b_c", "a_b.c")).matched[0].weight.name == "a_b.c.weight"


def test_a_parameter_without_a_layer(tmp_path):
    tensors = layers("blocks.0.q") | {"blocks.0.modulation": Shaped((4, 6))}
    adapter = read(tmp_path, module("diffusion_model.blocks.0.modulation", "full"))
    assert match(adapter, tensors).matched[0].weight.name == "blocks.0.modulation"


def test_a_bias_is_no_layer(tmp_path):
    adapter = read(tmp_path, module("lora_unet_a_bias"))
    with pytest.raises(RefusedInput, match="none of its 1 modules"):
        match(adapter, layers("a", bias=True))


SGM = {
    "input_blocks.0.0": "conv_in",
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "input_blocks.1.0.in_layers.0": "down_blocks.0.resnets.0.norm1",
    "input_blocks.1.0.in_layers.2": "down_blocks.0.resnets.0.conv1",
    "input_blocks.1.0.emb_layers.1": "down_blocks.0.resnets.0.time_emb_proj",
    "input_blocks.2.0.out_layers.0": "down_blocks.0.resnets.1.norm2",
    "input_blocks.2.0.out_layers.3": "down_blocks.0.resnets.1.conv2",
    "input_blocks.3.0.op": "down_blocks.0.downsamplers.0.conv",
    "input_blocks.4.0.skip_connection": "down_blocks.1.resnets.0.conv_shortcut",
    "input_blocks.4.1.proj_in": "down_blocks.1.attentions.0.proj_in",
    "input_blocks.5.1.transformer_blocks.0.attn1.to_k": "down_blocks.1.attentions.1.transformer_blocks.0.attn1.to_k",
    "input_blocks.9.0.op": "down_blocks.2.downsamplers.0.conv",
    "middle_block.0.in_layers.2": "mid_block.resnets.0.conv1",
    "middle_block.1.transformer_blocks.9.ff.net.0.proj": "mid_block.attentions.0.transformer_blocks.9.ff.net.0.proj",
    "middle_block.2.out_layers.3": "mid_block.resnets.1.conv2",
    "output_blocks.0.0.in_layers.2": "up_blocks.0.resnets.0.conv1",
    "output_blocks.2.1.conv": "up_blocks.0.upsamplers.0.conv",
    "output_blocks.2.2.conv": "up_blocks.0.upsamplers.0.conv",
    "output_blocks.5.2.conv": "up_blocks.1.upsamplers.0.conv",
    "output_blocks.4.1.transformer_blocks.1.attn2.to_v": "up_blocks.1.attentions.1.transformer_blocks.1.attn2.to_v",
    "output_blocks.8.0.skip_connection": "up_blocks.2.resnets.2.conv_shortcut",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}


@pytest.mark.parametrize(("sgm", "diffusers"), SGM.items())
def test_the_two_spellings_of_a_unet(tmp_path, sgm, diffusers):
    kohya = "lora_unet_" + sgm.replace(".", "_")
    assert weights(match(read(tmp_path, module(kohya)), layers(diffusers))) == {kohya: f"{diffusers}.weight"}
    kohya = "lora_unet_" + diffusers.replace(".", "_")
    checkpoint = layers(f"model.diffusion_model.{sgm}", "first_stage_model.conv_in")
    assert weights(match(read(tmp_path, module(kohya)), checkpoint)) == {kohya: f"model.diffusion_model.{sgm}.weight"}
    old = f"unet.{diffusers}"
    assert weights(match(read(tmp_path, module(old)), checkpoint)) == {old: f"model.diffusion_model.{sgm}.weight"}


def test_diffusers_names_stay_as_they_are():
    for name in SGM.values():
        spelling = name.replace(".", "_")
        assert diffusers_spelling(spelling) == spelling


def test_a_bias_difference_changes_the_bias(tmp_path):
    adapter = read(
        tmp_path, module("lora_unet_a", "full", diff_b=np.ones(4)) | module("lora_unet_b", "norm", b_norm=np.ones(4))
    )
    tensors = layers("a", bias=True) | layers("b", shape=(4,), bias=True)
    assert [(row.weight.name, row.bias.name) for row in match(adapter, tensors).matched] == [
        ("a.weight", "a.bias"),
        ("b.weight", "b.bias"),
    ]


def test_a_bias_difference_beside_factors(tmp_path):
    adapter = read(tmp_path, module("lora_unet_a", alpha=1.0, diff_b=np.ones(4)))
    tensors = base(tmp_path, {"a.weight": (4, 6), "a.bias": (4,)})
    values = {name: load(entry) for name, entry in tensors.items()}
    result = expected_merge(values, match(adapter, tensors).matched, [0.5])
    np.testing.assert_allclose(result["a.bias"], values["a.bias"].astype(float) + 0.5)


@pytest.mark.parametrize(("form", "key"), [("full", "diff_b"), ("norm", "b_norm"), ("locon", "diff_b")])
def test_a_bias_difference_over_a_base_without_it(tmp_path, form, key):
    adapter = read(tmp_path, module("lora_unet_a", form, **{key: np.ones(4)}))
    with pytest.raises(RefusedInput, match=f"{key}' changes a.bias, which the base does not have"):
        match(adapter, layers("a", shape=(4,) if form == "norm" else (4, 6)))


def test_no_module_matches(tmp_path):
    tensors = module("lora_unet_a") | module("lora_unet_b") | module("lora_te_c") | module("lora_te_d")
    with pytest.raises(RefusedInput) as refusal:
        match(read(tmp_path, tensors), layers("w", "x", "y", "z"))
    message = str(refusal.value)
    assert message.startswith(f"{tmp_path}/adapter.safetensors: none of its 4 modules")
    assert sum(f"lora_{stem}" in message for stem in ("unet_a", "unet_b", "te_c", "te_d")) == 3
    assert sum(f"{name}.weight" in message for name in "wxyz") == 3


def test_an_empty_base(tmp_path):
    with pytest.raises(RefusedInput, match="the base nothing"):
        match(read(tmp_path, module("lora_unet_a")), {})


def test_some_names_match_nothing(tmp_path):
    tensors = {key: value for name in "abcde" for key, value in module(f"lora_unet_{name}").items()}
    adapter = read(tmp_path, tensors)
    with pytest.raises(
        RefusedInput,
        match=r"4 of its 5 modules .*unet: lora_unet_b, lora_unet_c, lora_unet_d, \.\.\.\).*--allow-unmatched",
    ):
        match(adapter, layers("a"))
    matching = match(adapter, layers("a"), allow_unmatched=True)
    assert weights(matching) == {"lora_unet_a": "a.weight"}
    assert matching.unmatched == {"unet": ("lora_unet_b", "lora_unet_c", "lora_unet_d", "lora_unet_e")}
    assert not matching.absent


def test_a_component_that_the_base_does_not_have(tmp_path):
    adapter = read(tmp_path, module("lora_unet_a") | module("lora_te1_b") | module("lora_te1_c") | module("lora_te2_b"))
    matching = match(adapter, layers("a"))
    assert weights(matching) == {"lora_unet_a": "a.weight"}
    assert matching.absent == {"text_encoder": ("lora_te1_b", "lora_te1_c"), "text_encoder_2": ("lora_te2_b",)}
    assert not matching.unmatched


def test_a_component_whose_names_the_base_spells_otherwise_is_not_absent(tmp_path):
    adapter = read(tmp_path, module("lora_unet_a") | module("lora_te2_text_model_encoder_layers_0_mlp_fc1"))
    checkpoint = layers("model.diffusion_model.a", "conditioner.embedders.1.model.transformer.h.0.mlp.c_fc")
    with pytest.raises(RefusedInput, match=r"1 of its 2 modules.*text_encoder_2"):
        match(adapter, checkpoint)
    assert match(adapter, checkpoint, allow_unmatched=True).unmatched.keys() == {"text_encoder_2"}


def test_a_checkpoint_of_several_components(tmp_path):
    adapter = read(tmp_path, module("lora_unet_q") | module("lora_te1_q") | module("lora_te2_q"))
    checkpoint = layers(
        "model.diffusion_model.q", "conditioner.embedders.0.transformer.q", "conditioner.embedders.1.model.q"
    )
    assert weights(match(adapter, checkpoint)) == {
        "lora_unet_q": "model.diffusion_model.q.weight",
        "lora_te1_q": "conditioner.embedders.0.transformer.q.weight",
        "lora_te2_q": "conditioner.embedders.1.model.q.weight",
    }
    with pytest.raises(RefusedInput, match="'lycoris_q' can be"):
        match(read(tmp_path, module("lycoris_q")), checkpoint)


@pytest.mark.parametrize(("width", "mine", "other"), [(4, 1, 2), (8, 2, 1)])
def test_a_bare_text_encoder_is_the_one_whose_shapes_fit(tmp_path, width, mine, other):
    tensors = module("lora_unet_z")
    for number, rows in ((1, 4), (2, 8)):
        tensors[f"lora_te{number}_q.diff"] = np.ones((rows, 6), np.float32)
        tensors[f"lora_te{number}_k.diff"] = np.ones((6, 6), np.float32)
    encoder = layers("q", shape=(width, 6)) | layers("k", shape=(6, 6))
    matching = match(read(tmp_path, tensors), encoder)
    assert weights(matching) == {f"lora_te{mine}_q": "q.weight", f"lora_te{mine}_k": "k.weight"}
    assert sorted(stem for stems in matching.absent.values() for stem in stems) == sorted(
        [f"lora_te{other}_q", f"lora_te{other}_k", "lora_unet_z"]
    )
    assert not matching.unmatched


def test_two_text_encoders_that_both_fit(tmp_path):
    with pytest.raises(RefusedInput, match=r"both change q.weight"):
        match(read(tmp_path, module("lora_te1_q") | module("lora_te2_q")), layers("q"))


def test_numbers_too_long_for_a_block(tmp_path):
    stem = f"lora_unet_input_blocks_{'9' * 5000}_0_op"
    with pytest.raises(RefusedInput, match="none of its 1 modules"):
        match(read(tmp_path, module(stem)), layers("a"))


def test_two_modules_on_one_tensor(tmp_path):
    adapter = read(tmp_path, module("lora_unet_a") | module("unet.a"))
    with pytest.raises(RefusedInput, match=r"'lora_unet_a' and 'unet.a' both change a.weight"):
        match(adapter, layers("a"))


@pytest.mark.parametrize("form", ["locon", "loha", "lokr", "full"])
@pytest.mark.parametrize("shape", [(6, 4), (4, 7), (24,), (4, 6, 3, 3), (2, 12)])
def test_factors_of_another_shape(tmp_path, form, shape):
    adapter = read(tmp_path, module("lora_unet_a", form))
    with pytest.raises(RefusedInput) as refusal:
        match(adapter, layers("a", shape=shape), allow_unmatched=True)
    for part in ("lora_unet_a", "[4, 6]", "a.weight", str(list(shape))):
        assert part in str(refusal.value)


@pytest.mark.parametrize("form", ["locon", "loha", "lokr", "full"])
@pytest.mark.parametrize("shape", [(4, 6), (4, 6, 1), (4, 6, 1, 1), (4, 6, 1, 1, 1), (4, 3, 2), (4, 1, 2, 3)])
def test_factors_that_are_flat_or_pointwise(tmp_path, form, shape):
    matching = match(read(tmp_path, module("lora_unet_a", form)), layers("a", shape=shape))
    assert len(matching.matched) == 1


@pytest.mark.parametrize(
    ("on_input", "shape", "fits"),
    [
        (0, (4, 6), True),
        (0, (6, 4), False),
        (0, (4,), True),
        (1, (6, 4), True),
        (1, (6, 4, 3, 3), True),
        (1, (4, 6), False),
        (1, (4,), False),
    ],
)
def test_ia3_lengths(tmp_path, on_input, shape, fits):
    adapter = read(tmp_path, module("lora_unet_a", "ia3", on_input=on_input))
    if fits:
        assert match(adapter, layers("a", shape=shape)).matched
    else:
        with pytest.raises(RefusedInput, match=f"scales 4 {'in' if on_input else 'out'}puts.*a.weight"):
            match(adapter, layers("a", shape=shape))


@pytest.mark.parametrize(
    ("magnitude", "fits"), [((4, 1), True), ((1, 6), True), ((4,), True), ((6,), False), ((1, 5), False)]
)
def test_dora_lengths(tmp_path, magnitude, fits):
    adapter = read(tmp_path, module("lora_unet_a", dora_scale=np.ones(magnitude)))
    if fits:
        assert match(adapter, layers("a")).matched
    else:
        with pytest.raises(RefusedInput, match="dora_scale of shape"):
            match(adapter, layers("a"))


def test_a_bias_of_another_length(tmp_path):
    adapter = read(tmp_path, module("lora_unet_a", "full", diff_b=np.ones(5)))
    with pytest.raises(RefusedInput, match=r"diff_b' has shape \[5\], a.bias of the base has shape \[4\]"):
        match(adapter, layers("a", bias=True))


def test_dora_by_columns_of_a_flat_stored_conv(tmp_path):
    tensors = {
        "lora_unet_c.hada_w1_a": np.ones((4, 2), np.float32),
        "lora_unet_c.hada_w1_b": np.ones((2, 54), np.float32),
        "lora_unet_c.hada_w2_a": np.ones((4, 2), np.float32),
        "lora_unet_c.hada_w2_b": np.ones((2, 54), np.float32),
        "lora_unet_c.dora_scale": np.ones((1, 6, 1, 1), np.float32),
    }
    conv = base(tmp_path, {"c.weight": (4, 6, 3, 3)})
    matching = match(read(tmp_path, tensors), conv)
    assert matching.matched[0].module.dora == "column"
    result = expected_merge({"c.weight": load(conv["c.weight"])}, matching.matched, [1.0])["c.weight"]
    np.testing.assert_allclose(np.sqrt((result**2).sum(axis=(0, 2, 3))), 1, rtol=1e-6)


def test_processors_of_old_diffusers_files(tmp_path):
    names = {".lora_up.weight": "_lora.up.weight", ".lora_down.weight": "_lora.down.weight"}
    adapter = read(tmp_path, renamed(module("unet.mid.attn1.processor.to_out"), names))
    assert match(adapter, layers("mid.attn1.to_out.0")).matched[0].weight.name == "mid.attn1.to_out.0.weight"
