"""Training of linear layers with one adapter, base frozen: device time of forward and backward against cuBLAS products.

The base's own products are its forward and the gradient of its input; LoHa needs the gradient of the weight too, and
apart from the base two more. Beside the layers, the plans of factors' gradients against a copy of the bytes that each
must read, and those that multiply most against cuBLAS.
"""

from __future__ import annotations

from dataclasses import is_dataclass, replace
from typing import Any

import numpy as np
import pytest
from cases import Limit
from cuda.core import EventOptions
from measure import Result, record, side_by_side
from operand_buffers import Rotated
from right import assert_gradients, assert_product
from test_adapted_speed import LARGE, TOKENS, Row, random_layer, random_tensor
from timing import Replay, rotations
from torch_limit import TorchReplay

from lycoris.buffers import stream_of
from lycoris.graph import capture
from lycoris.tensor import Tensor
from lycoris.tensor.autograd import enable_grad, grad
from plans.adapter_gradient import (
    BlockMixGradientArgs,
    BlockMixGradientDescriptor,
    BlockMixGradientPlan,
    HadamardGradientArgs,
    HadamardGradientDescriptor,
    HadamardGradientPlan,
    KroneckerBackArgs,
    KroneckerBackDescriptor,
    KroneckerBackPlan,
    KroneckerGradientArgs,
    KroneckerGradientDescriptor,
    KroneckerGradientPlan,
    LowRankGradientArgs,
    LowRankGradientDescriptor,
    LowRankGradientPlan,
)
from plans.core import BackendKind, Device, ElementKind, PlanPreference
from plans.matmul import MatmulArgs, MatmulDescriptor, MatmulPlan

SHAPES = ((3072, 3072), *LARGE)
LAYERS = [
    *(Row(TOKENS, *shape, "LoCon r=16", 1.12) for shape in SHAPES),
    *(Row(TOKENS, *shape, "LoKr -1", 1.25) for shape in SHAPES),
    *(Row(TOKENS, *shape, "LoKr 8", 1.45) for shape in SHAPES),
    *(Row(TOKENS, *shape, "LoHa r=16", 1.15, mode) for shape in SHAPES for mode in ("separate", "merged")),
]


def activation(x: Tensor) -> Tensor:
    """As another layer would have made it: its gradient has its own kind, where a leaf's adds up in fp32."""
    with enable_grad():
        return x.requires_grad_() * 1.0


class TrainingReplay:
    """A captured forward and backward of a layer for each of several inputs, launched again and again."""

    def __init__(self, device: Device, rng: np.random.Generator, row: Row) -> None:
        nbytes = 4 * (row.tokens * (row.out + row.channels) + row.out * row.channels)
        count = rotations(nbytes, 2)
        self._stream, self._count = stream_of(device), count
        layers = [random_layer(device, rng, row) for _ in range(min(count, 4))]
        inputs = [activation(random_tensor(device, rng, (row.tokens, row.channels))) for _ in range(count)]
        gradients = [random_tensor(device, rng, (row.tokens, row.out)) for _ in range(count)]
        for layer in layers:
            layer.train()
            for _, parameter in layer.parameters():
                parameter.requires_grad_()

        def work() -> list:
            found = []
            for number, (x, g) in enumerate(zip(inputs, gradients, strict=True)):
                layer = layers[number % len(layers)]
                with enable_grad():
                    y = layer(x)
                found.append(grad([y], [x, *(parameter for _, parameter in layer.parameters())], [g]))
            return found

        self._graph, self._held = capture(work, device), (layers, inputs, gradients)

    def seconds(self) -> float:
        """Launch the graph and wait for it: device seconds of one forward and backward."""
        options = EventOptions(timing_enabled=True)
        start = self._stream.record(options=options)
        self._graph.replay()
        stop = self._stream.record(options=options)
        stop.sync()
        return (stop - start) * 1e-3 / self._count


def products(row: Row) -> TorchReplay:
    """What the layer's mode multiplies, by cuBLAS."""
    pytest.importorskip("torch", reason="the limit is measured through torch")
    weights = 1 if row.mode == "merged" or "LoHa" not in row.adapter else 2
    shapes = [(row.tokens, row.channels), (row.tokens, row.out), (row.out, row.channels)]

    def call(x: Any, g: Any, w: Any) -> None:
        for _ in range(weights):
            x @ w.t()
            g @ w
        if "LoHa" in row.adapter:
            g.t() @ x

    return TorchReplay(call, shapes)


@pytest.mark.benchmark(group="training layers")
@pytest.mark.parametrize("row", LAYERS, ids=str)
def test_layer_training_speed(row: Row, device: Device, rng: np.random.Generator, benchmark: Any):
    seconds, limit_seconds = side_by_side(benchmark, TrainingReplay(device, rng, row), products(row))
    shape = f"{row.tokens} x {row.out}x{row.channels}"
    work = f"forward and backward, {row.mode}"
    record(benchmark, Result(work, shape, row.adapter, row.mode, seconds, Limit.CUBLAS, limit_seconds, row.gate))


def low_rank_arguments(tensors: list) -> LowRankGradientArgs:
    """Of tensors in the operands' order."""
    return LowRankGradientArgs([tuple(tensors[i : i + 3]) for i in range(0, len(tensors), 3)])


READING = [
    *((LowRankGradientPlan, LowRankGradientDescriptor(TOKENS, *shape, 16), low_rank_arguments) for shape in SHAPES),
    (LowRankGradientPlan, LowRankGradientDescriptor(TOKENS, 3072, 3072, 64), low_rank_arguments),
    (LowRankGradientPlan, LowRankGradientDescriptor(1024, 1280, 1280, 16), low_rank_arguments),
    *(
        (BlockMixGradientPlan, BlockMixGradientDescriptor(TOKENS, *blocks), lambda t: BlockMixGradientArgs(*t))
        for blocks in ((8, 8, 384), (48, 48, 64), (96, 48, 64))
    ),
    *(
        (KroneckerGradientPlan, KroneckerGradientDescriptor(TOKENS, *blocks), lambda t: KroneckerGradientArgs(*t))
        for blocks in ((48, 48, 64, 64), (96, 48, 128, 64), (112, 64, 128, 64))
    ),
    (KroneckerBackPlan, KroneckerBackDescriptor(TOKENS, 8, 8, 384, 384), lambda t: KroneckerBackArgs(*t)),
]


def _name(value: Any) -> str:
    extents = (vars(value)[field] for field in tuple(value.__dataclass_fields__)[:4]) if is_dataclass(value) else ()
    return getattr(value, "name", "") or "x".join(map(str, extents))


@pytest.mark.benchmark(group="training layers")
@pytest.mark.parametrize(("plan", "descriptor", "make"), READING, ids=_name)
def test_gradients_that_read(plan, descriptor, make, device: Device, rng: np.random.Generator, benchmark: Any):
    with Rotated(device, plan, descriptor, make, rng) as runs:
        seconds, limit = side_by_side(benchmark, Replay(device, runs.calls), Replay(device, runs.copy_calls))
        assert_gradients(runs)
        chosen = runs.plan.chosen.name
    record(benchmark, Result(plan.name, _name(descriptor), "", chosen, seconds, Limit.COPY, limit, None))


@pytest.mark.benchmark(group="training layers")
@pytest.mark.parametrize("backend", [BackendKind.WGMMA, BackendKind.MMA], ids=lambda backend: backend.value)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_hadamard_gradients(shape, backend, device: Device, rng: np.random.Generator, benchmark: Any):
    pytest.importorskip("torch", reason="the limit is measured through torch")
    descriptor = HadamardGradientDescriptor(TOKENS, *shape, 16, out=ElementKind.BF16)
    limit = TorchReplay(lambda g, x: g.t() @ x, [(TOKENS, shape[0]), (TOKENS, shape[1])])

    def make(t: list) -> HadamardGradientArgs:
        return HadamardGradientArgs(t[:4], *t[4:6], t[6:])

    preference = PlanPreference(prefer_backend=backend)
    with Rotated(device, HadamardGradientPlan, descriptor, make, rng, preference=preference) as runs:
        seconds, limit_seconds = side_by_side(benchmark, Replay(device, runs.calls), limit)
        assert_gradients(runs)
        chosen = runs.plan.chosen.name
    name = f"{TOKENS} x {shape[0]}x{shape[1]}"
    result = Result("Hadamard gradient", name, "LoHa r=16", chosen, seconds, Limit.CUBLAS, limit_seconds, None)
    record(benchmark, result)


@pytest.mark.benchmark(group="training layers")
@pytest.mark.parametrize("extents", [(64, 64, TOKENS * 48), (384, 384, TOKENS * 8), (1536, 384, TOKENS * 8)], ids=str)
def test_long_sums(extents, device: Device, rng: np.random.Generator, benchmark: Any):
    """The gradient of LoKr's w2."""
    pytest.importorskip("torch", reason="the limit is measured through torch")
    m, n, k = extents
    descriptor = replace(MatmulDescriptor(m, n, k, "TN"), out=ElementKind.F32)
    limit = TorchReplay(lambda a, b: a.t() @ b, [(k, m), (k, n)])
    with Rotated(device, MatmulPlan, descriptor, lambda t: MatmulArgs(*t), rng) as runs:
        seconds, limit_seconds = side_by_side(benchmark, Replay(device, runs.calls), limit)
        assert_product(runs, rng)
        chosen = runs.plan.chosen.name
    record(benchmark, Result("A^T B", str(extents), "LoKr", chosen, seconds, Limit.CUBLAS, limit_seconds, None))
