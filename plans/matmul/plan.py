"""The product plans: one product, and sums of several in one launch."""

from __future__ import annotations

from typing import Any, Self

import numpy as np

from plans.core.device import Device
from plans.core.errors import InvalidProblem
from plans.core.plan import Plan, PlanPreference, Sku
from plans.matmul.descriptor import MatmulDescriptor, SegmentedMatmulArgs, SegmentedMatmulDescriptor
from plans.matmul.in_parts import in_parts
from plans.matmul.low_rank import with_low_rank
from plans.matmul.mma import MMA, MMA_SPLIT
from plans.matmul.narrow import NARROW
from plans.matmul.narrow_streamed import NARROW_STREAMED
from plans.matmul.portable import PORTABLE
from plans.matmul.skinny import SKINNY
from plans.matmul.wgmma import WGMMA
from plans.matmul.wgmma_split import WGMMA_SPLIT

_LARGEST = float(np.finfo(np.float32).max)


class SegmentedMatmulPlan(Plan):
    """Y = epilogue(sum_s scale_s A_s B_s^T); see :class:`plans.matmul.SegmentedMatmulDescriptor`.

    A segment or low-rank term of scale 0 is left out: what its operands hold, NaN included, does not matter.
    """

    name = "segmented matmul"
    skus = (
        with_low_rank(SKINNY),
        SKINNY,
        NARROW_STREAMED,
        NARROW,
        in_parts(WGMMA),
        with_low_rank(WGMMA_SPLIT),
        WGMMA_SPLIT,
        with_low_rank(WGMMA),
        WGMMA,
        in_parts(MMA),
        with_low_rank(MMA_SPLIT),
        MMA_SPLIT,
        with_low_rank(MMA),
        MMA,
        PORTABLE,
    )

    def check(self, where: str, args: SegmentedMatmulArgs) -> None:
        """Compare operands with their declaration, and scales with the segments."""
        super().check(where, args)
        check_numbers(where, self.descriptor, args)


class MatmulPlan(SegmentedMatmulPlan):
    """Y = epilogue(A B^T): the one-segment case; see :class:`plans.matmul.MatmulDescriptor`."""

    name = "matmul"

    @classmethod
    def make(cls, descriptor: MatmulDescriptor, preference: PlanPreference, device: Device) -> Self:
        """The plan of the first SKU that accepts the sum of one product."""
        return super().make(_segmented(descriptor), preference, device)

    @classmethod
    def choose(cls, descriptor: Any, preference: PlanPreference, device: Device) -> Sku:
        """The SKU that ``select`` takes."""
        return super().choose(_segmented(descriptor), preference, device)


def _segmented(descriptor: MatmulDescriptor | SegmentedMatmulDescriptor) -> SegmentedMatmulDescriptor:
    return descriptor.segmented if isinstance(descriptor, MatmulDescriptor) else descriptor


def check_numbers(where: str, descriptor: SegmentedMatmulDescriptor, args: SegmentedMatmulArgs) -> None:
    """Compare the number of segments, terms and scales with the descriptor's, and refuse numbers beyond fp32."""
    for name, pairs, scales, wanted in (
        ("segments", args.segments, args.scales, len(descriptor.segments)),
        ("low-rank terms", args.low_rank, args.low_rank_scales, len(descriptor.low_rank)),
    ):
        if len(pairs) != wanted or len(scales) != wanted:
            found = f"{len(pairs)} {name} and {len(scales)} scales"
            raise InvalidProblem(f"{where}: {found} given, wanted {wanted} of each; give those of the descriptor")
    for number in (*args.scales, *args.low_rank_scales, *args.numbers):
        if not abs(number) <= _LARGEST:
            raise InvalidProblem(f"{where}: scale or beta {number:g}, wanted a finite fp32 value; give another")
