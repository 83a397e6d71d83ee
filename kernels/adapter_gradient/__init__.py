"""Gradients of adapters' factors, without the gradient of the weight that they make up."""
