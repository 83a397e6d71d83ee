"""Sums that the blocks of a cluster leave in shared memory for each other, below mbarriers that lanes or a thread make.

racecheck of CUDA 13.0 reports the first form and not the second: a write by lanes that make no barrier, to the
barriers' place less where the block's shared memory begins, in the cluster's first block. ptxas turns barriers that
some lanes make into a loop over those, before which racecheck takes all lanes' writes down, with the address register
as it was before. The emulator finds no race in either.
"""

from __future__ import annotations

import numpy as np
import pytest

from kernels import barrier, bits
from kernels.stages import make_pair, pair_maker, pair_of
from kernels.target import cuda, types
from kernels.warp import block_barrier, block_x, thread_index
from plans.core import ArchSku

_u32 = np.uint32
THREADS, SUMS, STAGES, BLOCKS = 256, 8, 3, 2
SUMS_BYTES = 4 * SUMS * THREADS


def exchange(by_lanes):
    """A kernel whose blocks each leave SUMS numbers a thread; ``out`` has each thread's, added up over the cluster."""
    make, stages, first_word = pair_maker(STAGES, 1), _u32(STAGES), bits.f32_bits

    def kernel(out):
        shared = cuda.shared.array(0, types.float32, alignment=1024)
        base = barrier.shared_address(shared, np.int64(0))
        thread, block = _u32(thread_index()), _u32(block_x())
        barriers = _u32(base + _u32(SUMS_BYTES))
        if by_lanes:
            if thread < stages:
                make_pair(pair_of(barriers, thread), _u32(1))
                barrier.barrier_init_visible()
        elif thread == _u32(0):
            make(barriers)
            barrier.barrier_init_visible()
        block_barrier()
        own = np.float32(_u32(thread + _u32(1000) * block))
        for number in range(SUMS // 2):
            place = _u32(base + _u32(8) * (thread + _u32(number) * _u32(THREADS)))
            barrier.shared_store64(place, first_word(own), first_word(np.float32(number)))
        barrier.cluster_barrier()
        for number in range(SUMS // 2):
            place = _u32(base + _u32(8) * (thread + _u32(number) * _u32(THREADS)))
            first, second = np.float32(0), np.float32(0)
            for other in range(BLOCKS):
                first += bits.bits_f32(barrier.shared_load_remote(place, _u32(other)))
                second += bits.bits_f32(barrier.shared_load_remote(_u32(place + _u32(4)), _u32(other)))
            at = np.int64(_u32(SUMS) * (thread + _u32(THREADS) * block) + _u32(2 * number))
            out[at], out[at + np.int64(1)] = first, second
        barrier.cluster_barrier()

    return kernel


@pytest.mark.parametrize("by_lanes", [True, False], ids=["by lanes", "by one thread"])
def test_sums_of_a_cluster_under_barriers(run_kernel, device, by_lanes):
    if device.arch < ArchSku.SM90A.value:
        pytest.skip("clusters are Hopper's")
    (found,) = run_kernel(
        exchange(by_lanes),
        [],
        [(np.float32, (BLOCKS, THREADS, SUMS))],
        grid=(BLOCKS, 1, 1),
        threads=THREADS,
        shared_bytes=SUMS_BYTES + 16 * STAGES,
        cluster=BLOCKS,
        **barrier.HOPPER,
    )
    first = np.broadcast_to(2 * np.arange(THREADS) + 1000, (BLOCKS, SUMS // 2, THREADS)).swapaxes(1, 2)
    np.testing.assert_array_equal(found[..., 0::2], first)
    np.testing.assert_array_equal(found[..., 1::2], np.broadcast_to(2 * np.arange(SUMS // 2), first.shape))
