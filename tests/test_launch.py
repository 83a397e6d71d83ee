"""What a launch is made of before it runs: its arguments' memory, its description, and the driver's refusals."""

from __future__ import annotations

import ctypes
import struct

import pytest
from cuda.bindings import driver

from kernels import launch

_TYPES = {"Q": ctypes.c_uint64, "q": ctypes.c_int64, "l": ctypes.c_long, "i": ctypes.c_int32, "I": ctypes.c_uint32,
          "f": ctypes.c_float, "d": ctypes.c_double, "H": ctypes.c_uint16, "?": ctypes.c_bool}  # fmt: skip


class _Stream:
    def __init__(self, handle):
        self._handle = handle

    def __cuda_stream__(self):
        return 0, self._handle


class _Launcher:
    """Stands in for a GpuLauncher."""

    def __init__(self, key):
        self.key, self.function, self.streams = key, f"function of {key}", []

    def pack(self, arguments):
        return launch.ArgumentLayout("i" * len(arguments)).pack(arguments)

    def config(self, stream):
        self.streams.append(stream)
        return self.key, stream


def packed(address):
    """The arguments as the driver finds them."""
    pointer, at, size, size_at, end = (ctypes.c_uint64 * 5).from_address(address)
    assert (pointer, size, end) == (1, 2, 0), "CU_LAUNCH_PARAM_BUFFER_POINTER, _BUFFER_SIZE, _END"
    return ctypes.string_at(at, ctypes.c_size_t.from_address(size_at).value)


@pytest.mark.parametrize("letters", ["", "i", "Qi", "iQ", "iiQf", "fdfd", "QHHf?Qi", "?Q?dHi", "iifQQQqqlI"])
def test_arguments_lie_as_in_a_structure_of_c(letters):
    given = tuple(1 if letter == "?" else 3 + i for i, letter in enumerate(letters))
    room = launch.ArgumentLayout(letters).pack(given)
    fields = [(f"p{i}", _TYPES[letter]) for i, letter in enumerate(letters)]
    wanted = type("Wanted", (ctypes.Structure,), {"_fields_": fields})(*given)
    last = max((getattr(type(wanted), name).offset + ctypes.sizeof(kind) for name, kind in fields), default=0)
    assert packed(ctypes.addressof(room)) == bytes(wanted)[:last]


@pytest.mark.parametrize("given", [(1,), (1, 2, 3), (1.5, 2.0), (1 << 31, 2.0), ("1", 2.0), (None, 2.0)])
def test_arguments_of_another_type_or_count_are_refused(given):
    with pytest.raises(struct.error):
        launch.ArgumentLayout("if").pack(given)


def test_a_description_has_grid_stream_and_attributes():
    made = launch.config(0x50, (7, 2, 3), 384, 1024, launch.attributes(overlaps=True, cluster=4))
    assert (made.gridDimX, made.gridDimY, made.gridDimZ) == (7, 2, 3)
    assert (made.blockDimX, made.blockDimY, made.blockDimZ, made.sharedMemBytes) == (384, 1, 1, 1024)
    assert int(made.hStream) == 0x50 and made.numAttrs == 2
    early, together = made.attrs
    kinds = driver.CUlaunchAttributeID
    assert early.id == kinds.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    assert early.value.programmaticStreamSerializationAllowed == 1
    assert together.id == kinds.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
    assert (together.value.clusterDim.x, together.value.clusterDim.y, together.value.clusterDim.z) == (4, 1, 1)
    assert launch.config(0, (1, 1, 1), 32, 0, launch.attributes(overlaps=False, cluster=1)).numAttrs == 0


def test_launches_run_in_order_and_are_described_once_a_stream(monkeypatch):
    seen = []

    def launched(described, kernel, parameters, arguments):
        assert not parameters
        seen.append((described, kernel, list(struct.unpack("2i", packed(arguments)))))
        return (driver.CUresult.CUDA_SUCCESS,)

    monkeypatch.setattr(launch, "_launch", launched)
    first, second = _Launcher("a"), _Launcher("b")
    run = launch.GpuLaunches([(first, (1, 2)), (second, (3, 4))])
    one, two = _Stream(16), _Stream(32)
    for stream in (one, one, two):
        run(stream)
    wanted = [(("a", 16), "function of a", [1, 2]), (("b", 16), "function of b", [3, 4])]
    assert seen[:2] == seen[2:4] == wanted
    assert [described for described, *_ in seen[4:]] == [("a", 32), ("b", 32)]
    assert first.streams == second.streams == [16, 32]


def test_a_refused_launch_is_named_and_the_last(monkeypatch):
    refused, seen = driver.CUresult.CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES, []

    def launched(described, *_):
        seen.append(described)
        return (refused if described[0] == "b" else driver.CUresult.CUDA_SUCCESS,)

    monkeypatch.setattr(launch, "_launch", launched)
    monkeypatch.setattr(driver, "cuGetErrorString", lambda status: (0, b"too many resources requested for launch"))
    run = launch.GpuLaunches([(_Launcher(key), ()) for key in "abc"])
    wanted = "^CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES: too many resources requested for launch, launching b$"
    with pytest.raises(launch.LaunchError, match=wanted):
        run(_Stream(16))
    assert [key for key, _ in seen] == ["a", "b"]
