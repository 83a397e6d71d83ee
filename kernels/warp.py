"""Where a thread is, and what a warp does together."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np

from kernels import functions
from kernels.hardware import WARP
from kernels.ptx import instruction
from kernels.simulator import block_collective, collective, current_thread, team_collective
from kernels.target import SIMULATOR, cuda, device

if SIMULATOR:

    def thread_index():
        """The thread's index in its block, uint32."""
        return np.uint32(current_thread().thread_id)

    def block_x():
        """The block's first coordinate, int64."""
        return np.int64(current_thread().block.index[0])

    def block_y():
        """The block's second coordinate, int64."""
        return np.int64(current_thread().block.index[1])

    def block_z():
        """The block's third coordinate, int64."""
        return np.int64(current_thread().block.index[2])

    def grid_x():
        """How many blocks there are along the first coordinate, int64."""
        return np.int64(current_thread().block.launch.grid[0])

    def grid_y():
        """The same along the second, int64."""
        return np.int64(current_thread().block.launch.grid[1])

    def block_barrier():
        """Wait for all threads of the block; orders shared memory among them."""
        block_collective(len, None)

    def uniform_any(predicate):
        """Whether the predicate holds in any thread of the block (a barrier)."""
        return block_collective(any, predicate)

else:

    @device
    def thread_index():
        """The thread's index in its block, uint32."""
        return np.uint32(cuda.threadIdx.x)

    @device
    def block_x():
        """The block's first coordinate, int64."""
        return np.int64(cuda.blockIdx.x)

    @device
    def block_y():
        """The block's second coordinate, int64."""
        return np.int64(cuda.blockIdx.y)

    @device
    def block_z():
        """The block's third coordinate, int64."""
        return np.int64(cuda.blockIdx.z)

    @device
    def grid_x():
        """How many blocks there are along the first coordinate, int64."""
        return np.int64(cuda.gridDim.x)

    @device
    def grid_y():
        """The same along the second, int64."""
        return np.int64(cuda.gridDim.y)

    @device
    def block_barrier():
        """Wait for all threads of the block; orders shared memory among them."""
        cuda.syncthreads()

    @device
    def uniform_any(predicate):
        """Whether the predicate holds in any thread of the block (a barrier)."""
        return cuda.syncthreads_or(np.int32(predicate)) != 0


def _exchange(lanes):
    return [lanes[lane ^ (int(mask) & WARP - 1)][0] for lane, (_, mask) in enumerate(lanes)]


def _shuffle_xor(value, mask):
    return collective(_exchange, (np.float32(value), mask))


def _shuffle_xor_word(value, mask):
    return collective(_exchange, (np.uint32(value), mask))


def _take_from(lanes):
    return [lanes[int(source) & WARP - 1][0] for _, source in lanes]


def _shuffle_from(value, lane):
    return collective(_take_from, (np.float32(value), lane))


def _first_lane(value):
    return collective(lambda lanes: [lanes[0]] * len(lanes), value)


def _sync_warp():
    collective(list, None)


@functools.cache
def team_barrier(threads: int) -> Callable:
    """A primitive that waits for the ``threads`` neighbouring threads of a team, and orders shared memory among them.

    Teams of a block, 32 to 512 threads each, are at most 15: they have the barriers from 1 on, the block has barrier 0.
    """

    def _team_barrier():
        team_collective(threads, list, None)

    own = f"mov.u32 own, %tid.x; shr.u32 own, own, {threads.bit_length() - 1}; add.u32 own, own, 1;"
    return instruction(f"{{ .reg .b32 own; {own} bar.sync own, {threads}; }}", "", twin=_team_barrier)


shuffle_xor = instruction("shfl.sync.bfly.b32 $0, $1, $2, 31, 0xffffffff;", "fr", "f", twin=_shuffle_xor)
shuffle_xor_word = instruction("shfl.sync.bfly.b32 $0, $1, $2, 31, 0xffffffff;", "rr", "r", twin=_shuffle_xor_word)
shuffle_from = instruction("shfl.sync.idx.b32 $0, $1, $2, 31, 0xffffffff;", "fr", "f", twin=_shuffle_from)
# What all lanes of a warp have, as the first one's: only so ptxas knows that it is one value, and computes descriptors
# of it in uniform registers, from which wgmma takes them.
uniform = instruction("shfl.sync.idx.b32 $0, $1, 0, 31, 0xffffffff;", "r", "r", twin=_first_lane)
sync_warp = instruction("bar.warp.sync 0xffffffff;", "", twin=_sync_warp)


@device
def warp_sum(value):
    """The sum over the warp's 32 lanes, in every lane, always in the same order (a butterfly)."""
    for shift in range(5):
        value = value + shuffle_xor(value, np.uint32(np.uint32(16) >> np.uint32(shift)))
    return value


@device
def quad_sum(value):
    """The sum over four neighbouring lanes, in each of them."""
    value = value + shuffle_xor(value, np.uint32(1))
    return value + shuffle_xor(value, np.uint32(2))


@device
def quad_maximum(value):
    """The largest of four neighbouring lanes' values, in each of them; NaN where one is."""
    value = functions.maximum(value, shuffle_xor(value, np.uint32(1)))
    return functions.maximum(value, shuffle_xor(value, np.uint32(2)))
