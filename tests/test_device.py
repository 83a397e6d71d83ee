"""Device memory and the errors of devices."""

from __future__ import annotations

import numpy as np
import pytest

from plans.core import DeviceError, ElementKind, device_memory
from plans.core import device as core_device
from plans.core.device import device_error, driver_errors

TOO_MUCH = 1 << 60


@pytest.mark.parametrize("name", ["allocate", "pinned"])
def test_too_much_memory_is_refused_in_one_line(device, name):
    with pytest.raises(DeviceError) as refused:
        getattr(device, name)(TOO_MUCH)
    message = str(refused.value)
    assert f"{TOO_MUCH} bytes" in message and "failed (" in message and "\n" not in message
    assert message.partition("; ")[2], "says what to do"
    assert isinstance(refused.value.__cause__, driver_errors())


def test_the_drivers_words_become_one_line():
    (kind, *_) = driver_errors()
    wanted = r"^work failed \(CUDA_ERROR_X: line one line two\); wait$"
    with pytest.raises(DeviceError, match=wanted) as refused, device_memory.reported("work", "wait"):
        raise kind("CUDA_ERROR_X: line one\n  line two")
    assert isinstance(refused.value.__cause__, kind)


def test_other_exceptions_pass():
    with pytest.raises(KeyError), device_memory.reported("work"):
        raise KeyError("a bug")


def test_a_status_of_the_driver_is_an_error_unless_it_is_success():
    from cuda.bindings.driver import CUresult

    core_device._check(CUresult.CUDA_SUCCESS, "copying")
    with pytest.raises(DeviceError, match=r"^copying failed \(CUDA_ERROR_ILLEGAL_ADDRESS\); run it again"):
        core_device._check(CUresult.CUDA_ERROR_ILLEGAL_ADDRESS, "copying")


def test_advice_is_always_given():
    assert str(device_error("copying", "lost")).endswith("report it")


def test_cuda_core_has_the_error_that_is_caught(monkeypatch):
    monkeypatch.setattr(device_memory, "SIMULATOR", False)
    kinds = driver_errors.__wrapped__()
    assert [kind.__name__ for kind in kinds] == ["CUDAError", "LaunchError"]
    assert all(issubclass(kind, Exception) for kind in kinds)


def test_parts_of_a_buffer_share_its_memory(device):
    whole = device.upload(np.arange(64, dtype=np.int32))
    part = whole.part(64, 32)
    assert (part.address, part.nbytes) == (whole.address + 64, 32)
    np.testing.assert_array_equal(device.download(part, np.int32, (8,)), np.arange(16, 24))
    assert part.tensor(ElementKind.I32, (8,)).available == 8
    inner = part.part(16, 16)
    assert inner.address == whole.address + 80
    part.close()
    np.testing.assert_array_equal(device.download(inner, np.int32, (4,)), np.arange(20, 24))
    np.testing.assert_array_equal(device.download(whole, np.int32, (64,)), np.arange(64))


def test_parts_keep_the_whole(device):
    part = device.upload(np.arange(8, dtype=np.int32)).part(16, 16)
    np.testing.assert_array_equal(device.download(part, np.int32, (4,)), np.arange(4, 8))
