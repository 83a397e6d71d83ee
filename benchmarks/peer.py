"""The peers' own times, in a process of their own: lycoris-lora imports as ``lycoris``, as we do.

Reads a JSON list of problems on stdin: ``id``; ``module`` of ``lycoris.functional``; the weight's ``shape``; shapes of
the ``factors`` in that module's order (null where it takes None); ``pairs`` of buffers to rotate over, ``repeats``
times in one CUDA graph. ``tokens``: None for W + dW, else a linear layer of so many rows with the adapter beside it.
``module`` "peft" is such a layer by PEFT's LoRA, of rank ``factors[0][0]``. The last line on stdout is a JSON object:
versions and, by id, median device seconds of one call.

LYCORIS_PEER_SITE names the folder that ``pip install --target`` put lycoris-lora into.
"""

from __future__ import annotations

import importlib
import json
import os
import statistics
import sys
from importlib import metadata
from typing import Any

SITE = os.environ["LYCORIS_PEER_SITE"]
sys.path.insert(0, SITE)

import torch  # noqa: E402 - the peer's folder comes first

ROUNDS = 15


def random_tensor(shape: list[int]) -> torch.Tensor:
    return (torch.randn(shape, device="cuda") * 0.05).bfloat16()


def seconds_of(calls: list[Any]) -> float:
    """Median device seconds of one call, over replays of a graph of all of them."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls[:3]:  # tunes and compiles
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    times = []
    for _ in range(ROUNDS + 2):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) * 1e-3 / len(calls))
    return statistics.median(times[2:])


def layer_calls(problem: dict[str, Any]) -> list[Any]:
    """A linear layer with its adapter, as users of lycoris-lora's functional API and of PEFT run it."""
    out, channels = problem["shape"]
    inputs = [random_tensor([problem["tokens"], channels]) for _ in range(problem["pairs"])]
    if problem["module"] == "peft":
        layer = peft_layer(out, channels, problem["factors"][0][0])
        return [lambda x=x: layer(x) for x in inputs]
    module = importlib.import_module(f"lycoris.functional.{problem['module']}")
    weight = random_tensor(problem["shape"])
    factors = [None if shape is None else random_tensor(shape) for shape in problem["factors"]]

    def call(x: torch.Tensor) -> torch.Tensor:
        base = torch.nn.functional.linear(x, weight)
        return base + module.bypass_forward_diff(x, base, *factors, gamma=1.0, backend="triton")

    return [lambda x=x: call(x) for x in inputs]


def peft_layer(out: int, channels: int, rank: int) -> torch.nn.Module:
    """A linear layer with PEFT's LoRA, whose factors are both random."""
    peft = importlib.import_module("peft")
    model = torch.nn.Sequential(torch.nn.Linear(channels, out, bias=False))
    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=["0"], init_lora_weights=False)
    return peft.get_peft_model(model, config).to("cuda", torch.bfloat16).eval()


def measure_layer(problem: dict[str, Any]) -> float:
    """Seconds of one call of a layer."""
    with torch.no_grad():
        return seconds_of(layer_calls(problem) * problem["repeats"])


def measure(problem: dict[str, Any]) -> float:
    """W + dW into another buffer, as a user of the functional API writes it."""
    module = importlib.import_module(f"lycoris.functional.{problem['module']}")
    factors = [None if shape is None else random_tensor(shape) for shape in problem["factors"]]
    bases = [random_tensor(problem["shape"]) for _ in range(problem["pairs"])]
    outs = [torch.full_like(base, float("nan")) for base in bases]

    def call(base: torch.Tensor, out: torch.Tensor) -> None:
        torch.add(base, module.diff_weight(*factors, gamma=1.0, backend="triton"), out=out)

    calls = [lambda base=base, out=out: call(base, out) for base, out in zip(bases, outs, strict=True)]
    with torch.no_grad():
        seconds = seconds_of(calls * problem["repeats"])
    assert all(torch.isfinite(out).all() for out in outs), f"{problem['id']}: the result is not finite"
    return seconds


def main() -> None:
    (version,) = {d.version for d in metadata.distributions(name="lycoris-lora", path=[SITE])}
    problems = json.load(sys.stdin)
    seconds = {p["id"]: (measure if p.get("tokens") is None else measure_layer)(p) for p in problems}
    found = importlib.import_module("lycoris").__file__
    assert found.startswith(os.path.abspath(SITE)), f"lycoris came from {found}, wanted {SITE}"
    versions = {"lycoris-lora": version, "torch": torch.__version__, "triton": metadata.version("triton")}
    if any(problem["module"] == "peft" for problem in problems):
        versions["peft"] = metadata.version("peft")
    print(json.dumps({"versions": versions, "seconds": seconds}), flush=True)


if __name__ == "__main__":
    main()
