"""Counters in device memory by which the blocks of a grid tell each other what is done (sm_70).

A counter is an element of an array of 32-bit words. Blocks may wait only for what blocks that already run will do: a
grid need not have room on the device for all of its blocks at once.
"""

from __future__ import annotations

from kernels.ptx import GLOBAL, instruction
from kernels.simulator import current_thread


def _take(pointer, index):
    before = pointer[int(index)]
    pointer[int(index)] = before + 1
    return before


def _give(pointer, index, amount):
    pointer[int(index)] += amount


def _wait_for(pointer, index, least):
    current_thread().wait_for(lambda: pointer[int(index)] >= least)


# (pointer, index): counts one more, and gives what was there before; orders nothing else. By the instruction that has a
# bound: additions of lanes together ptxas would make one, and share its result out at once, where it could be late.
take = instruction("atom.relaxed.gpu.global.inc.u32 $0, [$1], 4294967295;", (GLOBAL,), "r", twin=_take)
# (pointer, index, amount): adds it after all that the thread has written, or has seen written.
give = instruction("red.release.gpu.global.add.u32 [$0], $1;", (GLOBAL, "r"), twin=_give)
# (pointer, index, least): waits until it is so large, and then sees what was written before it was made so. Ten seconds
# in vain are a fault, as at an mbarrier.
wait_for = instruction(
    "{ .reg .pred done; .reg .b32 found; .reg .b64 now, end; "
    "mov.u64 end, %globaltimer; add.u64 end, end, 10000000000; "
    "AGAIN_${:uid}: ld.acquire.gpu.global.u32 found, [$0]; setp.ge.u32 done, found, $1; @done bra DONE_${:uid}; "
    "mov.u64 now, %globaltimer; setp.lt.u64 done, now, end; @done bra AGAIN_${:uid}; trap; DONE_${:uid}: }",
    (GLOBAL, "r"),
    twin=_wait_for,
)
