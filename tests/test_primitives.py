"""Every primitive that kernels are made of, on a GPU or in the simulator, against NumPy and float64."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from kernels import bits, elements, memory, tensor_core, warp
from kernels.target import cuda, types
from kernels.target import device as device_function

ALL_16_BIT = np.arange(1 << 16, dtype=np.uint16)


def convert(primitive, read, write):
    """A kernel of 64 threads: out[i] = write(primitive(read(source[i]))) for i < count."""

    def kernel(source, count, out):
        i = warp.block_x() * np.int64(32) + np.int64(warp.thread_index())
        while i < count:
            out[i] = write(primitive(read(source[i])))
            i += np.int64(64)

    return kernel


def convert_pairs(primitive):
    """A kernel of 64 threads: out[i] = primitive(source[2 i], source[2 i + 1]), the source given as fp32 bits."""

    def kernel(source, count, out):
        i = warp.block_x() * np.int64(32) + np.int64(warp.thread_index())
        while i < count:
            out[i] = primitive(bits.bits_f32(source[2 * i]), bits.bits_f32(source[2 * i + 1]))
            i += np.int64(64)

    return kernel


@device_function
def unchanged(x):
    return x


def assert_same_floats(found, expected, dtype):
    """Equal bit for bit, except that any NaN stands for any other."""
    nan = np.isnan(expected.view(dtype))
    np.testing.assert_array_equal(np.isnan(found.view(dtype)), nan)
    np.testing.assert_array_equal(found[~nan], expected[~nan])


WIDENING = {
    "bf16_to_f32": (ml_dtypes.bfloat16, lambda word: word),
    "low_bf16": (ml_dtypes.bfloat16, lambda word: word & 0xFFFF),
    "high_bf16": (ml_dtypes.bfloat16, lambda word: word >> 16),
    "f16_to_f32": (np.float16, lambda word: word),
    "low_f16": (np.float16, lambda word: word & 0xFFFF),
    "high_f16": (np.float16, lambda word: word >> 16),
}


@pytest.mark.parametrize("name", WIDENING)
def test_widening_is_exact_for_every_pattern(run_kernel, rng, name):
    dtype, half = WIDENING[name]
    source = ALL_16_BIT
    if name.startswith(("low", "high")):
        source = rng.permutation(ALL_16_BIT).astype(np.uint32) << 16 | rng.permutation(ALL_16_BIT)
    kernel = convert(getattr(bits, name), unchanged, bits.f32_bits)
    (found,) = run_kernel(kernel, [source, source.size], [(np.uint32, source.shape)], grid=(2, 1, 1))
    with np.errstate(invalid="ignore"):
        expected = half(source).astype(np.uint16).view(dtype).astype(np.float32).view(np.uint32)
    assert_same_floats(found, expected, np.float32)


def around_every_value(dtype):
    """fp32 bits at, just below, at and just above the tie that follows every finite value; and the roundings."""
    magnitude = np.arange(int(np.array(np.inf, dtype).view(np.uint16)), dtype=np.uint16)
    value = magnitude.view(dtype).astype(np.float64)
    above = np.append(value[1:], 2 * value[-1] - value[-2])
    tie = ((value + above) / 2).astype(np.float32).view(np.uint32)
    source = np.stack([value.astype(np.float32).view(np.uint32), tie - 1, tie, tie + 1])
    rounded = np.stack([magnitude, magnitude, magnitude + (magnitude & 1), magnitude + 1]).astype(np.uint16)
    source = np.concatenate([source.ravel(), source.ravel() | np.uint32(1 << 31)])
    return source, np.concatenate([rounded.ravel(), rounded.ravel() | np.uint16(1 << 15)])


def beyond_every_value(dtype):
    """Infinities, NaNs, the largest fp32, fp32 subnormals; and what they round to."""
    infinity = int(np.array(np.inf, dtype).view(np.uint16))
    source = np.array([0x7F800000, 0x7F7FFFFF, 0x7FC00000, 0x7F800001, 0x7FFFFFFF], np.uint32)
    rounded = np.array([infinity, infinity, *[0x7FFF] * 3], np.uint16)
    if dtype is np.float16:
        source, rounded = np.append(source, np.uint32([1, 0x7FFFFF])), np.append(rounded, np.uint16([0, 0]))
    return np.append(source, source | np.uint32(1 << 31)), np.append(rounded, rounded | np.uint16(1 << 15))


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize("packed", [False, True])
def test_narrowing_rounds_to_nearest_ties_to_even(run_kernel, rng, dtype, packed):
    source, expected = map(np.concatenate, zip(around_every_value(dtype), beyond_every_value(dtype), strict=True))
    if packed:
        order = rng.permutation(source.size & ~1)
        source, expected = source[order], expected[order]
        kernel = convert_pairs(bits.pack_f16 if dtype is np.float16 else bits.pack_bf16)
        (found,) = run_kernel(kernel, [source, source.size // 2], [(np.uint32, source.size // 2)], grid=(2, 1, 1))
        found = found.view(np.uint16)
    else:
        narrow = bits.f32_to_f16 if dtype is np.float16 else bits.f32_to_bf16
        kernel = convert(narrow, bits.bits_f32, unchanged)
        (found,) = run_kernel(kernel, [source, source.size], [(np.uint16, source.size)], grid=(2, 1, 1))
    assert_same_floats(found, expected, dtype)


def test_not_finite(run_kernel):
    source = np.array([0, 1, 0x7F7FFFFF, 0xFF7FFFFF, 0x80000000, 0x7F800000, 0xFF800000, 0x7F800001], np.uint32)
    kernel = convert(bits.not_finite, bits.bits_f32, np.int32)
    (found,) = run_kernel(kernel, [source, source.size], [(np.int32, source.size)])
    np.testing.assert_array_equal(found, [0, 0, 0, 0, 0, 1, 1, 1])


TRACED = {"bf16": (bits.trace_bf16, ml_dtypes.bfloat16), "f16": (bits.trace_f16, np.float16)}


@pytest.mark.parametrize("kind", TRACED)
def test_trace_of_pairs_stays_clean_until_a_value_is_not_finite(run_kernel, kind):
    trace, dtype = TRACED[kind]
    largest = float(ml_dtypes.finfo(dtype).max)
    clean = [(1, -2), (0, -0.0), (largest, -largest), (float(ml_dtypes.finfo(dtype).smallest_subnormal), 3)]
    bad = [(np.inf, 1), (1, -np.inf), (np.nan, 0), (0, np.nan)]
    words = np.array([*clean, *bad]).astype(dtype).view(np.uint32).reshape(-1)
    traced = convert(traced_by(trace), np.uint32, np.int32)
    (found,) = run_kernel(traced, [words, words.size], [(np.int32, words.size)])
    np.testing.assert_array_equal(found, [1] * len(clean) + [0] * len(bad))


def test_trace_of_fp32_stays_clean_until_a_value_is_not_finite(run_kernel):
    values = np.array([0, -0.0, 1, -3.4028235e38, 1e-45, np.inf, -np.inf, np.nan], np.float32)
    traced = convert(traced_by(bits.trace_f32), np.uint32, np.int32)
    (found,) = run_kernel(traced, [values.view(np.uint32), values.size], [(np.int32, values.size)])
    np.testing.assert_array_equal(found, [1] * 5 + [0] * 3)


def traced_by(trace):
    @device_function
    def clean(word):
        return elements.all_finite(trace(np.uint32(0), word))

    return clean


def copy16(load, store, elements):
    """A kernel that copies 16 bytes a thread from `first` on, to the mirrored place."""

    def kernel(source, first, out):
        lane = np.int64(warp.thread_index())
        a, b, c, d = load(source, first + lane * np.int64(elements))
        store(out, first + (np.int64(31) - lane) * np.int64(elements), a, b, c, d)

    return kernel


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32, np.float32])
@pytest.mark.parametrize("load", ["load128", "load128_stream"])
def test_16_byte_accesses_move_what_they_say_and_nothing_else(run_kernel, rng, dtype, load):
    elements = 16 // np.dtype(dtype).itemsize
    source = rng.integers(0, 256, 34 * 16, np.uint8).view(dtype)
    kernel = copy16(getattr(memory, load), memory.store128_stream, elements)
    (found,) = run_kernel(kernel, [source, elements], [(dtype, source.shape)])
    rows, wanted = found.view(np.uint32).reshape(34, 4), source.view(np.uint32).reshape(34, 4)
    np.testing.assert_array_equal(rows[1:33], wanted[32:0:-1])
    assert (rows[[0, 33]] == 0xFFFFFFFF).all()


def copy4(source, first, out):
    lane = np.int64(warp.thread_index())
    out[np.int64(32) - lane] = memory.load32(source, first + np.int64(2) * lane)


def test_4_byte_loads(run_kernel, rng):
    source = rng.integers(0, 1 << 16, 68, np.uint16)
    (found,) = run_kernel(copy4, [source, 2], [(np.uint32, 34)])
    np.testing.assert_array_equal(found[1:33], source.view(np.uint32)[32:0:-1])
    assert (found[[0, 33]] == 0xFFFFFFFF).all()


def through_shared(source, out):
    words = cuda.shared.array(256, types.uint32, alignment=16)
    halves = cuda.shared.array(512, types.uint16, alignment=16)
    thread = np.int64(warp.thread_index())
    a, b, c, d = memory.load128(source, np.int64(4) * thread)
    memory.shared_store128(words, np.int64(4) * (np.int64(63) - thread), a, b, c, d)
    warp.block_barrier()
    memory.shared_store32(halves, np.int64(2) * thread, words[thread])
    for i in range(1, 4):
        memory.shared_store32(halves, np.int64(2) * (thread + np.int64(64 * i)), words[thread + np.int64(64 * i)])
    warp.block_barrier()
    a, b, c, d = memory.shared_load128(halves, np.int64(8) * thread)
    memory.store128_stream(out, np.int64(4) * thread, a, b, c, d)


def test_shared_memory_accesses(run_kernel, rng):
    source = rng.integers(0, 1 << 32, 256, np.uint32)
    (found,) = run_kernel(through_shared, [source], [(np.uint32, 256)], threads=64)
    np.testing.assert_array_equal(found.reshape(64, 4), source.reshape(64, 4)[::-1])


def through_async_copies(source, out):
    tile = cuda.shared.array(1024, types.uint16, alignment=16)
    thread, block = np.int64(warp.thread_index()), warp.block_x()
    memory.copy_async16(tile, np.int64(8) * thread, source, block * np.int64(1024) + np.int64(8) * thread)
    memory.copy_async_commit()
    half = np.int64(512)
    memory.copy_async16(tile, half + np.int64(8) * thread, source, block * np.int64(1024) + half + np.int64(8) * thread)
    memory.copy_async_commit()
    memory.copy_async_wait_all()
    warp.block_barrier()
    for i in range(16):
        at = np.int64(64 * i) + thread
        out[block * np.int64(1024) + at] = tile[np.int64(1023) - at]


def test_asynchronous_copies_arrive_before_the_wait_ends(run_kernel, rng):
    source = rng.integers(0, 1 << 16, 3 * 1024, np.uint16)
    (found,) = run_kernel(through_async_copies, [source], [(np.uint16, source.shape)], grid=(3, 1, 1), threads=64)
    np.testing.assert_array_equal(found.reshape(3, 1024), source.reshape(3, 1024)[:, ::-1])


def through_table(table, out):
    lane = np.int64(warp.thread_index())
    if lane < 8:
        out[lane] = np.int64(memory.u16_at(table[0])[lane])
        out[np.int64(8) + lane] = np.int64(memory.f32_at(table[1])[lane])
        out[np.int64(16) + lane] = np.int64(memory.i32_at(table[2])[lane])
        out[np.int64(24) + lane] = memory.i64_at(table[3])[lane]


def test_pointers_read_from_a_table(run_kernel, rng, device):
    arrays = [rng.integers(0, 1 << 15, 8).astype(t) for t in (np.uint16, np.float32, np.int32, np.int64)]
    buffers = [device.upload(array) for array in arrays]
    table = np.array([buffer.address for buffer in buffers], np.int64)
    (found,) = run_kernel(through_table, [table], [(np.int64, (4, 8))])
    np.testing.assert_array_equal(found, np.stack(arrays))


def indices(out):
    block = (warp.block_z() * np.int64(3) + warp.block_y()) * np.int64(2) + warp.block_x()
    thread = np.int64(warp.thread_index())
    out[block * np.int64(40) + thread] = block * np.int64(1000) + thread


def test_every_thread_knows_where_it_is(run_kernel):
    (found,) = run_kernel(indices, [], [(np.int64, (12, 40))], grid=(2, 3, 2), threads=40)
    np.testing.assert_array_equal(found, np.arange(12)[:, None] * 1000 + np.arange(40))


def shuffle(values, masks, out):
    thread = np.int64(warp.thread_index())
    out[thread] = warp.shuffle_xor(values[thread], masks[thread])


def test_shuffle_gives_each_lane_the_value_of_the_lane_it_names(run_kernel, rng):
    lanes = np.arange(64)
    for _ in range(4):
        values = rng.standard_normal(64, np.float32)
        masks = np.repeat(rng.integers(0, 32, 2, np.uint32), 32)
        (found,) = run_kernel(shuffle, [values, masks], [(np.float32, 64)], threads=64)
        np.testing.assert_array_equal(found, values[lanes ^ masks])


def sums(values, warps, quads):
    thread = np.int64(warp.thread_index())
    warps[thread] = warp.warp_sum(values[thread])
    quads[thread] = warp.quad_sum(values[thread])


def test_sums_are_the_documented_trees_in_every_lane(run_kernel, rng):
    values = rng.standard_normal(64, np.float32)
    warps, quads = run_kernel(sums, [values], [(np.float32, 64), (np.float32, 64)], threads=64)
    for found, masks in ((warps, (16, 8, 4, 2, 1)), (quads, (1, 2))):
        expected = values
        for mask in masks:
            expected = expected + expected[np.arange(64) ^ mask]
        np.testing.assert_array_equal(found.view(np.uint32), expected.view(np.uint32))


def neighbours(values, out):
    staged = cuda.shared.array(96, types.float32)
    thread = np.int64(warp.thread_index())
    for step in range(3):
        staged[thread] = values[thread] + np.float32(step)
        warp.sync_warp()
        out[np.int64(96 * 2 * step) + thread] = staged[thread ^ np.int64(31)]
        warp.block_barrier()
        out[np.int64(96 * (2 * step + 1)) + thread] = staged[np.int64(95) - thread]
        warp.block_barrier()


def test_barriers_order_shared_memory(run_kernel, rng):
    values = rng.standard_normal(96, np.float32)
    (found,) = run_kernel(neighbours, [values], [(np.float32, (3, 2, 96))], threads=96)
    for step in range(3):
        staged = values + np.float32(step)
        np.testing.assert_array_equal(found[step], [staged[np.arange(96) ^ 31], staged[::-1]])


def votes(chosen, out):
    thread, block = np.int64(warp.thread_index()), warp.block_x()
    first = warp.uniform_any(thread == chosen[block])
    second = warp.uniform_any(thread == chosen[block] - np.int64(64))
    out[block * np.int64(64) + thread] = np.int32(first) + np.int32(2) * np.int32(second)


def test_a_vote_reaches_all_threads_of_its_block_only(run_kernel):
    chosen = np.array([-1, 0, 63, 64, 127, 128])
    (found,) = run_kernel(votes, [chosen], [(np.int32, (6, 64))], grid=(6, 1, 1), threads=64)
    np.testing.assert_array_equal(found, np.array([0, 1, 1, 2, 2, 0])[:, None].repeat(64, 1))


def load_matrices(source, rows, plain, transposed):
    tile = cuda.shared.array(1024, types.uint16, alignment=16)
    lane = np.int64(warp.thread_index())
    for i in range(4):
        at = np.int64(8) * (lane + np.int64(32 * i))
        memory.copy_async16(tile, at, source, at)
    memory.copy_async_wait_all()
    warp.sync_warp()
    words = tensor_core.ldmatrix(tile, np.int64(8) * rows[lane])
    turned = tensor_core.ldmatrix_transposed(tile, np.int64(8) * rows[lane])
    for r in range(4):
        plain[np.int64(4) * lane + np.int64(r)] = words[r]
        transposed[np.int64(4) * lane + np.int64(r)] = turned[r]


def test_ldmatrix_deals_rows_from_any_address(run_kernel, rng):
    source = rng.permutation(1 << 16)[:1024].astype(np.uint16)
    rows = rng.integers(0, 128, 32)
    plain, transposed = run_kernel(load_matrices, [source, rows], [(np.uint32, (32, 4))] * 2)
    matrices = source.reshape(128, 8)[rows].reshape(4, 8, 8)
    for found, wanted in ((plain, matrices), (transposed, matrices.transpose(0, 2, 1))):
        pairs = found.view(np.uint16).reshape(8, 4, 4, 2)
        np.testing.assert_array_equal(pairs.transpose(2, 0, 1, 3).reshape(4, 8, 8), wanted)


def multiply(instruction):
    """A kernel of one warp: out = c + a b, a [16, 16], b [16, 8] and c [16, 8] in row-major order."""

    def kernel(a, b, c, out):
        tile = cuda.shared.array(384, types.uint16, alignment=16)
        lane = np.int64(warp.thread_index())
        memory.copy_async16(tile, np.int64(8) * lane, a, np.int64(8) * lane)
        if lane < 16:
            memory.copy_async16(tile, np.int64(256) + np.int64(8) * lane, b, np.int64(8) * lane)
        memory.copy_async_wait_all()
        warp.sync_warp()
        row, half = lane & np.int64(15), lane >> np.int64(4)
        a0, a1, a2, a3 = tensor_core.ldmatrix(tile, np.int64(16) * row + np.int64(8) * half)
        b0, b1, _, _ = tensor_core.ldmatrix_transposed(tile, np.int64(256) + np.int64(8) * row)
        at = np.int64(8) * (lane >> np.int64(2)) + np.int64(2) * (lane & np.int64(3))
        product = instruction(a0, a1, a2, a3, b0, b1, c[at], c[at + 1], c[at + 64], c[at + 65])
        out[at] = product[0]
        out[at + 1] = product[1]
        out[at + 64] = product[2]
        out[at + 65] = product[3]

    return kernel


MMA = {ml_dtypes.bfloat16: tensor_core.mma_bf16, np.float16: tensor_core.mma_f16}


@pytest.mark.parametrize("dtype", MMA)
def test_mma_is_exact_where_fp32_is(run_kernel, rng, dtype):
    a, b, c = (rng.integers(-8, 9, shape) for shape in ((16, 16), (16, 8), (16, 8)))
    halves = [x.astype(dtype).view(np.uint16) for x in (a, b)]
    (found,) = run_kernel(multiply(MMA[dtype]), [*halves, c.astype(np.float32)], [(np.float32, (16, 8))])
    np.testing.assert_array_equal(found, c + a @ b)


@pytest.mark.parametrize("dtype", MMA)
def test_mma_against_float64(run_kernel, rng, dtype):
    scale = 2.0 ** rng.integers(-6, 7)
    a, b = ((scale * rng.standard_normal(shape)).astype(dtype) for shape in ((16, 16), (16, 8)))
    c = rng.standard_normal((16, 8), np.float32)
    (found,) = run_kernel(multiply(MMA[dtype]), [a.view(np.uint16), b.view(np.uint16), c], [(np.float32, (16, 8))])
    exact = c + a.astype(np.float64) @ b.astype(np.float64)
    terms = np.abs(c) + np.abs(a.astype(np.float64)) @ np.abs(b.astype(np.float64))
    # Products are exact; each of 17 additions may truncate what lies below an fp32 ulp of the largest term.
    assert (np.abs(found - exact) <= 17 * 2.0**-23 * terms).all()


@pytest.mark.parametrize("dtype", MMA)
@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_mma_keeps_infinities_and_nans_in_their_row(run_kernel, dtype, value):
    a, b, c = np.ones((16, 16), dtype), np.ones((16, 8), dtype), np.zeros((16, 8), np.float32)
    a[5, 11] = value
    (found,) = run_kernel(multiply(MMA[dtype]), [a.view(np.uint16), b.view(np.uint16), c], [(np.float32, (16, 8))])
    expected = np.full((16, 8), 16, np.float32)
    expected[5] = value
    np.testing.assert_array_equal(found, expected)
