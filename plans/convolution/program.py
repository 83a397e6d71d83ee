"""What the convolution SKUs share: flattened kernel arguments and guarantees."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from plans.convolution.descriptor import Conv2dArgs, Conv2dDescriptor, Conv2dInputGradientDescriptor
from plans.convolution.descriptor import Conv2dWeightGradientDescriptor as WeightGradient
from plans.core.device import Device
from plans.core.operand import Operand
from plans.core.precision import ElementKind, MathPrecision, PrecisionGuarantee
from plans.matmul.epilogue import Residual, RowScale, Step, units_after

Descriptor = Conv2dDescriptor | Conv2dInputGradientDescriptor | WeightGradient

MOST = (1 << 31) - 1


def is_input_gradient(descriptor: Descriptor) -> bool:
    """Whether pixels are the input's."""
    return isinstance(descriptor, Conv2dInputGradientDescriptor)


def refuses_extents(descriptor: Descriptor) -> str:
    """The refusal of problems whose pixels or elements 32 bits do not number, or ""."""
    g = descriptor.geometry
    reach = max(e + 2 * p for e, p in zip(g.extents, g.padding, strict=True))
    found = max(g.in_pixels * g.in_channels, g.out_pixels * g.out_channels, g.out_channels * g.taps * g.group_in, reach)
    return "" if found <= MOST else f"wants tensors of fewer than 2**31 elements, found {found}"


def convolution_guarantee(
    descriptor: Descriptor, precision: MathPrecision, units: float, derivation: str
) -> PrecisionGuarantee:
    """A sum with an error of ``units``, through the epilogue, whose steps add theirs."""
    return PrecisionGuarantee(
        math_precision=precision,
        accumulator=ElementKind.F32,
        deterministic=True,
        bit_stable_on_same_hardware=True,
        rounding_units=units_after(descriptor.epilogue, units),
        derivation=derivation,
    )


class ConvolutionProgram:
    """A SKU built for a descriptor; subclasses launch."""

    def __init__(self, descriptor: Descriptor, device: Device) -> None:
        self.descriptor, self.device = descriptor, device
        g = self.geometry = descriptor.geometry
        self.empty = descriptor.operands()[0].count == 0
        self.steps = tuple(step.kernel for step in descriptor.epilogue)
        transposed = is_input_gradient(descriptor)
        self.rows, channels = descriptor.matrix
        # Of a group: channels of the result and channels that are summed over.
        self.columns, self.inner = (g.group_in, g.group_out) if transposed else (g.group_out, g.group_in)
        self.result = (self.rows, self.columns, channels, self.columns)
        row, tap, channel = g.weight_strides
        group = g.group_out * row
        self.weight_strides = (group, channel, tap, row) if transposed else (group, row, tap, channel)

    def epilogue_arguments(self, args: Conv2dArgs) -> tuple:
        """Every step's parameters; the batch of the kernels' results are groups."""
        flat: list[Any] = []
        given = iter(zip(args.epilogue, args.numbers, strict=True))
        for step, operand in zip(self.descriptor.epilogue, self.descriptor.step_operands, strict=True):
            tensor, number = next(given) if operand is not None else (None, 1.0)
            view = None if operand is None else self._of_groups(step, operand)
            flat += step.parameters(tensor.data if tensor is not None else None, view, number)
        return tuple(flat)

    def _of_groups(self, step: Step, operand: Operand) -> Operand:
        """An epilogue's operand with an axis for groups where it has channels."""
        if isinstance(step, RowScale):
            return operand
        groups = self.geometry.groups
        if isinstance(step, Residual):
            shape = (groups, self.rows, self.columns)
            return replace(operand, shape=shape, layout=(self.columns, groups * self.columns, 1))
        return replace(operand, shape=(groups, self.columns))
