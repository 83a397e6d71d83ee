"""One run of the weight plan over device tensors."""

from __future__ import annotations

from collections.abc import Sequence

from lycoris.buffers import DeviceArray, run
from lycoris.ops.checks import as_operand
from plans.core import ElementKind
from plans.weight import Sink, Source, WeightArgs, WeightDescriptor, WeightLayout, WeightPlan


def evaluate(
    descriptor: WeightDescriptor,
    factors: Sequence[Sequence[DeviceArray]],
    scales: Sequence[float],
    base: DeviceArray | None = None,
    magnitude: DeviceArray | None = None,
    strength: float = 1.0,
) -> DeviceArray:
    """The weight round(W + sum_i scale_i * source_i), or what else the descriptor says, as a new tensor of its shape.

    ``factors`` holds each source's tensors in the order of its operands; their filter axes may be flat or not.
    Raises RefusedInput where a factor's shape is not its operand's, and plans.core.PlanError for a wrong kind, a
    wrong device, or another shape of the base.
    """
    refs = [
        [as_operand(factor, operand).ref() for factor, operand in zip(group, operands, strict=True)]
        for group, operands in zip(factors, descriptor.source_operands, strict=True)
    ]
    device = factors[0][0].device
    plan = WeightPlan.select(None, descriptor, device=device)
    out = DeviceArray.empty(descriptor.shape, descriptor.out, device)
    args = WeightArgs(
        out.mut(),
        refs,
        scales,
        base=None if base is None else base.ref(),
        magnitude=None if magnitude is None else magnitude.reshape((magnitude.size,)).ref(),
        strength=strength,
    )
    run(plan, args)
    return out


def delta(
    source: Source,
    factors: Sequence[DeviceArray],
    shape: Sequence[int],
    scale: float = 1.0,
    kind: ElementKind | None = None,
    layout: WeightLayout = WeightLayout.CHECKPOINT,
) -> DeviceArray:
    """round(scale * source) over a weight of ``shape`` [out, in, *kernel], stored as ``layout`` says.

    ``kind`` is the result's, the first factor's where none is given.
    """
    out_features, in_features, *kernel = shape
    descriptor = WeightDescriptor(
        out_features,
        in_features,
        (source,),
        out=kind or factors[0].kind,
        kernel=tuple(kernel),
        sink=Sink.DELTA,
        layout=layout,
    )
    return evaluate(descriptor, [factors], [scale])
