"""Optimiser steps against float64, state that continues bit for bit, and gradient tools."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lycoris import optim, tensor
from lycoris.errors import RefusedInput
from lycoris.optim.gradients import raw_statistics
from plans.core import ElementKind, InvalidProblem, NoSku
from plans.core.precision import round_to
from plans.gradients import AdjustDescriptor, AdjustPlan, StatisticsDescriptor, StatisticsPlan
from plans.optimizer import Rule, UpdateDescriptor, UpdatePlan

BF16, F16, F32, I32 = ElementKind.BF16, ElementKind.F16, ElementKind.F32, ElementKind.I32
SIZES = (1, 7, 8, 300, 0, 1031)
MAKERS = {
    "sgd": lambda p, **o: optim.SGD(p, 0.1, momentum=0.9, decay=0.01, **o),
    "nesterov": lambda p, **o: optim.SGD(p, 0.1, momentum=0.9, nesterov=True, **o),
    "adam": lambda p, **o: optim.Adam(p, 0.1, decay=0.01, **o),
    "adamw": lambda p, **o: optim.AdamW(p, 0.1, decay=0.01, betas=(0.8, 0.95), **o),
}
RULES = pytest.mark.parametrize("name", MAKERS)


def parameters_of(rng, sizes=SIZES, kind=F32):
    made = [tensor.from_numpy(rng.standard_normal(n), kind=kind, requires_grad=True) for n in sizes]
    return made


def with_gradients(rng, parameters):
    for p in parameters:
        p.grad = tensor.from_numpy(rng.standard_normal(p.shape), kind=F32)
    return parameters


def kept(optimizer):
    """Parameter or fp32 copy, and both moments, of each tensor."""
    found = []
    for state in optimizer._states:
        tensors = state.tensors()
        stepped = tensors.get("master", state.parameter)
        second = tensors["second"].numpy() if "second" in tensors else np.zeros(stepped.shape)
        found.append([stepped.numpy(), tensors["first"].numpy(), second])
    return found


@RULES
@pytest.mark.parametrize("kind", [F32, BF16, F16], ids=lambda k: k.value)
def test_steps_keep_their_bounds(device, rng, name, kind):
    parameters = parameters_of(rng, kind=kind)
    optimizer = MAKERS[name](parameters, schedule=optim.linear(4))
    scale = tensor.full((), 0.7)
    for step in range(1, 4):
        with_gradients(rng, parameters)
        before = kept(optimizer)
        optimizer.step(scale)
        numbers = optimizer.groups[0].numbers(optimizer.rule, 1 - (step - 1) / 4, step)
        for (p, m, v), after, parameter in zip(before, kept(optimizer), parameters, strict=True):
            descriptor = UpdateDescriptor(optimizer.rule, kind, kind is not F32, False, (p.size,), (0,))
            guarantee = UpdatePlan.select(None, descriptor, device=device).precision_guarantee
            references = descriptor.reference(p, parameter.grad.numpy(), m, v, numbers, 0.7)
            for found, (exact, magnitude) in zip(after, references, strict=True):
                assert guarantee.accepts(found, exact, magnitude, F32).all()
            np.testing.assert_array_equal(
                parameter.numpy().astype(np.float64), round_to(after[0], kind).astype(np.float64)
            )


def test_the_formulas_are_pytorch_s():
    """Three steps by hand, as torch.optim documents them."""
    g = [0.5, -1.0, 2.0]
    p, m, v = 1.0, 0.0, 0.0
    q, buf = 1.0, 0.0
    a = tensor.full((1,), 1.0, requires_grad=True)
    b = tensor.full((1,), 1.0, requires_grad=True)
    adamw = optim.AdamW([a], 0.1, decay=0.2, betas=(0.9, 0.99), eps=1e-3)
    sgd = optim.SGD([b], 0.1, momentum=0.9, nesterov=True, decay=0.2)
    for t, gradient in enumerate(g, 1):
        p *= 1 - 0.1 * 0.2
        m, v = 0.9 * m + 0.1 * gradient, 0.99 * v + 0.01 * gradient**2
        p -= 0.1 * (m / (1 - 0.9**t)) / (math.sqrt(v / (1 - 0.99**t)) + 1e-3)
        decayed = gradient + 0.2 * q
        buf = 0.9 * buf + decayed
        q -= 0.1 * (decayed + 0.9 * buf)
        for x, optimizer in ((a, adamw), (b, sgd)):
            x.grad = tensor.full((1,), gradient)
            optimizer.step()
    assert a.item() == pytest.approx(p, rel=1e-5)
    assert b.item() == pytest.approx(q, rel=1e-5)


def test_groups_have_numbers_of_their_own():
    a, b, c = (tensor.ones((2,), requires_grad=True) for _ in range(3))
    optimizer = optim.SGD([{"parameters": [a, c]}, {"parameters": [b], "rate": 1.0}], 0.25)
    for p in (a, b):
        p.grad = tensor.ones((2,))
    optimizer.step()
    assert [x.numpy().tolist() for x in (a, b, c)] == [[0.75] * 2, [0.0] * 2, [1.0] * 2]


def test_a_scale_that_is_not_finite_skips_the_step(rng):
    parameters = with_gradients(rng, parameters_of(rng))
    optimizer = optim.AdamW(parameters, 0.1)
    before = [a.tobytes() for group in kept(optimizer) for a in group]
    parameters[2].grad[3].fill_(math.nan)
    optimizer.step(optim.clip_by_norm(parameters, 1.0))
    optimizer.step(optim.skip_if_not_finite(parameters))
    assert [a.tobytes() for group in kept(optimizer) for a in group] == before
    parameters[2].grad.zero_()
    optimizer.step(optim.skip_if_not_finite(parameters))
    assert [a.tobytes() for group in kept(optimizer) for a in group] != before


def test_stochastic_rounding_is_right_on_average_and_repeats():
    def run(seed):
        x = tensor.full((2048,), 1.0, BF16, requires_grad=True)
        optimizer = optim.SGD([x], 2.0**-10, stochastic=True, seed=seed)
        assert set(optimizer.state_dict()) == {"steps", "0.first"}
        for _ in range(4):
            x.grad = tensor.ones((2048,))
            optimizer.step()
        return x.numpy().astype(np.float64)

    first = run(1)
    np.testing.assert_array_equal(first, run(1))
    assert (first != run(2)).any()
    # Four steps of a quarter of a unit in the last place; rounded to nearest, none would move.
    assert abs(first.mean() - (1 - 4 * 2.0**-10)) < 4e-4
    assert len(np.unique(first)) > 1


def test_resuming_continues_bit_for_bit(rng, tmp_path):
    gradients = rng.standard_normal((4, 50))
    start = rng.standard_normal(50)

    def made():
        x = tensor.from_numpy(start, kind=BF16, requires_grad=True)
        return x, optim.AdamW([x], 0.1, decay=0.1, schedule=optim.cosine(4))

    def steps(x, optimizer, rows):
        for row in rows:
            x.grad = tensor.from_numpy(row, kind=F32)
            optimizer.step()

    x, whole = made()
    steps(x, whole, gradients)
    y, half = made()
    steps(y, half, gradients[:2])
    optim.save_state(tmp_path / "state.safetensors", half)
    z, resumed = made()
    z.requires_grad_(False)
    z.copy_(y.detach())
    optim.load_state(tmp_path / "state.safetensors", resumed)
    assert resumed.steps == 2
    steps(z, resumed, gradients[2:])
    assert z.numpy().tobytes() == x.numpy().tobytes()
    assert resumed.state_dict()["0.second"].tobytes() == whole.state_dict()["0.second"].tobytes()


def test_generators_continue_where_they_were(tmp_path):
    x = tensor.ones((4,), requires_grad=True)
    optimizer, generator = optim.SGD([x], 0.1), tensor.Generator(5)
    tensor.rand((3,), generator=generator)
    optim.save_state(tmp_path / "s.safetensors", optimizer, {"dropout": generator})
    wanted = tensor.rand((3,), generator=generator).numpy()
    again = tensor.Generator(0)
    optim.load_state(tmp_path / "s.safetensors", optimizer, {"dropout": again})
    np.testing.assert_array_equal(tensor.rand((3,), generator=again).numpy(), wanted)
    with pytest.raises(RefusedInput, match=r"generator\.dropout is of no generator given"):
        optim.load_state(tmp_path / "s.safetensors", optimizer)
    with pytest.raises(RefusedInput, match=r"generator\.other is missing"):
        optim.load_state(tmp_path / "s.safetensors", optimizer, {"dropout": again, "other": generator})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("0.first"), "0.first is missing"),
        (lambda s: s.update({"1.first": s["0.first"]}), "1.first belongs to no parameter"),
        (lambda s: s.pop("steps"), "steps is missing"),
        (lambda s: s.update({"0.first": np.zeros(3, np.float32)}), r"0.first is float32 \(3,\), wanted float32 \(4,\)"),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(change, message):
    x = tensor.ones((4,), requires_grad=True)
    optimizer = optim.SGD([x], 0.1, momentum=0.9)
    x.grad = tensor.ones((4,))
    optimizer.step()
    state = optimizer.state_dict()
    before = state["0.first"].copy()
    change(state)
    with pytest.raises(RefusedInput, match=message):
        optimizer.load_state_dict(state)
    np.testing.assert_array_equal(optimizer.state_dict()["0.first"], before)


def test_zero_grad():
    x = tensor.ones((4,), requires_grad=True)
    optimizer = optim.SGD([x], 0.1)
    x.grad = tensor.ones((4,))
    held = x.grad.storage
    optimizer.zero_grad(keep_memory=True)
    assert x.grad.storage is held
    assert x.grad.numpy().tolist() == [0] * 4
    optimizer.zero_grad()
    assert x.grad is None
    optimizer.step()


def test_schedules():
    assert [optim.linear(4)(s) for s in range(6)] == [1, 0.75, 0.5, 0.25, 0, 0]
    assert [optim.cosine(2, 0.1)(s) for s in (0, 1, 2, 9)] == pytest.approx([1, 0.55, 0.1, 0.1])
    warmed = optim.warmup(optim.linear(2, 0.5), 2)
    assert [warmed(s) for s in range(6)] == [0.5, 1, 1, 0.75, 0.5, 0.5]
    assert optim.constant()(77) == 1
    with pytest.raises(RefusedInput, match="cosine: 0 steps, wanted 1 or more"):
        optim.cosine(0)


@pytest.mark.parametrize("kind", [F32, BF16], ids=lambda k: k.value)
def test_statistics_of_tensors(device, rng, kind):
    arrays = [round_to(rng.standard_normal(n) * 3, kind) for n in SIZES]
    arrays[3][[4, 200]] = np.nan
    arrays[5][[0, 5, 1030]] = np.inf, -np.inf, np.inf
    found = raw_statistics([tensor.from_numpy(a) for a in arrays]).numpy()
    assert found[3, 2:].tolist() == [2, 0]
    assert found[5, 2:].tolist() == [0, 3]
    assert found[-1, 2:].tolist() == [2, 3]
    clean = [np.where(np.isfinite(a.astype(np.float64)), a, 1).astype(a.dtype) for a in arrays]
    descriptor = StatisticsDescriptor(kind, SIZES)
    guarantee = StatisticsPlan.select(None, descriptor, device=device).precision_guarantee
    exact, magnitude = descriptor.reference(clean)
    found = raw_statistics([tensor.from_numpy(a) for a in clean]).numpy()
    assert guarantee.accepts(found, exact, magnitude, F32).all()


def test_statistics_for_the_user(rng):
    parameters = with_gradients(rng, parameters_of(rng, (3, 5)))
    parameters[1].grad[0].fill_(-100.0)
    found = optim.statistics(parameters)
    norms = [np.linalg.norm(p.grad.numpy()) for p in parameters]
    assert found.norms == pytest.approx(norms, rel=1e-6)
    assert found.norm == pytest.approx(np.hypot(*norms), rel=1e-6)
    assert (found.largest, found.nan, found.infinite, found.finite) == (100.0, 0, 0, True)


def gradients_of(parameters):
    return [p.grad.numpy().astype(np.float64) for p in parameters]


def test_clipping(rng):
    parameters = with_gradients(rng, parameters_of(rng, (50, 7)))
    before = gradients_of(parameters)
    norm = math.sqrt(sum((g**2).sum() for g in before))
    assert optim.clip_by_norm(parameters, 0.5).item() == pytest.approx(0.5 / norm, rel=1e-5)
    assert optim.clip_by_norm(parameters, 1e6).item() == 1
    optim.clip_by_value(parameters, 0.3)
    for g, b in zip(gradients_of(parameters), before, strict=True):
        np.testing.assert_allclose(g, np.clip(b, -0.3, 0.3), rtol=1e-6)
    parameters[0].grad[0].fill_(math.nan)
    optim.clip_by_value(parameters, 0.3)
    assert math.isnan(parameters[0].grad.numpy()[0])


def test_adaptive_clipping_and_normalisation(rng):
    parameters = with_gradients(rng, parameters_of(rng, (50, 7), BF16))
    parameters[1].grad.mul_(1e-4)
    before = gradients_of(parameters)
    optim.clip_adaptive(parameters, 0.1)
    for g, b, p in zip(gradients_of(parameters), before, parameters, strict=True):
        most = 0.1 * np.linalg.norm(p.numpy().astype(np.float64))
        np.testing.assert_allclose(g, b * min(1, most / np.linalg.norm(b)), rtol=1e-4)
    optim.normalize(parameters)
    assert [np.linalg.norm(g) for g in gradients_of(parameters)] == pytest.approx([1, 1], rel=1e-2)


def test_noise_repeats_by_seed_and_step(rng):
    def noise(seed, step):
        p = tensor.zeros((2001,), requires_grad=True)
        p.grad = tensor.zeros((2001,))
        optim.add_noise([p], 0.5, seed=seed, step=step)
        return p.grad.numpy()

    first = noise(1, 2)
    np.testing.assert_array_equal(first, noise(1, 2))
    assert (first != noise(1, 3)).any()
    assert abs(first.std() - 0.5) < 0.05
    assert abs(first.mean()) < 0.05


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda x: optim.SGD([], 0.1), "no parameters given"),
        (lambda x: optim.SGD([x, x], 0.1), "a parameter is given twice"),
        (lambda x: optim.SGD([tensor.ones((2,))], 0.1), "no leaf with requires_grad"),
        (lambda x: optim.SGD([x], 0.1, beta=3), "no option 'beta', wanted one of betas, decay, eps"),
        (lambda x: optim.SGD([x], -0.1), "wanted rate, decay and eps of 0 or more"),
        (lambda x: optim.SGD([x], 0.1, momentum=1.0), "wanted betas and momentum of 0 up to"),
        (lambda x: optim.clip_by_norm([x], 1.0), "no parameter has a gradient; call backward"),
        (lambda x: optim.clip_by_norm([x], 0.0), "limit 0.0, wanted a positive number"),
        (lambda x: optim.clip_by_value([x], -1.0), "limit -1.0, wanted 0 or more"),
    ],
)
def test_what_is_refused(act, message):
    with pytest.raises(RefusedInput, match=message):
        act(tensor.ones((4,), requires_grad=True))


def test_gradients_of_another_shape_or_kind_are_refused():
    x = tensor.ones((4,), requires_grad=True)
    optimizer = optim.SGD([x], 0.1)
    x.grad = tensor.ones((3,))
    with pytest.raises(RefusedInput, match=r"a gradient of f32 \(3,\), wanted f32 \(4,\)"):
        optimizer.step()
    x.grad = tensor.ones((4,), BF16)
    with pytest.raises(RefusedInput, match="a gradient of bf16"):
        optimizer.step()


def test_descriptors_that_contradict_themselves(device):
    with pytest.raises(InvalidProblem, match="an fp32 copy of fp32 parameters"):
        UpdateDescriptor(Rule.SGD, F32, True, False, (1,), (0,))
    with pytest.raises(InvalidProblem, match="stochastic rounding to f16, wanted bf16"):
        UpdateDescriptor(Rule.SGD, F16, False, True, (1,), (0,))
    with pytest.raises(InvalidProblem, match="2 counts, 1 groups"):
        UpdateDescriptor(Rule.SGD, F32, False, False, (1, 2), (0,))
    with pytest.raises(NoSku, match="takes bf16, f16, f32, not i32"):
        UpdatePlan.select(None, UpdateDescriptor(Rule.SGD, I32, False, False, (1,), (0,)), device=device)
    assert AdjustPlan.select(None, AdjustDescriptor(()), device=device).workspace_size() == 0
