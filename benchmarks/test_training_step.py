"""Training as users run it, wall time: forward and backward of one layer, and the step of a transformer beside PEFT's.

A round is several steps and one synchronisation. The transformer's peer, PEFT with torch.compile, measures itself in a
process of its own; the faster of its two modes counts.
"""

from __future__ import annotations

import importlib.util
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases import Limit
from measure import ROUNDS, WARMUP_ROUNDS, Result, record
from test_adapted_speed import TOKENS, Row, random_layer, random_tensor
from test_adapter_gradient_speed import LAYERS, products

from lycoris import nn, optim, tensor
from lycoris.algorithms import LoConModule
from lycoris.buffers import stream_of
from lycoris.graph import capture
from lycoris.tensor import Generator, Tensor
from lycoris.tensor.autograd import enable_grad, grad
from plans.core import Device, ElementKind

STEPS = 20
WALL = 1.2
"""How much longer than its device time's gate a step of large layers may take on the wall."""

SMALL = Row(1024, 1280, 1280, "LoCon r=16", 1.0)
EAGER_SECONDS, REPLAYED_SECONDS = 150e-6, 80e-6

PEER = Path(__file__).with_name("transformer_peer.py")
PEER_SECONDS_ALLOWED = 500
TRANSFORMER = {"width": 1024, "heads": 16, "blocks": 12, "batch": 4, "length": TOKENS // 4, "rank": 16}
TRANSFORMER_GATE = 1 / 1.15


def layer_step(device: Device, rng: np.random.Generator, row: Row) -> Callable[[], list[Tensor]]:
    """Forward and backward of a layer, to its input, which a layer before has made, and its factors."""
    layer = random_layer(device, rng, row).train()
    wanted = [parameter.requires_grad_() for _, parameter in layer.parameters()]
    with enable_grad():  # a leaf's gradient would be fp32, an activation's has its kind
        x = -random_tensor(device, rng, (row.tokens, row.channels)).requires_grad_()
    g = random_tensor(device, rng, (row.tokens, row.out))

    def step() -> list[Tensor]:
        with enable_grad():
            return grad([layer(x)], [x, *wanted], [g])

    return step


def wall_seconds(device: Device, benchmark: Any, step: Callable[[], Any]) -> float:
    """Median wall seconds of a step."""
    found: list[float] = []

    def steps() -> None:
        start = time.perf_counter()
        for _ in range(STEPS):
            step()
        device.synchronize(stream_of(device))
        found.append((time.perf_counter() - start) / STEPS)

    benchmark.pedantic(steps, rounds=ROUNDS, warmup_rounds=WARMUP_ROUNDS)
    return statistics.median(found[WARMUP_ROUNDS:])


@pytest.mark.benchmark(group="training steps")
@pytest.mark.parametrize("replayed", [False, True], ids=["eager", "graph"])
def test_small_layer(replayed: bool, device: Device, rng: np.random.Generator, benchmark: Any):
    """What Python costs shows here: the device needs some 30 us."""
    step = layer_step(device, rng, SMALL)
    seconds = wall_seconds(device, benchmark, capture(step, device).replay if replayed else step)
    work, budget = ("from a graph", REPLAYED_SECONDS) if replayed else ("eager", EAGER_SECONDS)
    shape = f"{SMALL.tokens} x {SMALL.out}x{SMALL.channels}"
    record(
        benchmark,
        Result(f"forward and backward, {work}", shape, SMALL.adapter, "", seconds, Limit.BUDGET, budget, 1.0),
    )


@pytest.mark.benchmark(group="training steps")
@pytest.mark.parametrize("row", LAYERS, ids=str)
def test_large_layers(row: Row, device: Device, rng: np.random.Generator, benchmark: Any):
    limits = products(row)
    limit = statistics.median(limits.seconds() for _ in range(ROUNDS))
    seconds = wall_seconds(device, benchmark, layer_step(device, rng, row))
    work, shape = f"forward and backward, {row.mode}, wall", f"{row.tokens} x {row.out}x{row.channels}"
    record(benchmark, Result(work, shape, row.adapter, row.mode, seconds, Limit.CUBLAS, limit, row.gate * WALL))


class Transformer(nn.Module):
    """Blocks one after the other."""

    def __init__(self, generator: Generator) -> None:
        width, heads, blocks = (TRANSFORMER[name] for name in ("width", "heads", "blocks"))
        options = {"kind": ElementKind.BF16, "generator": generator}
        self.blocks = [nn.TransformerBlock(width, heads, **options) for _ in range(blocks)]

    def forward(self, x: Tensor) -> Tensor:
        """Of x [batch, length, width] gives the same shape."""
        for block in self.blocks:
            x = block(x)
        return x


def transformer_step(device: Device, rng: np.random.Generator) -> Callable[[], Any]:
    """A captured forward, backward and AdamW."""
    model = Transformer(Generator(0))
    adapters = nn.adapt(model, LoConModule, TRANSFORMER["rank"], seed=1)
    model.train()
    optimizer = optim.AdamW(nn.parameters_of(adapters), 1e-4)
    shape = tuple(TRANSFORMER[name] for name in ("batch", "length", "width"))
    x, wanted = (random_tensor(device, rng, shape) for _ in range(2))

    def step() -> Tensor:
        with enable_grad():
            optimizer.zero_grad()
            loss = tensor.mse_loss(model(x), wanted)
            loss.backward()
            optimizer.step()
            return loss.detach()

    return capture(step, device).replay


@pytest.fixture(scope="module")
def peer(device: Device) -> dict[str, Any]:
    """PEFT's time of the same step, and versions."""
    if importlib.util.find_spec("torch") is None or importlib.util.find_spec("peft") is None:
        pytest.skip("PEFT with torch is not installed")
    done = subprocess.run(
        [sys.executable, str(PEER)], input=json.dumps(TRANSFORMER), capture_output=True, text=True, check=False,
        timeout=PEER_SECONDS_ALLOWED,
    )  # fmt: skip
    assert done.returncode == 0, f"{PEER.name} failed:\n{done.stderr}"
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.benchmark(group="training steps")
def test_transformer(device: Device, peer: dict[str, Any], rng: np.random.Generator, benchmark: Any):
    seconds = wall_seconds(device, benchmark, transformer_step(device, rng))
    limit = min(peer["seconds"].values())
    shape = f"{TOKENS} tokens, {TRANSFORMER['blocks']} blocks of {TRANSFORMER['width']}"
    result = Result("training step", shape, "LoCon r=16", "", seconds, Limit.PEFT, limit, TRANSFORMER_GATE)
    record(benchmark, result, peer=peer)
