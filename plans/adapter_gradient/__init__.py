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
from plans.adapter_gradient.long_sum import LongSumArgs, LongSumDescriptor, LongSumPlan
from plans.adapter_gradient.low_rank import LowRankGradientArgs, LowRankGradientDescriptor, LowRankGradientPlan
from plans.adapter_gradient.low_rank_pass import LowRankPassArgs, LowRankPassDescriptor, LowRankPassPlan, pass_beside

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
    "LongSumArgs",
    "LongSumDescriptor",
    "LongSumPlan",
    "LowRankGradientArgs",
    "LowRankGradientDescriptor",
    "LowRankGradientPlan",
    "LowRankPassArgs",
    "LowRankPassDescriptor",
    "LowRankPassPlan",
    "pass_beside",
]
