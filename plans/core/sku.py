"""The identity of a kernel: what it computes, on which elements, by which technique, for which chip."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING

from plans.core.precision import ElementKind, PrecisionGuarantee

if TYPE_CHECKING:
    from plans.core.device import Device


class OpCategory(enum.Enum):
    """The family a kernel belongs to."""

    ADAPTER_WEIGHT = "adapter weight"
    SHAPE_LAYOUT = "shape and layout"
    ELEMENTWISE = "elementwise"
    HYPER_CONNECTION = "hyper-connection"
    REDUCTION = "reduction"
    SOFTMAX = "softmax"
    NORMALIZATION = "normalization"
    LOSS = "loss"
    INDEXING = "indexing"
    RANDOM = "random"
    OPTIMIZER = "optimizer"
    MATMUL = "matrix product"
    CONVOLUTION = "convolution"
    ATTENTION = "attention"


class BackendKind(enum.Enum):
    """The technique."""

    PORTABLE = "portable"
    VECTOR = "vector"
    MMA = "mma"
    CLUSTER = "cluster"
    SKINNY = "skinny"
    STREAMED = "streamed"
    WGMMA = "wgmma"


class ArchSku(enum.Enum):
    """The least architecture a kernel runs on; the value is its compute capability."""

    ANY = (0, 0)
    SM80 = (8, 0)
    SM90A = (9, 0)


def begins_early(device: Device) -> bool:
    """Whether kernels there may take their places while the ones before them end (sm_90)."""
    return device.arch >= ArchSku.SM90A.value


@dataclass(frozen=True)
class KernelSku:
    """What was selected; hashable, so that it can key caches and tuning records."""

    category: OpCategory
    op: str
    element: ElementKind
    aux_element: ElementKind | None
    layout: str | None
    epilogue: str | None
    arch: ArchSku
    backend: BackendKind
    precision_guarantee: PrecisionGuarantee
