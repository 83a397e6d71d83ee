"""Normalisation of rows, with gradients, as recipes: layer normalisation (also a group's) and root mean square.

LayerNorm (arXiv:1607.06450): y = (x - mean) rstd w + b, rstd = 1 / sqrt(var + eps), over each row; var divides by n.
RMSNorm (arXiv:1910.07467): y = x rstd w, rstd = 1 / sqrt(mean(x^2) + eps). Forward recipes also give what the backward
ones take: mean and rstd in fp32. GroupNorm (arXiv:1803.08494) is LayerNorm without w and b over rows of one group.

A backward recipe with ``added`` adds a matrix, d_r, to d_x: the gradient of a residual stream that x is the branch of.

Gradients of w and b sum over rows and so are reductions by column: d_w = sum d_y (x - mean) rstd, d_b = sum d_y.
"""

from __future__ import annotations

from plans.core import OpCategory
from plans.rows import Recipe, symbols

_NORM = OpCategory.NORMALIZATION


def _layer_norm(affine: bool) -> Recipe:
    s = symbols(full=1, columns=2 * affine, scalars=1, stages=2)
    (x,), (total, squares) = s.full, s.stages
    mean = total * s.inverse_n
    rstd = (squares * s.inverse_n + s.scalars[0]).rsqrt()
    y = (x - mean) * rstd
    return Recipe(
        "layer norm", _NORM, full=("x",), columns=("w", "b") if affine else (), scalars=("eps",),
        stages=(("sum", x), ("sum", (x - mean) ** 2)),
        outputs=(("y", y * s.columns[0] + s.columns[1] if affine else y),),
        row_outputs=(("mean", mean), ("rstd", rstd)),
    )  # fmt: skip


def _layer_norm_backward(affine: bool, added: bool = False) -> Recipe:
    s = symbols(full=2 + added, columns=int(affine), row=2, stages=2)
    (x, g, *rest), (mean, rstd), (g_sum, gx_sum) = s.full, s.row, s.stages
    g = g * s.columns[0] if affine else g
    normal = (x - mean) * rstd
    d_x = (g - g_sum * s.inverse_n - normal * (gx_sum * s.inverse_n)) * rstd
    return Recipe(
        "layer norm backward", _NORM, full=("x", "d_y", "d_r")[: 2 + added], columns=("w",) * affine,
        row=("mean", "rstd"), stages=(("sum", g), ("sum", g * normal)),
        outputs=(("d_x", d_x + rest[0] if added else d_x),),
    )  # fmt: skip


def _rms_norm(affine: bool) -> Recipe:
    s = symbols(full=1, columns=int(affine), scalars=1, stages=1)
    (x,), (squares,) = s.full, s.stages
    rstd = (squares * s.inverse_n + s.scalars[0]).rsqrt()
    return Recipe(
        "rms norm", _NORM, full=("x",), columns=("w",) * affine, scalars=("eps",), stages=(("sum", x**2),),
        outputs=(("y", x * rstd * s.columns[0] if affine else x * rstd),), row_outputs=(("rstd", rstd),),
    )  # fmt: skip


def _rms_norm_backward(affine: bool, added: bool = False) -> Recipe:
    s = symbols(full=2 + added, columns=int(affine), row=1, stages=1)
    (x, g, *rest), (rstd,), (gx_sum,) = s.full, s.row, s.stages
    g = g * s.columns[0] if affine else g
    normal = x * rstd
    d_x = (g - normal * (gx_sum * s.inverse_n)) * rstd
    return Recipe(
        "rms norm backward", _NORM, full=("x", "d_y", "d_r")[: 2 + added], columns=("w",) * affine, row=("rstd",),
        stages=(("sum", g * normal),), outputs=(("d_x", d_x + rest[0] if added else d_x),),
    )  # fmt: skip


LAYER_NORM, LAYER_NORM_BACKWARD = _layer_norm(True), _layer_norm_backward(True)
"""x, w, b -> y, mean, rstd, with the scalar eps; x, d_y, w, mean, rstd -> d_x."""
STANDARDIZE, STANDARDIZE_BACKWARD = _layer_norm(False), _layer_norm_backward(False)
"""Layer normalisation without w and b."""
RMS_NORM, RMS_NORM_BACKWARD = _rms_norm(True), _rms_norm_backward(True)
"""x, w -> y, rstd, with the scalar eps; x, d_y, w, rstd -> d_x."""
RMS, RMS_BACKWARD = _rms_norm(False), _rms_norm_backward(False)
"""Root mean square normalisation without w."""

ADDED = {
    LAYER_NORM_BACKWARD: _layer_norm_backward(True, True), STANDARDIZE_BACKWARD: _layer_norm_backward(False, True),
    RMS_NORM_BACKWARD: _rms_norm_backward(True, True), RMS_BACKWARD: _rms_norm_backward(False, True),
}  # fmt: skip
"""The backward recipes with a matrix that is added to d_x, third of the sources."""
