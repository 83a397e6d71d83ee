"""Gradients of adapters' factors by fused plans, on tensors; without gradients themselves."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from lycoris.tensor.launch import empty, keep, kept, of_layout, run_prepared, shaped
from lycoris.tensor.products import flipped, product, ready
from lycoris.tensor.tensor import Layout, Tensor, layout_of
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
    given = [pair for pair in (up, None if down is None else down[::-1]) if pair is not None]
    if not given:
        return None, None
    first, narrow = given[0]
    rank, device = narrow.shape[1], first.device
    if rank % _UNIT or any([wide.kind is not first.kind or t.kind is not first.kind for wide, t in given]):
        return (
            None if down is None else product(flipped(down[0]), down[1], kind, scale),
            None if up is None else product(flipped(up[0]), up[1], kind, scale),
        )
    sides = [(ready(wide, transposed=False), t) for wide, t in given]
    beside = beside and all(
        [side[0] is pair[0] for side, pair in zip(sides, given, strict=True)]
    )  # copies are launches
    layouts = [x.layout for side in sides for x in side]
    key = ("low-rank gradient", up is None, *layouts, kind, scale, beside, device.ordinal)
    prepared, made = kept(key) or _keep_low_rank(key, sides, up is not None, kind, scale, beside)
    results = [of_layout(layout, device) for layout in made]
    launched = [(result, *side) for result, side in zip(results, sides, strict=True) if side[0].shape[1]]
    run_prepared(prepared, [*[entry[0] for entry in launched], *[x for entry in launched for x in entry[1:]]])
    return results[-1] if down is not None else None, results[0] if up is not None else None


def _keep_low_rank(
    key: tuple, sides: Sequence[tuple[Tensor, Tensor]], has_up: bool, kind: ElementKind, scale: float, beside: bool
) -> tuple[Prepared, list[Layout]]:
    """The plan, and the results' layouts."""
    first, narrow = sides[0]
    rank = narrow.shape[1]
    g, x = sides[0][0] if has_up else None, sides[-1][0] if len(sides) > has_up else None
    shapes = [(wide.shape[1], rank) if has_up and wide is g else (rank, wide.shape[1]) for wide, _ in sides]
    layouts = [layout_of(shape, kind) for shape in shapes]
    descriptor = LowRankGradientDescriptor(
        first.shape[0], _columns(g), _columns(x), rank, first.kind, kind, g_stride=_stride(g), x_stride=_stride(x),
        beside=beside,
    )  # fmt: skip
    plan = LowRankGradientPlan.select(None, descriptor, device=first.device)
    launched = [(layout, *side) for layout, side in zip(layouts, sides, strict=True) if side[0].shape[1]]
    sources = [tensor for _, wide, t in launched for tensor in (wide, shaped(t, (t.shape[0], 1, rank)))]
    count = len(launched)

    def make(*refs: TensorRef) -> LowRankGradientArgs:
        results, wides, narrows = refs[:count], refs[count::2], refs[count + 1 :: 2]
        return LowRankGradientArgs(list(zip(results, wides, narrows, strict=True)), scale)

    return keep(key, plan, [of_layout(layout, first.device) for layout, *_ in launched], sources, make, layouts)


def _columns(x: Tensor | None) -> int:
    return 0 if x is None else x.shape[1]


def _stride(x: Tensor | None) -> int:
    """A matrix' row stride as descriptors have it: 0 where it is contiguous."""
    return 0 if x is None or x.contiguous_ else x.strides[0]


def mixing_gradient(
    g: Tensor, x: Tensor, shape: tuple[int, int], width: int, kind: ElementKind, scale: float = 1.0, *,
    beside: bool = False,
) -> Tensor:  # fmt: skip
    """The sum over rows t of scale * g[t] x[t]^T, each seen as [blocks, width], as [l, m].

    g [rows, l * width], x [rows, m * width]. ``beside`` as of `low_rank_gradients`.
    """
    given = g, x
    g, x = ready(g, transposed=False), ready(x, transposed=False)
    beside = beside and g is given[0] and x is given[1]  # copies are launches
    out = empty(shape, kind, x.device)
    key = ("block mix gradient", g.layout, x.layout, shape, width, kind, scale, beside, x.device.ordinal)
    found = kept(key)
    if found is None:
        descriptor = BlockMixGradientDescriptor(
            x.shape[0], *shape, width, x.kind, kind, g_stride=_stride(g), x_stride=_stride(x), beside=beside
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
