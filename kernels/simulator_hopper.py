"""Twins of Hopper's asynchronous operations: mbarriers, clusters, TMA and wgmma as NumPy on the simulator's blocks.

Loads happen when they are asked for, products and stores when they are waited for: the orders in which a stage
that is given back too soon, or a buffer written too soon, shows in the result.

A shared address is the offset in the block's dynamic shared memory plus 1024, and above it the block's rank in its
cluster, as on a GPU. A simulated tensor map in memory is a number of :data:`MAPS`.
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass, field

import numpy as np

from kernels.simulator import cluster_collective, collective, current_thread, warpgroup_collective

_BASE = 1024
_RANK_SHIFT = 24
_OFFSET = (1 << _RANK_SHIFT) - 1
MAP_WORDS = 16
"""64-bit words of a tensor map."""


@dataclass
class _Barrier:
    count: int
    pending: int
    phase: int = 0
    transactions: int = 0

    def settle(self) -> None:
        """Begin the next phase if nothing is missing from this one."""
        if self.pending < 0:
            raise RuntimeError(f"more than {self.count} arrivals at an mbarrier in one phase")
        if self.pending == 0 and self.transactions == 0:
            self.pending, self.phase = self.count, self.phase + 1

    def arrived(self, nbytes: int) -> None:
        self.transactions -= nbytes
        self.settle()


def nothing(*_operands) -> None:
    """A fence, a hint, or registers: the simulator has none of them."""


def shared_address(array, index):
    """The address of an element of the block's dynamic shared memory."""
    dynamic = _dynamic(current_thread().block)
    offset = _BASE + array.ctypes.data + int(index) * array.itemsize - dynamic.ctypes.data
    return np.uint32(offset | int(cluster_rank()) << _RANK_SHIFT)


def _dynamic(block) -> np.ndarray:
    for key, array in block.shared.items():
        if key[0] == "dynamic":
            assert key[1] % 1024 == 0, "kernels that use TMA align their dynamic shared memory to 1024 bytes"
            return array
    raise RuntimeError(f"{block}: no dynamic shared memory")


def _bytes_at(block, addresses: np.ndarray, width: int) -> np.ndarray:
    """Indices into the block's shared memory of ``width`` bytes at each address."""
    start = (np.asarray(addresses, np.int64) & _OFFSET) - _BASE
    size = len(_dynamic(block))
    if start.size and (start.min() < 0 or start.max() + width > size):
        raise IndexError(f"{block}: shared addresses {start.min()}..{start.max() + width} of {size} bytes")
    return start[..., None] + np.arange(width)


def _barrier(block, address) -> _Barrier:
    found = block.barriers.get(int(address) & _OFFSET)
    if found is None:
        raise RuntimeError(f"{block}: no mbarrier was initialised at shared address {int(address)}")
    return found


def barrier_init(address, count) -> None:
    """Make a barrier."""
    assert int(address) % 8 == 0, address
    current_thread().block.barriers[int(address) & _OFFSET] = _Barrier(int(count), int(count))


def barrier_expect_bytes(address, nbytes) -> None:
    """Arrive, and expect bytes."""
    found = _barrier(current_thread().block, address)
    found.pending -= 1
    found.arrived(-int(nbytes))


def barrier_arrive(address) -> None:
    """Arrive."""
    barrier_arrive_remote(address, cluster_rank())


def barrier_arrive_remote(address, rank) -> None:
    """Arrive in another block."""
    found = _barrier(current_thread().block.cluster[int(rank)], address)
    found.pending -= 1
    found.settle()


def barrier_wait(address, parity) -> None:
    """Wait for the phase of a parity."""
    found = _barrier(current_thread().block, address)
    current_thread().wait_for(lambda: found.phase % 2 != int(parity))


def grid_blocks():
    """How many blocks the grid has."""
    return np.uint32(math.prod(current_thread().block.launch.grid))


def cluster_rank():
    """The block's number in its cluster."""
    block = current_thread().block
    return np.uint32(block.cluster.index(block))


def cluster_barrier() -> None:
    """A barrier of the cluster."""
    cluster_collective()


def shared_load_remote(address, rank):
    """A word at the same shared address in another block of the cluster."""
    block = current_thread().block.cluster[int(rank)]
    return _dynamic(block)[_bytes_at(block, address, 4)].view(np.uint32)[0]


def _swizzled(addresses: np.ndarray, span: int) -> np.ndarray:
    """Addresses with the 16-byte unit exchanged within ``span`` bytes, as TMA and wgmma do; 0 for not at all."""
    if span == 0:
        return addresses
    return addresses ^ ((addresses >> 7 & span // 16 - 1) << 4)


@dataclass(frozen=True)
class TensorMap:
    """A tensor in memory and the box of it that an operation moves, all axes from the contiguous one on.

    ``strides`` are bytes, of all axes but the first; of an axis with a step, every step-th element of the box is moved.
    """

    address: int
    itemsize: int
    extents: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    steps: tuple[int, ...]
    swizzle: int

    @property
    def moved(self) -> tuple[int, ...]:
        """Elements of each axis that a box brings."""
        return tuple(-(-extent // step) for extent, step in zip(self.box, self.steps, strict=True))

    @property
    def box_bytes(self) -> int:
        """Bytes that a box brings to shared memory."""
        return math.prod(self.moved) * self.itemsize

    def places(self, address) -> np.ndarray:
        """Shared addresses of the box's 16-byte units, a line of the box a row."""
        across = self.moved[0] * self.itemsize
        assert int(address) % 128 == 0, f"TMA wants shared addresses that are multiples of 128, found {int(address)}"
        units = np.arange(0, self.box_bytes, 16).reshape(-1, across // 16)
        return _swizzled(int(address) + units, self.swizzle)

    def lines(self, coordinates):
        """Of every line of the box that meets the tensor: its number, where that part begins, and its memory."""
        first = coordinates[0]
        assert self.steps[0] == 1, self
        if first * self.itemsize % 16:
            raise RuntimeError(
                f"TMA wants coordinates of the contiguous axis in multiples of 16 bytes, found {first} of {self}: "
                "an illegal instruction on a GPU"
            )
        skipped = max(0, -first)
        count = min(self.extents[0] - max(0, first), self.moved[0] - skipped)
        for number, index in enumerate(np.ndindex(*reversed(self.moved[1:]))):
            places = [c + i * s for c, i, s in zip(coordinates[1:], reversed(index), self.steps[1:], strict=True)]
            inside = all(0 <= place < extent for place, extent in zip(places, self.extents[1:], strict=True))
            if inside and count > 0:
                offset = sum(p * stride for p, stride in zip(places, self.strides, strict=True))
                start = self.address + offset + max(0, first) * self.itemsize
                yield number, skipped * self.itemsize, _memory(start, count * self.itemsize)


MAPS: dict[int, TensorMap] = {}
"""Simulated tensor maps by their number, which is all that their words in memory hold."""


def _memory(address: int, nbytes: int) -> np.ndarray:
    return np.frombuffer((ctypes.c_uint8 * nbytes).from_address(address), np.uint8)


def _map_at(address) -> TensorMap:
    return MAPS[ctypes.c_int64.from_address(int(address)).value]


def _signed(coordinates) -> list[int]:
    return [int(np.uint32(coordinate).view(np.int32)) for coordinate in coordinates]


def _load(blocks, address, tensor_map, barrier, coordinates) -> None:
    found = _map_at(tensor_map)
    places = found.places(address)
    box = np.zeros((len(places), found.moved[0] * found.itemsize), np.uint8)
    for number, start, memory in found.lines(_signed(coordinates)):
        box[number, start : start + len(memory)] = memory
    for block in blocks:
        _dynamic(block)[_bytes_at(block, places, 16)] = box.reshape(*places.shape, 16)
        _barrier(block, barrier).arrived(found.box_bytes)


def tma_load(address, tensor_map, barrier, coordinates) -> None:
    """A box to the block's shared memory."""
    _load([current_thread().block], address, tensor_map, barrier, coordinates)


def bulk_load(address, pointer, index, nbytes, barrier) -> None:
    """Bytes to the block's shared memory."""
    block, size = current_thread().block, int(nbytes)
    source = pointer[int(index) : int(index) + size // pointer.itemsize].view(np.uint8)
    assert not (int(address) | source.ctypes.data | size) % 16, (address, index, nbytes)
    _dynamic(block)[_bytes_at(block, np.array([int(address)]), size)[0]] = source
    _barrier(block, barrier).arrived(size)


def tma_load_multicast(address, tensor_map, barrier, coordinates, mask) -> None:
    """A box to several blocks of the cluster."""
    cluster = current_thread().block.cluster
    blocks = [block for rank, block in enumerate(cluster) if int(mask) >> rank & 1]
    _load(blocks, address, tensor_map, barrier, coordinates)


def tma_store(tensor_map, address, coordinates) -> None:
    """A box from the block's shared memory, read when the store is waited for."""
    thread, found, coordinates = current_thread(), _map_at(tensor_map), _signed(coordinates)

    def write() -> None:
        places = found.places(address)
        box = _dynamic(thread.block)[_bytes_at(thread.block, places, 16)].reshape(len(places), -1)
        for number, start, memory in found.lines(coordinates):
            memory[:] = box[number, start : start + len(memory)]

    thread.stores.append(write)


def tma_store_commit() -> None:
    """Make a group of the stores since the last."""
    thread = current_thread()
    thread.store_groups.append(thread.stores)
    thread.stores = []


def tma_store_wait_read(pending: int) -> None:
    """Do all but the last groups of stores."""
    thread = current_thread()
    done = max(0, len(thread.store_groups) - pending)
    for group in thread.store_groups[:done]:
        for write in group:
            write()
    del thread.store_groups[:done]


def _store_matrices(lanes) -> list[None]:
    block = lanes[0][0]
    for matrix in range(4):
        rows = np.array([int(lane[1]) for lane in lanes[8 * matrix : 8 * matrix + 8]])
        assert not (rows % 16).any(), rows
        words = np.array([lane[2][matrix] for lane in lanes], np.uint32).reshape(8, 4)
        _dynamic(block)[_bytes_at(block, rows, 16)] = words.view(np.uint8).reshape(8, 16)
    return [None] * len(lanes)


def store_matrix(address, *words) -> None:
    """Four 8x8 matrices to shared memory."""
    collective(_store_matrices, (current_thread().block, address, words))


def shared_store64(address, low, high) -> None:
    """Two words to shared memory."""
    assert int(address) % 8 == 0, address
    block = current_thread().block
    _dynamic(block)[_bytes_at(block, np.array([int(address)]), 8)[0]] = np.array([low, high], np.uint32).view(np.uint8)


@dataclass(frozen=True)
class Products:
    """A committed group of wgmma: descriptors, and the element type's conversion to fp32."""

    a: int
    b: int
    steps: int
    step_a: int
    step_b: int
    a_k_major: bool
    b_k_major: bool
    to_f32: object


@dataclass(frozen=True)
class Sums:
    """What a warpgroup's accumulators stand for: a 64 x N matrix and products not yet waited for."""

    matrix: np.ndarray
    pending: tuple[Products, ...] = field(default=())


def _operand(block, descriptor: int, k_major: bool, extent: int, to_f32) -> np.ndarray:
    """The extent x 16 values that a descriptor names, in fp32; the address arithmetic is the PTX ISA's."""
    start, leading, stride = ((descriptor >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))
    span = {1: 128, 2: 64, 3: 32}[descriptor >> 62]
    assert span == 128 or not k_major, "twins know K-major operands of 128 bytes only"
    along, k = np.arange(extent)[:, None], np.arange(16)[None, :]
    if k_major:
        addresses = start + along // 8 * stride + along % 8 * 128 + 2 * k
    else:
        line = along % (span // 2) * 2
        addresses = start + along // (span // 2) * leading + k // 8 * stride + k % 8 * span + line
    raw = _dynamic(block)[_bytes_at(block, _swizzled(addresses, span), 2)]
    return to_f32(np.ascontiguousarray(raw).view(np.uint16)[..., 0])


def _multiply(block, matrix: np.ndarray, group: Products) -> np.ndarray:
    for step in range(group.steps):
        a = _operand(block, group.a + step * group.step_a, group.a_k_major, 64, group.to_f32)
        b = _operand(block, group.b + step * group.step_b, group.b_k_major, matrix.shape[1], group.to_f32)
        matrix = matrix + a @ b.T
    return matrix


def wait_products(sums: Sums, pending: int) -> Sums:
    """Do all but the last groups of products, for the whole warpgroup."""

    def combine(lanes):
        block, first, _ = lanes[0]
        if any(lane[1].pending != first.pending for lane in lanes):
            raise RuntimeError(f"{block}: threads of a warpgroup wait for different products")
        done = max(0, len(first.pending) - pending)
        matrix = first.matrix
        for group in first.pending[:done]:
            matrix = _multiply(block, matrix, group)
        return [Sums(matrix, first.pending[done:])] * len(lanes)

    return warpgroup_collective(combine, (current_thread().block, sums, pending))


def part_of_sums(sums: Sums, first: int, count: int) -> tuple:
    """The thread's values ``first`` to ``first + count`` of a settled matrix."""
    assert not sums.pending, "sums are read while products are under way"
    thread = current_thread().thread_id % 128
    warp, g, t = thread // 32, thread % 32 // 4, thread % 4
    index = np.arange(first, first + count)
    rows, columns = 16 * warp + g + 8 * (index >> 1 & 1), 8 * (index // 4) + 2 * t + (index & 1)
    return tuple(sums.matrix[rows, columns])


def scaled_sums(sums: Sums, factor) -> Sums:
    """A settled matrix times a factor."""
    assert not sums.pending, "sums are scaled while products are under way"
    return Sums(sums.matrix * np.float32(factor))


def added_sums(sums: Sums, others: Sums, first: int) -> Sums:
    """A settled matrix with another added to its columns from ``first`` on."""
    assert not sums.pending and not others.pending, "sums are added while products are under way"
    matrix = sums.matrix.copy()
    matrix[:, first : first + others.matrix.shape[1]] += others.matrix
    return Sums(matrix)


def multiply_held(held, results, descriptors, columns, products, to_f32) -> None:
    """Products of fragments in registers with shared memory, for the whole warpgroup."""
    thread = np.arange(128)
    row, column = 16 * (thread // 32) + thread % 32 // 4, 2 * (thread % 4) + [[0], [1]]

    def combine(lanes):
        block, _, pairs, first, values = lanes[0]
        sums = np.zeros((64, columns), np.float32)
        for number, (_, offset) in enumerate(pairs):
            words = np.array([lane[1][number] for lane in lanes], np.uint32)
            halves = values(np.stack([words & 0xFFFF, words >> 16], -1))
            a = np.zeros((64, 16), np.float32)
            for r in range(4):
                a[row + 8 * (r & 1), column + 8 * (r >> 1)] = halves[:, r].T
            sums = sums + a @ _operand(block, first + offset, False, columns, values).T
        return [sums] * len(lanes)

    for result, b, pairs, values in zip(results, descriptors, products, to_f32, strict=True):
        own = [[held[a + i] for i in range(4)] for a, _ in pairs]
        found = warpgroup_collective(combine, (current_thread().block, own, pairs, int(b), values))
        for i, value in enumerate(part_of_sums(Sums(found), 0, columns // 2)):
            result[2 * (i // 4) + (i & 1) + columns // 4 * (i >> 1 & 1)] = value
