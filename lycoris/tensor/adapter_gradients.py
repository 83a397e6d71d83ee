"""Gradients of adapters' factors by fused plans, on tensors; without gradients themselves."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from lycoris.tensor.launch import empty, keep, kept, of_layouts, run_prepared, shaped
from lycoris.tensor.products import flipped, product, ready
from lycoris.tensor.tensor import Layout, Tensor, layout_of
from plans.adapter_gradient import (
    BlockMixGradientArgs,
    BlockMixGradientDescriptor,
    BlockMixGradientPlan,
    HadamardGradientArgs,
    HadamardGradientDescriptor,
    HadamardGradientPlan,
    KroneckerBackArgs,
    KroneckerBackDescriptor,
    KroneckerBackPlan,
    KroneckerGradientArgs,
    KroneckerGradientDescriptor,
    KroneckerGradientPlan,
    KroneckerProblem,
    LowRankGradientArgs,
    LowRankGradientDescriptor,
    LowRankGradientPlan,
)
from plans.core import Device, ElementKind, TensorRef
from plans.core.plan import Arguments, Plan
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
    (first, narrow), device = given[0], given[0][0].device
    if narrow.shape[1] % _UNIT or any([x.kind is not first.kind for pair in given for x in pair]):
        return (
            None if down is None else product(flipped(down[0]), down[1], kind, scale),
            None if up is None else product(flipped(up[0]), up[1], kind, scale),
        )
    operands = [x for wide, t in given for x in (ready(wide, transposed=False), t)]
    beside = beside and operands[0] is first and operands[-2] is given[-1][0]  # copies are launches
    key = ("low-rank gradient", up is None, kind, scale, beside, device.ordinal, *[x.layout for x in operands])
    prepared, made = kept(key) or _keep_low_rank(key, operands, up is not None, kind, scale, beside)
    results = of_layouts(made, device)
    run_prepared(prepared, (*results, *operands))
    return None if down is None else results[-1], None if up is None else results[0]


def _keep_low_rank(
    key: tuple, operands: Sequence[Tensor], has_up: bool, kind: ElementKind, scale: float, beside: bool
) -> tuple[Prepared, list[Layout]]:
    """The plan, and the results' layouts."""
    wides, narrows = operands[0::2], operands[1::2]
    first, rank, count = wides[0], narrows[0].shape[1], len(wides)
    g, x = first if has_up else None, wides[-1] if count > has_up else None
    shapes = [
        (wide.shape[1], rank) if wide is g and not number else (rank, wide.shape[1])
        for number, wide in enumerate(wides)
    ]
    layouts = [layout_of(shape, kind) for shape in shapes]
    descriptor = LowRankGradientDescriptor(
        first.shape[0], _columns(g), _columns(x), rank, first.kind, kind, g_stride=_stride(g), x_stride=_stride(x),
        beside=beside,
    )  # fmt: skip
    plan = LowRankGradientPlan.select(None, descriptor, device=first.device)
    blocks = [shaped(t, (t.shape[0], 1, rank)) for t in narrows]
    sources = [x for pair in zip(wides, blocks, strict=True) for x in pair]

    def make(*refs: TensorRef) -> LowRankGradientArgs:
        sides = zip(refs[:count], refs[count::2], refs[count + 1 :: 2], strict=True)
        return LowRankGradientArgs([side for side in sides if side[1].shape[1]], scale)

    return keep(key, plan, of_layouts(layouts, first.device), sources, make, layouts)


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


@functools.lru_cache(1 << 12)
def kronecker_problem(
    rows: int, mixing: tuple[int, int], block: tuple[int, int], kind: ElementKind, out: ElementKind, device: Device,
    spare: tuple[int, float] | None = None,
) -> KroneckerGradientDescriptor | None:  # fmt: skip
    """The problem of w1 [a, b] and w2 [c, d], where one pass over g and x is the fast way to both gradients.

    ``spare`` of an ``early`` launch before, which makes nothing that is taken here: then the pass runs beside it.
    """
    beside = spare is not None
    descriptor = KroneckerGradientDescriptor(rows, *mixing, *block, kind, out, beside, spare or (0, 0.0))
    return descriptor if KroneckerGradientPlan.is_fast(descriptor, device) else None


def kronecker_gradients(
    problem: KroneckerGradientDescriptor, g: Tensor, x: Tensor, w1: Tensor, w2: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Those of w1 and w2 in y = scale * x @ kron(w1, w2).T, of contiguous tensors."""
    shapes = (problem.out_blocks, problem.in_blocks), (problem.out_width, problem.in_width)
    results = [empty(shape, problem.out, x.device) for shape in shapes]
    _one_pass(KroneckerGradientPlan, KroneckerGradientArgs, problem, results, (g, x, w1, w2), scale)
    return results[0], results[1]


def _one_pass(
    family: type[Plan],
    args: type[Arguments],
    problem: KroneckerProblem,
    results: list[Tensor],
    given: tuple[Tensor, Tensor, Tensor, Tensor],
    scale: float,
) -> None:
    """Run a plan of g, x, w1 and w2, whose rows are taken as blocks."""
    (g, x, w1, w2), rows = given, problem.rows
    of_g, of_x = (rows, problem.out_blocks, problem.out_width), (rows, problem.in_blocks, problem.in_width)
    operands = [shaped(g, of_g), shaped(x, of_x), w1, w2]
    key = (family.name, problem, scale, x.device.ordinal)
    found = kept(key)
    if found is None:
        plan = family.select(None, problem, device=x.device)
        found = keep(key, plan, results, operands, functools.partial(args, scale=scale))
    run_prepared(found[0], (*results, *operands))


@functools.lru_cache(1 << 12)
def kronecker_back_problem(
    rows: int, mixing: tuple[int, int], block: tuple[int, int], kind: ElementKind, out: ElementKind, device: Device
) -> KroneckerBackDescriptor | None:
    """The problem of w1 [a, b] and w2 [c, d], where one pass over g and x is the fast way to what both add to x's
    gradient and to w1's.
    """
    descriptor = KroneckerBackDescriptor(rows, *mixing, *block, kind, out)
    return descriptor if KroneckerBackPlan.is_fast(descriptor, device) else None


def kronecker_back(
    problem: KroneckerBackDescriptor, g: Tensor, x: Tensor, w1: Tensor, w2: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """The gradients of x, in its kind, and of w1 in y = scale * x @ kron(w1, w2).T, of contiguous tensors."""
    rows, blocks, width = problem.rows, problem.in_blocks, problem.in_width
    d_x, d_w1 = (
        empty((rows, blocks, width), problem.element, x.device),
        empty((problem.out_blocks, blocks), problem.out, x.device),
    )
    _one_pass(KroneckerBackPlan, KroneckerBackArgs, problem, [d_x, d_w1], (g, x, w1, w2), scale)
    return shaped(d_x, (rows, blocks * width)), d_w1


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
