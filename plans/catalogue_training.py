"""The plans that training is made of, with problems they are meant for; part of `plans.catalogue`."""

from __future__ import annotations

from plans.adapter_gradient import (
    BlockMixGradientDescriptor,
    BlockMixGradientPlan,
    HadamardGradientDescriptor,
    HadamardGradientPlan,
    KroneckerGradientDescriptor,
    KroneckerGradientPlan,
    LowRankGradientDescriptor,
    LowRankGradientPlan,
)
from plans.attention import (
    AttentionBackwardDescriptor,
    AttentionBackwardPlan,
    AttentionDescriptor,
    AttentionPlan,
)
from plans.core.plan import Plan
from plans.core.precision import ElementKind
from plans.expression import gradients, leaf
from plans.gradients import AdjustDescriptor, AdjustPlan, StatisticsDescriptor, StatisticsPlan
from plans.loss import CROSS_ENTROPY, CROSS_ENTROPY_BACKWARD
from plans.matmul import MatmulDescriptor, MatmulPlan
from plans.movement import WindowDescriptor, WindowPlan
from plans.norm_backward import NormBackwardDescriptor, NormBackwardPlan
from plans.normalization import LAYER_NORM, LAYER_NORM_BACKWARD, RMS_NORM, RMS_NORM_BACKWARD
from plans.optimizer import Rule, UpdateDescriptor, UpdatePlan
from plans.pointwise import PointwiseDescriptor, PointwisePlan, View
from plans.random import Distribution, DropoutDescriptor, DropoutPlan, RandomDescriptor, RandomPlan
from plans.reduction import Reduction, ReductionDescriptor, ReductionPlan, elements
from plans.rows import Recipe, RowsDescriptor, RowsPlan
from plans.softmax import SOFTMAX, SOFTMAX_BACKWARD
from plans.take import TakeBackwardDescriptor, TakeBackwardPlan, TakeDescriptor, TakePlan

_BF16, _F32, _I32 = ElementKind.BF16, ElementKind.F32, ElementKind.I32
_X, _Y, _G = leaf(0), leaf(1), leaf(2)
_ATTENTION = AttentionDescriptor(4, 16, 1024, 1024, 64)
_TENSORS = (3072 * 16,) * 500 + (16 * 3072,) * 500


def _rows(recipe: Recipe, *row_kinds: ElementKind, outs: tuple[ElementKind, ...] = (_BF16,)) -> RowsDescriptor:
    wide = (_BF16,) * (len(recipe.full) + len(recipe.columns))
    kinds = (*outs, *(_F32,) * len(recipe.row_outputs))
    return RowsDescriptor(recipe, 8192, 4096, (*wide, *row_kinds), kinds)


EXAMPLES: tuple[tuple[type[Plan], str, object], ...] = (
    (
        PointwisePlan,
        "SwiGLU, 4096x8192, bf16",
        PointwiseDescriptor((_X.silu() * _Y,), (4096, 8192), (View(_BF16),) * 2, (View(_BF16),)),
    ),
    (
        PointwisePlan,
        "gradient of GELU, 4096x8192, bf16",
        PointwiseDescriptor(
            tuple(gradients([_X.gelu()], [_Y], [_X])), (4096, 8192), (View(_BF16),) * 2, (View(_BF16),)
        ),
    ),
    (
        PointwisePlan,
        "x + bias, 4096x3072, bf16",
        PointwiseDescriptor((_X + _Y,), (4096, 3072), (View(_BF16), View(_BF16, (0, 1))), (View(_BF16),)),
    ),
    (
        PointwisePlan,
        "a transposed copy, 4096x3072, bf16",
        PointwiseDescriptor((_X,), (4096, 3072), (View(_BF16, (1, 4096)),), (View(_BF16),)),
    ),
    (
        ReductionPlan,
        "gradient of a bias, 4096x3072, bf16",
        ReductionDescriptor(Reduction.SUM, elements(1).full[0], 1, 4096, 3072, (_BF16,), _F32),
    ),
    (
        ReductionPlan,
        "sum of squares, 32 M elements, bf16",
        ReductionDescriptor(Reduction.SUM, elements(1).full[0] ** 2, 1, 1 << 25, 1, (_BF16,), _F32),
    ),
    (RowsPlan, "softmax, 8192x4096, bf16", _rows(SOFTMAX)),
    (RowsPlan, "gradient of softmax, 8192x4096, bf16", _rows(SOFTMAX_BACKWARD)),
    (RowsPlan, "layer norm, 8192x4096, bf16", _rows(LAYER_NORM)),
    (RowsPlan, "gradient of layer norm, 8192x4096, bf16", _rows(LAYER_NORM_BACKWARD, _F32, _F32)),
    (
        NormBackwardPlan,
        "layer norm's gradients, weights' too, 8192x4096",
        NormBackwardDescriptor(True, 8192, 4096, (_BF16,) * 4, _F32, bias=True),
    ),
    (RowsPlan, "RMS norm, 8192x4096, bf16", _rows(RMS_NORM)),
    (RowsPlan, "gradient of RMS norm, 8192x4096, bf16", _rows(RMS_NORM_BACKWARD, _F32)),
    (
        NormBackwardPlan,
        "RMS norm's gradients, weight's too, 8192x4096",
        NormBackwardDescriptor(False, 8192, 4096, (_BF16,) * 4, _F32),
    ),
    (RowsPlan, "cross-entropy, 8192x4096, bf16", _rows(CROSS_ENTROPY, _I32, outs=())),
    (RowsPlan, "gradient of cross-entropy, 8192x4096", _rows(CROSS_ENTROPY_BACKWARD, _I32, _F32, _F32)),
    (
        LowRankGradientPlan,
        "gradients of LoCon's factors, 4096 tokens, 3072x3072, rank 16",
        LowRankGradientDescriptor(4096, 3072, 3072, 16),
    ),
    (
        LowRankGradientPlan,
        "gradients of LoCon's factors, 4096 tokens, 12288x3072, rank 64",
        LowRankGradientDescriptor(4096, 12288, 3072, 64),
    ),
    (
        BlockMixGradientPlan,
        "gradient of LoKr's w1, 4096 tokens, 8 blocks of 384",
        BlockMixGradientDescriptor(4096, 8, 8, 384),
    ),
    (
        BlockMixGradientPlan,
        "gradient of LoKr's w1, 4096 tokens, 48 blocks of 64",
        BlockMixGradientDescriptor(4096, 48, 48, 64),
    ),
    (
        KroneckerGradientPlan,
        "gradients of LoKr's factors, 4096 tokens, 96x48 blocks of 128x64",
        KroneckerGradientDescriptor(4096, 96, 48, 128, 64),
    ),
    (
        MatmulPlan,
        "gradient of LoKr's w2, 4096 tokens, 48 blocks of 64",
        MatmulDescriptor(64, 64, 4096 * 48, "TN", out=_F32),
    ),
    (
        HadamardGradientPlan,
        "gradients of LoHa's factors, 4096 tokens, 3072x3072, rank 16",
        HadamardGradientDescriptor(4096, 3072, 3072, 16),
    ),
    (AttentionPlan, "attention, 4 x 16 heads of 64, 1024 tokens, bf16", _ATTENTION),
    (AttentionBackwardPlan, "gradients of that attention", AttentionBackwardDescriptor(_ATTENTION)),
    (
        AttentionPlan,
        "causal attention, 32 heads of 128 over 8 of keys, 4096 tokens",
        AttentionDescriptor(1, 32, 4096, 4096, 128, key_heads=8, causal=True),
    ),
    (TakePlan, "embedding, 32000x3072, 4096 tokens", TakeDescriptor(1, 32000, 4096, 3072, _BF16, _I32)),
    (
        TakeBackwardPlan,
        "gradient of an embedding",
        TakeBackwardDescriptor(1, 32000, 4096, 3072, _BF16, _I32),
    ),
    (
        WindowPlan,
        "upper triangle, 4096x4096",
        WindowDescriptor((4096, 4096), (4096, 4096), _BF16, (0, 0), (1, 1), diagonal=1),
    ),
    (RandomPlan, "normal numbers, 3072x3072, bf16", RandomDescriptor(3072 * 3072, _BF16, Distribution.NORMAL)),
    (DropoutPlan, "dropout, 4096x3072, bf16", DropoutDescriptor(4096 * 3072, _BF16, _BF16)),
    (DropoutPlan, "dropout in a graph, 4096x3072, bf16", DropoutDescriptor(4096 * 3072, _BF16, _BF16, counted=True)),
    (
        UpdatePlan,
        "AdamW over 1000 LoCon factors, bf16",
        UpdateDescriptor(Rule.ADAMW, _BF16, True, False, _TENSORS, (0,) * 1000),
    ),
    (StatisticsPlan, "gradient norms of 1000 tensors", StatisticsDescriptor(_F32, _TENSORS)),
    (AdjustPlan, "gradients clipped by value", AdjustDescriptor(_TENSORS)),
)
