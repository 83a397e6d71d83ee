"""The gradients of hyper-connections around a sublayer F.

For example, after the forward of ``plans/hyper_connection/split.py``, from the gradient d_out of x':

    after = HyperConnectionPostBackwardDescriptor(320, 1280, 4, ElementKind.BF16)
    before = HyperConnectionPreBackwardDescriptor(320, 1280, 4, sinkhorn_iters=20, eps=1e-5, element=ElementKind.BF16)
    HyperConnectionPostBackwardPlan.select(stream, after)       # d_out -> d_streams, d_update, d_mixing
    ...                                                         # the sublayer's backward: d_update -> d_aggregate
    HyperConnectionPreBackwardPlan.select(stream, before)       # d_aggregate, d_streams, d_mixing -> d_x, parameters
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from kernels.hardware import WARP
from kernels.hyper_connection import static as forward_kernel
from kernels.hyper_connection import static_backward as kernel
from kernels.hyper_connection.dynamic_backward import column_sums
from kernels.hyper_connection.stream import SM80_BYTES, SM90_BYTES
from kernels.sinkhorn import extent_for, sinkhorn_backward
from plans.core import ArchSku, BackendKind, Device, ElementKind, Operand, Plan, PrecisionGuarantee, Sku, Workspace
from plans.hyper_connection import dynamic_stream_backward as dynamic
from plans.hyper_connection import split_stream_backward as fast
from plans.hyper_connection.common import (
    NamedArguments,
    fp32_guarantee,
    gradients_of,
    scratch_bytes,
    scratch_pointers,
    weight_line,
    weight_parts,
    weights_count,
)
from plans.hyper_connection.dynamic_backward import DynamicUnwind, dynamic_reference, own_units, unwind_scratch
from plans.hyper_connection.math import (
    TINY,
    Pair,
    Projection,
    aggregate_gradients,
    full_gradients,
    gamma_gradient,
    logit_gradients,
    weight_shares,
    x_gradient,
)
from plans.hyper_connection.split import (
    HyperConnectionPostDescriptor,
    HyperConnectionPreDescriptor,
    refuses_post,
    refuses_pre,
)
from plans.hyper_connection.stream import ALIGNMENT
from plans.sinkhorn import gradient_units

_F32 = ElementKind.F32


class HyperConnectionPostBackwardDescriptor(HyperConnectionPostDescriptor):
    """The gradients of x, update and mixing for that of out, g = ``d_out``.

    d_streams_j = sum_i M_ij g_i; d_update = sum_i s_post[i] g_i; ``d_mixing``, in the order of ``mixing``: 0 for s_pre,
    sum_c g_i update for s_post, sum_c g_i x_j for M; where there is one line for all samples, summed over them.
    d_streams and d_update have kind ``element``, d_mixing is fp32.
    """

    def operands(self) -> tuple[Operand, ...]:
        """``d_streams``, ``d_update``, ``d_mixing``, ``d_out``, and what the forward reads."""
        _, x, update, mixing = super().operands()
        return (
            Operand("d_streams", self.element, self.shape, writes=True),
            Operand("d_update", self.element, update.shape, writes=True),
            Operand("d_mixing", _F32, mixing.shape, writes=True),
            Operand("d_out", self.element, self.shape),
            x,
            update,
            mixing,
        )

    def reference(
        self, d_out: np.ndarray, x_expanded: np.ndarray, update: np.ndarray, mixing: np.ndarray
    ) -> dict[str, Pair]:
        """By gradient: its value in float64 before its rounding, and its magnitude."""
        d, x, y, weights = (v.astype(np.float64) for v in (d_out, x_expanded, update, mixing))
        # The whole connection has gamma a / r in the place of the update; its other gradients are the same.
        found = full_gradients(d, x, weights, np.ones(self.hidden_dim), 1.0)
        lines = []
        for whole, streams, line in zip(found.weights, (d, np.abs(d)), (y, np.abs(y)), strict=True):
            pre, _, mixing_part = weight_parts(whole, self.n_streams)
            made = weight_line(np.zeros_like(pre), np.einsum("bic,bc->bi", streams, line), mixing_part)
            lines.append(made if self.per_sample else made.sum(0, keepdims=True))
        return {
            "d_streams": (found.carried[0], found.carried[1] + TINY),
            "d_update": (found.d_y[0], found.d_y[1] + TINY),
            "d_mixing": (lines[0], lines[1] + TINY),
        }


class HyperConnectionPreBackwardDescriptor(HyperConnectionPreDescriptor):
    """The gradients of x and all parameters for those of aggregate, of mixing, and of x by the way of the streams.

    da is ``d_aggregate``, with a norm (gamma d_aggregate - u mean(gamma d_aggregate u)) / r for u = a / r;
    d_x_j = d_streams_j + s_pre[j] da; s_pre's gradient is d_mixing's and sum_c da x_i; then as
    :class:`plans.hyper_connection.static_backward.HyperConnectionBackwardDescriptor` or, for a dynamic H,
    :class:`plans.hyper_connection.dynamic_backward.DynamicHyperConnectionBackwardDescriptor` say. ``d_x`` may be
    ``d_streams`` itself.
    """

    def operands(self) -> tuple[Operand, ...]:
        """``d_x``, the parameters' gradients, three incoming gradients, and what the forward kept and read."""
        aggregate, *_ = super().operands()
        kept = tuple(Operand(operand.name, _F32, operand.shape) for operand in self.kept)
        gamma = tuple(Operand("d_gamma", _F32, operand.shape, writes=True) for operand in self.norm)
        return (
            Operand("d_x", self.element, self.shape, writes=True, may_alias="d_streams"),
            *gamma,
            *gradients_of(self.parameters),
            Operand("d_aggregate", self.element, aggregate.shape),
            Operand("d_mixing", _F32, kept[-1].shape),
            Operand("d_streams", self.element, self.shape),
            *kept,
            Operand("x_expanded", self.element, self.shape),
            *self.parameters,
            *self.norm,
        )

    def reference(self, x_expanded: np.ndarray, **arrays: np.ndarray) -> dict[str, Pair]:
        """By gradient: its value in float64 before its rounding, and its magnitude."""
        arrays = {name: array.astype(np.float64) for name, array in arrays.items()}
        x, n, eps, own = x_expanded.astype(np.float64), self.n_streams, float(np.float32(self.eps)), own_units(self)
        weights, d, carried = arrays["mixing"], arrays["d_aggregate"], arrays["d_streams"]
        u, d_a = aggregate_gradients((d, np.abs(d)), x, weights, arrays.get("rmsnorm_weight"), eps)
        shares = weight_shares(d_a, x)
        carried = carried, np.abs(carried)
        parameters = [arrays[operand.name] for operand in self.parameters]
        if self.projection is None:
            line = weight_line(*parameters)[None]
            d_weights = _with_pre_shares(arrays["d_mixing"], shares, n, sums=True)
            projection = Projection(self.sinkhorn_iters, eps, self.mode, 0.0, gradient_units(self.sinkhorn) / own)
            found = logit_gradients((line, np.zeros_like(line)), d_weights, n, projection)
            pairs = zip(*(weight_parts(part[0], n) for part in found), strict=True)
        else:
            d_weights = _with_pre_shares(arrays["d_mixing"], shares, n, sums=False)
            rows, alpha, bias = parameters
            found = dynamic_reference(self, d_weights, x, rows, arrays["projected"], alpha, bias, own)
            pairs = (found.projection, found.alpha, found.bias)
            carried = tuple(c + t for c, t in zip(carried, found.through, strict=True))
        gradients = {f"d_{operand.name}": pair for operand, pair in zip(self.parameters, pairs, strict=True)}
        gamma = {"d_gamma": gamma_gradient(((d, np.abs(d)), u))} if self.norm else {}
        return {"d_x": x_gradient(carried, d_a, weights), **gamma, **gradients}


def _with_pre_shares(d_mixing: np.ndarray, shares: Pair, n: int, sums: bool) -> Pair:
    """The gradient of the mixing weights with the samples' shares of s_pre, or their sum, added."""
    found = []
    for line, share in zip((d_mixing, np.abs(d_mixing)), shares, strict=True):
        line = line.copy()
        line[:, :n] += share.sum(0, keepdims=True) if sums else share
        found.append(line)
    return found[0], found[1]


def _post_units(d: HyperConnectionPostDescriptor) -> float:
    """A sum over streams; a lane's channels, a warp's and a block's sums, and a thread's samples."""
    samples = 0 if d.per_sample else -(-d.batch // forward_kernel.THREADS) + 16
    return max(d.n_streams + 3, -(-d.hidden_dim // WARP) + 8 + samples)


def _post_guarantee(d: HyperConnectionPostDescriptor) -> PrecisionGuarantee:
    return fp32_guarantee(_post_units(d), "sums over streams; or a lane's channels and a warp's sum, then the samples")


def _pre_guarantee(d: HyperConnectionPreDescriptor) -> PrecisionGuarantee:
    return fp32_guarantee(own_units(d), "as in the gradient of the whole connection, whose steps these are")


class _PostPortable:
    """One launch, and one more where the weights are the same for all samples."""

    def __init__(self, descriptor: HyperConnectionPostBackwardDescriptor, device: Device) -> None:
        self.descriptor = d = descriptor
        self.mix = kernel.mix_backward(d.element.value).launcher((d.batch, 1, 1))
        self.sum = column_sums().launcher((weights_count(d.n_streams), 1, 1))

    def bind(self, args: NamedArguments, workspace: Workspace) -> list[tuple[Callable, tuple]]:
        """The launches."""
        d, m = self.descriptor, weights_count(self.descriptor.n_streams)
        shares = args["d_mixing"] if d.per_sample else scratch_pointers(workspace, _post_scratch(d))[0]
        read = (args["x_expanded"], args["update"], args["d_out"], args["mixing"])
        written = (args["d_streams"], args["d_update"], shares)
        launches = [(self.mix, (*read, *written, m if d.per_sample else 0, d.hidden_dim, d.n_streams))]
        return launches if d.per_sample else [*launches, (self.sum, (shares, args["d_mixing"], m, d.batch))]


def _post_scratch(d: HyperConnectionPostDescriptor) -> dict[str, int]:
    return {} if d.per_sample else {"shares": d.batch * weights_count(d.n_streams)}


class _PrePortable:
    """The samples' shares of s_pre, back through the mixing weights, d_x and the sums over samples."""

    def __init__(self, descriptor: HyperConnectionPreBackwardDescriptor, device: Device) -> None:
        self.descriptor = d = descriptor
        gamma = None if d.gamma is None else d.gamma.value
        projection = None if d.projection is None else d.projection.value
        self.shares = kernel.shares("pre", d.element.value, gamma).launcher((d.batch, 1, 1))
        self.spread = kernel.spread("pre", d.element.value, gamma, projection).launcher((d.batch, 1, 1))
        self.gamma = kernel.gamma_gradient().launcher((-(-d.hidden_dim // forward_kernel.THREADS), 1, 1))
        if projection is None:
            self.sum_shares = kernel.sum_shares(True).launcher((weights_count(d.n_streams), 1, 1))
            self.unwind = sinkhorn_backward(d.mode.value, extent_for(d.n_streams)).launcher((1, 1, 1))
        else:
            self.unwind = DynamicUnwind(d)

    def bind(self, args: NamedArguments, workspace: Workspace) -> list[tuple[Callable, tuple]]:
        """All launches."""
        d, n, eps = self.descriptor, self.descriptor.n_streams, np.float32(self.descriptor.eps)
        lines, roots, shares, *scratch = scratch_pointers(workspace, _pre_scratch(d))
        x, mixing = args["x_expanded"], args["mixing"]
        gamma = args["rmsnorm_weight"] if d.norm else x
        if d.projection is None:
            pitch, unwinding, through = 0, self._static(args, shares, *scratch), (roots, roots)
        else:
            pitch = weights_count(n)
            unwinding = self.unwind.bind(args, shares, args["d_mixing"], n, tuple(scratch))
            through = (args["projection"], scratch[1])
        sizes = (pitch, d.hidden_dim, n)
        spread = (x, gamma, args["d_streams"], mixing, lines, roots, *through, args["d_x"], *sizes)
        launches = [
            (self.shares, (x, gamma, args["d_aggregate"], mixing, lines, roots, shares, *sizes, eps)),
            *unwinding,
            (self.spread, spread),
        ]
        return [*launches, (self.gamma, (lines, args["d_gamma"], d.hidden_dim, d.batch))] if d.norm else launches

    def _static(self, args: NamedArguments, shares: object, d_res: object, entered: object) -> list:
        d, n = self.descriptor, self.descriptor.n_streams
        h_pre, h_post, h_res = (args[operand.name] for operand in d.parameters)
        sums = (shares, args["d_mixing"], h_pre, h_post, d_res, args["d_h_pre"], args["d_h_post"], n, n, d.batch)
        sinkhorn = (n, d.sinkhorn_iters, np.float32(d.eps))
        return [(self.sum_shares, sums), (self.unwind, (h_res, d_res, args["d_h_res"], entered, *sinkhorn))]


def _pre_scratch(d: HyperConnectionPreDescriptor) -> dict[str, int]:
    cells = d.n_streams**2
    more = {"d_res": cells, "entered": d.sinkhorn_iters * cells} if d.projection is None else unwind_scratch(d)
    return {
        "lines": 2 * d.batch * d.hidden_dim,
        "roots": 2 * d.batch,
        "shares": d.batch * d.n_streams,
        **more,
    }


_STREAM_ROWS = (("stream", ArchSku.SM80, SM80_BYTES), ("stream, large", ArchSku.SM90A, SM90_BYTES))
"""A SKU's name and architecture, and the shared memory that its samples may take."""


def _pre_stream_sku(name: str, arch: ArchSku, most_bytes: int) -> Sku:
    return Sku(
        name=name,
        backend=BackendKind.VECTOR,
        arch=arch,
        refuses=lambda d: fast.refuses_pre(d, most_bytes),
        guarantee=lambda d: fp32_guarantee(fast.pre_units(d, most_bytes, own_units(d)), fast.DERIVATION),
        build=lambda d, device: fast.PreStreamProgram(d, most_bytes, device),
        workspace=lambda d: fast.pre_workspace(d, most_bytes),
        alignment=ALIGNMENT,
    )


def _post_stream_sku(name: str, arch: ArchSku, most_bytes: int) -> Sku:
    return Sku(
        name=name,
        backend=BackendKind.VECTOR,
        arch=arch,
        refuses=lambda d: fast.refuses_post(d, most_bytes),
        guarantee=lambda d: fp32_guarantee(fast.post_units(d, most_bytes), fast.DERIVATION),
        build=lambda d, device: fast.PostStreamProgram(d, most_bytes, device),
        workspace=lambda d: fast.post_workspace(d, most_bytes),
        alignment=ALIGNMENT,
    )


class HyperConnectionPreBackwardPlan(Plan):
    """The gradient of what comes before the sublayer; see :class:`HyperConnectionPreBackwardDescriptor`."""

    name = "hyper-connection pre backward"
    skus = (
        *(_pre_stream_sku(*row) for row in _STREAM_ROWS),
        Sku(
            name="mma and stream",
            backend=BackendKind.MMA,
            arch=ArchSku.SM80,
            refuses=lambda d: "takes a dynamic H" if d.projection is None else dynamic.refuses("pre", d),
            guarantee=lambda d: fp32_guarantee(dynamic.units("pre", d, own_units(d)), dynamic.DERIVATION),
            build=lambda d, device: dynamic.DynamicStreamBackwardProgram("pre", d, device),
            workspace=dynamic.workspace,
            alignment=ALIGNMENT,
        ),
        Sku(
            name="portable",
            backend=BackendKind.PORTABLE,
            arch=ArchSku.ANY,
            refuses=refuses_pre,
            guarantee=_pre_guarantee,
            build=_PrePortable,
            workspace=lambda d: scratch_bytes(_pre_scratch(d)),
        ),
    )


class HyperConnectionPostBackwardPlan(Plan):
    """The gradient of what comes after the sublayer; see :class:`HyperConnectionPostBackwardDescriptor`."""

    name = "hyper-connection post backward"
    skus = (
        *(_post_stream_sku(*row) for row in _STREAM_ROWS),
        Sku(
            name="portable",
            backend=BackendKind.PORTABLE,
            arch=ArchSku.ANY,
            refuses=refuses_post,
            guarantee=_post_guarantee,
            build=_PostPortable,
            workspace=lambda d: scratch_bytes(_post_scratch(d)),
        ),
    )
