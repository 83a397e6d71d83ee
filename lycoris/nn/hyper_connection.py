"""A sublayer between n residual streams: manifold-constrained hyper-connections, DeepSeek-AI, arXiv:2512.24880.

    block = HyperConnection(MLP(width, 4 * width), n_streams=4, hidden_dim=width)
    streams = block(streams)                       # [..., 4, width]: M x + s_post F(s_pre x)

What is computed, and from what, is in docs/hyper_connections.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from lycoris import tensor
from lycoris.errors import RefusedInput
from lycoris.nn.module import Module
from lycoris.tensor import Generator, Tensor, autograd
from lycoris.tensor.launch import F32, compact, empty, run, same_device, shaped, zeros
from plans.core import Device, ElementKind, Plan
from plans.hyper_connection.common import KINDS, NamedArguments, weights_count
from plans.hyper_connection.split import (
    HyperConnectionPostDescriptor,
    HyperConnectionPostPlan,
    HyperConnectionPreDescriptor,
    HyperConnectionPrePlan,
)
from plans.hyper_connection.split_backward import (
    HyperConnectionPostBackwardDescriptor,
    HyperConnectionPostBackwardPlan,
    HyperConnectionPreBackwardDescriptor,
    HyperConnectionPreBackwardPlan,
)
from plans.sinkhorn import SinkhornMode

_ALPHA, _PROJECTION_DEVIATION, _RESIDUAL_DEVIATION = 0.01, 0.02, 0.01


class HyperConnection(Module):
    """x' = M x + s_post F(s_pre x) for streams x [..., n, C], with F a layer that keeps [..., C].

    Without ``hidden_dim`` the mixing weights are static, made of ``h_pre`` [n], ``h_post`` [n] and ``h_res`` [n, n].
    With it they are made for every sample from its streams, by ``projection`` [n (n + 2), n C], ``alpha`` [3] and
    ``bias`` [n (n + 2)]. As in mHC.cu's layer.py bias, h_pre and h_post start at 0, alpha at 0.01, h_res and the
    projection as normal numbers with deviations 0.01 and 0.02; all but the projection, of ``kind``, are fp32. Equal
    streams stay equal with a static H: give the first connection streams that differ, or use a dynamic H.
    With a ``norm_weight`` [C], a tensor, F is given the RMS-normalised s_pre x. ``mode`` is Sinkhorn's
    (`plans.sinkhorn.SinkhornMode`).

    Raises RefusedInput where streams or the norm's weight have another shape or a kind that is not fp32 or bf16, and
    plans.core.PlanError for sizes that contradict themselves.
    """

    def __init__(
        self,
        sublayer: Callable[[Tensor], Tensor],
        n_streams: int,
        hidden_dim: int | None = None,
        *,
        norm_weight: Tensor | None = None,
        sinkhorn_iters: int = 20,
        eps: float = 1e-5,
        mode: SinkhornMode = SinkhornMode.EXP,
        kind: ElementKind = F32,
        device: Device | None = None,
        generator: Generator | None = None,
    ) -> None:
        if n_streams < 1:
            raise RefusedInput(f"HyperConnection: {n_streams} streams, wanted 1 or more; give another number")
        # Settings that contradict themselves are refused here, not at the first call.
        channels = n_streams if hidden_dim is None else hidden_dim
        HyperConnectionPreDescriptor(1, channels, n_streams, sinkhorn_iters, eps, kind)
        self.sublayer, self.norm_weight = sublayer, norm_weight
        self.n_streams, self.hidden_dim = n_streams, hidden_dim
        self.sinkhorn_iters, self.eps, self.mode = sinkhorn_iters, eps, mode
        options = {"device": device, "requires_grad": True}
        if hidden_dim is None:
            self.h_pre = tensor.zeros((n_streams,), **options)
            self.h_post = tensor.zeros((n_streams,), **options)
            self.h_res = tensor.randn((n_streams, n_streams), 0.0, _RESIDUAL_DEVIATION, generator=generator, **options)
        else:
            m = weights_count(n_streams)
            self.projection = tensor.randn(
                (m, n_streams * hidden_dim), 0.0, _PROJECTION_DEVIATION, kind=kind, generator=generator, **options
            )
            self.alpha = tensor.full((3,), _ALPHA, **options)
            self.bias = tensor.zeros((m,), **options)

    def forward(self, x: Tensor) -> Tensor:
        """The streams after the sublayer, of x's shape and kind."""
        self._check(x)
        shape = (math.prod(x.shape[:-2]), *x.shape[-2:])
        connection = _Connection(self._descriptor(shape, x.kind), x, self._parameters(), self.norm_weight)
        aggregate, mixing = connection.before()
        lead = x.shape[:-2]
        update = self.sublayer(tensor.reshape(aggregate, *lead, shape[2]))
        if update.shape != (*lead, shape[2]) or update.kind is not x.kind:
            raise RefusedInput(
                f"HyperConnection: the sublayer gave {update.kind.value} of shape {update.shape}, wanted "
                f"{x.kind.value} of {(*lead, shape[2])}; return what x is"
            )
        return tensor.reshape(connection.after(tensor.reshape(update, shape[0], shape[2]), mixing), *x.shape)

    def _check(self, x: Tensor) -> None:
        wanted = (self.n_streams, self.hidden_dim or (x.shape[-1] if x.shape else 0))
        if x.ndim < 2 or x.shape[-2:] != wanted or not x.size:
            raise RefusedInput(
                f"HyperConnection: streams of shape {x.shape}, wanted [..., {wanted[0]}, {wanted[1]}], none empty; "
                "reshape them first"
            )
        if x.kind not in KINDS:
            raise RefusedInput(f"HyperConnection: streams of {x.kind.value}, wanted f32 or bf16; convert them first")
        weight = self.norm_weight
        if weight is not None and (weight.shape != x.shape[-1:] or weight.kind not in KINDS):
            raise RefusedInput(
                f"HyperConnection: norm_weight is {weight.kind.value} of shape {weight.shape}, wanted f32 or bf16 of "
                f"{x.shape[-1:]}; give the layer's own"
            )

    def _descriptor(self, shape: tuple[int, int, int], element: ElementKind) -> HyperConnectionPreDescriptor:
        batch, n, channels = shape
        gamma = None if self.norm_weight is None else self.norm_weight.kind
        projection = None if self.hidden_dim is None else self.projection.kind
        settings = (self.sinkhorn_iters, self.eps, element, gamma, projection, self.mode)
        return HyperConnectionPreDescriptor(batch, channels, n, *settings)

    def _parameters(self) -> dict[str, Tensor]:
        names = ("h_pre", "h_post", "h_res") if self.hidden_dim is None else ("projection", "alpha", "bias")
        return {name: getattr(self, name) for name in names}


def _whole(x: Tensor) -> Tensor:
    """A tensor as the fast kernels read it: contiguous, at a multiple of 16 bytes; itself or a copy."""
    x = compact(x)
    return x if x.aligned else x.clone()


class _Connection:
    """One pass through the streams, and its way back.

    The graph has three nodes of ours. The mixing weights' is made first and so walked last: it finishes the gradients
    of x and the parameters from what the two others, the aggregate's and the result's, leave here in the same walk.
    """

    def __init__(
        self,
        descriptor: HyperConnectionPreDescriptor,
        x: Tensor,
        parameters: dict[str, Tensor],
        norm_weight: Tensor | None,
    ) -> None:
        self._pre, self._source = descriptor, x
        self._inputs = parameters | ({} if norm_weight is None else {"rmsnorm_weight": norm_weight})
        same_device("HyperConnection", (x, *self._inputs.values()))
        self._read = {name: _whole(part.detach()) for name, part in self._inputs.items()}
        self._read["x_expanded"] = shaped(_whole(x.detach()), descriptor.shape)
        self._kept: dict[str, Tensor] = {}
        self._d_aggregate: Tensor | None = None
        self._d_streams: Tensor | None = None

    def _run(self, plan_class: type[Plan], descriptor: object, read: dict[str, Tensor], **written: Tensor) -> dict:
        """Run a plan; gives what it wrote by name, newly made but for what is ``written`` over."""
        device, tensors = self._source.device, dict(written)
        for operand in descriptor.operands():
            if operand.writes and operand.name not in tensors:
                tensors[operand.name] = empty(operand.shape, operand.element, device)
        names = {operand.name: operand.writes for operand in descriptor.operands()}
        refs = {name: tensors[name].mut() if writes else read[name].ref() for name, writes in names.items()}
        run(plan_class.select(None, descriptor, device=device), NamedArguments(descriptor, **refs))
        return tensors

    def before(self) -> tuple[Tensor, Tensor]:
        """The sublayer's input [B, C], and the mixing weights."""
        made = self._run(HyperConnectionPrePlan, self._pre, self._read)
        aggregate = made.pop("aggregate")
        self._kept, mixing = made, made["mixing"].detach()
        inputs = (self._source, *self._inputs.values())
        if not autograd.wanted(inputs):
            return aggregate, mixing
        saved = (*self._read.values(), *made.values())
        mixing = autograd.record("hyper_connection weights", mixing, inputs, saved, self._pull_weights)
        return autograd.record("hyper_connection before", aggregate, (mixing,), (), self._pull_aggregate), mixing

    def after(self, update: Tensor, mixing: Tensor) -> Tensor:
        """The streams mixed, with the sublayer's output added."""
        d = self._pre
        sizes = (d.batch, d.hidden_dim, d.n_streams, d.element, d.projection is not None)
        descriptor = HyperConnectionPostDescriptor(*sizes)
        read = {
            "x_expanded": self._read["x_expanded"],
            "update": _whole(update.detach()),
            "mixing": self._kept["mixing"],
        }
        out = self._run(HyperConnectionPostPlan, descriptor, read)["out"]
        if not autograd.wanted((update, mixing)):
            return out
        backward = HyperConnectionPostBackwardDescriptor(*sizes)

        def pull(g: Tensor, edges: Sequence[autograd.Node | None]) -> list[Tensor | None]:
            found = self._run(HyperConnectionPostBackwardPlan, backward, read | {"d_out": _whole(g)})
            self._d_streams = found["d_streams"]
            return [found["d_update"], found["d_mixing"]]

        return autograd.record("hyper_connection", out, (update, mixing), tuple(read.values()), pull)

    def _pull_aggregate(self, g: Tensor, edges: Sequence[autograd.Node | None]) -> list[Tensor | None]:
        self._d_aggregate = _whole(g)
        return [zeros(self._kept["mixing"].shape, F32, g.device)]

    def _pull_weights(self, g: Tensor, edges: Sequence[autograd.Node | None]) -> list[Tensor | None]:
        d, device = self._pre, g.device
        d_aggregate, self._d_aggregate = self._d_aggregate, None
        d_streams, self._d_streams = self._d_streams, None
        if d_aggregate is None:
            d_aggregate = zeros((d.batch, d.hidden_dim), d.element, device)
        if d_streams is None:
            d_streams = zeros(d.shape, d.element, device)
        incoming = {"d_aggregate": d_aggregate, "d_mixing": _whole(g), "d_streams": d_streams}
        fields = (d.batch, d.hidden_dim, d.n_streams, d.sinkhorn_iters, d.eps, d.element, d.gamma, d.projection, d.mode)
        backward = HyperConnectionPreBackwardDescriptor(*fields)
        read = self._read | self._kept | incoming
        # Nothing else refers to the streams' part, so that the whole gradient takes its place.
        found = self._run(HyperConnectionPreBackwardPlan, backward, read, d_x=d_streams)
        names = ["d_gamma" if name == "rmsnorm_weight" else f"d_{name}" for name in self._inputs]
        return [shaped(found["d_x"], self._source.shape), *(found[name] for name in names)]
