"""Liger-Kernel's own times of a hyper-connection around a sublayer that does nothing, in a process of its own.

Takes a problem in its turn (`turns.py`): ``part``, ``batch``, ``channels``, ``streams``, ``iterations``, ``eps``,
``sets`` of operands to rotate over. Answers ``versions`` and ``seconds``, of part "forward" the median device seconds
of one, of part "step" the median wall seconds of a forward and backward; bf16, H dynamic.

Liger's kernels are unrolled over the channels and over Sinkhorn's iterations, and compiled anew for every batch. Both
parts of a shape have processes of their own, so that they are compiled at the same time.

LYCORIS_PEER_SITE names the folder that ``pip install --target`` put liger-kernel into.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from importlib import metadata
from typing import Any

sys.path.insert(0, os.environ["LYCORIS_PEER_SITE"])

import torch
from hyper_connection_peer import device_seconds, wall_seconds
from liger_kernel.transformers.functional import (
    liger_mhc_coeffs,
    liger_mhc_post_res,
    liger_mhc_pre,
)
from turns import measure_in_turn


def connect(x, phi, bias, pre, post, res, iterations, eps):
    weights = {"tmax": iterations, "rms_eps": eps, "pre_eps": eps, "sinkhorn_eps": eps}
    h_pre, h_post, h_res = liger_mhc_coeffs(x, phi, bias, pre, post, res, **weights)
    return liger_mhc_post_res(x, liger_mhc_pre(x, h_pre), h_post, h_res)


def prepare(problem: dict[str, Any]) -> Callable[[], dict[str, Any]]:
    """Compile one part; what is returned measures it."""
    n, channels, batch = problem["streams"], problem["channels"], problem["batch"]
    m, more = n * (n + 2), (problem["iterations"], problem["eps"])
    phi = (0.02 * torch.randn(n * channels, m, device="cuda")).bfloat16()
    parameters = [phi, torch.randn(m, device="cuda"), *(torch.ones((), device="cuda") for _ in range(3))]
    x, d_out = (torch.randn(batch, n, channels, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    leaves = [leaf.detach().requires_grad_() for leaf in (x, *parameters)]

    def forward(x: torch.Tensor) -> None:
        with torch.no_grad():
            connect(x, *parameters, *more)

    def step() -> None:
        torch.autograd.grad(connect(*leaves, *more), leaves, d_out)

    def forward_seconds() -> float:
        xs = [x, *(torch.randn_like(x) for _ in range(problem["sets"] - 1))]
        return device_seconds([lambda x=x: forward(x) for x in xs])

    first, seconds_of = {
        "forward": (lambda: forward(x), forward_seconds),
        "step": (step, lambda: wall_seconds(step)),
    }[problem["part"]]
    first()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    versions = {name: metadata.version(name) for name in ("liger-kernel", "torch", "triton")}
    return lambda: {"versions": versions, "seconds": seconds_of()}


if __name__ == "__main__":
    measure_in_turn(prepare)
