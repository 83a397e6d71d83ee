"""docs/hyper_connections.md keeps its word: its Python runs as printed, in order, and its shares are the code's."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from hyper_cases import faulty_gradient

from plans.core import PlanPreference
from plans.sinkhorn import (
    SinkhornBackwardDescriptor,
    SinkhornBackwardPlan,
    SinkhornMode,
    sinkhorn_backward_reference,
    sinkhorn_reference,
)

PAGE = (Path(__file__).parents[1] / "docs" / "hyper_connections.md").read_text()


def test_the_pages_python_runs():
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 3
    names: dict = {}
    for block in blocks:
        exec(compile(block, "docs/hyper_connections.md", "exec"), names)


def implicit_gradient(m, d):
    """The gradient of the limit of Sinkhorn's iteration, at M, for that of M; one matrix."""
    n, g = len(m), m * d
    system = np.block([[np.diag(m.sum(1)), m], [m.T, np.diag(m.sum(0))]])
    solved = np.linalg.lstsq(system, np.concatenate([g.sum(1), g.sum(0)]), rcond=None)[0]
    return m * (d - solved[:n, None] - solved[None, n:])


@pytest.mark.parametrize(("size", "least", "most"), [(0.01, 1.0, 1.0), (1, 1.0, 1.0), (5, 0.2, 0.5), (20, 0.0, 0.1)])
def test_the_implicit_gradient_is_not_that_of_twenty_steps(device, size, least, most):
    """The share of random matrices for which it lies within the guarantee, as the page says."""
    rng, count = np.random.default_rng(3), 200
    logits, d = size * rng.uniform(-1, 1, (count, 4, 4)), rng.standard_normal((count, 4, 4))
    settings = (20, 1e-5, SinkhornMode.EXP)
    exact, magnitude = sinkhorn_backward_reference(logits, d, *settings)
    mixing = sinkhorn_reference(logits, *settings)
    found = np.stack([implicit_gradient(*pair) for pair in zip(mixing, d, strict=True)])
    descriptor = SinkhornBackwardDescriptor(count, 4, *settings)
    guarantee = SinkhornBackwardPlan.choose(descriptor, PlanPreference(), device).guarantee(descriptor)
    share = (np.abs(found - exact) <= guarantee.bound(magnitude)).all((1, 2)).mean()
    assert least <= share <= most


def test_the_published_gradient_is_as_wrong_as_the_page_says():
    """Its length and its direction beside the gradient's: medians over random matrices."""

    def cells(start):
        (line,) = re.findall(rf"^\| {start}.*$", PAGE, re.MULTILINE)
        return [cell.strip() for cell in line.strip("|").split("|")][1:]

    sizes = [float(cell.removeprefix("+-")) for cell in re.findall(r"\+-[\d.]+", PAGE.split("published code")[1])[:4]]
    said = zip(sizes, cells("length, as"), cells("cosine with"), strict=True)
    rng, settings = np.random.default_rng(3), (20, 1e-5, SinkhornMode.EXP)
    for size, length, cosine in said:
        logits, d = size * rng.uniform(-1, 1, (2000, 4, 4)), rng.standard_normal((2000, 4, 4))
        exact, found = sinkhorn_backward_reference(logits, d, *settings)[0], faulty_gradient(logits, d, settings[0])
        lengths = [np.sqrt((gradient * gradient).sum((1, 2))) for gradient in (exact, found)]
        assert np.median(lengths[1] / lengths[0]) == pytest.approx(float(length), rel=0.1)
        directions = (exact * found).sum((1, 2)) / (lengths[0] * lengths[1])
        assert np.median(directions) == pytest.approx(float(cosine), abs=0.02)
