"""The fast forward of hyper-connections: what the SKUs "stream" of several plans share.

Samples of up to eight streams are read once and written once, at the speed of memory; see
``kernels/hyper_connection_stream.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from kernels import hyper_connection_stream as kernel
from kernels import hyper_connection_weights as weights_kernel
from kernels.sinkhorn_thread import MAX_N
from plans.core import Device, ElementKind, Workspace
from plans.hyper_connection_common import KINDS, scratch_pointers, weights_count
from plans.sinkhorn import SinkhornDescriptor, SinkhornMode, refuses_by_thread

ALIGNMENT = 16
_BLOCK_BYTES = 80 << 10
"""Shared memory of a block of which two fit on a multiprocessor of every architecture; twice that where it must be."""

Launch = tuple[Callable, tuple]


def shape_of(element: ElementKind, lines: int, channels: int) -> kernel.Shape | None:
    """How a block holds samples [lines, channels], None where it cannot."""
    found = (kernel.shape_for(element.value, lines, channels, times * _BLOCK_BYTES) for times in (1, 2))
    return next((shape for shape in found if shape is not None), None)


def refuses_stream(
    sinkhorn: SinkhornDescriptor | None, n: int, lines: int, channels: int, batch: int, **kinds: ElementKind | None
) -> str:
    """Why the streaming kernels do not compute a problem, or ""; ``lines`` of a sample wait in shared memory at once.

    ``kinds`` are those of the operands, with ``element`` among them; one that is not there has kind None.
    """
    for name, kind in kinds.items():
        if kind not in (*KINDS, None):
            return f"takes {name} {' or '.join(k.value for k in KINDS)}, not {kind.value}"
    if n > MAX_N:
        return f"takes 1 to {MAX_N} streams, not {n}"
    if channels % kernel.RUN:
        return f"takes a multiple of {kernel.RUN} channels, not {channels}"
    if shape_of(kinds["element"], lines, channels) is None:
        return f"takes samples of which two fit in shared memory, not {lines} x {channels} in {kinds['element'].value}"
    if batch >= 2**31:
        return "takes fewer than 2**31 samples"
    return refuses_by_thread(sinkhorn) if sinkhorn is not None else ""


class Stream:
    """One launch over all samples, in a role of ``kernels.hyper_connection_stream.stream``.

    ``blocks`` walk over the samples, as many as the device holds at once where it is not said.
    """

    def __init__(
        self,
        role: str,
        element: ElementKind,
        gamma: ElementKind | None,
        shape: tuple[int, int, int],
        per_sample: bool,
        device: Device,
        blocks: int | None = None,
    ) -> None:
        batch, n, channels = shape
        block = shape_of(element, n + (role == "post"), channels)
        made = kernel.stream(role, element.value, gamma.value if gamma else None, n, block, per_sample)
        blocks = min(batch, blocks or device.multiprocessors * made.min_blocks)
        self._launch, self._sizes = made.launcher((blocks, 1, 1)), (channels, batch, blocks)

    def bind(self, x: Any, weights: Any, out: Any, eps: float, gamma: Any = None, y: Any = None) -> Launch:
        """The launch; ``gamma`` and ``y`` where the role has them."""
        y = x if y is None else y
        # The kernel does not read gamma's pointer where there is none.
        gamma = weights if gamma is None else gamma
        return self._launch, (x, gamma, y, weights, out, *self._sizes, np.float32(eps))


class StaticWeights:
    """One launch of one warp: the line of mixing weights of a static H."""

    def __init__(self, mode: SinkhornMode, n: int, iterations: int, eps: float) -> None:
        self._launch = weights_kernel.mixing_weights_by_thread(mode.value, n).launcher((1, 1, 1))
        self._scalars = (iterations, np.float32(eps))

    def bind(self, h_pre: Any, h_post: Any, h_res: Any, weights: Any) -> Launch:
        """The launch."""
        return self._launch, (h_pre, h_post, h_res, weights, *self._scalars)


class StaticStreamProgram:
    """Two launches: the mixing weights, then all samples; of the static connection."""

    def __init__(self, descriptor: Any, device: Device) -> None:
        self.descriptor = d = descriptor
        self.weigh = StaticWeights(SinkhornMode.EXP, d.n_streams, d.sinkhorn_iters, d.eps)
        self.stream = Stream("full", d.element, d.gamma, d.shape, False, device)

    def bind(self, args: Any, workspace: Workspace) -> list[Launch]:
        """Both launches."""
        d = self.descriptor
        (weights,) = scratch_pointers(workspace, {"weights": weights_count(d.n_streams)})
        return [
            self.weigh.bind(args.h_pre.data, args.h_post.data, args.h_res.data, weights),
            self.stream.bind(args.x_expanded.data, weights, args.out.data, d.eps, gamma=args.rmsnorm_weight.data),
        ]


def stream_units(element: ElementKind, lines: int, n: int, channels: int) -> float:
    """Roundings of out for given weights: sums over streams, in a and in the root; half the sum of squares'; 14 more.

    The sum of squares is over a thread's channels, a warp and the block's warps.
    """
    block = shape_of(element, lines, channels)
    return 2 * n + (kernel.RUN * block.runs + 6 + block.threads // 32) / 2 + 14
