"""System calls made through ctypes: what they do, and what becomes of every answer."""

from __future__ import annotations

import ctypes
import errno
import os

import pytest

from lycoris.checkpoint import linux


@pytest.fixture
def descriptor(tmp_path):
    descriptor = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    yield descriptor
    os.close(descriptor)


class Answers:
    """Stands for the C library: `fallocate` fails with one error after the other, then succeeds."""

    def __init__(self, *numbers: int) -> None:
        self._numbers, self.calls = list(numbers), 0

    def fallocate(self, descriptor: int, mode: int, offset: int, nbytes: int) -> int:
        self.calls += 1
        if not self._numbers:
            return 0
        ctypes.set_errno(self._numbers.pop(0))
        return -1


def test_reserve_gives_the_size(descriptor):
    linux.reserve(descriptor, 1_000_001)
    assert os.fstat(descriptor).st_size == 1_000_001


def test_reserve_where_the_filesystem_cannot(descriptor, monkeypatch):
    """The size is given, and no block is written for it."""
    monkeypatch.setattr(linux, "_libc", Answers(errno.EOPNOTSUPP))
    linux.reserve(descriptor, 1_000_001)
    found = os.fstat(descriptor)
    assert (found.st_size, found.st_blocks) == (1_000_001, 0)


def test_a_signal_does_not_end_the_reservation(descriptor, monkeypatch):
    answers = Answers(errno.EINTR, errno.EINTR)
    monkeypatch.setattr(linux, "_libc", answers)
    linux.reserve(descriptor, 10)
    assert answers.calls == 3


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EFBIG, errno.EIO])
def test_a_full_disk_shows_at_once(number, descriptor, monkeypatch):
    monkeypatch.setattr(linux, "_libc", Answers(number))
    with pytest.raises(OSError, match=os.strerror(number)) as failure:
        linux.reserve(descriptor, 10)
    assert failure.value.errno == number


def test_writeback_of_a_range(descriptor):
    os.write(descriptor, bytes(10_000))
    linux.start_writeback(descriptor, 0, 10_000)
    with pytest.raises(OSError, match=os.strerror(errno.EINVAL)):
        linux.start_writeback(descriptor, -1, 10)


def test_exchange_swaps_two_folders(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / f"of {name}").touch()
    linux.exchange(tmp_path / "a", tmp_path / "b")
    assert os.listdir(tmp_path / "a") == ["of b"]
    assert os.listdir(tmp_path / "b") == ["of a"]
    with pytest.raises(OSError, match=os.strerror(errno.ENOENT)):
        linux.exchange(tmp_path / "a", tmp_path / "missing")
