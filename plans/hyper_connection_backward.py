"""The gradient of manifold-constrained hyper-connections with a static H.

For example:

    descriptor = HyperConnectionBackwardDescriptor(320, 1280, 4, sinkhorn_iters=20, eps=1e-5, element=ElementKind.BF16)
    plan = HyperConnectionBackwardPlan.select(stream, descriptor)
    plan.run(stream, workspace, HyperConnectionBackwardArgs(**tensors))      # named as the descriptor's operands
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from kernels import hyper_connection as forward_kernel
from kernels import hyper_connection_backward as kernel
from kernels.simulator import WARP
from kernels.sinkhorn import extent_for, sinkhorn_backward
from plans.core import (
    ArchSku,
    BackendKind,
    Device,
    ElementKind,
    MathPrecision,
    Operand,
    Plan,
    PrecisionGuarantee,
    Sku,
    TensorMut,
    TensorRef,
    Workspace,
)
from plans.core.plan import Arguments
from plans.hyper_connection import HyperConnectionDescriptor, refuses, sigmoid
from plans.sinkhorn import (
    SinkhornMode,
    gradient_units,
    sinkhorn_backward_reference,
    sinkhorn_reference,
    sinkhorn_units,
)

_F32 = ElementKind.F32
_TINY = 2.0**-100

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
        n = self.n_streams
        return (
            Operand("d_x", self.element, self.shape, writes=True),
            Operand("d_gamma", _F32, (self.hidden_dim,), writes=True),
            Operand("d_h_pre", _F32, (n,), writes=True),
            Operand("d_h_post", _F32, (n,), writes=True),
            Operand("d_h_res", _F32, (n, n), writes=True),
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
        eps = float(np.float32(self.eps))
        g, x, gamma = (v.astype(np.float64) for v in (d_out, x_expanded, rmsnorm_weight))
        p, q = sigmoid(h_pre.astype(np.float64)), 2 * sigmoid(h_post.astype(np.float64))
        settings = (self.sinkhorn_iters, eps, SinkhornMode.EXP)
        mixing = sinkhorn_reference(h_res, *settings)

        a, dy = np.einsum("i,bic->bc", p, x), np.einsum("i,bic->bc", q, g)
        root = np.sqrt((a * a).mean(-1, keepdims=True) + eps)
        u = a / root
        pull = (gamma * dy * u).mean(-1, keepdims=True)
        da = (gamma * dy - u * pull) / root
        dp, dq = np.einsum("bc,bic->i", da, x), np.einsum("bic,bc->i", g, gamma * u)
        d_mixing = np.einsum("bic,bjc->ij", g, x)

        sizes = np.abs(g), np.abs(x), np.abs(gamma)
        of_u, of_dy, of_da = _aggregate_magnitudes(*sizes, p, q, root, u, dy, pull)
        own = _own_units(self)
        mixed = np.einsum("ij,bic->bjc", (1 + sinkhorn_units(self.sinkhorn) / own) * mixing, sizes[0])
        d_h_res, size = sinkhorn_backward_reference(h_res, d_mixing, *settings)
        handed_on = sinkhorn_backward_reference(h_res, np.einsum("bic,bjc->ij", *sizes[:2]), *settings)[1]
        # 1 - p and 1 - q / 2 are differences from 1, so their errors do not shrink with them.
        found = {
            "d_x": (
                np.einsum("ij,bic->bjc", mixing, g) + p[:, None] * da[:, None],
                mixed + p[:, None] * of_da[:, None],
            ),
            "d_gamma": ((dy * u).sum(0), (of_dy * np.abs(u) + np.abs(dy) * of_u).sum(0)),
            "d_h_pre": (dp * p * (1 - p), np.einsum("bc,bic->i", of_da, sizes[1]) * p),
            "d_h_post": (dq * q * (1 - q / 2), np.einsum("bic,bc->i", sizes[0], sizes[2] * of_u) * q),
            "d_h_res": (d_h_res, 2 * handed_on + (1 + gradient_units(self.sinkhorn) / own) * size),
        }
        return {name: (exact, magnitude + _TINY) for name, (exact, magnitude) in found.items()}


def _aggregate_magnitudes(
    g: np.ndarray,
    x: np.ndarray,
    gamma: np.ndarray,
    p: np.ndarray,
    q: np.ndarray,
    root: np.ndarray,
    u: np.ndarray,
    dy: np.ndarray,
    pull: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Errors of u = a / r, dy and da to first order, for sums whose terms are wrong by one unit; g, x, gamma absolute.

    r's relative error is at most rms(sum_i p_i |x_i|) / r, by Cauchy and Schwarz.
    """
    terms, of_dy = np.einsum("i,bic->bc", p, x), np.einsum("i,bic->bc", q, g)
    of_root = np.sqrt((terms * terms).mean(-1, keepdims=True)) / root
    u, dy, pull = np.abs(u), np.abs(dy), np.abs(pull)
    of_u = terms / root + u * of_root
    of_pull = (gamma * (of_dy * u + dy * of_u)).mean(-1, keepdims=True) + pull * of_root
    return of_u, of_dy, (gamma * (of_dy + dy * of_root) + of_u * pull + u * of_pull) / root


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
        "shares": d.batch * (cells + 2 * d.n_streams),
    }


def _own_units(d: HyperConnectionDescriptor) -> float:
    """Roundings outside Sinkhorn: four sums over streams, two over a thread's channels, a lane's channels, samples."""
    channels = -(-d.hidden_dim // forward_kernel.THREADS)
    return 4 * (d.n_streams + 8) + 2 * (channels + 16) + -(-d.hidden_dim // WARP) + d.batch + 32


def _guarantee(descriptor: HyperConnectionDescriptor) -> PrecisionGuarantee:
    return PrecisionGuarantee(
        math_precision=MathPrecision.F32,
        accumulator=_F32,
        deterministic=True,
        bit_stable_on_same_hardware=True,
        rounding_units=_own_units(descriptor),
        derivation="sums over streams with sigmoids (n + 8) in a, dy, r and dx; a thread's channels and 16 in both "
        "sums of the norm; a lane's channels, then the samples, one after the other; the magnitude counts M's error",
    )


class _PortableProgram:
    """Five launches: the mixing weights, every sample, the sums over samples, gamma's, and back through Sinkhorn."""

    def __init__(self, descriptor: HyperConnectionBackwardDescriptor, device: Device) -> None:
        self.descriptor = d = descriptor
        mode, extent = SinkhornMode.EXP.value, extent_for(d.n_streams)
        self.weigh = forward_kernel.mixing_weights(mode, extent).launcher((1, 1, 1))
        self.samples = kernel.samples(d.element.value, d.gamma.value).launcher((d.batch, 1, 1))
        self.sum_shares = kernel.sum_shares().launcher((d.n_streams * (d.n_streams + 2), 1, 1))
        self.gamma = kernel.gamma_gradient().launcher((-(-d.hidden_dim // forward_kernel.THREADS), 1, 1))
        self.unwind = sinkhorn_backward(mode, extent).launcher((1, 1, 1))

    def bind(self, args: HyperConnectionBackwardArgs, workspace: Workspace) -> list[tuple[Callable, tuple]]:
        """All launches."""
        d, eps = self.descriptor, np.float32(self.descriptor.eps)
        pointers, start = {}, 0
        for name, count in _scratch(d).items():
            pointers[name] = workspace.buffer.pointer(np.float32, 4 * start)
            start += count
        weights, d_mixing, entered, lines, shares = pointers.values()
        sinkhorn = (d.n_streams, d.sinkhorn_iters, eps)
        x, gamma, d_out, h_res = args.x_expanded.data, args.rmsnorm_weight.data, args.d_out.data, args.h_res.data
        sample = (x, gamma, d_out, weights, args.d_x.data, lines, shares, d.hidden_dim, d.n_streams, eps)
        sums = (shares, weights, d_mixing, args.d_h_pre.data, args.d_h_post.data, d.n_streams, d.batch)
        return [
            (self.weigh, (args.h_pre.data, args.h_post.data, h_res, weights, *sinkhorn)),
            (self.samples, sample),
            (self.sum_shares, sums),
            (self.gamma, (lines, args.d_gamma.data, d.hidden_dim, d.batch)),
            (self.unwind, (h_res, d_mixing, args.d_h_res.data, entered, *sinkhorn)),
        ]


class HyperConnectionBackwardPlan(Plan):
    """The gradient of a hyper-connection, static H; see :class:`HyperConnectionBackwardDescriptor`."""

    name = "hyper-connection backward"
    skus = (
        Sku(
            name="portable",
            backend=BackendKind.PORTABLE,
            arch=ArchSku.ANY,
            refuses=refuses,
            guarantee=_guarantee,
            build=_PortableProgram,
            workspace=lambda d: 4 * sum(_scratch(d).values()),
        ),
    )
