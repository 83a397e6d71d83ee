"""What the Hopper kernels share whose blocks keep queries and walk over keys: work, its loading thread, the walk."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from kernels import barrier
from kernels.attention.forward import locate
from kernels.attention.ring import ROWS, Ring, kept_loader
from kernels.stages import begin_loading, next_stage, pair_of
from kernels.target import device
from kernels.warp import block_x, grid_x

_u32 = np.uint32


def query_work(causal: bool) -> Callable:
    """``work(number, queries, keys, heads, diagonal)``: of a tile of queries; those with most keys come first.

    Batch, head, first query, and how many keys some query of it sees.
    """

    @device
    def work(number, queries, keys, heads, diagonal):
        batch, head, row0 = locate(number, queries, heads, ROWS, causal)
        seen = keys
        if causal:
            seen = max(np.int64(0), min(seen, min(row0 + np.int64(ROWS), queries) + diagonal))
        return batch, head, row0, _u32(seen)

    return work


def query_producer(ring: Ring, causal: bool) -> Callable:
    """``produce(base, barriers, maps, problem)``: asks for tiles of queries, and of keys and values.

    ``maps`` are those of what is kept, then k's and v's; ``problem`` queries, keys, heads, q's heads of one of k's,
    diagonal, tiles.
    """
    work, load_kept, following, load_box = (
        query_work(causal),
        kept_loader(ring),
        next_stage(ring.stages),
        barrier.tma_load(4),
    )
    stage_bytes, loaded_bytes, kept = (_u32(ring.stage_bytes), _u32(ring.loaded_bytes), ring.kept)
    columns, walked_bytes = _u32(ring.columns), _u32(ring.walked_bytes)

    @device
    def produce(base, barriers, maps, problem):
        queries, keys, heads, group, diagonal, tiles = problem
        for i in range(kept + 2):
            barrier.tensor_map_acquire(maps[i])
        stage, phase, turn = _u32(0), _u32(1), _u32(0)
        number = _u32(block_x())
        while number < _u32(tiles):
            batch, head, row0, seen = work(number, queries, keys, heads, diagonal)
            load_kept(base, barriers, turn, maps, row0, head, batch)
            other, key = _u32(_u32(head) // _u32(group)), _u32(0)
            while key < seen:
                full = begin_loading(pair_of(barriers, stage), phase, loaded_bytes)
                to = _u32(base + stage * stage_bytes)
                load_box(to, maps[kept], full, _u32(0), key, other, _u32(batch))
                load_box(_u32(to + walked_bytes), maps[kept + 1], full, _u32(0), key, other, _u32(batch))
                key = _u32(key + columns)
                stage, phase = following(stage, phase)
            turn = _u32(turn + _u32(1))
            number = _u32(number + _u32(grid_x()))

    return produce


def query_walker(ring: Ring, steps: tuple[Callable, Callable, Callable], refine: Callable) -> Callable:
    """``walk(...)``: over the keys that a tile of queries sees; gives the next stage, phase and turn.

    ``steps`` are `stage_steps`; ``refine(arrays, edges, factor, before, thread)`` makes words of a stage's scores when
    they are there. ``before`` is the pair of barriers of the stage before, 0 where there is none; ``edges`` are the
    first key, `edge_of`'s number, all keys.
    """
    (begin, go_on, end), columns = steps, _u32(ring.columns)

    @device
    def walk(base, barriers, kept, arrays, edge, keys, seen, factor, stage, phase, turn, mine, thread):
        if seen == _u32(0):
            return stage, phase, turn
        pair, turn = begin(base, barriers, kept, arrays, stage, phase, turn, mine, thread)
        before, key = _u32(0), _u32(0)
        while _u32(key + columns) < seen:
            refine(arrays, (key, edge, keys), factor, before, thread)
            before = pair
            pair, stage, phase, turn = go_on(base, barriers, kept, arrays, stage, phase, turn, mine, thread)
            key = _u32(key + columns)
        refine(arrays, (key, edge, keys), factor, before, thread)
        return end(base, barriers, arrays, pair, stage, phase, turn, mine, thread)

    return walk
