"""How a multiplying warpgroup of attention on Hopper goes from stage to stage, in turns with the other one.

Of a stage it first multiplies what it keeps with what the stage has, for scores; then it makes words of them, while the
other warpgroup multiplies; then the stage's second products add those to results, in one turn with the next one's
first.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from kernels import barrier
from kernels.attention.ring import Ring, turn_giver, turn_taker
from kernels.attention.tiles import lane_of
from kernels.stages import hand_back, next_stage, pair_of
from kernels.target import device

_u32 = np.uint32


def stage_steps(ring: Ring, start: Callable, add: Callable, settled: Callable) -> tuple[Callable, Callable, Callable]:
    """``begin``, ``go_on`` and ``end`` of a walk over stages.

    ``start(base, kept, stage, arrays)`` asks for a stage's first products, ``add(base, stage, arrays)`` for its second;
    ``settled(arrays)`` waits for results. A walk's first stage begins it, each further one goes on, the last ends it.
    All give the next turn, after the stage and its phase where those change; the first two give the stage's pair of
    barriers before, to be handed back when its lines have been read.
    """
    take_turn, give_turn = turn_taker(ring), turn_giver(ring)
    following, where = next_stage(ring.stages), lane_of(ring.tile)

    @device
    def arrived(barriers, stage, phase):
        pair = pair_of(barriers, stage)
        barrier.barrier_wait(pair, phase)
        return pair

    @device
    def begin(base, barriers, kept, arrays, stage, phase, turn, mine, thread):
        pair = arrived(barriers, stage, phase)
        take_turn(barriers, turn, mine)
        start(base, kept, stage, arrays)
        return pair, give_turn(barriers, turn, mine, thread)

    @device
    def go_on(base, barriers, kept, arrays, stage, phase, turn, mine, thread):
        done = stage
        stage, phase = following(stage, phase)
        pair = arrived(barriers, stage, phase)
        take_turn(barriers, turn, mine)
        add(base, done, arrays)
        start(base, kept, stage, arrays)
        return pair, stage, phase, give_turn(barriers, turn, mine, thread)

    @device
    def end(base, barriers, arrays, pair, stage, phase, turn, mine, thread):
        take_turn(barriers, turn, mine)
        add(base, stage, arrays)
        turn = give_turn(barriers, turn, mine, thread)
        settled(arrays)
        hand_back(pair, where(thread)[0])
        stage, phase = following(stage, phase)
        return stage, phase, turn

    return begin, go_on, end
