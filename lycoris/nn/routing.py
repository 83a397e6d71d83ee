"""Each row of a batch with an adapter of its own, or none: what a server of many adapters runs.

    y[r] = x[r] W^T + b + s_a x[r] dW_a^T, a = choice[r]

LoCons share one small product with all their down factors; in every row all ranks but those of its adapter are then
set to zero, so that the batch stays together and the base is multiplied once. Others take a copy of x in which rows of
other adapters are zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from lycoris import tensor
from lycoris.errors import RefusedInput
from lycoris.tensor import Tensor
from lycoris.tensor.launch import empty, run
from plans.core import ElementKind
from plans.matmul import Bias, Segment, SegmentedMatmulArgs, SegmentedMatmulDescriptor, SegmentedMatmulPlan


@dataclass(frozen=True)
class Routes:
    """What rows choose from: all LoCons' factors one below the other, other adapters' deltas, and what each takes.

    ``rank_scales`` [adapters + 1, ranks] holds an adapter's scale at its ranks, ``dense_scales`` [adapters + 1, deltas]
    at its delta; zeros elsewhere and in the last row, which no adapter chooses.
    """

    down: Tensor | None
    up: Tensor | None
    rank_scales: Tensor | None
    dense: tuple[Tensor, ...]
    dense_scales: Tensor | None

    @classmethod
    def of(
        cls, low_rank: dict[int, tuple[Tensor, Tensor, float]], dense: dict[int, tuple[Tensor, float]], count: int
    ) -> Self:
        """Of adapters by number: (down, up, scale), or (delta, scale)."""
        downs, ups = ([entry[i] for entry in low_rank.values()] for i in (0, 1))
        ranks = np.zeros((count + 1, sum(down.shape[0] for down in downs)), np.float32)
        at = 0
        for number, (down, _, scale) in low_rank.items():
            ranks[number, at : at + down.shape[0]] = scale
            at += down.shape[0]
        deltas = np.zeros((count + 1, len(dense)), np.float32)
        for column, (number, (_, scale)) in enumerate(dense.items()):
            deltas[number, column] = scale
        device = (downs or [delta for delta, _ in dense.values()])[0].device
        return cls(
            tensor.cat(downs, 0).contiguous() if downs else None,
            tensor.cat(ups, 1).contiguous() if ups else None,
            tensor.from_numpy(ranks, device) if downs else None,
            tuple(delta for delta, _ in dense.values()),
            tensor.from_numpy(deltas, device) if dense else None,
        )


def choice_tensor(choice: Sequence[str | None] | Tensor, names: Sequence[str], rows: int, like: Tensor) -> Tensor:
    """Adapters by name (None for none) as numbers on the device; a tensor of int32 is taken as numbers already.

    Raises RefusedInput for a name that is not there, or another count than ``rows``.
    """
    if isinstance(choice, Tensor):
        if choice.kind is not ElementKind.I32 or choice.shape != (rows,):
            raise RefusedInput(
                f"choice: {choice.kind.value} of shape {choice.shape}, wanted i32 [{rows}]; give every row an "
                f"adapter's number, {len(names)} for none"
            )
        return choice
    if len(choice) != rows:
        raise RefusedInput(f"choice: {len(choice)} names for {rows} rows of x, wanted one for each; give None for none")
    numbers = {name: number for number, name in enumerate(names)} | {None: len(names)}
    unknown = [name for name in choice if name not in numbers]
    if unknown:
        known = ", ".join(map(repr, names)) or "none"
        raise RefusedInput(f"choice: no adapter {unknown[0]!r} on this layer; it has {known}")
    return tensor.from_numpy(np.array([numbers[name] for name in choice], np.int32), like.device)


def routed(x: Tensor, weight: Tensor, bias: Tensor | None, routes: Routes, choice: Tensor) -> Tensor:
    """The formula above for x [rows, in]; ``choice`` [rows] are adapters' numbers."""
    m, (n, k), kind = x.shape[0], weight.shape, x.kind
    segments, pairs = [Segment(k, a=kind, b=kind)], [(x, weight)]
    if routes.down is not None:
        inner = tensor.linear(x.to(kind), routes.down).to(ElementKind.F32)
        chosen = (inner * routes.rank_scales.index_select(0, choice)).to(kind)
        segments.append(Segment(routes.down.shape[0], a=kind, b=kind))
        pairs.append((chosen, routes.up))
    if routes.dense:
        scales = routes.dense_scales.index_select(0, choice)
        for column, delta in enumerate(routes.dense):
            masked = (x.to(ElementKind.F32) * scales[:, column : column + 1]).to(kind)
            segments.append(Segment(k, a=kind, b=kind))
            pairs.append((masked, delta))
    steps = () if bias is None else (Bias(bias.kind),)
    descriptor = SegmentedMatmulDescriptor(m, n, tuple(segments), kind, None, steps)
    out = empty((m, n), kind, x.device)
    operands = [] if bias is None else [bias.ref()]
    plan = SegmentedMatmulPlan.select(None, descriptor, device=x.device)
    run(plan, SegmentedMatmulArgs(out.mut(), [(a.ref(), b.ref()) for a, b in pairs], epilogue=operands))
    return out
