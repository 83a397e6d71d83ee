"""Manifold-constrained hyper-connections with a dynamic H, forward: every sample has mixing weights of its own.

For example:

    descriptor = DynamicHyperConnectionDescriptor(320, 1280, 4, sinkhorn_iters=20, eps=1e-5, element=ElementKind.BF16)
    plan = DynamicHyperConnectionPlan.select(stream, descriptor)
    plan.run(stream, workspace, NamedArguments(descriptor, **tensors))       # named as the descriptor's operands

DeepSeek-AI, arXiv:2512.24880, equations for H; as in the static form RMSNorm stands in the place of the sublayer F.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from kernels.hardware import WARP
from kernels.hyper_connection import dynamic as kernel
from kernels.hyper_connection import static as static_kernel
from kernels.sinkhorn import extent_for
from plans.core import (
    ArchSku,
    BackendKind,
    Device,
    ElementKind,
    Operand,
    Plan,
    PrecisionGuarantee,
    Sku,
    Workspace,
)
from plans.hyper_connection import dynamic_stream as fast
from plans.hyper_connection.common import (
    NamedArguments,
    dynamic_operands,
    fp32_guarantee,
    refuses_kinds,
    scratch_bytes,
    scratch_pointers,
    weights_count,
)
from plans.hyper_connection.math import (
    Pair,
    Projection,
    aggregate_of,
    logits_of,
    mixed_of,
    projected_of,
    weights_of,
)
from plans.hyper_connection.static import HyperConnectionDescriptor
from plans.hyper_connection.stream import ALIGNMENT
from plans.sinkhorn import SinkhornDescriptor, SinkhornMode, sinkhorn_units

_F32 = ElementKind.F32


@dataclass(frozen=True)
class DynamicHyperConnectionDescriptor(HyperConnectionDescriptor):
    """out = M x + s_post y as in the static form, with s_pre, s_post and M of every sample's own.

    With m = n (n + 2) rows in the order pre, post, res: P = projection x for x flattened to [n C];
    r = sqrt(mean(x**2) + eps); H = alpha P / r + bias, alpha[0] for pre, alpha[1] for post and alpha[2] for res;
    s_pre = sigmoid(H_pre), s_post = 2 sigmoid(H_post), M = Sinkhorn(H_res). In mode SOFTMAX eps is added to s_pre, as
    in DeepSeek's kernels. ``projection`` is the kind of the operand [m, n C], fp32 or bf16; alpha [3] and bias [m] are
    fp32. Two more results serve the backward: ``projected`` [B, m + 1], P and r, and ``mixing`` [B, m], the weights.
    """

    projection: ElementKind = ElementKind.BF16
    mode: SinkhornMode = SinkhornMode.EXP

    @property
    def sinkhorn(self) -> SinkhornDescriptor:
        """The projection of all samples' H_res."""
        return SinkhornDescriptor(self.batch, self.n_streams, self.sinkhorn_iters, self.eps, self.mode)

    @property
    def kept(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """The shapes of ``projected`` and ``mixing``."""
        m = weights_count(self.n_streams)
        return (self.batch, m + 1), (self.batch, m)

    def operands(self) -> tuple[Operand, ...]:
        """Three results, ``x_expanded``, ``projection``, ``alpha``, ``bias`` and ``rmsnorm_weight``."""
        projected, mixing = self.kept
        return (
            Operand("out", self.element, self.shape, writes=True),
            Operand("projected", _F32, projected, writes=True),
            Operand("mixing", _F32, mixing, writes=True),
            Operand("x_expanded", self.element, self.shape),
            *dynamic_operands(self.n_streams, self.hidden_dim, self.projection),
            Operand("rmsnorm_weight", self.gamma, (self.hidden_dim,)),
        )

    def reference(
        self,
        x_expanded: np.ndarray,
        projection: np.ndarray,
        alpha: np.ndarray,
        bias: np.ndarray,
        rmsnorm_weight: np.ndarray,
        projected: np.ndarray | None = None,
        mixing: np.ndarray | None = None,
    ) -> dict[str, Pair]:
        """By result: its value in float64 before its rounding, and its magnitude.

        The guarantee is of each result for those before it as they were stored: given ``projected`` and ``mixing``,
        what follows is computed from them.
        """
        x, gamma = x_expanded.astype(np.float64), rmsnorm_weight.astype(np.float64)
        found = dynamic_weights(self, x, projection, alpha, bias, _own_units(self), projected)
        weights = found["mixing"][0] if mixing is None else mixing.astype(np.float64)
        return found | {"out": mixed_of(x, weights, aggregate_of(x, weights, gamma, float(np.float32(self.eps))))}


def dynamic_weights(
    descriptor: object,
    x: np.ndarray,
    rows: np.ndarray,
    alpha: np.ndarray,
    bias: np.ndarray,
    own_units: float,
    projected: np.ndarray | None = None,
) -> dict[str, Pair]:
    """``projected``, and ``mixing`` for it; or for what was stored of it, where that is given."""
    d, n = descriptor, descriptor.n_streams
    eps = float(np.float32(d.eps))
    rows, alpha, bias = (v.astype(np.float64) for v in (rows, alpha, bias))
    exact = projected_of(x, rows, eps)
    logits = logits_of(exact[0] if projected is None else projected.astype(np.float64), alpha, bias, n)
    ratio = sinkhorn_units(d.sinkhorn) / own_units
    return {"projected": exact, "mixing": weights_of(logits, n, Projection(d.sinkhorn_iters, eps, d.mode, ratio))}


def refuses(descriptor: DynamicHyperConnectionDescriptor) -> str:
    """Why the portable kernels, forward and backward, do not compute a descriptor, or ""."""
    d = descriptor
    return refuses_kinds(d.batch, d.n_streams, element=d.element, gamma=d.gamma, projection=d.projection)


def projected_units(flat: int) -> float:
    """Roundings of P: a lane's products and sums, and five sums over the warp; r's are half of them."""
    return -(-flat // WARP) + 6


def weight_units() -> float:
    """Roundings of the sigmoids, and of a logit in units of its size."""
    return 12.0


def stream_units(n: int, channels: int) -> float:
    """Roundings of out for given weights: sums over streams, in a and in the root; half the sum of squares'; 12."""
    return 2 * n + (-(-channels // static_kernel.THREADS) + 16) / 2 + 12


def _own_units(d: DynamicHyperConnectionDescriptor) -> float:
    flat = d.n_streams * d.hidden_dim
    return max(projected_units(flat), weight_units(), stream_units(d.n_streams, d.hidden_dim))


def _guarantee(descriptor: DynamicHyperConnectionDescriptor) -> PrecisionGuarantee:
    return fp32_guarantee(
        _own_units(descriptor),
        "the largest of: P, a lane's products and a warp's sum; the sigmoids and a logit, 12 (the magnitude counts M's "
        "error); out, sums over streams in a and in the root, half the sum of squares' roundings and 12",
    )


class _PortableProgram:
    """Three launches: P and r, the mixing weights, and every sample with them."""

    def __init__(self, descriptor: DynamicHyperConnectionDescriptor, device: Device) -> None:
        self.descriptor = d = descriptor
        self.weigh = DynamicWeights(d)
        self.connect = static_kernel.connect(d.element.value, d.gamma.value).launcher((d.batch, 1, 1))

    def bind(self, args: NamedArguments, workspace: Workspace) -> list[tuple[Callable, tuple]]:
        """All launches."""
        d = self.descriptor
        (logits,) = scratch_pointers(workspace, _scratch(d))
        streams = (args["x_expanded"], args["rmsnorm_weight"], args["mixing"], args["out"])
        scalars = (weights_count(d.n_streams), d.hidden_dim, d.n_streams, np.float32(d.eps))
        return [*self.weigh.bind(args, logits), (self.connect, (*streams, *scalars))]


class DynamicWeights:
    """Two launches: ``projected``, then ``mixing``; of the plans whose H is dynamic."""

    def __init__(self, descriptor: object) -> None:
        self.descriptor = d = descriptor
        blocks = -(-d.batch // kernel.SAMPLES)
        self.project = kernel.project(d.element.value, d.projection.value).launcher((blocks, 1, 1))
        self.weigh = kernel.sample_weights(d.mode.value, extent_for(d.n_streams)).launcher((d.batch, 1, 1))

    def bind(self, args: NamedArguments, logits: object) -> list[tuple[Callable, tuple]]:
        """The launches; ``logits`` is scratch for B n**2 fp32 numbers."""
        d, n, eps = self.descriptor, self.descriptor.n_streams, np.float32(self.descriptor.eps)
        sizes = (n * d.hidden_dim, weights_count(n), d.batch, eps)
        weighing = (args["projected"], args["alpha"], args["bias"], args["mixing"], logits, n, d.sinkhorn_iters, eps)
        return [
            (self.project, (args["x_expanded"], args["projection"], args["projected"], *sizes)),
            (self.weigh, weighing),
        ]


def _scratch(d: DynamicHyperConnectionDescriptor) -> dict[str, int]:
    return {"logits": d.batch * d.n_streams**2}


class DynamicHyperConnectionPlan(Plan):
    """Hyper-connection, dynamic H, forward; see :class:`DynamicHyperConnectionDescriptor`."""

    name = "dynamic hyper-connection"
    skus = (
        Sku(
            name="mma and stream",
            backend=BackendKind.MMA,
            arch=ArchSku.SM80,
            refuses=fast.refuses,
            guarantee=lambda d: fp32_guarantee(fast.units(d, _own_units(d)), fast.DERIVATION),
            build=fast.DynamicStreamProgram,
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
