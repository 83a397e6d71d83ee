"""Small arrays in device memory, written when what they say has changed."""

from __future__ import annotations

import numpy as np

from lycoris.buffers import stream_of
from lycoris.tensor.launch import empty
from lycoris.tensor.tensor import Storage, Tensor, layout_of
from plans.core import Device, ElementKind


class Uploaded:
    """An array's copy on the device, in the same memory as long as its shape is the same."""

    def __init__(self, device: Device) -> None:
        self.device, self._array, self.tensor = device, None, None

    def set(self, array: np.ndarray) -> Tensor:
        """The array on the device; copied unless it is what is there.

        While a graph is captured the copy is made at once, to memory of the graph's, and is no part of it.
        """
        array = np.ascontiguousarray(array)
        if self.device.capturing:
            self._array = array.copy()
            buffer = self.device.upload(self._array)
            self.tensor = Tensor(Storage(buffer), layout_of(array.shape, ElementKind.of(array.dtype)))
            return self.tensor
        same_shape = self._array is not None and array.shape == self._array.shape and array.dtype == self._array.dtype
        if not same_shape:
            self.tensor = empty(array.shape, ElementKind.of(array.dtype), self.device)
        if not same_shape or not np.array_equal(array, self._array, equal_nan=True):
            # Pageable memory is staged before the call returns, and a copy of ours is what stays comparable.
            self._array = array.copy()
            if array.nbytes:
                self.device.copy_in(self.tensor.storage.buffer, 0, self._array, stream_of(self.device))
        return self.tensor
