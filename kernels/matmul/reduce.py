"""The second stage of a product whose sum was split: parts added up in order, then the epilogue and one rounding."""

from __future__ import annotations

import numpy as np

from kernels import bits, memory, warp
from kernels.matmul.epilogue import epilogue
from kernels.matmul.problem import COLUMNS, ROWS, result_parameters
from kernels.matmul.store import UNIT, storer
from kernels.target import SIMULATOR, cuda, device, f32p, i64, kernel_factory

THREADS = 32 if SIMULATOR else 256


@kernel_factory(("bf16", (), True), ("bf16", (("bias", "bf16"), ("gate", "silu", True)), True), ("f32", (), False))
def matmul_reduce(out, steps, wide):
    """Parameters: parts, their number, elements from one to the next, the product's columns, batches, the result's, the
    epilogue's. Parts are [batch, rows, columns] in fp32; a thread takes eight neighbours, aligned where ``wide``.
    """
    finish, emit = epilogue(steps), storer(out, steps, wide)
    gated = finish.gated
    sides = 2 if gated else 1
    count = UNIT * sides

    @device
    def add_wide(values, at, parts, index):
        for half in range(2):
            words = memory.load128(parts, index + np.int64(4 * half))
            for i in range(4):
                values[at + 4 * half + i] += bits.bits_f32(words[i])

    @device
    def add_up(values, parts, number, plane, index, second, left):
        """All parts' elements of one unit, or of the two that a gate takes."""
        for i in range(count):
            values[i] = np.float32(0)
        for part in range(number):
            at = index + np.int64(part) * plane
            if wide:
                add_wide(values, 0, parts, at)
                if gated:
                    add_wide(values, UNIT, parts, at + second)
            else:
                for i in range(UNIT):
                    if np.int64(i) < left:
                        values[i] += parts[at + np.int64(i)]
                        if gated:
                            values[UNIT + i] += parts[at + second + np.int64(i)]

    def kernel(parts, number, plane, columns, batches, result, e):
        index = warp.block_x() * np.int64(THREADS) + np.int64(warp.thread_index())
        units = np.uint32(np.uint32(result[COLUMNS] + np.int64(UNIT - 1)) // np.uint32(UNIT))
        line = np.uint32(np.uint32(index) // units)
        batch = np.int64(np.uint32(line // np.uint32(result[ROWS])))
        row = np.int64(line) - batch * result[ROWS]
        column = np.int64(np.uint32(np.uint32(index) - np.uint32(line * units)) * np.uint32(UNIT))
        if batch < batches:
            values = cuda.local.array(count, np.float32)
            left = result[COLUMNS] - column
            add_up(values, parts, number, plane, np.int64(line) * columns + column, result[COLUMNS], left)
            emit(values, result, e, batch, row, column)

    parameters = (f32p, i64, i64, i64, i64, result_parameters(out), finish.parameters)
    return kernel, parameters, {"threads": THREADS}
