"""Layers: linear layers with live adapters, and what stands around them; enough for a transformer."""

from lycoris.nn.adapt import adapt, lora_plus, parameters_of
from lycoris.nn.adapted import Adapted, Adapter
from lycoris.nn.conv import AdaptedConv
from lycoris.nn.hyper_connection import HyperConnection
from lycoris.nn.layers import (
    MLP,
    Dropout,
    Embedding,
    GroupNorm,
    LayerNorm,
    Linear,
    RMSNorm,
    SelfAttention,
    TransformerBlock,
)
from lycoris.nn.linear import AdaptedLinear
from lycoris.nn.module import Module

__all__ = [
    "MLP",
    "Adapted",
    "AdaptedConv",
    "AdaptedLinear",
    "Adapter",
    "Dropout",
    "Embedding",
    "GroupNorm",
    "HyperConnection",
    "LayerNorm",
    "Linear",
    "Module",
    "RMSNorm",
    "SelfAttention",
    "TransformerBlock",
    "adapt",
    "lora_plus",
    "parameters_of",
]
