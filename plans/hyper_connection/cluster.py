"""The forward of dynamic hyper-connections in one launch that reads x once: the SKU "cluster" of several plans (sm_90).

See ``kernels/hyper_connection/cluster.py``.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from kernels.hyper_connection import cluster_stage as kernel
from kernels.hyper_connection.cluster import connect_in_clusters
from kernels.hyper_connection.cluster_stage import Team
from plans.core import Device, ElementKind, Workspace
from plans.hyper_connection.common import KINDS, NamedArguments
from plans.hyper_connection.stream import Launch
from plans.sinkhorn import refuses_by_thread, sinkhorn_units, units_by_thread

PROOF = "tests/test_hyper_connection_cluster.py"
_LEAST_BLOCKS, _LEAST_WARPS = 2, 4
_BF16 = ElementKind.BF16


def team_of(n: int, channels: int) -> Team | None:
    """How a cluster shares samples [n, channels], None where they are too large for one.

    The order of the sums follows from it, so that it is the same for every batch and device.
    """
    groups = -(-channels // kernel.CHANNELS)
    wanted = max(_LEAST_BLOCKS, min(kernel.MOST_BLOCKS, groups // _LEAST_WARPS))
    blocks = 1 << wanted.bit_length() - 1
    team = Team(blocks, -(-groups // blocks))
    fits = team.warps <= kernel.MOST_WARPS and kernel.shared_bytes(n, team) <= kernel.SHARED_BYTES
    return team if fits else None


def refuses(descriptor: Any) -> str:
    """Why the kernel does not compute a descriptor, or ""."""
    d, n = descriptor, descriptor.n_streams
    for name, kind, wanted in (
        ("element", d.element, (_BF16,)),
        ("projection", d.projection, (_BF16,)),
        ("gamma", d.gamma, (*KINDS, None)),
    ):
        if kind not in wanted:
            return f"takes {name} {' or '.join(k.value for k in wanted if k)}, not {kind.value}"
    if n > kernel.MOST_STREAMS:
        return f"takes 1 to {kernel.MOST_STREAMS} streams, not {n}"
    if d.hidden_dim % kernel.RUN:
        return f"takes a multiple of {kernel.RUN} channels, not {d.hidden_dim}"
    if team_of(n, d.hidden_dim) is None:
        return f"holds three stages of samples in a cluster, and {n} x {d.hidden_dim} are too large"
    return "takes fewer than 2**31 samples" if d.batch >= 2**31 else refuses_by_thread(d.sinkhorn)


def units(d: Any, counted: float) -> float:
    """The guarantee's units, where the magnitude counts Sinkhorn's own as so many times less than ``counted``."""
    n, team = d.n_streams, team_of(d.n_streams, d.hidden_dim)
    together = team.warps + team.blocks + 8
    projecting = 2.0 * kernel.CHANNELS * n + together
    streaming = 2 * n + (kernel.RUN + together) / 2 + 14
    return max(projecting, streaming, counted * units_by_thread(d.sinkhorn) / sinkhorn_units(d.sinkhorn))


DERIVATION = (
    "the largest of: P, exact products over a warp's channels, of which the tensor core truncates each aligned one at "
    "fp32's last place (2 units), then the warps and the blocks; out, sums over streams and half the sum of squares', "
    "of a lane, its warp, block and cluster; Sinkhorn's by reciprocals"
)


class ClusterProgram:
    """One launch, of the whole connection or of what comes before a sublayer, role "full" or "pre".

    ``clusters`` walk over the samples, as many as the device holds at once where it is not said.
    """

    def __init__(self, role: str, descriptor: Any, device: Device, clusters: int | None = None) -> None:
        self.role, self.descriptor = role, descriptor
        d, team = descriptor, team_of(descriptor.n_streams, descriptor.hidden_dim)
        gamma = None if d.gamma is None else d.gamma.value
        made = connect_in_clusters(role, gamma, d.mode.value, d.n_streams, team)
        resident = max(1, device.multiprocessors * made.min_blocks // team.blocks)
        self.clusters = min(-(-d.batch // kernel.SAMPLES), clusters or resident)
        self.connect = made.launcher((self.clusters * team.blocks, 1, 1))

    def bind(self, args: NamedArguments, workspace: Workspace) -> list[Launch]:
        """The launch."""
        d, eps = self.descriptor, np.float32(self.descriptor.eps)
        # Without a gamma the kernel does not read its pointer.
        gamma = args["rmsnorm_weight"] if d.gamma is not None else args["mixing"]
        out = args["out" if self.role == "full" else "aggregate"]
        read = (args["x_expanded"], args["projection"], gamma, args["alpha"], args["bias"])
        written = (args["projected"], args["mixing"], out)
        sizes = (d.hidden_dim, d.batch, self.clusters, d.sinkhorn_iters, eps)
        return [(self.connect, (*read, *written, *sizes))]
