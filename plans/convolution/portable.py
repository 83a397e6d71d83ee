"""The portable SKUs of convolutions and their gradients: one thread an element, any geometry, groups and kinds."""

from __future__ import annotations

import numpy as np

from kernels.convolution.portable import THREADS, convolve, weight_gradient
from plans.convolution.descriptor import Conv2dArgs
from plans.convolution.program import (
    ConvolutionProgram,
    Descriptor,
    convolution_guarantee,
    is_input_gradient,
    refuses_extents,
)
from plans.core.device import Device
from plans.core.plan import Launches, Sku
from plans.core.precision import MathPrecision, PrecisionGuarantee
from plans.core.sku import ArchSku, BackendKind
from plans.core.workspace import Workspace


def _guarantee(descriptor: Descriptor) -> PrecisionGuarantee:
    derivation = "two roundings a term (fewer where the product is fused), then the epilogue's steps"
    return convolution_guarantee(descriptor, MathPrecision.F32, 2.0 * descriptor.depth, derivation)


class PortableProgram(ConvolutionProgram):
    """A convolution or its input's gradient in one launch."""

    def __init__(self, descriptor: Descriptor, device: Device) -> None:
        super().__init__(descriptor, device)
        if not self.empty:
            kinds = (descriptor.x.value, descriptor.weight.value, descriptor.out.value)
            kernel = convolve(is_input_gradient(descriptor), *kinds, self.steps)
            elements = self.rows * self.columns * self.geometry.groups
            self.launch = kernel.launcher((-(-elements // THREADS), 1, 1))

    def bind(self, args: Conv2dArgs, workspace: Workspace) -> Launches:
        """The launch; none where the result is empty."""
        if self.empty:
            return []
        g = self.geometry
        source = (args.first.data, self.inner, self.inner * g.groups)
        head = (*g.kernel_geometry, args.out.data, *self.result, g.groups, *source)
        return [(self.launch, (*head, args.second.data, *self.weight_strides, *self.epilogue_arguments(args)))]


class WeightGradientProgram(ConvolutionProgram):
    """A weight's gradient in one launch."""

    def __init__(self, descriptor: Descriptor, device: Device) -> None:
        super().__init__(descriptor, device)
        if not self.empty:
            kinds = (descriptor.x.value, descriptor.weight.value, descriptor.out.value)
            elements = self.geometry.out_channels * self.geometry.taps * self.geometry.group_in
            self.launch = weight_gradient(*kinds, self.steps).launcher((-(-elements // THREADS), 1, 1))

    def bind(self, args: Conv2dArgs, workspace: Workspace) -> Launches:
        """The launch; none where the result is empty."""
        if self.empty:
            return []
        g = self.geometry
        row, tap, channel = g.weight_strides
        result = (args.out.data, g.out_channels, g.group_in, row, tap)
        operands = (g.batch, args.first.data, args.second.data, g.in_channels)
        residuals = [
            value
            for tensor, number in zip(args.epilogue, args.numbers, strict=True)
            for value in (tensor.data, row, tap, np.float32(number))
        ]
        return [(self.launch, (*g.kernel_geometry, *result, channel, g.groups, *operands, *residuals))]


def _refuses_weight_gradient(descriptor: Descriptor) -> str:
    if descriptor.epilogue and descriptor.geometry.weight_layout != "OHWI":
        return "wants layout OHWI where a residual is added"
    return refuses_extents(descriptor)


PORTABLE = Sku(
    name="portable",
    backend=BackendKind.PORTABLE,
    arch=ArchSku.ANY,
    refuses=refuses_extents,
    guarantee=_guarantee,
    build=PortableProgram,
)
WEIGHT_GRADIENT_PORTABLE = Sku(
    name="portable",
    backend=BackendKind.PORTABLE,
    arch=ArchSku.ANY,
    refuses=_refuses_weight_gradient,
    guarantee=_guarantee,
    build=WeightGradientProgram,
)
