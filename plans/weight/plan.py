"""The weight plan: adapters to deltas and merged weights, one rounding."""

from __future__ import annotations

import numpy as np

from plans.core.device import Device
from plans.core.errors import InvalidProblem
from plans.core.plan import Plan, PlanPreference, Sku
from plans.weight.cluster import CLUSTER
from plans.weight.descriptor import WeightArgs, WeightDescriptor
from plans.weight.kronecker import VECTOR, suits_in_group
from plans.weight.portable import PORTABLE
from plans.weight.tile import MMA
from plans.weight.wgmma import WGMMA

_LARGEST = float(np.finfo(np.float32).max)


class WeightPlan(Plan):
    """out = round(W + sum_i scale_i * source_i); see :class:`plans.weight.WeightDescriptor`."""

    name = "weight"
    skus = (VECTOR, CLUSTER, WGMMA, MMA, PORTABLE)

    def __init__(self, descriptor: WeightDescriptor, chosen: Sku, device: Device, grouped: bool = False) -> None:
        """Build the SKU; ``grouped`` plans leave their own kernel uncompiled until it is used."""
        super().__init__(descriptor, chosen, device)
        if self.program.kernel is not None and not grouped:
            _ = self.program.merge

    @classmethod
    def member(cls, descriptor: WeightDescriptor, preference: PlanPreference | None, device: Device) -> WeightPlan:
        """The plan of one weight of a group: as ``select`` has it, but for products that walk where they are many."""
        preference = preference or PlanPreference()
        chosen = cls.choose(descriptor, preference, device)
        if suits_in_group(descriptor) and not cls._reason_against(VECTOR, descriptor, preference, device):
            chosen = VECTOR
        return cls(descriptor, chosen, device, grouped=True)

    def check(self, where: str, args: WeightArgs) -> None:
        """Compare operands with their declaration, and factors and scales with the sources."""
        super().check(where, args)
        wanted = self.descriptor.source_operands
        if len(args.scales) != len(wanted):
            raise InvalidProblem(
                f"{where}: {len(args.scales)} scales given, wanted {len(wanted)}: one for each source; give them"
            )
        for number in (*args.scales, args.strength):
            if not abs(number) <= _LARGEST:
                raise InvalidProblem(f"{where}: scale or strength {number:g}, wanted a finite fp32 value; give another")
        if [*map(len, args.factors)] != [*map(len, wanted)]:
            names = "; ".join(", ".join(operand.name for operand in group) for group in wanted)
            raise InvalidProblem(
                f"{where}: factors in groups of {[*map(len, args.factors)]}, wanted them as {names}; "
                "give each source its own"
            )
