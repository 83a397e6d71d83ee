"""Every plan with problems it is meant for, and the SKU that each would get on a device."""

from __future__ import annotations

from plans import catalogue_training
from plans.block_mix import BlockMixDescriptor, BlockMixPlan
from plans.cast import CastDescriptor, CastPlan
from plans.convolution import (
    Conv2dDescriptor,
    Conv2dInputGradientDescriptor,
    Conv2dInputGradientPlan,
    Conv2dPlan,
    Conv2dWeightGradientDescriptor,
    Conv2dWeightGradientPlan,
    Convolution,
)
from plans.core.device import Device
from plans.core.plan import Plan, PlanPreference
from plans.core.precision import ElementKind
from plans.hyper_connection.dynamic import DynamicHyperConnectionDescriptor, DynamicHyperConnectionPlan
from plans.hyper_connection.dynamic_backward import (
    DynamicHyperConnectionBackwardDescriptor,
    DynamicHyperConnectionBackwardPlan,
)
from plans.hyper_connection.split import (
    HyperConnectionPostDescriptor,
    HyperConnectionPostPlan,
    HyperConnectionPreDescriptor,
    HyperConnectionPrePlan,
)
from plans.hyper_connection.split_backward import (
    HyperConnectionPostBackwardDescriptor,
    HyperConnectionPostBackwardPlan,
    HyperConnectionPreBackwardDescriptor,
    HyperConnectionPreBackwardPlan,
)
from plans.hyper_connection.static import HyperConnectionDescriptor, HyperConnectionPlan
from plans.hyper_connection.static_backward import HyperConnectionBackwardDescriptor, HyperConnectionBackwardPlan
from plans.layout import Conversion, LayoutDescriptor, LayoutPlan
from plans.matmul import (
    Bias,
    Gate,
    LowRankTerm,
    MatmulDescriptor,
    MatmulPlan,
    Segment,
    SegmentedMatmulDescriptor,
    SegmentedMatmulPlan,
)
from plans.sinkhorn import (
    SinkhornBackwardDescriptor,
    SinkhornBackwardPlan,
    SinkhornDescriptor,
    SinkhornMode,
    SinkhornPlan,
)
from plans.weight import (
    Hadamard,
    Kronecker,
    LowRank,
    Sink,
    WeightDescriptor,
    WeightLayout,
    WeightPlan,
)

_BF16, _F16, _F32 = ElementKind.BF16, ElementKind.F16, ElementKind.F32
_LOW_RANK = LowRank(16, _BF16, _BF16)
_CONVOLUTION = Convolution(2, (64, 64), 640, 640, (3, 3), padding=(1, 1))


def _linear(*sources: object, **options: object) -> WeightDescriptor:
    return WeightDescriptor(3072, 3072, tuple(sources), _BF16, **({"base": _BF16} | options))


EXAMPLES: tuple[tuple[type[Plan], str, object], ...] = (
    (WeightPlan, "merge LoCon, 3072x3072, rank 16, bf16", _linear(_LOW_RANK)),
    (WeightPlan, "merge LoHa, 3072x3072, rank 16, bf16", _linear(Hadamard(_LOW_RANK, _LOW_RANK))),
    (WeightPlan, "merge LoKr, 3072x3072, factor 8, w2 full", _linear(Kronecker(8, 8, 384, 384, _BF16, _BF16))),
    (WeightPlan, "merge LoKr, 3072x3072, factor 8, w2 rank 16", _linear(Kronecker(8, 8, 384, 384, _BF16, _LOW_RANK))),
    (WeightPlan, "merge LoCon, fp16 factors over bf16", _linear(LowRank(16, _F16, _F16))),
    (WeightPlan, "merge two LoCons at once", _linear(_LOW_RANK, _LOW_RANK)),
    (WeightPlan, "merge DoRA by output row", _linear(_LOW_RANK, sink=Sink.DORA_ROW, magnitude=_F32)),
    (WeightPlan, "merge DoRA by input channel", _linear(_LOW_RANK, sink=Sink.DORA_COLUMN, magnitude=_F32)),
    (WeightPlan, "LoCon's delta alone", _linear(_LOW_RANK, base=None, sink=Sink.DELTA)),
    (
        WeightPlan,
        "LoCon's delta in FLAME layout",
        _linear(_LOW_RANK, base=None, sink=Sink.DELTA, layout=WeightLayout.FLAME),
    ),
    (MatmulPlan, "linear, 4096 tokens, 3072x3072", MatmulDescriptor(4096, 3072, 3072, epilogue=(Bias(),))),
    (MatmulPlan, "SwiGLU, 4096 tokens, 2 x 8192x3072", MatmulDescriptor(4096, 16384, 3072, epilogue=(Gate("silu"),))),
    (MatmulPlan, "gradient of a weight, 3072x3072", MatmulDescriptor(3072, 3072, 4096, "TN", out=_F32)),
    (
        SegmentedMatmulPlan,
        "linear with LoCon, 4096 tokens, 3072x3072, rank 16",
        SegmentedMatmulDescriptor(4096, 3072, (Segment(3072), Segment(16))),
    ),
    (
        SegmentedMatmulPlan,
        "linear with LoCon, 1 token, 4096x4096, rank 16",
        SegmentedMatmulDescriptor(1, 4096, (Segment(4096),), low_rank=(LowRankTerm(16),)),
    ),
    (Conv2dPlan, "conv 3x3, 640 channels at 64x64", Conv2dDescriptor(_CONVOLUTION, epilogue=(Bias(),))),
    (Conv2dInputGradientPlan, "gradient of its input", Conv2dInputGradientDescriptor(_CONVOLUTION)),
    (Conv2dWeightGradientPlan, "gradient of its weight", Conv2dWeightGradientDescriptor(_CONVOLUTION, out=_F32)),
    (BlockMixPlan, "LoKr's pass over 4096 tokens, 8 blocks of 384", BlockMixDescriptor(4096, 8, 8, 384)),
    (CastPlan, "bf16 to fp32", CastDescriptor(3072 * 3072, _BF16, _F32)),
    (LayoutPlan, "NHWC to NCHW", LayoutDescriptor((2, 64, 64, 320), _BF16, Conversion.TO_NCHW)),
    (
        HyperConnectionPlan,
        "static hyper-connection, 4 streams, bf16",
        HyperConnectionDescriptor(1280, 2560, 4, 20, 1e-5, _BF16),
    ),
    (
        HyperConnectionBackwardPlan,
        "gradient of the static hyper-connection",
        HyperConnectionBackwardDescriptor(1280, 2560, 4, 20, 1e-5, _BF16),
    ),
    (
        DynamicHyperConnectionPlan,
        "dynamic hyper-connection, 4 streams, bf16",
        DynamicHyperConnectionDescriptor(1280, 2560, 4, 20, 1e-5, _BF16),
    ),
    (
        DynamicHyperConnectionBackwardPlan,
        "gradient of the dynamic hyper-connection",
        DynamicHyperConnectionBackwardDescriptor(1280, 2560, 4, 20, 1e-5, _BF16),
    ),
    (
        HyperConnectionPrePlan,
        "before a sublayer, dynamic, 4 streams, bf16",
        HyperConnectionPreDescriptor(1280, 2560, 4, 20, 1e-5, _BF16, _BF16, _BF16),
    ),
    (
        HyperConnectionPostPlan,
        "after a sublayer, dynamic, 4 streams, bf16",
        HyperConnectionPostDescriptor(1280, 2560, 4, _BF16, per_sample=True),
    ),
    (
        HyperConnectionPreBackwardPlan,
        "gradient of what comes before a sublayer",
        HyperConnectionPreBackwardDescriptor(1280, 2560, 4, 20, 1e-5, _BF16, _BF16, _BF16),
    ),
    (
        HyperConnectionPostBackwardPlan,
        "gradient of what comes after a sublayer",
        HyperConnectionPostBackwardDescriptor(1280, 2560, 4, _BF16, per_sample=True),
    ),
    (SinkhornPlan, "Sinkhorn as in mHC.cu, n = 4", SinkhornDescriptor(8192, 4, 20, 1e-5, SinkhornMode.EXP)),
    (
        SinkhornBackwardPlan,
        "gradient of Sinkhorn as in TileLang, n = 4",
        SinkhornBackwardDescriptor(8192, 4, 20, 1e-6, SinkhornMode.SOFTMAX),
    ),
    *catalogue_training.EXAMPLES,
)


def catalogue(device: Device | None = None) -> list[tuple[str, str, str]]:
    """(plan, problem, SKU) for every example, on a device; nothing is compiled."""
    device = device or Device.open("auto")
    return [
        (plan.name, text, plan.choose(descriptor, PlanPreference(), device).name) for plan, text, descriptor in EXAMPLES
    ]
