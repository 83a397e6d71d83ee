"""Bulk loads to shared memory, counted at barriers, through a ring of stages that is filled again and again."""

from __future__ import annotations

import numpy as np
import pytest

from kernels import barrier
from kernels.target import cuda, types
from kernels.warp import block_barrier, sync_warp, thread_index
from plans.core import ArchSku

_u32 = np.uint32
ELEMENTS, WARPS = 64, 4


def ring(stages):
    """A kernel of four reading warps and a loading one: ``out[i]`` is the sum over rounds of element i of a round's."""
    stage_bytes, barriers_at = _u32(4 * ELEMENTS), _u32(4 * ELEMENTS * stages)

    def kernel(values, rounds, out):
        staged = cuda.shared.array(0, types.float32, alignment=1024)
        base = barrier.shared_address(staged, np.int64(0))
        thread = _u32(thread_index())
        if thread == _u32(0):
            for number in range(stages):
                pair = _u32(base + barriers_at + _u32(16) * _u32(number))
                barrier.barrier_init(pair, _u32(1))
                barrier.barrier_init(_u32(pair + _u32(8)), _u32(WARPS))
            barrier.barrier_init_visible()
        block_barrier()
        total, stage, phase = np.float32(0), _u32(0), _u32(0)
        for number in range(rounds):
            pair = _u32(base + barriers_at + _u32(16) * stage)
            if thread == _u32(32 * WARPS):
                barrier.barrier_wait(_u32(pair + _u32(8)), _u32(phase ^ _u32(1)))
                barrier.barrier_expect_bytes(pair, stage_bytes)
                barrier.bulk_load(
                    _u32(base + stage * stage_bytes), values, np.int64(number) * np.int64(ELEMENTS), stage_bytes, pair
                )
            elif thread < _u32(32 * WARPS):
                barrier.barrier_wait(pair, phase)
                total += staged[np.int64(stage) * np.int64(ELEMENTS) + np.int64(thread % _u32(ELEMENTS))]
                sync_warp()
                if thread % _u32(32) == _u32(0):
                    barrier.barrier_arrive(_u32(pair + _u32(8)))
            stage = _u32(stage + _u32(1))
            if stage == _u32(stages):
                stage, phase = _u32(0), _u32(phase ^ _u32(1))
        if thread < _u32(32 * WARPS):
            out[thread] = total

    return kernel


@pytest.mark.parametrize(("stages", "rounds"), [(1, 1), (1, 4), (2, 2), (2, 7), (3, 3)])
def test_a_stage_is_read_before_it_is_filled_again(run_kernel, device, rng, stages, rounds):
    if device.arch < ArchSku.SM90A.value:
        pytest.skip("bulk loads are Hopper's")
    values = rng.integers(-1000, 1000, (rounds, ELEMENTS)).astype(np.float32)
    (found,) = run_kernel(
        ring(stages),
        [values, rounds],
        [(np.float32, 32 * WARPS)],
        threads=32 * (WARPS + 1),
        shared_bytes=4 * ELEMENTS * stages + 16 * stages,
        **barrier.HOPPER,
    )
    np.testing.assert_array_equal(found, np.tile(values.sum(0), 32 * WARPS // ELEMENTS))
