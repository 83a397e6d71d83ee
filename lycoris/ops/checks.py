"""Checks of shapes that operations make before a plan can name its operands."""

from __future__ import annotations

import math

from lycoris.buffers import DeviceArray
from lycoris.errors import RefusedInput
from plans.core import Operand


def check_axes(operation: str, name: str, tensor: DeviceArray, ndim: int) -> None:
    """Refuse a tensor of fewer than ``ndim`` axes, naming it."""
    if len(tensor.shape) < ndim:
        raise RefusedInput(
            f"{operation}: {name} has shape {tensor.shape}, wanted at least {ndim} axes; reshape it first"
        )


def as_operand(tensor: DeviceArray, operand: Operand) -> DeviceArray:
    """``tensor`` under the operand's shape: its axes from the operand's last one on may be several, or left out if 1.

    So [r, I, KH, KW] is read as [r, I * KH * KW], and [O, r, 1, 1] as [O, r]. Nothing else is: raises RefusedInput.
    """
    wanted = operand.shape
    leading = len(wanted) - 1
    if tensor.shape[:leading] != wanted[:-1] or math.prod(tensor.shape[leading:]) != wanted[-1]:
        raise RefusedInput(
            f"weight: operand {operand.name} has shape {tensor.shape}, wanted {wanted}; give the factors of one layer"
        )
    return tensor.reshape(wanted)
