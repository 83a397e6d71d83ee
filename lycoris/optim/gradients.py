"""What is done to gradients between ``backward`` and a step: statistics in one pass, clipping, normalisation, noise.

All work on the fp32 gradients of parameters, in place, without waiting for the device.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lycoris.errors import RefusedInput
from lycoris.optim.tables import Tables, flat
from lycoris.replay import only_recorded
from lycoris.tensor import autograd, pointwise
from lycoris.tensor.launch import F32, empty, filled, run, same_device
from lycoris.tensor.tensor import Tensor, changed
from plans import expression
from plans.core import Device, TensorRef
from plans.expression import leaf
from plans.gradients import (
    AdjustArgs,
    AdjustDescriptor,
    AdjustPlan,
    StatisticsArgs,
    StatisticsDescriptor,
    StatisticsPlan,
)
from plans.optimizer import block_table


@dataclass(frozen=True)
class GradientStatistics:
    """Norm, largest magnitude, NaN and infinite elements of all gradients, and the norms of each."""

    norm: float
    largest: float
    nan: int
    infinite: int
    norms: tuple[float, ...]

    @property
    def finite(self) -> bool:
        """Whether every element is finite."""
        return not self.nan and not self.infinite


def _gradients(operation: str, parameters: Sequence[Tensor]) -> list[Tensor]:
    found = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not found:
        raise RefusedInput(f"{operation}: no parameter has a gradient; call backward() first")
    for gradient in found:
        if gradient.kind is not F32 or not gradient.contiguous_ or not gradient.aligned:
            raise RefusedInput(
                f"{operation}: a gradient of {gradient.kind.value} and strides {gradient.strides}, wanted contiguous, "
                "aligned f32; let backward() make it"
            )
    return found


class _TensorTables:
    """What a launch over tensors of given counts reads, kept from call to call: addresses, blocks, ends."""

    def __init__(self, device: Device, counts: tuple[int, ...]) -> None:
        self.device, self.counts, self._tables = device, counts, Tables(device)

    def refs(self, tensors: Sequence[Tensor]) -> tuple[TensorRef, TensorRef]:
        """The tables of addresses and of blocks."""
        rows = np.array([[x.address for x in tensors], self.counts], np.int64).T
        return self._tables.set("addresses", rows).ref(), self._tables.set("blocks", block_table(self.counts)).ref()

    def ends(self, descriptor: StatisticsDescriptor) -> TensorRef:
        """The blocks up to each tensor's end."""
        return self._tables.set("ends", descriptor.ends()).ref()

    def members(self, tensors: Sequence[Tensor]) -> list[TensorRef]:
        """The tensors, which are reached by the tables; for the simulator's checks."""
        return [flat(tensor).mut() for tensor in tensors] if self.device.is_simulator else []


@functools.lru_cache(32)
def _tables(device: Device, counts: tuple[int, ...]) -> _TensorTables:
    return _TensorTables(device, counts)


def raw_statistics(tensors: Sequence[Tensor]) -> Tensor:
    """[tensors + 1, 4]: sum of squares, largest magnitude, NaN and infinite elements; of all in the last row."""
    device = same_device("statistics", tensors)
    kinds = {tensor.kind for tensor in tensors}
    if len(kinds) != 1:
        raise RefusedInput(
            f"statistics: tensors of {', '.join(k.value for k in kinds)}, wanted one kind; call it for each kind"
        )
    descriptor = StatisticsDescriptor(kinds.pop(), tuple(tensor.size for tensor in tensors))
    tables = _tables(device, descriptor.counts)
    out = empty((len(tensors) + 1, 4), F32, device)
    args = StatisticsArgs(out.mut(), tables.members(tensors), *tables.refs(tensors), tables.ends(descriptor))
    run(StatisticsPlan.select(None, descriptor, device=device), args)
    return out


def statistics(parameters: Sequence[Tensor]) -> GradientStatistics:
    """Norms and counts of the gradients, in one pass; waits for the device."""
    rows = raw_statistics(_gradients("statistics", parameters)).numpy().astype(float)
    norms = [math.sqrt(row[0]) for row in rows]
    _, largest, nan, infinite = rows[-1]
    return GradientStatistics(norms[-1], float(largest), int(nan), int(infinite), tuple(norms[:-1]))


def _clip_expression() -> expression.Expr:
    squares, limit = leaf(0), leaf(1)
    # Squares of NaN or infinite elements are not finite, and 0 * x says so; a step skips on a factor that is NaN.
    return expression.apply("minimum", limit / (squares.sqrt() + 1e-6), 1.0) + squares * 0.0


_CLIP = _clip_expression()


def clip_by_norm(parameters: Sequence[Tensor], limit: float) -> Tensor:
    """The factor min(1, limit / norm) of all gradients, on the device, for `Optimizer.step`; NaN if one is not finite.

    The gradients are left as they are: the step multiplies by it, without a pass of its own, or is skipped.
    """
    if limit <= 0:
        raise RefusedInput(f"clip_by_norm: limit {limit}, wanted a positive number; give another")
    found = raw_statistics(_gradients("clip_by_norm", parameters))
    with autograd.no_grad():
        return pointwise.apply(_CLIP, (found[-1, 0],), (float(limit),))


def skip_if_not_finite(parameters: Sequence[Tensor]) -> Tensor:
    """1, or NaN where a gradient is not finite: a scale with which `Optimizer.step` does nothing then."""
    found = raw_statistics(_gradients("skip_if_not_finite", parameters))
    with autograd.no_grad():
        return pointwise.apply(leaf(0) * 0.0 + 1.0, (found[-1, 1],))


def _adjust(
    operation: str,
    parameters: Sequence[Tensor],
    factors: Tensor | None = None,
    limit: float = math.inf,
    deviation: float = 0.0,
    seed: int = 0,
    step: int = 0,
) -> None:
    gradients = _gradients(operation, parameters)
    device = same_device(operation, gradients)
    descriptor = AdjustDescriptor(tuple(g.size for g in gradients), deviation > 0)
    tables = _tables(device, descriptor.counts)
    factors = filled((len(gradients),), 1.0, F32, device) if factors is None else factors
    plan = AdjustPlan.select(None, descriptor, device=device)
    members = tables.members(gradients)
    run(plan, AdjustArgs(members, *tables.refs(gradients), factors.ref(), limit, deviation, seed, step))
    changed(*gradients)


def clip_by_value(parameters: Sequence[Tensor], limit: float) -> None:
    """Every element of every gradient becomes the nearest number in [-limit, limit]; NaN stays."""
    if limit < 0:
        raise RefusedInput(f"clip_by_value: limit {limit}, wanted 0 or more; give another")
    _adjust("clip_by_value", parameters, limit=limit)


_ADAPTIVE = expression.apply("minimum", leaf(2) * leaf(1).sqrt().maximum(leaf(3)) / (leaf(0).sqrt() + 1e-6), 1.0)


def clip_adaptive(parameters: Sequence[Tensor], limit: float = 0.01, eps: float = 1e-3) -> None:
    """A gradient's norm becomes at most ``limit`` * max(its parameter's norm, eps): arXiv:2102.06171, by tensor."""
    having = [parameter for parameter in parameters if parameter.grad is not None]
    squares = raw_statistics(_gradients("clip_adaptive", having))[:-1, 0]
    with autograd.no_grad():
        own = [parameter.detach().to(F32) for parameter in having]
        sizes = raw_statistics([p if p.contiguous_ and p.aligned else p.clone() for p in own])[:-1, 0]
        factors = pointwise.apply(_ADAPTIVE, (squares, sizes), (float(limit), float(eps)))
    _adjust("clip_adaptive", having, factors)


def normalize(parameters: Sequence[Tensor], eps: float = 1e-6) -> None:
    """Every gradient divided by its own norm plus ``eps``."""
    squares = raw_statistics(_gradients("normalize", parameters))[:-1, 0]
    with autograd.no_grad():
        factors = pointwise.apply((leaf(0).sqrt() + leaf(1)).reciprocal(), (squares,), (float(eps),))
    _adjust("normalize", parameters, factors)


def add_noise(parameters: Sequence[Tensor], deviation: float, *, seed: int, step: int) -> None:
    """Normal noise of a deviation added to every gradient: the same for the same seed and step."""
    if deviation < 0:
        raise RefusedInput(f"add_noise: deviation {deviation}, wanted 0 or more; give another")
    if only_recorded() is not None:
        raise RefusedInput(f"add_noise: step {step} would be that of each replay; call it between replays")
    _adjust("add_noise", parameters, deviation=deviation, seed=seed, step=step)
