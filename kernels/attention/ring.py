"""Attention on Hopper: how a block's loading thread hands tiles to its multiplying warpgroups.

A block keeps 128 lines of one tensor or two, 64 for each of two warpgroups, and walks over tiles of 64 lines of two
others; a thread of a third warpgroup asks TMA for them, stages ahead. A block goes on to further lines, which are on
their way before it has done with the ones before.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from kernels import barrier
from kernels.attention.tiles import Tile
from kernels.hardware import WARPGROUP
from kernels.stages import PAIR_BYTES, begin_loading, pair_maker, pair_of
from kernels.target import cuda, device
from kernels.warp import block_barrier

WIDTH = 64
THREADS = 3 * WARPGROUP
ROWS, WARPS = 128, 8
"""Lines that a block keeps, warps that multiply."""
HELD_BYTES = 2 * ROWS * WIDTH
"""Bytes of a tensor's kept lines, half of which are a warpgroup's."""
PRODUCER_REGISTERS, CONSUMER_REGISTERS = 40, 232

_u32 = np.uint32


@dataclass(frozen=True)
class Ring:
    """A block's shared memory: stages and their lines, tensors that it keeps, whether lines bring two numbers each."""

    stages: int
    columns: int
    kept: int
    numbers: bool = False

    @property
    def tile(self) -> Tile:
        """The tile of scores."""
        return Tile(ROWS, self.columns, WARPS, WIDTH)

    @property
    def walked_bytes(self) -> int:
        """Bytes of a tensor's lines of a stage."""
        return 2 * self.columns * WIDTH

    @property
    def stage_bytes(self) -> int:
        """Bytes of a stage; the numbers stand after the tiles."""
        return 2 * self.walked_bytes + (1024 if self.numbers else 0)

    @property
    def loaded_bytes(self) -> int:
        """Bytes that arrive in a stage."""
        return 2 * self.walked_bytes + (8 * self.columns if self.numbers else 0)

    @property
    def kept_at(self) -> int:
        """Where the first of two rooms for kept lines begins, as bytes from the start."""
        return self.stages * self.stage_bytes

    @property
    def kept_bytes(self) -> int:
        """Bytes of a room for kept lines."""
        return self.kept * HELD_BYTES

    @property
    def results_at(self) -> int:
        """Where results lie on their way out."""
        return self.kept_at + 2 * self.kept_bytes

    @property
    def barriers_at(self) -> int:
        """A pair of barriers of every stage and of both rooms for kept lines; a barrier a warpgroup for turns."""
        return self.results_at + HELD_BYTES

    @property
    def shared_bytes(self) -> int:
        """All of it."""
        return self.barriers_at + PAIR_BYTES * (self.stages + 3)

    def options(self) -> dict:
        """A kernel's launch bounds."""
        return {"threads": THREADS, "shared_bytes": self.shared_bytes} | barrier.HOPPER


def barrier_maker(ring: Ring) -> Callable:
    """``make(barriers)``, for one thread."""
    pairs = ring.stages + 2
    make_pairs = pair_maker(pairs, WARPS)

    @device
    def make(barriers):
        make_pairs(barriers)
        for group in range(2):
            barrier.barrier_init(_u32(pair_of(barriers, pairs) + _u32(8 * group)), _u32(WARPS // 2))
        barrier.barrier_init_visible()

    return make


def turn_taker(ring: Ring) -> Callable:
    """``take_turn(barriers, turn, group)``: wait for a warpgroup's turn to ask for products; the first's is first.

    Where both ask at once, products of both take twice as long, and nothing is under way while both do the rest.
    """
    at = _u32(PAIR_BYTES * (ring.stages + 2))

    @device
    def take_turn(barriers, turn, group):
        barrier.barrier_wait(_u32(barriers + at + group * _u32(8)), _u32(_u32(turn ^ group ^ _u32(1)) & _u32(1)))

    return take_turn


def turn_giver(ring: Ring) -> Callable:
    """``give_turn(barriers, turn, group, thread)``: the other warpgroup's turn; the number of the own next one."""
    at = _u32(PAIR_BYTES * (ring.stages + 2))

    @device
    def give_turn(barriers, turn, group, thread):
        other = _u32(group ^ _u32(1))
        if (thread & _u32(31)) == _u32(0):
            barrier.barrier_arrive(_u32(barriers + at + other * _u32(8)))
        return _u32(turn + _u32(1))

    return give_turn


def kept_loader(ring: Ring) -> Callable:
    """``load(base, barriers, turn, maps, row0, head, batch)``: asks for the lines that a block keeps in a turn."""
    load_box, several, room = barrier.tma_load(4), ring.kept == 2, kept_room(ring)
    nbytes = _u32(ring.kept_bytes)

    @device
    def load(base, barriers, turn, maps, row0, head, batch):
        to, pair, phase = room(base, barriers, turn)
        full = begin_loading(pair, _u32(phase ^ _u32(1)), nbytes)
        load_box(to, maps[0], full, _u32(0), _u32(row0), _u32(head), _u32(batch))
        if several:
            load_box(_u32(to + _u32(HELD_BYTES)), maps[1], full, _u32(0), _u32(row0), _u32(head), _u32(batch))

    return load


def kept_room(ring: Ring) -> Callable:
    """``room(base, barriers, turn)``: where the lines of a block's so-manyeth turn lie, their barriers, the phase."""
    at, nbytes, stages = _u32(ring.kept_at), _u32(ring.kept_bytes), _u32(ring.stages)

    @device
    def room(base, barriers, turn):
        which = _u32(turn & _u32(1))
        pair = pair_of(barriers, _u32(stages + which))
        return (_u32(base + at + which * nbytes), pair, _u32(_u32(turn >> _u32(1)) & _u32(1)))

    return room


def specialised(ring: Ring, produce: Callable, consume: Callable) -> Callable:
    """``run(state)``: the parts of a block's warpgroups; both are given the shared memory, its address, the state."""
    make, barriers_at = barrier_maker(ring), _u32(ring.barriers_at)
    give, take = (barrier.registers_give(PRODUCER_REGISTERS), barrier.registers_take(CONSUMER_REGISTERS))

    @device
    def run(thread, state):
        shared = cuda.shared.array(0, np.uint16, alignment=1024)
        base = barrier.shared_address(shared, np.int64(0))
        barriers = _u32(base + barriers_at)
        if thread == _u32(0):
            make(barriers)
        block_barrier()
        if thread < _u32(WARPGROUP):
            give()
            if thread == _u32(0):
                produce(base, barriers, state)
        else:
            take()
            consume(shared, base, barriers, _u32(thread - _u32(WARPGROUP)), state)

    return run
