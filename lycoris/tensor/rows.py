"""Over the last axis: softmax, normalisation, cross-entropy; each one kernel that reads a row once."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lycoris.errors import RefusedInput
from lycoris.tensor import autograd, pointwise, reductions, views
from lycoris.tensor.launch import (
    F32,
    compact,
    converted,
    empty,
    keep,
    kept,
    number_bits,
    run_prepared,
    same_device,
    shaped,
    sum_to,
)
from lycoris.tensor.tensor import FLOATS, Tensor
from plans import loss, norm_backward, normalization
from plans import softmax as recipes
from plans.core import ElementKind, TensorRef
from plans.core.prepared import Prepared
from plans.expression import Expr
from plans.norm_backward import NormBackwardArgs, NormBackwardDescriptor, NormBackwardPlan
from plans.reduction import Reduction, ReductionArgs, ReductionDescriptor, ReductionPlan, elements
from plans.rows import Recipe, RowsArgs, RowsDescriptor, RowsPlan


def launch(
    recipe: Recipe, sources: Sequence[Tensor], kinds: Sequence[ElementKind], scalars: Sequence[float] = ()
) -> list[Tensor]:
    """A recipe over the last axis of contiguous tensors; results by row have fp32 and the other axes. No gradients."""
    first = sources[0]
    if not first.shape:
        raise RefusedInput(f"{recipe.name}: a tensor without axes, wanted one or more; call unsqueeze() first")
    device = same_device(recipe.name, sources)
    row_kinds = (F32,) * len(recipe.row_outputs)
    outs = [empty(first.shape, kind, device) for kind in kinds]
    row_outs = [empty(first.shape[:-1], kind, device) for kind in row_kinds]
    matrices = (*sources[: len(recipe.full) + len(recipe.columns)], *outs)
    aligned, tensors = all([m.aligned for m in matrices]), (*outs, *row_outs, *sources)
    layouts = [x.layout for x in tensors]
    key = (id(recipe), *layouts, number_bits(scalars), aligned, device.ordinal)
    found = kept(key) or _keep(key, recipe, tensors, (*kinds, *row_kinds), tuple(scalars), aligned)
    run_prepared(found[0], tensors)
    return [*outs, *row_outs]


def _keep(
    key: tuple, recipe: Recipe, tensors: Sequence[Tensor], kinds: tuple[ElementKind, ...], scalars: tuple[float, ...],
    aligned: bool,
) -> tuple[Prepared, Recipe]:  # fmt: skip
    """The plan; the recipe is kept with it, so that its id is no other's."""
    count = len(kinds)
    sources = tensors[count:]
    rows, n = math.prod(sources[0].shape[:-1]), sources[0].shape[-1]
    descriptor = RowsDescriptor(recipe, rows, n, tuple(s.kind for s in sources), kinds, aligned)
    plan = RowsPlan.select(None, descriptor, device=tensors[0].device)
    views = [shaped(x, operand.shape) for x, operand in zip(tensors, descriptor.operands(), strict=True)]

    def make(*refs: TensorRef) -> RowsArgs:
        return RowsArgs(refs[:count], refs[count:], scalars)

    return keep(key, plan, views[:count], views[count:], make, recipe)


def softmax(x: Tensor, axis: int = -1) -> Tensor:
    """exp(x) / sum(exp(x)) along an axis."""
    return _over_axis(x, axis, recipes.SOFTMAX, recipes.SOFTMAX_BACKWARD)


def log_softmax(x: Tensor, axis: int = -1) -> Tensor:
    """The logarithm of softmax along an axis."""
    return _over_axis(x, axis, recipes.LOG_SOFTMAX, recipes.LOG_SOFTMAX_BACKWARD)


def _over_axis(x: Tensor, axis: int, forward: Recipe, backward: Recipe) -> Tensor:
    (at,) = reductions.normal_axes(forward.name, x.ndim, axis)
    if at != x.ndim - 1:
        return views.transpose(_over_axis(views.transpose(x, at, -1), -1, forward, backward), at, -1)
    pointwise.result_kind(forward.name, (x,))
    (y,) = launch(forward, (compact(x.detach()),), (x.kind,))
    if not autograd.wanted((x,)):
        return y
    saved = y.detach()

    def pull(g: Tensor, edges: Sequence[autograd.Node | None]) -> list[Tensor]:
        return launch(backward, (saved, compact(g)), (edges[0].kind,))

    return autograd.record(forward.name, y, (x,), (saved,), pull)


def layer_norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """(x - mean) / sqrt(var + eps) over the last axis, times ``weight``, plus ``bias``; both [n], or neither."""
    if (weight is None) != (bias is None):
        raise RefusedInput("layer_norm: weight and bias go together; give both or none")
    if weight is None:
        return _norm(x, (), normalization.STANDARDIZE, normalization.STANDARDIZE_BACKWARD, eps)
    return _norm(x, (weight, bias), normalization.LAYER_NORM, normalization.LAYER_NORM_BACKWARD, eps)


def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """Root mean square normalisation: x / sqrt(mean(x^2) + eps) over the last axis, times ``weight`` [n] if given."""
    if weight is None:
        return _norm(x, (), normalization.RMS, normalization.RMS_BACKWARD, eps)
    return _norm(x, (weight,), normalization.RMS_NORM, normalization.RMS_NORM_BACKWARD, eps)


def group_norm(
    x: Tensor, groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """Layer normalisation of each group of channels of [N, C, *space], times ``weight`` [C], plus ``bias`` [C]."""
    if x.ndim < 2 or groups < 1 or x.shape[1] % groups:
        raise RefusedInput(
            f"group_norm: {groups} groups of shape {x.shape}, wanted a divisor of the channels; "
            "give another number of groups"
        )
    n, channels, *space = x.shape
    y = layer_norm(views.reshape(x, n, groups, -1 if x.size else 0), eps=eps)
    y = views.reshape(y, x.shape)
    along = (channels, *(1 for _ in space))
    if weight is not None and bias is not None:
        return pointwise.fma(y, views.reshape(weight, along), views.reshape(bias, along))
    if weight is not None:
        return pointwise.binary("mul", y, views.reshape(weight, along))
    return y if bias is None else pointwise.binary("add", y, views.reshape(bias, along))


def _norm(x: Tensor, affine: tuple[Tensor, ...], forward: Recipe, backward: Recipe, eps: float) -> Tensor:
    pointwise.result_kind(forward.name, (x, *affine))
    for name, column in zip(forward.columns, affine, strict=True):
        if column.shape != x.shape[-1:]:
            raise RefusedInput(
                f"{forward.name}: {name} has shape {column.shape}, wanted {x.shape[-1:]}; give the layer's own"
            )
    source = compact(x.detach())
    columns = [compact(column.detach()) for column in affine]
    y, *statistics = launch(forward, (source, *columns), (x.kind,), (eps,))
    if not autograd.wanted((x, *affine)):
        return y

    def pull(g: Tensor, edges: Sequence[autograd.Node | None], already: Tensor | None) -> list[Tensor | None]:
        g, d_x = compact(g), None
        added = () if already is None or edges[0] is None else (compact(already),)
        if len(edges) > 1 and _in_one_pass(edges, (source, g, *added, columns[0])):
            return _all_gradients(source, g, added, columns[0], statistics, edges)
        if edges[0] is not None:
            recipe = normalization.ADDED[backward] if added else backward
            (d_x,) = launch(recipe, (source, g, *added, *columns[:1], *statistics), (edges[0].kind,))
        d_affine = [
            None if edge is None else _column_gradient(part, source, g, statistics, edge.kind)
            for part, edge in zip(("weight", "bias"), edges[1:], strict=False)
        ]
        return [d_x, *d_affine]

    return autograd.record(forward.name, y, (x, *affine), (source, *columns), pull, adds=True)


def _in_one_pass(edges: Sequence[autograd.Node | None], matrices: Sequence[Tensor]) -> bool:
    """Whether all gradients are wanted, and of matrices that one plan takes."""
    if any(edge is None for edge in edges) or edges[1].kind is not edges[-1].kind:
        return False
    return norm_backward.takes(matrices[0].shape[-1]) and matrices[0].size > 0 and all([m.aligned for m in matrices])


def _all_gradients(
    x: Tensor, g: Tensor, added: Sequence[Tensor], weight: Tensor, statistics: Sequence[Tensor],
    edges: Sequence[autograd.Node],
) -> list[Tensor]:  # fmt: skip
    """Those of x, to which ``added`` is added if there is one, of the weight, and of the bias."""
    n, device = x.shape[-1], x.device
    outs = [empty(x.shape, edges[0].kind, device), *(empty((n,), edge.kind, device) for edge in edges[1:])]
    tensors = (*outs, x, g, *added, weight, *statistics)
    key = ("all gradients of a normalisation", len(outs), *[tensor.layout for tensor in tensors], device.ordinal)
    found = kept(key) or _keep_all_gradients(key, tensors, len(outs), bool(added))
    run_prepared(found[0], tensors)
    return outs


def _keep_all_gradients(key: tuple, tensors: Sequence[Tensor], count: int, added: bool) -> tuple[Prepared, None]:
    (x, g, *rest), n = tensors[count:], tensors[count].shape[-1]
    weight, *statistics = rest[added:]
    descriptor = NormBackwardDescriptor(
        len(statistics) == 2, x.size // n, n, (x.kind, g.kind, weight.kind, tensors[0].kind), tensors[1].kind,
        bias=count == 3, added=rest[0].kind if added else None,
    )  # fmt: skip
    plan = NormBackwardPlan.select(None, descriptor, device=x.device)
    views = [shaped(t, operand.shape) for t, operand in zip(tensors, descriptor.operands(), strict=True)]
    return keep(key, plan, views[:count], views[count:], lambda *refs: NormBackwardArgs(refs[:count], refs[count:]))


def _normalised(x: Expr, statistics: Sequence[Expr]) -> Expr:
    """Like the recipes normalise x: of (mean, rstd) or of rstd alone."""
    *mean, rstd = statistics
    return (x - mean[0]) * rstd if mean else x * rstd


def _column_gradient(part: str, x: Tensor, g: Tensor, statistics: Sequence[Tensor], kind: ElementKind) -> Tensor:
    """The sum over rows of g, or of g times the normalised x, which is made anew."""
    n = x.shape[-1]
    if part == "bias":
        return sum_to(g, (n,), kind)
    out, aligned = empty((n,), kind, x.device), x.aligned and g.aligned
    tensors = (out, x, g, *statistics)
    key = ("weight of a normalisation", *[tensor.layout for tensor in tensors], aligned, x.device.ordinal)
    found = kept(key) or _keep_column_gradient(key, tensors, aligned)
    run_prepared(found[0], tensors)
    return out


def _keep_column_gradient(key: tuple, tensors: Sequence[Tensor], aligned: bool) -> tuple[Prepared, None]:
    out, x, g, *statistics = tensors
    n = x.shape[-1]
    rows = x.size // n if n else 0
    s = elements(2, lines=len(statistics))
    value = s.full[1] * _normalised(s.full[0], s.row)
    lines = (F32,) * len(statistics)
    descriptor = ReductionDescriptor(
        Reduction.SUM, value, 1, rows, n, (x.kind, g.kind), out.kind, lines, aligned=aligned
    )
    plan = ReductionPlan.select(None, descriptor, device=x.device)
    sources = [shaped(m, (1, rows, n)) for m in (x, g)] + [shaped(m, (1, rows)) for m in statistics]
    return keep(key, plan, [shaped(out, (1, n))], sources, lambda result, *refs: ReductionArgs(result, refs))


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """-log softmax(logits)[target] for every row, fp32, [...] of logits [..., classes]; 0 where target is no class.

    ``target`` holds classes as i32 or i64, or whole numbers. Raises RefusedInput for other shapes.
    """
    if target.shape != logits.shape[:-1]:
        raise RefusedInput(
            f"cross_entropy: target of shape {target.shape}, wanted {logits.shape[:-1]}; give each row a class"
        )
    if logits.kind not in FLOATS:
        raise RefusedInput(f"cross_entropy: logits of {logits.kind.value}, wanted bf16, f16 or f32; convert them first")
    source, classes = compact(logits.detach()), compact(target.detach())
    losses, lse = launch(loss.CROSS_ENTROPY, (source, classes), ())
    if not autograd.wanted((logits,)):
        return losses

    def pull(g: Tensor, edges: Sequence[autograd.Node | None]) -> list[Tensor]:
        weights = converted(g, F32)
        return launch(loss.CROSS_ENTROPY_BACKWARD, (source, classes, lse, weights), (edges[0].kind,))

    return autograd.record("cross_entropy", losses, (logits,), (source, classes), pull)
