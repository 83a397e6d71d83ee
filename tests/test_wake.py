"""The driver's early start: which device it asks for, and that it leaves every fault to `Device.open`."""

from __future__ import annotations

import ctypes
import threading

import pytest

from plans import wake


class Driver:
    """Stands for libcuda: every call is noted and answered with `status`."""

    def __init__(self, status: int = 0) -> None:
        self.status, self.calls = status, []

    def __getattr__(self, name):
        def call(*arguments):
            numbers = [argument.value for argument in arguments if isinstance(argument, ctypes.c_int)]
            self.calls.append((name, *numbers))
            return self.status

        return call


@pytest.fixture
def woken(monkeypatch):
    """`wake_driver` with a driver, run to its end: the calls it made."""

    def wake_with(driver, which="auto", **environment):
        monkeypatch.delenv("NUMBA_ENABLE_CUDASIM", raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(ctypes, "CDLL", lambda name: driver)
        before = set(threading.enumerate())
        wake.wake_driver(which)
        for thread in set(threading.enumerate()) - before:
            thread.join(10)
        return driver.calls

    return wake_with


@pytest.mark.parametrize(("which", "ordinal"), [("auto", 0), ("cuda:0", 0), ("cuda:3", 3), (f"cuda:{1 << 70}", 0)])
def test_a_context_is_made_for_the_device(woken, which, ordinal):
    calls = woken(Driver(), which)
    assert [name for name, *_ in calls] == ["cuInit", "cuDeviceGet", "cuDevicePrimaryCtxRetain"]
    assert calls[1] == ("cuDeviceGet", ordinal)


def test_a_driver_that_does_not_start_is_left_alone(woken):
    assert woken(Driver(status=100)) == [("cuInit",)]


@pytest.mark.parametrize(("which", "environment"), [("simulator", {}), ("auto", {"NUMBA_ENABLE_CUDASIM": "1"})])
def test_the_simulator_wakes_nothing(woken, which, environment):
    assert woken(Driver(), which, **environment) == []


def test_no_driver_is_no_fault(monkeypatch):
    def missing(name):
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", missing)
    wake._retain_context(0)
