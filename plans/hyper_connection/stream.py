"""The fast forward of hyper-connections: what the SKUs "stream" of several plans share.

Samples of up to eight streams are read once and written once, at the speed of memory; see
``kernels/hyper_connection/stream.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from kernels.hyper_connection import stream as kernel
from kernels.sinkhorn_thread import MAX_N
from plans.core import Device, ElementKind, Workspace
from plans.hyper_connection.common import KINDS
from plans.sinkhorn import SinkhornDescriptor, SinkhornMode, refuses_by_thread

ALIGNMENT = 16
_HALF_BYTES = 80 << 10
"""Samples' shared memory of a block of which two fit on a multiprocessor of every architecture."""

Launch = tuple[Callable, tuple]


def shape_of(element: ElementKind, lines: int, channels: int) -> kernel.Shape | None:
    """How a block of the forward holds samples [lines, channels], None where it cannot."""
    found = (kernel.shape_for(element.value, lines, channels, most) for most in (_HALF_BYTES, kernel.SM80_BYTES))
    return next((shape for shape in found if shape is not None), None)


def refuses_stream(
    sinkhorn: SinkhornDescriptor | None,
    n: int,
    channels: int,
    batch: int,
    shape: object | None,
    **kinds: ElementKind | None,
) -> str:
    """Why the streaming kernels do not compute a problem, or ""; ``shape`` is how a block holds them, or None.

    ``kinds`` are those of the operands, with ``element`` among them; one that is not there has kind None.
    """
    for name, kind in kinds.items():
        if kind not in (*KINDS, None):
            return f"takes {name} {' or '.join(k.value for k in KINDS)}, not {kind.value}"
    if n > MAX_N:
        return f"takes 1 to {MAX_N} streams, not {n}"
    if channels % kernel.RUN:
        return f"takes a multiple of {kernel.RUN} channels, not {channels}"
    if shape is None:
        return f"holds two samples in a block, and {n} x {channels} in {kinds['element'].value} are too large"
    if batch >= 2**31:
        return "takes fewer than 2**31 samples"
    return refuses_by_thread(sinkhorn) if sinkhorn is not None else ""


class Stream:
    """One launch over all samples, in a role of ``kernels.hyper_connection.stream.stream``.

    ``static`` is None for a line of weights a sample, "given" for one for all, or Sinkhorn's mode, and then the kernel
    makes them. ``blocks`` walk over the samples, as many as the device holds at once where it is not said.
    """

    def __init__(
        self,
        role: str,
        element: ElementKind,
        gamma: ElementKind | None,
        shape: tuple[int, int, int],
        static: str | None,
        device: Device,
        blocks: int | None = None,
    ) -> None:
        batch, n, channels = shape
        block = shape_of(element, n + (role == "post"), channels)
        made = kernel.stream(role, element.value, gamma.value if gamma else None, n, block, static)
        blocks = min(batch, blocks or device.multiprocessors * made.min_blocks)
        self._launch, self._sizes = made.launcher((blocks, 1, 1)), (channels, batch, blocks)

    def bind(
        self,
        x: Any,
        weights: Any,
        out: Any,
        eps: float,
        gamma: Any = None,
        y: Any = None,
        logits: tuple[Any, Any, Any] | None = None,
        iterations: int = 0,
    ) -> Launch:
        """The launch; ``gamma`` and ``y`` where the role has them, ``logits`` where the kernel makes the weights.

        A pointer that the kernel does not read is one of those that it does.
        """
        gamma, logits = weights if gamma is None else gamma, logits or (weights,) * 3
        y = x if y is None else y
        return self._launch, (x, gamma, y, weights, *logits, out, *self._sizes, iterations, np.float32(eps))


class StaticStreamProgram:
    """One launch: every block makes the mixing weights and walks over samples."""

    def __init__(self, descriptor: Any, device: Device) -> None:
        self.descriptor = d = descriptor
        self.stream = Stream("full", d.element, d.gamma, d.shape, SinkhornMode.EXP.value, device)

    def bind(self, args: Any, workspace: Workspace) -> list[Launch]:
        """The launch."""
        d, logits = self.descriptor, (args.h_pre.data, args.h_post.data, args.h_res.data)
        x, gamma, out = args.x_expanded.data, args.rmsnorm_weight.data, args.out.data
        return [self.stream.bind(x, logits[0], out, d.eps, gamma, None, logits, d.sinkhorn_iters)]


def stream_units(element: ElementKind, lines: int, n: int, channels: int) -> float:
    """Roundings of out for given weights: sums over streams, in a and in the root; half the sum of squares'; 14 more.

    The sum of squares is over a thread's channels, a warp and the block's warps.
    """
    block = shape_of(element, lines, channels)
    return 2 * n + (kernel.RUN * block.runs + 6 + block.threads // 32) / 2 + 14
