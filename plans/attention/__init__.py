"""Scaled dot-product attention and its gradients."""

from plans.attention.backward import AttentionBackwardPlan
from plans.attention.descriptor import (
    AttentionArgs,
    AttentionBackwardArgs,
    AttentionBackwardDescriptor,
    AttentionDescriptor,
    Mask,
)
from plans.attention.forward import MOST_WIDTH, AttentionPlan

__all__ = [
    "MOST_WIDTH",
    "AttentionArgs",
    "AttentionBackwardArgs",
    "AttentionBackwardDescriptor",
    "AttentionBackwardPlan",
    "AttentionDescriptor",
    "AttentionPlan",
    "Mask",
]
