"""A transformer's training step by PEFT and torch.compile, in a process of its own: wall seconds of a step.

Reads on stdin a JSON object: ``width``, ``heads``, ``blocks``, ``batch``, ``length``, ``rank``. Writes one as its last
line on stdout: versions, and seconds by mode of torch.compile ("default"; "reduce-overhead", which replays graphs).
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from importlib import metadata
from typing import Any

import peft
import torch
from torch.nn import functional

ROUNDS, STEPS = 5, 10


class Block(torch.nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = torch.nn.LayerNorm(width), torch.nn.LayerNorm(width)
        self.qkv, self.out = torch.nn.Linear(width, 3 * width), torch.nn.Linear(width, width)
        self.up, self.down = torch.nn.Linear(width, 4 * width), torch.nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(functional.gelu(self.up(self.norm2(x))))


def step_seconds(problem: dict[str, Any], mode: str) -> float:
    """Median wall seconds of a step: forward, backward to LoRA's factors, AdamW in one fused launch."""
    torch.manual_seed(0)
    width, rank = problem["width"], problem["rank"]
    model = torch.nn.Sequential(*(Block(width, problem["heads"]) for _ in range(problem["blocks"])))
    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=["qkv", "out", "up", "down"])
    model = peft.get_peft_model(model, config, autocast_adapter_dtype=False).to("cuda", torch.bfloat16)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-4, fused=True)
    run = torch.compile(model, mode=mode)
    shape = (problem["batch"], problem["length"], width)
    x, wanted = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(2))

    def step() -> None:
        functional.mse_loss(run(x), wanted).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    times = []
    for _ in range(ROUNDS + 1):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(STEPS):
            step()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) / STEPS)
    return statistics.median(times[1:])


def main() -> None:
    problem = json.load(sys.stdin)
    seconds = {mode: step_seconds(problem, mode) for mode in ("default", "reduce-overhead")}
    versions = {"torch": torch.__version__, "peft": metadata.version("peft")}
    print(json.dumps({"versions": versions, "seconds": seconds}), flush=True)


if __name__ == "__main__":
    main()
