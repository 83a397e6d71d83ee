"""Have the CUDA driver start while Python is still importing.

The driver's start and a primary context take about half a second, in C and without Python's lock; so do the imports of
Numba and the plans, in Python. A program that knows it will use a GPU begins with the first:

    from plans.wake import wake_driver

    wake_driver("auto")
    from plans.core import Device
"""

from __future__ import annotations

import ctypes
import os
import threading


def wake_driver(which: str = "auto") -> None:
    """Begin to start the driver and device `which` (as `Device.open` takes it), in a thread of its own.

    It promises nothing and reports nothing: `Device.open` does, and finds its context made or under way.
    """
    kind, _, number = which.partition(":")
    if kind in ("auto", "cuda") and os.environ.get("NUMBA_ENABLE_CUDASIM") != "1":
        # No daemon: a process must not end, and unload the driver, while the driver starts.
        threading.Thread(target=_retain_context, args=(int(number or 0),)).start()


def _retain_context(ordinal: int) -> None:
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return
    device, context = ctypes.c_int(), ctypes.c_void_p()
    if driver.cuInit(0) == 0 and driver.cuDeviceGet(ctypes.byref(device), ctypes.c_int(ordinal)) == 0:
        driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)
