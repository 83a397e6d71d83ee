"""Reading one safetensors file: what is refused, and that what is accepted reads as the library reads it."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st
from safetensors_files import BAD_FILES, BAD_PATHS, NAMES, entry, file_bytes, some_tensors, tensors_file

from lycoris.checkpoint import SafetensorsFile
from lycoris.checkpoint.header import parse_header, rewrite_header
from lycoris.dtype import DTYPES, MERGEABLE, OPTIONS, bits_of
from lycoris.errors import LycorisError, MergeFailed, RefusedInput


@pytest.mark.parametrize(("content", "words"), BAD_FILES.values(), ids=BAD_FILES)
def test_bad_file_is_refused_in_one_line_with_its_name_and_fault(tmp_path, content, words):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    descriptors = len(os.listdir("/proc/self/fd"))
    with pytest.raises(RefusedInput) as refusal:
        SafetensorsFile.open(path)
    message = str(refusal.value)
    assert message.startswith(f"{path}: ") and words in message
    assert len(message.splitlines()) == 1 and len(message) < 1000
    assert len(os.listdir("/proc/self/fd")) == descriptors


@pytest.mark.parametrize(("make", "words"), BAD_PATHS.values(), ids=BAD_PATHS)
def test_path_without_a_file_is_refused(tmp_path, make, words):
    path = tmp_path / "bad.safetensors"
    make(path)
    with pytest.raises(RefusedInput, match=words):
        SafetensorsFile.open(path)


def test_folder_is_no_file(tmp_path):
    with pytest.raises(RefusedInput, match="is a folder"):
        SafetensorsFile.open(tmp_path)


def test_file_that_cannot_be_opened_is_refused(tmp_path):
    with pytest.raises(RefusedInput, match="File name too long"):
        SafetensorsFile.open(tmp_path / ("x" * 300))


def test_length_that_reads_like_a_pickle_is_a_length(tmp_path):
    """640 bytes of header: the file begins with 80 02, as a pickle does."""
    header = file_bytes({"a": entry("U8", [1], 0, 1)})[8:].ljust(0x0280)
    (tmp_path / "good.safetensors").write_bytes(file_bytes(header, b"x"))
    with SafetensorsFile.open(tmp_path / "good.safetensors") as file:
        assert file.entries.keys() == {"a"}


@given(data=st.data())
def test_what_the_library_refuses_is_refused(data, tmp_path_factory):
    """Damage a good file anywhere: no damage may pass here that the library finds."""
    content = bytearray(tensors_file(some_tensors(3), {"format": "pt"}))
    header_end = 8 + int.from_bytes(content[:8], "little")
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, header_end))
        words = st.sampled_from([b"", b"0", b"9", b"-", b"[", b'"', b",", b"\0", b"\xc3", b"null", b"U8", b"\\"])
        content[at : at + data.draw(st.integers(0, 2))] = data.draw(words)
    try:
        safetensors.deserialize(bytes(content))
    except safetensors.SafetensorError:
        path = tmp_path_factory.mktemp("damaged") / "a.safetensors"
        path.write_bytes(content)
        with pytest.raises(RefusedInput):
            SafetensorsFile.open(path)


def test_dtypes_are_those_of_the_library():
    header = file_bytes({"a": entry("?", [0], 0, 0)})
    with pytest.raises(safetensors.SafetensorError) as error:
        safetensors.deserialize(header)
    known = str(error.value).split("expected one of")[1].split(" at line")[0]
    assert {name.strip(" `") for name in known.split(",")} == set(DTYPES)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_has_the_librarys_size_and_reads_back(tmp_path, dtype):
    count = 8
    data = bytes(range(bits_of(dtype, [count]) // 8))
    content = file_bytes({"a": entry(dtype, [count], 0, len(data))}, data)
    assert safetensors.deserialize(content)[0][1]["data"] == data
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with SafetensorsFile.open(path) as file:
        array = file.read(file.entries["a"])
    assert array.tobytes() == data
    assert array.shape == ((len(data),) if DTYPES[dtype].packed else (count,))
    assert DTYPES[dtype].packed or (array.dtype.itemsize * 8 == DTYPES[dtype].bits)
    assert DTYPES[dtype].packed or NAMES[array.dtype] == dtype


def test_mergeable_dtypes_and_their_options():
    assert OPTIONS == {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}
    assert set(OPTIONS.values()) == MERGEABLE


def test_reads_what_the_library_wrote(tmp_path):
    path = tmp_path / "a.safetensors"
    arrays = {k: v for k, v in some_tensors(5).items() if v.dtype != ml_dtypes.bfloat16} | {"ünï\n": np.ones(3)}
    safetensors.numpy.save_file(arrays, path, metadata={"format": "np", "é": "\n"})
    with SafetensorsFile.open(path) as file:
        assert file.metadata == {"format": "np", "é": "\n"}
        assert file.entries.keys() == arrays.keys()
        for name, array in arrays.items():
            found = file.entries[name]
            assert (found.shape, found.nbytes, found.count) == (array.shape, array.nbytes, array.size)
            assert (found.path, found.file) == (path, "a.safetensors")
            np.testing.assert_array_equal(file.read(found), array, strict=True)


def test_bfloat16_reads_as_ml_dtypes(tmp_path):
    path = tmp_path / "a.safetensors"
    array = np.array([[1.5, -2.0], [np.inf, np.nan]], ml_dtypes.bfloat16)
    path.write_bytes(tensors_file({"a": array}))
    with SafetensorsFile.open(path) as file:
        read = file.read(file.entries["a"])
    assert read.dtype == ml_dtypes.bfloat16 and read.tobytes() == array.tobytes() and read.flags.writeable


def test_entries_come_in_the_order_of_the_data_and_names_in_that_of_the_header(tmp_path):
    path = tmp_path / "a.safetensors"
    header = {
        "last": entry("U8", [2], 3, 5),
        "empty": entry("F32", [0, 7], 3, 3),
        "__metadata__": {"a": "b"},
        "first": entry("U8", [3], 0, 3),
    }
    path.write_bytes(file_bytes(header, bytes(range(5))))
    with SafetensorsFile.open(path) as file:
        assert list(file.entries) == ["first", "empty", "last"]
        assert file.header.names == ["last", "empty", "first"]
        assert file.read(file.entries["last"]).tolist() == [3, 4]
        assert file.read(file.entries["empty"]).shape == (0, 7)


@pytest.mark.parametrize("header", ["{}", "{}   ", '{"__metadata__":{}}', '{"__metadata__":null}'])
def test_file_without_tensors(tmp_path, header):
    path = tmp_path / "a.safetensors"
    path.write_bytes(file_bytes(header))
    safetensors.deserialize(path.read_bytes())
    with SafetensorsFile.open(path) as file:
        assert file.entries == {} and file.metadata == {} and file.header_bytes == header.encode()


def test_read_into_fills_any_buffer_in_short_reads(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    content = tensors_file({"a": np.arange(100, dtype=np.uint8)})
    path.write_bytes(content)
    preadv = os.preadv
    with SafetensorsFile.open(path) as file:
        monkeypatch.setattr(os, "preadv", lambda fd, views, at: preadv(fd, [views[0][:7]], at))
        for buffer in (bytearray(90), memoryview(bytearray(90)), np.empty((9, 5), ml_dtypes.bfloat16)):
            file.read_into(buffer, len(content) - 95)
            data = buffer.tobytes() if isinstance(buffer, np.ndarray) else bytes(buffer)
            assert data == bytes(range(5, 95))
        file.read_into(bytearray(0), len(content))


def test_file_cut_short_while_it_is_read(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(tensors_file({"a": np.arange(100, dtype=np.uint8)}))
    with SafetensorsFile.open(path) as file:
        file.check_unchanged()
        os.truncate(path, path.stat().st_size - 1)
        with pytest.raises(MergeFailed, match="wanted 1 more"):
            file.read(file.entries["a"])
        with pytest.raises(MergeFailed, match="changed while it was read"):
            file.check_unchanged()


def test_failing_disk_is_reported_with_the_file(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    path.write_bytes(tensors_file({"a": np.arange(100, dtype=np.uint8)}))

    def fail(*_):
        raise OSError(5, "Input/output error")

    with SafetensorsFile.open(path) as file:
        monkeypatch.setattr(os, "preadv", fail)
        with pytest.raises(MergeFailed, match=r"a\.safetensors: .*Input/output error"):
            file.read(file.entries["a"])
        with pytest.raises(RefusedInput, match=r"a\.safetensors: .*Input/output error"):
            SafetensorsFile.open(path)


def test_many_threads_read_one_file(tmp_path):
    path = tmp_path / "a.safetensors"
    arrays = {f"t{n}": np.full(1000 + n, n, np.int64) for n in range(40)}
    path.write_bytes(tensors_file(arrays))
    wrong = []

    def read(names):
        for name in names:
            if not np.array_equal(file.read(file.entries[name]), arrays[name]):
                wrong.append(name)

    with SafetensorsFile.open(path) as file:
        threads = [threading.Thread(target=read, args=(list(arrays)[n:] + list(arrays)[:n],)) for n in range(0, 40, 5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


def test_closed_twice(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(tensors_file({"a": np.zeros(1)}))
    file = SafetensorsFile.open(path)
    file.close()
    file.close()


def test_rewritten_header_changes_types_and_offsets_only(tmp_path):
    path = tmp_path / "a.safetensors"
    tensors = some_tensors(3)
    header_json = {
        "layer.2.weight": entry("F32", [2, 1, 3, 3], 44, 116) | {"extra": 1},
        "__metadata__": {"é": "x"},
        "layer.0.weight": entry("BF16", [3, 5], 0, 30),
        "layer.1.weight": entry("F16", [7], 30, 44),
    }
    path.write_bytes(file_bytes(header_json, b"".join(array.tobytes() for array in tensors.values())))
    with SafetensorsFile.open(path) as file:
        header = rewrite_header(file.header, {"layer.0.weight": "F32", "elsewhere": "F32"}, path)
        same = rewrite_header(file.header, {"layer.0.weight": "BF16", "elsewhere": "F32"}, path)
        assert same.raw == file.header_bytes
    assert len(header.prefix) % 8 == 0
    assert list(header.fields) == list(header_json)
    assert header.fields["layer.2.weight"] == entry("F32", [2, 1, 3, 3], 74, 146) | {"extra": 1}
    assert header.metadata == {"é": "x"}
    assert [e.dtype for e in header.entries.values()] == ["F32", "F16", "F32"]
    assert parse_header(header.raw, path, header.file_bytes) == header


def test_line_breaks_in_names_stay_out_of_messages():
    error = LycorisError("tensor 'a\nb\u2028c\x85'")
    assert len(str(error).splitlines()) == 1 and "a\\nb" in str(error)


def test_import_loads_nothing_heavy():
    code = "import sys, lycoris.checkpoint; print({'numba', 'plans', 'kernels', 'safetensors'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
