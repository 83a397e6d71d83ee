"""The fast gradient of dynamic hyper-connections.

See ``kernels/hyper_connection/stream_shares.py`` and ``kernels/hyper_connection/spread_tile.py``. x and d_out are read
twice: the gradient of x needs that of the mixing weights, which are sums over all of a sample.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from kernels.hyper_connection import spread_stage
from kernels.hyper_connection import stream as stream_kernel
from kernels.hyper_connection import stream_shares as shares_kernel
from kernels.hyper_connection.spread_tile import spread_tile
from kernels.hyper_connection.sums import GROUPS, sum_parts
from kernels.hyper_connection.weights import sample_weights_by_thread_backward
from kernels.simulator import WARP
from kernels.sinkhorn_thread import THREADS
from plans.core import Device, ElementKind, Workspace
from plans.hyper_connection.common import KINDS, NamedArguments, scratch_bytes, scratch_pointers, weights_count
from plans.hyper_connection.stream import Launch, refuses_stream
from plans.sinkhorn import gradient_units, gradient_units_by_thread

_BLOCKS = 4 * 132
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
    each = -(-steps // -(-_BLOCKS // across))
    return across, -(-steps // each), each


def _weight_blocks(d: Any) -> int:
    """Blocks of the kernel that goes back through the mixing weights, a warp of samples each."""
    return -(-d.batch // THREADS)


def _scratch(d: Any) -> dict[str, int]:
    m, flat = weights_count(d.n_streams), d.n_streams * d.hidden_dim
    return {
        "shares": d.batch * m,
        "roots": 2 * d.batch,
        "d_logits": d.batch * m,
        "lifts": d.batch * (m + 1),
        "logits": d.batch * m,
        "kept": 2 * d.sinkhorn_iters * d.n_streams * d.batch,
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
    of_bias = -(-_weight_blocks(d) // GROUPS) + GROUPS + 16 + weights_count(d.n_streams)
    own = 4 * (d.n_streams + 8) + 3 * shares_units(d) + 48 + max(through, of_gamma, of_projection, of_bias)
    return max(own, counted * gradient_units_by_thread(d.sinkhorn) / gradient_units(d.sinkhorn))


DERIVATION = (
    "sums over streams; a lane's channels, its warp's, a sample's; then the largest of: the rows' products and those "
    "over the samples of a split, of which the tensor core truncates each aligned one at fp32's last place (2 units), "
    "the splits, gamma's and the bias's sums over samples; or Sinkhorn's, by reciprocals"
)


class DynamicStreamBackwardProgram:
    """Six launches: shares, lifts, d_x with the projection's gradient in parts, and the sums over parts.

    Of the whole connection, role "full", or of what comes before a sublayer, role "pre".
    """

    def __init__(self, role: str, descriptor: Any, device: Device) -> None:
        self.role, self.descriptor = role, descriptor
        d, n, m, channels = descriptor, descriptor.n_streams, weights_count(descriptor.n_streams), descriptor.hidden_dim
        gamma = None if d.gamma is None else d.gamma.value
        crew, self.steps = crew_of(d)
        made = shares_kernel.stream_shares(role, d.element.value, gamma, n, crew)
        self.shares = made.launcher((-(-d.batch // crew.samples), 1, 1))
        self.unwind = sample_weights_by_thread_backward(d.mode.value, n).launcher((_weight_blocks(d), 1, 1))
        spread = spread_tile(role, d.projection.value, gamma, n)
        self.spread = spread.launcher((*spread_grid(d)[:2], 1))
        self.sum_gamma = sum_parts().launcher((-(-channels // WARP), 1, 1))
        self.sum_projection = sum_parts().launcher((-(-m * n * channels // WARP), 1, 1))
        self.sum_weights = sum_parts().launcher((-(-(m + 3) // WARP), 1, 1))

    def bind(self, args: NamedArguments, workspace: Workspace) -> list[Launch]:
        """All launches."""
        d, n, eps = self.descriptor, self.descriptor.n_streams, np.float32(self.descriptor.eps)
        m, flat, channels, batch = weights_count(n), n * d.hidden_dim, d.hidden_dim, d.batch
        shares, roots, *weighing, gamma_sums, parts, of_weights = scratch_pointers(workspace, _scratch(d))
        lifts, blocks = weighing[1], _weight_blocks(d)
        _, spreads, steps = spread_grid(d)
        x, mixing = args["x_expanded"], args["mixing"]
        # Without a gamma the kernels do not read its pointer, and in role "full" neither a line of d nor more.
        gamma = args["rmsnorm_weight"] if d.gamma is not None else mixing
        if self.role == "full":
            streams, line, of_shares, more = args["d_out"], x, args["d_out"], mixing
        else:
            streams, line, of_shares, more = (
                args["d_streams"],
                args["d_aggregate"],
                args["d_aggregate"],
                args["d_mixing"],
            )
        weights = (args["projected"], args["alpha"], args["bias"], shares, *weighing, of_weights)
        spreading = (x, gamma, streams, line, mixing, roots, args["projection"], lifts, args["d_x"], gamma_sums, parts)
        launches = [
            (self.shares, (x, gamma, of_shares, mixing, more, shares, roots, m, channels, batch, self.steps, eps)),
            (self.unwind, (*weights, batch, d.sinkhorn_iters, eps, flat)),
            (self.spread, (*spreading, m, channels, batch, steps)),
            (self.sum_projection, (parts, args["d_projection"], args["d_projection"], m * flat, m * flat, spreads)),
            (self.sum_weights, (of_weights, args["d_bias"], args["d_alpha"], m, m + 3, blocks)),
        ]
        if d.gamma is not None:
            d_gamma = args["d_gamma"]
            launches.append((self.sum_gamma, (gamma_sums, d_gamma, d_gamma, channels, channels, spreads)))
        return launches
