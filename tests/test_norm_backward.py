"""All gradients of a normalisation in one pass: against float64, for every kind, beside what else x's gradient gets."""

from __future__ import annotations

import numpy as np
import pytest

from kernels import normalization as kernel
from lycoris import tensor
from lycoris.tensor import rows as tensor_rows
from plans.core import ElementKind, InvalidProblem, NoSku, Workspace
from plans.core.precision import round_to
from plans.norm_backward import NormBackwardArgs, NormBackwardDescriptor, NormBackwardPlan

BF16, F16, F32, I32 = ElementKind.BF16, ElementKind.F16, ElementKind.F32, ElementKind.I32
SAME = {kind.value: (kind,) * 4 for kind in (BF16, F16, F32)}


def arrays_of(rng, descriptor):
    operands = descriptor.operands()[2 + descriptor.bias :]
    return [
        round_to(rng.uniform(0.5, 2, o.shape) if o.name == "rstd" else rng.standard_normal(o.shape), o.element)
        for o in operands
    ]


def run(device, poisoned, descriptor, arrays):
    plan, stream = NormBackwardPlan.select(None, descriptor, device=device), device.stream()
    outs = descriptor.operands()[: 2 + descriptor.bias]
    buffers = [poisoned(o.nbytes) for o in outs]
    targets = [b.tensor(o.element, o.shape) for b, o in zip(buffers, outs, strict=True)]
    sources = [device.upload(a).tensor(ElementKind.of(a.dtype), a.shape) for a in arrays]
    workspace = Workspace(poisoned(plan.workspace_size()))
    plan.run(stream, workspace, NormBackwardArgs(targets, sources))
    device.synchronize(stream)
    return plan, [device.download(b, o.element.values, o.shape) for b, o in zip(buffers, outs, strict=True)]


def check(device, poisoned, rng, descriptor):
    arrays = arrays_of(rng, descriptor)
    plan, found = run(device, poisoned, descriptor, arrays)
    outs = descriptor.operands()[: 2 + descriptor.bias]
    for values, (exact, magnitude), out in zip(found, descriptor.reference(arrays), outs, strict=True):
        kept = plan.precision_guarantee.accepts(values, exact.reshape(out.shape), magnitude, out.element)
        assert kept.all(), f"{out.name}: {values[~kept][:3]} for {exact[~kept][:3]}"
    return found


@pytest.mark.parametrize("kinds", SAME.values(), ids=SAME)
@pytest.mark.parametrize("centred", [True, False], ids=["layer", "root mean square"])
@pytest.mark.parametrize(("rows", "n"), [(1, 256), (7, 520), (70, 264)])
def test_gradients_keep_their_bounds(device, poisoned, rng, kinds, centred, rows, n):
    check(device, poisoned, rng, NormBackwardDescriptor(centred, rows, n, kinds, F32, bias=centred))


@pytest.mark.parametrize("added", [BF16, F32], ids=lambda kind: kind.value)
def test_a_gradient_that_was_there_already_is_added(device, poisoned, rng, added):
    d = NormBackwardDescriptor(True, 5, 256, (BF16, F32, F16, F32), BF16, bias=False, added=added)
    check(device, poisoned, rng, d)


@pytest.mark.parametrize(("n", "teams"), [(1032, 4), (2056, 2), (8192, 1)])
def test_long_rows(device, poisoned, rng, n, teams):
    d = NormBackwardDescriptor(True, 5, n, (BF16,) * 4, BF16, bias=True)
    assert kernel.teams_of(d.team) == teams
    check(device, poisoned, rng, d)


def test_the_formulas(rng):
    """Against finite differences of the normalisation itself."""
    x, g, w = rng.standard_normal((3, 4, 256))
    w = w[0]

    def loss(x, w, b):
        y = (x - x.mean(1, keepdims=True)) / x.std(1, keepdims=True)
        return ((y * w + b) * g).sum()

    sources = [x, g, w, x.mean(1), 1 / x.std(1)]
    d = NormBackwardDescriptor(True, 4, 256, (F32,) * 4, F32, bias=True)
    d_x, d_w, d_b = (exact for exact, _ in d.reference(sources))
    along, step = rng.standard_normal(x.shape), 1e-6
    difference = (loss(x + step * along, w, 0) - loss(x - step * along, w, 0)) / (2 * step)
    np.testing.assert_allclose((d_x * along).sum(), difference, rtol=1e-4, atol=1e-5)
    difference = (loss(x, w + step * along[0], 0) - loss(x, w - step * along[0], 0)) / (2 * step)
    np.testing.assert_allclose((d_w * along[0]).sum(), difference, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(d_b, g.sum(0))


@pytest.mark.parametrize("residual", [False, True], ids=["alone", "beside a residual"])
@pytest.mark.parametrize("centred", [True, False], ids=["layer", "root mean square"])
def test_a_tensor_whose_gradients_are_all_wanted_takes_one_pass(device, rng, monkeypatch, centred, residual):
    made, all_gradients = [], tensor_rows._all_gradients
    monkeypatch.setattr(tensor_rows, "_all_gradients", lambda *given: made.append(all_gradients(*given)) or made[-1])
    arrays = [rng.standard_normal(shape).astype(np.float32) for shape in ((2, 3, 256), (256,), (256,), (2, 3, 256))]
    x, w, b, g = (tensor.from_numpy(array) for array in arrays)
    affine = [p.requires_grad_() for p in (w, b)[: 1 + centred]]
    h = x.requires_grad_() * 1
    y = tensor.layer_norm(h, w, b) if centred else tensor.rms_norm(h, w)
    outs, seeds = ([y, h.clone()], [g, g]) if residual else ([y], [g])
    found = tensor.grad(outs, [h, *affine], seeds)
    assert len(made) == 1
    x, w, _, g = (array.astype(np.float64).reshape(-1, 256) for array in arrays)
    mean = x.mean(1) if centred else np.zeros(6)
    rstd = 1 / np.sqrt(((x - mean[:, None]) ** 2).mean(1) + (1e-5 if centred else 1e-6))
    d = NormBackwardDescriptor(centred, 6, 256, (F32,) * 4, F32, bias=centred)
    exact = [e for e, _ in d.reference([x, g, w[0], *(mean,) * centred, rstd])]
    exact[0] = exact[0] + g if residual else exact[0]
    for gradient, wanted in zip(found, exact, strict=True):
        np.testing.assert_allclose(gradient.numpy().reshape(wanted.shape), wanted, rtol=1e-4, atol=1e-4)


def test_two_runs_have_the_same_bits(device, poisoned, rng):
    d = NormBackwardDescriptor(True, 9, 264, (BF16,) * 4, F32, bias=True)
    arrays = arrays_of(rng, d)
    first, second = (run(device, poisoned, d, arrays)[1] for _ in range(2))
    assert [a.tobytes() for a in first] == [b.tobytes() for b in second]


def test_what_is_refused(device):
    kinds = (BF16,) * 4
    with pytest.raises(InvalidProblem, match="wanted 0 or more"):
        NormBackwardDescriptor(True, -1, 256, kinds, F32)
    for n in (248, 8200, 260):
        with pytest.raises(NoSku, match="takes rows of 256 to 8192 columns in multiples of 8"):
            NormBackwardPlan.select(None, NormBackwardDescriptor(True, 2, n, kinds, F32), device=device)
    with pytest.raises(NoSku, match="computes on bf16, f16, f32, not i32"):
        NormBackwardPlan.select(None, NormBackwardDescriptor(True, 2, 256, (I32,) * 4, F32), device=device)
