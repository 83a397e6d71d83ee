"""Gradients of adapters' factors, without the gradient of the weight that they make up."""

from plans.adapter_gradient.blocks import BlockMixGradientArgs, BlockMixGradientDescriptor, BlockMixGradientPlan
from plans.adapter_gradient.hadamard import (
    MOST_RANK,
    HadamardGradientArgs,
    HadamardGradientDescriptor,
    HadamardGradientPlan,
)
from plans.adapter_gradient.kronecker import (
    KroneckerGradientArgs,
    KroneckerGradientDescriptor,
    KroneckerGradientPlan,
)
from plans.adapter_gradient.kronecker_back import KroneckerBackArgs, KroneckerBackDescriptor, KroneckerBackPlan
from plans.adapter_gradient.kronecker_problem import KroneckerProblem
from plans.adapter_gradient.low_rank import LowRankGradientArgs, LowRankGradientDescriptor, LowRankGradientPlan

__all__ = [
    "MOST_RANK",
    "BlockMixGradientArgs",
    "BlockMixGradientDescriptor",
    "BlockMixGradientPlan",
    "HadamardGradientArgs",
    "HadamardGradientDescriptor",
    "HadamardGradientPlan",
    "KroneckerBackArgs",
    "KroneckerBackDescriptor",
    "KroneckerBackPlan",
    "KroneckerGradientArgs",
    "KroneckerGradientDescriptor",
    "KroneckerGradientPlan",
    "KroneckerProblem",
    "LowRankGradientArgs",
    "LowRankGradientDescriptor",
    "LowRankGradientPlan",
]
