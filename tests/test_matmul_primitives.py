"""What the matmul kernels are made of: copies with zero fill, the order of tiles, places of units in shared memory."""

from __future__ import annotations

import numpy as np
import pytest

from kernels import memory, warp
from kernels.matmul.mma_tile import Operand, place_of
from kernels.matmul.problem import tile_of_block
from kernels.simulator_hopper import TensorMap
from kernels.target import cuda


@pytest.mark.parametrize("size", [4, 8, 16])
def test_copies_fill_what_they_do_not_read_with_zeros(run_kernel, rng, size):
    elements, copy = size // 2, memory.copy_async_fill(size)

    def kernel(source, out):
        shared = cuda.shared.array(512, np.uint16, alignment=16)
        lane = warp.thread_index()
        at = np.int64(lane) * np.int64(elements)
        copy(shared, at, source, at, np.uint32(np.uint32(lane % np.uint32(elements + 1)) * np.uint32(2)))
        memory.copy_async_wait_all()
        for i in range(elements):
            out[at + np.int64(i)] = shared[at + np.int64(i)]

    source = rng.integers(1, 1 << 16, 32 * elements).astype(np.uint16)
    (found,) = run_kernel(kernel, [source], [(np.uint16, (32 * elements,))])
    wanted = source.reshape(32, elements).copy()
    for lane in range(32):
        wanted[lane, lane % (elements + 1) :] = 0
    np.testing.assert_array_equal(found.reshape(32, elements), wanted)


def test_two_words_are_stored_to_shared_memory(run_kernel):
    def kernel(out):
        shared = cuda.shared.array(128, np.uint16, alignment=16)
        lane = warp.thread_index()
        at = np.int64(lane) * np.int64(4)
        memory.shared_store64(shared, at, np.uint32(np.uint32(lane) + np.uint32(1 << 16)), np.uint32(lane))
        for i in range(4):
            out[at + np.int64(i)] = shared[at + np.int64(i)]

    (found,) = run_kernel(kernel, [], [(np.uint16, (128,))])
    lanes = np.arange(32)
    np.testing.assert_array_equal(found.reshape(32, 4), np.stack([lanes, 0 * lanes + 1, lanes, 0 * lanes], 1))


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (64, 32), (65, 33), (640, 31), (1000, 100)])
def test_blocks_share_out_all_tiles_of_all_results(run_kernel, rows, columns):
    locate = tile_of_block(64, 32, 8)
    tall, wide, results = -(-rows // 64), -(-columns // 32), 2
    count = tall * wide * results

    def kernel(rows, columns, out):
        row, column, rest = locate(warp.block_x(), rows, columns)
        if warp.thread_index() == np.uint32(0):
            at = np.int64(3) * warp.block_x()
            out[at] = np.int32(row)
            out[at + np.int64(1)] = np.int32(column)
            out[at + np.int64(2)] = np.int32(rest)

    (found,) = run_kernel(kernel, [rows, columns], [(np.int32, (count, 3))], grid=(count, 1, 1))
    assert sorted(tuple(map(int, tile)) for tile in found) == sorted(np.ndindex(tall, wide, results))


@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize(("rows", "depth"), [(128, 32), (128, 64), (64, 32), (32, 16), (48, 80), (64, 96)])
def test_units_keep_apart_and_meet_all_banks(run_kernel, rows, depth, contiguous):
    """Every unit has a place of its own, and eight lines' units of the same number lie in different 16-byte columns."""
    operand = Operand(rows, depth, contiguous, 8, False, False)
    place, units_of_line, units = place_of(operand), operand.units_of_line, operand.units

    def kernel(out):
        for index in range(warp.thread_index(), np.uint32(units), np.uint32(32)):
            line, unit = np.uint32(index // np.uint32(units_of_line)), np.uint32(index % np.uint32(units_of_line))
            out[index] = np.int32(place(line, unit))

    (found,) = run_kernel(kernel, [], [(np.int32, (units,))])
    assert sorted(found) == list(range(0, 8 * units, 8))
    by_line = found.reshape(-1, 8, units_of_line)
    banks = np.sort(by_line // 8 % 8, axis=1)
    np.testing.assert_array_equal(banks, np.broadcast_to(np.arange(8)[None, :, None], banks.shape))


def test_the_simulator_refuses_coordinates_that_tma_takes_for_an_illegal_instruction():
    memory_of_it = np.arange(8 * 64, dtype=np.uint16)
    tensor_map = TensorMap(memory_of_it.ctypes.data, 2, (64, 8), (128,), (16, 2), (1, 1), 128)
    found = [bytes(line) for _, _, line in tensor_map.lines([56, -1])]
    assert found == [memory_of_it[56:64].tobytes()]
    with pytest.raises(RuntimeError, match="multiples of 16 bytes, found 12"):
        next(tensor_map.lines([12, 0]))
