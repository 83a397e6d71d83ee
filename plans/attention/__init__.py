"""Scaled dot-product attention and its gradients."""

from plans.attention.backward import AttentionBackwardPlan
from plans.attention.descriptor import (
    AttentionArgs,
    AttentionBackwardArgs,
    AttentionBackwardDescriptor,
    AttentionDescriptor,
    Mask,
)
from plans.attention.forward import AttentionPlan
from plans.attention.problem import MOST_WIDTH

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
