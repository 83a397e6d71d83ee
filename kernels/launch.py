"""Launches by the driver's own call, with everything that it reads made before: they cost little more than that call.

A launch is a description of its grid and stream, a kernel's function and its arguments. cuda.core makes and converts
them anew in every call, which takes a third of the driver's time besides (docs/performance.md, "CPU time").
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from cuda.bindings import driver

if TYPE_CHECKING:
    from kernels.target import GpuLauncher


class LaunchError(RuntimeError):
    """The driver refused a launch: its name for the error, what that means, and the kernel's key."""


class ArgumentLayout:
    """A kernel's arguments in one piece of memory, by their types as `struct` writes them: aligned as in C.

    Before them lies what says so to the driver: where they are, and how many bytes.
    """

    __slots__ = ("_bytes", "_packer", "_room")

    def __init__(self, letters: Sequence[str]) -> None:
        self._packer = struct.Struct("".join((_HEAD, *letters)))
        self._bytes = self._packer.size - _HEAD_BYTES
        self._room = ctypes.c_char * self._packer.size

    def pack(self, arguments: tuple) -> ctypes.Array:
        """The memory. Raises struct.error where an argument is not of its type, or they are not as many."""
        room = self._room()
        base = ctypes.addressof(room)
        head = (_POINTER, base + _HEAD_BYTES, _SIZE, base + _HEAD_BYTES - 8, _END, self._bytes)
        self._packer.pack_into(room, 0, *head, *arguments)
        return room


_HEAD = "6Q"
_HEAD_BYTES = struct.calcsize(_HEAD)
_POINTER, _SIZE, _END = (
    driver.CU_LAUNCH_PARAM_BUFFER_POINTER_AS_INT,
    driver.CU_LAUNCH_PARAM_BUFFER_SIZE_AS_INT,
    driver.CU_LAUNCH_PARAM_END_AS_INT,
)


def function_of(kernel: Any) -> driver.CUfunction:
    """A kernel that cuda.core has loaded, in the current context; launches by its own handle take a tenth longer."""
    status, found = driver.cuKernelGetFunction(driver.CUkernel(int(kernel.handle)))
    if status:
        raise LaunchError(f"{status.name}: a loaded kernel is not found in the current context")
    return found


def attributes(overlaps: bool, cluster: int) -> list[driver.CUlaunchAttribute]:
    """What a launch asks besides its grid: to begin while the one before it ends, and blocks that run together."""
    kinds, found = driver.CUlaunchAttributeID, []
    if overlaps:
        early = driver.CUlaunchAttribute()
        early.id = kinds.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        early.value.programmaticStreamSerializationAllowed = 1
        found.append(early)
    if cluster > 1:
        together = driver.CUlaunchAttribute()
        together.id = kinds.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
        extents = together.value.clusterDim
        extents.x, extents.y, extents.z = cluster, 1, 1
        found.append(together)
    return found


def config(
    stream: int, grid: tuple[int, int, int], threads: int, shared_bytes: int, asked: list[driver.CUlaunchAttribute]
) -> driver.CUlaunchConfig:
    """A launch of so many blocks on a stream, by its handle."""
    made = driver.CUlaunchConfig()
    made.gridDimX, made.gridDimY, made.gridDimZ = grid
    made.blockDimX, made.blockDimY, made.blockDimZ = threads, 1, 1
    made.sharedMemBytes, made.hStream = shared_bytes, driver.CUstream(stream)
    made.attrs, made.numAttrs = asked, len(asked)
    return made


class GpuLaunches:
    """Launchers with their arguments, in the order in which they run: on any stream, any number of times."""

    __slots__ = ("_launches", "_ready")

    def __init__(self, launches: Iterable[tuple[GpuLauncher, tuple]]) -> None:
        self._launches = [(launcher, launcher.pack(arguments)) for launcher, arguments in launches]
        self._ready: tuple[int | None, list] = (None, [])

    def __call__(self, stream: Any) -> None:
        """Launch everything on ``stream``. Raises LaunchError where the driver refuses."""
        handle = stream.__cuda_stream__()[1]
        made_for, ready = self._ready
        if made_for != handle:
            ready = self._made_ready(handle)
        for described, kernel, arguments, launcher in ready:
            (status,) = _launch(described, kernel, 0, arguments)
            if status:
                raise _error(status, launcher.key)

    def _made_ready(self, handle: int) -> list:
        ready = [(x.config(handle), x.function, ctypes.addressof(room), x) for x, room in self._launches]
        self._ready = handle, ready  # in one step, since other threads may be launching
        return ready


_launch = driver.cuLaunchKernelEx


def _error(status: driver.CUresult, key: str) -> LaunchError:
    _, words = driver.cuGetErrorString(status)
    return LaunchError(f"{status.name}: {words.decode()}, launching {key}")
