"""Gradients of LoHa's factors from the gradient of the weight, D, where another kernel has made it.

On tensor cores, or an element a thread for any kinds and extents. On tensor cores a warp takes 32 columns of D and
goes down the rows, 16 at a time: it makes the other product anew in fragments that lie as D's do, and contracts what
their product gives with both factors from registers, as two bf16 parts, what it rounds to and what rounding left; for
an a as it lies, for a b turned by ``movmatrix``. Which columns a fragment's are is chosen so that a lane loads four
neighbours of D. Sums for b stay in registers; those for a are added up over a block's warps.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from kernels import bits, memory, tensor_core, warp
from kernels.adapter_gradient.hadamard import A_PARTS, B_PARTS, PRODUCTS, A, B
from kernels.barrier import early_options, entrance
from kernels.elements import ELEMENTS
from kernels.target import SIMULATOR, cuda, device, f32, f32p, i64, kernel_factory, types

WARPS = 2 if SIMULATOR else 8
THREADS = 32 * WARPS
CELL = 32
"""Columns that a warp takes."""

SPAN = CELL * WARPS
STEP = 16
"""Rows that a block takes at once, and ranks of its results."""

OTHER_A, OTHER_B = 2, 3
"""Positions of the portable kernel's factors of the other product."""
_PITCH = SPAN + 8
"""Elements from a line of b in shared memory to the next, which then begins at other banks."""

_PARKED_PITCH = STEP + 8
_PARKED = 2 * STEP * _PARKED_PITCH
"""Words of a warp's sums for both a in shared memory."""

_u32 = np.uint32


def _factor_stager(steps: int) -> Callable:
    """``stage(shared, products, columns, rank, column0, thread)``: both b's tiles, zero beyond rank and columns.

    Of 16 columns, 4 t and 4 t + 1 become columns 2 t and 2 t + 1 of eight, the two after them those of the next eight.
    """
    lines, quads = STEP * steps, SPAN // 4

    @device
    def stage(shared, products, columns, rank, column0, thread):
        for i in range(2):
            for turn in range(lines * quads // THREADS):
                place = _u32(thread + _u32(turn * THREADS))
                line, quad = _u32(place // _u32(quads)), _u32(place % _u32(quads))
                column = column0 + np.int64(_u32(quad << _u32(2)))
                low, high = _u32(0), _u32(0)
                if np.int64(line) < rank and column < columns:
                    low, high = memory.load64(products[i][B], np.int64(line) * columns + column)
                at = _u32(_u32(_u32(quad >> _u32(2)) << _u32(4)) + _u32(_u32(quad & _u32(3)) << _u32(1)))
                at = np.int64(_u32(at + _u32(_u32(line + _u32(i * lines)) * _u32(_PITCH))))
                memory.shared_store32(shared, at, low)
                memory.shared_store32(shared, at + np.int64(8), high)

    return stage


def _fetchers(pairs: bool) -> tuple[Callable, Callable]:
    """Device functions that load a lane's part of 16 rows: of D's 16 columns, and of 16 ranks of an a.

    ``place`` is the first element, ``left`` are rows from its on, ``ahead`` elements from a row to the eighth after it.
    """

    @device
    def fetch_d(values, at, d, place, left, ahead):
        for half in range(2):
            words = (_u32(0), _u32(0), _u32(0), _u32(0))
            if left > np.int32(8 * half):
                words = memory.load128(d, place + ahead if half else place)
            for i in range(4):
                values[at + 4 * half + i] = bits.bits_f32(words[i])

    @device
    def fetch_a(words, at, a, place, left, ahead, ranks):
        for i in range(4):
            first, inside = place + ahead if i & 1 else place, left > np.int32(8 * (i & 1))
            word = _u32(0)
            if inside and ranks > np.int32(8 * (i >> 1)):
                if pairs:
                    word = memory.load32(a, first + np.int64(8 * (i >> 1)))
                else:
                    word = _u32(a[first + np.int64(8 * (i >> 1))])
            if not pairs and inside and ranks > np.int32(8 * (i >> 1) + 1):
                word |= _u32(_u32(a[first + np.int64(8 * (i >> 1) + 1)]) << _u32(16))
            words[at + i] = word

    return fetch_d, fetch_a


def _contractor(steps: int) -> Callable:
    """``contract(sums_a, sums_b, values, at, a, turned, shared, column, own, lane)``: 16 rows and columns of D.

    For both products. ``column`` is where they lie in b's lines in shared memory, ``own`` that of the first line of
    those ranks that results have.
    """
    lines, b_words, mma = STEP * steps, 4 * steps, tensor_core.mma_bf16

    @device
    def other_product(sums, a, first, b, half):
        for i in range(4):
            sums[i] = np.float32(0)
        for step in range(steps):
            at = first + 4 * step
            sums[0], sums[1], sums[2], sums[3] = mma(
                a[at], a[at + 1], a[at + 2], a[at + 3], b[4 * step + 2 * half], b[4 * step + 2 * half + 1],
                sums[0], sums[1], sums[2], sums[3],
            )  # fmt: skip

    @device
    def split(words, values, at, other, half):
        """D times the other product in two parts, as a fragment of 16 rows and of eight of 16 columns."""
        for i in range(2):
            low, high = values[at + 4 * i] * other[2 * i], values[at + 4 * i + 1] * other[2 * i + 1]
            rounded = bits.pack_bf16(low, high)
            words[2 * half + i] = rounded
            words[4 + 2 * half + i] = bits.pack_bf16(low - bits.low_bf16(rounded), high - bits.high_bf16(rounded))

    @device
    def add(sums, s, a, at, b0, b1):
        sums[s], sums[s + 1], sums[s + 2], sums[s + 3] = mma(
            a[at], a[at + 1], a[at + 2], a[at + 3], b0, b1, sums[s], sums[s + 1], sums[s + 2], sums[s + 3]
        )

    @device
    def contract(sums_a, sums_b, values, at, a, turned, shared, column, own, lane):
        b, other = cuda.local.array(b_words, np.uint32), cuda.local.array(4, np.float32)
        words = cuda.local.array(8, np.uint32)
        low, odd, high = _u32(lane & _u32(7)), _u32((lane >> _u32(3)) & _u32(1)), _u32(lane >> _u32(4))
        tall = _u32(column + _u32(_u32(_u32(low + _u32(odd << _u32(3))) * _u32(_PITCH)) + _u32(high << _u32(3))))
        flat = _u32(column + _u32(_u32(_u32(low + _u32(high << _u32(3))) * _u32(_PITCH)) + _u32(odd << _u32(3))))
        for i in range(2):
            for step in range(steps):
                line = (1 - i) * lines + STEP * step
                found = tensor_core.ldmatrix_transposed(shared, np.int64(_u32(tall + _u32(line * _PITCH))))
                for k in range(4):
                    b[4 * step + k] = found[k]
            for half in range(2):
                other_product(other, a, 4 * (1 - i) * steps, b, half)
                split(words, values, at + 2 * half, other, half)
                for part in range(2):
                    w = 4 * part + 2 * half
                    b0, b1 = tensor_core.transposed_matrix(words[w]), tensor_core.transposed_matrix(words[w + 1])
                    add(sums_b, 16 * i + at + 4 * half, turned, 4 * i, b0, b1)
            found = tensor_core.ldmatrix(shared, np.int64(_u32(flat + _u32(own + _u32(i * lines * _PITCH)))))
            for part in range(2):
                for half in range(2):
                    add(sums_a, 8 * i + 4 * half, words, 4 * part, found[2 * half], found[2 * half + 1])

    return contract


@device
def _turn(turned, own):
    """Fragments of both a, of 16 rows and ranks, turned: ranks by rows."""
    for i in range(2):
        for k in range(4):
            turned[4 * i + k] = tensor_core.transposed_matrix(own[4 * i + 2 * (k & 1) + (k >> 1)])


@device
def _park(shared, at, sums, lane):
    """A warp's sums for both a, as [product, row, rank], to its place in shared memory."""
    g, t = _u32(lane >> _u32(2)), _u32(lane & _u32(3))
    for i in range(2):
        for half in range(2):
            for k in range(2):
                line = _u32(_u32(g + _u32(8 * k)) + _u32(STEP * i))
                place = _u32(_u32(line * _u32(_PARKED_PITCH)) + _u32(_u32(t << _u32(1)) + _u32(8 * half)))
                s = 8 * i + 4 * half + 2 * k
                to = np.int64(_u32(_u32(at + place) << _u32(1)))
                memory.shared_store64(shared, to, bits.f32_bits(sums[s]), bits.f32_bits(sums[s + 1]))


@device
def _add_up(shared, first, products, start, row, rank0, end, rank, thread):
    """All warps' sums for both a, in order, to the block's parts."""
    for turn in range(STEP * STEP // THREADS):
        place = _u32(thread + _u32(turn * THREADS))
        line, pair = _u32(place >> _u32(3)), _u32(_u32(place & _u32(7)) << _u32(1))
        at = _u32(first + _u32(_u32(line * _u32(_PARKED_PITCH)) + pair))
        low, high = np.float32(0), np.float32(0)
        for other in range(WARPS):
            words = memory.shared_load64(shared, np.int64(_u32(_u32(at + _u32(other * _PARKED)) << _u32(1))))
            low += bits.bits_f32(words[0])
            high += bits.bits_f32(words[1])
        to, k = row + np.int64(_u32(line & _u32(STEP - 1))), rank0 + np.int64(pair)
        parts = products[0][A_PARTS] if line < _u32(STEP) else products[1][A_PARTS]
        if to < end and k < rank:
            parts[start + to * rank + k] = low
            if k + np.int64(1) < rank:
                parts[start + to * rank + k + np.int64(1)] = high


@device
def _store_sums(products, sums, start, rank0, rank, column, columns, lane):
    """A warp's sums for both b to the block's parts."""
    g, t = np.int64(lane >> _u32(2)), np.int64(lane & _u32(3))
    for i in range(2):
        for pair in range(2):
            across = column + np.int64(16 * pair) + np.int64(4) * t
            for half in range(2):
                k, s = rank0 + g + np.int64(8 * half), 16 * i + 8 * pair + 2 * half
                if k < rank and across < columns:
                    memory.store128_stream(
                        products[i][B_PARTS], (start + k) * columns + across,
                        bits.f32_bits(sums[s]), bits.f32_bits(sums[s + 1]),
                        bits.f32_bits(sums[s + 4]), bits.f32_bits(sums[s + 5]),
                    )  # fmt: skip


def _walker(steps: int, pairs: bool) -> Callable:
    """A device function: a warp's columns of the block's rows, 16 after 16."""
    (fetch_d, fetch_a), contract = _fetchers(pairs), _contractor(steps)
    parked, a_words = STEP * steps * _PITCH, 8 * steps  # words: behind the tiles of both b

    @device
    def fetch_factors(a, own, products, place, left, rank0, ranks, rank):
        ahead = np.int64(8) * rank
        for i in range(2):
            for step in range(steps):
                k, some = np.int64(STEP * step), np.int32(STEP * step)
                fetch_a(a, 4 * (i * steps + step), products[i][A], place + k, left, ahead, ranks - some)
            if steps > 1:
                fetch_a(own, 4 * i, products[i][A], place + rank0, left, ahead, ranks - np.int32(rank0))

    @device
    def walk(sums_b, shared, d, products, row0, end, column0, columns, rank0, rank, start, thread):
        values, sums_a = cuda.local.array(16, np.float32), cuda.local.array(16, np.float32)
        a, own = cuda.local.array(a_words, np.uint32), cuda.local.array(8, np.uint32)
        turned = cuda.local.array(8, np.uint32)
        lane, number = _u32(thread & _u32(31)), _u32(thread >> _u32(5))
        g, t = np.int64(lane >> _u32(2)), np.int64(lane & _u32(3))
        column, k = column0 + np.int64(_u32(number * _u32(CELL))) + np.int64(4) * t, np.int64(2) * t
        place, factor, ahead = (row0 + g) * columns + column, (row0 + g) * rank + k, np.int64(8) * columns
        left, ranks, none = np.int32(end - row0 - g), np.int32(rank - k), np.int32(0)
        here = column < columns, column + np.int64(16) < columns
        for i in range(32):
            sums_b[i] = np.float32(0)
        for pair in range(2):
            fetch_d(values, 8 * pair, d, place + np.int64(16 * pair), left if here[pair] else none, ahead)
        fetch_factors(a, own, products, factor, left, rank0, ranks, rank)
        row, side = row0, _u32(0)
        while row < end:
            _turn(turned, a if steps == 1 else own)
            for i in range(16):
                sums_a[i] = np.float32(0)
            place += ahead + ahead
            factor += np.int64(STEP) * rank
            left -= np.int32(STEP)
            for pair in range(2):
                tile = _u32(_u32(number * _u32(CELL)) + _u32(16 * pair))
                contract(
                    sums_a, sums_b, values, 8 * pair, a, turned, shared, tile, _u32(_u32(rank0) * _u32(_PITCH)), lane
                )
                fetch_d(values, 8 * pair, d, place + np.int64(16 * pair), left if here[pair] else none, ahead)
            fetch_factors(a, own, products, factor, left, rank0, ranks, rank)
            at = _u32(_u32(parked) + _u32(side * _u32(WARPS * _PARKED)))
            _park(shared, _u32(at + _u32(number * _u32(_PARKED))), sums_a, lane)
            warp.block_barrier()
            _add_up(shared, at, products, start, row, rank0, end, rank, thread)
            side, row = _u32(side ^ _u32(1)), row + np.int64(STEP)

    return walk


def _shared_bytes(steps: int) -> int:
    """Tiles of both b, and all warps' sums twice, so that they are added up while the next are made."""
    return 2 * 2 * STEP * steps * _PITCH + 4 * 2 * WARPS * _PARKED


@kernel_factory((1, True), (1, False), (4, True))
def contract_hadamard(steps: int, pairs: bool):
    """Parameters: D [out, in] in fp32, out, in, rows of a block, both products', rank.

    ``steps`` are groups of 16 ranks, ``pairs`` whether the rank is even; in is a multiple of four, a block's rows are
    one of 16. Blocks: ``SPAN`` columns along x, rows along y, 16 ranks of the results along z. Parts are [columns'
    block, out, rank] of an a's gradient, [rows' block, rank, in] of a b's, in fp32. The grid before makes D, none of
    the factors, and lets this one begin after its own wait.
    """
    stage, walk, enter = _factor_stager(steps), _walker(steps, pairs), entrance(early=True)

    def kernel(d, rows, columns, rows_of_block, products, rank):
        shared = cuda.shared.array(0, np.uint16, alignment=16)
        thread = warp.thread_index()
        row0, rank0 = warp.block_y() * rows_of_block, warp.block_z() * np.int64(STEP)
        end, column0 = min(row0 + rows_of_block, rows), warp.block_x() * np.int64(SPAN)
        stage(shared, products, columns, rank, column0, thread)
        enter()
        warp.block_barrier()
        start = warp.block_x() * rows * rank
        sums = cuda.local.array(32, np.float32)
        walk(sums, shared, d, products, row0, end, column0, columns, rank0, rank, start, thread)
        lane, first = _u32(thread & _u32(31)), column0 + np.int64(_u32(_u32(thread >> _u32(5)) * _u32(CELL)))
        _store_sums(products, sums, warp.block_y() * rank, rank0, rank, first, columns, lane)

    options = {"threads": THREADS, "shared_bytes": _shared_bytes(steps), "min_blocks": 2 if steps == 1 and pairs else 1}
    return kernel, (f32p, i64, i64, i64, PRODUCTS, i64), options | early_options(early=True)


@kernel_factory(("f32", "bf16", True), ("bf16", "f32", False))
def hadamard_portable(out: str, kind: str, of_rows: bool):
    """One gradient, an element a thread: of an a, [out, rank], where ``of_rows``, else of a b, [rank, in].

    Parameters: the result, D in fp32, a tuple of the factors, out, in, rank, scale.
    """
    store, load = ELEMENTS[out].store, ELEMENTS[kind].load

    @device
    def term(d, factors, row, column, k, columns, rank):
        """D times the other product at one element, times the factor that it is contracted with."""
        other = np.float32(0)
        for i in range(rank):
            at = np.int64(i)
            other += load(factors[OTHER_A], row * rank + at) * load(factors[OTHER_B], at * columns + column)
        own = load(factors[B], k * columns + column) if of_rows else load(factors[A], row * rank + k)
        return d[row * columns + column] * other * own

    def kernel(result, d, factors, rows, columns, rank, scale):
        index = _u32(_u32(_u32(warp.block_x()) * _u32(THREADS)) + warp.thread_index())
        width = rank if of_rows else columns
        line = np.int64(_u32(index // _u32(width)))
        place = np.int64(index) - line * width
        if line < (rows if of_rows else rank):
            value = np.float32(0)
            for i in range(columns if of_rows else rows):
                row, column = (line, np.int64(i)) if of_rows else (np.int64(i), place)
                value += term(d, factors, row, column, place if of_rows else line, columns, rank)
            store(result, np.int64(index), scale * value)

    pointer = ELEMENTS[kind].pointer
    parameters = (ELEMENTS[out].pointer, f32p, types.UniTuple(pointer, 4), i64, i64, i64, f32)
    return kernel, parameters, {"threads": THREADS}
