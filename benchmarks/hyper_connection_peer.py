"""torch's own times of hyper-connections, in a process of its own: the formula in ordinary operations, and compiled.

Reads a JSON list of problems on stdin: ``id``, ``form`` ("static" or "dynamic"), ``batch``, ``channels``, ``streams``,
``iterations``, ``eps``, ``dtype``, ``sets`` of operands to rotate over. The last line on stdout is a JSON object:
versions, and by id the median device seconds of a forward ("forward naive", "forward compiled") and the median wall
seconds of a forward and backward ("step naive", "step compiled").
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

ROUNDS = 7


def sinkhorn(logits: torch.Tensor, iterations: int) -> torch.Tensor:
    m = logits.clamp(max=20).exp()
    for _ in range(iterations):
        m = m / m.sum(-1, keepdim=True)
        m = m / m.sum(-2, keepdim=True)
    return m


def normalised(a: torch.Tensor, gamma: torch.Tensor, eps: float) -> torch.Tensor:
    return gamma.float() * a * torch.rsqrt(a.square().mean(-1, keepdim=True) + eps)


def static(x, gamma, h_pre, h_post, h_res, iterations, eps):
    m, p, q = sinkhorn(h_res, iterations), torch.sigmoid(h_pre), 2 * torch.sigmoid(h_post)
    streams = x.float()
    y = normalised(torch.einsum("i,bic->bc", p, streams), gamma, eps)
    return (torch.einsum("ij,bjc->bic", m, streams) + q[:, None] * y[:, None]).to(x.dtype)


def dynamic(x, gamma, projection, alpha, bias, group, iterations, eps):
    batch, n, _ = x.shape
    streams, flat = x.float(), x.reshape(batch, -1)
    root = torch.sqrt(flat.float().square().mean(-1, keepdim=True) + eps)
    logits = alpha[group] * (flat @ projection.t()).float() / root + bias
    p, q = torch.sigmoid(logits[:, :n]), 2 * torch.sigmoid(logits[:, n : 2 * n])
    m = sinkhorn(logits[:, 2 * n :].reshape(batch, n, n), iterations)
    y = normalised(torch.einsum("bi,bic->bc", p, streams), gamma, eps)
    return (torch.einsum("bij,bjc->bic", m, streams) + q[..., None] * y[:, None]).to(x.dtype)


def device_seconds(calls: list[Callable[[], Any]]) -> float:
    """Median device seconds of one call, over replays of a graph of all of them."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls[:3]:
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


def wall_seconds(call: Callable[[], Any]) -> float:
    """Median wall seconds of a call and its synchronisation."""
    times = []
    for _ in range(ROUNDS + 3):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[3:])


def measure(problem: dict[str, Any]) -> dict[str, float]:
    n, channels, batch = problem["streams"], problem["channels"], problem["batch"]
    dtype = getattr(torch, problem["dtype"])
    gamma = torch.randn(channels, device="cuda", dtype=torch.bfloat16)
    if problem["form"] == "static":
        function, shapes, dtypes = static, [(n,), (n,), (n, n)], [torch.float32] * 3
    else:
        m = n * (n + 2)
        function, shapes, dtypes = dynamic, [(m, n * channels), (3,), (m,)], [dtype, torch.float32, torch.float32]
    parameters = [
        (0.02 * torch.randn(shape, device="cuda")).to(kind) for shape, kind in zip(shapes, dtypes, strict=True)
    ]
    xs = [torch.randn(batch, n, channels, device="cuda", dtype=dtype) for _ in range(problem["sets"])]
    more = (problem["iterations"], problem["eps"])
    if problem["form"] == "dynamic":
        # Which alpha each row has; made here, since a graph cannot capture a copy from the host.
        more = (torch.tensor([0] * n + [1] * n + [2] * n * n, device="cuda"), *more)
    found = {}
    for name, run in (("naive", function), ("compiled", torch.compile(function, dynamic=False))):
        with torch.no_grad():
            calls = [lambda x=x, run=run: run(x, gamma, *parameters, *more) for x in xs]
            found[f"forward {name}"] = device_seconds(calls)
        leaves = [leaf.detach().requires_grad_() for leaf in (xs[0], gamma, *parameters)]
        d_out = torch.randn_like(xs[0])

        def step(run: Callable = run, leaves: list = leaves, d_out: torch.Tensor = d_out) -> None:
            torch.autograd.grad(run(*leaves, *more), leaves, d_out)

        found[f"step {name}"] = wall_seconds(step)
        torch.cuda.empty_cache()
    return found


def main() -> None:
    seconds = {problem["id"]: measure(problem) for problem in json.load(sys.stdin)}
    print(json.dumps({"versions": {"torch": torch.__version__}, "seconds": seconds}), flush=True)


if __name__ == "__main__":
    main()
