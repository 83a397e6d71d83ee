"""Weights: what adapters add to a layer's weight."""
