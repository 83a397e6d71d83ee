"""Shape algebra: the shape that the factors are said to make is the one that the reference computes from them."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference import delta64

from lycoris.errors import RefusedInput
from lycoris.formats.shapes import delta_shape, dora_axis, fits, rank_of, squeeze

extents = st.integers(1, 5)
kernels = st.lists(st.integers(1, 3), max_size=3).map(tuple)


@st.composite
def factor_shapes(draw):
    """(algorithm, shapes of its factors, the delta's shape, the rank) in every form that the table knows."""
    o, i, r, a, b, c, d = (draw(extents) for _ in range(7))
    k = draw(kernels)
    ones = (1,) * len(k)
    loha_flat = {"hada_w1_a": (o, r), "hada_w1_b": (r, i), "hada_w2_a": (o, r), "hada_w2_b": (r, i)}
    loha_tucker = {f"hada_w{n}_{x}": (r, size) for n in (1, 2) for x, size in (("a", o), ("b", i))}
    loha_tucker |= {"hada_t1": (r, r, *k), "hada_t2": (r, r, *k)}
    w1, rank1 = draw(st.sampled_from([({"lokr_w1": (a, b)}, None), ({"lokr_w1_a": (a, r), "lokr_w1_b": (r, b)}, r)]))
    w2, rank2, extra = draw(
        st.sampled_from(
            [
                ({"lokr_w2": (c, d, *k)}, None, k),
                ({"lokr_w2_a": (c, r), "lokr_w2_b": (r, d * math.prod(k))}, r, None),
                ({"lokr_w2_a": (r, c), "lokr_w2_b": (r, d), "lokr_t2": (r, r, *k)}, r, k),
            ]
        )
    )
    lokr = (a * c, b * d * math.prod(k)) if extra is None else (a * c, b * d, *k)
    return draw(
        st.sampled_from(
            [
                ("locon", {"lora_up.weight": (o, r, *ones), "lora_down.weight": (r, i, *k)}, (o, i, *k), r),
                ("locon", {"lora_up.weight": (o, r), "lora_down.weight": (r, i)}, (o, i), r),
                (
                    "locon",
                    {
                        "lora_up.weight": (o, r, *ones),
                        "lora_down.weight": (r, i, *ones),
                        "lora_mid.weight": (r, r, *k),
                    },
                    (o, i, *k),
                    r,
                ),
                ("loha", loha_flat, (o, i), r),
                ("loha", loha_tucker, (o, i, *k), r),
                ("lokr", w1 | w2, lokr, rank1 or rank2),
                ("full", {"diff": (o, *k)}, (o, *k), None),
                ("norm", {"w_norm": (o,)}, (o,), None),
            ]
        )
    )


@given(factor_shapes())
def test_delta_has_the_shape_that_was_said(case):
    algorithm, shapes, wanted, rank = case
    factors = {name: np.ones(shape) for name, shape in shapes.items()}
    assert delta_shape(algorithm, factors) == wanted == delta64(algorithm, factors).shape
    assert rank_of(algorithm, factors) == rank


@given(factor_shapes(), st.data())
def test_a_factor_of_another_rank_is_refused(case, data):
    algorithm, shapes, _, rank = case
    ranked = [
        (name, axis)
        for name, shape in shapes.items()
        for axis in range(2)
        if rank is not None and name in RANK_AXIS_FREE and axis < len(shape)
    ]
    if not ranked:
        return
    name, _ = data.draw(st.sampled_from(ranked))
    axis = RANK_AXIS_FREE[name]
    changed = list(shapes[name])
    changed[axis] += 1
    factors = {key: np.ones(tuple(changed) if key == name else shape) for key, shape in shapes.items()}
    with pytest.raises(RefusedInput, match=r"module 'm': .*wanted the same"):
        delta_shape(algorithm, factors, "module 'm'")


# Factors whose rank axis is the same in every form.
RANK_AXIS_FREE = {
    "lora_up.weight": 1,
    "lora_down.weight": 0,
    "hada_w1_b": 0,
    "hada_w2_b": 0,
    "lokr_w1_b": 0,
    "lokr_w2_b": 0,
}


@pytest.mark.parametrize(
    ("algorithm", "shapes", "word"),
    [
        ("locon", {"lora_up.weight": (4, 0), "lora_down.weight": (0, 4)}, "lora_up.weight"),
        (
            "loha",
            dict.fromkeys(("hada_w1_a", "hada_w2_a"), (4, 0)) | dict.fromkeys(("hada_w1_b", "hada_w2_b"), (0, 4)),
            "rank 0",
        ),
        ("lokr", {"lokr_w1": (1, 1), "lokr_w2_a": (4, 0), "lokr_w2_b": (0, 4)}, "lokr_w2_a"),
        ("locon", {"lora_up.weight": (4,), "lora_down.weight": (1, 4)}, "lora_up.weight"),
        ("locon", {"lora_up.weight": (4, 2, 3, 3), "lora_down.weight": (2, 4, 1, 1)}, "lora_up.weight"),
        ("lokr", {"lokr_w1": (2, 2, 2), "lokr_w2": (2, 2)}, "lokr_w1"),
        ("full", {"diff": ()}, "diff"),
        (
            "loha",
            {"hada_w1_a": (4, 2), "hada_w1_b": (2, 4), "hada_w2_a": (4, 2), "hada_w2_b": (2, 5)},
            r"\[4, 4\].*\[4, 5\]",
        ),
        (
            "loha",
            {"hada_w1_a": (4, 2), "hada_w1_b": (2, 4), "hada_w2_a": (4, 1), "hada_w2_b": (1, 4)},
            "ranks 2 and 1",
        ),
        (
            "lokr",
            {"lokr_w1_a": (4, 2), "lokr_w1_b": (2, 4), "lokr_w2_a": (4, 1), "lokr_w2_b": (1, 4)},
            "ranks 2 and 1",
        ),
    ],
)
def test_factors_that_make_no_delta(algorithm, shapes, word):
    with pytest.raises(RefusedInput, match=word):
        delta_shape(algorithm, {name: np.ones(shape) for name, shape in shapes.items()})


@pytest.mark.parametrize(
    ("found", "wanted", "answer"),
    [
        ((4, 6), (4, 6), True),
        ((4, 6), (6, 4), False),
        ((4, 6, 1, 1), (4, 6), True),
        ((4, 6), (4, 6, 1, 1), True),
        ((4, 6, 3, 1), (4, 6, 3), True),
        ((4, 54), (4, 6, 3, 3), True),
        ((4, 6, 3, 3), (4, 54), True),
        ((4, 9), (4, 1, 3, 3), True),
        ((4, 1, 9), (4, 1, 3, 3), False),
        ((2, 108), (4, 6, 3, 3), False),
        ((4, 6, 3, 3), (4, 6, 9), False),
        ((4, 1), (4,), True),
        ((4,), (4, 1, 1), True),
        ((24,), (4, 6), False),
        ((4, 6), (24,), False),
        ((1, 1), (1,), True),
        ((0, 4), (0, 4), True),
    ],
)
def test_fits(found, wanted, answer):
    assert fits(found, wanted) is answer


@given(st.lists(extents, min_size=1, max_size=5).map(tuple), st.integers(0, 3))
def test_ones_at_the_end_do_not_count(shape, ones):
    assert squeeze(shape + (1,) * ones) == squeeze(shape)
    assert fits(shape + (1,) * ones, shape)
    assert fits((shape[0], math.prod(shape[1:])), shape)


@pytest.mark.parametrize(
    ("magnitude", "delta", "axis"),
    [
        ((4, 1), (4, 6), "row"),
        ((4, 1, 1, 1), (4, 6, 3, 3), "row"),
        ((4,), (4, 6), "row"),
        ((1, 6), (4, 6), "column"),
        ((1, 6, 1, 1), (4, 6, 3, 3), "column"),
        ((1, 6, 1, 1), (4, 54), "column"),
        ((4, 1), (4, 4), "row"),
        ((1, 4), (4, 4), "column"),
        ((1, 1), (1, 6), "row"),
        ((1, 1), (4, 1), "column"),
        ((1, 6), (1, 6), "column"),
    ],
)
def test_dora_axis_is_in_the_shape(magnitude, delta, axis):
    assert dora_axis(magnitude, delta) == axis


@pytest.mark.parametrize("magnitude", [(4, 6), (4, 6, 1, 1), (), (5, 1)])
def test_dora_scale_of_another_shape(magnitude):
    with pytest.raises(RefusedInput, match="dora_scale"):
        dora_axis(magnitude, (4, 6))
