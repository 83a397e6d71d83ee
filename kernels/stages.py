"""A ring of stages in shared memory: full and empty barriers (sm_90).

A stage has a pair of barriers. The full one counts the bytes of its loads, and users wait for it; users arrive at the
empty one, and the loading thread waits for it before it loads the stage again. Both sides walk around the ring with a
stage and a phase (`next_stage`): users begin with phase 0, the loading thread with 1, for which all stages are empty.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from kernels import barrier
from kernels.target import device
from kernels.warp import sync_warp

PAIR_BYTES = 16
"""Bytes of a pair: the full barrier, then the empty one."""

_u32 = np.uint32


@device
def pair_of(barriers, stage):
    """The address of a stage's pair, which is that of its full barrier; stage 0's pair is at ``barriers``."""
    return _u32(barriers + _u32(stage) * _u32(PAIR_BYTES))


@device
def empty_of(pair):
    """The address of a pair's empty barrier."""
    return _u32(pair + _u32(8))


@device
def make_pair(pair, users):
    """Make a pair of barriers, for one thread; ``users`` arrivals empty the stage. `barrier_init_visible` follows."""
    barrier.barrier_init(pair, _u32(1))
    barrier.barrier_init(empty_of(pair), users)


def pair_maker(stages: int, users: int) -> Callable:
    """``make(barriers)``: the pairs of all stages, as `make_pair`."""
    arrivals = _u32(users)

    @device
    def make(barriers):
        for stage in range(stages):
            make_pair(pair_of(barriers, stage), arrivals)

    return make


def next_stage(stages: int) -> Callable:
    """``following(stage, phase)``: the stage after another, and its phase."""
    count = _u32(stages)

    @device
    def following(stage, phase):
        stage = _u32(stage + _u32(1))
        if stage == count:
            stage, phase = _u32(0), _u32(phase ^ _u32(1))
        return stage, phase

    return following


@device
def begin_loading(pair, phase, nbytes):
    """Wait until the stage of a pair is empty, in the loading thread's phase, and expect bytes; the full barrier."""
    barrier.barrier_wait(empty_of(pair), phase)
    barrier.barrier_expect_bytes(pair, nbytes)
    return pair


@device
def hand_back(pair, lane):
    """A warp has read the stage of a pair, of whose users each is a warp."""
    sync_warp()
    if lane == _u32(0):
        barrier.barrier_arrive(empty_of(pair))
