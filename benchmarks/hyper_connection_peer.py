"""torch's own times of a hyper-connection, in a process of its own: the formula in ordinary operations, and compiled.

Takes a problem in its turn (`turns.py`): ``form`` ("static" or "dynamic"), ``batch``, ``channels``, ``streams``,
``iterations``, ``eps``, ``dtype``, ``sets`` of operands to rotate over. Answers ``versions`` and ``seconds``: the
median device seconds of a forward ("forward naive", "forward compiled") and the median wall seconds of a forward and
backward ("step naive", "step compiled").
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from turns import measure_in_turn

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


def operands(problem: dict[str, Any]) -> tuple[Callable, list[torch.Tensor], tuple]:
    """The formula, its parameters and what else it takes."""
    n, channels = problem["streams"], problem["channels"]
    if problem["form"] == "static":
        function, shapes, dtypes, first = static, [(n,), (n,), (n, n)], [torch.float32] * 3, ()
    else:
        m = n * (n + 2)
        function, shapes = dynamic, [(m, n * channels), (3,), (m,)]
        dtypes = [getattr(torch, problem["dtype"]), torch.float32, torch.float32]
        # Which alpha each row has; made here, since a graph cannot capture a copy from the host.
        first = (torch.tensor([0] * n + [1] * n + [2] * n * n, device="cuda"),)
    parameters = [
        (0.02 * torch.randn(shape, device="cuda")).to(kind) for shape, kind in zip(shapes, dtypes, strict=True)
    ]
    gamma = torch.randn(channels, device="cuda", dtype=torch.bfloat16)
    return function, [gamma, *parameters], (*first, problem["iterations"], problem["eps"])


def prepare(problem: dict[str, Any]) -> Callable[[], dict[str, Any]]:
    """Compile both passes; what is returned measures them."""
    function, parameters, more = operands(problem)
    shape, dtype = (problem["batch"], problem["streams"], problem["channels"]), getattr(torch, problem["dtype"])
    x, d_out = (torch.randn(shape, device="cuda", dtype=dtype) for _ in range(2))
    leaves = [leaf.detach().requires_grad_() for leaf in (x, *parameters)]
    forms = {"naive": function, "compiled": torch.compile(function, dynamic=False)}

    def step(run: Callable) -> None:
        torch.autograd.grad(run(*leaves, *more), leaves, d_out)

    with torch.no_grad():
        forms["compiled"](x, *parameters, *more)
    step(forms["compiled"])
    torch.cuda.synchronize()
    torch.cuda.empty_cache()

    def measure() -> dict[str, Any]:
        xs, found = [x, *(torch.randn_like(x) for _ in range(problem["sets"] - 1))], {}
        for name, run in forms.items():
            with torch.no_grad():
                calls = [lambda x=x, run=run: run(x, *parameters, *more) for x in xs]
                found[f"forward {name}"] = device_seconds(calls)
            found[f"step {name}"] = wall_seconds(lambda run=run: step(run))
            torch.cuda.empty_cache()
        return {"versions": {"torch": torch.__version__}, "seconds": found}

    return measure


if __name__ == "__main__":
    measure_in_turn(prepare)
