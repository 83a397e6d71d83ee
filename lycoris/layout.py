"""Layout conversion at boundaries: activations NHWC <-> NCHW, weights between checkpoint files' layout and FLAME's.

    activations   [N, H, W, C] <-> [N, C, H, W]                       any number of spatial axes
    weights       [out, in] <-> [in, out], [O, I, KH, KW] <-> [KH, KW, I, O], and the same for conv1d and conv3d

Each makes a new tensor with the same bits. bf16, fp16, fp32 and int32.
"""

from __future__ import annotations

from lycoris.buffers import DeviceArray, run
from plans.layout import Conversion, LayoutArgs, LayoutDescriptor, LayoutPlan


def nhwc_to_nchw(x: DeviceArray) -> DeviceArray:
    """[N, *spatial, C] -> [N, C, *spatial]."""
    return convert(x, Conversion.TO_NCHW)


def nchw_to_nhwc(x: DeviceArray) -> DeviceArray:
    """[N, C, *spatial] -> [N, *spatial, C]."""
    return convert(x, Conversion.TO_NHWC)


def to_flame(weight: DeviceArray) -> DeviceArray:
    """[out, in, *kernel] -> [*kernel, in, out]."""
    return convert(weight, Conversion.TO_FLAME)


def to_checkpoint(weight: DeviceArray) -> DeviceArray:
    """[*kernel, in, out] -> [out, in, *kernel]."""
    return convert(weight, Conversion.TO_CHECKPOINT)


def convert(x: DeviceArray, conversion: Conversion) -> DeviceArray:
    """A new tensor with the axes of ``x`` in another order.

    Raises plans.core.InvalidProblem for fewer than two axes, plans.core.NoSku for a kind that is not moved.
    """
    descriptor = LayoutDescriptor(x.shape, x.kind, conversion)
    plan = LayoutPlan.select(None, descriptor, device=x.device)
    out = DeviceArray.empty(descriptor.out_shape, x.kind, x.device)
    run(plan, LayoutArgs(out.mut(), x.ref()))
    return out
