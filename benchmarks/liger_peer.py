"""Liger-Kernel's own times of a hyper-connection around a sublayer that does nothing, in a process of its own.

Reads a JSON list of problems on stdin: ``id``, ``batch``, ``channels``, ``streams``, ``iterations``, ``eps``, ``sets``
of operands to rotate over. The last line on stdout is a JSON object: versions, and by id the median device seconds of
a forward ("forward") and the median wall seconds of a forward and backward ("step"); bf16, H dynamic.

LYCORIS_PEER_SITE names the folder that ``pip install --target`` put liger-kernel into.
"""

from __future__ import annotations

import json
import os
import sys
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


def connect(x, phi, bias, pre, post, res, iterations, eps):
    weights = {"tmax": iterations, "rms_eps": eps, "pre_eps": eps, "sinkhorn_eps": eps}
    h_pre, h_post, h_res = liger_mhc_coeffs(x, phi, bias, pre, post, res, **weights)
    return liger_mhc_post_res(x, liger_mhc_pre(x, h_pre), h_post, h_res)


def measure(problem: dict[str, Any]) -> dict[str, float]:
    n, channels, batch = problem["streams"], problem["channels"], problem["batch"]
    m, more = n * (n + 2), (problem["iterations"], problem["eps"])
    phi = (0.02 * torch.randn(n * channels, m, device="cuda")).bfloat16()
    parameters = [phi, torch.randn(m, device="cuda"), *(torch.ones((), device="cuda") for _ in range(3))]
    xs = [torch.randn(batch, n, channels, device="cuda", dtype=torch.bfloat16) for _ in range(problem["sets"])]
    with torch.no_grad():
        forward = device_seconds([lambda x=x: connect(x, *parameters, *more) for x in xs])
    leaves = [leaf.detach().requires_grad_() for leaf in (xs[0], *parameters)]
    d_out = torch.randn_like(xs[0])
    return {
        "forward": forward,
        "step": wall_seconds(lambda: torch.autograd.grad(connect(*leaves, *more), leaves, d_out)),
    }


def main() -> None:
    seconds = {problem["id"]: measure(problem) for problem in json.load(sys.stdin)}
    versions = {name: metadata.version(name) for name in ("liger-kernel", "torch", "triton")}
    print(json.dumps({"versions": versions, "seconds": seconds}), flush=True)


if __name__ == "__main__":
    main()
