"""Where samples wait for ``spread_tile.py``, and the gradient of the projection's rows that is made of them there.

Beside a sample's streams there is its *record*: 1 / r, the pull, the lift of x and a place that is free, then its
mixing weights; and where H is dynamic its lifts, of every row of the projection, in three bf16 parts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np

from kernels import memory, tensor_core, warp
from kernels.barrier import cluster_rank, shared_address, shared_load_remote
from kernels.hardware import WARP
from kernels.ptx import instruction
from kernels.target import SIMULATOR, cuda, device

WARPS = 1 if SIMULATOR else 4
CHANNELS = 32
"""Channels of a warp."""
STEP = 16
"""Samples that a warp takes at once."""
MOST_STREAMS = 4
RUN = 8
STAGES = 2
PARTS = 3
"""bf16 parts of an fp32 number."""
OF_ROOT, OF_PULL, OF_X, OF_WEIGHTS = 0, 1, 2, 4
"""Where things are in a record: 1 / r, the pull, the lift of x, the weights."""


def _word(address, offset):
    return shared_load_remote(np.uint32(address + offset), cluster_rank())


def _words(address, offset):
    return tuple(_word(address, offset + np.uint32(4 * i)) for i in range(4))


def _number(address, offset):
    return np.uint32(_word(address, offset)).view(np.float32)


# Of the block's own shared memory, ``offset`` bytes behind an address: a constant offset becomes a part of the
# instruction, where an index would be computed anew.
words_at = instruction(
    "{ .reg .b32 at; add.u32 at, $4, $5; ld.shared.v4.u32 {$0,$1,$2,$3}, [at]; }", "rr", "rrrr", twin=_words
)
number_at = instruction("{ .reg .b32 at; add.u32 at, $1, $2; ld.shared.f32 $0, [at]; }", "rr", "f", twin=_number)


def of_lifts(n: int) -> int:
    """Where the lifts are in a record."""
    return OF_WEIGHTS + 4 * -(-n * (n + 2) // 4)


def record_words(n: int, lifted: bool) -> int:
    """32-bit words from record to record: four more than a multiple of eight, so that eight lie in different banks."""
    words = of_lifts(n) + (PARTS * rows_of(n) // 2 if lifted else 0)
    return words + (4 - words) % 8


def rows_of(n: int) -> int:
    """The projection's rows, with zeros to a multiple of eight."""
    return 8 * -(-n * (n + 2) // 8)


def pitch_of(n: int) -> int:
    """Elements from row to row: eight more than there are, so that eight rows lie in different banks."""
    return WARPS * n * CHANNELS + 8


class Layout:
    """Where things lie in a block's shared memory, counted in 16-bit elements: rows, records, samples."""

    def __init__(self, role: str, projection: str | None, n: int) -> None:
        copies = {None: 0, "bf16": 1, "f32": PARTS}[projection]
        self.record = 2 * record_words(n, projection is not None)
        self.records = copies * rows_of(n) * pitch_of(n)
        self.samples = self.records + STAGES * STEP * self.record
        self.bytes = 2 * self.samples + 16 * STAGES * 2 * (2 * n + (role == "pre")) * WARPS * WARP


@functools.cache
def staged(role: str, projection: str | None, n: int) -> SimpleNamespace:
    """Device functions for a lane's eight channels of two samples, x [n], d [n] and in role "pre" one more line.

    ``park`` starts the copies of a stage's, and ``park_records`` those of the block's records; ``address`` is where the
    lane's lie, ``words`` gives those of a line as four words, and ``transposed`` as tensor cores want them: 16 channels
    of stream ``j``, from the ``pair``-th 16 of the warp's on, by the 16 samples. ``record`` is where the record of the
    lane's first sample lies, that of the second 8 further.
    """
    lines, threads, layout, pre = 2 * n + (role == "pre"), WARPS * WARP, Layout(role, projection, n), role == "pre"
    samples_at, records_at, of_record = layout.samples, layout.records, layout.record
    of_stage, pieces = 2 * lines * threads * RUN, STEP * layout.record // RUN

    @device
    def place(stage, thread):
        return np.uint32(
            np.uint32(stage * np.uint32(of_stage)) + np.uint32(thread * np.uint32(RUN)) + np.uint32(samples_at)
        )

    @device
    def address(shared, stage):
        return shared_address(shared, np.int64(place(stage, warp.thread_index())))

    @device
    def park(shared, stage, x, d, d_line, upper, lower, c, channels):
        first = place(stage, warp.thread_index())
        for half in range(2):
            sample = lower if half else upper
            source = sample * np.int64(n) * channels + c
            for i in range(n):
                to = np.int64(first) + np.int64((half * lines + i) * threads * RUN)
                memory.copy_async16(shared, to, x, source)
                memory.copy_async16(shared, to + np.int64(n * threads * RUN), d, source)
                source += channels
            if pre:
                to = np.int64(first) + np.int64((half * lines + 2 * n) * threads * RUN)
                memory.copy_async16(shared, to, d_line, sample * channels + c)

    @device
    def park_records(shared, stage, records, b):
        """Those of 16 samples from b on."""
        to = np.int64(np.uint32(stage * np.uint32(STEP * of_record)) + np.uint32(records_at))
        source = b * np.int64(of_record // 2)
        for piece in range(np.int64(warp.thread_index()), pieces, threads):
            memory.copy_async16(shared, to + np.int64(RUN) * piece, records, source + np.int64(4) * piece)

    @device
    def record(shared, stage):
        g = np.uint32(np.uint32(warp.thread_index() % np.uint32(WARP)) >> np.uint32(2))
        own = np.uint32(np.uint32(stage * np.uint32(STEP)) + g)
        return shared_address(shared, np.int64(np.uint32(own * np.uint32(of_record)) + np.uint32(records_at)))

    @device
    def words(at, half, line, to, first):
        a, b, c, d = words_at(at, np.uint32((half * lines + line) * threads * 2 * RUN))
        to[first], to[first + 1], to[first + 2], to[first + 3] = a, b, c, d

    @device
    def matrices(stage):
        """Where the lane's row of a transposed matrix lies: of stream 0 and the first 16 channels."""
        thread = warp.thread_index()
        lane, first = np.uint32(thread % np.uint32(WARP)), np.uint32(thread & np.uint32(~(WARP - 1) & 0xFFFFFFFF))
        half, t = np.uint32(lane >> np.uint32(4)), np.uint32(np.uint32(lane >> np.uint32(3)) & np.uint32(1))
        owner = np.uint32(first + np.uint32(np.uint32(np.uint32(lane & np.uint32(7)) << np.uint32(2)) + t))
        return np.int64(place(stage, owner) + np.uint32(half * np.uint32(lines * threads * RUN)))

    @device
    def transposed(shared, at, j, pair):
        return tensor_core.ldmatrix_transposed_ahead(shared, at, np.uint32(2 * RUN * (j * threads + 2 * pair)))

    return SimpleNamespace(
        park=park, park_records=park_records, address=address, record=record, words=words, matrices=matrices,
        transposed=transposed,
    )  # fmt: skip


@functools.cache
def staged_lifts(role: str, projection: str, n: int) -> SimpleNamespace:
    """Device functions for the lifts of a stage as fragments of tensor cores.

    ``place`` is where the lane's row of a matrix lies, of the first 16 rows of the projection, and of the ``last``
    eight where they are no multiple of 16. ``by_sample`` gives the factor [16 samples, rows] of a part, four words for
    16 rows and two for eight; ``by_row`` the factor [16 samples, rows] of the other side, two words for eight rows.
    """
    layout, rows = Layout(role, projection, n), rows_of(n)
    pairs, odd, pitch, lifts_at = rows // 16, rows % 16 != 0, layout.record, layout.records + 2 * of_lifts(n)

    @device
    def place(stage, last):
        lane = np.uint32(warp.thread_index() % np.uint32(WARP))
        sample = np.uint32(np.uint32(stage * np.uint32(STEP)) + np.uint32(lane & np.uint32(15)))
        column = np.uint32(16 * pairs) if last else np.uint32(np.uint32(lane >> np.uint32(4)) * np.uint32(8))
        return np.int64(np.uint32(np.uint32(sample * np.uint32(pitch)) + column) + np.uint32(lifts_at))

    def fragments(load: Callable) -> Callable:
        @device
        def fetch(shared, at, at_last, part, f, to):
            for pair in range(pairs):
                offset, i = np.uint32(2 * (part * rows + 16 * pair)), to + 4 * pair
                f[i], f[i + 1], f[i + 2], f[i + 3] = load(shared, at, offset)
            if odd:
                f0, f1, _, _ = load(shared, at_last, np.uint32(2 * part * rows))
                f[to + 4 * pairs], f[to + 4 * pairs + 1] = f0, f1

        return fetch

    by_sample = fragments(tensor_core.ldmatrix_ahead)
    by_row = fragments(tensor_core.ldmatrix_transposed_ahead)
    return SimpleNamespace(place=place, by_sample=by_sample, by_row=by_row, words=rows // 4)


@functools.cache
def rows_gradient(role: str, projection: str, n: int) -> SimpleNamespace:
    """Device functions for d_rows = lifts^T x of the warp's channels: ``add`` a stage's, ``store`` the walk's sums."""
    of_x, of_lifts = staged(role, projection, n), staged_lifts(role, projection, n)
    matrices, transposed, place, by_row = of_x.matrices, of_x.transposed, of_lifts.place, of_lifts.by_row
    outputs, tiles, words, held = n * (n + 2), rows_of(n) // 8, of_lifts.words, PARTS * of_lifts.words

    @device
    def add(acc, shared, stage):
        f = cuda.local.array(held, np.uint32)
        at, lifts, last = matrices(stage), place(stage, False), place(stage, True)
        for part in range(PARTS):
            by_row(shared, lifts, last, part, f, words * part)
        for j in range(n):
            for pair in range(2):
                a0, a1, a2, a3 = transposed(shared, at, j, pair)
                for tile in range(tiles):
                    c = 4 * ((2 * j + pair) * tiles + tile)
                    for part in range(PARTS):
                        i = words * part + 2 * tile
                        r0, r1, r2, r3 = tensor_core.mma_bf16(
                            a0, a1, a2, a3, f[i], f[i + 1], acc[c], acc[c + 1], acc[c + 2], acc[c + 3]
                        )
                        acc[c], acc[c + 1], acc[c + 2], acc[c + 3] = r0, r1, r2, r3

    @device
    def store(acc, parts, first, lane, channels):
        """To the split's part [n (n + 2), n C]; ``first`` is the warp's first channel."""
        g, t = np.int64(np.uint32(lane >> np.uint32(2))), np.int64(np.uint32(lane & np.uint32(3)))
        at = warp.block_y() * np.int64(outputs)
        for j in range(n):
            for pair in range(2):
                for i in range(4):
                    c = first + np.int64(16 * pair + 8 * (i >> 1)) + g
                    for tile in range(tiles):
                        e = np.int64(8 * tile + (i & 1)) + np.int64(2) * t
                        if e < np.int64(outputs) and c < channels:
                            to = ((at + e) * np.int64(n) + np.int64(j)) * channels + c
                            parts[to] = acc[4 * ((2 * j + pair) * tiles + tile) + i]

    return SimpleNamespace(add=add, store=store, sums=8 * n * tiles)
