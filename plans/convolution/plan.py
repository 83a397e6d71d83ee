"""The convolution plans: forward, and the gradients of input and weight."""

from __future__ import annotations

import numpy as np

from plans.convolution.descriptor import Conv2dArgs
from plans.convolution.mma import MMA, WEIGHT_GRADIENT_MMA
from plans.convolution.portable import PORTABLE, WEIGHT_GRADIENT_PORTABLE
from plans.convolution.wgmma import WGMMA
from plans.convolution.wgmma_weight import WEIGHT_GRADIENT_WGMMA
from plans.core.errors import InvalidProblem
from plans.core.plan import Plan

_LARGEST = float(np.finfo(np.float32).max)


class _ConvolutionPlan(Plan):
    """What the three share."""

    def check(self, where: str, args: Conv2dArgs) -> None:
        """Compare operands with their declaration, and refuse numbers beyond fp32."""
        super().check(where, args)
        for number in args.numbers:
            if not abs(number) <= _LARGEST:
                raise InvalidProblem(f"{where}: beta {number:g}, wanted a finite fp32 value; give another")


class Conv2dPlan(_ConvolutionPlan):
    """Y = epilogue(X * W) in one to three axes; see :class:`plans.convolution.Conv2dDescriptor`."""

    name = "convolution"
    skus = (WGMMA, MMA, PORTABLE)


class Conv2dInputGradientPlan(_ConvolutionPlan):
    """The gradient of X; see :class:`plans.convolution.Conv2dInputGradientDescriptor`."""

    name = "convolution, gradient of the input"
    skus = (WGMMA, MMA, PORTABLE)


class Conv2dWeightGradientPlan(_ConvolutionPlan):
    """The gradient of the weight; see :class:`plans.convolution.Conv2dWeightGradientDescriptor`."""

    name = "convolution, gradient of the weight"
    skus = (WEIGHT_GRADIENT_WGMMA, WEIGHT_GRADIENT_MMA, WEIGHT_GRADIENT_PORTABLE)
