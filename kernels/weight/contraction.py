"""Small contractions that prepare a factor in fp32: a product of two factors, or a Tucker core with one side.

    out[i, q, tap] = sum_j core[i, j, tap] * right[j, q]

With one tap this is the matrix product core @ right. One thread an element; the results are factors, so they are
small beside the weights they make, and are rounded once.
"""

from __future__ import annotations

import numpy as np

from kernels import warp
from kernels.double_float import multiply_add, rounded_pair
from kernels.elements import ELEMENTS
from kernels.target import SIMULATOR, f32p, i64, kernel_factory

THREADS = 32 if SIMULATOR else 256


@kernel_factory(("bf16", "bf16"), ("f16", "f32"))
def contract(core, right):
    """Parameters: core, right, out, elements, inner, taps, columns, core strides of i and of j."""
    load_core, load_right = ELEMENTS[core].load, ELEMENTS[right].load

    def kernel(core_pointer, right_pointer, out, elements, inner, taps, columns, stride_i, stride_j):
        index = warp.block_x() * np.int64(THREADS) + np.int64(warp.thread_index())
        if index < elements:
            pair = index // taps
            tap = index - pair * taps
            i = pair // columns
            core_at = i * stride_i + tap
            right_at = pair - i * columns
            high, low = np.float32(0), np.float32(0)
            for _ in range(inner):
                core_value, right_value = load_core(core_pointer, core_at), load_right(right_pointer, right_at)
                high, low = multiply_add(core_value, right_value, high, low)
                core_at += stride_j
                right_at += columns
            out[index] = rounded_pair(high, low)

    parameters = (
        ELEMENTS[core].pointer, ELEMENTS[right].pointer, f32p, i64, i64, i64, i64, i64, i64,
    )  # fmt: skip
    return kernel, parameters, {"threads": THREADS}
