"""Tables of tensors in device memory, uploaded when what they name has changed."""

from __future__ import annotations

from collections.abc import Hashable

import numpy as np

from lycoris.tensor.launch import shaped
from lycoris.tensor.tensor import Tensor
from lycoris.tensor.uploaded import Uploaded
from plans.core import Device


class Tables:
    """Arrays on a device by name. A graph that is captured has copies of its own, which stay as they are."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._uploaded: dict[Hashable, Uploaded] = {}

    def set(self, name: Hashable, array: np.ndarray) -> Tensor:
        """An array on the device."""
        if self._device.capturing:
            return Uploaded(self._device).set(array)
        if name not in self._uploaded:
            self._uploaded[name] = Uploaded(self._device)
        return self._uploaded[name].set(array)


def flat(x: Tensor) -> Tensor:
    """A contiguous tensor with one axis."""
    return shaped(x, (x.size,))
