"""Module names: what adapter files put before them, what checkpoints put before them, and two spellings of a UNet.

Tables: `FORMATS` (prefixes that adapter files use), `COMPONENTS` (prefixes that checkpoints use for the same parts) and
the SGM block names. Sources: sd-scripts, LyCORIS 4.1.3, PEFT 0.21.2, diffusers 0.42.1, ComfyUI `comfy/lora.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

_DENOISER = ("model.diffusion_model.", "diffusion_model.", "unet.", "transformer.")

COMPONENTS: dict[str, tuple[str, ...]] = {
    "unet": _DENOISER,
    "transformer": _DENOISER,
    "text_encoder": (
        "text_encoder.",
        "cond_stage_model.",
        "cond_stage_model.model.",
        "cond_stage_model.transformer.",
        "conditioner.embedders.0.",
        "conditioner.embedders.0.transformer.",
        "text_encoders.clip_l.",
        "text_encoders.clip_l.transformer.",
    ),
    "text_encoder_2": (
        "text_encoder_2.",
        "conditioner.embedders.0.model.",
        "conditioner.embedders.1.",
        "conditioner.embedders.1.model.",
        "text_encoders.clip_g.",
        "text_encoders.clip_g.transformer.",
    ),
    "text_encoder_3": ("text_encoder_3.", "text_encoders.t5xxl.", "text_encoders.t5xxl.transformer."),
}
"""Part of a pipeline -> what its tensors' names begin with in a checkpoint that holds several parts."""


@dataclass(frozen=True, slots=True)
class Format:
    """A row of the table of formats.

    Attributes:
        name: Name users know.
        prefixes: What a module's name begins with -> the component that says; None: it does not say.
        underscored: Whether `.` in module paths is written `_`, so that only the base's names can tell them apart.
        needs_config: Whether ranks and alphas are in an adapter_config.json beside the file.
    """

    name: str
    prefixes: Mapping[str, str | None]
    underscored: bool = False
    needs_config: bool = False


FORMATS: dict[str, Format] = {
    row.name: row
    for row in (
        Format("peft", {"base_model.model.": None}, needs_config=True),
        Format(
            "kohya",
            {
                "lora_unet_": "unet",
                "lora_unet__": "unet",  # Wan-Fun
                "lora_transformer_": "transformer",  # OneTrainer
                "lora_te_": "text_encoder",
                "lora_te1_": "text_encoder",
                "lora_te2_": "text_encoder_2",
                "lora_te3_": "text_encoder_3",
            },
            underscored=True,
        ),
        Format("lycoris", {"lycoris_": None}, underscored=True),
        Format(
            "comfyui",
            {
                "diffusion_model.": "unet",
                "model.diffusion_model.": "unet",
                "text_encoders.clip_l.transformer.": "text_encoder",
                "text_encoders.clip_g.transformer.": "text_encoder_2",
                "text_encoders.t5xxl.transformer.": "text_encoder_3",
            },
        ),
        Format(
            "diffusers",
            {
                "unet.": "unet",
                "transformer.": "transformer",
                "text_encoder.": "text_encoder",
                "text_encoder_2.": "text_encoder_2",
                "text_encoder_3.": "text_encoder_3",
                "": None,
            },
        ),
    )
}

_PREFIXES: list[tuple[str, Format]] = sorted(
    ((prefix, row) for row in FORMATS.values() for prefix in row.prefixes), key=lambda pair: -len(pair[0])
)
_OWN_NAMES = ("transformer.resblocks.",)
"""What a bare model's names may begin with though it looks like a component's prefix: OpenCLIP's text tower."""
_BASE_PREFIXES = sorted({prefix for row in COMPONENTS.values() for prefix in row}, key=len, reverse=True)


@dataclass(frozen=True, slots=True)
class ModuleName:
    """A module's name in an adapter file, taken apart: prefix + path, up to the old spellings that are made new.

    Attributes:
        format: Row of the table.
        prefix: What the name begins with; "" for none.
        component: Part of the pipeline it belongs to; None where the name does not say.
        path: The rest, dotted or underscored as the format has it.
    """

    format: Format
    prefix: str
    component: str | None
    path: str


_OLD_ATTENTION: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"\.self_attn\.to_([qkv])$"), r".self_attn.\1_proj"),
    (re.compile(r"\.self_attn\.to_out$"), ".self_attn.out_proj"),
    (re.compile(r"\.to_out$"), ".to_out.0"),
)
"""Where diffusers' attention processors (`to_out_lora.up.weight`) sat -> the layer that they changed."""


def split_stem(stem: str, *, of_processor: bool = False) -> ModuleName:
    """Take a module's name apart; `of_processor`: its factors belong to a diffusers attention processor."""
    prefix, row = next((prefix, row) for prefix, row in _PREFIXES if stem.startswith(prefix))
    path = stem[len(prefix) :].replace(".processor.", ".")
    if of_processor:
        for pattern, replacement in _OLD_ATTENTION:
            path = pattern.sub(replacement, path)
    return ModuleName(row, prefix, row.prefixes[prefix], path)


def split_base_name(name: str) -> tuple[str, str]:
    """A checkpoint's module name as (component's prefix or "", path)."""
    if name.startswith(_OWN_NAMES):
        return "", name
    prefix = next((prefix for prefix in _BASE_PREFIXES if name.startswith(prefix)), "")
    return prefix, name[len(prefix) :]


def underscored(path: str) -> str:
    """The path as kohya and LyCORIS write it."""
    return path.replace(".", "_")


_RESNET_LAYERS = {
    "in_layers_0": "norm1",
    "in_layers_2": "conv1",
    "emb_layers_1": "time_emb_proj",
    "out_layers_0": "norm2",
    "out_layers_3": "conv2",
    "skip_connection": "conv_shortcut",
}
_MIDDLE = ("resnets_0", "attentions_0", "resnets_1")
_OUTSIDE = {
    "time_embed_0": "time_embedding_linear_1",
    "time_embed_2": "time_embedding_linear_2",
    "label_emb_0_0": "add_embedding_linear_1",
    "label_emb_0_2": "add_embedding_linear_2",
    "input_blocks_0_0": "conv_in",
    "out_0": "conv_norm_out",
    "out_2": "conv_out",
}


def _layer(block: str, index: int, kind: str, rest: str) -> str:
    if kind == "1":
        return f"{block}_attentions_{index}_{rest}"
    return f"{block}_resnets_{index}_{_RESNET_LAYERS.get(rest, rest)}"


def _input_layer(match: re.Match[str]) -> str:
    # Blocks 3i+1 and 3i+2 are the layers of down block i, block 3i+3 is its downsampler; block 0 is conv_in.
    block, index = divmod(int(match[1]) - 1, 3)
    return _layer(f"down_blocks_{block}", index, match[2], match[3])


def _output_layer(match: re.Match[str]) -> str:
    block, index = divmod(int(match[1]), 3)
    return _layer(f"up_blocks_{block}", index, match[2], match[3])


def _middle_layer(match: re.Match[str]) -> str:
    return f"mid_block_{_MIDDLE[int(match[1])]}_{_RESNET_LAYERS.get(match[2], match[2])}"


_SGM_RULES: tuple[tuple[re.Pattern[str], Callable[[re.Match[str]], str]], ...] = (
    (
        re.compile(r"input_blocks_(\d{1,3})_0_op"),
        lambda m: f"down_blocks_{int(m[1]) // 3 - 1}_downsamplers_0_conv",
    ),
    (re.compile(r"output_blocks_(\d{1,3})_[12]_conv"), lambda m: f"up_blocks_{int(m[1]) // 3}_upsamplers_0_conv"),
    (re.compile(r"input_blocks_([1-9]\d{0,2})_([01])_(.+)"), _input_layer),
    (re.compile(r"output_blocks_(\d{1,3})_([01])_(.+)"), _output_layer),
    (re.compile(r"middle_block_([012])_(.+)"), _middle_layer),
)


def diffusers_spelling(path: str) -> str:
    """The diffusers name of an SGM (LDM) UNet layer, both underscored: `input_blocks_4_1_proj_in` ->
    `down_blocks_1_attentions_0_proj_in`. Other paths come back as they are.

    Holds for UNets with two layers a block: SD 1, SD 2 and SDXL, the only ones that go by both names.
    """
    if path in _OUTSIDE:
        return _OUTSIDE[path]
    for pattern, rule in _SGM_RULES:
        if match := pattern.fullmatch(path):
            return rule(match)
    return path
