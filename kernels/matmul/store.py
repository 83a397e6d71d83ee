"""Eight neighbouring sums of a row through the epilogue to memory: the last lines of every matmul kernel."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np

from kernels.elements import ELEMENTS
from kernels.matmul.epilogue import epilogue
from kernels.matmul.problem import COLUMNS, OUT, OUT_BATCH, OUT_STRIDE
from kernels.target import device

UNIT = 8


@functools.cache
def storer(out: str, steps: tuple, wide: bool) -> Callable:
    """``emit(values, result, e, batch, row, column)``: ``values`` are eight sums, or eight and eight before a gate.

    ``column`` is a multiple of 8. Where ``wide``, results and the epilogue's operands are accessed eight at a time;
    else one by one, as far as the result reaches.
    """
    finish, element = epilogue(steps), ELEMENTS[out]
    one, eight, store, store8, gated = finish.one, finish.eight, element.store, element.store8, finish.gated

    @device
    def emit_whole(values, result, e, batch, row, column):
        if gated:
            eight(values, 0, UNIT, batch, row, column, result[COLUMNS], e)
        else:
            eight(values, 0, batch, row, column, e)
        at = batch * result[OUT_BATCH] + row * result[OUT_STRIDE] + column
        store8(result[OUT], at, values, 0, np.uint32(0))

    @device
    def emit_each(values, result, e, batch, row, column):
        at = batch * result[OUT_BATCH] + row * result[OUT_STRIDE]
        for i in range(UNIT):
            place = column + np.int64(i)
            if place < result[COLUMNS]:
                if gated:
                    value = one(values[i], values[UNIT + i], batch, row, place, result[COLUMNS], e)
                else:
                    value = one(values[i], batch, row, place, e)
                store(result[OUT], at + place, value)

    return emit_whole if wide else emit_each
