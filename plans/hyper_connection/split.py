"""Hyper-connections around a sublayer F, forward: what comes before it and what comes after.

For example, x' = M x + s_post F(s_pre x):

    before = HyperConnectionPreDescriptor(320, 1280, 4, sinkhorn_iters=20, eps=1e-5, element=ElementKind.BF16)
    after = HyperConnectionPostDescriptor(320, 1280, 4, ElementKind.BF16)
    HyperConnectionPrePlan.select(stream, before).run(stream, workspace, NamedArguments(before, **tensors))
    ...                                                     # the sublayer: aggregate -> update
    HyperConnectionPostPlan.select(stream, after).run(stream, None, NamedArguments(after, **tensors))

DeepSeek-AI, arXiv:2512.24880. The gradients are in ``plans/hyper_connection/split_backward.py``.
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
    Workspace,
)
from plans.hyper_connection import dynamic_stream as fast
from plans.hyper_connection.common import (
    NamedArguments,
    check_streams,
    dynamic_operands,
    fp32_guarantee,
    refuses_kinds,
    scratch_bytes,
    scratch_pointers,
    static_operands,
    weight_line,
    weights_count,
)
from plans.hyper_connection.dynamic import (
    DynamicWeights,
    dynamic_weights,
    projected_units,
    stream_units,
    weight_units,
)
from plans.hyper_connection.math import Pair, Projection, aggregate_of, mixed_of, weights_of
from plans.hyper_connection.stream import ALIGNMENT, Stream, refuses_stream, shape_of
from plans.hyper_connection.stream import stream_units as fast_stream_units
from plans.sinkhorn import SinkhornDescriptor, SinkhornMode, check_sinkhorn, sinkhorn_units, units_by_thread

_F32 = ElementKind.F32


@dataclass(frozen=True)
class HyperConnectionPreDescriptor:
    """aggregate = sum_i s_pre[i] x[i] of ``batch`` samples x [n_streams, hidden_dim], and the mixing weights.

    With a ``gamma`` (the kind of the norm's weight) aggregate = gamma a / sqrt(mean(a**2) + eps) for that sum a.
    With no ``projection`` H is static: s_pre = sigmoid(h_pre), s_post = 2 sigmoid(h_post), M = Sinkhorn(h_res), and
    ``mixing`` [1, n (n + 2)] is s_pre, s_post and M's rows. With a ``projection`` (the kind of that operand) H is
    dynamic, as :class:`plans.hyper_connection.dynamic.DynamicHyperConnectionDescriptor` says, ``mixing`` has a line a
    sample, and ``projected`` is kept for the backward. ``element`` is the kind of x and aggregate; kinds are fp32 or
    bf16, mixing parameters and arithmetic fp32. In mode SOFTMAX eps is added to s_pre.
    """

    batch: int
    hidden_dim: int
    n_streams: int
    sinkhorn_iters: int
    eps: float
    element: ElementKind
    gamma: ElementKind | None = None
    projection: ElementKind | None = None
    mode: SinkhornMode = SinkhornMode.EXP

    category = OpCategory.HYPER_CONNECTION

    def __post_init__(self) -> None:
        check_streams("hyper-connection pre", self.batch, self.hidden_dim, self.n_streams)
        check_sinkhorn("hyper-connection pre", self.sinkhorn_iters, self.eps)

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape of x."""
        return (self.batch, self.n_streams, self.hidden_dim)

    @property
    def lines(self) -> int:
        """How many lines of mixing weights there are."""
        return 1 if self.projection is None else self.batch

    @property
    def sinkhorn(self) -> SinkhornDescriptor:
        """The projection of H_res."""
        return SinkhornDescriptor(self.lines, self.n_streams, self.sinkhorn_iters, self.eps, self.mode)

    @property
    def parameters(self) -> tuple[Operand, ...]:
        """``h_pre``, ``h_post`` and ``h_res``, or ``projection``, ``alpha`` and ``bias``."""
        if self.projection is None:
            return static_operands(self.n_streams)
        return dynamic_operands(self.n_streams, self.hidden_dim, self.projection)

    @property
    def norm(self) -> tuple[Operand, ...]:
        """``rmsnorm_weight``, where there is one."""
        return () if self.gamma is None else (Operand("rmsnorm_weight", self.gamma, (self.hidden_dim,)),)

    @property
    def kept(self) -> tuple[Operand, ...]:
        """``projected``, where H is dynamic, and ``mixing``."""
        m = weights_count(self.n_streams)
        projected = (Operand("projected", _F32, (self.batch, m + 1), writes=True),)
        return (*projected[: self.projection is not None], Operand("mixing", _F32, (self.lines, m), writes=True))

    def operands(self) -> tuple[Operand, ...]:
        """``aggregate``, what is kept, ``x_expanded``, the mixing parameters, ``rmsnorm_weight``."""
        return (
            Operand("aggregate", self.element, (self.batch, self.hidden_dim), writes=True),
            *self.kept,
            Operand("x_expanded", self.element, self.shape),
            *self.parameters,
            *self.norm,
        )

    def reference(self, x_expanded: np.ndarray, **arrays: np.ndarray) -> dict[str, Pair]:
        """By result: its value in float64 before its rounding, and its magnitude.

        Given ``projected`` and ``mixing`` as they were stored, what follows them is computed from them.
        """
        arrays = {name: array.astype(np.float64) for name, array in arrays.items()}
        x, eps, gamma = x_expanded.astype(np.float64), float(np.float32(self.eps)), arrays.get("rmsnorm_weight")
        parameters = [arrays[operand.name] for operand in self.parameters]
        if self.projection is None:
            line = weight_line(*parameters)[None]
            ratio = sinkhorn_units(self.sinkhorn) / _pre_units(self)
            projection = Projection(self.sinkhorn_iters, eps, self.mode, ratio)
            found = {"mixing": weights_of((line, np.zeros_like(line)), self.n_streams, projection)}
        else:
            found = dynamic_weights(self, x, *parameters, _pre_units(self), arrays.get("projected"))
        weights = arrays.get("mixing", found["mixing"][0])
        return {"aggregate": aggregate_of(x, weights, gamma, eps), **found}


@dataclass(frozen=True)
class HyperConnectionPostDescriptor:
    """out = M x + s_post update, of ``batch`` samples x [n_streams, hidden_dim] and update [hidden_dim].

    ``mixing`` are the weights as :class:`HyperConnectionPreDescriptor` makes them: a line for all samples, or where
    they are ``per_sample`` one each. x, update and out are of kind ``element``, fp32 or bf16; arithmetic is fp32.
    """

    batch: int
    hidden_dim: int
    n_streams: int
    element: ElementKind
    per_sample: bool = False

    category = OpCategory.HYPER_CONNECTION

    def __post_init__(self) -> None:
        check_streams("hyper-connection post", self.batch, self.hidden_dim, self.n_streams)

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape of x and out."""
        return (self.batch, self.n_streams, self.hidden_dim)

    @property
    def mixing_shape(self) -> tuple[int, int]:
        """The shape of ``mixing``."""
        return (self.batch if self.per_sample else 1, weights_count(self.n_streams))

    def operands(self) -> tuple[Operand, ...]:
        """``out``, ``x_expanded``, ``update`` and ``mixing``."""
        return (
            Operand("out", self.element, self.shape, writes=True),
            Operand("x_expanded", self.element, self.shape),
            Operand("update", self.element, (self.batch, self.hidden_dim)),
            Operand("mixing", _F32, self.mixing_shape),
        )

    def reference(self, x_expanded: np.ndarray, update: np.ndarray, mixing: np.ndarray) -> dict[str, Pair]:
        """``out`` in float64 before its rounding, and its magnitude M |x| + s_post |update|."""
        x, y, weights = (v.astype(np.float64) for v in (x_expanded, update, mixing))
        return {"out": mixed_of(x, weights, (y, np.abs(y)))}


def refuses_pre(d: HyperConnectionPreDescriptor) -> str:
    """Why the portable kernels, forward and backward, do not compute a descriptor, or ""."""
    return refuses_kinds(d.batch, d.n_streams, element=d.element, gamma=d.gamma, projection=d.projection)


def refuses_post(d: HyperConnectionPostDescriptor) -> str:
    """Why the portable kernels, forward and backward, do not compute a descriptor, or ""."""
    return refuses_kinds(d.batch, d.n_streams, element=d.element)


def _pre_units(d: HyperConnectionPreDescriptor) -> float:
    projecting = projected_units(d.n_streams * d.hidden_dim) if d.projection is not None else 0.0
    return max(projecting, weight_units(), stream_units(d.n_streams, d.hidden_dim))


def _pre_guarantee(d: HyperConnectionPreDescriptor) -> PrecisionGuarantee:
    return fp32_guarantee(
        _pre_units(d),
        "as in the whole connection, each result for those before it as they were stored: P, a lane's products and a "
        "warp's sum; sigmoids and a logit 12; the aggregate, sums over streams and half the sum of squares' roundings",
    )


def _pre_stream_guarantee(d: HyperConnectionPreDescriptor) -> PrecisionGuarantee:
    # The reference counts M's error as sinkhorn_units over the portable kernel's other units.
    ratio = units_by_thread(d.sinkhorn) / sinkhorn_units(d.sinkhorn)
    n = d.n_streams
    return fp32_guarantee(
        max(_pre_units(d) * max(1.0, ratio), fast_stream_units(d.element, n, n, d.hidden_dim)),
        "as the portable kernels', M's error with a reciprocal and a product a step instead of a division; sums over "
        "streams, and half the sum of squares' roundings",
    )


def _post_guarantee(d: HyperConnectionPostDescriptor) -> PrecisionGuarantee:
    return fp32_guarantee(d.n_streams + 3, "a sum over n streams, and the update's product and sum")


def _refuses_pre_stream(d: HyperConnectionPreDescriptor) -> str:
    if d.projection is not None:
        return "takes a static H"
    shape = shape_of(d.element, d.n_streams, d.hidden_dim)
    return refuses_stream(d.sinkhorn, d.n_streams, d.hidden_dim, d.batch, shape, element=d.element, gamma=d.gamma)


def _refuses_post_stream(d: HyperConnectionPostDescriptor) -> str:
    shape = shape_of(d.element, d.n_streams + 1, d.hidden_dim)
    return refuses_stream(None, d.n_streams, d.hidden_dim, d.batch, shape, element=d.element)


class _PreStream:
    """One launch: every block makes the mixing weights and walks over samples; the first writes the weights."""

    def __init__(self, descriptor: HyperConnectionPreDescriptor, device: Device) -> None:
        self.descriptor = d = descriptor
        self.stream = Stream("pre", d.element, d.gamma, d.shape, d.mode.value, device)

    def bind(self, args: NamedArguments, workspace: Workspace) -> list[tuple[Callable, tuple]]:
        """The launch."""
        d = self.descriptor
        gamma = args["rmsnorm_weight"] if d.norm else None
        logits = tuple(args[operand.name] for operand in d.parameters)
        streams = (args["x_expanded"], args["mixing"], args["aggregate"], d.eps)
        return [self.stream.bind(*streams, gamma, None, logits, d.sinkhorn_iters)]


class _PostStream:
    """One launch."""

    def __init__(self, descriptor: HyperConnectionPostDescriptor, device: Device) -> None:
        d = descriptor
        self.stream = Stream("post", d.element, None, d.shape, None if d.per_sample else "given", device)

    def bind(self, args: NamedArguments, workspace: Workspace) -> list[tuple[Callable, tuple]]:
        """The launch."""
        return [self.stream.bind(args["x_expanded"], args["mixing"], args["out"], 0.0, y=args["update"])]


class _PrePortable:
    """Two launches, three where H is dynamic: the mixing weights, then every sample's aggregate."""

    def __init__(self, descriptor: HyperConnectionPreDescriptor, device: Device) -> None:
        self.descriptor = d = descriptor
        if d.projection is None:
            self.weigh = kernel.mixing_weights(d.mode.value, extent_for(d.n_streams)).launcher((1, 1, 1))
        else:
            self.weigh = DynamicWeights(d)
        gamma = None if d.gamma is None else d.gamma.value
        self.aggregate = kernel.aggregate(d.element.value, gamma).launcher((d.batch, 1, 1))

    def bind(self, args: NamedArguments, workspace: Workspace) -> list[tuple[Callable, tuple]]:
        """All launches."""
        d, x, mixing, eps = self.descriptor, args["x_expanded"], args["mixing"], np.float32(self.descriptor.eps)
        gamma = args["rmsnorm_weight"] if d.norm else x
        pitch = 0 if d.projection is None else weights_count(d.n_streams)
        streams = (x, gamma, mixing, args["aggregate"], pitch, d.hidden_dim, d.n_streams, eps)
        if d.projection is None:
            parameters = (args[operand.name] for operand in d.parameters)
            weighing = [(self.weigh, (*parameters, mixing, d.n_streams, d.sinkhorn_iters, eps))]
        else:
            weighing = self.weigh.bind(args, *scratch_pointers(workspace, _pre_scratch(d)))
        return [*weighing, (self.aggregate, streams)]


def _pre_scratch(d: HyperConnectionPreDescriptor) -> dict[str, int]:
    return {} if d.projection is None else {"logits": d.batch * d.n_streams**2}


class _PostPortable:
    """One launch, one block a sample."""

    def __init__(self, descriptor: HyperConnectionPostDescriptor, device: Device) -> None:
        self.descriptor = descriptor
        self.mix = kernel.mix(descriptor.element.value).launcher((descriptor.batch, 1, 1))

    def bind(self, args: NamedArguments, workspace: Workspace) -> list[tuple[Callable, tuple]]:
        """The launch."""
        d = self.descriptor
        pitch = weights_count(d.n_streams) if d.per_sample else 0
        streams = (args["x_expanded"], args["update"], args["mixing"], args["out"])
        return [(self.mix, (*streams, pitch, d.hidden_dim, d.n_streams))]


class HyperConnectionPrePlan(Plan):
    """What comes before the sublayer; see :class:`HyperConnectionPreDescriptor`."""

    name = "hyper-connection pre"
    skus = (
        Sku(
            name="mma and stream",
            backend=BackendKind.MMA,
            arch=ArchSku.SM80,
            refuses=lambda d: "takes a dynamic H" if d.projection is None else fast.refuses(d),
            guarantee=lambda d: fp32_guarantee(fast.units(d, _pre_units(d)), fast.DERIVATION),
            build=fast.DynamicPreProgram,
            workspace=fast.workspace,
            alignment=ALIGNMENT,
        ),
        Sku(
            name="stream",
            backend=BackendKind.VECTOR,
            arch=ArchSku.SM80,
            refuses=_refuses_pre_stream,
            guarantee=_pre_stream_guarantee,
            build=_PreStream,
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


class HyperConnectionPostPlan(Plan):
    """What comes after the sublayer; see :class:`HyperConnectionPostDescriptor`."""

    name = "hyper-connection post"
    skus = (
        Sku(
            name="stream",
            backend=BackendKind.VECTOR,
            arch=ArchSku.SM80,
            refuses=_refuses_post_stream,
            guarantee=_post_guarantee,
            build=_PostStream,
            alignment=ALIGNMENT,
        ),
        Sku(
            name="portable",
            backend=BackendKind.PORTABLE,
            arch=ArchSku.ANY,
            refuses=refuses_post,
            guarantee=_post_guarantee,
            build=_PostPortable,
        ),
    )
