"""What the kernels are compiled for and how they are launched: a GPU through cuda.core, or Numba's CUDA simulator.

The choice is made once, when this module is first imported: the simulator if ``NUMBA_ENABLE_CUDASIM=1`` or if
there is no NVIDIA driver to talk to. Numba reads that variable at import, so every module here takes ``cuda``
from this one.
"""

from __future__ import annotations

import ctypes
import functools
import os
import struct
import sys
import threading
import types as python_types
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np


def _driver_found() -> bool:
    """Whether libcuda loads and counts a device; asked without creating a context."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    count = ctypes.c_int(0)
    return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0


if "NUMBA_ENABLE_CUDASIM" not in os.environ and not _driver_found():
    os.environ["NUMBA_ENABLE_CUDASIM"] = "1"
    if not os.environ.get("LYCORIS_QUIET"):
        print("lycoris: no NVIDIA driver found, using Numba's CUDA simulator", file=sys.stderr)

from numba.cuda import types  # noqa: E402
from numba.cuda.core import config as _numba_config  # noqa: E402
from numba.cuda.np import numpy_support  # noqa: E402

from kernels import binary_cache, simulator  # noqa: E402
from kernels.binary_cache import Binary  # noqa: E402

SIMULATOR = bool(_numba_config.ENABLE_CUDASIM)
if SIMULATOR:
    cuda = simulator.cuda
else:
    from numba import cuda

    from kernels import launch

ComputeCapability = tuple[int, int] | tuple[int, int, str]

u16p = types.CPointer(types.uint16)
u32p = types.CPointer(types.uint32)
i32p = types.CPointer(types.int32)
i64p = types.CPointer(types.int64)
f32p = types.CPointer(types.float32)
i64 = types.int64
f32 = types.float32


def device(fn: Callable) -> Callable:
    """Mark a device function: inlined into its kernels on a GPU, a plain function in the simulator."""
    return fn if SIMULATOR else cuda.jit(device=True, forceinline=True)(fn)


@dataclass(frozen=True, eq=False)
class Kernel:
    """A kernel function with everything its compilation depends on.

    ``parameters`` are Numba types; tuples of types are passed flattened. ``key`` names the function and the
    compile-time choices that made it: with the sources of ``module`` it is the disk cache's key. ``cluster`` blocks
    along x run together (sm_90). An ``early`` kernel begins while the one before it ends, and waits for that itself
    (sm_90).
    """

    function: Callable
    parameters: tuple
    threads: int
    key: str
    module: str = ""
    min_blocks: int = 1
    max_registers: int | None = None
    shared_bytes: int = 0
    cluster: int = 1
    early: bool = False
    architectures: ComputeCapability = (8, 0)
    _handles: dict = field(default_factory=dict)

    def compile(self, cc: ComputeCapability) -> Binary:
        """Compile for ``cc`` (no GPU needed) with NVVM and nvJitLink, straight to machine code."""
        return Binary(*compile_function(self, cc))

    def launcher(self, grid: tuple[int, int, int], shared_bytes: int | None = None, overlaps: bool = False) -> Launcher:
        """The kernel with its grid, ready for the current device.

        With ``overlaps`` it begins when the one before allows it, and waits itself for what it needs (sm_90).
        """
        shared = self.shared_bytes if shared_bytes is None else shared_bytes
        if SIMULATOR:
            return SimulatedLauncher(self, grid, shared)
        return GpuLauncher(self, grid, shared, overlaps or self.early)


class Launcher:
    """``launcher(stream, arguments)`` runs the kernel asynchronously; arguments are flat, in signature order."""

    __slots__ = ()

    def __call__(self, stream: Any, arguments: tuple) -> None:
        """Launch on ``stream``."""
        raise TypeError("Launcher is abstract")


class SimulatedLauncher(Launcher):
    """Runs the Python function itself, block by block, in Numba's simulator."""

    __slots__ = ("_grid", "_kernel", "_shared")

    def __init__(self, kernel: Kernel, grid: tuple[int, int, int], shared: int) -> None:
        self._kernel, self._grid, self._shared = kernel, grid, shared

    def __call__(self, stream: Any, arguments: tuple) -> None:
        """Run to the end, or record that; arguments that a GPU would misread are refused."""
        kernel, rest = self._kernel, iter(arguments)
        nested = tuple(_take_argument(kernel.key, parameter, rest) for parameter in kernel.parameters)
        if unused := len(list(rest)):
            raise TypeError(f"{kernel.key}: {unused} of {len(arguments)} arguments too many")
        if stream is not None:
            stream.record(lambda: self(None, arguments))
            return
        simulator.launch(kernel.function, self._grid, kernel.threads, self._shared, nested, kernel.cluster)


def _take_argument(key: str, parameter: types.Type, arguments: Iterator[Any]) -> Any:
    """The next argument as the kernel's parameter; refused where a GPU would read other bits than meant."""
    if isinstance(parameter, types.BaseTuple):
        return tuple(_take_argument(key, part, arguments) for part in parameter)
    argument = next(arguments, None)
    if isinstance(parameter, types.CPointer):
        dtype = numpy_support.as_dtype(parameter.dtype)
        if not isinstance(argument, np.ndarray) or argument.dtype != dtype or argument.ndim != 1:
            found = getattr(argument, "dtype", type(argument).__name__)
            raise TypeError(f"{key}: {parameter} got {found}, wanted a flat array of {dtype}")
        return argument
    scalar = numpy_support.as_dtype(parameter).type
    if isinstance(argument, scalar):
        return argument
    if type(argument) is not int or isinstance(parameter, types.Float):
        raise TypeError(f"{key}: {parameter} got {type(argument).__name__}, wanted np.{scalar.__name__}")
    return scalar(argument)


class GpuLauncher(Launcher):
    """Launches machine code; `bound` keeps what it needs for that."""

    __slots__ = ("_attributes", "_configs", "_layout", "_loaded", "_shape", "binary", "function", "key")

    def __init__(self, kernel: Kernel, grid: tuple[int, int, int], shared: int, overlaps: bool) -> None:
        assert grid[0] % kernel.cluster == 0, (kernel.key, grid)
        self.key = kernel.key
        self._loaded, self.binary = _handle(kernel, shared)
        self.function = launch.function_of(self._loaded)
        self._shape, self._attributes = (grid, kernel.threads, shared), launch.attributes(overlaps, kernel.cluster)
        self._layout = launch.ArgumentLayout([_letter(parameter) for parameter in _flat(kernel.parameters)])
        self._configs: dict[int, Any] = {}

    def __call__(self, stream: Any, arguments: tuple) -> None:
        """Launch on ``stream``."""
        launch.GpuLaunches([(self, arguments)])(stream)

    def pack(self, arguments: tuple) -> ctypes.Array:
        """The arguments as the driver reads them. Raises TypeError where one is not of its parameter's type."""
        try:
            return self._layout.pack(arguments)
        except struct.error as error:
            raise TypeError(f"{self.key}: arguments {arguments}: {error}") from error

    def config(self, stream: int) -> Any:
        """The description of its launch on a stream, by the stream's handle; made once."""
        found = self._configs.get(stream)
        if found is None:
            if len(self._configs) >= _MOST_STREAMS:
                self._configs.clear()
            found = self._configs[stream] = launch.config(stream, *self._shape, self._attributes)
        return found


_MOST_STREAMS = 64


def _flat(parameters: Iterable) -> Iterator[types.Type]:
    for parameter in parameters:
        if isinstance(parameter, types.BaseTuple):
            yield from _flat(parameter)
        else:
            yield parameter


def _letter(parameter: types.Type) -> str:
    """A parameter's type as `struct` writes it."""
    return "Q" if isinstance(parameter, types.CPointer) else numpy_support.as_dtype(parameter).char


def bound(launches: Iterable[tuple[Callable, tuple]]) -> Callable[[Any], None]:
    """What runs launchers with their arguments, one after the other, on the stream that it is given."""
    if not SIMULATOR:
        return launch.GpuLaunches(launches)
    listed = list(launches)

    def run(stream: Any) -> None:
        for launcher, arguments in listed:
            launcher(stream, arguments)

    return run


_compile_lock = threading.RLock()


@dataclass
class _Loaded:
    """A kernel on one device; `dynamic_bytes` is the most shared memory that a launcher has opted in to."""

    kernel: Any
    binary: Binary
    code: Any
    dynamic_bytes: int = 0


def _handle(kernel: Kernel, shared: int) -> tuple[Any, Binary]:
    """The loaded kernel on the current device: compiled, or read from the disk cache, once."""
    from cuda.bindings import driver
    from cuda.core import Device, ObjectCode

    current = Device()
    with _compile_lock:
        found = kernel._handles.get(current.device_id)
        if found is None:
            cc = target_of(current.compute_capability)
            binary = binary_cache.load_or_compile(kernel, cc)
            code = ObjectCode.from_cubin(binary.cubin)
            found = kernel._handles[current.device_id] = _Loaded(code.get_kernel(binary.entry), binary, code)
        if shared > found.dynamic_bytes:
            attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            handle = driver.CUkernel(int(found.kernel.handle))
            (status,) = driver.cuKernelSetAttribute(attribute, shared, handle, current.device_id)
            if status != driver.CUresult.CUDA_SUCCESS:
                raise RuntimeError(f"{kernel.key}: {shared} bytes of shared memory refused: {status}")
            found.dynamic_bytes = shared
    return found.kernel, found.binary


def target_of(compute_capability: tuple[int, int]) -> ComputeCapability:
    """The architecture to compile for: from Hopper on the 'a' variant, which has wgmma and setmaxnreg."""
    major, minor = compute_capability
    return (major, minor, "a") if (major, minor) >= (9, 0) else (major, minor)


def compile_function(kernel: Kernel, cc: ComputeCapability) -> tuple[bytes, str, str]:
    """Compile with numba-cuda's own pipeline for any architecture, GPU or not: (cubin, entry, linker log).

    Numba-CUDA's public eager compilation asks the current device for its capability and links with the
    driver; here the capability is given, and nvJitLink makes the cubin, so that no PTX newer than the
    driver reaches it. LTO keeps ``setmaxnreg``, which plain PTX linking drops.
    """
    from numba.cuda import dispatcher
    from numba.cuda.compiler import _compile_pyfunc_with_fixup

    with _compile_lock:
        real = dispatcher.get_current_device
        dispatcher.get_current_device = lambda: python_types.SimpleNamespace(compute_capability=cc[:2])
        try:
            library, _ = _compile_pyfunc_with_fixup(
                kernel.function,
                types.void(*kernel.parameters),
                device=False,
                abi="numba",
                cc=cc,
                launch_bounds=(kernel.threads, kernel.min_blocks),
            )
        finally:
            dispatcher.get_current_device = real
        library._lto = True
        library._max_registers = kernel.max_registers
        cubin = library.get_cubin(cc=cc)
        return bytes(cubin.code), library._entry_name, str(library.get_linkerinfo(cc))


LEAST_SHARED_BYTES = 163 * 1024
"""Shared memory of a multiprocessor of sm_80, the least of the architectures that tensor-core kernels are built for."""
HOPPER_SHARED_BYTES = 227 * 1024
"""The same of sm_90."""


def blocks_by_shared(shared_bytes: int, hopper: bool = False) -> int:
    """How many blocks of so much shared memory fit on a multiprocessor, at least 1: a bound for ``min_blocks``.

    ``hopper``: of a kernel that is built for no less than sm_90.
    """
    there = HOPPER_SHARED_BYTES if hopper else LEAST_SHARED_BYTES
    return max(1, there // max(1, shared_bytes + 1024))


FACTORIES: list[Callable] = []


def kernel_factory(*examples: tuple) -> Callable:
    """Decorate a function of compile-time choices that returns ``(function, parameters, options)``.

    The result is a cached factory of :class:`Kernel`; a kernel's key is the factory's name and its arguments.
    ``examples`` are argument tuples that the offline compile check builds for every architecture.
    """

    def decorate(fn: Callable) -> Callable:
        @functools.cache
        def make(*choices: Any) -> Kernel:
            key = f"{fn.__module__}.{fn.__qualname__}{choices!r}"
            assert " at 0x" not in key, f"{key}: choices name a binary on disk, so they must be plain data"
            function, parameters, options = fn(*choices)
            return Kernel(function, parameters, key=key, module=fn.__module__, **options)

        functools.update_wrapper(make, fn)
        make.examples = examples
        FACTORIES.append(make)
        return make

    return decorate
