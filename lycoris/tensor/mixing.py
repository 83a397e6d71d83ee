"""Blocks of a row mixed by a small matrix, with gradients: LoKr's first half, (w kron I) x."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from lycoris.errors import RefusedInput
from lycoris.tensor import autograd
from lycoris.tensor.adapter_gradients import mixing_gradient
from lycoris.tensor.launch import compact, converted, empty, keep, kept, run_prepared, same_device, shaped
from lycoris.tensor.tensor import Tensor
from plans.block_mix import BlockMixArgs, BlockMixDescriptor, BlockMixPlan
from plans.block_mix_streamed import spare_holds_all
from plans.core import BackendKind, Device, ElementKind, PlanPreference


def mix_blocks(x: Tensor, w: Tensor) -> Tensor:
    """out[..., l, e] = sum_m w[l, m] x[..., m, e]: x [..., m * e], w [l, m] -> [..., l * e].

    Raises RefusedInput where w's columns do not divide x's last axis.
    """
    if w.ndim != 2 or not x.shape or w.shape[1] == 0 or x.shape[-1] % w.shape[1]:
        raise RefusedInput(
            f"mix_blocks: x {x.shape} and w {w.shape}, wanted [..., m * e] and [l, m]; reshape one of them"
        )
    same_device("mix_blocks", (x, w))
    width, rows = x.shape[-1] // w.shape[1], x.size // max(1, x.shape[-1])
    flat, matrix = shaped(_ready(x), (rows, x.shape[-1])), _ready(w)
    out = shaped(mixed(flat, matrix, width, x.kind, False), (*x.shape[:-1], w.shape[0] * width))
    if not autograd.wanted((x, w)):
        return out
    shape = x.shape

    def pull(g: Tensor, edges: Sequence[autograd.Node | None]) -> list[Tensor | None]:
        g = shaped(compact(g.detach()), (rows, matrix.shape[0] * width))
        d_x = shaped(mixed(g, matrix, width, edges[0].kind, True), shape) if edges[0] else None
        return [d_x, mixing_gradient(g, flat, matrix.shape, width, edges[1].kind) if edges[1] else None]

    return autograd.record("mix_blocks", out, (x, w), (flat, matrix), pull)


def _ready(x: Tensor) -> Tensor:
    x = x.detach()
    return x if x.contiguous_ and x.aligned else converted(x, x.kind)


@functools.lru_cache(1 << 12)
def fits_spare(
    rows: int, out_blocks: int, in_blocks: int, width: int, kind: ElementKind, transposed: bool,
    spare: tuple[int, float], device: Device,
) -> bool:  # fmt: skip
    """Whether what an ``early`` mix's next launch spares is all that the mix needs."""
    kinds = (kind,) * 3
    descriptor = BlockMixDescriptor(rows, out_blocks, in_blocks, width, *kinds, transposed, early=True, spare=spare)
    streamed = BlockMixPlan.choose(descriptor, PlanPreference(), device).backend is BackendKind.STREAMED
    return streamed and spare_holds_all(descriptor)


def mixed(
    x: Tensor, w: Tensor, width: int, kind: ElementKind, transposed: bool, scale: float = 1.0, *, early: bool = False,
    spare: tuple[int, float] = (0, 0.0),
) -> Tensor:  # fmt: skip
    """What `mix_blocks` gives for a matrix of blocks of ``width``, by w or its transpose, times a number; no gradients.

    After an ``early`` one a sum that takes it as ``late`` is launched; ``spare`` is what that one's program can spare.
    """
    out_blocks, in_blocks = w.shape[::-1] if transposed else w.shape
    out = empty((x.shape[0], out_blocks * width), kind, x.device)
    key = ("block mix", x.layout, w.layout, width, kind, transposed, scale, early, *spare, x.device.ordinal)
    found = kept(key)
    if found is None:
        kinds, rows = (x.kind, w.kind, kind), x.shape[0]
        extents = (rows, out_blocks, in_blocks, width)
        descriptor = BlockMixDescriptor(*extents, *kinds, transposed, early=early, spare=spare)
        plan = BlockMixPlan.select(None, descriptor, device=x.device)
        found = keep(key, plan, [out], [x, w], functools.partial(BlockMixArgs, scale=scale))
    run_prepared(found[0], (out, x, w))
    return out
