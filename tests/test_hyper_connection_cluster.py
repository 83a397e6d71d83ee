"""Dynamic hyper-connections in one pass: teams of every size, walks of several stages, what the kernel refuses."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hyper_cases import assert_kept, problem, run, tensors_of

from kernels import warp
from kernels.hyper_connection.cluster import inverse_root
from kernels.hyper_connection.cluster_stage import SAMPLES, SHARED_BYTES, Team, shared_bytes
from kernels.sinkhorn_thread import inverse
from plans.core import BackendKind, Device, ElementKind, NoSku, PlanPreference, Workspace
from plans.hyper_connection import cluster
from plans.hyper_connection.common import NamedArguments
from plans.hyper_connection.dynamic import DynamicHyperConnectionDescriptor, DynamicHyperConnectionPlan
from plans.hyper_connection.split import HyperConnectionPreDescriptor, HyperConnectionPrePlan
from plans.sinkhorn import SinkhornMode

pytestmark = pytest.mark.skipif(Device.open().arch < (9, 0), reason="clusters are sm_90's")

F32, BF16 = ElementKind.F32, ElementKind.BF16
EXP, SOFTMAX = SinkhornMode.EXP, SinkhornMode.SOFTMAX
EPS = 1e-5
CLUSTER, MMA = (PlanPreference(prefer_backend=kind) for kind in (BackendKind.CLUSTER, BackendKind.MMA))


def whole(batch, channels, n, gamma=BF16, mode=EXP, iterations=4):
    return DynamicHyperConnectionDescriptor(batch, channels, n, iterations, EPS, BF16, gamma, BF16, mode)


def before(batch, channels, n, gamma=None, mode=EXP, iterations=4):
    return HyperConnectionPreDescriptor(batch, channels, n, iterations, EPS, BF16, gamma, BF16, mode)


def plan_of(descriptor):
    return (
        DynamicHyperConnectionPlan
        if isinstance(descriptor, DynamicHyperConnectionDescriptor)
        else HyperConnectionPrePlan
    )


def check(device, poisoned, descriptor, arrays, preference=CLUSTER):
    plan, found = run(device, poisoned, plan_of(descriptor), descriptor, arrays, preference)
    kept = {name: found[name] for name in ("projected", "mixing")}
    assert_kept(plan, found, descriptor.reference(**arrays, **kept))
    return found


@pytest.fixture
def team(monkeypatch):
    """``team(blocks, warps)``: let clusters share the channels in this way, whatever their number."""

    def choose(*sizes):
        monkeypatch.setattr(cluster, "team_of", lambda n, channels: Team(*sizes))

    return choose


@pytest.mark.parametrize(
    ("descriptor", "sizes"),
    [
        (whole(1, 8, 1), (2, 1)),
        (whole(17, 40, 4, F32), (2, 1)),
        (whole(5, 72, 3, mode=SOFTMAX, iterations=20), (2, 3)),
        (whole(16, 96, 2, iterations=20), (4, 1)),
        (whole(3, 200, 4, mode=SOFTMAX), (8, 1)),
        (whole(3, 136, 4), (2, 3)),
        (before(33, 40, 4), (2, 1)),
        (before(4, 104, 2, F32, SOFTMAX), (4, 1)),
        (before(2, 24, 3, BF16, iterations=20), (2, 1)),
    ],
    ids=str,
)
def test_teams_of_every_size(device, poisoned, rng, team, descriptor, sizes):
    team(*sizes)
    check(device, poisoned, descriptor, problem(rng, descriptor))


@pytest.mark.parametrize("channels", [8, 136, 264, 1032])
def test_the_team_that_is_chosen(device, poisoned, rng, channels):
    descriptor = whole(2, channels, 2 if channels > 1000 else 4)
    check(device, poisoned, descriptor, problem(rng, descriptor))


@pytest.mark.parametrize(("n", "channels"), [(4, 4096), (4, 2560), (4, 1280), (1, 4096), (2, 8), (3, 1000), (4, 512)])
def test_teams_cover_the_channels_and_fit(n, channels):
    team = cluster.team_of(n, channels)
    assert channels <= 32 * team.warps * team.blocks
    assert team.blocks == 2 or 32 * team.warps * (team.blocks - 1) < channels
    assert shared_bytes(n, team) <= SHARED_BYTES and SAMPLES % team.blocks == 0


def test_one_block_is_no_team():
    """st.async outside a cluster is an illegal instruction."""
    with pytest.raises(AssertionError):
        Team(1, 4)


@pytest.mark.parametrize("scale", [0.01, 20.0])
@pytest.mark.parametrize("mode", SinkhornMode, ids=lambda mode: mode.value)
def test_mixing_parameters_of_every_size(device, poisoned, rng, team, scale, mode):
    team(2, 1)
    descriptor = whole(3, 48, 4, mode=mode, iterations=20)
    check(device, poisoned, descriptor, problem(rng, descriptor, scale))


@pytest.mark.parametrize("role", ["full", "pre"])
@pytest.mark.parametrize("sizes", [(2, 2), (4, 1)], ids=str)
def test_a_walk_gives_the_bits_of_a_cluster_a_stage(device, poisoned, rng, team, sizes, role):
    team(*sizes)
    descriptor = whole(71, 48, 2) if role == "full" else before(71, 48, 2)
    arrays, stream = problem(rng, descriptor), device.stream()
    results = []
    for clusters in (None, 1, 2, 3):
        tensors = tensors_of(device, poisoned, descriptor, arrays)
        program = cluster.ClusterProgram(role, descriptor, device, clusters)
        for launch, arguments in program.bind(NamedArguments(descriptor, **tensors), Workspace(poisoned(1))):
            launch(stream, arguments)
        device.synchronize(stream)
        results.append(
            [
                device.download(tensors[o.name].owner, o.element.storage, o.shape, stream).tobytes()
                for o in descriptor.operands()
                if o.writes
            ]
        )
    assert all(result == results[0] for result in results[1:])
    check(device, poisoned, descriptor, arrays)


def test_samples_do_not_mix(device, poisoned, rng):
    """A sample's result is that of the sample alone; one that is not a number stays alone."""
    descriptor = whole(18, 40, 4)
    arrays = problem(rng, descriptor)
    arrays["x_expanded"][3, 1, 7] = np.nan
    _, together = run(device, poisoned, DynamicHyperConnectionPlan, descriptor, arrays, CLUSTER)
    for value in together.values():
        bad = np.isnan(value.astype(np.float32)).reshape(18, -1).any(1)
        assert bad[3] and bad.sum() == 1
    alone = dataclasses.replace(descriptor, batch=1)
    for b in (0, 5, 17):
        one = arrays | {"x_expanded": arrays["x_expanded"][b : b + 1]}
        found = check(device, poisoned, alone, one)
        for name, value in found.items():
            assert value.tobytes() == together[name][b : b + 1].tobytes(), name


def test_the_kernels_for_other_devices_agree(device, poisoned, rng):
    descriptor = whole(5, 64, 4, iterations=20)
    arrays = problem(rng, descriptor)
    for preference in (CLUSTER, MMA):
        check(device, poisoned, descriptor, arrays, preference)


@pytest.mark.parametrize(("name", "units"), [("inverse", 1.01), ("root", 2.1)])
def test_reciprocals_without_a_branch(rng, run_kernel, name, units):
    values = np.exp(rng.uniform(-80, 80, 1024)).astype(np.float32)
    exact = 1 / values.astype(np.float64) if name == "inverse" else values.astype(np.float64) ** -0.5
    (found,) = run_kernel(_inverses if name == "inverse" else _roots, [values], [(np.float32, 1024)], threads=1024)
    assert (np.abs(found / exact - 1) <= units * 2.0**-24).all()


def _inverses(x, out):
    i = np.int64(warp.thread_index())
    out[i] = inverse(x[i])


def _roots(x, out):
    i = np.int64(warp.thread_index())
    out[i] = inverse_root(x[i])


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"element": F32}, "takes element bf16, not f32"),
        ({"projection": F32}, "takes projection bf16, not f32"),
        ({"gamma": ElementKind.F16}, "takes gamma f32 or bf16, not f16"),
        ({"n_streams": 5}, "takes 1 to 4 streams, not 5"),
        ({"hidden_dim": 20}, "takes a multiple of 8 channels, not 20"),
        ({"hidden_dim": 4104}, "holds three stages of samples in a cluster, and 4 x 4104 are too large"),
        ({"batch": 2**31}, r"takes fewer than 2\*\*31 samples"),
    ],
)
def test_what_it_refuses(device, changed, reason):
    for descriptor in (whole(2, 64, 4), before(2, 64, 4)):
        with pytest.raises(NoSku, match=reason):
            plan_of(descriptor).choose(dataclasses.replace(descriptor, **changed), CLUSTER, device)


def test_it_takes_a_dynamic_h(device):
    with pytest.raises(NoSku, match="takes a dynamic H"):
        HyperConnectionPrePlan.choose(HyperConnectionPreDescriptor(2, 64, 4, 4, EPS, BF16), CLUSTER, device)
