"""What all tests share: the device, random numbers that can be repeated, memory that shows what nobody wrote."""

from __future__ import annotations

import functools
import os
import secrets
from collections.abc import Callable, Iterator

os.environ.setdefault("LYCORIS_QUIET", "1")

import numpy as np
import pytest
from hypothesis import settings

from kernels.target import Kernel, f32p, i32p, i64, i64p, u16p, u32p
from plans.core.device import Device, DeviceBuffer

# Wall time of an example says nothing where sanitizers, workers or other users share the processor.
settings.register_profile("lycoris", deadline=None)
settings.load_profile("lycoris")


@pytest.fixture(scope="session", autouse=True)
def kernel_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Compiled kernels go to this run's temporary folder, which its workers share, or where LYCORIS_CACHE_DIR says."""
    if "LYCORIS_CACHE_DIR" in os.environ:
        yield
        return
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LYCORIS_CACHE_DIR", str(shared / "kernels"))
        yield


@pytest.fixture(scope="session")
def device() -> Device:
    """The GPU, or the simulator where there is none."""
    return Device.open("auto")


@pytest.fixture
def rng() -> np.random.Generator:
    """Fresh random numbers; a failing test shows the setting that repeats them."""
    seed = int(os.environ.get("LYCORIS_TEST_SEED") or secrets.randbits(32))
    print(f"LYCORIS_TEST_SEED={seed} repeats the random numbers")
    return np.random.default_rng(seed)


@pytest.fixture
def poisoned(device: Device) -> Callable[[int], DeviceBuffer]:
    """``poisoned(nbytes)``: device memory in which every float is NaN and every integer is all ones."""

    def allocate(nbytes: int) -> DeviceBuffer:
        return device.upload(np.full(nbytes, 0xFF, np.uint8))

    return allocate


_PROCESS = secrets.token_hex(8)
_POINTERS = {np.uint16: u16p, np.uint32: u32p, np.float32: f32p, np.int32: i32p, np.int64: i64p}


@pytest.fixture
def run_kernel(device: Device, poisoned: Callable) -> Callable:
    """``run_kernel(function, arguments, outputs)``: launch over arrays and integers, give the outputs as arrays.

    ``outputs`` are (dtype, shape) pairs; the kernel takes them after ``arguments``. ``options`` are the kernel's own.
    """

    def launch(function, arguments, outputs, grid=(1, 1, 1), threads=32, **options):
        buffers = [device.upload(a) if isinstance(a, np.ndarray) else a for a in arguments]
        buffers += [poisoned(int(np.prod(shape)) * np.dtype(dtype).itemsize) for dtype, shape in outputs]
        dtypes = [a.dtype.type if isinstance(a, np.ndarray) else None for a in arguments]
        dtypes += [dtype for dtype, _ in outputs]
        kernel = _kernel(
            function, tuple(_POINTERS.get(dtype, i64) for dtype in dtypes), threads, tuple(options.items())
        )
        stream = device.stream()
        kernel.launcher(grid)(stream, tuple(b.pointer(d) if d else b for b, d in zip(buffers, dtypes, strict=True)))
        device.synchronize(stream)
        written = zip(buffers[len(arguments) :], outputs, strict=True)
        return [device.download(buffer, dtype, shape) for buffer, (dtype, shape) in written]

    return launch


@functools.cache
def _kernel(function, parameters, threads, options):
    # The key names a binary on disk: what a closure has captured has no name, so each function is one of its own.
    key = f"{function.__module__}.{function.__qualname__} {id(function)} of process {_PROCESS}"
    return Kernel(function, parameters, threads, key=key, **dict(options))
