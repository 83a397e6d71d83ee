"""Whole models in two families' names: an adapter for every weight of the one covers every row of the other, once.

Layers are listed as the models' own code has them, not from the table that is tested: Flux.1 and Flux.2 (Black Forest
Labs' `model.py`, diffusers `FluxTransformer2DModel` and `Flux2Transformer2DModel`), SD3.5 (Stability `mmditx.py`,
diffusers `SD3Transformer2DModel`), CLIP (open_clip `transformer.py`, transformers `CLIPTextModelWithProjection`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from merging import write

from lycoris.formats import match, read_adapter

WIDTH, BLOCKS = 4, 2  # of the models here: hidden size and blocks of each kind

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Shaped:
    shape: tuple[int, ...]


def blocks(prefix: str, layers: Shapes) -> Shapes:
    return {f"{prefix}.{number}.{name}": shape for number in range(BLOCKS) for name, shape in layers.items()}


def linears(names: str, rows: int, columns: int = 1) -> Shapes:
    """Layers of `rows` x `columns` times the width."""
    return dict.fromkeys(names.split(), (rows * WIDTH, columns * WIDTH))


def norms(names: str) -> Shapes:
    return dict.fromkeys(names.split(), (WIDTH,))


EMBEDDERS = linears("timestep_embedder.linear_1 timestep_embedder.linear_2", 1)
POOLED = linears("text_embedder.linear_1 text_embedder.linear_2", 1)

FLUX_SINGLE_FILE = {
    **linears("img_in txt_in time_in.in_layer time_in.out_layer vector_in.in_layer vector_in.out_layer", 1),
    **linears("guidance_in.in_layer guidance_in.out_layer", 1),
    **linears("final_layer.linear", 3),
    **linears("final_layer.adaLN_modulation.1", 2),
    **blocks(
        "double_blocks",
        {
            **linears("img_mod.lin txt_mod.lin", 6),
            **linears("img_attn.qkv txt_attn.qkv", 3),
            **linears("img_attn.proj txt_attn.proj", 1),
            **linears("img_mlp.0 txt_mlp.0", 4),
            **linears("img_mlp.2 txt_mlp.2", 1, 4),
            **norms("img_attn.norm.query_norm.scale img_attn.norm.key_norm.scale"),
            **norms("txt_attn.norm.query_norm.scale txt_attn.norm.key_norm.scale"),
        },
    ),
    **blocks(
        "single_blocks",
        {
            **linears("modulation.lin", 3),
            **linears("linear1", 7),
            **linears("linear2", 1, 5),
            **norms("norm.query_norm.scale norm.key_norm.scale"),
        },
    ),
}

DOUBLE = {
    **linears("norm1.linear norm1_context.linear", 6),
    **linears("attn.to_q attn.to_k attn.to_v attn.add_q_proj attn.add_k_proj attn.add_v_proj", 1),
    **linears("attn.to_out.0 attn.to_add_out", 1),
    **linears("ff.net.0.proj ff_context.net.0.proj", 4),
    **linears("ff.net.2 ff_context.net.2", 1, 4),
    **norms("attn.norm_q attn.norm_k attn.norm_added_q attn.norm_added_k"),
}

FLUX_DIFFUSERS = {
    **linears("x_embedder context_embedder", 1),
    **{f"time_text_embed.{name}": shape for name, shape in (EMBEDDERS | POOLED).items()},
    **linears("time_text_embed.guidance_embedder.linear_1 time_text_embed.guidance_embedder.linear_2", 1),
    **linears("proj_out", 3),
    **linears("norm_out.linear", 2),
    **blocks("transformer_blocks", DOUBLE),
    **blocks(
        "single_transformer_blocks",
        {
            **linears("norm.linear", 3),
            **linears("attn.to_q attn.to_k attn.to_v", 1),
            **linears("proj_mlp", 4),
            **linears("proj_out", 1, 5),
            **norms("attn.norm_q attn.norm_k"),
        },
    ),
}

FLUX2_SINGLE_FILE = {
    **linears("img_in txt_in time_in.in_layer time_in.out_layer guidance_in.in_layer guidance_in.out_layer", 1),
    **linears("double_stream_modulation_img.lin double_stream_modulation_txt.lin", 6),
    **linears("single_stream_modulation.lin final_layer.linear", 3),
    **linears("final_layer.adaLN_modulation.1", 2),
    **blocks(
        "double_blocks",
        {
            **linears("img_attn.qkv txt_attn.qkv", 3),
            **linears("img_attn.proj txt_attn.proj", 1),
            **linears("img_mlp.0 txt_mlp.0", 6),
            **linears("img_mlp.2 txt_mlp.2", 1, 3),
            **norms("img_attn.norm.query_norm.scale img_attn.norm.key_norm.scale"),
            **norms("txt_attn.norm.query_norm.scale txt_attn.norm.key_norm.scale"),
        },
    ),
    **blocks(
        "single_blocks",
        {**linears("linear1", 9), **linears("linear2", 1, 4), **norms("norm.query_norm.scale norm.key_norm.scale")},
    ),
}

FLUX2_DIFFUSERS = {
    **linears("x_embedder context_embedder", 1),
    **{f"time_guidance_embed.{name}": shape for name, shape in EMBEDDERS.items()},
    **linears("time_guidance_embed.guidance_embedder.linear_1 time_guidance_embed.guidance_embedder.linear_2", 1),
    **linears("double_stream_modulation_img.linear double_stream_modulation_txt.linear", 6),
    **linears("single_stream_modulation.linear proj_out", 3),
    **linears("norm_out.linear", 2),
    **blocks(
        "transformer_blocks",
        {
            **linears("attn.to_q attn.to_k attn.to_v attn.add_q_proj attn.add_k_proj attn.add_v_proj", 1),
            **linears("attn.to_out.0 attn.to_add_out", 1),
            **linears("ff.linear_in ff_context.linear_in", 6),
            **linears("ff.linear_out ff_context.linear_out", 1, 3),
            **norms("attn.norm_q attn.norm_k attn.norm_added_q attn.norm_added_k"),
        },
    ),
    **blocks(
        "single_transformer_blocks",
        {**linears("attn.to_qkv_mlp_proj", 9), **linears("attn.to_out", 1, 4), **norms("attn.norm_q attn.norm_k")},
    ),
}

# The last block's context has neither an attention output nor an MLP, and two chunks of modulation for six.
LAST = f"{BLOCKS - 1}"

SD3_SINGLE_FILE = {
    **{"x_embedder.proj": (WIDTH, 4, 2, 2)},
    **linears("context_embedder t_embedder.mlp.0 t_embedder.mlp.2 y_embedder.mlp.0 y_embedder.mlp.2", 1),
    **linears("final_layer.linear", 3),
    **linears("final_layer.adaLN_modulation.1", 2),
    **blocks(
        "joint_blocks",
        {
            **linears("x_block.adaLN_modulation.1", 9),
            **linears("context_block.adaLN_modulation.1", 6),
            **linears("x_block.attn.qkv x_block.attn2.qkv context_block.attn.qkv", 3),
            **linears("x_block.attn.proj x_block.attn2.proj context_block.attn.proj", 1),
            **linears("x_block.mlp.fc1 context_block.mlp.fc1", 4),
            **linears("x_block.mlp.fc2 context_block.mlp.fc2", 1, 4),
            **norms("x_block.attn.ln_q x_block.attn.ln_k x_block.attn2.ln_q x_block.attn2.ln_k"),
            **norms("context_block.attn.ln_q context_block.attn.ln_k"),
        },
    ),
    f"joint_blocks.{LAST}.context_block.adaLN_modulation.1": (2 * WIDTH, WIDTH),
}

SD3_DIFFUSERS = {
    **{"pos_embed.proj": (WIDTH, 4, 2, 2)},
    **linears("context_embedder", 1),
    **{f"time_text_embed.{name}": shape for name, shape in (EMBEDDERS | POOLED).items()},
    **linears("proj_out", 3),
    **linears("norm_out.linear", 2),
    **blocks(
        "transformer_blocks",
        {
            **DOUBLE,
            **linears("norm1.linear", 9),
            **linears("attn2.to_q attn2.to_k attn2.to_v attn2.to_out.0", 1),
            **norms("attn2.norm_q attn2.norm_k"),
        },
    ),
    f"transformer_blocks.{LAST}.norm1_context.linear": (2 * WIDTH, WIDTH),
}
for _name in ("attn.proj", "mlp.fc1", "mlp.fc2"):
    del SD3_SINGLE_FILE[f"joint_blocks.{LAST}.context_block.{_name}"]
for _name in ("attn.to_add_out", "ff_context.net.0.proj", "ff_context.net.2"):
    del SD3_DIFFUSERS[f"transformer_blocks.{LAST}.{_name}"]

OPEN_CLIP = {
    **{"token_embedding": (30, WIDTH), "positional_embedding": (7, WIDTH), "text_projection": (WIDTH, 2 * WIDTH)},
    **norms("ln_final"),
    **blocks(
        "transformer.resblocks",
        {
            **linears("attn.in_proj_weight", 3),
            **linears("attn.out_proj", 1),
            **linears("mlp.c_fc", 4),
            **linears("mlp.c_proj", 1, 4),
            **norms("ln_1 ln_2"),
        },
    ),
}

CLIP = {
    "text_model.embeddings.token_embedding": (30, WIDTH),
    "text_model.embeddings.position_embedding": (7, WIDTH),
    "text_projection": (2 * WIDTH, WIDTH),
    **norms("text_model.final_layer_norm"),
    **blocks(
        "text_model.encoder.layers",
        {
            **linears("self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.out_proj", 1),
            **linears("mlp.fc1", 4),
            **linears("mlp.fc2", 1, 4),
            **norms("layer_norm1 layer_norm2"),
        },
    ),
}

PARAMETERS = (".scale", "in_proj_weight", "positional_embedding")


def tensors(model: Shapes, prefix: str) -> dict[str, Shaped]:
    """A base: layers have weights and biases, parameters neither."""
    found = {}
    for name, shape in model.items():
        is_parameter = name.endswith(PARAMETERS) or (name == "text_projection" and model is OPEN_CLIP)
        found[f"{prefix}{name}" if is_parameter else f"{prefix}{name}.weight"] = Shaped(shape)
    return found


def adapter(folder, model: Shapes, prefix: str, underscored: bool):
    """A full difference for every weight and parameter."""
    stems = {name.replace(".", "_") if underscored else name: shape for name, shape in model.items()}
    diffs = {f"{prefix}{stem}.diff": np.zeros(shape, np.float32) for stem, shape in stems.items()}
    return read_adapter(write(folder / "a.safetensors", diffs))


FLUX, SD3 = (FLUX_SINGLE_FILE, FLUX_DIFFUSERS), (SD3_SINGLE_FILE, SD3_DIFFUSERS)
FLUX2 = (FLUX2_SINGLE_FILE, FLUX2_DIFFUSERS)
SDXL_SECOND = "conditioner.embedders.1.model."
CASES = {
    "diffusers Flux over a single file": (FLUX[1], "transformer.", False, FLUX[0], "model.diffusion_model."),
    "SimpleTuner Flux over a single file": (FLUX[1], "lycoris_", True, FLUX[0], ""),
    "PEFT-like Flux over a single file": (FLUX[1], "", False, FLUX[0], "model.diffusion_model."),
    "kohya Flux over diffusers": (FLUX[0], "lora_unet_", True, FLUX[1], ""),
    "ComfyUI Flux over diffusers": (FLUX[0], "diffusion_model.", False, FLUX[1], "transformer."),
    "diffusers Flux.2 over a single file": (FLUX2[1], "transformer.", False, FLUX2[0], ""),
    "kohya Flux.2 over diffusers": (FLUX2[0], "lora_unet_", True, FLUX2[1], ""),
    "LyCORIS Flux.2 over a single file": (FLUX2[1], "lycoris_", True, FLUX2[0], "model.diffusion_model."),
    "diffusers SD3 over a single file": (SD3[1], "transformer.", False, SD3[0], "model.diffusion_model."),
    "kohya SD3 over diffusers": (SD3[0], "lora_unet_", True, SD3[1], ""),
    "kohya over SDXL's second text encoder": (CLIP, "lora_te2_", True, OPEN_CLIP, SDXL_SECOND),
    "diffusers over SDXL's second text encoder": (CLIP, "text_encoder_2.", False, OPEN_CLIP, SDXL_SECOND),
    "kohya over SD 2's text encoder": (CLIP, "lora_te_", True, OPEN_CLIP, "cond_stage_model.model."),
    "kohya over a bare OpenCLIP": (CLIP, "lora_te2_", True, OPEN_CLIP, ""),
}


@pytest.mark.parametrize("case", CASES)
def test_every_row_once(case, tmp_path):
    named, stem_prefix, underscored, stored, base_prefix = CASES[case]
    base = tensors(stored, base_prefix)
    matching = match(adapter(tmp_path, named, stem_prefix, underscored), base)
    assert len(matching.matched) == len(named)
    covered: dict[str, list[int]] = {name: [] for name in base}
    for row in matching.matched:
        for run in row.weight.runs:
            covered[run.tensor] += range(run.first, run.first + run.count)
    for name, entry in base.items():
        assert sorted(covered[name]) == list(range(entry.shape[0])), name
