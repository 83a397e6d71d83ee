"""Conversion of a tensor's elements."""

from __future__ import annotations

from lycoris.buffers import DeviceArray, run
from plans.cast import CastArgs, CastDescriptor, CastPlan
from plans.core import ElementKind


def cast(x: DeviceArray, kind: ElementKind) -> DeviceArray:
    """A new tensor of ``kind`` with the values of ``x``, rounded once to nearest even; a copy where it has that kind.

    bf16, fp16 and fp32; raises plans.core.NoSku for other kinds.
    """
    plan = CastPlan.select(None, CastDescriptor(x.size, x.kind, kind), device=x.device)
    out = DeviceArray.empty(x.shape, kind, x.device)
    flat = (x.size,)
    run(plan, CastArgs(out.reshape(flat).mut(), x.reshape(flat).ref()))
    return out
