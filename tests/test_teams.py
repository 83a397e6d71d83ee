"""Teams of a block's threads that meet at a barrier of their own, on a GPU or in the simulator."""

from __future__ import annotations

import numpy as np
import pytest

from kernels import warp
from kernels.target import cuda, types


def team_rounds(threads):
    """A kernel of 256 threads: each team exchanges values through shared memory, later teams more often."""
    wait, team = warp.team_barrier(threads), np.int64(threads)

    def kernel(values, out):
        staged = cuda.shared.array(256, types.float32)
        thread = np.int64(warp.thread_index())
        own = thread // team
        value = values[thread]
        for _ in range(own + np.int64(1)):
            staged[thread] = value
            wait()
            value += staged[own * team + team - np.int64(1) - thread % team]
            wait()
        out[thread] = value

    return kernel


@pytest.mark.parametrize("threads", [32, 64, 128])
def test_teams_wait_for_their_own_threads_alone(run_kernel, rng, threads):
    values = rng.standard_normal(256, np.float32)
    (found,) = run_kernel(team_rounds(threads), [values], [(np.float32, 256)], threads=256)
    for own, team in enumerate(values.reshape(-1, threads)):
        for _ in range(own + 1):
            team = team + team[::-1]
        np.testing.assert_array_equal(found.reshape(-1, threads)[own], team)
