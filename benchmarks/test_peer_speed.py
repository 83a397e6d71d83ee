"""W + dW beside lycoris-lora with Triton, in the same run; the peer measures itself in a process of its own."""

from __future__ import annotations

import importlib.util
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases import ALGORITHMS, PEER_ROWS, Limit, WeightRow
from measure import ROUNDS, WARMUP_ROUNDS, Result, record
from problem import Problem, repeats
from timing import Replay, rotations

from plans.core import Device
from plans.weight import Hadamard, Kronecker, LowRank

PEER = Path(__file__).with_name("peer.py")
SECONDS_ALLOWED = 500

Shapes = list[tuple[int, ...] | None]


def peer_factors(row: WeightRow) -> tuple[str, Shapes]:
    """The module of ``lycoris.functional`` and the shapes that its ``diff_weight`` takes, in its order."""
    descriptor = row.descriptor()
    (source,), (operands,) = descriptor.sources, descriptor.source_operands
    shapes = [operand.shape for operand in operands]
    match source:
        case LowRank():
            up, down = shapes
            return "locon", [down, up, None]
        case Hadamard():
            up1, down1, up2, down2 = shapes
            return "loha", [down1, up1, down2, up2, None, None]
        case Kronecker(w2=LowRank()):
            w1, w2a, w2b = shapes
            return "lokr", [w1, None, None, None, w2a, w2b, None]
        case Kronecker():
            w1, w2 = shapes
            return "lokr", [w1, None, None, w2, None, None, None]
    raise AssertionError(f"{row}: lycoris-lora has no {source}")


def peer_problem(row: WeightRow) -> dict[str, Any]:
    """What `peer.py` reads."""
    module, factors = peer_factors(row)
    shape = (row.out_features, row.in_features)
    pairs = rotations(2 * 2 * row.out_features * row.in_features)
    return {
        "id": str(row),
        "module": module,
        "shape": shape,
        "factors": factors,
        "pairs": pairs,
        "repeats": repeats(pairs),
    }


def ask_peer(problems: list[dict[str, Any]]) -> dict[str, Any]:
    """What `peer.py` answers; skips where there is no peer."""
    if "LYCORIS_PEER_SITE" not in os.environ:
        pytest.skip("LYCORIS_PEER_SITE is not set; wanted the folder that holds lycoris-lora (docs/benchmarks.md)")
    if importlib.util.find_spec("torch") is None:
        pytest.skip("lycoris-lora needs torch, which this Python does not have")
    command, text = [sys.executable, str(PEER)], json.dumps(problems)
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False, timeout=SECONDS_ALLOWED)
    assert done.returncode == 0, f"{PEER.name} failed:\n{done.stderr}"
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def peer(device: Device, request: pytest.FixtureRequest) -> dict[str, Any]:
    """The peer's times of the rows that were selected, and its versions."""
    items = [item for item in request.session.items if item.path == request.path]
    return ask_peer([peer_problem(item.callspec.params["row"]) for item in items if "row" in item.callspec.params])


@pytest.mark.benchmark(group="beside lycoris-lora")
@pytest.mark.parametrize("row", PEER_ROWS, ids=str)
def test_peer_speed(row: WeightRow, device: Device, peer: dict[str, Any], rng: np.random.Generator, benchmark: Any):
    found: list[float] = []
    with Problem(device, row.descriptor(), rng) as problem:
        ours = Replay(device, problem.calls)
        benchmark.pedantic(lambda: found.append(ours.seconds()), rounds=ROUNDS, warmup_rounds=WARMUP_ROUNDS)
        problem.check(rng)
    result = Result(
        "W + dW",
        row.shape,
        ALGORITHMS[row.algorithm].title,
        problem.plan.chosen.name,
        statistics.median(found[WARMUP_ROUNDS:]),
        Limit.PEER,
        peer["seconds"][str(row)],
        row.gate,
    )
    record(benchmark, result, peer=peer["versions"])
