"""The gradient of manifold-constrained hyper-connections with a dynamic H.

For example:

    descriptor = DynamicHyperConnectionBackwardDescriptor(320, 1280, 4, 20, 1e-5, ElementKind.BF16)
    plan = DynamicHyperConnectionBackwardPlan.select(stream, descriptor)
    plan.run(stream, workspace, NamedArguments(descriptor, **tensors))       # named as the descriptor's operands
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from kernels.hardware import WARP
from kernels.hyper_connection import dynamic_backward as dynamic_kernel
from kernels.hyper_connection import static as forward_kernel
from kernels.hyper_connection import static_backward as kernel
from kernels.sinkhorn import extent_for
from plans.core import ArchSku, BackendKind, Device, ElementKind, Operand, Plan, PrecisionGuarantee, Sku, Workspace
from plans.hyper_connection import dynamic_stream_backward as fast
from plans.hyper_connection.common import (
    NamedArguments,
    fp32_guarantee,
    gradients_of,
    scratch_bytes,
    scratch_pointers,
    weights_count,
)
from plans.hyper_connection.dynamic import DynamicHyperConnectionDescriptor, refuses
from plans.hyper_connection.math import (
    DynamicGradients,
    Pair,
    Projection,
    dynamic_gradients,
    full_gradients,
    gamma_gradient,
    logit_gradients,
    logits_of,
    x_gradient,
)
from plans.hyper_connection.stream import ALIGNMENT
from plans.sinkhorn import gradient_units

_F32 = ElementKind.F32


class DynamicHyperConnectionBackwardDescriptor(DynamicHyperConnectionDescriptor):
    """The gradients of x, gamma, projection, alpha and bias for the gradient ``d_out`` of out.

    With dM, dp and dq of a sample as in the static form (:class:`plans.hyper_connection.static_backward.
    HyperConnectionBackwardDescriptor`, without the sum over b): dH through sigmoids and every Sinkhorn iteration;
    dP = dH alpha / r; dr = -sum(dH alpha P) / r**2; d_bias = sum_b dH; d_alpha = sum_b sum(dH P) / r over the rows of a
    group; d_projection = sum_b dP x^T; and to d_x come projection^T dP + dr x / (r n C).
    ``projected`` and ``mixing`` are what the forward left. ``d_x`` has x's kind, the gradients of the parameters are
    fp32.
    """

    def operands(self) -> tuple[Operand, ...]:
        """Five gradients, ``d_out``, and the forward's operands."""
        _, *kept, x, projection, alpha, bias, gamma = super().operands()
        return (
            Operand("d_x", self.element, self.shape, writes=True),
            Operand("d_gamma", _F32, gamma.shape, writes=True),
            *gradients_of((projection, alpha, bias)),
            Operand("d_out", self.element, self.shape),
            *(Operand(operand.name, _F32, operand.shape) for operand in kept),
            x,
            projection,
            alpha,
            bias,
            gamma,
        )

    def reference(
        self,
        d_out: np.ndarray,
        projected: np.ndarray,
        mixing: np.ndarray,
        x_expanded: np.ndarray,
        projection: np.ndarray,
        alpha: np.ndarray,
        bias: np.ndarray,
        rmsnorm_weight: np.ndarray,
    ) -> dict[str, Pair]:
        """By gradient: its value in float64 before its rounding, and its magnitude."""
        given = (d_out, x_expanded, mixing, rmsnorm_weight, projection, projected, alpha, bias)
        d, x, weights, gamma, rows, projected, alpha, bias = (v.astype(np.float64) for v in given)
        found = full_gradients(d, x, weights, gamma, float(np.float32(self.eps)))
        dynamic = dynamic_reference(self, found.weights, x, rows, projected, alpha, bias, own_units(self))
        carried = tuple(c + t for c, t in zip(found.carried, dynamic.through, strict=True))
        return {
            "d_x": x_gradient(carried, found.d_a, weights),
            "d_gamma": gamma_gradient(found),
            "d_projection": dynamic.projection,
            "d_alpha": dynamic.alpha,
            "d_bias": dynamic.bias,
        }


def dynamic_reference(
    descriptor: object,
    d_weights: Pair,
    x: np.ndarray,
    rows: np.ndarray,
    projected: np.ndarray,
    alpha: np.ndarray,
    bias: np.ndarray,
    own_units: float,
) -> DynamicGradients:
    """What follows from the gradient of every sample's mixing weights."""
    d, n = descriptor, descriptor.n_streams
    ratio = gradient_units(d.sinkhorn) / own_units
    projection = Projection(d.sinkhorn_iters, float(np.float32(d.eps)), d.mode, backward_ratio=ratio)
    d_logits = logit_gradients(logits_of(projected, alpha, bias, n), d_weights, n, projection)
    return dynamic_gradients(d_logits, x, rows, projected, alpha)


def own_units(d: DynamicHyperConnectionDescriptor) -> float:
    """Roundings outside Sinkhorn, of the portable kernels.

    Four sums over streams, two over a thread's channels, a lane's channels, sigmoids, n (n + 2) terms twice, samples.
    """
    channels = -(-d.hidden_dim // forward_kernel.THREADS)
    streams = 4 * (d.n_streams + 8) + 2 * (channels + 16) + -(-d.hidden_dim // WARP)
    return streams + 2 * weights_count(d.n_streams) + d.batch + 48


def _guarantee(descriptor: DynamicHyperConnectionDescriptor) -> PrecisionGuarantee:
    return fp32_guarantee(
        own_units(descriptor),
        "as in the static form; then sums over n (n + 2) rows, and over the samples one after the other; the magnitude "
        "counts Sinkhorn's error and a logit's",
    )


class DynamicUnwind:
    """Launches from the samples' gradients of their mixing weights to those of alpha, bias and projection."""

    def __init__(self, descriptor: object) -> None:
        self.descriptor = d = descriptor
        n, threads = d.n_streams, forward_kernel.THREADS
        self.unwind = dynamic_kernel.sample_weights_backward(d.mode.value, extent_for(n)).launcher((d.batch, 1, 1))
        self.bias = dynamic_kernel.column_sums().launcher((weights_count(n), 1, 1))
        self.alpha = dynamic_kernel.alpha_gradient().launcher((3, 1, 1))
        blocks = (-(-n * d.hidden_dim // threads), weights_count(n), 1)
        self.projection = dynamic_kernel.projection_gradient(d.element.value).launcher(blocks)

    def bind(
        self, args: NamedArguments, shares: object, more: object, width: int, scratch: tuple
    ) -> list[tuple[Callable, tuple]]:
        """The launches; ``scratch`` are d_logits, lifts, logits and entered (:func:`unwind_scratch`)."""
        d, n = self.descriptor, self.descriptor.n_streams
        d_logits, lifts, logits, entered = scratch
        projected, flat, m = args["projected"], n * d.hidden_dim, weights_count(n)
        parameters = (projected, args["alpha"], args["bias"], shares, more, d_logits, lifts, logits, entered)
        return [
            (self.unwind, (*parameters, width, n, d.sinkhorn_iters, np.float32(d.eps), flat)),
            (self.bias, (d_logits, args["d_bias"], m, d.batch)),
            (self.alpha, (d_logits, projected, args["d_alpha"], n, d.batch)),
            (self.projection, (args["x_expanded"], lifts, args["d_projection"], flat, m, d.batch)),
        ]


def unwind_scratch(d: object) -> dict[str, int]:
    """The fp32 arrays that :class:`DynamicUnwind` needs."""
    m, cells = weights_count(d.n_streams), d.n_streams**2
    return {
        "d_logits": d.batch * m,
        "lifts": d.batch * (m + 1),
        "logits": d.batch * cells,
        "entered": d.batch * d.sinkhorn_iters * cells,
    }


def _scratch(d: DynamicHyperConnectionDescriptor) -> dict[str, int]:
    return {
        "lines": 2 * d.batch * d.hidden_dim,
        "roots": 2 * d.batch,
        "shares": d.batch * weights_count(d.n_streams),
        **unwind_scratch(d),
    }


class _PortableProgram:
    """Seven launches: the samples' shares, back through their weights, sums over samples, d_x and gamma's gradient."""

    def __init__(self, descriptor: DynamicHyperConnectionBackwardDescriptor, device: Device) -> None:
        self.descriptor = d = descriptor
        kinds = (d.element.value, d.gamma.value)
        self.shares = kernel.shares("full", *kinds).launcher((d.batch, 1, 1))
        self.unwind = DynamicUnwind(d)
        self.spread = kernel.spread("full", *kinds, d.projection.value).launcher((d.batch, 1, 1))
        self.gamma = kernel.gamma_gradient().launcher((-(-d.hidden_dim // forward_kernel.THREADS), 1, 1))

    def bind(self, args: NamedArguments, workspace: Workspace) -> list[tuple[Callable, tuple]]:
        """All launches."""
        d, m, eps = self.descriptor, weights_count(self.descriptor.n_streams), np.float32(self.descriptor.eps)
        lines, roots, shares, *scratch = scratch_pointers(workspace, _scratch(d))
        streams = (args["x_expanded"], args["rmsnorm_weight"], args["d_out"], args["mixing"], lines, roots)
        spread = (*streams, args["projection"], scratch[1], args["d_x"], m, d.hidden_dim, d.n_streams)
        return [
            (self.shares, (*streams, shares, m, d.hidden_dim, d.n_streams, eps)),
            *self.unwind.bind(args, shares, shares, m, tuple(scratch)),
            (self.spread, spread),
            (self.gamma, (lines, args["d_gamma"], d.hidden_dim, d.batch)),
        ]


class DynamicHyperConnectionBackwardPlan(Plan):
    """The gradient of a hyper-connection, dynamic H; see :class:`DynamicHyperConnectionBackwardDescriptor`."""

    name = "dynamic hyper-connection backward"
    skus = (
        Sku(
            name="mma and stream",
            backend=BackendKind.MMA,
            arch=ArchSku.SM80,
            refuses=lambda d: fast.refuses("full", d),
            guarantee=lambda d: fp32_guarantee(fast.units("full", d, own_units(d)), fast.DERIVATION),
            build=lambda d, device: fast.DynamicStreamBackwardProgram("full", d, device),
            workspace=fast.workspace,
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
