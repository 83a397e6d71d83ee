"""Adapter modules: initial factors, deltas and merges against float64, state dictionaries, refusals."""

from __future__ import annotations

import math
import re

import ml_dtypes
import numpy as np
import pytest
from golden import assert_golden
from module_cases import (
    BF16,
    F16,
    F32,
    FLAME,
    KINDS,
    LAYOUTS,
    NAMES,
    NEW,
    assert_rounded_once,
    exact_delta,
    from_layout,
    in_layout,
    random_base,
    trained,
    values,
)

from lycoris import LycorisError, RefusedInput
from lycoris.algorithms import (
    MODULES,
    FactorSpec,
    FullModule,
    IA3Module,
    LoConModule,
    LoHaModule,
    LoKrModule,
    NormModule,
    weight_source,
)
from lycoris.buffers import DeviceArray
from lycoris.layout import to_flame


@NAMES
def test_new_modules_have_lycoris_shapes_and_change_nothing(name):
    make, shape, factors = NEW[name]
    module = make(seed=1)
    assert {key: tensor.shape for key, tensor in module.factors.items()} == factors
    assert {tensor.kind for tensor in module.factors.values()} == {BF16}
    assert module.shape == shape
    delta = module.get_diff_weight()
    assert delta.shape == shape and not values(delta).any()


@NAMES
def test_a_scalar_starts_at_zero_and_no_factor_does(name):
    module = NEW[name][0](seed=1, use_scalar=True)
    assert values(module.scalar) == 0 and list(module.parameters())[-1] == "scalar"
    assert all(values(tensor).any() for tensor in module.factors.values())
    assert not values(module.get_diff_weight()).any()


@NAMES
def test_a_seed_repeats_the_factors(name):
    first, again, other = (NEW[name][0](seed=seed) for seed in (3, 3, 4))
    state, same, different = ({k: v.numpy().tobytes() for k, v in m.factors.items()} for m in (first, again, other))
    assert state == same != different


INITIAL = {
    # Uniform over +-1/sqrt(fan-in): None; normal: its standard deviation; 0: zero.
    "locon": (
        lambda: LoConModule.new_conv2d(64, 64, 3, 32, use_tucker=True, dtype=F32, seed=5),
        {"lora_up.weight": 0, "lora_down.weight": None, "lora_mid.weight": None},
    ),
    "loha": (
        lambda: LoHaModule.new_conv2d(64, 64, 3, 32, use_tucker=True, dtype=F32, seed=5),
        {"hada_w1_a": 0.1, "hada_w1_b": 1.0, "hada_t1": 0.1, "hada_w2_a": 0, "hada_w2_b": 1.0, "hada_t2": 0.1},
    ),
    "lokr": (
        lambda: LoKrModule.new_linear(4096, 4096, 16, decompose_both=True, dtype=F32, seed=5),
        {"lokr_w1_a": None, "lokr_w1_b": None, "lokr_w2_a": None, "lokr_w2_b": 0},
    ),
}


@pytest.mark.parametrize("algorithm", INITIAL)
def test_initial_values_are_distributed_as_in_lycoris(algorithm):
    make, expected = INITIAL[algorithm]
    factors = make().factors
    assert factors.keys() == expected.keys()
    for name, deviation in expected.items():
        found = values(factors[name])
        if deviation == 0:
            assert not found.any()
            continue
        bound = 1 / math.sqrt(math.prod(found.shape[1:]))
        wanted = bound / math.sqrt(3) if deviation is None else deviation
        assert abs(found.mean()) < 5 * wanted / math.sqrt(found.size)
        assert abs(found.std() / wanted - 1) < 5 / math.sqrt(found.size)
        assert (np.abs(found).max() <= bound) == (deviation is None)


@NAMES
@KINDS
@LAYOUTS
def test_diff_weight_is_the_scaled_delta(rng, name, kind, layout):
    module = trained(NEW[name][0](dtype=kind, layout=layout, use_scalar=True), rng)
    delta = module.get_diff_weight()
    exact, size = exact_delta(module)
    assert delta.kind is kind and delta.shape == in_layout(exact, layout).shape
    assert_rounded_once(from_layout(delta.numpy(), layout), exact, size)


@NAMES
@KINDS
@LAYOUTS
@pytest.mark.parametrize("dora", [None, "out", "in"])
def test_merges_round_once(rng, name, kind, layout, dora):
    make, shape, _ = NEW[name]
    base = random_base(rng, shape, kind, layout)
    options = {} if dora is None else {"weight_decompose": True, "wd_on_out": dora == "out", "base": base}
    module = trained(make(layout=layout, **options), rng)
    before = base.numpy()
    merged = module.merge_into(base, 0.75)
    weight, (delta, size) = from_layout(values(base), layout), exact_delta(module)
    exact, size = weight + 0.75 * delta, np.abs(weight) + size
    if dora is not None:
        axes = tuple(i for i in range(weight.ndim) if i != (0 if dora == "out" else 1))
        norm = np.sqrt(((weight + delta) ** 2).sum(axes, keepdims=True)) + 2.0**-23
        gain = values(module.dora_scale) / norm
        exact = weight + 0.75 * (gain * (weight + delta) - weight)
        size = 2 * np.abs(weight) + gain * size
    assert merged.shape == base.shape and merged.buffer is not base.buffer
    assert base.numpy().tobytes() == before.tobytes()
    assert_rounded_once(from_layout(merged.numpy(), layout), exact, size)


@NAMES
@LAYOUTS
def test_multiplier_0_is_the_base_bit_for_bit(rng, name, layout):
    make, shape, _ = NEW[name]
    base = DeviceArray.from_numpy(rng.integers(0, 1 << 16, shape, np.uint16).view(ml_dtypes.bfloat16))
    base = to_flame(base) if layout is FLAME else base
    options = {"weight_decompose": True, "base": random_base(rng, shape, BF16, layout)}
    for module in (make(layout=layout), make(layout=layout, **options)):
        assert trained(module, rng).merge_into(base, 0.0).numpy().tobytes() == base.numpy().tobytes()


@pytest.mark.parametrize("on_out", [True, False])
@LAYOUTS
def test_dora_starts_with_the_norms_of_the_base(rng, on_out, layout):
    base = random_base(rng, (5, 6, 3, 3), F32, layout)
    module = LoConModule.new_conv2d(6, 5, 3, 2, weight_decompose=True, wd_on_out=on_out, base=base, layout=layout)
    weight = from_layout(values(base), layout)
    norms = np.sqrt((weight**2).sum((1, 2, 3) if on_out else (0, 2, 3)))
    assert module.dora_scale.shape == ((5, 1, 1, 1) if on_out else (1, 6, 1, 1))
    np.testing.assert_allclose(values(module.dora_scale).reshape(-1), norms, rtol=2.0**-23)
    np.testing.assert_allclose(values(module.merge_into(base)), values(base), rtol=2.0**-18)


@pytest.mark.parametrize(
    ("module", "scale"),
    [
        (lambda: LoConModule.new_linear(6, 4, 2, 3.0), 1.5),
        (lambda: LoConModule.new_linear(6, 4, 2), 1.0),
        (lambda: LoConModule.new_linear(6, 4, 2, 0.0), 1.0),
        (lambda: LoHaModule.new_linear(6, 4, 4, 3.0, rs_lora=True), 1.5),
        (lambda: LoHaModule.new_linear(6, 4, 4, rs_lora=True), 2.0),
        (lambda: LoKrModule.new_linear(48, 24, 2, 3.0), 1.5),
        (lambda: LoKrModule.new_linear(48, 24, 2, 3.0, decompose_both=True), 1.5),
        (lambda: LoKrModule.new_conv2d(6, 12, 3, 1, 3.0, use_tucker=True), 3.0),
        (lambda: LoKrModule.new_linear(48, 24, 99, 3.0), 1.0),
        (lambda: LoKrModule.new_linear(48, 24, 99, 3.0, rs_lora=True), 1.0),
        (lambda: LoConModule.new_linear(6, 4, 0, 3.0), 0.0),
        (lambda: LoHaModule.new_conv2d(6, 4, 3, 0, 3.0), 0.0),
        (lambda: LoKrModule.new_linear(48, 24, 0, 3.0), 0.0),
        (lambda: FullModule.new((4, 6)), 1.0),
        (lambda: NormModule.new(4), 1.0),
        (lambda: IA3Module.new((4, 6)), 1.0),
    ],
)
def test_scale(module, scale):
    assert module().scale() == scale


@pytest.mark.parametrize("name", ["locon conv2d", "loha conv2d", "lokr conv2d"])
def test_rank_0_changes_nothing(rng, name):
    shape = NEW[name][1]
    cls = MODULES[name.split()[0]]
    module = cls.new_conv2d(shape[1], shape[0], shape[2:], 0)
    base = random_base(rng, shape, F16)
    assert not values(module.get_diff_weight()).any()
    assert module.merge_into(base).numpy().tobytes() == base.numpy().tobytes()
    with pytest.raises(RefusedInput, match=r"the base is \[2, 2\], wanted"):
        module.merge_into(random_base(rng, (2, 2), F16))
    with pytest.raises(RefusedInput, match="rank 0"):
        cls.from_state_dict(module.state_dict())
    with pytest.raises(RefusedInput, match="rank 0 with a dora_scale, wanted rank 1 or more"):
        cls.new_conv2d(shape[1], shape[0], shape[2:], 0, weight_decompose=True, base=base)


@NAMES
@pytest.mark.parametrize("rs_lora", [False, True])
def test_a_state_dict_makes_the_same_module(rng, name, rs_lora):
    make, shape, factors = NEW[name]
    base = random_base(rng, shape, F32)
    options = {"rs_lora": rs_lora, "weight_decompose": True, "wd_on_out": False, "base": base}
    module = trained(make(**options), rng)
    state = module.state_dict()
    assert list(state) == ["alpha", *factors, "dora_scale"]
    assert state["alpha"].shape == () and state["alpha"].kind is F32
    if module.rank is not None:
        np.testing.assert_allclose(values(state["alpha"]) / module.rank, module.scale(), rtol=2.0**-24)
    copy = type(module).from_state_dict(state, shape)
    assert copy.rank == module.rank and copy.wd_on_out is False and not copy.rs_lora
    assert list(copy.parameters()) == [*factors, "dora_scale"]
    np.testing.assert_allclose(copy.scale(), module.scale(), rtol=2.0**-24)
    np.testing.assert_allclose(
        values(copy.merge_into(base, 0.5)), values(module.merge_into(base, 0.5)), rtol=2.0**-17, atol=2.0**-20
    )


@pytest.mark.parametrize(
    ("name", "target"),
    [("locon tucker", "lora_up.weight"), ("loha linear", "hada_w1_a"), ("lokr linear", "lokr_w1"),
     ("lokr decompose both", "lokr_w1_a")],
)  # fmt: skip
def test_a_scalar_is_folded_into_one_factor(rng, name, target):
    module = trained(NEW[name][0](use_scalar=True, dtype=F32), rng)
    state, scalar = module.state_dict(), module.scalar.numpy()
    assert "scalar" not in state
    for key, tensor in module.factors.items():
        expected = tensor.numpy() * scalar if key == target else tensor.numpy()
        np.testing.assert_array_equal(state[key].numpy(), expected)


def test_shapes_come_from_the_tensors_when_there_is_no_other(rng):
    module = trained(LoKrModule.new_conv2d(6, 8, 3, 1, 0.5), rng)
    copy = LoKrModule.from_state_dict({name: tensor.numpy() for name, tensor in module.state_dict().items()})
    assert copy.shape == (8, 54)
    base = random_base(rng, (8, 6, 3, 3), BF16)
    assert copy.merge_into(base).numpy().tobytes() == module.merge_into(base).numpy().tobytes()


def test_lokr_splits_as_the_file_does_and_not_as_we_would(rng):
    """PEFT splits 64, 16 into (16, 4) where LyCORIS makes (4, 16)."""
    w1, w2 = rng.standard_normal((16, 2)), rng.standard_normal((4, 3))
    module = LoKrModule.from_state_dict({"lokr_w1": np.float32(w1), "lokr_w2": np.float32(w2)})
    np.testing.assert_allclose(values(module.get_diff_weight()), np.kron(np.float32(w1), np.float32(w2)), rtol=2.0**-22)


@LAYOUTS
def test_full_differences_and_their_bias(rng, layout):
    module = trained(FullModule.new((5, 6, 3), bias=True, layout=layout), rng)
    base, bias = random_base(rng, (5, 6, 3), F16, layout), random_base(rng, (5,), F32)
    assert list(module.parameters()) == list(module.state_dict()) == ["diff", "diff_b"]
    weight = from_layout(values(base), layout)
    merged = from_layout(module.merge_into(base, -0.5).numpy(), layout)
    assert_golden(merged, weight - 0.5 * values(module.factors["diff"]), weight, np.float16)
    found = module.merge_bias_into(bias, -0.5)
    assert_golden(found.numpy(), values(bias) - 0.5 * values(module.bias), values(bias), np.float32)
    copy = FullModule.from_state_dict(module.state_dict(), layout=layout)
    assert copy.merge_into(base).numpy().tobytes() == module.merge_into(base).numpy().tobytes()


@LAYOUTS
def test_norms(rng, layout):
    module = trained(NormModule.new(7, dtype=F32), rng)
    module.layout = layout
    base, bias = random_base(rng, (7,), BF16), random_base(rng, (7,), BF16)
    assert list(module.parameters()) == list(module.state_dict()) == ["w_norm", "b_norm"]
    merged, moved = module.merge_into(base, 0.5), module.merge_bias_into(bias, 0.5)
    assert merged.shape == moved.shape == (7,)
    assert_golden(merged.numpy(), values(base) + 0.5 * values(module.factors["w_norm"]), values(base), BF16.values)
    assert_golden(moved.numpy(), values(bias) + 0.5 * values(module.bias), values(bias), BF16.values)
    np.testing.assert_array_equal(module.get_diff_weight().numpy(), module.factors["w_norm"].numpy())


@pytest.mark.parametrize("on_input", [False, True])
@LAYOUTS
def test_ia3_scales_channels(rng, on_input, layout):
    module = trained(IA3Module.new((5, 6, 3), on_input=on_input, layout=layout), rng)
    base = random_base(rng, (5, 6, 3), BF16, layout)
    vector = values(module.factors["weight"])
    assert vector.shape == (1, 6 if on_input else 5, 1)
    weight = from_layout(values(base), layout)
    multipliers = vector if on_input else vector.reshape(-1, 1, 1)
    merged = from_layout(module.merge_into(base, 0.5).numpy(), layout)
    assert_golden(merged, weight * (1 + 0.5 * multipliers), weight, BF16.values)
    with pytest.raises(LycorisError, match="ia3: multiplies the base, so it has no weight of its own"):
        module.get_diff_weight()
    state = module.state_dict()
    assert list(state) == ["weight", "on_input"] and values(state["on_input"]) == on_input
    copy = IA3Module.from_state_dict(state, layout=layout)
    assert copy.on_input is on_input


@pytest.mark.parametrize(
    ("algorithm", "factors", "shape", "message"),
    [
        (
            "locon",
            {"lora_up.weight": (8, 2), "lora_down.weight": (2, 12)},
            (8, 13),
            "m: lora_up.weight [8, 2], lora_down.weight [2, 12] make a delta [8, 12], wanted the base's [8, 13]",
        ),
        (
            "locon",
            {"lora_up.weight": (8, 2), "lora_down.weight": (3, 12)},
            (8, 12),
            "m: lora_up.weight [8, 2] and lora_down.weight [3, 12] do not fit: ranks 2 and 3, wanted the same",
        ),
        (
            "loha",
            {"hada_w1_a": (8, 2), "hada_w1_b": (2, 12), "hada_w2_a": (8, 2), "hada_w2_b": (2, 11)},
            (8, 12),
            "m: hada_w1_a @ hada_w1_b has shape [8, 12], hada_w2_a @ hada_w2_b [8, 11], wanted the same",
        ),
        (
            "lokr",
            {"lokr_w1": (2, 9), "lokr_w2_a": (4, 1), "lokr_w2_b": (1, 6)},
            (8, 6, 3, 3),
            "m: lokr_w1 has 9 columns, wanted a divisor of the base's 6 input channels",
        ),
        ("ia3", {"weight": (12,)}, (8, 12), "m: weight has shape [12], wanted 8 elements, one for each of the base's "
         "output channels"),
        ("norm", {"w_norm": (12,)}, (8,), "m: w_norm [12] make a delta [12], wanted the base's [8]"),
        ("full", {"diff": (4, 3)}, (3, 4), "m: diff [4, 3] make a delta [4, 3], wanted the base's [3, 4]"),
    ],
)  # fmt: skip
def test_factors_that_do_not_make_the_base_are_refused(algorithm, factors, shape, message):
    specs = {name: FactorSpec(extents, BF16) for name, extents in factors.items()}
    with pytest.raises(RefusedInput, match="^" + re.escape(message)):
        weight_source(algorithm, specs, shape, name="m")


def test_a_flat_base_takes_the_filter_of_a_tucker_core(rng):
    module = trained(LoConModule.new_conv2d(6, 5, 3, 2, use_tucker=True), rng)
    base = random_base(rng, (5, 6, 3, 3), BF16)
    merged = module.merge_into(base.reshape((5, 54)))
    assert merged.shape == (5, 54)
    assert merged.numpy().tobytes() == module.merge_into(base).numpy().tobytes()


@pytest.mark.parametrize("tucker", [False, True])
def test_a_flat_base_in_flames_layout_is_refused(rng, tucker):
    module = LoConModule.new_conv2d(6, 5, 3, 2, use_tucker=tucker, layout=FLAME)
    with pytest.raises(RefusedInput, match=r"locon: the base is flat, \[54, 5\]"):
        module.merge_into(random_base(rng, (54, 5), BF16))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: LoConModule.new_linear(0, 4, 2), "locon: a weight of [4, 0] with rank 2, wanted extents of 1 or more"),
        (lambda: LoHaModule.new_linear(4, 4, -1), "loha: a weight of [4, 4] with rank -1"),
        (lambda: LoConModule.new_conv2d(4, 4, (3, 3, 3), 2), "locon: kernel_size (3, 3, 3), wanted one number or 2"),
        (lambda: LoKrModule.new_linear(4, 4, 2, weight_decompose=True), "lokr: weight_decompose without base"),
        (
            lambda: LoKrModule.new_linear(4, 4, 2, weight_decompose=True, base=DeviceArray.zeros((3, 4), BF16)),
            "lokr: base has shape (3, 4), wanted (4, 4)",
        ),
        (
            lambda: LoConModule.new_linear(4, 4, 2).merge_into(DeviceArray.zeros((4, 5), BF16)),
            "locon: lora_up.weight [4, 2], lora_down.weight [2, 4] make a delta [4, 4], wanted the base's [4, 5]",
        ),
        (
            lambda: LoConModule.new_linear(4, 4, 2).merge_bias_into(DeviceArray.zeros((4,), BF16)),
            "locon: has no diff_b, so it changes no bias",
        ),
        (
            lambda: FullModule.new((4, 4), bias=True).merge_bias_into(DeviceArray.zeros((5,), BF16)),
            "full: diff_b has 4 elements, the bias 5",
        ),
        (
            lambda: LoConModule.from_state_dict(LoHaModule.new_linear(4, 4, 2).state_dict()),
            "adapter: holds loha, wanted locon",
        ),
        (
            lambda: LoConModule.from_state_dict({"lora_up.weight": np.zeros((4, 2), np.float32)}, name="m"),
            "m: locon with lora_up.weight: lora_down.weight is missing",
        ),
        (
            lambda: LoConModule.from_state_dict({"lora_up.weight": np.zeros((4, 2)), "lora_down.weight": np.zeros(1)}),
            "an array of float64 has no place on the device, wanted one of bfloat16, float16, float32",
        ),
    ],
)
def test_what_modules_refuse(call, message):
    with pytest.raises(RefusedInput, match="^" + re.escape(message)):
        call()


def test_unknown_options_are_wrong_usage():
    with pytest.raises(TypeError, match="unexpected keyword argument 'factor'"):
        LoConModule.new_linear(4, 4, 2, factor=8)
