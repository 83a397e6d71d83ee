"""What a team of threads, a part of a warp or a whole block, makes of values that each of its threads has."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np

from kernels import warp
from kernels.expression import written
from kernels.functions import maximum, minimum
from kernels.hardware import WARP
from kernels.target import device


@device
def _plus(a, b):
    return a + b


COMBINE = {
    "sum": (_plus, np.float32(0)), "max": (maximum, np.float32(-np.inf)), "min": (minimum, np.float32(np.inf)),
}  # fmt: skip
"""Reduction -> what joins two values, and what it starts from."""


@functools.cache
def reduce_team(team: int, operations: tuple[str, ...], slot: int = 0, whole: bool = True) -> Callable:
    """A device function ``(values, parts)``: the team's values, each as one, in every thread, always in the same order.

    ``parts`` is shared memory of 32 fp32 numbers a value from ``slot`` on, the kernel's own: NVVM refuses one that two
    device functions share. Nobody waits at the end, so a slot is used once. Teams beyond a warp are ``whole`` blocks,
    or have barriers of their own, as no more than 15 teams of a block can.
    """
    warps, lines = team // WARP, [f"a{i} = values[{i}]" for i in range(len(operations))]
    known = {f"join{i}": COMBINE[name][0] for i, name in enumerate(operations)}
    known |= {"shuffle": warp.shuffle_xor, "thread_index": warp.thread_index}
    known["barrier"] = warp.block_barrier if whole or team <= WARP else warp.team_barrier(team)
    known |= {"uint32": np.uint32, "int64": np.int64}

    def butterfly(lanes: int) -> list[str]:
        masks = [lanes >> step for step in range(1, lanes.bit_length())]
        return [f"a{i} = join{i}(a{i}, shuffle(a{i}, uint32({m})))" for m in masks for i in range(len(operations))]

    lines += butterfly(min(team, WARP))
    if warps > 1:
        lines += ["thread = uint32(thread_index())", "if thread & uint32(31) == uint32(0):"]
        place = "parts[int64(uint32(uint32({}) + {}))]"
        for i in range(len(operations)):
            lines.append("    " + place.format((slot + i) * WARP, "uint32(thread >> uint32(5))") + f" = a{i}")
        lines.append("barrier()")
        for i in range(len(operations)):
            first = "uint32(0)" if whole else f"uint32(uint32(thread >> uint32(5)) & uint32({WARP - warps}))"
            lines.append(
                f"a{i} = " + place.format((slot + i) * WARP, f"uint32({first} + uint32(thread & uint32({warps - 1})))")
            )
        lines += butterfly(warps)
    results = "".join(f"a{i}, " for i in range(len(operations)))
    return written("reduce", "values, parts", [*lines, f"return ({results})"], known)
