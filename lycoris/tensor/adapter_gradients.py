"""Gradients of adapters' factors by fused plans, on tensors; without gradients themselves."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from lycoris.tensor.launch import empty, keep, kept, run_prepared, shaped
from lycoris.tensor.products import flipped, product, ready
from lycoris.tensor.tensor import Tensor
from plans.adapter_gradient import (
    BlockMixGradientArgs,
    BlockMixGradientDescriptor,
    BlockMixGradientPlan,
    HadamardGradientArgs,
    HadamardGradientDescriptor,
    HadamardGradientPlan,
    LowRankGradientArgs,
    LowRankGradientDescriptor,
    LowRankGradientPlan,
)
from plans.core import ElementKind, TensorRef
from plans.core.prepared import Prepared

_UNIT = 8
"""Ranks whose rows of t are aligned to 16 bytes."""


def low_rank_gradients(
    down: tuple[Tensor, Tensor] | None, up: tuple[Tensor, Tensor] | None, kind: ElementKind, scale: float, *,
    beside: bool = False,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """d_down = scale * u.T @ x of (u, x), and d_up = scale * g.T @ t of (g, t); None for what is not wanted.

    u and t are contiguous. Where the rank is a multiple of eight and all are of one kind, both are one pair of launches
    that read x and g once each. With ``beside`` they may begin while the launch before runs, a ``late`` sum: the caller
    holds what that one reads.
    """
    given = [pair for pair in (up, down) if pair is not None]
    if not given:
        return None, None
    rank = (up[1] if up is not None else down[0]).shape[1]
    if rank % _UNIT or len({x.kind for pair in given for x in pair}) > 1:
        return (
            None if down is None else product(flipped(down[0]), down[1], kind, scale),
            None if up is None else product(flipped(up[0]), up[1], kind, scale),
        )
    g, t = (None, None) if up is None else (ready(up[0], transposed=False), up[1])
    x, u = (None, None) if down is None else (ready(down[1], transposed=False), down[0])
    any_of = given[0][0]
    beside = beside and (g is None or g is up[0]) and (x is None or x is down[1])  # copies are launches in between
    d_up = None if g is None else empty((g.shape[1], rank), kind, any_of.device)
    d_down = None if x is None else empty((rank, x.shape[1]), kind, any_of.device)
    sides = [side for side in ((d_up, g, t), (d_down, x, u)) if side[1] is not None and side[1].shape[1]]
    wide = [None if side is None else side.layout for side in (g, x)]
    key = ("low-rank gradient", *wide, rank, kind, scale, beside, any_of.device.ordinal)
    found = kept(key) or _keep_low_rank(key, g, x, sides, any_of, rank, kind, scale, beside)
    run_prepared(found[0], [*(side[0] for side in sides), *(tensor for side in sides for tensor in side[1:])])
    return d_down, d_up


def _keep_low_rank(
    key: tuple, g: Tensor | None, x: Tensor | None, sides: Sequence[tuple[Tensor, Tensor, Tensor]], any_of: Tensor,
    rank: int, kind: ElementKind, scale: float, beside: bool,
) -> tuple[Prepared, None]:  # fmt: skip
    count = len(sides)
    descriptor = LowRankGradientDescriptor(
        any_of.shape[0], _columns(g), _columns(x), rank, any_of.kind, kind, g_stride=_stride(g), x_stride=_stride(x),
        beside=beside,
    )  # fmt: skip
    plan = LowRankGradientPlan.select(None, descriptor, device=any_of.device)
    sources = [tensor for _, wide, t in sides for tensor in (wide, shaped(t, (t.shape[0], 1, rank)))]

    def make(*refs: TensorRef) -> LowRankGradientArgs:
        results, wides, narrows = refs[:count], refs[count::2], refs[count + 1 :: 2]
        return LowRankGradientArgs(list(zip(results, wides, narrows, strict=True)), scale)

    return keep(key, plan, [side[0] for side in sides], sources, make)


def _columns(x: Tensor | None) -> int:
    return 0 if x is None else x.shape[1]


def _stride(x: Tensor | None) -> int:
    """A matrix' row stride as descriptors have it: 0 where it is contiguous."""
    return 0 if x is None or x.contiguous_ else x.strides[0]


def mixing_gradient(
    g: Tensor, x: Tensor, shape: tuple[int, int], width: int, kind: ElementKind, scale: float = 1.0
) -> Tensor:
    """The sum over rows t of scale * g[t] x[t]^T, each seen as [blocks, width], as [l, m].

    g [rows, l * width], x [rows, m * width].
    """
    g, x = ready(g, transposed=False), ready(x, transposed=False)
    out = empty(shape, kind, x.device)
    key = ("block mix gradient", g.layout, x.layout, shape, width, kind, scale, x.device.ordinal)
    found = kept(key)
    if found is None:
        descriptor = BlockMixGradientDescriptor(
            x.shape[0], *shape, width, x.kind, kind, g_stride=_stride(g), x_stride=_stride(x)
        )
        plan = BlockMixGradientPlan.select(None, descriptor, device=x.device)
        found = keep(key, plan, [out], [g, x], functools.partial(BlockMixGradientArgs, scale=scale))
    run_prepared(found[0], (out, g, x))
    return out


def hadamard_gradients(
    g: Tensor, x: Tensor, factors: Sequence[Tensor], kind: ElementKind, scale: float
) -> list[Tensor]:
    """The gradients of a1, b1, a2, b2 in scale * x @ ((a1 @ b1) * (a2 @ b2)).T: all of one kind, factors contiguous."""
    g, x = ready(g, transposed=False), ready(x, transposed=False)
    rank, results = factors[0].shape[1], [empty(factor.shape, kind, x.device) for factor in factors]
    key = ("Hadamard gradient", g.layout, x.layout, rank, kind, scale, x.device.ordinal)
    found = kept(key)
    if found is None:
        descriptor = HadamardGradientDescriptor(
            x.shape[0], g.shape[1], x.shape[1], rank, x.kind, kind, g_stride=_stride(g), x_stride=_stride(x)
        )
        plan = HadamardGradientPlan.select(None, descriptor, device=x.device)
        count = len(results)

        def make(*refs: TensorRef) -> HadamardGradientArgs:
            return HadamardGradientArgs(refs[:count], refs[count], refs[count + 1], refs[count + 2 :], scale)

        found = keep(key, plan, results, [g, x, *factors], make)
    run_prepared(found[0], (*results, g, x, *factors))
    return results
