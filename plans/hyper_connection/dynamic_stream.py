"""The fast forward of dynamic hyper-connections: the projection on tensor cores, mixing weights, streamed samples.

See ``project.py``, ``lanes.py``, of more than four streams ``weights.py``, and ``stream.py`` in
``kernels/hyper_connection/``. x is read twice: its mixing weights depend on all of a sample.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from kernels.hyper_connection import lanes as lanes_kernel
from kernels.hyper_connection import project as project_kernel
from kernels.hyper_connection import weights as weights_kernel
from kernels.sinkhorn_thread import THREADS
from plans.core import Device, ElementKind, Workspace
from plans.hyper_connection.common import KINDS, NamedArguments, scratch_bytes, scratch_pointers, weights_count
from plans.hyper_connection.stream import Launch, Stream, refuses_stream, shape_of, stream_units
from plans.sinkhorn import sinkhorn_units, units_by_thread

_BLOCKS = 4 * 132
"""Blocks of the projection that fill an H200; the split, and with it the order of sums, is the same on every device."""
_LEAST_STEPS = 8
_EXACT_PARTS = {ElementKind.BF16: 1, ElementKind.F32: 3}


def refuses(descriptor: Any) -> str:
    """Why the fast kernels do not compute a descriptor, or ""."""
    d = descriptor
    if d.element is not ElementKind.BF16:
        return f"multiplies element bf16 on tensor cores, not {d.element.value}"
    if d.projection not in KINDS:
        return f"takes projection {' or '.join(k.value for k in KINDS)}, not {d.projection.value}"
    shape = shape_of(d.element, d.n_streams, d.hidden_dim)
    return refuses_stream(d.sinkhorn, d.n_streams, d.hidden_dim, d.batch, shape, element=d.element, gamma=d.gamma)


def split_of(d: Any) -> tuple[int, int]:
    """How many splits of the projection's places there are, and how many steps each takes."""
    steps = -(-d.n_streams * d.hidden_dim // project_kernel.STEP)
    wanted = -(-_BLOCKS // -(-d.batch // project_kernel.SAMPLES))
    each = max(_LEAST_STEPS, -(-steps // wanted))
    return -(-steps // each), each


def scratch(d: Any) -> dict[str, int]:
    """The fp32 arrays that :class:`FastWeights` needs."""
    m, (splits, _) = weights_count(d.n_streams), split_of(d)
    return {"parts": splits * d.batch * (m + 1), "logits": 0 if _by_lanes(d) else d.batch * m}


def _by_lanes(d: Any) -> bool:
    """Whether half a warp makes a sample's weights; else one thread does."""
    return d.n_streams <= lanes_kernel.MOST_STREAMS


def workspace(d: Any) -> int:
    """Bytes of workspace."""
    return scratch_bytes(scratch(d))


def units(d: Any, counted: float) -> float:
    """The guarantee's units, where the magnitude counts Sinkhorn's own as so many times less than ``counted``."""
    splits, each = split_of(d)
    projecting = 2.0 * _EXACT_PARTS[d.projection] * each * project_kernel.STEP + splits + 8
    streaming = stream_units(d.element, d.n_streams, d.n_streams, d.hidden_dim)
    return max(projecting, streaming, counted * units_by_thread(d.sinkhorn) / sinkhorn_units(d.sinkhorn))


DERIVATION = (
    "the largest of: P, exact products, of which the tensor core truncates each aligned one at fp32's last place (2 "
    "units), then the splits; out, sums over streams and half the sum of squares'; Sinkhorn's by reciprocals"
)


class FastWeights:
    """Two launches: parts of the projection, then ``projected`` and ``mixing``; of the plans whose H is dynamic."""

    def __init__(self, descriptor: Any) -> None:
        self.descriptor = d = descriptor
        self.splits, self.steps = split_of(d)
        made = project_kernel.project_tile(d.projection.value, d.n_streams)
        self.project = made.launcher((-(-d.batch // project_kernel.SAMPLES), self.splits, 1))
        if _by_lanes(d):
            weigh, samples = lanes_kernel.sample_weights_by_lanes, lanes_kernel.samples_of(lanes_kernel.WARPS)
        else:
            weigh, samples = weights_kernel.sample_weights_by_thread, THREADS
        self.weigh = weigh(d.mode.value, d.n_streams).launcher((-(-d.batch // samples), 1, 1))

    def bind(self, args: NamedArguments, parts: Any, logits: Any) -> list[Launch]:
        """Both launches."""
        d, flat = self.descriptor, self.descriptor.n_streams * self.descriptor.hidden_dim
        sizes = (self.splits, d.batch, flat, d.sinkhorn_iters, np.float32(d.eps))
        scratch = () if _by_lanes(d) else (logits,)
        weighing = (parts, args["alpha"], args["bias"], args["projected"], args["mixing"], *scratch, *sizes)
        projecting = (args["x_expanded"], args["projection"], parts, flat, d.batch, self.steps)
        return [(self.project, projecting), (self.weigh, weighing)]


class DynamicStreamProgram:
    """Three launches: the projection, the mixing weights, and all samples, read once more."""

    def __init__(self, descriptor: Any, device: Device) -> None:
        self.descriptor = d = descriptor
        self.weights = FastWeights(d)
        self.stream = Stream("full", d.element, d.gamma, d.shape, None, device)

    def bind(self, args: NamedArguments, workspace: Workspace) -> list[Launch]:
        """All launches."""
        weighing = self.weights.bind(args, *scratch_pointers(workspace, scratch(self.descriptor)))
        streams = (args["x_expanded"], args["mixing"], args["out"], self.descriptor.eps, args["rmsnorm_weight"])
        return [*weighing, self.stream.bind(*streams)]


class DynamicPreProgram:
    """Three launches: the projection, the mixing weights, and all samples' aggregates."""

    def __init__(self, descriptor: Any, device: Device) -> None:
        self.descriptor = d = descriptor
        self.weights = FastWeights(d)
        self.stream = Stream("pre", d.element, d.gamma, d.shape, None, device)

    def bind(self, args: NamedArguments, workspace: Workspace) -> list[Launch]:
        """All launches."""
        d = self.descriptor
        weighing = self.weights.bind(args, *scratch_pointers(workspace, scratch(d)))
        gamma = args["rmsnorm_weight"] if d.norm else None
        return [*weighing, self.stream.bind(args["x_expanded"], args["mixing"], args["aggregate"], d.eps, gamma)]
