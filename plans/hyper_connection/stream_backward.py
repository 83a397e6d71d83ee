"""The fast gradient of static hyper-connections: the SKUs "stream" of their backward plan.

See ``kernels/hyper_connection/stream_backward.py``.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from kernels.hardware import WARP
from kernels.hyper_connection import stream as stream_kernel
from kernels.hyper_connection import stream_backward as kernel
from kernels.hyper_connection.lanes import kept_bytes
from kernels.hyper_connection.sums import finish_static
from plans.core import Device, ElementKind, Workspace
from plans.hyper_connection.common import scratch_bytes, scratch_pointers, weights_count
from plans.hyper_connection.stream import Launch, refuses_stream
from plans.sinkhorn import (
    SinkhornDescriptor,
    SinkhornMode,
    gradient_units,
    gradient_units_by_thread,
    sinkhorn_units,
    units_by_thread,
)

_MULTIPROCESSORS = 132
"""Of an H200. The order of the sums follows from the number of blocks, which is therefore the same on every device."""
_LEAST_SAMPLES = 4
"""Samples of a block, where there are enough, so that its line of sums is little beside them."""
_F32_BYTES = 4


def shape_of(element: ElementKind, n: int, channels: int, most_bytes: int) -> stream_kernel.Shape | None:
    """How a block holds a sample's x and d [n, channels] each, None where it cannot."""
    if n > kernel.MOST_STREAMS:
        return None
    runs = 2 if 2 * n <= kernel.MOST_STREAMS else 1
    return stream_kernel.shape_for(element.value, 2 * n, channels, most_bytes, runs, _F32_BYTES)


def refuses(descriptor: Any, most_bytes: int) -> str:
    """Why the streaming kernels do not compute a descriptor with so much shared memory, or ""."""
    d = descriptor
    if d.n_streams > kernel.MOST_STREAMS:
        return f"holds the sums of up to {kernel.MOST_STREAMS} streams in registers, not of {d.n_streams}"
    shape = shape_of(d.element, d.n_streams, d.hidden_dim, most_bytes)
    return refuses_stream(d.sinkhorn, d.n_streams, d.hidden_dim, d.batch, shape, element=d.element, gamma=d.gamma)


def blocks_for(batch: int, threads: int) -> int:
    """How many blocks walk over the samples."""
    most = _MULTIPROCESSORS * max(1, stream_kernel.MOST_THREADS // threads)
    return min(batch, most, max(_MULTIPROCESSORS, batch // _LEAST_SAMPLES))


def _settings(d: Any, most_bytes: int) -> tuple[stream_kernel.Shape, int]:
    shape = shape_of(d.element, d.n_streams, d.hidden_dim, most_bytes)
    return shape, blocks_for(d.batch, shape.threads)


def _scratch(d: Any, most_bytes: int) -> dict[str, int]:
    _, blocks = _settings(d, most_bytes)
    return {
        "sums": blocks * weights_count(d.n_streams),
        "gamma_sums": blocks * d.hidden_dim,
    }


def workspace(d: Any, most_bytes: int) -> int:
    """Bytes of workspace: the blocks' sums."""
    return scratch_bytes(_scratch(d, most_bytes))


def own_units(d: Any, most_bytes: int) -> float:
    """Roundings outside Sinkhorn.

    Four sums over streams; two over a thread's channels and the block; a thread's channels over all samples of its
    block, the block's and the blocks' sums one after the other.
    """
    shape, blocks = _settings(d, most_bytes)
    of_thread, of_block = stream_kernel.RUN * shape.runs, 6 + shape.threads // WARP
    samples = -(-d.batch // blocks)
    return 4 * (d.n_streams + 8) + 2 * (of_thread + of_block) + of_thread * samples + of_block + blocks + 40


def units(d: Any, most_bytes: int, counted: float) -> float:
    """The guarantee's units, where the magnitude counts Sinkhorn's own as so many times less than ``counted``."""
    sinkhorn: SinkhornDescriptor = d.sinkhorn
    more = max(
        units_by_thread(sinkhorn) / sinkhorn_units(sinkhorn),
        gradient_units_by_thread(sinkhorn) / gradient_units(sinkhorn),
    )
    return max(own_units(d, most_bytes), counted * more)


class StreamBackwardProgram:
    """Two launches: all samples, then the sums over blocks and back through the mixing weights."""

    def __init__(self, descriptor: Any, most_bytes: int, blocks: int | None = None) -> None:
        self.descriptor, self.most_bytes = descriptor, most_bytes
        d, n, mode = descriptor, descriptor.n_streams, SinkhornMode.EXP.value
        shape, usual = _settings(d, most_bytes)
        self.blocks = min(usual, blocks or usual)
        made = kernel.stream_backward("full", d.element.value, d.gamma.value, n, shape, mode)
        self.stream = made.launcher((self.blocks, 1, 1))
        self.finish = finish_static(mode, n, False).launcher(
            (1 + -(-d.hidden_dim // WARP), 1, 1), kept_bytes(1, d.sinkhorn_iters)
        )

    def bind(self, args: Any, workspace: Workspace) -> list[Launch]:
        """Both launches."""
        d, eps = self.descriptor, np.float32(self.descriptor.eps)
        sums, gamma_sums = scratch_pointers(workspace, _scratch(d, self.most_bytes))
        logits = (args.h_pre.data, args.h_post.data, args.h_res.data)
        # The kernel reads no extra line and no weights here, and writes no gradient of an update.
        x, d_out, d_x = args.x_expanded.data, args.d_out.data, args.d_x.data
        streams = (x, args.rmsnorm_weight.data, d_out, x, logits[0], *logits, d_x, d_x)
        sizes = (0, d.hidden_dim, d.hidden_dim, 0, d.batch, self.blocks, d.sinkhorn_iters, eps)
        gradients = (args.d_gamma.data, args.d_h_pre.data, args.d_h_post.data, args.d_h_res.data)
        finishing = (
            sums,
            gamma_sums,
            sums,
            *logits,
            *gradients,
            self.blocks,
            self.blocks,
            d.hidden_dim,
        )
        return [
            (self.stream, (*streams, sums, gamma_sums, *sizes)),
            (self.finish, (*finishing, d.sinkhorn_iters, eps)),
        ]


def build(most_bytes: int) -> Any:
    """What a SKU with so much shared memory builds."""

    def program(descriptor: Any, device: Device) -> StreamBackwardProgram:
        return StreamBackwardProgram(descriptor, most_bytes)

    return program
