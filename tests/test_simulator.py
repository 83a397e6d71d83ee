"""The simulator refuses what hardware leaves undefined, and gives the same answer every time."""

from __future__ import annotations

import gc
import warnings

import numpy as np
import pytest

from kernels import bits, memory, parameters, target, tensor_core, warp
from kernels.target import SIMULATOR, Kernel, cuda, f32, f32p, i64, kernel_factory, types, u16p, u32p

pytestmark = pytest.mark.skipif(not SIMULATOR, reason="about the simulator: set NUMBA_ENABLE_CUDASIM=1")


def simulate(function, signature, arguments, grid=(1, 1, 1), threads=32, shared_bytes=0):
    kernel = Kernel(function, signature, threads, key=function.__qualname__, shared_bytes=shared_bytes)
    kernel.launcher(grid)(None, arguments)


def barrier_in_half_a_warp(out):
    if warp.thread_index() < 16:
        warp.block_barrier()
    warp.sync_warp()


def warp_operation_without_a_lane(out):
    if warp.thread_index() != 7:
        out[warp.thread_index()] = warp.warp_sum(np.float32(1))


def operations_that_wait_for_each_other(out):
    if warp.thread_index() < 16:
        out[0] = warp.quad_sum(np.float32(1))
    else:
        warp.block_barrier()


@pytest.mark.parametrize(
    "kernel", [barrier_in_half_a_warp, warp_operation_without_a_lane, operations_that_wait_for_each_other]
)
def test_a_deadlock_is_an_error_that_names_kernel_and_block(kernel):
    with pytest.raises(RuntimeError, match=rf"{kernel.__name__} block \(0, 0, 0\): deadlock: threads \["):
        simulate(kernel, (f32p,), (np.zeros(32, np.float32),))


def different_barriers(out):
    if warp.thread_index() < 16:
        warp.block_barrier()
    else:
        warp.block_barrier()


def different_shuffles(out):
    lane = warp.thread_index()
    if lane < 16:
        out[lane] = warp.shuffle_xor(np.float32(lane), np.uint32(1))
    else:
        out[lane] = warp.shuffle_xor(np.float32(lane), np.uint32(1))


def different_operations(out):
    if warp.thread_index() < 16:
        warp.sync_warp()
    else:
        out[0] = warp.shuffle_xor(np.float32(0), np.uint32(1))


@pytest.mark.parametrize("kernel", [different_barriers, different_shuffles, different_operations])
def test_threads_of_a_warp_must_meet_at_one_instruction(kernel):
    with pytest.raises(RuntimeError, match=f"{kernel.__name__}.*different instructions: .*line"):
        simulate(kernel, (f32p,), (np.zeros(32, np.float32),))


def warps_at_barriers_of_their_own(out):
    thread = warp.thread_index()
    if thread < 32:
        out[thread] = 1
        warp.block_barrier()
    else:
        warp.block_barrier()
        out[thread] = out[thread - np.uint32(32)]


def test_warps_may_meet_at_different_barriers():
    out = np.zeros(64, np.float32)
    simulate(warps_at_barriers_of_their_own, (f32p,), (out,), threads=64)
    assert (out == 1).all()


def a_barrier_and_a_vote(out):
    if warp.thread_index() < 32:
        warp.block_barrier()
    else:
        warp.uniform_any(False)


def test_barriers_and_votes_do_not_meet():
    with pytest.raises(RuntimeError, match="some warps wait at a barrier, others at a vote"):
        simulate(a_barrier_and_a_vote, (f32p,), (np.zeros(1, np.float32),), threads=64)


def barrier_after_some_return(out):
    thread = warp.thread_index()
    if thread < 40:
        return
    warp.block_barrier()
    out[thread] = np.float32(warp.uniform_any(thread == 63))


def test_threads_that_have_returned_hold_up_no_barrier():
    out = np.zeros(64, np.float32)
    simulate(barrier_after_some_return, (f32p,), (out,), threads=64)
    np.testing.assert_array_equal(out, np.arange(64) >= 40)


def any_warp_operation(out):
    out[warp.thread_index()] = warp.quad_sum(np.float32(1))


@pytest.mark.parametrize("threads", [1, 16, 33, 63])
def test_warp_operations_need_whole_warps(threads):
    with pytest.raises(RuntimeError, match=f"a warp of {threads % 32} threads, wanted 32"):
        simulate(any_warp_operation, (f32p,), (np.zeros(64, np.float32),), threads=threads)


def leave_something_behind(out):
    shared = cuda.shared.array(4, types.float32)
    dynamic = cuda.shared.array(0, types.float32)
    local = cuda.local.array(2, types.float32)
    block = warp.block_x()
    out[3 * block] = shared[3]
    out[3 * block + 1] = dynamic[7]
    out[3 * block + 2] = local[1]
    shared[3] = dynamic[7] = local[1] = np.float32(1)


def test_memory_of_a_block_and_of_a_thread_starts_as_nan():
    out = np.zeros(9, np.float32)
    simulate(leave_something_behind, (f32p,), (out,), grid=(3, 1, 1), threads=1, shared_bytes=32)
    assert np.isnan(out).all()


def two_arrays_on_one_line(out):
    first, second = cuda.shared.array(32, types.float32), cuda.shared.array(32, types.float32)
    thread = warp.thread_index()
    first[thread], second[thread] = np.float32(1), np.float32(2)
    warp.block_barrier()
    out[thread] = first[thread ^ np.uint32(1)]


def test_shared_arrays_on_one_line_are_two():
    out = np.zeros(32, np.float32)
    simulate(two_arrays_on_one_line, (f32p,), (out,))
    assert (out == 1).all()


def addresses(out):
    out[0] = cuda.shared.array(3, types.uint16).ctypes.data
    out[1] = cuda.shared.array(3, types.uint16, alignment=16).ctypes.data
    out[2] = cuda.shared.array((5, 7), types.float32, alignment=1024).ctypes.data
    out[3] = cuda.shared.array(0, types.uint32, alignment=128).ctypes.data
    out[4] = cuda.shared.array(0, types.uint16, alignment=128).ctypes.data


def test_shared_arrays_have_the_alignment_asked_for_and_no_more():
    out = np.zeros(5, np.float64).view(np.int64)
    simulate(addresses, (types.CPointer(types.int64),), (out,), threads=1, shared_bytes=64)
    alignments = np.array([2, 16, 1024, 128, 128])
    np.testing.assert_array_equal(out % (2 * alignments), alignments)
    assert out[3] == out[4]


def dynamic_alignments(out):
    cuda.shared.array(0, types.uint32, alignment=16)
    cuda.shared.array(0, types.uint32, alignment=128)


def test_dynamic_shared_arrays_need_one_alignment():
    with pytest.raises(RuntimeError, match="give all the same alignment"):
        simulate(dynamic_alignments, (f32p,), (np.zeros(1, np.float32),), shared_bytes=64)


def use_before_the_wait(source, out):
    tile = cuda.shared.array(8, types.uint16, alignment=16)
    memory.copy_async16(tile, 0, source, 0)
    memory.copy_async_commit()
    out[0] = tile[0]
    memory.copy_async_wait_all()
    out[1] = tile[0]
    tile[0] = np.uint16(9)
    memory.copy_async_wait_all()
    out[2] = tile[0]


def test_an_asynchronous_copy_arrives_at_the_wait_and_once():
    source, out = np.arange(7, 15, dtype=np.uint16), np.zeros(3, np.uint16)
    simulate(use_before_the_wait, (u16p, u16p), (aligned(source), out), threads=1)
    np.testing.assert_array_equal(out, [0xFFFF, 7, 9])


def aligned(array, offset=0):
    """The array's copy at `offset` bytes after an address that is a multiple of 256."""
    raw = np.zeros(array.nbytes + 512, np.uint8)
    start = -raw.ctypes.data % 256 + offset
    raw[start : start + array.nbytes] = array.view(np.uint8)
    return raw[start : start + array.nbytes].view(array.dtype)


def loads(pointer, index, out):
    out[0] = memory.load32(pointer, index)


def loads16(pointer, index, out):
    out[0] = memory.load128(pointer, index)[0]


def stores16(pointer, index, out):
    word = out[0]
    memory.store128_stream(pointer, index, word, word, word, word)


def copies16(pointer, index, out):
    memory.copy_async16(cuda.shared.array(8, types.uint16, alignment=16), 0, pointer, index)


def copies16_to_any_address(pointer, index, out):
    memory.copy_async16(cuda.shared.array(8, types.uint16), 0, pointer, 0)


def matrices(pointer, index, out):
    out[0] = tensor_core.ldmatrix(cuda.shared.array(16, types.uint16, alignment=16), index)[0]


@pytest.mark.parametrize(
    ("kernel", "index", "offset", "fault"),
    [
        (loads, 1, 0, "not aligned to 4 bytes"),
        (loads, 0, 2, "not aligned to 4 bytes"),
        (loads, 62, 0, None),
        (loads, 64, 0, r"elements 64\.\.66 of an array of 64"),
        (loads, -2, 0, r"elements -2\.\.0 of"),
        (loads16, 4, 0, "not aligned to 16 bytes"),
        (loads16, 0, 8, "not aligned to 16 bytes"),
        (loads16, 4, 8, None),
        (loads16, 56, 0, None),
        (loads16, 60, 8, r"elements 60\.\.68 of an array of 64"),
        (stores16, 2, 0, "not aligned to 16 bytes"),
        (stores16, 64, 0, "of an array of 64"),
        (stores16, 56, 0, None),
        (copies16, 1, 0, "not aligned to 16 bytes"),
        (copies16, 64, 0, "of an array of 64"),
        (copies16, 8, 0, None),
        (copies16_to_any_address, 0, 0, "not aligned to 16 bytes"),
        (matrices, 4, 0, "not aligned to 16 bytes"),
        (matrices, 16, 0, "of an array of 16"),
        (matrices, 8, 0, None),
    ],
)
def test_misaligned_and_out_of_range_accesses_are_refused(kernel, index, offset, fault):
    pointer, out = aligned(np.arange(64, dtype=np.uint16), offset), np.zeros(1, np.uint32)
    if fault is None:
        simulate(kernel, (u16p, i64, u32p), (pointer, index, out))
    else:
        with pytest.raises(IndexError, match=fault):
            simulate(kernel, (u16p, i64, u32p), (pointer, index, out))


def wrap_around(out):
    out[warp.thread_index()] = np.uint32(0xFFFFFFFF) * np.uint32(3) + np.uint32(1 << 31)
    bits.f32_to_bf16(np.float32(3e38) * np.float32(3e38))


def test_arithmetic_wraps_and_overflows_silently():
    out = np.zeros(32, np.uint32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        simulate(wrap_around, (u32p,), (out,))
    assert (out == 0xFFFFFFFF * 3 + (1 << 31) & 0xFFFFFFFF).all()


def unordered(out, order):
    position = order[0]
    order[0] = position + np.float32(1)
    out[np.int64(position)] = np.float32(warp.block_x() * 64 + np.int64(warp.thread_index()))


def test_threads_run_in_the_same_order_every_time_every_other_block_backwards():
    for _ in range(2):
        out = np.zeros(128, np.float32)
        simulate(unordered, (f32p, f32p), (out, np.zeros(1, np.float32)), grid=(2, 1, 1), threads=64)
        np.testing.assert_array_equal(out, np.append(np.arange(64), np.arange(64, 128)[::-1]))


def neighbours_without_a_barrier(out, step):
    staged = cuda.shared.array(96, types.float32)
    thread = np.int64(warp.thread_index())
    staged[thread + 32] = np.float32(1)
    out[warp.block_x() * 32 + thread] = staged[thread + 32 + step]


@pytest.mark.parametrize("step", [-1, 1])
def test_a_missing_barrier_shows(step):
    out = np.zeros(64, np.float32)
    simulate(neighbours_without_a_barrier, (f32p, i64), (out, step), grid=(2, 1, 1))
    assert np.isnan(out).sum() == 32 + 1


def fails_in_one_thread(out):
    warp.block_barrier()
    if warp.thread_index() == 5:
        out[99] = np.float32(1)
    warp.block_barrier()


def test_a_failed_launch_leaves_nothing_behind():
    out = np.zeros(32, np.float32)
    with pytest.raises(IndexError):
        simulate(fails_in_one_thread, (f32p,), (out,))
    gc.collect()
    simulate(any_warp_operation, (f32p,), (out,))
    assert (out == 4).all()


@pytest.mark.parametrize(
    ("grid", "threads"), [((0, 1, 1), 32), ((1, 65536, 1), 32), ((1, 1, 65536), 32), ((1, 1, 1), 0), ((1, 1, 1), 1025)]
)
def test_a_launch_that_no_gpu_takes_is_refused(grid, threads):
    with pytest.raises(ValueError, match="any_warp_operation: grid"):
        simulate(any_warp_operation, (f32p,), (np.zeros(1, np.float32),), grid, threads)


def nested(out, scale, pair):
    pointer, (count, factor) = pair
    for i in range(count):
        out[i] = pointer[i] * factor * scale


def test_nested_parameters_take_flat_arguments():
    signature = (f32p, f32, types.Tuple((f32p, types.Tuple((i64, f32)))))
    assert sum(map(parameters.flat_length, signature)) == 5
    out = np.zeros(4, np.float32)
    arguments = (out, np.float32(2), np.arange(4, dtype=np.float32), 3, np.float32(10))
    simulate(nested, signature, arguments, threads=1)
    np.testing.assert_array_equal(out, [0, 20, 40, 0])


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        ((np.zeros(1, np.float32), 1, 2.0), "float32 got float, wanted np.float32"),
        ((np.zeros(1, np.float32), 1, 2), "float32 got int, wanted np.float32"),
        ((np.zeros(1, np.float32), np.int32(1), np.float32(2)), "int64 got int32, wanted np.int64"),
        ((np.zeros(1, np.float32), True, np.float32(2)), "int64 got bool, wanted np.int64"),
        ((np.zeros(1, np.float64), 1, np.float32(2)), r"float32\* got float64, wanted a flat array of float32"),
        ((np.zeros((1, 1), np.float32), 1, np.float32(2)), "wanted a flat array"),
        ((4096, 1, np.float32(2)), r"float32\* got int, wanted a flat array of float32"),
        ((np.zeros(1, np.float32), 1), "float32 got NoneType"),
        ((np.zeros(1, np.float32), 1, np.float32(2), 3), "1 of 4 arguments too many"),
    ],
)
def test_arguments_that_a_gpu_would_misread_are_refused(arguments, fault):
    with pytest.raises(TypeError, match=fault):
        simulate(nested, (f32p, i64, f32), arguments)


def test_a_factory_gives_one_kernel_for_one_choice_and_refuses_choices_without_a_name(monkeypatch):
    monkeypatch.setattr(target, "FACTORIES", [])

    @kernel_factory()
    def make(choice):
        return unordered, (f32p, f32p), {"threads": 32}

    assert make in target.FACTORIES
    assert make(1) is make(1)
    assert make(1).key != make(2).key
    with pytest.raises(AssertionError, match="plain data"):
        make(unordered)
