"""Convolutions in one to three axes, channels last, with epilogues, and their gradients."""

from plans.convolution.descriptor import (
    Conv2dArgs,
    Conv2dDescriptor,
    Conv2dInputGradientDescriptor,
    Conv2dWeightGradientDescriptor,
)
from plans.convolution.geometry import Convolution
from plans.convolution.plan import Conv2dInputGradientPlan, Conv2dPlan, Conv2dWeightGradientPlan

__all__ = [
    "Conv2dArgs",
    "Conv2dDescriptor",
    "Conv2dInputGradientDescriptor",
    "Conv2dInputGradientPlan",
    "Conv2dPlan",
    "Conv2dWeightGradientDescriptor",
    "Conv2dWeightGradientPlan",
    "Convolution",
]
