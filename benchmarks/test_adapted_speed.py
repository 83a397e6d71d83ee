"""Linear layers with live adapters against the bare linear by cuBLAS, through torch in the same run.

Device time by graph replay over rotated inputs, and the CPU time of a forward call.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from cases import Limit
from cuda.core import EventOptions
from measure import Result, record, side_by_side
from problem import fill_random, repeats
from right import assert_layer
from timing import rotations
from torch_limit import TorchReplay

from lycoris import tensor
from lycoris.algorithms import LoConModule, LoHaModule, LoKrModule, LycorisModule
from lycoris.buffers import DeviceArray, stream_of
from lycoris.graph import capture
from lycoris.nn import AdaptedLinear
from lycoris.tensor import no_grad
from plans.core import Device, ElementKind

BF16 = ElementKind.BF16
TOKENS, RANK = 4096, 16
FORWARD_BUDGET_SECONDS = 15e-6
CALLS = 200

MAKERS: dict[str, Callable[..., LycorisModule]] = {
    "LoCon r=16": lambda channels, out, **o: LoConModule.new_linear(channels, out, RANK, **o),
    "LoHa r=16": lambda channels, out, **o: LoHaModule.new_linear(channels, out, RANK, **o),
    "LoKr -1": lambda channels, out, **o: LoKrModule.new_linear(channels, out, 1 << 20, factor=-1, **o),
    "LoKr 8": lambda channels, out, **o: LoKrModule.new_linear(channels, out, 1 << 20, factor=8, **o),
    "LoKr 8 r=16": lambda channels, out, **o: LoKrModule.new_linear(channels, out, RANK, factor=8, **o),
}


@dataclass(frozen=True)
class Row:
    """A layer with so many adapters of a kind; ``gate`` is the largest ratio to the bare linear.

    ``rebuilt``: the merged weight is made anew in every call, as after every change of a strength.
    """

    tokens: int
    out: int
    channels: int
    adapter: str
    gate: float
    mode: str = "separate"
    count: int = 1
    rebuilt: bool = False

    def __str__(self) -> str:
        extra = "-rebuilt" if self.rebuilt else ""
        return f"{self.tokens}x{self.out}x{self.channels}-{self.count} {self.adapter}-{self.mode}{extra}"

    @property
    def work(self) -> str:
        """The row's name in the table."""
        rebuilt = ", made anew every call" if self.rebuilt else ""
        return f"linear + {self.count} adapter{'s' if self.count > 1 else ''}, {self.mode}{rebuilt}"


LARGE, SQUARE = ((12288, 3072), (14336, 4096)), ((3072, 3072), (4096, 4096))
ROWS = [
    *(Row(TOKENS, *shape, "LoCon r=16", 1.05) for shape in LARGE),
    *(Row(TOKENS, *shape, "LoCon r=16", 1.10) for shape in SQUARE),
    *(Row(TOKENS, *shape, "LoKr -1", 1.10) for shape in (*LARGE, *SQUARE)),
    *(Row(TOKENS, *shape, name, 1.20) for shape in LARGE for name in ("LoKr 8", "LoKr 8 r=16")),
    *(Row(TOKENS, *shape, name, 1.03, "merged") for shape in LARGE for name in ("LoHa r=16", "LoKr 8")),
    *(Row(TOKENS, *shape, name, 1.12, "merged", 1, True) for shape in LARGE for name in ("LoHa r=16", "LoKr 8")),
    *(Row(TOKENS, *shape, "LoHa r=16", 2.05) for shape in LARGE),
    *(Row(tokens, out, 4096, "LoCon r=16", 1.15) for tokens in (1, 4, 16) for out in (4096, 14336)),
]


def random_layer(device: Device, rng: np.random.Generator, row: Row) -> AdaptedLinear:
    """A layer of small random weights whose adapters' factors are all random."""
    layer = AdaptedLinear(random_tensor(device, rng, (row.out, row.channels)), mode=row.mode)
    for number in range(row.count):
        module = MAKERS[row.adapter](row.channels, row.out, device=device, seed=number)
        for name, factor in module.factors.items():
            values = 0.05 * rng.standard_normal(factor.shape)
            module.factors[name] = DeviceArray.from_numpy(values, factor.kind, device)
        layer.add(str(number), module, 0.5)
    return layer


def random_tensor(device: Device, rng: np.random.Generator, shape: tuple[int, ...]) -> tensor.Tensor:
    """Small random values in bf16."""
    made = DeviceArray.empty(shape, BF16, device)
    fill_random(device, rng, made.buffer, math.prod(shape) * BF16.itemsize, BF16, stream_of(device))
    return tensor.from_array(made)


class LayerReplay:
    """A captured call of a layer for each of several inputs, launched again and again."""

    def __init__(self, device: Device, rng: np.random.Generator, row: Row) -> None:
        nbytes = 2 * (row.tokens * (row.out + row.channels) + row.out * row.channels)
        count = rotations(nbytes, 2)
        self._stream = stream_of(device)
        layers = [random_layer(device, rng, row) for _ in range(min(count, 4))]
        inputs = [random_tensor(device, rng, (row.tokens, row.channels)) for _ in range(count)]
        self.kernel = row.mode

        rounds = repeats(count)

        def work() -> list:
            outputs: list[tensor.Tensor] = []
            for number, x in enumerate(inputs * rounds):
                layer = layers[number % count % len(layers)]
                if row.rebuilt:
                    layer.set_strength("0", 0.5)
                outputs = [*outputs, layer(x)][-count:]
            return outputs

        self._graph, self._count, self._held = capture(work, device), count * rounds, (layers, inputs)

    def assert_right(self, rng: np.random.Generator) -> None:
        """The last call's output, some rows of it, against float64."""
        layers, inputs = self._held
        last = len(inputs) - 1
        assert_layer(layers[last % len(layers)], inputs[last], self._graph.result[last], rng)

    def seconds(self) -> float:
        """Launch the graph and wait for it: device seconds of one call."""
        options = EventOptions(timing_enabled=True)
        start = self._stream.record(options=options)
        self._graph.replay()
        stop = self._stream.record(options=options)
        stop.sync()
        return (stop - start) * 1e-3 / self._count


def bare(row: Row) -> TorchReplay:
    """The linear layer alone, by cuBLAS."""
    torch = pytest.importorskip("torch", reason="the limit is measured through torch")
    shapes = [(row.tokens, row.out), (row.tokens, row.channels), (row.out, row.channels)]
    return TorchReplay(lambda out, x, w: torch.matmul(x, w.t(), out=out), shapes)


@pytest.mark.benchmark(group="layers")
@pytest.mark.parametrize("row", ROWS, ids=str)
def test_layer_speed(row: Row, device: Device, rng: np.random.Generator, benchmark: Any):
    ours, limit = LayerReplay(device, rng, row), bare(row)
    seconds, limit_seconds = side_by_side(benchmark, ours, limit)
    ours.assert_right(rng)
    shape = f"{row.tokens} x {row.out}x{row.channels}"
    record(benchmark, Result(row.work, shape, row.adapter, row.mode, seconds, Limit.CUBLAS, limit_seconds, row.gate))


@pytest.mark.benchmark(group="layers")
@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_three_adapters_cost_little_more_than_one(shape, device: Device, rng: np.random.Generator, benchmark: Any):
    """At most 0.03 of the bare linear more."""
    one, three = (Row(TOKENS, *shape, "LoCon r=16", 0.0, count=count) for count in (1, 3))
    single, limit = LayerReplay(device, rng, one), bare(one)
    singles = sorted(single.seconds() for _ in range(15))
    ours = LayerReplay(device, rng, three)
    seconds, limit_seconds = side_by_side(benchmark, ours, limit)
    ours.assert_right(rng)
    gate = singles[7] / limit_seconds + 0.03
    name = f"{TOKENS} x {three.out}x{three.channels}"
    record(benchmark, Result(three.work, name, three.adapter, "separate", seconds, Limit.CUBLAS, limit_seconds, gate))


@pytest.mark.benchmark(group="launch cost")
@pytest.mark.parametrize("mode", ["separate", "merged"])
def test_forward_cost(mode: str, device: Device, rng: np.random.Generator, benchmark: Any):
    """CPU time of a layer's forward while the GPU keeps up."""
    row = Row(64, 640, 640, "LoCon r=16", 1.0, mode)
    layer, x = random_layer(device, rng, row), random_tensor(device, rng, (row.tokens, row.channels))

    def run() -> None:
        with no_grad():
            for _ in range(CALLS):
                layer(x)

    benchmark.pedantic(run, setup=lambda: device.synchronize(stream_of(device)), rounds=20, warmup_rounds=3)
    device.synchronize(stream_of(device))
    seconds = benchmark.stats.stats.median / CALLS
    result = Result(
        f"AdaptedLinear.forward, {mode}", "64 x 640x640", row.adapter, "", seconds, Limit.BUDGET,
        FORWARD_BUDGET_SECONDS, 1.0,
    )  # fmt: skip
    record(benchmark, result)
