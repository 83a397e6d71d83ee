"""Layers: linear layers with live adapters, and what stands around them."""

from lycoris.nn.adapted import Adapted, Adapter
from lycoris.nn.linear import AdaptedLinear

__all__ = ["Adapted", "AdaptedLinear", "Adapter"]
