"""Tucker decompositions of convolution weights: a core with a matrix on either channel axis, arXiv:2309.14859."""

from __future__ import annotations

from lycoris.buffers import DeviceArray
from lycoris.errors import RefusedInput
from lycoris.layout import to_checkpoint, to_flame
from lycoris.ops.checks import check_axes
from lycoris.ops.weight import delta
from plans.core import ElementKind
from plans.weight import LowRank, WeightLayout


def tucker_source(operation: str, core: DeviceArray, left: DeviceArray, right: DeviceArray) -> LowRank:
    """The source of core [r1, r2, *kernel], left [r1, O] and right [r2, I]; refuses fewer axes."""
    for name, tensor in (("the core", core), ("the output factor", left), ("the input factor", right)):
        check_axes(operation, name, tensor, 2)
    rank, core_rank = core.shape[:2]
    return LowRank(rank, left.kind, right.kind, left_transposed=True, core=core.kind, core_rank=core_rank)


def rebuild_tucker(
    core: DeviceArray,
    left: DeviceArray,
    right: DeviceArray,
    scale: float = 1.0,
    kind: ElementKind | None = None,
    layout: WeightLayout = WeightLayout.CHECKPOINT,
) -> DeviceArray:
    """The weight scale * sum_ij core[i, j, ...] left[i, o] right[j, q], of extents [O, I, *kernel].

    core [r1, r2, *kernel], left [r1, O], right [r2, I]. The result is stored as ``layout`` says and has ``kind``, or
    the left factor's. Raises RefusedInput where shapes do not fit.
    """
    source = tucker_source("rebuild_tucker", core, left, right)
    shape = (left.shape[1], right.shape[1], *core.shape[2:])
    return delta(source, (left, right, core), shape, scale, kind, layout)


def rebuild_conv_tucker(
    core: DeviceArray,
    down: DeviceArray,
    up: DeviceArray,
    scale: float = 1.0,
    kind: ElementKind | None = None,
) -> DeviceArray:
    """The weight scale * down @ core[kh, kw] @ up at every filter tap, all in FLAME's layout.

    core [KH, KW, R1, R2], down [1, 1, IC, R1], up [1, 1, R2, OC] -> [KH, KW, IC, OC]; any number of filter axes.
    core and down, the small ones, are transposed first. The result has ``kind``, or up's. Raises RefusedInput where
    shapes do not fit.
    """
    for name, tensor in (("core", core), ("down", down), ("up", up)):
        check_axes("rebuild_conv_tucker", name, tensor, 2)
        if tensor is not core and tensor.size != tensor.shape[-2] * tensor.shape[-1]:
            raise RefusedInput(
                f"rebuild_conv_tucker: {name} has shape {tensor.shape}, wanted [1, 1, rows, columns]; reshape it first"
            )
    left = up.reshape(up.shape[-2:])
    right = to_flame(down.reshape(down.shape[-2:]))
    return rebuild_tucker(to_checkpoint(core), left, right, scale, kind, WeightLayout.FLAME)
