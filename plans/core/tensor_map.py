"""Tensor maps, and constants in device memory: what kernels read that is too large to be a launch's argument.

A tensor map is what TMA needs to know of a tensor, encoded by the driver: address, shape, stride, and the box that one
operation moves. Maps, and the tables of segments that name them, are constants: equal words are kept once a device,
and for good, since a captured graph may name them long after the arguments that they were made for are gone.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from dataclasses import dataclass
from typing import Any

import numpy as np

from kernels.simulator_hopper import MAP_WORDS, MAPS, TensorMap
from kernels.target import SIMULATOR
from plans.core.device import Device, DeviceBuffer, _check
from plans.core.precision import ElementKind

MAP_BYTES = 8 * MAP_WORDS
_SLAB_BYTES = 1 << 17


@dataclass(frozen=True)
class Box:
    """A tensor and the box of it that one TMA operation moves; all axes from the contiguous one on.

    ``strides`` count elements, of all axes but the first. Of an axis whose step is not 1 the box spans that many times
    the elements that it moves. ``swizzle`` is 128, 64 or 32 bytes, at least a line of the box.
    """

    address: int
    element: ElementKind
    extents: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    steps: tuple[int, ...] = ()
    swizzle: int = 128

    @classmethod
    def of_matrix(
        cls,
        address: int,
        element: ElementKind,
        shape: tuple[int, int],
        row_stride: int,
        box: tuple[int, int],
        swizzle: int = 128,
    ) -> Box:
        """A row-major matrix; ``shape`` and ``box`` are (rows, columns)."""
        return cls(address, element, shape[::-1], (row_stride,), box[::-1], (), swizzle)

    @classmethod
    def of_blocks(
        cls,
        address: int,
        element: ElementKind,
        shape: tuple[int, int, int],
        row_stride: int,
        box: tuple[int, int, int],
    ) -> Box:
        """Rows of neighbouring blocks; ``shape`` and ``box`` are (rows, blocks of a row, elements of a block)."""
        return cls(address, element, shape[::-1], (shape[2], row_stride), box[::-1])

    @property
    def all_steps(self) -> tuple[int, ...]:
        """A step for every axis."""
        return self.steps or (1,) * len(self.extents)


def encode(box: Box) -> np.ndarray:
    """The map's 16 words of 64 bits; in the simulator, a number."""
    size = box.element.itemsize
    assert box.address % 16 == 0 and all(stride * size % 16 == 0 for stride in box.strides), box
    assert 16 <= box.box[0] * size <= box.swizzle and max(box.box) <= 256 and 2 <= len(box.extents) <= 5, box
    if SIMULATOR:
        strides = tuple(stride * size for stride in box.strides)
        simulated = TensorMap(box.address, size, box.extents, strides, box.box, box.all_steps, box.swizzle)
        words = np.zeros(MAP_WORDS, np.int64)
        words[0] = len(MAPS)
        MAPS[len(MAPS)] = simulated
        return words
    return _encode_for_driver(box)


@functools.cache
def _driver_function() -> Any:
    """The driver's own cuTensorMapEncodeTiled.

    That of cuda.bindings has the map written into a Python object, which lies at a multiple of 16 bytes; the driver
    refuses it, or crashes, where that is none of 64 (github.com/NVIDIA/cuda-python/pull/1692).
    """
    function = ctypes.CDLL("libcuda.so.1").cuTensorMapEncodeTiled
    pointer, number, enumerator = ctypes.c_void_p, ctypes.c_uint32, ctypes.c_int
    function.argtypes = (pointer, enumerator, number, *(pointer,) * 5, *(enumerator,) * 4)
    return function


def _encode_for_driver(box: Box) -> np.ndarray:
    from cuda.bindings import driver

    kinds = {
        ElementKind.BF16: driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
        ElementKind.F16: driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
        ElementKind.F32: driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_FLOAT32,
    }
    swizzles = {
        128: driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
        64: driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_64B,
        32: driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_32B,
    }
    room = np.zeros(2 * MAP_WORDS, np.int64)
    start = -room.ctypes.data % MAP_BYTES // 8
    words = room[start : start + MAP_WORDS]
    extents, strides = (ctypes.c_uint64 * len(box.extents))(*box.extents), (ctypes.c_uint64 * len(box.strides))()
    strides[:] = [stride * box.element.itemsize for stride in box.strides]
    moved, steps = ((ctypes.c_uint32 * len(box.extents))(*values) for values in (box.box, box.all_steps))
    status = _driver_function()(
        words.ctypes.data,
        kinds[box.element],
        len(box.extents),
        box.address,
        extents,
        strides,
        moved,
        steps,
        driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        swizzles[box.swizzle],
        driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
    )
    _check(driver.CUresult(status), f"encoding a tensor map of {box}")
    return words


class Constants:
    """Words in the memory of a device, by their content."""

    def __init__(self, device: Device) -> None:
        self._device, self._lock = device, threading.Lock()
        self._found: dict[bytes, tuple[DeviceBuffer, int]] = {}
        self._slab: DeviceBuffer | None = None
        self._used = 0

    def pointer(self, words: np.ndarray) -> Any:
        """Where the words are, as a kernel argument of 64-bit integers; they are copied there if they are not yet."""
        key = words.tobytes()
        with self._lock:
            if key not in self._found:
                self._found[key] = self._place(words)
            slab, offset = self._found[key]
        return slab.pointer(np.int64, offset)

    def address(self, words: np.ndarray) -> int:
        """The same as an address."""
        pointer = self.pointer(words)
        return pointer.ctypes.data if SIMULATOR else pointer

    def _place(self, words: np.ndarray) -> tuple[DeviceBuffer, int]:
        stream, nbytes = self._device._own_stream, -(-words.nbytes // MAP_BYTES) * MAP_BYTES
        if self._slab is None or self._used + nbytes > self._slab.nbytes:
            self._slab, self._used = self._device.allocate(max(_SLAB_BYTES, nbytes), stream), 0
        offset, self._used = self._used, self._used + nbytes
        self._device.copy_in(self._slab, offset, words, stream)
        self._device.synchronize(stream)
        return self._slab, offset


@functools.cache
def constants(device: Device) -> Constants:
    """The constants of a device."""
    return Constants(device)


@functools.lru_cache(maxsize=1 << 16)
def map_address(device: Device, box: Box) -> int:
    """The address of a box's map in the memory of a device."""
    return constants(device).address(encode(box))
