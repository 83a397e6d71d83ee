"""Memory shared with other libraries, without copies: DLPack and ``__cuda_array_interface__``.

    y = torch.from_dlpack(x)                  # x is a tensor of ours
    z = tensor.from_dlpack(torch_tensor)

The struct is that of DLPack 0.8 (github.com/dmlc/dlpack, dlpack.h). In the simulator memory is the host's, and so is
the exchange (NumPy's arrays of kinds that NumPy has).
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from lycoris.buffers import stream_of
from lycoris.errors import RefusedInput
from lycoris.tensor.tensor import Storage, Tensor, layout_of
from plans.core import Device, DeviceBuffer, ElementKind
from plans.core.tensor import contiguous_strides

_CPU, _CUDA, _CUDA_MANAGED = 1, 2, 13
_TYPES = {
    ElementKind.F32: (2, 32), ElementKind.F16: (2, 16), ElementKind.BF16: (4, 16), ElementKind.I32: (0, 32),
    ElementKind.I64: (0, 64),
}  # fmt: skip
"""Kind -> DLPack's type code and bits."""
_KINDS = {value: kind for kind, value in _TYPES.items()}
_NAME, _USED = b"dltensor", b"used_dltensor"


class _DLTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p), ("device_type", ctypes.c_int), ("device_id", ctypes.c_int), ("ndim", ctypes.c_int),
        ("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)), ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )  # fmt: skip


class _DLManagedTensor(ctypes.Structure):
    pass


_Deleter = ctypes.CFUNCTYPE(None, ctypes.POINTER(_DLManagedTensor))
_DLManagedTensor._fields_ = (("dl_tensor", _DLTensor), ("manager_ctx", ctypes.c_void_p), ("deleter", _Deleter))
_Destructor = ctypes.PYFUNCTYPE(None, ctypes.c_void_p)


def _python(name: str, result: Any, *arguments: Any) -> Callable:
    function = getattr(ctypes.pythonapi, name)
    function.restype, function.argtypes = result, arguments
    return function


_new_capsule = _python("PyCapsule_New", ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, _Destructor)
_is_valid = _python("PyCapsule_IsValid", ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p)
_get_pointer = _python("PyCapsule_GetPointer", ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p)
_set_name = _python("PyCapsule_SetName", ctypes.c_int, ctypes.py_object, ctypes.c_char_p)

_exported: dict[int, tuple] = {}
"""Address of a struct that was handed out -> it and what it refers to, until its reader is done with it."""


@_Deleter
def _release(managed: Any) -> None:
    _exported.pop(ctypes.addressof(managed.contents), None)


@_Destructor
def _drop_capsule(capsule: int) -> None:
    """A capsule that nobody took gives its struct back; one that was taken has another name."""
    if _is_valid(capsule, _NAME):
        _exported.pop(_get_pointer(capsule, _NAME), None)


def dlpack_device(x: Tensor) -> tuple[int, int]:
    """DLPack's device type and number."""
    return (_CPU, 0) if x.device.is_simulator else (_CUDA, x.device.ordinal)


def dlpack(
    x: Tensor,
    *,
    stream: int | None = None,
    max_version: tuple[int, int] | None = None,
    dl_device: tuple[int, int] | None = None,
    copy: bool | None = None,
) -> Any:
    """A capsule that shares x's memory, or with ``copy`` a copy's; work on it that was launched before is waited for.

    Raises RefusedInput for a tensor that requires a gradient, and BufferError for another device.
    """
    del stream, max_version  # x's own stream is done when this returns, so any may read; the struct is the first one
    if x.requires_grad:
        raise RefusedInput("dlpack: the tensor requires a gradient, which others do not see; detach() it first")
    if dl_device is not None and tuple(dl_device) != dlpack_device(x):
        raise BufferError(
            f"dlpack: memory of device {dlpack_device(x)}, {tuple(dl_device)} was asked for; copy it first"
        )
    x = x.clone() if copy else x
    x.device.synchronize(stream_of(x.device))
    shape, strides = ((ctypes.c_int64 * max(1, x.ndim))(*values) for values in (x.shape, x.strides))
    code, bits = _TYPES[x.kind]
    address = x.storage.buffer.address + x.offset * x.kind.itemsize
    held = _DLManagedTensor(
        _DLTensor(address, *dlpack_device(x), x.ndim, code, bits, 1, shape, strides, 0), None, _release
    )
    _exported[ctypes.addressof(held)] = (held, shape, strides, x.storage)
    return _new_capsule(ctypes.addressof(held), _NAME, _drop_capsule)


class _Borrowed:
    """Memory of another library, given back when the last tensor over it is gone."""

    def __init__(self, release: Callable[[], None]) -> None:
        self._release = release

    def close(self, stream: Any = None) -> None:
        """Nothing: the memory is not ours to free early."""

    def __del__(self) -> None:
        self._release()


class _BorrowedBuffer(DeviceBuffer):
    __slots__ = ("borrowed",)


def _adopt(
    address: int, shape: tuple[int, ...], strides: tuple[int, ...], kind: ElementKind, release: Callable, device: Device
) -> Tensor:
    """A tensor over memory at an address."""
    if min(strides, default=0) < 0:
        release()
        raise RefusedInput(f"exchange: strides {strides}, wanted none of them negative; copy the array first")
    span = 1 + sum((e - 1) * s for e, s in zip(shape, strides, strict=True)) if math.prod(shape) else 0
    nbytes, borrowed = span * kind.itemsize, _Borrowed(release)
    memory = borrowed
    if device.is_simulator:
        memory = (
            np.frombuffer((ctypes.c_uint8 * nbytes).from_address(address), np.uint8) if nbytes else np.empty(0, "u1")
        )
    buffer = _BorrowedBuffer(device, memory, address, nbytes)
    buffer.borrowed = borrowed
    return Tensor(Storage(buffer), layout_of(shape, kind, strides))


def from_dlpack(x: Any, device: Device | None = None) -> Tensor:
    """A tensor over the memory of any object with ``__dlpack__``, which is kept alive.

    Raises RefusedInput where it lies on another device, or has a type that no kind stores.
    """
    device = device or Device.open("auto")
    kind_of_device, number = x.__dlpack_device__()
    wanted = (_CPU,) if device.is_simulator else (_CUDA, _CUDA_MANAGED)
    if kind_of_device not in wanted or (not device.is_simulator and number != device.ordinal):
        found = (int(kind_of_device), int(number))
        raise RefusedInput(f"from_dlpack: memory on DLPack's device {found}, wanted {device.name}; copy it there")
    options = {} if device.is_simulator else {"stream": int(stream_of(device).handle)}
    capsule = x.__dlpack__(**options)
    pointer = _get_pointer(id(capsule), _NAME)
    managed = ctypes.cast(pointer, ctypes.POINTER(_DLManagedTensor))
    t = managed.contents.dl_tensor
    kind = _KINDS.get((t.code, t.bits))
    if kind is None or t.lanes != 1:
        raise RefusedInput(
            f"from_dlpack: elements of type code {t.code}, {t.bits} bits, {t.lanes} lanes, wanted 1 of {list(_KINDS)}; "
            "convert them first"
        )
    _set_name(capsule, _USED)
    shape = tuple(t.shape[i] for i in range(t.ndim))
    strides = tuple(t.strides[i] for i in range(t.ndim)) if t.strides else contiguous_strides(shape)

    def release() -> None:
        if managed.contents.deleter:
            managed.contents.deleter(managed)

    return _adopt(t.data + t.byte_offset if t.data else 0, shape, strides, kind, release, device)


def cuda_array_interface(x: Tensor) -> dict[str, Any]:
    """CUDA Array Interface 3 (numba.readthedocs.io). It has no bf16: AttributeError, as where there is no GPU."""
    if x.device.is_simulator or x.kind is ElementKind.BF16:
        raise AttributeError("__cuda_array_interface__: not for bf16, nor in the simulator; use __dlpack__")
    size = x.kind.itemsize
    return {
        "version": 3,
        "shape": x.shape,
        "strides": tuple(step * size for step in x.strides),
        "typestr": x.kind.values.str,
        "data": (x.storage.buffer.address + x.offset * size, False),
        "stream": int(stream_of(x.device).handle),
    }


def from_cuda_array(x: Any, device: Device | None = None) -> Tensor:
    """A tensor over the memory of an object with ``__cuda_array_interface__``, which is kept alive.

    What was launched on the object's stream is waited for. Raises RefusedInput for types that no kind stores.
    """
    device = device or Device.open("auto")
    given = x.__cuda_array_interface__
    dtype = np.dtype(given["typestr"])
    kind = {k.values: k for k in _TYPES}.get(dtype)
    if kind is None:
        raise RefusedInput(
            f"from_cuda_array: elements of {dtype}, wanted one of {[str(k.values) for k in _TYPES]}; convert them first"
        )
    shape, steps = tuple(given["shape"]), given.get("strides")
    if steps is not None and any(step % kind.itemsize for step in steps):
        raise RefusedInput(
            f"from_cuda_array: strides of {steps} bytes, wanted multiples of an element's {kind.itemsize}; "
            "copy the array first"
        )
    strides = contiguous_strides(shape) if steps is None else tuple(step // kind.itemsize for step in steps)
    if given.get("stream"):
        from cuda.core import Stream

        Stream.from_handle(given["stream"]).sync()
    held = [x]
    return _adopt(given["data"][0], shape, strides, kind, held.clear, device)
