"""A linear layer with one LoKr: base and adapter in one sum, forwards and for the gradient of x.

    y = x W^T + b + s x kron(w1, w2)^T        y_l = x W_l^T + b_l + sum_m s w1[l, m] (x_m w2^T)
    d_x = g W + s g kron(w1, w2)              d_x_m = g W_.m + sum_l s w1[l, m] (g_l w2)

The blocks of x, or of g, are mixed by w1, and what came of it is multiplied by w2 in the sum of the base's product: its
columns are a batch of groups, in which a few narrow blocks go together by a block-diagonal w2. The base is frozen. LoKr
arXiv:2212.10650.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lycoris.errors import RefusedInput
from lycoris.tensor import autograd
from lycoris.tensor.adapted import refuse_mixed
from lycoris.tensor.adapter_gradients import (
    kronecker_back,
    kronecker_back_problem,
    kronecker_gradients,
    kronecker_problem,
    low_rank_gradients,
    mixing_gradient,
)
from lycoris.tensor.creation import from_numpy
from lycoris.tensor.launch import compact, compute, converted, empty, keep, kept, of_layout, run_prepared, shaped
from lycoris.tensor.mixing import fits_spare, mixed
from lycoris.tensor.products import check_linear, flipped, matrix_of, product, stored, sum_of_products
from lycoris.tensor.tensor import Layout, Tensor, layout_of
from plans.core import Device, ElementKind, TensorMut, TensorRef
from plans.core.prepared import Prepared
from plans.expression import leaf
from plans.matmul import Bias, Segment, SegmentedMatmulArgs, SegmentedMatmulDescriptor, SegmentedMatmulPlan

_COLUMNS = ((9, 256), (0, 128))
"""Columns of a result that narrow blocks are put together to: those of the largest tile, from each generation of the
hardware on.
"""

_NOTHING = (0, 0.0)
_NARROW = 64
"""Columns of a block that a block of threads holds the sums of, as it does those of a factor's ranks."""


def kronecker_linear(
    x: Tensor, weight: Tensor, w1: Tensor, seconds: Sequence[Tensor], bias: Tensor | None = None, scale: float = 1.0
) -> Tensor:
    """The sum x @ weight.T + scale * x @ kron(w1, w2).T + bias: a frozen base layer with LoKr beside it.

    x [..., b * d], weight [a * c, b * d], w1 [a, b], ``seconds`` w2 [c, d], or w2's factors [c, rank] and [rank, d],
    all of one kind. The mixed blocks, and a w2 of factors, are rounded to that kind; no delta is built. Gradients for
    x, w1 and w2 or its factors. Raises RefusedInput where shapes do not fit.
    """
    shape = check_linear("kronecker_linear", x, weight, bias)
    (a, b), c, d = w1.shape, seconds[0].shape[0], seconds[-1].shape[1]
    shapes = [factor.shape for factor in seconds]
    if (a * c, b * d) != weight.shape or len(seconds) > 2 or (len(seconds) == 2 and shapes[0][1] != shapes[1][0]):
        raise RefusedInput(
            f"kronecker_linear: w1 {w1.shape} and w2 {' @ '.join(map(str, shapes))} for a weight {weight.shape}, "
            "wanted extents whose products are the weight's; give the factors of this weight"
        )
    refuse_mixed("kronecker_linear", (x, weight, w1, *seconds))
    kind, own = x.kind, None if bias is None else compact(bias.detach())
    rows, matrix, mixing = _ready(matrix_of(x, weight.shape[1])), _ready(weight), _ready(w1)
    chain = tuple(_ready(factor) for factor in seconds)
    second = chain[0] if len(chain) == 1 else product(*chain, kind)
    wide = diagonal(second, together_of(a, c, x.device))
    together = wide.shape[0] // c
    inner, out, _ = _mixed_sum(rows, flipped(matrix), mixing, False, flipped(wide), together, scale, kind, own)
    out = shaped(out, shape)
    inputs = (x, w1, *seconds)
    if not autograd.wanted(inputs):
        return out
    both = len(chain) == 1 and w1.requires_grad and seconds[0].requires_grad
    if both and kronecker_problem(rows.shape[0], w1.shape, (c, d), kind, kind, x.device) is not None:
        inner = None  # the pass over g and x makes it anew
    x_shape, saved = x.shape, _Saved(rows, matrix, mixing, chain, second, wide, inner, scale)

    def pull(g: Tensor, edges: Sequence[autograd.Node | None]) -> list[Tensor | None]:
        g = _ready(matrix_of(g, matrix.shape[0]))
        d_x, *rest = _in_one_pass(saved, g, edges) or _in_passes(saved, g, edges)
        return [None if d_x is None else shaped(d_x, x_shape), *rest]

    return autograd.record("kronecker_linear", out, inputs, (rows, matrix, mixing, *chain), pull)


class _Saved(NamedTuple):
    """What gradients need: x and the weight as matrices, w1, w2 or its factors, w2, the diagonal of it that the sum was
    made with, the blocks of scale * x that w1 mixed, unless no gradient is likely to need them.
    """

    rows: Tensor
    matrix: Tensor
    mixing: Tensor
    chain: tuple[Tensor, ...]
    second: Tensor
    wide: Tensor
    inner: Tensor | None
    scale: float

    def mixed_first(
        self, g: Tensor, kind: ElementKind, early: bool = False
    ) -> tuple[tuple[Tensor, Tensor], Tensor, tuple[int, float]]:
        """The blocks of g mixed by w1's transpose and what multiplies them; x's gradient; what its launch spares."""
        together = together_of(self.mixing.shape[1], self.second.shape[1], g.device)
        same = self.wide.shape[0] == together * self.second.shape[0]
        tall = self.wide if same else diagonal(self.second, together)
        outer, d_x, spare = _mixed_sum(g, self.matrix, self.mixing, True, tall, together, self.scale, kind, early=early)
        return (outer, tall), d_x, spare


def _in_one_pass(saved: _Saved, g: Tensor, edges: Sequence[autograd.Node | None]) -> list[Tensor | None] | None:
    """All gradients where one pass makes those of w1 and w2, beside x's; None where it does not.

    It leaves g's product with w2 nowhere: x's is made without.
    """
    if len(saved.chain) > 1 or not (edges[1] and edges[2]) or edges[1].kind is not edges[2].kind:
        return None
    shape = (g.shape[0], saved.mixing.shape, saved.second.shape, g.kind, edges[1].kind, g.device)
    problem, d_x, held = kronecker_problem(*shape), None, None
    if problem is None:
        return None
    if edges[0]:  # what it reads is held until the pass is launched, which runs beside it
        held, d_x, spare = saved.mixed_first(g, edges[0].kind, early=True)
        problem = kronecker_problem(*shape, spare)
    found = kronecker_gradients(problem, g, saved.rows, saved.mixing, saved.second, saved.scale)
    del held
    return [d_x, *found]


def _in_passes(saved: _Saved, g: Tensor, edges: Sequence[autograd.Node | None]) -> list[Tensor | None]:
    """All gradients, each factor's by itself."""
    rows, matrix, mixing, chain, (c, d), scale = *saved[:4], saved.second.shape, saved.scale
    (a, b), kind, count, d_x, d_w1 = mixing.shape, g.kind, g.shape[0], None, None
    inner = mixed(rows, mixing, d, kind, False, scale) if saved.inner is None else saved.inner
    inner = shaped(inner, (count * a, d))
    problem = None
    if edges[0] and edges[1]:
        problem = kronecker_back_problem(count, (a, b), (c, d), kind, edges[1].kind, g.device)
    grown = [shaped(g, (count * a, c))]
    for factor in chain if not problem and (edges[1] or (edges[0] and d <= c)) else chain[:-1]:
        grown.append(product(grown[-1], factor, kind))
    pairs = grown[0], inner
    # Where blocks are few and wide, w1's gradient is made beside d_x's product, whose operands are held here; those of
    # narrow blocks read more, and would slow the product down.
    beside = bool(edges[0] and edges[1] and _NARROW < d <= c)
    if problem:
        back, d_w1 = kronecker_back(problem, g, rows, mixing, saved.second, scale)
        d_x = sum_of_products(((g, matrix),), (1.0,), edges[0].kind, None, back)
    elif edges[0] and d <= c:  # mixed after w2, which w1 wants anyway, there is no more to read, and less to multiply
        back = mixed(shaped(grown[-1], (count, a * d)), mixing, d, kind, True, scale)
        d_x = sum_of_products(((g, matrix),), (1.0,), edges[0].kind, None, back, early=beside)
    elif edges[0]:
        (outer, _), d_x, _ = saved.mixed_first(g, edges[0].kind)
        if b < a:  # the same sum over fewer blocks
            pairs = shaped(outer, (count * b, c)), shaped(rows, (count * b, d))
    if edges[1] and not problem:
        v = shaped(grown[-1], (count, a * d))
        d_w1 = mixing_gradient(v, rows, (a, b), d, edges[1].kind, scale, beside=beside)
    if len(chain) == 1:
        d_seconds = [_second_gradient(*pairs, edges[2].kind) if edges[2] else None]
    else:
        d_seconds = _factor_gradients(grown, inner, chain, edges[2:])
    return [d_x, d_w1, *d_seconds]


def _second_gradient(g: Tensor, x: Tensor, kind: ElementKind) -> Tensor:
    """The sum g.T @ x over many rows; where one of them is narrow, as a low-rank factor's, which reads each once."""
    if x.shape[1] <= _NARROW:
        return low_rank_gradients(None, (g, x), kind, 1.0)[1]
    if g.shape[1] <= _NARROW:
        return low_rank_gradients((g, x), None, kind, 1.0)[0]
    return product(flipped(g), x, kind)


def _factor_gradients(
    grown: Sequence[Tensor], inner: Tensor, chain: Sequence[Tensor], edges: Sequence[autograd.Node | None]
) -> list[Tensor | None]:
    """Those of w2's factors [c, rank] and [rank, d], of g and its product with the first, and of the mixed x."""
    asked = next((edge for edge in edges if edge), None)
    if asked is None:
        return [None, None]
    left = (grown[0], product(inner, flipped(chain[1]), inner.kind)) if edges[0] else None
    d_right, d_left = low_rank_gradients((grown[1], inner) if edges[1] else None, left, asked.kind, 1.0)
    return [d_left, d_right]


def together_of(blocks: int, columns: int, device: Device) -> int:
    """How many of so many blocks of columns are put together for one tile: a divisor of their number."""
    least = next(wanted for generation, wanted in _COLUMNS if device.arch[0] >= generation)
    return next(g for g in range(1, blocks + 1) if blocks % g == 0 and (g * columns >= least or g == blocks))


def diagonal(block: Tensor, count: int) -> Tensor:
    """The matrix I kron block, for a contiguous block, without gradients."""
    if count == 1:
        return block
    rows, columns = block.shape
    out = empty((count, rows, count, columns), block.kind, block.device)
    ones, whole = _identity(count, block.kind, block.device), shaped(block, (1, rows, 1, columns))
    compute((leaf(0) * leaf(1),), (ones, whole), (), out)
    return shaped(out, (count * rows, count * columns))


@functools.cache
def _identity(count: int, kind: ElementKind, device: Device) -> Tensor:
    return shaped(from_numpy(np.eye(count), device, kind), (count, 1, count, 1))


def _mixed_sum(
    a: Tensor, b: Tensor, w: Tensor, transposed: bool, second: Tensor, together: int, scale: float, kind: ElementKind,
    bias: Tensor | None = None, *, early: bool = False,
) -> tuple[Tensor, Tensor, tuple[int, float]]:  # fmt: skip
    """The blocks of scale * a mixed by w or its transpose, in a's kind, `sum_with_blocks` of them, what that spares.

    The launch after an ``early`` sum may run beside it, and takes nothing of it: that one is left what is spared, if it
    is not all that the mix needs.
    """
    count = w.shape[1] if transposed else w.shape[0]
    depth = second.shape[0] // together
    small = Tensor(a.storage, layout_of((a.shape[0], count * depth), a.kind))  # only its layout counts
    operands = [a, b, small, second] if bias is None else [a, b, small, second, bias]
    spare = _prepared_sum(operands, together, kind, early)[0].plan.program.spare()
    own = not early or fits_spare(a.shape[0], count, a.shape[1] // depth, depth, a.kind, transposed, spare, a.device)
    mine, left = (spare, _NOTHING) if own else (_NOTHING, spare)
    blocks = mixed(a, w, depth, a.kind, transposed, scale, early=True, spare=mine)
    return blocks, sum_with_blocks(a, b, blocks, second, together, kind, bias, early=early), left


def sum_with_blocks(
    a: Tensor, b: Tensor, blocks: Tensor, second: Tensor, together: int, kind: ElementKind, bias: Tensor | None = None,
    *, early: bool = False,
) -> Tensor:  # fmt: skip
    """The product a @ b (+ bias), to each group of whose columns a group of ``blocks``' columns times second is added.

    a [m, k], b [k, n], blocks [m, groups * depth], second [depth, n / groups], block-diagonal of so many blocks
    ``together``; all lie as products take them, and ``blocks`` was made by an ``early`` launch just before. What is
    launched next takes nothing of an ``early`` one. No gradients.
    """
    operands = [a, b, blocks, second] if bias is None else [a, b, blocks, second, bias]
    prepared, layout = _prepared_sum(operands, together, kind, early)
    out = of_layout(layout, a.device)
    run_prepared(prepared, (out, *operands))
    return out


def _prepared_sum(operands: list[Tensor], together: int, kind: ElementKind, early: bool) -> tuple[Prepared, Layout]:
    """The launches of `sum_with_blocks`, and the result's layout."""
    key = ("sum with blocks", kind, together, early, operands[0].device.ordinal, *[x.layout for x in operands])
    return kept(key) or _keep_blocks(key, operands, together, kind, early)


def _keep_blocks(
    key: tuple, operands: list[Tensor], together: int, kind: ElementKind, early: bool
) -> tuple[Prepared, Layout]:
    """The plan, and the result's layout."""
    a, b, blocks, second, *added = operands
    (m, k), n, (depth, columns) = a.shape, b.shape[1], second.shape
    descriptor = block_problem(a, b, blocks, second, together, kind, added[0].kind if added else None, early)
    plan = SegmentedMatmulPlan.select(None, descriptor, device=a.device)
    out, groups = empty((m, n), kind, a.device), n // columns
    right, lead = stored(b.layout), _lead(b)
    shape, steps = ((columns, k), columns * lead) if right.transposed else ((k, columns), columns)
    sources = [
        a,
        b.viewed((groups, *shape), (steps, lead, 1)),
        blocks.viewed((groups, m, depth), (depth, groups * depth, 1)),
        stored(second.layout).view(second),
        *(shaped(x, (groups, columns)) for x in added),
    ]
    target = out.viewed((groups, m, columns), (columns, n, 1))

    def make(result: TensorMut, *refs: TensorRef) -> SegmentedMatmulArgs:
        return SegmentedMatmulArgs(result, (refs[:2], refs[2:4]), epilogue=refs[4:])

    return keep(key, plan, [target], sources, make, out.layout)


def block_problem(
    a: Tensor, b: Tensor, blocks: Tensor, second: Tensor, together: int, kind: ElementKind, bias: ElementKind | None,
    early: bool = False,
) -> SegmentedMatmulDescriptor:  # fmt: skip
    """`sum_with_blocks` as a batch of the groups of columns."""
    (m, k), n, (depth, columns) = a.shape, b.shape[1], second.shape
    left, right, groups = stored(a.layout), stored(b.layout), n // columns
    lead = _lead(b)
    base = Segment(
        k, left.letter + right.letter, a.kind, b.kind, left.stride, lead, a_shared=True,
        b_batch_stride=columns * lead if right.transposed else columns,
    )  # fmt: skip
    late = Segment(
        depth, "N" + stored(second.layout).letter, blocks.kind, second.kind, groups * depth, a_batch_stride=depth,
        b_shared=True, diagonal=together, late=True,
    )  # fmt: skip
    steps = () if bias is None else (Bias(bias, per_batch=True),)
    return SegmentedMatmulDescriptor(
        m, columns, (base, late), kind, groups, steps, out_stride=n, out_batch_stride=columns, early=early
    )


def _lead(x: Tensor) -> int:
    """Elements from a line of a matrix, as it is stored, to the next."""
    return max(*x.strides, stored(x.layout).shape[-1])


def _ready(x: Tensor) -> Tensor:
    x = x.detach()
    return x if x.contiguous_ and x.aligned else converted(x, x.kind)
