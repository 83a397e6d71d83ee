"""Products to test: random operands for any descriptor, a run over poisoned memory, and the guarantee's verdict."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from plans.core import BackendKind, Device, ElementKind, Operand, PlanPreference, TensorMut, Workspace
from plans.matmul import SegmentedMatmulArgs, SegmentedMatmulDescriptor, SegmentedMatmulPlan
from plans.matmul.epilogue import Residual

BF16, F16, F32 = ElementKind.BF16, ElementKind.F16, ElementKind.F32


@dataclass
class Problem:
    """Operands of a descriptor on the device and in float64, scales, and the result's memory, poisoned."""

    device: Device
    descriptor: SegmentedMatmulDescriptor
    args: SegmentedMatmulArgs
    segments: list[tuple[np.ndarray, np.ndarray]]
    epilogue: list[np.ndarray | None]
    numbers: list[float]
    low_rank: list[tuple[np.ndarray, np.ndarray]]

    def reference(self) -> tuple[np.ndarray, np.ndarray]:
        """The exact result and its magnitude."""
        scales = self.args.scales
        low_rank = self.low_rank, self.args.low_rank_scales
        return self.descriptor.reference(self.segments, scales, self.epilogue, self.numbers, *low_rank)

    def found(self) -> np.ndarray:
        """The result as it is stored."""
        return gather(self.device, self.args.out, self.descriptor.operands()[0])


def scatter(device: Device, operand: Operand, values: np.ndarray) -> TensorMut:
    """Values in device memory with the operand's strides, NaN between and after them."""
    flat = np.full(operand.span * operand.element.itemsize, 0xFF, np.uint8).view(operand.element.values)
    steps = tuple(stride * operand.element.itemsize for stride in operand.strides)
    if operand.count:
        np.lib.stride_tricks.as_strided(flat, operand.shape, steps)[...] = values
    buffer = device.upload(flat)
    data = buffer.pointer(operand.element.storage)
    return TensorMut(data, operand.shape, operand.strides, operand.element, operand.span, device.ordinal, buffer)


def gather(device: Device, tensor: TensorMut, operand: Operand) -> np.ndarray:
    """What device memory holds at the operand's elements; whatever lies between them has to be untouched."""
    flat = device.download(tensor.owner, operand.element.values, (operand.span,))
    steps = tuple(stride * operand.element.itemsize for stride in operand.strides)
    if not operand.count:
        return np.empty(operand.shape, operand.element.values)
    view = np.lib.stride_tricks.as_strided(flat, operand.shape, steps)
    found = view.copy()
    view[...] = np.nan
    assert np.isnan(flat.astype(np.float32)).all(), "elements between the result's rows were written"
    return found


def gaussian(rng: np.random.Generator) -> Callable[[tuple[int, ...]], np.ndarray]:
    """Normal numbers."""
    return rng.standard_normal


def small_integers(rng: np.random.Generator) -> Callable[[tuple[int, ...]], np.ndarray]:
    """Whole numbers whose products and sums are exact in fp32."""
    return lambda shape: rng.integers(-3, 4, shape).astype(np.float64)


def make(
    device: Device,
    descriptor: SegmentedMatmulDescriptor,
    draw: Callable[[tuple[int, ...]], np.ndarray],
    scales: tuple[float, ...] | None = None,
    beta: float = -0.75,
    low_rank_scales: tuple[float, ...] | None = None,
) -> Problem:
    """Fresh operands for a descriptor."""
    out, *operands = descriptor.operands()
    values = [np.asarray(draw(o.shape)).astype(o.element.values) for o in operands]
    tensors = [scatter(device, o, v) for o, v in zip(operands, values, strict=True)]
    result = scatter(device, out, np.full(out.shape, np.nan))
    firsts = 2 * len(descriptor.segments)
    count = firsts + 2 * len(descriptor.low_rank)
    entries = list(zip(tensors, values, strict=True))
    given = iter(entries[count:])
    arguments, arrays, numbers = [], [], []
    for step, operand in zip(descriptor.epilogue, descriptor.step_operands, strict=True):
        number = beta if isinstance(step, Residual) else 1.0
        tensor, array = next(given) if operand is not None else (None, None)
        arrays.append(array)
        numbers.append(number)
        if tensor is not None:
            arguments.append((tensor, number) if isinstance(step, Residual) else tensor)
    pairs = list(zip(entries[0:count:2], entries[1:count:2], strict=True))
    device_pairs = [(first[0], second[0]) for first, second in pairs]
    host_pairs = [(first[1], second[1]) for first, second in pairs]
    half = firsts // 2
    args = SegmentedMatmulArgs(result, device_pairs[:half], scales, arguments, device_pairs[half:], low_rank_scales)
    return Problem(device, descriptor, args, host_pairs[:half], arrays, numbers, host_pairs[half:])


def run(problem: Problem, poisoned: Callable, backend: BackendKind | None = None, workspace: bool = True):
    """Run on a SKU of the backend; the plan."""
    limit = 1 << 62 if workspace else 0
    preference = PlanPreference(prefer_backend=backend, max_workspace_bytes=limit)
    plan = SegmentedMatmulPlan.select(None, problem.descriptor, preference, problem.device)
    stream = problem.device.stream()
    size = plan.workspace_size()
    plan.run(stream, Workspace(poisoned(size)) if size else None, problem.args)
    problem.device.synchronize(stream)
    return plan


def assert_kept(problem: Problem, plan: SegmentedMatmulPlan) -> None:
    """The result keeps the plan's guarantee."""
    found, (exact, magnitude) = problem.found(), problem.reference()
    kept = plan.precision_guarantee.accepts(found, exact, magnitude, problem.descriptor.out)
    if not kept.all():
        worst = np.unravel_index(np.argmax(np.where(kept, 0, np.abs(found.astype(np.float64) - exact))), found.shape)
        raise AssertionError(
            f"{plan.chosen.name}: {(~kept).sum()} of {kept.size} elements beyond the guarantee; at {worst} "
            f"{found[worst]} instead of {exact[worst]}"
        )


def assert_exact(problem: Problem) -> None:
    """The result is the exact one, rounded once: for operands whose sums are exact in fp32."""
    found, (exact, _) = problem.found(), problem.reference()
    assert (np.abs(exact) < 2**24).all()
    np.testing.assert_array_equal(found, exact.astype(np.float32).astype(problem.descriptor.out.values))
