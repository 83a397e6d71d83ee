"""Matrix products with epilogues: one, sums of several in one launch, batches, and groups of different shapes."""

from plans.matmul.descriptor import (
    LowRankTerm,
    MatmulArgs,
    MatmulDescriptor,
    Segment,
    SegmentedMatmulArgs,
    SegmentedMatmulDescriptor,
)
from plans.matmul.epilogue import Activation, Bias, ColumnScale, Gate, Residual, RowScale, Step
from plans.matmul.grouped import GroupedMatmulArgs, GroupedMatmulDescriptor, GroupedMatmulPlan
from plans.matmul.plan import MatmulPlan, SegmentedMatmulPlan
from plans.matmul.streamed import blocks_beside

__all__ = [
    "Activation",
    "Bias",
    "ColumnScale",
    "Gate",
    "GroupedMatmulArgs",
    "GroupedMatmulDescriptor",
    "GroupedMatmulPlan",
    "LowRankTerm",
    "MatmulArgs",
    "MatmulDescriptor",
    "MatmulPlan",
    "Residual",
    "RowScale",
    "Segment",
    "SegmentedMatmulArgs",
    "SegmentedMatmulDescriptor",
    "SegmentedMatmulPlan",
    "Step",
    "blocks_beside",
]
