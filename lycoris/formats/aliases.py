"""Layers that two families of checkpoints name differently, and that one of them may store fused.

`ALIASES` is the table: a single-file layer is the rows of one or more diffusers (or transformers) layers, one after
the other. Sources: diffusers 0.42.1 `scripts/convert_{flux,flux2,sd3}_to_diffusers.py`, `loaders/single_file_utils.py`
(OpenCLIP), ComfyUI `comfy/utils.py` (`flux_to_diffusers`, `mmdit_to_diffusers`, `clip_text_transformers_convert`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate, pairwise

from lycoris.formats.shapes import HasShape, Shape

NUMBER = "{}"
"""Stands for a block's number in the table's names."""


@dataclass(frozen=True, slots=True)
class Alias:
    """A row of the table.

    Attributes:
        whole: The single-file layer: a module's name, or a parameter's where it belongs to none.
        parts: What the other family calls its rows, in their order.
        shares: How many of `sum(shares)` equal blocks of rows each part is.
        swapped: The one part's halves change places: `[shift, scale]` here, `[scale, shift]` there.
        chunks: Holds only for weights with this many rows a column; None: for all.
        transposed: The single-file layer stores [in, out], the other [out, in].
    """

    whole: str
    parts: tuple[str, ...]
    shares: tuple[int, ...]
    swapped: bool = False
    chunks: int | None = None
    transposed: bool = False


@dataclass(frozen=True, slots=True)
class Share:
    """Of `of` equal blocks of a layer's rows, those from `begin` up to `end`."""

    layer: str
    begin: int = 0
    end: int = 1
    of: int = 1


@dataclass(frozen=True, slots=True)
class Spot:
    """What of a base a module can change: rows of layers, one after the other.

    Attributes:
        shares: Those rows, in the order of the module's outputs.
        transposed: The base stores [in, out] where the module's name says [out, in], or the reverse.
    """

    shares: tuple[Share, ...]
    transposed: bool = False

    @classmethod
    def of(cls, layer: str) -> Spot:
        """The whole of a layer."""
        return cls((Share(layer),))

    @property
    def layers(self) -> str:
        """Names of the layers, for messages."""
        return " and ".join(dict.fromkeys(share.layer for share in self.shares))


def _row(
    whole: str, parts: str, *shares: int, swapped: bool = False, chunks: int | None = None, transposed: bool = False
) -> Alias:
    """`parts` are separated by spaces; without `shares` they are equally tall."""
    names = tuple(parts.split())
    return Alias(whole, names, shares or (1,) * len(names), swapped, chunks, transposed)


def _block(whole: str, part: str, layers: Mapping[str, str]) -> Iterator[Alias]:
    """Rows for the layers of a block, from their names in it."""
    for name, parts in layers.items():
        yield _row(whole + name, " ".join(part + name for name in parts.split()))


ALIASES: tuple[Alias, ...] = (
    # Flux.1: Black Forest Labs' names, diffusers' names.
    *_block(
        "double_blocks.{}.",
        "transformer_blocks.{}.",
        {
            "img_mod.lin": "norm1.linear",
            "txt_mod.lin": "norm1_context.linear",
            "img_attn.qkv": "attn.to_q attn.to_k attn.to_v",
            "txt_attn.qkv": "attn.add_q_proj attn.add_k_proj attn.add_v_proj",
            "img_attn.proj": "attn.to_out.0",
            "txt_attn.proj": "attn.to_add_out",
            "img_attn.norm.query_norm.scale": "attn.norm_q",
            "img_attn.norm.key_norm.scale": "attn.norm_k",
            "txt_attn.norm.query_norm.scale": "attn.norm_added_q",
            "txt_attn.norm.key_norm.scale": "attn.norm_added_k",
            "img_mlp.0": "ff.net.0.proj",
            "img_mlp.2": "ff.net.2",
            "txt_mlp.0": "ff_context.net.0.proj",
            "txt_mlp.2": "ff_context.net.2",
        },
    ),
    *_block(
        "single_blocks.{}.",
        "single_transformer_blocks.{}.",
        {
            "modulation.lin": "norm.linear",
            "linear2": "proj_out",
            "norm.query_norm.scale": "attn.norm_q",
            "norm.key_norm.scale": "attn.norm_k",
        },
    ),
    _row(
        "single_blocks.{}.linear1",
        "single_transformer_blocks.{}.attn.to_q single_transformer_blocks.{}.attn.to_k "
        "single_transformer_blocks.{}.attn.to_v single_transformer_blocks.{}.proj_mlp",
        *(1, 1, 1, 4),
    ),
    *_block(
        "",
        "",
        {
            "img_in": "x_embedder",
            "txt_in": "context_embedder",
            "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
            "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
            "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
            "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
            "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
            "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
        },
    ),
    # Flux.2, where it differs.
    *_block(
        "double_blocks.{}.",
        "transformer_blocks.{}.",
        {
            "img_mlp.0": "ff.linear_in",
            "img_mlp.2": "ff.linear_out",
            "txt_mlp.0": "ff_context.linear_in",
            "txt_mlp.2": "ff_context.linear_out",
        },
    ),
    *_block(
        "single_blocks.{}.",
        "single_transformer_blocks.{}.",
        {"linear1": "attn.to_qkv_mlp_proj", "linear2": "attn.to_out"},
    ),
    *_block(
        "",
        "",
        {
            "time_in.in_layer": "time_guidance_embed.timestep_embedder.linear_1",
            "time_in.out_layer": "time_guidance_embed.timestep_embedder.linear_2",
            "guidance_in.in_layer": "time_guidance_embed.guidance_embedder.linear_1",
            "guidance_in.out_layer": "time_guidance_embed.guidance_embedder.linear_2",
            "double_stream_modulation_img.lin": "double_stream_modulation_img.linear",
            "double_stream_modulation_txt.lin": "double_stream_modulation_txt.linear",
            "single_stream_modulation.lin": "single_stream_modulation.linear",
        },
    ),
    # Stable Diffusion 3: Stability's names, diffusers' names.
    *_block(
        "joint_blocks.{}.x_block.",
        "transformer_blocks.{}.",
        {
            "adaLN_modulation.1": "norm1.linear",
            "attn.qkv": "attn.to_q attn.to_k attn.to_v",
            "attn.proj": "attn.to_out.0",
            "attn.ln_q": "attn.norm_q",
            "attn.ln_k": "attn.norm_k",
            "attn2.qkv": "attn2.to_q attn2.to_k attn2.to_v",
            "attn2.proj": "attn2.to_out.0",
            "attn2.ln_q": "attn2.norm_q",
            "attn2.ln_k": "attn2.norm_k",
            "mlp.fc1": "ff.net.0.proj",
            "mlp.fc2": "ff.net.2",
        },
    ),
    *_block(
        "joint_blocks.{}.context_block.",
        "transformer_blocks.{}.",
        {
            "attn.qkv": "attn.add_q_proj attn.add_k_proj attn.add_v_proj",
            "attn.proj": "attn.to_add_out",
            "attn.ln_q": "attn.norm_added_q",
            "attn.ln_k": "attn.norm_added_k",
            "mlp.fc1": "ff_context.net.0.proj",
            "mlp.fc2": "ff_context.net.2",
        },
    ),
    _row("joint_blocks.{}.context_block.adaLN_modulation.1", "transformer_blocks.{}.norm1_context.linear", chunks=6),
    # The last block's context has no attention output: two chunks, which diffusers stores the other way round.
    _row(
        "joint_blocks.{}.context_block.adaLN_modulation.1",
        "transformer_blocks.{}.norm1_context.linear",
        swapped=True,
        chunks=2,
    ),
    *_block(
        "",
        "",
        {
            "x_embedder.proj": "pos_embed.proj",
            "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
            "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
            "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
            "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
        },
    ),
    # Both.
    _row("final_layer.linear", "proj_out"),
    _row("final_layer.adaLN_modulation.1", "norm_out.linear", swapped=True),
    # OpenCLIP (SDXL's second text encoder, SD 2's only one), transformers' CLIP.
    *_block(
        "transformer.resblocks.{}.",
        "text_model.encoder.layers.{}.",
        {
            "ln_1": "layer_norm1",
            "ln_2": "layer_norm2",
            "attn.in_proj_weight": "self_attn.q_proj self_attn.k_proj self_attn.v_proj",
            "attn.out_proj": "self_attn.out_proj",
            "mlp.c_fc": "mlp.fc1",
            "mlp.c_proj": "mlp.fc2",
        },
    ),
    *_block(
        "",
        "",
        {
            "ln_final": "text_model.final_layer_norm",
            "token_embedding": "text_model.embeddings.token_embedding",
            "positional_embedding": "text_model.embeddings.position_embedding",
        },
    ),
    _row("text_projection", "text_projection", transposed=True),
)

_FIRST_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def _indexed(name_of: Callable[[Alias], str]) -> dict[str, list[Alias]]:
    found: dict[str, list[Alias]] = {}
    for alias in ALIASES:
        found.setdefault(name_of(alias), []).append(alias)
    return found


_WHOLES = _indexed(lambda alias: alias.whole)
_FIRST_PARTS = _indexed(lambda alias: alias.parts[0])


def weight_of(layer: str, tensors: Mapping[str, HasShape]) -> str:
    """A layer's weight, or the parameter itself where it belongs to no layer."""
    weight = f"{layer}.weight"
    return weight if weight in tensors else layer


def aliases_of(layers: Mapping[str, str], tensors: Mapping[str, HasShape]) -> Iterator[tuple[str, Spot]]:
    """Every further name that the table has for something of a base: (path, what it changes).

    Args:
        layers: Paths of the base's layers -> their names.
        tensors: Of the base.
    """
    for path, layer in layers.items():
        template = _FIRST_NUMBER.sub(NUMBER, path, count=1)
        if template in _WHOLES or template in _FIRST_PARTS:
            number = _FIRST_NUMBER.search(path)
            yield from _named(template, number.group() if number else "", layer, layers, tensors)


def _named(
    template: str, number: str, layer: str, layers: Mapping[str, str], tensors: Mapping[str, HasShape]
) -> Iterator[tuple[str, Spot]]:
    weight = weight_of(layer, tensors)
    for alias in _WHOLES.get(template, ()):
        # OpenCLIP's projection is a parameter; transformers' layer of the same name stores the transpose.
        if _holds(alias, tensors[weight].shape) and not (alias.transposed and weight != layer):
            paths = [part.replace(NUMBER, number) for part in alias.parts]
            yield from zip(paths, _split(alias, layer), strict=True)
    for alias in _FIRST_PARTS.get(template, ()):
        found = [layers.get(part.replace(NUMBER, number)) for part in alias.parts]
        if alias.transposed or None in found:
            continue
        # The same columns everywhere, or the parts make no matrix.
        columns = {tuple(tensors[weight_of(part, tensors)].shape)[1:] for part in found}
        if len(columns) == 1 and (len(found) > 1 or _holds(alias, tensors[weight].shape)):
            yield alias.whole.replace(NUMBER, number), _joined(alias, found)


def _holds(alias: Alias, shape: Shape) -> bool:
    """Whether a whole of `shape` can be what the row says."""
    blocks = 2 if alias.swapped else sum(alias.shares)
    if not shape or shape[0] % blocks:
        return False
    return alias.chunks is None or (len(shape) == 2 and shape[0] == alias.chunks * shape[1])


def _split(alias: Alias, layer: str) -> list[Spot]:
    """The parts of a whole, each as rows of it."""
    if alias.swapped:
        return [Spot(_halves(layer))]
    bounds = pairwise(accumulate(alias.shares, initial=0))
    of = sum(alias.shares)
    return [Spot((Share(layer, begin, end, of),), alias.transposed) for begin, end in bounds]


def _joined(alias: Alias, layers: Iterable[str]) -> Spot:
    """A whole, as its parts."""
    if alias.swapped:
        (layer,) = layers
        return Spot(_halves(layer))
    return Spot(tuple(map(Share, layers)))


def _halves(layer: str) -> tuple[Share, ...]:
    return Share(layer, 1, 2, 2), Share(layer, 0, 1, 2)
