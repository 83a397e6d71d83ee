"""Attention beside PyTorch's flash attention: device time of the result alone, and with the gradients of q, k and v.

PyTorch's multiplies by `mma.sync` and walks over keys by the same algorithm as ours does (FlashAttention-2), so that
forward gates are what other tiles may cost; ours multiplies by `wgmma` where heads are of 64. Our gradients make the
scores twice, for results without atomic sums: seven products to five.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from cases import Limit
from measure import Result, record, side_by_side
from operand_buffers import Rotated
from problem import repeats
from right import assert_within, values_of
from timing import Replay
from torch_limit import TorchReplay

from plans.attention import (
    AttentionArgs,
    AttentionBackwardArgs,
    AttentionBackwardDescriptor,
    AttentionBackwardPlan,
    AttentionDescriptor,
    AttentionPlan,
)
from plans.core import Device

SHAPES = {
    "training gate, 4 x 16 heads of 64": AttentionDescriptor(4, 16, 1024, 1024, 64),
    "16 heads of 64": AttentionDescriptor(1, 16, 4096, 4096, 64),
    "16 heads of 64, causal": AttentionDescriptor(1, 16, 4096, 4096, 64, causal=True),
    "24 heads of 128": AttentionDescriptor(1, 24, 4608, 4608, 128),
    "32 heads of 128, causal": AttentionDescriptor(1, 32, 4096, 4096, 128, causal=True),
    "8 heads of 80": AttentionDescriptor(2, 8, 4096, 4096, 80),
}
FORWARD_GATE = {64: 1.25, 80: 1.25, 128: 1.45}
BOTH_GATE = {64: 1.6, 80: 1.6, 128: 1.8}


class _Sum:
    """Two replays as one: seconds of a call of each."""

    def __init__(self, *parts: Replay) -> None:
        self._parts = parts

    def seconds(self) -> float:
        return sum(part.seconds() for part in self._parts)


def _limit(descriptor: AttentionDescriptor, gradients: bool) -> TorchReplay:
    torch = pytest.importorskip("torch", reason="the limit is measured through torch")
    from torch.nn import attention, functional

    def forward(q: Any, k: Any, v: Any, *_: Any) -> Any:
        with attention.sdpa_kernel(attention.SDPBackend.FLASH_ATTENTION):
            return functional.scaled_dot_product_attention(q, k, v, is_causal=descriptor.causal)

    def both(q: Any, k: Any, v: Any, g: Any) -> Any:
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in (q, k, v)]
            return torch.autograd.grad(forward(*leaves), leaves, g)

    return TorchReplay(both if gradients else forward, [descriptor.shape] * 4)


def _forward_calls(runs: Rotated, plan: AttentionPlan) -> list:
    """The forward over the backward's operands, whose results it reads."""
    sets = [AttentionArgs(*arguments.reads[1:6]) for arguments in runs.arguments]
    return [lambda stream, args=args: plan.run(stream, None, args) for args in sets] * repeats(len(sets))


def _assert_right(runs: Rotated, plan: AttentionPlan, gradients: bool) -> None:
    """One head of the last operands against float64."""
    descriptor, args = runs.descriptor.forward, runs.arguments[-1]
    one = AttentionDescriptor(1, 1, *descriptor.shape[2:3], descriptor.keys, descriptor.width, causal=descriptor.causal)
    arrays = [
        values_of(runs.device, tensor, operand)[-1:, -1:]
        for tensor, operand in zip(args.tensors(), runs.operands, strict=True)
    ]
    d_out, out, _, *inputs = arrays[3:]
    exact = one.reference(inputs)
    assert_within(plan.precision_guarantee, out, exact.out(), one.operands()[0])
    if gradients:
        backward = AttentionBackwardDescriptor(one)
        for found, wanted, operand in zip(arrays[:3], exact.gradients(d_out), backward.results(), strict=True):
            assert_within(runs.plan.precision_guarantee, found, wanted, operand)


@pytest.mark.benchmark(group="attention")
@pytest.mark.parametrize("gradients", [False, True], ids=["forward", "forward and backward"])
@pytest.mark.parametrize("name", SHAPES)
def test_attention(name: str, gradients: bool, device: Device, rng: np.random.Generator, benchmark: Any):
    descriptor = SHAPES[name]
    limit = _limit(descriptor, gradients)
    plan = AttentionPlan.select(None, descriptor, device=device)

    def make(tensors: list) -> AttentionBackwardArgs:
        return AttentionBackwardArgs(tensors[:3], tensors[3:])

    with Rotated(device, AttentionBackwardPlan, AttentionBackwardDescriptor(descriptor), make, rng) as runs:
        forward = Replay(device, _forward_calls(runs, plan))
        forward.seconds()  # what the gradients read
        ours = _Sum(forward, Replay(device, runs.calls)) if gradients else forward
        seconds, limit_seconds = side_by_side(benchmark, ours, limit)
        _assert_right(runs, plan, gradients)
    products = (2 + 5 if gradients else 2) / (2 if descriptor.causal else 1)
    flops = 2 * products * np.prod(descriptor.shape) * descriptor.keys
    gate = (BOTH_GATE if gradients else FORWARD_GATE)[descriptor.width]
    work = "attention, forward and backward" if gradients else "attention"
    shape = f"{name}, {descriptor.queries} tokens"
    result = Result(work, shape, "", plan.chosen.name, seconds, Limit.TORCH, limit_seconds, gate)
    record(benchmark, result, teraflops=flops / seconds / 1e12, limit_teraflops=flops / limit_seconds / 1e12)
