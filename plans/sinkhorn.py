"""Sinkhorn-Knopp normalisation of batched [n, n] fp32 matrices towards doubly stochastic ones, and its gradient.

For example:

    plan = SinkhornPlan.select(stream, SinkhornDescriptor(batch=8, n=4, iterations=20, eps=1e-5, mode=SinkhornMode.EXP))
    plan.run(stream, None, SinkhornArgs(out, logits))

The two modes in use both come from manifold-constrained hyper-connections (DeepSeek-AI, arXiv:2512.24880); they differ
in how they start, in which sums they take first and in what eps does. Both end with a column step, so that columns sum
to 1 (in ``SOFTMAX`` to s / (s + eps)) and rows do as far as the iterations have converged.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from kernels import sinkhorn as kernel
from kernels import sinkhorn_thread as thread_kernel
from plans.core import (
    ArchSku,
    BackendKind,
    Device,
    ElementKind,
    InvalidProblem,
    MathPrecision,
    OpCategory,
    Operand,
    Plan,
    PrecisionGuarantee,
    Sku,
    TensorMut,
    TensorRef,
    Workspace,
)
from plans.core.plan import Arguments

MAX_ITERATIONS = 1000
_BLOCKS = 2**31
_F32 = ElementKind.F32


class SinkhornMode(enum.Enum):
    """How H becomes M; the value is the kernels' name.

    EXP, as in mHC.cu (github.com/AndreSlavescu/mHC.cu, sinkhorn_knopp.cuh): X = exp(min(H, 20)); then T times rows,
    then columns, each divided by its sum. eps is a guard: a row or column whose sum is not above it stays as it is.
    The clamp passes no gradient to a logit above 20, and a guarded line passes its gradient on unchanged.

    SOFTMAX, as in DeepSeek's TileLang kernels (github.com/tile-ai/tilelang, examples/deepseek_mhc/example_mhc_pre.py)
    and Liger-Kernel (github.com/linkedin/Liger-Kernel, ops/mhc.py): X = softmax of H's rows (maximum subtracted) + eps;
    columns; then T - 1 times rows, then columns, each divided by (its sum + eps).
    """

    EXP = "exp"
    SOFTMAX = "softmax"


def check_sinkhorn(where: str, iterations: int, eps: float) -> None:
    """Raise :class:`InvalidProblem` unless iterations are 1 to 1000 and eps, as fp32, lies in (0, 1)."""
    if not 1 <= iterations <= MAX_ITERATIONS:
        raise InvalidProblem(
            f"{where}: sinkhorn iterations {iterations}, wanted 1 to {MAX_ITERATIONS}; give another number"
        )
    if not 0 < np.float32(eps) < 1:
        raise InvalidProblem(f"{where}: eps {eps}, wanted a finite number in (0, 1) that fp32 holds; give another")


def sinkhorn_reference(logits: np.ndarray, iterations: int, eps: float, mode: SinkhornMode) -> np.ndarray:
    """M in float64 for logits [..., n, n]."""
    return _trajectory(logits, iterations, eps, mode)[-1][0]


def _trajectory(
    logits: np.ndarray, iterations: int, eps: float, mode: SinkhornMode
) -> list[tuple[np.ndarray, int, np.ndarray, np.ndarray]]:
    """The first matrix, then (matrix, summed axis, divisor, whether it was divided) after every step."""
    logits = np.asarray(logits, np.float64)
    nothing = np.zeros(0)
    if mode is SinkhornMode.EXP:
        axes = [-1, -2] * iterations
        x = np.exp(np.minimum(logits, kernel.MAX_EXPONENT))
    else:
        axes = [-2] + [-1, -2] * (iterations - 1)
        x = _softmax(logits) + eps
    states = [(x, 0, nothing, nothing)]
    for axis in axes:
        total = x.sum(axis, keepdims=True)
        divided = (total > eps) | (mode is SinkhornMode.SOFTMAX)
        by = np.where(divided, total if mode is SinkhornMode.EXP else total + eps, 1.0)
        x = x / by
        states.append((x, axis, by, divided))
    return states


def _softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def sinkhorn_backward_reference(
    logits: np.ndarray, d_out: np.ndarray, iterations: int, eps: float, mode: SinkhornMode
) -> tuple[np.ndarray, np.ndarray]:
    """The gradient of the logits in float64 and its magnitude, both [..., n, n].

    A step Y = X / s has dX = (dY - sum(dY * Y)) / s. The magnitude, one for a matrix, is the largest term that any
    step adds to the gradient with respect to the matrix's logarithm, dY * Y.
    """
    first, *states = _trajectory(logits, iterations, eps, mode)
    d = np.asarray(d_out, np.float64)
    largest = np.zeros(d.shape[:-2])
    for y, axis, by, divided in reversed(states):
        g = d * y
        terms = np.abs(g) + y * np.abs(g).sum(axis, keepdims=True)
        largest = np.maximum(largest, terms.max((-1, -2)))
        d = (d - divided * g.sum(axis, keepdims=True)) / by
    magnitude = np.broadcast_to(largest[..., None, None], d.shape)
    if mode is SinkhornMode.EXP:
        return d * first[0] * (np.asarray(logits) <= kernel.MAX_EXPONENT), magnitude
    p = _softmax(np.asarray(logits, np.float64))
    return p * (d - (d * p).sum(-1, keepdims=True)), magnitude


@dataclass(frozen=True)
class SinkhornDescriptor:
    """out = M = Sinkhorn(logits) of ``batch`` matrices [n, n] in fp32; see :class:`SinkhornMode` for the formulas."""

    batch: int
    n: int
    iterations: int
    eps: float
    mode: SinkhornMode

    category = OpCategory.HYPER_CONNECTION

    def __post_init__(self) -> None:
        if min(self.batch, self.n) < 1:
            raise InvalidProblem(
                f"sinkhorn: batch {self.batch} and n {self.n}, wanted both positive; skip what is empty"
            )
        check_sinkhorn("sinkhorn", self.iterations, self.eps)

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape of every operand."""
        return (self.batch, self.n, self.n)

    def operands(self) -> tuple[Operand, ...]:
        """``out`` and ``logits``."""
        return (Operand("out", _F32, self.shape, writes=True), Operand("logits", _F32, self.shape))

    def reference(self, logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """M in float64 and its magnitude: M itself, and so much that subnormal numbers do not count."""
        exact = sinkhorn_reference(logits, self.iterations, float(np.float32(self.eps)), self.mode)
        return exact, exact + 2.0**-100


class SinkhornBackwardDescriptor(SinkhornDescriptor):
    """d_logits = the gradient of the logits for the gradient d_out of M, through every iteration.

    The matrices that enter the iterations are recomputed from the logits and kept in the caller's workspace
    (4 * batch * iterations * n * n bytes); row and column sums are recomputed from them.
    """

    def operands(self) -> tuple[Operand, ...]:
        """``d_logits``, ``logits`` and ``d_out``."""
        return (
            Operand("d_logits", _F32, self.shape, writes=True),
            Operand("logits", _F32, self.shape),
            Operand("d_out", _F32, self.shape),
        )

    def reference(self, logits: np.ndarray, d_out: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The gradient in float64 and its magnitude."""
        eps = float(np.float32(self.eps))
        exact, magnitude = sinkhorn_backward_reference(logits, d_out, self.iterations, eps, self.mode)
        return exact, magnitude + 2.0**-100


class SinkhornArgs(Arguments):
    """The tensors of one forward run; they must not overlap."""

    def __init__(self, out: TensorMut, logits: TensorRef) -> None:
        super().__init__()
        self.out, self.logits = out, logits

    def tensors(self) -> list[TensorRef]:
        """``out`` and ``logits``."""
        return [self.out, self.logits]


class SinkhornBackwardArgs(Arguments):
    """The tensors of one backward run; they must not overlap."""

    def __init__(self, d_logits: TensorMut, logits: TensorRef, d_out: TensorRef) -> None:
        super().__init__()
        self.d_logits, self.logits, self.d_out = d_logits, logits, d_out

    def tensors(self) -> list[TensorRef]:
        """``d_logits``, ``logits`` and ``d_out``."""
        return [self.d_logits, self.logits, self.d_out]


def _start_units(descriptor: SinkhornDescriptor) -> float:
    """The relative error of the first matrix, in units of 2**-24.

    An exponential of 2 ulp. A softmax's difference from the maximum, r, is rounded, which costs r units of a term
    exp(-r) that counts beside eps as long as r < log(1 / eps) + 1; its sum and division cost n + 2.
    """
    if descriptor.mode is SinkhornMode.EXP:
        return 4.0
    return 4.0 + (1.0 - math.log(descriptor.eps)) + (descriptor.n + 2)


def sinkhorn_units(descriptor: SinkhornDescriptor, scaling: float = 1.0) -> float:
    """The relative error of M in units of 2**-24, to first order, where no sum lies within rounding of the guard.

    With elements wrong by at most e_k after k steps, and row and column scalings wrong by a_k and b_k, a step makes
    a_k <= b_(k-1) + e_k + n: a weighted mean of errors is no larger than they are, and n is the sum's rounding. e_k is
    the start's error and ``scaling`` units a step, one for a division and two for a reciprocal and a product. All K
    steps together: a + b + e <= 2 (K (start + n + 1) + scaling K**2 / 2) + e.
    """
    steps, start = 2 * descriptor.iterations, _start_units(descriptor)
    return 2 * (steps * (start + descriptor.n + 1) + scaling * steps**2 / 2) + start + scaling * steps


def gradient_units(descriptor: SinkhornDescriptor, scaling: float = 1.0) -> float:
    """The error of the logits' gradient in units of 2**-24 of the largest term that any step adds."""
    return 2 * (scaling * 2 * descriptor.iterations + descriptor.n + 6 + _start_units(descriptor))


_FORWARD_DERIVATION = (
    "exponential 2 ulp, a sum's roundings and the scaling's a step, carried through weighted means by all later steps: "
    "sinkhorn_units"
)
_BACKWARD_DERIVATION = (
    "of the largest term that any step adds: a step's roundings (2T times), a sum's (n), the matrix's, twice for what "
    "projections hand on; measured below a tenth of it, on nearly decomposable matrices too, where no sum is near eps"
)


def _guarantee(units: float, derivation: str) -> PrecisionGuarantee:
    return PrecisionGuarantee(
        math_precision=MathPrecision.F32,
        accumulator=_F32,
        deterministic=True,
        bit_stable_on_same_hardware=True,
        rounding_units=units,
        derivation=derivation,
    )


def _forward_guarantee(descriptor: SinkhornDescriptor) -> PrecisionGuarantee:
    return _guarantee(sinkhorn_units(descriptor), _FORWARD_DERIVATION)


def _backward_guarantee(descriptor: SinkhornDescriptor) -> PrecisionGuarantee:
    return _guarantee(gradient_units(descriptor), _BACKWARD_DERIVATION)


def _refuses(descriptor: SinkhornDescriptor) -> str:
    if descriptor.n > kernel.EXTENTS[-1]:
        return f"takes matrices of up to {kernel.EXTENTS[-1]} rows, not {descriptor.n}"
    return "" if descriptor.batch < _BLOCKS else "takes fewer than 2**31 matrices"


class _ForwardProgram:
    """One launch, one block a matrix."""

    def __init__(self, descriptor: SinkhornDescriptor, device: Device) -> None:
        make = kernel.sinkhorn(descriptor.mode.value, kernel.extent_for(descriptor.n))
        self.launch = make.launcher((descriptor.batch, 1, 1))
        self.scalars = (descriptor.n, descriptor.iterations, np.float32(descriptor.eps))

    def bind(self, args: SinkhornArgs, workspace: Workspace) -> list[tuple[Callable, tuple]]:
        """The launch."""
        return [(self.launch, (args.logits.data, args.out.data, *self.scalars))]


class _BackwardProgram:
    """One launch, one block a matrix: forward once more, keeping what enters each iteration, then back."""

    def __init__(self, descriptor: SinkhornBackwardDescriptor, device: Device) -> None:
        make = kernel.sinkhorn_backward(descriptor.mode.value, kernel.extent_for(descriptor.n))
        self.launch = make.launcher((descriptor.batch, 1, 1))
        self.scalars = (descriptor.n, descriptor.iterations, np.float32(descriptor.eps))

    def bind(self, args: SinkhornBackwardArgs, workspace: Workspace) -> list[tuple[Callable, tuple]]:
        """The launch."""
        entered = workspace.buffer.pointer(np.float32)
        pointers = (args.logits.data, args.d_out.data, args.d_logits.data, entered)
        return [(self.launch, (*pointers, *self.scalars))]


_RECIPROCAL_UNITS, _WAY_BACK_UNITS = 2.0, 4.0
"""Roundings of a step by a reciprocal and a product; and of one that is multiplied on again on the way back."""


def refuses_by_thread(descriptor: SinkhornDescriptor) -> str:
    """Why one thread does not take a matrix of the descriptor's, or ""."""
    if descriptor.n > thread_kernel.MAX_N:
        return f"takes matrices of up to {thread_kernel.MAX_N} rows, not {descriptor.n}"
    if np.float32(descriptor.eps) < np.finfo(np.float32).tiny:
        return f"takes eps from {np.finfo(np.float32).tiny}, whose reciprocal fp32 holds, not {descriptor.eps}"
    return "" if descriptor.batch < _BLOCKS else "takes fewer than 2**31 matrices"


def units_by_thread(descriptor: SinkhornDescriptor) -> float:
    """:func:`sinkhorn_units` of the kernels that keep a matrix in a thread."""
    return sinkhorn_units(descriptor, _RECIPROCAL_UNITS)


def gradient_units_by_thread(descriptor: SinkhornDescriptor) -> float:
    """:func:`gradient_units` of the kernels that keep a matrix in a thread."""
    return gradient_units(descriptor, _WAY_BACK_UNITS)


class _ThreadProgram:
    """One launch, one thread a matrix."""

    def __init__(self, descriptor: SinkhornDescriptor, device: Device) -> None:
        d, factory = descriptor, self.factory
        self.launch = factory(d.mode.value, d.n).launcher((-(-d.batch // thread_kernel.THREADS), 1, 1))
        self.scalars = (d.batch, d.iterations, np.float32(d.eps))

    factory = staticmethod(thread_kernel.sinkhorn_by_thread)

    def bind(self, args: SinkhornArgs, workspace: Workspace) -> list[tuple[Callable, tuple]]:
        """The launch."""
        return [(self.launch, (args.logits.data, args.out.data, *self.scalars))]


class _ThreadBackwardProgram(_ThreadProgram):
    """One launch, one thread a matrix: forward once more, keeping the divisors, then back."""

    factory = staticmethod(thread_kernel.sinkhorn_by_thread_backward)

    def bind(self, args: SinkhornBackwardArgs, workspace: Workspace) -> list[tuple[Callable, tuple]]:
        """The launch."""
        kept = workspace.buffer.pointer(np.float32)
        return [(self.launch, (args.logits.data, args.d_out.data, args.d_logits.data, kept, *self.scalars))]


class SinkhornPlan(Plan):
    """M = Sinkhorn(logits); see :class:`SinkhornDescriptor`."""

    name = "sinkhorn"
    skus = (
        Sku(
            name="thread",
            backend=BackendKind.VECTOR,
            arch=ArchSku.ANY,
            refuses=refuses_by_thread,
            guarantee=lambda d: _guarantee(units_by_thread(d), _FORWARD_DERIVATION),
            build=_ThreadProgram,
        ),
        Sku(
            name="portable",
            backend=BackendKind.PORTABLE,
            arch=ArchSku.ANY,
            refuses=_refuses,
            guarantee=_forward_guarantee,
            build=_ForwardProgram,
        ),
    )


class SinkhornBackwardPlan(Plan):
    """The gradient of the logits; see :class:`SinkhornBackwardDescriptor`."""

    name = "sinkhorn backward"
    skus = (
        Sku(
            name="thread",
            backend=BackendKind.VECTOR,
            arch=ArchSku.ANY,
            refuses=refuses_by_thread,
            guarantee=lambda d: _guarantee(gradient_units_by_thread(d), _BACKWARD_DERIVATION),
            build=_ThreadBackwardProgram,
            workspace=lambda d: 4 * d.batch * 2 * d.iterations * d.n,
        ),
        Sku(
            name="portable",
            backend=BackendKind.PORTABLE,
            arch=ArchSku.ANY,
            refuses=_refuses,
            guarantee=_backward_guarantee,
            build=_BackwardProgram,
            workspace=lambda d: 4 * d.batch * d.iterations * d.n * d.n,
        ),
    )
