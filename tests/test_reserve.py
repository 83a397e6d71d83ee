"""Memory of one stream that is lent again: who gets it, how much waits, and what goes back to the driver."""

from __future__ import annotations

import sys
import threading
import weakref

import pytest

from plans.core.device_memory import driver_errors
from plans.core.reserve import Reserve


class _Memory:
    closed_on = None

    def close(self, stream):
        self.closed_on = stream


def test_memory_goes_to_who_asks_for_as_many_bytes():
    reserve, first, second = Reserve("main", 100), _Memory(), _Memory()
    reserve.give_back(10, first)
    reserve.give_back(10, second, "main")
    reserve.give_back(20, _Memory())
    assert reserve.again(11) is None
    assert [reserve.again(10) for _ in range(3)] == [second, first, None]
    assert reserve.again(20) is not None


def test_beyond_the_bound_everything_is_let_go():
    reserve, memory = Reserve("main", 30), [_Memory() for _ in range(4)]
    gone = [weakref.ref(m) for m in memory]
    for size in (10, 20):
        reserve.give_back(size, memory.pop(0))
    assert [g() is None for g in gone] == [False] * 4
    reserve.give_back(10, memory.pop(0))
    assert [g() is None for g in gone] == [True] * 3 + [False]
    reserve.give_back(31, memory.pop(0))
    assert gone[3]() is None, "nor is what alone is more than the bound kept"
    assert reserve.again(20) is None and reserve.again(31) is None
    reserve.give_back(30, kept := _Memory())
    assert reserve.again(30) is kept and not reserve.release()


def test_what_is_released_is_not_given_again():
    reserve, memory = Reserve("main", 100), _Memory()
    reserve.give_back(10, memory)
    gone = weakref.ref(memory)
    del memory
    assert reserve.release() and gone() is None
    assert reserve.again(10) is None and not reserve.release()


def test_threads_never_get_the_same_memory():
    reserve, held, twice = Reserve("main", 1 << 20), set(), []

    def take_and_give():
        for _ in range(2000):
            memory = reserve.again(8) or _Memory()
            if memory in held:
                twice.append(memory)
            held.add(memory)
            held.discard(memory)
            reserve.give_back(8, memory)

    threads = [threading.Thread(target=take_and_give) for _ in range(4)]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert not twice
    waiting = []
    while (memory := reserve.again(8)) is not None:
        waiting.append(memory)
    assert 1 <= len(waiting) == len(set(waiting)) <= 4


def test_what_was_used_last_on_another_stream_is_not_kept():
    reserve, memory = Reserve("main", 100), _Memory()
    reserve.give_back(10, memory, "other")
    assert memory.closed_on == "other" and reserve.again(10) is None


def test_a_device_lends_memory_of_its_main_stream_again(device):
    """In the simulator, whose memory is the host's, there is nothing to lend."""
    for stream, lent in ((device.main_stream, not device.is_simulator), (device.stream(), False)):
        first = device.allocate(4096 + 256, stream)
        memory = first._memory
        first.close()
        second = device.allocate(4096 + 256, stream)
        assert (second._memory is memory) == lent
        del second


def test_where_memory_is_short_the_reserve_goes_back_first(device, monkeypatch):
    (failure, *_) = driver_errors()
    reserve, asked = Reserve("main", 100), []

    class Core:
        def allocate(self, nbytes, stream):
            asked.append((nbytes, stream))
            if len(asked) < 2 or nbytes > 50:
                raise failure("out of memory")
            return "memory"

    monkeypatch.setattr(device, "_core", Core())
    monkeypatch.setattr(device, "_reserve", reserve)
    reserve.give_back(10, _Memory())
    assert device._from_pool(0, "stream") == "memory"
    assert asked == [(1, "stream")] * 2 and reserve.again(10) is None
    with pytest.raises(failure):
        device._from_pool(60, "stream")
    assert len(asked) == 3, "nothing to give back, nothing to try again"
