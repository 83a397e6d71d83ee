"""Manifold-constrained hyper-connections with a static H, forward.

For example:

    descriptor = HyperConnectionDescriptor(320, 1280, 4, sinkhorn_iters=20, eps=1e-5, element=ElementKind.BF16)
    plan = HyperConnectionPlan.select(stream, descriptor)
    plan.run(stream, workspace, HyperConnectionArgs(out, x_expanded, rmsnorm_weight, h_pre, h_post, h_res))

DeepSeek-AI, arXiv:2512.24880, in the form of mHC.cu (github.com/AndreSlavescu/mHC.cu), where RMSNorm stands in the
place of the paper's sublayer F.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from kernels.hyper_connection import static as kernel
from kernels.sinkhorn import extent_for
from plans.core import (
    ArchSku,
    BackendKind,
    Device,
    ElementKind,
    OpCategory,
    Operand,
    Plan,
    PrecisionGuarantee,
    Sku,
    TensorMut,
    TensorRef,
    Workspace,
)
from plans.core.plan import Arguments
from plans.hyper_connection.common import (
    check_streams,
    fp32_guarantee,
    refuses_kinds,
    static_operands,
    weight_line,
    weights_count,
)
from plans.hyper_connection.math import Projection, aggregate_of, mixed_of, weights_of
from plans.hyper_connection.stream import ALIGNMENT, StaticStreamProgram, refuses_stream, shape_of, stream_units
from plans.sinkhorn import SinkhornDescriptor, SinkhornMode, check_sinkhorn, sinkhorn_units, units_by_thread

_F32 = ElementKind.F32


@dataclass(frozen=True)
class HyperConnectionDescriptor:
    """out = M x + s_post y, of ``batch`` samples x [n_streams, hidden_dim].

    M = Sinkhorn(exp(H_res)) (:attr:`plans.sinkhorn.SinkhornMode.EXP`), s_pre = sigmoid(H_pre), s_post =
    2 sigmoid(H_post), a = sum_i s_pre[i] x[i] and y = gamma * a / sqrt(mean(a**2) + eps). ``element`` is the kind of x
    and out, ``gamma`` that of the norm's weight, both fp32 or bf16; the mixing parameters and all arithmetic are fp32,
    out is rounded once.
    """

    batch: int
    hidden_dim: int
    n_streams: int
    sinkhorn_iters: int
    eps: float
    element: ElementKind
    gamma: ElementKind = ElementKind.BF16

    category = OpCategory.HYPER_CONNECTION

    def __post_init__(self) -> None:
        check_streams("hyper-connection", self.batch, self.hidden_dim, self.n_streams)
        check_sinkhorn("hyper-connection", self.sinkhorn_iters, self.eps)

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape of x and out."""
        return (self.batch, self.n_streams, self.hidden_dim)

    @property
    def sinkhorn(self) -> SinkhornDescriptor:
        """The projection of H_res."""
        return SinkhornDescriptor(1, self.n_streams, self.sinkhorn_iters, self.eps, SinkhornMode.EXP)

    def operands(self) -> tuple[Operand, ...]:
        """``out``, ``x_expanded``, ``h_pre``, ``h_post``, ``h_res`` and ``rmsnorm_weight``."""
        return (
            Operand("out", self.element, self.shape, writes=True),
            Operand("x_expanded", self.element, self.shape),
            *static_operands(self.n_streams),
            Operand("rmsnorm_weight", self.gamma, (self.hidden_dim,)),
        )

    def reference(
        self,
        x_expanded: np.ndarray,
        rmsnorm_weight: np.ndarray,
        h_pre: np.ndarray,
        h_post: np.ndarray,
        h_res: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray]:
        """The result in float64 before its rounding, and its magnitude: M |x| + s_post times that of y.

        See :func:`plans.hyper_connection.math.aggregate_of`.
        """
        eps = float(np.float32(self.eps))
        x, gamma, *logits = (v.astype(np.float64) for v in (x_expanded, rmsnorm_weight, h_pre, h_post, h_res))
        line = weight_line(*logits)[None]
        projection = Projection(self.sinkhorn_iters, eps, SinkhornMode.EXP)
        weights, _ = weights_of((line, np.zeros_like(line)), self.n_streams, projection)
        return mixed_of(x, weights, aggregate_of(x, weights, gamma, eps))


class HyperConnectionArgs(Arguments):
    """The tensors of one run: x_expanded and out [B, n, C], rmsnorm_weight [C], h_pre and h_post [n], h_res [n, n].

    ``out`` must not overlap any other.
    """

    def __init__(
        self,
        out: TensorMut,
        x_expanded: TensorRef,
        rmsnorm_weight: TensorRef,
        h_pre: TensorRef,
        h_post: TensorRef,
        h_res: TensorRef,
    ) -> None:
        super().__init__()
        self.out, self.x_expanded, self.rmsnorm_weight = out, x_expanded, rmsnorm_weight
        self.h_pre, self.h_post, self.h_res = h_pre, h_post, h_res

    def tensors(self) -> list[TensorRef]:
        """The operands in the order of their declaration."""
        return [self.out, self.x_expanded, self.h_pre, self.h_post, self.h_res, self.rmsnorm_weight]


def refuses(descriptor: HyperConnectionDescriptor) -> str:
    """Why the portable kernels, forward and backward, do not compute a descriptor, or ""."""
    d = descriptor
    return refuses_kinds(d.batch, d.n_streams, element=d.element, gamma=d.gamma)


def _guarantee(descriptor: HyperConnectionDescriptor) -> PrecisionGuarantee:
    n, squares = descriptor.n_streams, -(-descriptor.hidden_dim // kernel.THREADS)
    return fp32_guarantee(
        sinkhorn_units(descriptor.sinkhorn) + 2 * (n + 8) + (squares + 16) / 2 + 12,
        "M's own error; sums over n streams of products with sigmoids (n + 8, in a and again in the root); "
        "half the sum of squares' roundings (a thread's channels and 16); the root, two products and the sums 12",
    )


def _refuses_stream(d: HyperConnectionDescriptor) -> str:
    shape = shape_of(d.element, d.n_streams, d.hidden_dim)
    return refuses_stream(d.sinkhorn, d.n_streams, d.hidden_dim, d.batch, shape, element=d.element, gamma=d.gamma)


def _stream_guarantee(d: HyperConnectionDescriptor) -> PrecisionGuarantee:
    return fp32_guarantee(
        units_by_thread(d.sinkhorn) + 16 + stream_units(d.element, d.n_streams, d.n_streams, d.hidden_dim),
        "M's own error; sigmoids 8 each in a and the root; sums over streams in a and again in the root; half the sum "
        "of squares' roundings (a thread's channels, a warp, the block's warps); the root, products and sums 14",
    )


class _PortableProgram:
    """Two launches: the mixing weights into the workspace, then every sample with them."""

    def __init__(self, descriptor: HyperConnectionDescriptor, device: Device) -> None:
        d, eps = descriptor, np.float32(descriptor.eps)
        self.weigh = kernel.mixing_weights(SinkhornMode.EXP.value, extent_for(d.n_streams)).launcher((1, 1, 1))
        self.connect = kernel.connect(d.element.value, d.gamma.value).launcher((d.batch, 1, 1))
        self.weigh_scalars = (d.n_streams, d.sinkhorn_iters, eps)
        self.connect_scalars = (0, d.hidden_dim, d.n_streams, eps)

    def bind(self, args: HyperConnectionArgs, workspace: Workspace) -> list[tuple[Callable, tuple]]:
        """Both launches."""
        weights = workspace.buffer.pointer(np.float32)
        parameters = (args.h_pre.data, args.h_post.data, args.h_res.data, weights)
        streams = (args.x_expanded.data, args.rmsnorm_weight.data, weights, args.out.data)
        return [(self.weigh, (*parameters, *self.weigh_scalars)), (self.connect, (*streams, *self.connect_scalars))]


class HyperConnectionPlan(Plan):
    """Hyper-connection, static H, forward; see :class:`HyperConnectionDescriptor`."""

    name = "hyper-connection"
    skus = (
        Sku(
            name="stream",
            backend=BackendKind.VECTOR,
            arch=ArchSku.SM80,
            refuses=_refuses_stream,
            guarantee=_stream_guarantee,
            build=StaticStreamProgram,
            alignment=ALIGNMENT,
        ),
        Sku(
            name="portable",
            backend=BackendKind.PORTABLE,
            arch=ArchSku.ANY,
            refuses=refuses,
            guarantee=_guarantee,
            build=_PortableProgram,
            workspace=lambda d: 4 * weights_count(d.n_streams),
        ),
    )
