"""The fast gradient of dynamic hyper-connections.

See ``kernels/hyper_connection/stream_shares.py`` and ``kernels/hyper_connection/spread_tile.py``. x and d_out are read
twice: the gradient of x needs that of the mixing weights, which are sums over all of a sample.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from kernels.hardware import WARP
from kernels.hyper_connection import lanes as lanes_kernel
from kernels.hyper_connection import spread_stage
from kernels.hyper_connection import stream as stream_kernel
from kernels.hyper_connection import stream_shares as shares_kernel
from kernels.hyper_connection.spread_tile import spread_tile
from kernels.hyper_connection.static import THREADS
from kernels.hyper_connection.sums import GROUPS, sum_gradients
from plans.core import Device, ElementKind, Workspace
from plans.hyper_connection.common import KINDS, NamedArguments, scratch_bytes, scratch_pointers, weights_count
from plans.hyper_connection.stream import Launch, refuses_stream
from plans.sinkhorn import gradient_units, gradient_units_by_thread

_BLOCKS = 2 * 132
"""Blocks that fill an H200; splits, and with them the order of sums, are the same on every device."""
_WARPS = 16 * 132
"""Warps that fill it."""
_BLOCK_WARPS = 4


def crew_of(d: Any) -> tuple[shares_kernel.Crew, int]:
    """The warps of a block that make samples' shares, and how many steps of channels each takes.

    Samples have several warps where they are too few to fill the device.
    """
    runs = -(-d.hidden_dim // shares_kernel.CHANNELS)
    steps = -(-runs // min(runs, shares_kernel.MOST_WARPS, -(-_WARPS // d.batch)))
    parts = -(-runs // steps)
    return shares_kernel.Crew(parts, max(1, _BLOCK_WARPS // parts)), steps


def shares_units(d: Any) -> int:
    """Roundings of a sum over channels: a lane's, then those of its warp and its sample's parts."""
    crew, steps = crew_of(d)
    return stream_kernel.RUN * steps + 5 + crew.parts


def refuses(role: str, descriptor: Any) -> str:
    """Why the fast kernels do not compute a descriptor in a role, or ""."""
    d = descriptor
    if d.element is not ElementKind.BF16:
        return f"multiplies element bf16 on tensor cores, not {d.element.value}"
    if d.projection not in KINDS:
        return f"takes projection {' or '.join(k.value for k in KINDS)}, not {d.projection.value}"
    if d.n_streams > shares_kernel.MOST_STREAMS:
        return f"holds the sums of up to {shares_kernel.MOST_STREAMS} streams in registers, not of {d.n_streams}"
    return refuses_stream(d.sinkhorn, d.n_streams, d.hidden_dim, d.batch, crew_of(d), element=d.element, gamma=d.gamma)


def spread_grid(d: Any) -> tuple[int, int, int]:
    """Blocks of channels, splits of the samples, and how many steps a split takes."""
    across, steps = -(-d.hidden_dim // (spread_stage.WARPS * spread_stage.CHANNELS)), -(-d.batch // spread_stage.STEP)
    each = -(-steps // max(1, _BLOCKS // across))
    return across, -(-steps // each), each


def records_length(d: Any, lifted: bool) -> int:
    """fp32 numbers of the samples' records."""
    step = spread_stage.STEP
    return -(-d.batch // step) * step * spread_stage.record_words(d.n_streams, lifted)


def _lane_warps(d: Any) -> int:
    """Warps of a block of the kernel that goes back through the mixing weights."""
    fits = lanes_kernel.kept_bytes(lanes_kernel.WARPS, d.sinkhorn_iters) <= stream_kernel.SM80_BYTES
    return lanes_kernel.WARPS if fits else lanes_kernel.FEWER_WARPS


def _weight_blocks(d: Any) -> int:
    """Blocks of that kernel, which writes the records of all steps of samples."""
    step = spread_stage.STEP
    return -(-d.batch // step) * step // lanes_kernel.samples_of(_lane_warps(d))


def _scratch(d: Any) -> dict[str, int]:
    m, flat = weights_count(d.n_streams), d.n_streams * d.hidden_dim
    return {
        "shares": d.batch * m,
        "records": records_length(d, True),
        "gamma_sums": spread_grid(d)[1] * d.hidden_dim,
        "parts": spread_grid(d)[1] * m * flat,
        "of_weights": _weight_blocks(d) * (m + 3),
    }


def workspace(d: Any) -> int:
    """Bytes of workspace."""
    return scratch_bytes(_scratch(d))


def units(role: str, d: Any, counted: float) -> float:
    """The guarantee's units, where the magnitude counts Sinkhorn's own as so many times less than ``counted``."""
    _, spreads, steps = spread_grid(d)
    through = 2.0 * 6 * 32
    of_gamma = 2 * steps + 3 + spreads
    of_projection = 2.0 * 3 * spread_stage.STEP * steps + spreads
    of_bias = -(-_weight_blocks(d) // GROUPS) + GROUPS + lanes_kernel.WARPS + 16 + weights_count(d.n_streams)
    own = 4 * (d.n_streams + 8) + 3 * shares_units(d) + 48 + max(through, of_gamma, of_projection, of_bias)
    return max(own, counted * gradient_units_by_thread(d.sinkhorn) / gradient_units(d.sinkhorn))


DERIVATION = (
    "sums over streams; a lane's channels, its warp's, a sample's; then the largest of: the rows' products and those "
    "over the samples of a split, of which the tensor core truncates each aligned one at fp32's last place (2 units), "
    "the splits, gamma's and the bias's sums over samples; or Sinkhorn's, by reciprocals"
)


class DynamicStreamBackwardProgram:
    """Four launches: shares, lifts, d_x with the projection's gradient in parts, and the sums over parts.

    Of the whole connection, role "full", or of what comes before a sublayer, role "pre".
    """

    def __init__(self, role: str, descriptor: Any, device: Device) -> None:
        self.role, self.descriptor = role, descriptor
        d, n, m, channels = descriptor, descriptor.n_streams, weights_count(descriptor.n_streams), descriptor.hidden_dim
        gamma, self.of_gamma = (None, 0) if d.gamma is None else (d.gamma.value, channels)
        (crew, self.steps), warps = crew_of(d), _lane_warps(d)
        made = shares_kernel.stream_shares(role, d.element.value, gamma, n, crew)
        self.shares = made.launcher((-(-d.batch // crew.samples), 1, 1))
        unwind = lanes_kernel.sample_weights_by_lanes_backward(d.mode.value, n, warps)
        kept = lanes_kernel.kept_bytes(warps, d.sinkhorn_iters)
        self.unwind = unwind.launcher((_weight_blocks(d), 1, 1), kept)
        spread = spread_tile(role, d.projection.value, gamma, n)
        self.spread = spread.launcher((*spread_grid(d)[:2], 1))
        of_projection = -(-m * n * channels // THREADS)
        self.sum = sum_gradients().launcher((1 + -(-self.of_gamma // WARP) + of_projection, 1, 1))

    def bind(self, args: NamedArguments, workspace: Workspace) -> list[Launch]:
        """All launches."""
        d, n, eps = self.descriptor, self.descriptor.n_streams, np.float32(self.descriptor.eps)
        m, flat, channels, batch = weights_count(n), n * d.hidden_dim, d.hidden_dim, d.batch
        shares, records, gamma_sums, parts, of_weights = scratch_pointers(workspace, _scratch(d))
        _, splits, steps = spread_grid(d)
        x, mixing = args["x_expanded"], args["mixing"]
        # Without a gamma the kernels touch neither it nor its gradient; role "full" has neither a line of d nor more.
        gamma, d_gamma = (args["rmsnorm_weight"], args["d_gamma"]) if d.gamma is not None else (mixing, gamma_sums)
        if self.role == "full":
            streams, line, of_shares, more = args["d_out"], x, args["d_out"], mixing
        else:
            line = args["d_aggregate"]
            streams, of_shares, more = args["d_streams"], line, args["d_mixing"]
        sharing = (x, gamma, of_shares, mixing, more, shares, records, m, spread_stage.record_words(n, True))
        weights = (args["projected"], args["alpha"], args["bias"], shares, records, of_weights)
        spreading = (x, gamma, streams, line, records, args["projection"], args["d_x"], gamma_sums, parts)
        gradients = (args["d_projection"], args["d_bias"], args["d_alpha"], d_gamma)
        sizes = (m * flat, m, self.of_gamma, splits, _weight_blocks(d))
        return [
            (self.shares, (*sharing, channels, batch, self.steps, eps)),
            (self.unwind, (*weights, batch, d.sinkhorn_iters, eps, flat)),
            (self.spread, (*spreading, channels, batch, steps)),
            (self.sum, (parts, of_weights, gamma_sums, *gradients, *sizes)),
        ]
