"""The gradient of manifold-constrained hyper-connections with a static H.

For example:

    descriptor = HyperConnectionBackwardDescriptor(320, 1280, 4, sinkhorn_iters=20, eps=1e-5, element=ElementKind.BF16)
    plan = HyperConnectionBackwardPlan.select(stream, descriptor)
    plan.run(stream, workspace, HyperConnectionBackwardArgs(**tensors))      # named as the descriptor's operands
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from kernels.hardware import WARP
from kernels.hyper_connection import static as forward_kernel
from kernels.hyper_connection import static_backward as kernel
from kernels.hyper_connection.stream import SM80_BYTES, SM90_BYTES
from kernels.sinkhorn import extent_for, sinkhorn_backward
from plans.core import (
    ArchSku,
    BackendKind,
    Device,
    ElementKind,
    Operand,
    Plan,
    PrecisionGuarantee,
    Sku,
    TensorMut,
    TensorRef,
    Workspace,
)
from plans.core.plan import Arguments
from plans.hyper_connection import stream_backward as stream
from plans.hyper_connection import tile_backward as tile
from plans.hyper_connection.common import (
    fp32_guarantee,
    gradients_of,
    scratch_bytes,
    scratch_pointers,
    static_operands,
    weight_line,
    weight_parts,
    weights_count,
)
from plans.hyper_connection.math import (
    Projection,
    full_gradients,
    gamma_gradient,
    logit_gradients,
    weights_of,
    x_gradient,
)
from plans.hyper_connection.static import HyperConnectionDescriptor, refuses
from plans.hyper_connection.stream import ALIGNMENT
from plans.sinkhorn import SinkhornMode, gradient_units, sinkhorn_units

_F32 = ElementKind.F32

Gradients = dict[str, tuple[np.ndarray, np.ndarray]]
"""By operand: the exact gradient in float64, and its magnitude."""


class HyperConnectionBackwardDescriptor(HyperConnectionDescriptor):
    """The gradients of x, gamma, H_pre, H_post and H_res for the gradient ``d_out`` of out.

    With g = d_out, p = s_pre, q = s_post, r = sqrt(mean(a**2) + eps): dy = sum_i q_i g_i;
    da = gamma dy / r - a sum_c(gamma dy a) / (C r**3); dx_j = sum_i M_ij g_i + p_j da; d_gamma = sum_b dy a / r;
    dM_ij = sum_bc g_i x_j; dp_i = sum_bc da x_i; dq_i = sum_bc g_i y; d_h_pre = dp p (1 - p);
    d_h_post = dq q (1 - q / 2); d_h_res through every iteration (:class:`plans.sinkhorn.SinkhornBackwardDescriptor`).
    ``d_x`` has x's kind, the gradients of the parameters are fp32. The forward is recomputed; nothing is kept of it.
    """

    def operands(self) -> tuple[Operand, ...]:
        """Five gradients, ``d_out``, and the forward's operands."""
        return (
            Operand("d_x", self.element, self.shape, writes=True),
            Operand("d_gamma", _F32, (self.hidden_dim,), writes=True),
            *gradients_of(static_operands(self.n_streams)),
            Operand("d_out", self.element, self.shape),
            *super().operands()[1:],
        )

    def reference(
        self,
        d_out: np.ndarray,
        x_expanded: np.ndarray,
        rmsnorm_weight: np.ndarray,
        h_pre: np.ndarray,
        h_post: np.ndarray,
        h_res: np.ndarray,
    ) -> Gradients:
        """The gradients in float64 before their rounding, and their magnitudes.

        A magnitude is the error, to first order, that one unit in every sum over streams makes; where M or its gradient
        enters, it counts as often as their units exceed those of the rest.
        """
        eps, n, own = float(np.float32(self.eps)), self.n_streams, _own_units(self)
        d, x, gamma, *logits = (v.astype(np.float64) for v in (d_out, x_expanded, rmsnorm_weight, h_pre, h_post, h_res))
        ratio = sinkhorn_units(self.sinkhorn) / own
        projection = Projection(self.sinkhorn_iters, eps, SinkhornMode.EXP, ratio, gradient_units(self.sinkhorn) / own)
        line = weight_line(*logits)[None]
        exact_logits = line, np.zeros_like(line)
        weights, _ = weights_of(exact_logits, n, projection)
        found = full_gradients(d, x, weights, gamma, eps, ratio)
        sums = tuple(part.sum(0, keepdims=True) for part in found.weights)
        parts = zip(
            *(weight_parts(part[0], n) for part in logit_gradients(exact_logits, sums, n, projection)), strict=True
        )
        return {
            "d_x": x_gradient(found.carried, found.d_a, weights),
            "d_gamma": gamma_gradient(found),
            **dict(zip(("d_h_pre", "d_h_post", "d_h_res"), parts, strict=True)),
        }


class HyperConnectionBackwardArgs(Arguments):
    """The tensors of one run, named and shaped as the descriptor's operands; those written must not overlap any."""

    def __init__(
        self,
        d_x: TensorMut,
        d_gamma: TensorMut,
        d_h_pre: TensorMut,
        d_h_post: TensorMut,
        d_h_res: TensorMut,
        d_out: TensorRef,
        x_expanded: TensorRef,
        rmsnorm_weight: TensorRef,
        h_pre: TensorRef,
        h_post: TensorRef,
        h_res: TensorRef,
    ) -> None:
        super().__init__()
        self.d_x, self.d_gamma, self.d_h_pre, self.d_h_post, self.d_h_res = d_x, d_gamma, d_h_pre, d_h_post, d_h_res
        self.d_out, self.x_expanded, self.rmsnorm_weight = d_out, x_expanded, rmsnorm_weight
        self.h_pre, self.h_post, self.h_res = h_pre, h_post, h_res

    def tensors(self) -> list[TensorRef]:
        """The operands in the order of their declaration."""
        written = [self.d_x, self.d_gamma, self.d_h_pre, self.d_h_post, self.d_h_res]
        return [*written, self.d_out, self.x_expanded, self.h_pre, self.h_post, self.h_res, self.rmsnorm_weight]


def _scratch(d: HyperConnectionDescriptor) -> dict[str, int]:
    """The workspace's fp32 arrays in their order, and how many elements each holds."""
    cells = d.n_streams**2
    return {
        "weights": cells + 2 * d.n_streams,
        "d_mixing": cells,
        "entered": d.sinkhorn_iters * cells,
        "lines": 2 * d.batch * d.hidden_dim,
        "roots": 2 * d.batch,
        "shares": d.batch * (cells + 2 * d.n_streams),
    }


def _own_units(d: HyperConnectionDescriptor) -> float:
    """Roundings outside Sinkhorn: four sums over streams, two over a thread's channels, a lane's channels, samples."""
    channels = -(-d.hidden_dim // forward_kernel.THREADS)
    return 4 * (d.n_streams + 8) + 2 * (channels + 16) + -(-d.hidden_dim // WARP) + d.batch + 32


def _guarantee(descriptor: HyperConnectionDescriptor) -> PrecisionGuarantee:
    return fp32_guarantee(
        _own_units(descriptor),
        "sums over streams with sigmoids (n + 8) in a, dy, r and dx; a thread's channels and 16 in both "
        "sums of the norm; a lane's channels, then the samples, one after the other; the magnitude counts M's error",
    )


class _PortableProgram:
    """Six launches: the mixing weights, their shares of every sample, d_x, the sums, gamma's, back through Sinkhorn."""

    def __init__(self, descriptor: HyperConnectionBackwardDescriptor, device: Device) -> None:
        self.descriptor = d = descriptor
        mode, extent, kinds = SinkhornMode.EXP.value, extent_for(d.n_streams), (d.element.value, d.gamma.value)
        self.weigh = forward_kernel.mixing_weights(mode, extent).launcher((1, 1, 1))
        self.shares = kernel.shares("full", *kinds).launcher((d.batch, 1, 1))
        self.spread = kernel.spread("full", *kinds, None).launcher((d.batch, 1, 1))
        self.sum_shares = kernel.sum_shares(False).launcher((weights_count(d.n_streams), 1, 1))
        self.gamma = kernel.gamma_gradient().launcher((-(-d.hidden_dim // forward_kernel.THREADS), 1, 1))
        self.unwind = sinkhorn_backward(mode, extent).launcher((1, 1, 1))

    def bind(self, args: HyperConnectionBackwardArgs, workspace: Workspace) -> list[tuple[Callable, tuple]]:
        """All launches."""
        d, eps = self.descriptor, np.float32(self.descriptor.eps)
        n, channels, width = d.n_streams, d.hidden_dim, weights_count(d.n_streams)
        weights, d_mixing, entered, lines, roots, shares = scratch_pointers(workspace, _scratch(d))
        sinkhorn = (n, d.sinkhorn_iters, eps)
        x, gamma, d_out = args.x_expanded.data, args.rmsnorm_weight.data, args.d_out.data
        h_pre, h_post, h_res = args.h_pre.data, args.h_post.data, args.h_res.data
        spread = (x, gamma, d_out, weights, lines, roots, roots, roots, args.d_x.data, 0, channels, n)
        sums = (shares, shares, h_pre, h_post, d_mixing, args.d_h_pre.data, args.d_h_post.data, width, n, d.batch)
        return [
            (self.weigh, (h_pre, h_post, h_res, weights, *sinkhorn)),
            (self.shares, (x, gamma, d_out, weights, lines, roots, shares, 0, channels, n, eps)),
            (self.spread, spread),
            (self.sum_shares, sums),
            (self.gamma, (lines, args.d_gamma.data, channels, d.batch)),
            (self.unwind, (h_res, d_mixing, args.d_h_res.data, entered, *sinkhorn)),
        ]


def _stream_sku(name: str, arch: ArchSku, most_bytes: int) -> Sku:
    """The streaming kernels with so much shared memory for samples."""
    return Sku(
        name=name,
        backend=BackendKind.VECTOR,
        arch=arch,
        refuses=lambda d: stream.refuses(d, most_bytes),
        guarantee=lambda d: fp32_guarantee(
            stream.units(d, most_bytes, _own_units(d)),
            "sums over streams; a thread's channels over all samples of its block, then the block's and the blocks' "
            "sums; or Sinkhorn's, with a reciprocal and a product a step instead of a division",
        ),
        build=stream.build(most_bytes),
        workspace=lambda d: stream.workspace(d, most_bytes),
        alignment=ALIGNMENT,
    )


class HyperConnectionBackwardPlan(Plan):
    """The gradient of a hyper-connection, static H; see :class:`HyperConnectionBackwardDescriptor`."""

    name = "hyper-connection backward"
    skus = (
        _stream_sku("stream", ArchSku.SM80, SM80_BYTES),
        _stream_sku("stream, large", ArchSku.SM90A, SM90_BYTES),
        Sku(
            name="tile",
            backend=BackendKind.VECTOR,
            arch=ArchSku.SM80,
            refuses=tile.refuses,
            guarantee=lambda d: fp32_guarantee(
                tile.units(d, _own_units(d)),
                "sums over streams; a thread's channels and a block's; the samples' lines in parts; or Sinkhorn's, by "
                "reciprocals",
            ),
            build=tile.TileBackwardProgram,
            workspace=tile.workspace,
            alignment=ALIGNMENT,
        ),
        Sku(
            name="portable",
            backend=BackendKind.PORTABLE,
            arch=ArchSku.ANY,
            refuses=refuses,
            guarantee=_guarantee,
            build=_PortableProgram,
            workspace=lambda d: scratch_bytes(_scratch(d)),
        ),
    )
