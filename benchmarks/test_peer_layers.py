"""Layers with live adapters beside lycoris-lora with Triton and PEFT; the peers measure in a process of their own."""

from __future__ import annotations

import statistics
from typing import Any

import numpy as np
import pytest
from cases import Limit
from measure import ROUNDS, WARMUP_ROUNDS, Result, record
from problem import repeats
from test_adapted_speed import LARGE, RANK, SQUARE, TOKENS, LayerReplay, Row
from test_peer_speed import ask_peer
from timing import rotations

from lycoris.ops import factorization
from plans.core import Device


def _factors(row: Row) -> tuple[str, list[tuple[int, ...] | None]]:
    """The peer's module and the shapes that its functions take, in its order."""
    out, channels = row.out, row.channels
    if row.adapter.startswith("LoCon"):
        return "locon", [(RANK, channels), (out, RANK), None]
    if row.adapter.startswith("LoHa"):
        return "loha", [(RANK, channels), (out, RANK), (RANK, channels), (out, RANK), None, None]
    factor = -1 if row.adapter.startswith("LoKr -1") else 8
    (a, c), (b, d) = factorization(out, factor), factorization(channels, factor)
    if row.adapter.endswith("r=16"):
        return "lokr", [(a, b), None, None, None, (c, RANK), (RANK, d), None]
    return "lokr", [(a, b), None, None, (c, d), None, None, None]


NAMES = ("LoCon r=16", "LoKr -1", "LoKr 8", "LoKr 8 r=16", "LoHa r=16")
ROWS = [
    (Row(TOKENS, *shape, name, 1.0), peer)
    for shape in (*SQUARE, *LARGE)
    for name in NAMES
    for peer in (("lycoris-lora", "PEFT") if name.startswith("LoCon") else ("lycoris-lora",))
]


def _problem(row: Row, peer: str) -> dict[str, Any]:
    module, factors = ("peft", [(RANK,)]) if peer == "PEFT" else _factors(row)
    pairs = rotations(2 * row.tokens * (row.out + row.channels))
    return {
        "id": f"{row} {peer}",
        "module": module,
        "shape": (row.out, row.channels),
        "factors": factors,
        "pairs": pairs,
        "repeats": repeats(pairs),
        "tokens": row.tokens,
    }


@pytest.fixture(scope="module")
def peers(device: Device, request: pytest.FixtureRequest) -> dict[str, Any]:
    """The peers' times of the rows that were selected, and their versions."""
    items = [item for item in request.session.items if item.path == request.path]
    return ask_peer([_problem(item.callspec.params["row"], item.callspec.params["name"]) for item in items])


@pytest.mark.benchmark(group="layers beside peers")
@pytest.mark.parametrize(("row", "name"), ROWS, ids=str)
def test_peer_layers(
    row: Row, name: str, device: Device, peers: dict[str, Any], rng: np.random.Generator, benchmark: Any
):
    """No gate: the table of the issue compares with the bare linear; this says what users have today."""
    found: list[float] = []
    ours = LayerReplay(device, rng, row)
    benchmark.pedantic(lambda: found.append(ours.seconds()), rounds=ROUNDS, warmup_rounds=WARMUP_ROUNDS)
    seconds, shape = statistics.median(found[WARMUP_ROUNDS:]), f"{row.tokens} x {row.out}x{row.channels}"
    limit = Limit.PEFT if name == "PEFT" else Limit.PEER
    result = Result(row.work, shape, row.adapter, row.mode, seconds, limit, peers["seconds"][f"{row} {name}"], None)
    record(benchmark, result, peers=peers["versions"])
