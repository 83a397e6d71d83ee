"""Memory of one stream that is lent again: who gets it, how much waits, and what goes back to the driver."""

from __future__ import annotations

import weakref

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


def test_beyond_the_bound_sizes_that_were_unused_longest_are_let_go():
    reserve, memory = Reserve("main", 30), [_Memory() for _ in range(4)]
    gone = [weakref.ref(m) for m in memory]
    for size in (10, 20):
        reserve.give_back(size, memory.pop(0))
    reserve.give_back(20, memory.pop(0))
    assert [g() is None for g in gone[:3]] == [True, True, False], "10 first, then one of 20 for the other"
    reserve.give_back(31, memory.pop(0))
    assert all(g() is None for g in gone), "nothing is kept that is more than the bound alone"
    assert reserve.again(20) is None and reserve.again(31) is None
    reserve.give_back(30, kept := _Memory())
    assert reserve.again(30) is kept


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
