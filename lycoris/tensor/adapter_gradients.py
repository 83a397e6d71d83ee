"""Gradients of adapters' factors by fused plans, on tensors; without gradients themselves."""

from __future__ import annotations

from collections.abc import Sequence

from lycoris.tensor.launch import empty, run, shaped
from lycoris.tensor.products import flipped, layout, product, ready
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
from plans.core import ElementKind
from plans.core.plan import Contract

_UNIT = 8
"""Ranks whose rows of t are aligned to 16 bytes."""

_plans: dict[tuple, Contract] = {}
"""Layouts and kinds -> the plan."""


def low_rank_gradients(
    down: tuple[Tensor, Tensor] | None, up: tuple[Tensor, Tensor] | None, kind: ElementKind, scale: float
) -> tuple[Tensor | None, Tensor | None]:
    """d_down = scale * u.T @ x of (u, x), and d_up = scale * g.T @ t of (g, t); None for what is not wanted.

    u and t are contiguous. Where the rank is a multiple of eight and all are of one kind, both are one pair of launches
    that read x and g once each.
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
    g, x = (None if pair is None else ready(pair[i], transposed=False) for i, pair in enumerate((up, down)))
    plan = _low_rank_plan(g, x, given[0][0], rank, kind)
    d_up = None if g is None else empty((g.shape[1], rank), kind, plan.device)
    d_down = None if x is None else empty((rank, x.shape[1]), kind, plan.device)
    sides = []
    for result, wide, pair, narrow in ((d_up, g, up, 1), (d_down, x, down, 0)):
        if wide is not None and wide.shape[1]:
            t = pair[narrow]
            sides.append((result.mut(), wide.ref(), shaped(t, (t.shape[0], 1, rank)).ref()))
    run(plan, LowRankGradientArgs(sides, scale))
    return d_down, d_up


def _low_rank_plan(
    g: Tensor | None, x: Tensor | None, any_of: Tensor, rank: int, kind: ElementKind
) -> LowRankGradientPlan:
    key = ("low-rank gradient", *(None if wide is None else layout(wide) for wide in (g, x)), rank, id(kind))
    found = _plans.get(key)
    if found is None:
        descriptor = LowRankGradientDescriptor(
            any_of.shape[0], _columns(g), _columns(x), rank, any_of.kind, kind, g_stride=_stride(g), x_stride=_stride(x)
        )
        found = _plans[key] = LowRankGradientPlan.select(None, descriptor, device=any_of.device)
    return found


def _columns(x: Tensor | None) -> int:
    return 0 if x is None else x.shape[1]


def _stride(x: Tensor | None) -> int:
    """A matrix' row stride as descriptors have it: 0 where it is contiguous."""
    return 0 if x is None or x.contiguous_ else x.strides[0]


def mixing_gradient(g: Tensor, x: Tensor, shape: tuple[int, int], width: int, kind: ElementKind) -> Tensor:
    """The sum over rows t of g[t] x[t]^T, each seen as [blocks, width]: g [rows, l * width], x [rows, m * width].

    Gives [l, m].
    """
    g, x = ready(g, transposed=False), ready(x, transposed=False)
    out = empty(shape, kind, x.device)
    key = ("block mix gradient", layout(g), layout(x), width, id(kind))
    plan = _plans.get(key)
    if plan is None:
        descriptor = BlockMixGradientDescriptor(
            x.shape[0], *shape, width, x.kind, kind, g_stride=_stride(g), x_stride=_stride(x)
        )
        plan = _plans[key] = BlockMixGradientPlan.select(None, descriptor, device=x.device)
    run(plan, BlockMixGradientArgs(out.mut(), g.ref(), x.ref()))
    return out


def hadamard_gradients(
    g: Tensor, x: Tensor, factors: Sequence[Tensor], kind: ElementKind, scale: float
) -> list[Tensor]:
    """The gradients of a1, b1, a2, b2 in scale * x @ ((a1 @ b1) * (a2 @ b2)).T: all of one kind, factors contiguous."""
    g, x = ready(g, transposed=False), ready(x, transposed=False)
    rank = factors[0].shape[1]
    key = ("Hadamard gradient", layout(g), layout(x), rank, id(kind))
    plan = _plans.get(key)
    if plan is None:
        descriptor = HadamardGradientDescriptor(
            x.shape[0], g.shape[1], x.shape[1], rank, x.kind, kind, g_stride=_stride(g), x_stride=_stride(x)
        )
        plan = _plans[key] = HadamardGradientPlan.select(None, descriptor, device=x.device)
    found = [empty(factor.shape, kind, x.device) for factor in factors]
    args = HadamardGradientArgs([d.mut() for d in found], g.ref(), x.ref(), [f.ref() for f in factors], scale)
    run(plan, args)
    return found
