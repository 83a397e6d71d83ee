"""Softmax, normalisation and cross-entropy over rows: formulas, gradients, and every way in which a row is read."""

from __future__ import annotations

import numpy as np
import pytest

from plans.core import ElementKind, InvalidProblem, NoSku, OpCategory
from plans.core.precision import round_to
from plans.loss import CROSS_ENTROPY, CROSS_ENTROPY_BACKWARD
from plans.normalization import (
    LAYER_NORM,
    LAYER_NORM_BACKWARD,
    RMS,
    RMS_BACKWARD,
    RMS_NORM,
    RMS_NORM_BACKWARD,
    STANDARDIZE,
    STANDARDIZE_BACKWARD,
)
from plans.rows import Recipe, RowsArgs, RowsDescriptor, RowsPlan, symbols
from plans.softmax import LOG_SOFTMAX, LOG_SOFTMAX_BACKWARD, SOFTMAX, SOFTMAX_BACKWARD

BF16, F16, F32, I32, I64 = ElementKind.BF16, ElementKind.F16, ElementKind.F32, ElementKind.I32, ElementKind.I64
RECIPES = [
    SOFTMAX, SOFTMAX_BACKWARD, LOG_SOFTMAX, LOG_SOFTMAX_BACKWARD, LAYER_NORM, LAYER_NORM_BACKWARD, STANDARDIZE,
    STANDARDIZE_BACKWARD, RMS_NORM, RMS_NORM_BACKWARD, RMS, RMS_BACKWARD, CROSS_ENTROPY, CROSS_ENTROPY_BACKWARD,
]  # fmt: skip
NAMED = pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: f"{r.name}, {len(r.columns)} columns")
EPS = 1e-5


def sources_of(rng, recipe, rows, n, kind):
    """Arrays for a recipe's sources: classes, positive inverse deviations, log sums above every logit."""
    made = []
    for name in recipe.sources:
        shape = (rows, n) if name in recipe.full else (n,) if name in recipe.columns else (rows,)
        if name == "target":
            made.append(rng.integers(-1, n + 1, shape).astype(np.int32))
        elif name in recipe.row:
            made.append(rng.uniform(0.5, 2, shape).astype(np.float32) + 4 * (name == "lse"))
        else:
            made.append(round_to(rng.standard_normal(shape) * 2, kind))
    return made


def descriptor_of(recipe, rows, n, kind, arrays, **options):
    outs = (kind,) * len(recipe.outputs) + (F32,) * len(recipe.row_outputs)
    return RowsDescriptor(recipe, rows, n, tuple(ElementKind.of(a.dtype) for a in arrays), outs, **options)


def run(device, poisoned, descriptor, arrays, scalars=()):
    plan = RowsPlan.select(None, descriptor, device=device)
    operands = descriptor.operands()
    outs = operands[: len(descriptor.targets)]
    buffers = [poisoned(o.nbytes) for o in outs]
    targets = [b.tensor(o.element, o.shape) for b, o in zip(buffers, outs, strict=True)]
    sources = [device.upload(a).tensor(ElementKind.of(a.dtype), a.shape) for a in arrays]
    stream = device.stream()
    plan.run(stream, None, RowsArgs(targets, sources, scalars))
    device.synchronize(stream)
    return plan, [device.download(b, o.element.values, o.shape) for b, o in zip(buffers, outs, strict=True)]


def check(device, poisoned, recipe, rows, n, kind, arrays, **options):
    descriptor = descriptor_of(recipe, rows, n, kind, arrays, **options)
    scalars = (EPS,) * len(recipe.scalars)
    plan, found = run(device, poisoned, descriptor, arrays, scalars)
    for values, (exact, magnitude), out in zip(
        found, descriptor.reference(arrays, scalars), descriptor.out_kinds, strict=True
    ):
        kept = plan.precision_guarantee.accepts(values, exact, magnitude, out)
        assert kept.all(), f"{plan.chosen.name}: {values[~kept][:3]} for {exact[~kept][:3]}"
    return plan.chosen.name


@NAMED
@pytest.mark.parametrize(("rows", "n"), [(1, 1), (5, 10), (2, 24), (3, 521)])
def test_results_keep_their_bounds(device, poisoned, rng, recipe, rows, n):
    kind = (BF16, F16, F32)[rows % 3]
    name = check(device, poisoned, recipe, rows, n, kind, sources_of(rng, recipe, rows, n, kind))
    assert name == ("resident, in eights" if n == 24 else "resident")


@pytest.mark.parametrize(
    ("n", "kind", "options", "sku"),
    [
        (1032, BF16, {}, "resident, in eights"),
        (1031, F32, {}, "resident"),
        (24, F32, {"aligned": False}, "resident"),
        (1024 * 40, F32, {}, "streaming, in eights"),
        (32769, F32, {}, "streaming"),
    ],
)
@pytest.mark.parametrize("recipe", [SOFTMAX, LAYER_NORM_BACKWARD], ids=lambda r: r.name)
def test_long_rows(device, poisoned, rng, recipe, n, kind, options, sku):
    assert check(device, poisoned, recipe, 1, n, kind, sources_of(rng, recipe, 1, n, kind), **options) == sku


@NAMED
@pytest.mark.parametrize(("rows", "n"), [(0, 8), (2, 0), (0, 0)])
def test_nothing_to_do(device, poisoned, rng, recipe, rows, n):
    arrays = sources_of(rng, recipe, rows, max(n, 1), F32)
    arrays = [
        a[..., :n] if name in (*recipe.full, *recipe.columns) else a
        for a, name in zip(arrays, recipe.sources, strict=True)
    ]
    _, found = run(device, poisoned, descriptor_of(recipe, rows, n, F32, arrays), arrays, (EPS,) * len(recipe.scalars))
    assert all(f.size == 0 for f in found[: len(recipe.outputs)])


def value(recipe, arrays, weights):
    """The sum of a recipe's first result with weights, in float64."""
    rows, n = arrays[0].shape
    descriptor = RowsDescriptor(
        recipe, rows, n, (F32,) * len(arrays), (F32,) * len(recipe.outputs + recipe.row_outputs)
    )
    return (descriptor.reference(arrays, (EPS,) * len(recipe.scalars))[0][0] * weights).sum()


STEP = 1e-4
"""Of a difference over four points: its error is of STEP^4, and rounding's 1e-16 of a value, divided by STEP."""

GRADIENTS = [
    (SOFTMAX, SOFTMAX_BACKWARD, ("y",)),
    (LOG_SOFTMAX, LOG_SOFTMAX_BACKWARD, ("y",)),
    (LAYER_NORM, LAYER_NORM_BACKWARD, ("w", "mean", "rstd")),
    (STANDARDIZE, STANDARDIZE_BACKWARD, ("mean", "rstd")),
    (RMS_NORM, RMS_NORM_BACKWARD, ("w", "rstd")),
    (RMS, RMS_BACKWARD, ("rstd",)),
    (CROSS_ENTROPY, CROSS_ENTROPY_BACKWARD, ("target", "lse")),
]


@pytest.mark.parametrize(("forward", "backward", "names"), GRADIENTS, ids=[row[0].name for row in GRADIENTS])
def test_gradients_are_those_of_finite_differences(rng, forward, backward, names):
    rows, n = 3, 7
    arrays = [rng.standard_normal((rows, n)), *rng.standard_normal((len(forward.columns), n))]
    if forward.row:
        arrays.append(np.array([2.0, -1.0, 6.0]))
    given = dict(zip(forward.sources, arrays, strict=True))
    results = [*forward.outputs, *forward.row_outputs]
    descriptor = RowsDescriptor(forward, rows, n, (F32,) * len(arrays), (F32,) * len(results))
    found = descriptor.reference(arrays, (EPS,) * len(forward.scalars))
    given |= {name: exact for (name, _), (exact, _) in zip(results, found, strict=True)}
    weights = rng.standard_normal(found[0][0].shape)
    given |= {"d_y": weights, "d_loss": weights}
    sources = [given[name] for name in backward.sources]
    gradient = RowsDescriptor(backward, rows, n, (F32,) * len(sources), (F32,)).reference(sources)[0][0]
    assert set(names) <= set(backward.sources)
    for _ in range(5):
        direction = rng.standard_normal((rows, n))
        near, far = (
            [value(forward, [arrays[0] + s * step * direction, *arrays[1:]], weights) for s in (1, -1)]
            for step in (STEP, 2 * STEP)
        )
        slope = (8 * (near[0] - near[1]) - (far[0] - far[1])) / (12 * STEP)
        assert (gradient * direction).sum() == pytest.approx(slope, rel=1e-8, abs=1e-8)


def test_the_formulas(rng):
    x = rng.standard_normal((4, 9))
    y = RowsDescriptor(SOFTMAX, 4, 9, (F32,), (F32,)).reference([x])[0][0]
    np.testing.assert_allclose(y, np.exp(x) / np.exp(x).sum(1, keepdims=True))
    w, b = rng.standard_normal((2, 9))
    y, mean, rstd = (r[0] for r in RowsDescriptor(LAYER_NORM, 4, 9, (F32,) * 3, (F32,) * 3).reference([x, w, b], [EPS]))
    deviation = np.sqrt(x.var(1) + np.float32(EPS))
    np.testing.assert_allclose(y, (x - x.mean(1)[:, None]) / deviation[:, None] * w + b, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose((mean, rstd), (x.mean(1), 1 / deviation), rtol=1e-6)
    y, _ = (r[0] for r in RowsDescriptor(RMS_NORM, 4, 9, (F32,) * 2, (F32,) * 2).reference([x, w], [EPS]))
    np.testing.assert_allclose(y, x / np.sqrt((x**2).mean(1) + np.float32(EPS))[:, None] * w, rtol=1e-6, atol=1e-6)
    t = np.array([0, 8, 4, -1])
    loss, _ = (r[0] for r in RowsDescriptor(CROSS_ENTROPY, 4, 9, (F32, I64), (F32,) * 2).reference([x, t]))
    np.testing.assert_allclose(loss, (np.log(np.exp(x).sum(1)) - x[range(4), t]) * (t >= 0))


def test_two_runs_have_the_same_bits(device, poisoned, rng):
    arrays = sources_of(rng, LAYER_NORM_BACKWARD, 2, 1500, BF16)
    descriptor = descriptor_of(LAYER_NORM_BACKWARD, 2, 1500, BF16, arrays)
    first, second = (run(device, poisoned, descriptor, arrays)[1][0] for _ in range(2))
    np.testing.assert_array_equal(first.view(np.uint16), second.view(np.uint16))


def test_large_logits_and_nan(device, poisoned):
    x = np.array([[1e38, -1e38, 0], [np.nan, 0, 1], [-np.inf, 0, 0]], np.float32)
    _, (y,) = run(device, poisoned, descriptor_of(SOFTMAX, 3, 3, F32, [x]), [x])
    np.testing.assert_array_equal(y, [[1, 0, 0], [np.nan] * 3, [0, 0.5, 0.5]])


def test_descriptors_that_contradict_themselves():
    with pytest.raises(InvalidProblem, match="softmax: 3 rows of -1, wanted 0 or more"):
        RowsDescriptor(SOFTMAX, 3, -1, (F32,), (F32,))
    with pytest.raises(InvalidProblem, match="layer norm: 1 kinds given for x, w, b"):
        RowsDescriptor(LAYER_NORM, 3, 1, (F32,), (F32,) * 3)


def test_what_no_sku_takes(device):
    with pytest.raises(NoSku, match="computes on bf16, f16, f32, not i32"):
        RowsPlan.select(None, RowsDescriptor(SOFTMAX, 2, 8, (I32,), (F32,)), device=device)


def test_a_recipe_of_ones_own(device, poisoned, rng):
    s = symbols(full=1, columns=1, row=1, scalars=1, stages=1)
    expr = s.full[0] * s.columns[0] + s.row[0] * s.scalars[0] + s.position
    recipe = Recipe(
        "own", OpCategory.REDUCTION, ("x",), ("w",), ("r",), ("a",), (("max", expr),), row_outputs=(("m", s.stages[0]),)
    )
    arrays = [rng.standard_normal(shape).astype(np.float32) for shape in ((3, 16), (16,), (3,))]
    descriptor = descriptor_of(recipe, 3, 16, F32, arrays)
    _, (found,) = run(device, poisoned, descriptor, arrays, [0.5])
    x, w, r = arrays
    np.testing.assert_allclose(found, (x * w + r[:, None] / 2 + np.arange(16)).max(1), rtol=1e-6)
