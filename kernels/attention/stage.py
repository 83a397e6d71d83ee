"""Products of a stage that both gradients of attention begin with, by warpgroups (sm_90a)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from kernels import wgmma
from kernels.attention.ring import HELD_BYTES, WIDTH, Ring
from kernels.target import device
from kernels.wgmma_registers import start_products

_u32 = np.uint32


def pair_starter(ring: Ring, kind: str) -> Callable:
    """``start(base, kept, stage, arrays)``: products of kept lines with the stage's, and of both second tensors.

    ``kept`` is the address of a warpgroup's kept lines; scores are the first of the arrays, their gradients the second.
    """
    along, lines = start_products(ring.columns, WIDTH // 16, kind), wgmma.operand_descriptor(True)
    stage_bytes, walked_bytes = _u32(ring.stage_bytes), _u32(ring.walked_bytes)

    @device
    def start(base, kept, stage, arrays):
        place = _u32(base + stage * stage_bytes)
        along(arrays[0], lines(kept), lines(place))
        along(arrays[1], lines(_u32(kept + _u32(HELD_BYTES))), lines(_u32(place + walked_bytes)))

    return start
