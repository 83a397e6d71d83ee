"""The gradient of static hyper-connections whose samples are too large to wait in shared memory: the SKU "tile".

What every sample adds to the gradients of the mixing weights first, in pieces of its channels, then x's gradient, so
that x and d_out are read twice. The kernels are those of the dynamic form, with one line of weights for all samples.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from kernels.hardware import WARP
from kernels.hyper_connection import stream_shares as shares_kernel
from kernels.hyper_connection.lanes import kept_bytes
from kernels.hyper_connection.spread_stage import record_words
from kernels.hyper_connection.spread_tile import spread_tile
from kernels.hyper_connection.static import mixing_weights
from kernels.hyper_connection.sums import GROUPS, finish_static, sum_parts
from kernels.sinkhorn import extent_for
from plans.core import Device, ElementKind, Workspace
from plans.hyper_connection.common import scratch_bytes, scratch_pointers, weights_count
from plans.hyper_connection.dynamic_stream_backward import crew_of, records_length, shares_units, spread_grid
from plans.hyper_connection.stream import Launch, refuses_stream
from plans.sinkhorn import (
    SinkhornMode,
    gradient_units,
    gradient_units_by_thread,
    sinkhorn_units,
    units_by_thread,
)

_ROWS = 64
"""Samples' lines that are left for the last sum, where so many divide the batch."""


def refuses(descriptor: Any) -> str:
    """Why the kernels do not compute a descriptor, or ""."""
    d = descriptor
    if d.element is not ElementKind.BF16:
        return f"takes element bf16, not {d.element.value}"
    if d.n_streams > shares_kernel.MOST_STREAMS:
        return f"holds the sums of up to {shares_kernel.MOST_STREAMS} streams in registers, not of {d.n_streams}"
    return refuses_stream(d.sinkhorn, d.n_streams, d.hidden_dim, d.batch, crew_of(d), element=d.element, gamma=d.gamma)


def _lines_left(batch: int) -> int:
    """How many sums of samples' lines the first sum leaves: sample b goes to the sum b % lines."""
    return math.gcd(batch, _ROWS)


def _scratch(d: Any) -> dict[str, int]:
    m = weights_count(d.n_streams)
    return {
        "weights": m,
        "shares": d.batch * m,
        "records": records_length(d, False),
        "sums": _lines_left(d.batch) * m,
        "gamma_sums": spread_grid(d)[1] * d.hidden_dim,
    }


def workspace(d: Any) -> int:
    """Bytes of workspace."""
    return scratch_bytes(_scratch(d))


def units(d: Any, counted: float) -> float:
    """The guarantee's units, where the magnitude counts Sinkhorn's own as so many times less than ``counted``."""
    _, spreads, steps = spread_grid(d)
    of_samples = -(-d.batch // GROUPS) + 2 * GROUPS + _lines_left(d.batch)
    own = 4 * (d.n_streams + 8) + 3 * shares_units(d) + 48 + max(of_samples, 2 * steps + 3 + spreads)
    more = max(
        units_by_thread(d.sinkhorn) / sinkhorn_units(d.sinkhorn),
        gradient_units_by_thread(d.sinkhorn) / gradient_units(d.sinkhorn),
    )
    return max(own, counted * more)


class TileBackwardProgram:
    """Five launches: the mixing weights, the samples' shares, d_x, the shares' sum in parts, what follows from it."""

    def __init__(self, descriptor: Any, device: Device) -> None:
        self.descriptor = d = descriptor
        n, mode, gamma = d.n_streams, SinkhornMode.EXP.value, d.gamma.value
        (crew, self.steps), self.lines = crew_of(d), _lines_left(d.batch)
        made = shares_kernel.stream_shares("full", d.element.value, gamma, n, crew)
        self.weigh = mixing_weights(mode, extent_for(n)).launcher((1, 1, 1))
        self.shares = made.launcher((-(-d.batch // crew.samples), 1, 1))
        self.spread = spread_tile("full", None, gamma, n).launcher((*spread_grid(d)[:2], 1))
        self.sum = sum_parts().launcher((-(-self.lines * weights_count(n) // WARP), 1, 1))
        blocks, kept = (1 + -(-d.hidden_dim // WARP), 1, 1), kept_bytes(1, d.sinkhorn_iters)
        self.finish = finish_static(mode, n, False).launcher(blocks, kept)

    def bind(self, args: Any, workspace: Workspace) -> list[Launch]:
        """All launches."""
        d, n, eps = self.descriptor, self.descriptor.n_streams, np.float32(self.descriptor.eps)
        weights, shares, records, sums, gamma_sums = scratch_pointers(workspace, _scratch(d))
        x, gamma, d_out = args.x_expanded.data, args.rmsnorm_weight.data, args.d_out.data
        logits, sinkhorn = (args.h_pre.data, args.h_post.data, args.h_res.data), (d.sinkhorn_iters, eps)
        gradients = (args.d_gamma.data, args.d_h_pre.data, args.d_h_post.data, args.d_h_res.data)
        (_, spreads, steps), columns = spread_grid(d), self.lines * weights_count(n)
        # The kernels read no more, no line of d and no rows here, and write no gradient of rows.
        spreading = (x, gamma, d_out, x, records, x, args.d_x.data, gamma_sums, records)
        finishing = (sums, gamma_sums, sums, *logits, *gradients, self.lines, spreads, d.hidden_dim)
        pieces = (0, record_words(n, False), d.hidden_dim, d.batch, self.steps, eps)
        return [
            (self.weigh, (*logits, weights, n, *sinkhorn)),
            (self.shares, (x, gamma, d_out, weights, weights, shares, records, *pieces)),
            (self.spread, (*spreading, d.hidden_dim, d.batch, steps)),
            (self.sum, (shares, sums, sums, columns, columns, d.batch // self.lines)),
            (self.finish, (*finishing, *sinkhorn)),
        ]
