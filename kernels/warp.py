"""Where a thread is, and what a warp does together."""

from __future__ import annotations

import numpy as np

from kernels import functions
from kernels.ptx import instruction
from kernels.simulator import WARP, block_collective, collective, current_thread, warpgroup_collective
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


def _take_from(lanes):
    return [lanes[int(source) & WARP - 1][0] for _, source in lanes]


def _shuffle_from(value, lane):
    return collective(_take_from, (np.float32(value), lane))


def _sync_warp():
    collective(list, None)


def _warpgroup_barrier():
    warpgroup_collective(list, None)


shuffle_xor = instruction("shfl.sync.bfly.b32 $0, $1, $2, 31, 0xffffffff;", "fr", "f", twin=_shuffle_xor)
shuffle_from = instruction("shfl.sync.idx.b32 $0, $1, $2, 31, 0xffffffff;", "fr", "f", twin=_shuffle_from)
sync_warp = instruction("bar.warp.sync 0xffffffff;", "", twin=_sync_warp)
# Waits for the 128 neighbouring threads of the warpgroup; orders shared memory among them. Barrier 0 is the block's.
warpgroup_barrier = instruction(
    "{ .reg .b32 own; mov.u32 own, %tid.x; shr.u32 own, own, 7; add.u32 own, own, 1; bar.sync own, 128; }",
    "",
    twin=_warpgroup_barrier,
)


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
